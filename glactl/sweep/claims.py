"""Which of several sweeps on one folder runs a trial: the one that holds its claim.

A claim is a lock on `.claims/KEY`. The system lets go of it when its process ends, however that
is, so that a killed sweep leaves nothing that would have to be cleared away by hand.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class Claims:
    """The claims in a folder of results."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / ".claims"

    @contextmanager
    def hold(self, key: str) -> Iterator[bool]:
        """Hold the claim of `key` within; False where another has it."""
        held = self._take(key)
        try:
            yield held is not None
        finally:
            if held is not None:
                # while it is locked: whoever has opened it sees afterwards that it is gone
                with suppress(FileNotFoundError):
                    (self.folder / key).unlink()
                os.close(held)
                with suppress(OSError):  # another claim is in it
                    self.folder.rmdir()

    def _take(self, key: str) -> int | None:
        path = self.folder / key
        while True:
            with suppress(FileExistsError):  # it went while mkdir looked whether it is a folder
                self.folder.mkdir(parents=True, exist_ok=True)
            try:
                file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except FileNotFoundError:  # the folder went meanwhile
                continue
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(file)
                return None
            if self._is_at(path, file):
                return file
            os.close(file)  # it went between opening and locking

    @staticmethod
    def _is_at(path: Path, file: int) -> bool:
        try:
            return os.path.samestat(path.stat(), os.fstat(file))
        except FileNotFoundError:
            return False
