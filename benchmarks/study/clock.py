"""Time limit of a call, and claims of processes on runs."""

import os
import time
from pathlib import Path


class Clock:
    """Seconds that are left of some minutes; without a number of minutes there is no end."""

    def __init__(self, minutes: float | None):
        self._end = None if minutes is None else time.monotonic() + 60 * minutes

    def left(self) -> float:
        """Seconds until the end, infinite without one."""
        return float("inf") if self._end is None else self._end - time.monotonic()


class Claims:
    """Which of several processes on one machine works on a run."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder

    def take(self, name: str) -> bool:
        """Claim a run; False if another process that is alive has it."""
        if self.others(name):
            return False
        if self._owner(name) is not None:  # of a process that has ended
            self.release(name)
        try:
            with self._file(name).open("x") as file:
                file.write(str(os.getpid()))
        except FileExistsError:  # another process was quicker
            return False
        return True

    def release(self, name: str) -> None:
        """Give a run back."""
        self._file(name).unlink(missing_ok=True)

    def others(self, name: str) -> bool:
        """Whether another process that is alive has claimed a run."""
        owner = self._owner(name)
        if owner is None or owner == os.getpid():
            return False
        try:
            os.kill(owner, 0)  # sends nothing
        except ProcessLookupError:
            return False
        return True

    def _owner(self, name: str) -> int | None:
        try:
            text = self._file(name).read_text()
        except FileNotFoundError:
            return None
        # An empty file is being written by whoever has just made it.
        return int(text) if text else os.getppid()

    def _file(self, name: str) -> Path:
        return self._folder / name
