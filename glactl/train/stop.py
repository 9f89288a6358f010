"""Signals that end a run after it has saved."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from glactl.signals import listening


class Stopped(Exception):
    """A signal ended the run after `step`; `path` is the checkpoint, None where nothing is kept."""

    exit_code = 6

    def __init__(self, step: int, path: str | None) -> None:
        message = f"stopped after step {step}"
        if path is not None:  # RUN/checkpoints/step-000123
            message += f", saved; resume: glactl train --resume {Path(path).parents[1]}"
        super().__init__(message)
        self.step, self.path = step, path


class StopFlag:
    """Set by a signal, read by the loop; a second signal acts as if nobody listened."""

    def __init__(self) -> None:
        self.wanted = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note SIGINT and SIGTERM in `wanted` for as long as this lasts."""

        def note() -> None:
            self.wanted = True

        with listening(note):
            yield

    @contextmanager
    def deaf(self) -> Iterator[None]:
        """Leave the signals as they are."""
        yield
