"""SIGINT and SIGTERM as a wish, for loops that ask between their steps."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def listening(note: Callable[[], None]) -> Iterator[None]:
    """Call `note` at either signal within; a second one acts as if nobody listened."""
    old = {s: signal.getsignal(s) for s in SIGNALS}

    def noted(number: int, frame: FrameType | None) -> None:
        note()
        signal.signal(number, old[signal.Signals(number)])

    for number in SIGNALS:
        signal.signal(number, noted)
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
