"""Filter of Orbax's log messages."""

import logging
import os


def quiet_orbax() -> None:
    """Drop Orbax's progress messages and tracebacks: errors reach the caller as exceptions."""
    logging.getLogger("absl").addFilter(_not_orbax)


def _not_orbax(record: logging.LogRecord) -> bool:
    from_orbax = os.path.join("orbax", "checkpoint") in record.pathname
    return not from_orbax or (record.levelno >= logging.WARNING and not record.exc_info)
