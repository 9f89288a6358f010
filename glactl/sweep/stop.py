"""When a sweep is to stop: at a signal, at its deadline, or when the process that began it is gone.

Trials ask between their steps, so that nothing is stopped in the middle of one.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from glactl.signals import listening


def never() -> bool:
    """The answer where nothing stops a trial."""
    return False


class Stop:
    """Whether to stop, and why.

    Args:
        until: the time of the deadline, as time.time() counts; None: there is none.
        parent: the process without which there is nobody left to work for; None: there is none.
    """

    def __init__(self, until: float | None = None, parent: int | None = None) -> None:
        self.until, self.parent = until, parent
        self.signalled = False

    def __call__(self) -> bool:
        """Whether to stop."""
        return self.signalled or self.late or self.alone

    @property
    def late(self) -> bool:
        """Whether the deadline is over."""
        return self.until is not None and time.time() >= self.until

    @property
    def alone(self) -> bool:
        """Whether the parent has gone."""
        return self.parent is not None and os.getppid() != self.parent

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Note SIGINT and SIGTERM within; a second one acts as if nobody listened."""

        def note() -> None:
            self.signalled = True

        with listening(note):
            yield
