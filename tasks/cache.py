"""Answers of a model to requests, kept so that nothing is asked twice.

A file a model, to which lines are only added:

    {"key": "4be1...", "value": -41.7, "cut": false}

`cut` tells whether the context was cut to the model's length. The key is the sha256 of the data's
revision and of all that was asked, the file's name that of the weights and of how they are read: an
answer depends on neither batch nor rank, so an evaluation that was stopped goes on, with another
batch or other ranks too. Several processes may add to one file; half a line, of one that was
killed, is passed over.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

Answer = tuple[Any, bool]  # value, cut


def request_key(revision: str, kind: str, *asked: Any) -> str:
    """The key of a request: 32 hex digits.

    Args:
        revision: of the task and its data.
        kind: loglikelihood, rolling or generate.
        asked: the rest, as JSON can hold it.
    """
    made = hashlib.sha256()
    for part in (revision, kind, *asked):
        # a prompt is hashed as it is: to escape it takes four times as long
        plain = isinstance(part, str)
        data = (part if plain else json.dumps(part, sort_keys=True, ensure_ascii=False)).encode()
        made.update(b"%c%d:" % (b"ts"[plain], len(data)) + data)
    return made.hexdigest()[:32]


class Cache:
    """The answers of one model.

    Args:
        path: the file; it need not exist. None: nothing is kept beyond this object.

    Attributes:
        found: answers that were there at the start.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._values: dict[str, Answer] = {}
        self._handle: int | None = None
        if path is not None and path.exists():
            for line in path.read_bytes().split(b"\n"):
                try:
                    row = json.loads(line)
                    self._values[row["key"]] = row["value"], row["cut"]
                except (ValueError, KeyError, TypeError):
                    continue  # half a line
        self.found = len(self._values)

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def __getitem__(self, key: str) -> Answer:
        return self._values[key]

    def add(self, key: str, value: Any, cut: bool = False) -> None:
        """Keep an answer, on the disk at once."""
        self._values[key] = value, cut
        if self.path is None:
            return
        if self._handle is None:
            self._handle = self._open(self.path)
        # one write of whole lines: those of other processes cannot come between
        line = json.dumps({"key": key, "value": value, "cut": cut}) + "\n"
        os.write(self._handle, line.encode())

    def close(self) -> None:
        """Let go of the file; the answers stay."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    @staticmethod
    def _open(path: Path) -> int:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        size = os.fstat(handle).st_size
        if size and os.pread(handle, 1, size - 1) != b"\n":
            os.write(handle, b"\n")  # half a line must not swallow the next one
        return handle
