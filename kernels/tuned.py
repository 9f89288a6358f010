"""Tile shapes that a search found on a device, in place of those of the rule.

The rules (`tiles` of triton_gla.py, triton_scalar.py and triton_gsa.py) choose by shape and
precision alone, and nothing is searched at run time. `glactl profile --tune` searches, and writes
what it found into a table that every later process reads: $GLACTL_TILES, or glactl/tiles.json in
$XDG_CACHE_HOME or ~/.cache. A table is a JSON list of entries, the last that fits counts:

    [{"device": "NVIDIA H100 80GB HBM3", "triton": "3.6.0", "engine": "key",
      "K": 128, "V": 256, "M": 0, "R": 1, "dtype": "bfloat16",
      "tiles": {"sweep": {"warps": 8, "V": 32}, "back": {"stages": 2}}}]

An entry holds for that name of the device, that version of Triton, those widths of the kernels
(after padding; M slots, R query heads a key head) and that type of the operands. "tiles" has the
fields of a kernel's tile that differ from the rule.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

T = TypeVar("T")
Changes = Mapping[str, Mapping[str, int]]  # kernel -> field of its tile -> value

# Of each engine's kernels: the fields for columns that a table may change. The others are either
# not read by the kernel or fix the shape of a tensor. Fields of a pair are "name.0" and "name.1".
COLUMNS: dict[str, dict[str, tuple[str, ...]]] = {
    "key": {
        "prepare": ("K",),
        "prepare_exact": ("K",),
        "sweep": ("V",),
        "local": ("K", "V"),
        "back": ("V",),
        "states": ("K", "V"),
        "gradients": ("K",),
        "gradients_exact": (),
    },
    "scalar": {
        "scores": ("K",),
        "local": ("K", "V"),
        "sweep": ("V",),
        "back": ("V",),
        "score_gradient": ("V",),
        "gradients": ("K", "V"),
    },
    "slots": {
        "slots": (),
        "walk": ("columns",),
        "outputs": ("columns",),
        "logits": ("columns",),
        "slot_gradients.0": (),
        "slot_gradients.1": (),
        "gradients": ("columns",),
    },
}
MOST_WARPS = 16  # a kernel held to 128 registers a thread can have no more
MOST_STAGES = 8
LEAST_COLUMNS, WIDE_COLUMNS = 16, 64  # of a product in fp32, in bf16


class Key(NamedTuple):
    """What an engine's kernels are chosen by; M is 0 where there are no slots."""

    K: int
    V: int
    M: int
    R: int
    dtype: torch.dtype

    @property
    def plain(self) -> dict[str, int | str]:
        """As an entry of the table has it."""
        return self._asdict() | {"dtype": str(self.dtype).removeprefix("torch.")}


FIELDS = {"device", "triton", "engine", *Key._fields, "tiles"}
used: dict[tuple[str, Key], Any] = {}  # the tiles that this process chose for a CUDA device


def path() -> Path:
    """Where the table is."""
    if named := os.environ.get("GLACTL_TILES"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")).joinpath(
        "glactl", "tiles.json"
    )


def place(device: torch.device) -> dict[str, str]:
    """What an entry says of where it was found."""
    import triton  # with the kernels, not with the command

    return {"device": torch.cuda.get_device_name(device), "triton": triton.__version__}


def read(file: Path) -> list[dict[str, Any]]:
    """The entries of a table, none where there is no file.

    Raises:
        ValueError: it cannot be read, or is no table.
    """
    try:
        entries = json.loads(file.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return []
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is no table of tiles: {error}; remove it, or mend it") from None
    if not isinstance(entries, list):
        raise ValueError(f"{file} is no table of tiles: it holds no list; remove it, or mend it")
    for n, entry in enumerate(entries):
        if not isinstance(entry, dict) or set(entry) != FIELDS:
            has = sorted(entry) if isinstance(entry, dict) else repr(entry)
            raise ValueError(f"{file}: entry {n} has {has}; allowed: {sorted(FIELDS)}")
        if entry["engine"] not in COLUMNS:
            known = ", ".join(COLUMNS)
            raise ValueError(f"{file}: entry {n} has engine {entry['engine']!r}; allowed: {known}")
    return entries


def write(file: Path, entries: Iterable[dict[str, Any]]) -> None:
    """Put entries into the table, each in the place of one for the same; whole or not at all."""
    table = read(file)
    for entry in entries:
        table = [e for e in table if any(e[f] != entry[f] for f in FIELDS - {"tiles"})]
        table.append(entry)
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    part.write_text(json.dumps(table, indent=1) + "\n")
    part.replace(file)


def kernels(tiles: Any) -> dict[str, Any]:
    """Name -> tile of every kernel of an engine; those of a pair are "name.0" and "name.1"."""
    found: dict[str, Any] = {}
    for field in fields(tiles):
        value = getattr(tiles, field.name)
        if is_dataclass(value):
            found[field.name] = value
        elif isinstance(value, tuple):
            found |= {f"{field.name}.{n}": tile for n, tile in enumerate(value)}
    return found


def changed(engine: str, key: Key, rule: T, changes: Changes) -> T:
    """The rule with `changes`.

    Raises:
        ValueError: a kernel or a field that there is not, or a value that cannot be right.
    """
    tiles = kernels(rule)
    for kernel, values in changes.items():
        if kernel not in COLUMNS[engine]:
            raise ValueError(f"tiles has {kernel!r}; allowed: {', '.join(COLUMNS[engine])}")
        allowed = ("warps", "stages", *COLUMNS[engine][kernel])
        if not isinstance(values, Mapping) or not set(values) <= set(allowed):
            has = list(values) if isinstance(values, Mapping) else values
            raise ValueError(f"{kernel} has {has}; allowed: {', '.join(allowed)}")
        for field, value in values.items():
            _check(key, tiles[kernel], f"{kernel}.{field}", field, value)
        tiles[kernel] = replace(tiles[kernel], **values)
    if engine == "key" and tiles["gradients"].K > tiles["states"].K:
        # each of its tiles reads one size that `states` wrote for one of its own
        raise ValueError(
            f"gradients.K is {tiles['gradients'].K}; allowed: at most the {tiles['states'].K} of "
            "states.K"
        )
    parts = {}
    for part in fields(rule):  # type: ignore[arg-type]
        value = getattr(rule, part.name)
        if isinstance(value, tuple):
            parts[part.name] = tuple(tiles[f"{part.name}.{n}"] for n in range(len(value)))
        elif part.name in tiles:
            parts[part.name] = tiles[part.name]
    return replace(rule, **parts)  # type: ignore[type-var]


def _check(key: Key, rule: Any, name: str, field: str, value: Any) -> None:
    whole = type(value) is int and value >= 1
    power = whole and value & (value - 1) == 0
    if field == "stages":
        fits, allowed = whole and value <= MOST_STAGES, f"1 to {MOST_STAGES}"
    elif field == "warps":
        fits, allowed = power and value <= MOST_WARPS, f"powers of two up to {MOST_WARPS}"
    else:
        widths = {"K": [key.K], "V": [key.V], "columns": [key.K, key.V]}[field]
        # bf16 products with fewer than 64 columns may read past the end of shared memory (H100,
        # Triton 3.6), seen or not; where a rule has fewer, that shape was held against fp64
        narrow = LEAST_COLUMNS if key.dtype == torch.float32 else WIDE_COLUMNS
        least = min(getattr(rule, field), narrow)
        fits = power and value >= least and not any(width % value for width in widths)
        allowed = f"powers of two from {least} that divide {' and '.join(map(str, widths))}"
    if not fits:
        raise ValueError(f"{name} is {value!r}; allowed: {allowed}")


def tuned(engine: str, device: torch.device, key: Key, rule: T) -> T:
    """The tiles of an engine: the rule, or on a CUDA device what the table has in its place.

    The table is read once a process.

    Raises:
        ValueError: the table cannot be read, or its entry has names or values that there are not.
    """
    if device.type != "cuda":
        return rule
    seen = _seen.get((engine, device, key))
    if seen is None or seen[0] is not rule:
        seen = _seen[engine, device, key] = rule, _found(engine, device, key, rule)
    found: T = seen[1]
    return found


@cache
def _entries(file: Path) -> list[dict[str, Any]]:
    return read(file)


_seen: dict[tuple[str, torch.device, Key], tuple[Any, Any]] = {}  # a rule, and what is used


def _found(engine: str, device: torch.device, key: Key, rule: T) -> T:
    file = path()
    wanted = place(device) | {"engine": engine} | key.plain
    found = [e["tiles"] for e in _entries(file) if all(e[f] == wanted[f] for f in wanted)]
    tiles = rule
    if found:
        try:
            if not isinstance(found[-1], dict):
                raise ValueError(f"tiles is {found[-1]!r}; allowed: an object")
            tiles = changed(engine, key, rule, found[-1])
        except ValueError as error:
            raise ValueError(f"{file}, engine {engine}: {error}") from None
    used[engine, key] = tiles
    return tiles
