"""Documents of text: the running Python's documentation, files, folders, the hub's data sets."""

import ast
import gc
import json
import os
import re
import sysconfig
from collections.abc import Iterator
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import Any

from glactl.tasks import hub
from glactl.tasks.errors import DataUnavailable

SUFFIXES = (".txt", ".jsonl", ".parquet")
PIECE = 16_384  # bytes at which a text file is cut into documents; a twentieth of a small file
END = "<|endoftext|>"  # stands between the documents of some text files
NO_LIBRARY = {  # folders beside or inside of the standard library that are no part of it, or tests
    *("test", "tests", "site-packages", "dist-packages", "pydoc_data"),
    *("idlelib", "lib2to3", "turtledemo", "ensurepip"),
}
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")


class Mark:
    """Where in a data set of the hub a reader is, so that another one goes on from there.

    state: what `state` of another mark gave; None: begin at the start.
    """

    def __init__(self, state: dict[str, Any] | None = None) -> None:
        self._start, self._stream = state, None

    def follow(self, stream: Any) -> None:
        """Take the stream, an IterableDataset, to where this mark is, and follow its reader."""
        if self._start is not None:
            stream.load_state_dict(self._start)
        self._stream = stream

    def state(self) -> dict[str, Any] | None:
        """Behind the last document read, as JSON can hold it; None of files and folders."""
        return None if self._stream is None else self._stream.state_dict()


def documents(
    source: str, limit: int | None = None, whole: bool = False, mark: Mark | None = None
) -> Iterator[str]:
    """The documents of a source in a fixed order, none of them blank.

    Args:
        source: "pydoc", the running Python's own documentation (about 2 MB of English); a file of
            text (.txt), JSON lines with "text" (.jsonl) or a table with a column "text"
            (.parquet); a folder of such files; or a data set of the hub, "owner/name" or
            "owner/name:config", whose train split is streamed.
        limit: documents to read at most; a data set of the hub needs one, unless `whole`.
        whole: a data set of the hub may be read to its end.
        mark: where to begin in a data set of the hub; it follows. Files are read from their start.

    Raises:
        ValueError: a file is of another kind, not UTF-8 or without text; names the file and line.
        FileNotFoundError: no such file.
        DataUnavailable: a data set of the hub that cannot be had.
    """
    return islice(filter(str.strip, _documents(source, limit is not None or whole, mark)), limit)


def _documents(source: str, hub: bool, mark: Mark | None) -> Iterator[str]:
    path = Path(source)
    if source == "pydoc":
        return _pydoc()
    if path.is_dir():
        return _folder(path)
    if path.exists():
        return _file(path)
    if path.suffix in SUFFIXES or not HUB_NAME.fullmatch(source) or source.startswith("."):
        near = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        match = get_close_matches(path.name, sorted(near), n=1)
        hint = f"; did you mean {match[0]}?" if match else ""
        raise FileNotFoundError(f"no text at {source}{hint}")
    if not hub:
        raise ValueError(
            f"source {source!r} is no file or folder here; for a data set of the hub, "
            "limit must say how many documents to read"
        )
    return _hub(source, mark)


def _pydoc() -> Iterator[str]:
    """The help topics, then the docstrings of each module of the standard library.

    The modules are parsed, never imported. Cost: 1.5 s.
    """
    from pydoc_data.topics import topics

    yield from (topics[name] for name in sorted(topics))
    for folder, inner, files in os.walk(sysconfig.get_path("stdlib")):
        inner[:] = sorted(set(inner) - NO_LIBRARY)  # where os.walk goes next
        for file in sorted(files):
            if file.endswith(".py"):
                yield _docstrings(Path(folder, file))


def _docstrings(file: Path) -> str:
    """The docstrings of a module, its classes and functions, in order; "" where it has none."""
    # Without the collector, which would walk over each growing tree, this takes half as long.
    collecting = gc.isenabled()
    gc.disable()
    try:
        tree = ast.parse(file.read_bytes())
        found = [ast.get_docstring(node) for node in (tree, *_definitions(tree.body))]
    except (SyntaxError, UnicodeDecodeError):
        return ""  # a template or test file of some distribution
    finally:
        if collecting:
            gc.enable()
    return "\n\n".join(d for d in found if d)


def _definitions(
    body: list[ast.stmt],
) -> Iterator[ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node
            yield from _definitions(node.body)
        elif isinstance(node, ast.If | ast.Try):
            yield from _definitions(node.body)


def _folder(folder: Path) -> Iterator[str]:
    files = sorted(p for p in folder.rglob("*") if p.suffix in SUFFIXES and p.is_file())
    if not files:
        raise ValueError(f"{folder} has no file that ends in {', '.join(SUFFIXES)}")
    for file in files:
        yield from _file(file)


def _file(file: Path) -> Iterator[str]:
    if file.suffix not in SUFFIXES:
        raise ValueError(f"{file} ends in {file.suffix!r}; allowed: {', '.join(SUFFIXES)}")
    if file.stat().st_size == 0:
        raise ValueError(f"{file} is empty")
    readers = {".txt": _text, ".jsonl": _json_lines, ".parquet": _parquet}
    return readers[file.suffix](file)


def _text(file: Path) -> Iterator[str]:
    """What stands between END marks, or else pieces: a file of one text must be split somewhere.

    A piece ends behind the first blank line after its size, or line, or space, if one comes soon.
    """
    data = file.read_bytes()
    marked = END.encode() in data
    for start, stop in _marked(data) if marked else _pieces(data):
        try:
            text = data[start:stop].decode()
            yield text.strip("\n") if marked else text
        except UnicodeDecodeError as error:
            at = start + error.start
            line = data.count(b"\n", 0, at) + 1
            raise ValueError(f"{file}:{line}: not UTF-8 text (byte {at})") from None


def _marked(data: bytes) -> Iterator[tuple[int, int]]:
    mark = END.encode()
    start = 0
    while start <= len(data):
        stop = data.find(mark, start)
        stop = len(data) if stop < 0 else stop
        yield start, stop
        start = stop + len(mark)


def _pieces(data: bytes) -> Iterator[tuple[int, int]]:
    size = max(1, min(PIECE, len(data) // 20))
    start = 0
    while start < len(data):
        stop = _cut(data, start + size, start + 2 * size)
        yield start, stop
        start = stop


def _cut(data: bytes, low: int, high: int) -> int:
    """Where a piece of `data` ends: behind a mark in [low, high), or else at a character."""
    for mark in (b"\n\n", b"\n", b" "):
        at = data.find(mark, low, high)
        if at >= 0:
            return at + len(mark)
    while high < len(data) and data[high] & 0xC0 == 0x80:  # inside of a character
        high += 1
    return min(high, len(data))


def _json_lines(file: Path) -> Iterator[str]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line.decode())
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"{file}:{number}: not UTF-8 text (byte {error.start} of the line)"
                ) from None
            except json.JSONDecodeError as error:
                raise ValueError(f"{file}:{number}: not JSON: {error.msg}") from None
            text = row.get("text") if isinstance(row, dict) else None
            if not isinstance(text, str):
                raise ValueError(f'{file}:{number}: no "text", or not a string')
            if not _encodable(text):
                raise ValueError(f'{file}:{number}: "text" has half a surrogate pair')
            yield text


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _parquet(file: Path) -> Iterator[str]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
    except pyarrow.ArrowInvalid:
        raise ValueError(f"{file} is not a parquet file") from None
    names = table.schema_arrow.names
    if "text" not in names:
        raise ValueError(f"{file} has no column 'text'; its columns: {', '.join(names)}")
    number = 0
    for batch in table.iter_batches(batch_size=1024, columns=["text"]):
        for text in batch.column(0).to_pylist():
            number += 1
            if not isinstance(text, str):
                raise ValueError(f"{file}: row {number} has no text in column 'text'")
            yield text


def _hub(source: str, mark: Mark | None) -> Iterator[str]:
    for row in _rows(source, mark):
        text = row.get("text")
        if not isinstance(text, str):
            raise ValueError(f"data set {source} has no field 'text'; its fields: {', '.join(row)}")
        yield text


def _rows(source: str, mark: Mark | None) -> Iterator[dict[str, Any]]:
    import datasets
    from huggingface_hub import constants

    name, _, config = source.partition(":")
    hub.reach("dataset", name)
    datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE
    try:
        stream = datasets.load_dataset(name, config or None, split="train", streaming=True)
        if mark is not None:
            mark.follow(stream)
        yield from stream
    except ValueError as error:  # an unknown config or split
        raise ValueError(f"data set {source}: {hub.reason(error)}") from None
    except Exception as error:  # of several libraries below, and of the network
        raise DataUnavailable(
            f"data set {source} is no file here, nor on the hub: {hub.reason(error)}"
        ) from None
