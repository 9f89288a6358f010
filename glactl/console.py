"""All that reaches the terminal: results on stdout, progress, notes and errors on stderr.

Exit codes:

    0  done
    1  a check failed (a comparison or a regression), or an unknown error (with its traceback)
    2  bad input: a spec, an option, a path
    3  the environment: a device, a package, a data set or a disk that cannot be had
    4  out of memory
    5  numerics: the loss is not finite
    6  stopped by a signal or --minutes, after saving: --resume, or the same mqar command, goes on

NO_COLOR takes colours away; GLACTL_TRACEBACK=1 shows where an error came from.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import typer

PLAIN_EVERY = 5.0  # seconds between progress lines where there is no terminal

_above: Callable[[str], None] | None = None  # prints above the bar, while there is one


def error(message: str) -> None:
    """One red line on stderr; line breaks in `message` become spaces."""
    line = typer.style(f"error: {' '.join(message.split())}", fg="red" if _colour() else None)
    typer.echo(line, err=True)


def note(text: str) -> None:
    """A line of information on stderr, so that stdout keeps the results only."""
    _echo(text, err=True)


def result(value: object) -> None:
    """`value` as one line of JSON on stdout; numbers that JSON lacks (nan, inf) become null."""
    _echo(json.dumps(finite(value), allow_nan=False, default=str))


def say(text: str) -> None:
    """A line of results on stdout."""
    _echo(text)


def write(text: str) -> None:
    """Results on stdout as they come, without a line break, at once."""
    typer.echo(text, nl=False)
    sys.stdout.flush()


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], title: str = "") -> None:
    """Aligned columns on stdout, numbers to the right; the same text on a terminal and in a file.

    Args:
        columns: the heads.
        rows: cells; floats are shown with 4 significant digits, None as "-".
        title: a line above the table.
    """
    cells = [[cell(c) for c in row] for row in rows]
    right = [
        all(not isinstance(row[i], str) for row in rows) and bool(rows) for i in range(len(columns))
    ]
    widths = [max(len(line[i]) for line in [list(columns), *cells]) for i in range(len(columns))]

    def line(texts: Sequence[str]) -> str:
        pads = (
            t.rjust(w) if r else t.ljust(w) for t, w, r in zip(texts, widths, right, strict=True)
        )
        return "  ".join(pads).rstrip()

    if title:
        say(title)
    for text in [line(list(columns)), *map(line, cells)]:
        say(text)


@contextmanager
def progress(
    total: int, label: str = "", done: int = 0, quiet: bool = False
) -> Iterator[Callable[..., None]]:
    """Show how far a loop is; on stderr.

    Args:
        total: how many times the loop turns.
        label: its name, e.g. "step".
        done: turns made before (a resumed run).
        quiet: show nothing.

    Yields:
        advance(n=1, **numbers): n more turns are done; `numbers` are shown beside the bar. On a
        terminal a bar with the time left, else a line every 5 s and one for the last turn.
    """
    show = _bar if sys.stderr.isatty() else _lines
    if quiet:
        yield lambda n=1, **numbers: None
        return
    with show(total, label, done) as advance:
        yield advance


@contextmanager
def live(columns: Sequence[str], quiet: bool = False) -> Iterator[Callable[..., None]]:
    """Show a table that changes in its place; on stderr.

    Yields:
        show(rows, line): on a terminal the rows, cells as of `table`, and the line below them; else
        the line alone, at most every 5 s.
    """
    last = time.monotonic()

    def tell(rows: Sequence[Sequence[object]], line: str) -> None:
        nonlocal last
        if not quiet and time.monotonic() - last >= PLAIN_EVERY:
            last = time.monotonic()
            note(line)

    if quiet or not sys.stderr.isatty():
        yield tell
        return
    with _live(columns) as show:
        yield show


@contextmanager
def errors() -> Iterator[None]:
    """Errors that a user can act on become one line and an exit code; others keep their trace."""
    try:
        yield
    except Exception as caught:
        code = exit_code(caught)
        if code is None or os.environ.get("GLACTL_TRACEBACK"):
            raise
        if code == 6:
            note(_message(caught))
        else:
            error(_message(caught))
        raise typer.Exit(code) from None


def exit_code(caught: BaseException) -> int | None:
    """The exit code for an exception, None for one that is a fault of the program.

    An exception class of ours may state its own as the attribute `exit_code`.
    """
    own = getattr(caught, "exit_code", None)
    if isinstance(own, int):
        return own
    if _out_of_memory(caught):
        return 4
    if isinstance(caught, FloatingPointError):
        return 5
    if isinstance(caught, (ValueError, FileNotFoundError)):
        return 2
    if isinstance(caught, BrokenPipeError):
        return None  # the reader of stdout has gone; typer ends the program quietly
    if isinstance(caught, OSError) or _missing_package(caught):
        return 3
    return None


def _message(caught: Exception) -> str:
    if _out_of_memory(caught):
        first = str(caught).strip().split("\n")[0] or type(caught).__name__
        return f"out of memory: {first[:200]} (a smaller batch_size or seq_len needs less)"
    if _missing_package(caught):
        name = getattr(caught, "name", None)
        return f"the package {name!r} is not installed; pip install {name}"
    if isinstance(caught, FileNotFoundError) and caught.filename is not None:
        return f"no such file: {caught.filename}"
    return str(caught) or type(caught).__name__


def _out_of_memory(caught: BaseException) -> bool:
    # torch.OutOfMemoryError by name: torch takes over 0.7 s to import. The CPU allocator raises a
    # bare RuntimeError, known only by its text.
    text = str(caught)
    return (
        isinstance(caught, MemoryError)
        or type(caught).__name__ == "OutOfMemoryError"
        or (isinstance(caught, RuntimeError) and "DefaultCPUAllocator" in text)
    )


def _missing_package(caught: BaseException) -> bool:
    name = getattr(caught, "name", None) or "glactl"
    return isinstance(caught, ModuleNotFoundError) and not name.startswith("glactl")


def _echo(text: str, err: bool = False) -> None:
    if _above is not None and (sys.stderr if err else sys.stdout).isatty():
        _above(text)
    else:
        typer.echo(text, err=err)


def _colour() -> bool:
    return sys.stderr.isatty() and not os.environ.get("NO_COLOR")


def finite(value: Any) -> Any:
    """`value` as JSON can hold it: nan and inf, also inside of lists and mappings, become None."""
    if isinstance(value, dict):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(v) for v in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return value


def cell(value: object) -> str:
    """A value as tables show it: 4 significant digits, None as "-"."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return str(value)


def counted(n: int, what: str) -> str:
    """So many of a thing: "1 trial", "2 trials"."""
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def clock(seconds: float) -> str:
    """Seconds as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _numbers(numbers: dict[str, object]) -> str:
    return "  ".join(f"{name} {cell(value)}" for name, value in numbers.items())


@contextmanager
def _bar(total: int, label: str, done: int) -> Iterator[Callable[..., None]]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeRemainingColumn as Left

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}", markup=False),
        TextColumn("eta"),
        Left(),
    )
    global _above
    console = Console(stderr=True, highlight=False)
    with Progress(*columns, console=console, redirect_stdout=False) as bar:
        _above = lambda text: console.print(text, markup=False, soft_wrap=True)  # noqa: E731
        task = bar.add_task(label, total=total, completed=done, numbers="")

        def advance(n: int = 1, **numbers: object) -> None:
            if numbers:
                bar.update(task, advance=n, numbers=_numbers(numbers))
            else:
                bar.update(task, advance=n)

        try:
            yield advance
        finally:
            _above = None


@contextmanager
def _live(columns: Sequence[str]) -> Iterator[Callable[..., None]]:
    from rich.console import Console, Group
    from rich.live import Live
    from rich.table import Table
    from rich.text import Text

    global _above
    console = Console(stderr=True, highlight=False)
    with Live(console=console, auto_refresh=False, transient=True, redirect_stdout=False) as shown:
        _above = lambda text: console.print(text, markup=False, soft_wrap=True)  # noqa: E731

        def show(rows: Sequence[Sequence[object]], line: str) -> None:
            table = Table(*columns, box=None, padding=(0, 2, 0, 0))
            for row in rows:
                table.add_row(*(Text(cell(value)) for value in row))
            shown.update(Group(table, Text(line)), refresh=True)

        try:
            yield show
        finally:
            _above = None


@contextmanager
def _lines(total: int, label: str, done: int) -> Iterator[Callable[..., None]]:
    start = last = time.monotonic()
    first, latest = done, ""

    def advance(n: int = 1, **numbers: object) -> None:
        nonlocal done, last, latest
        done, now = done + n, time.monotonic()
        latest = _numbers(numbers) or latest
        if done < total and now - last < PLAIN_EVERY:
            return
        last = now
        eta = (now - start) / max(done - first, 1) * (total - done)
        parts = (f"{label} {done}/{total}".strip(), latest, f"eta {clock(eta)}")
        note("  ".join(p for p in parts if p))

    yield advance
