"""Which revision of each of the hub's data sets is read: the one that was read first.

A file of JSON, {"hazyresearch/based-fda": "<commit>", ...}, so that an evaluation that is resumed,
or repeated for another model, has the same rows whatever has happened on the hub meanwhile.
"""

import json
import os
from pathlib import Path

from glactl.tasks import hub


class Pins:
    """The revisions that were read.

    Args:
        path: the file; it need not exist. None: nothing is kept beyond this object.

    Raises:
        ValueError: the file is not such JSON.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._commits: dict[str, str] = {}
        if path is not None and path.exists():
            try:
                found = json.loads(path.read_text(encoding="utf-8"))
                self._commits = {str(name): str(commit) for name, commit in found.items()}
            except (ValueError, AttributeError):
                raise ValueError(f"{path} is not a JSON object of data sets; delete it") from None

    def get(self, name: str) -> str | None:
        """The commit of a data set that was read first; None: it has not been read."""
        return self._commits.get(name)

    def keep(self, name: str, commit: str | None) -> None:
        """Keep what was read, unless something is kept already or `commit` is none."""
        if commit is None or not hub.is_commit(commit) or name in self._commits:
            return
        self._commits[name] = commit
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        half = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        half.write_text(json.dumps(self._commits, indent=1, sort_keys=True) + "\n")
        half.replace(self.path)  # whole or not at all; several ranks write the same
