"""Processes of a run on several hosts."""

import jax
from jax.experimental import multihost_utils


def sync(name: str) -> None:
    """Wait until all processes of the run have reached the barrier of this name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
