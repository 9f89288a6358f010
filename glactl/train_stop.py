"""Signals that end a run after it has saved."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType


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
        old = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

        def note(number: int, frame: FrameType | None) -> None:
            self.wanted = True
            signal.signal(number, old[signal.Signals(number)])

        for number in old:
            signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in old.items():
                signal.signal(number, handler)

    @contextmanager
    def deaf(self) -> Iterator[None]:
        """Leave the signals as they are."""
        yield
