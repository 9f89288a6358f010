"""What a sweep is asked for: lists in options, and grids in files.

A grid in a file is YAML with some of

    preset: gsa                  # what it starts from; by default quick
    dims: [64, 128]              # in the place of the preset's, as the options of these names
    lrs: [1e-3, 3e-3]
    seeds: [0, 1]
    form: hybrid
    mixers: [gsa, gla]           # names of the preset's or kinds; or a mapping of a name to what it
                                 # changes in the run spec: {wide: {model: {mixer: {kind: gsa}}}};
                                 # a change without a mixer is one to the mixer of that name
    run: {train: {steps: 100}}   # a part of a run spec, merged into the preset's
    lengths: {512: {...}}        # merged into the preset's

An option wins over the file. A key that does not exist is an error.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from glactl.spec_source import Place, SpecError, nearest, read_file

KEYS = ("preset", "dims", "lrs", "seeds", "form", "mixers", "run", "lengths")
SECTIONS = ("model", "data", "optim", "train")  # of a run spec


@dataclass(frozen=True)
class GridFile:
    """The values of a file, and the line of each."""

    name: str  # of the sweep: the file's
    values: dict[str, Any] = field(default_factory=dict)
    places: dict[Place, str] = field(default_factory=dict)

    def text(self, key: str) -> tuple[str, str] | None:
        """Name of a list, for errors, and it as an option would be, "64,128"; None: not there."""
        if key not in self.values:
            return None
        value = self.values[key]
        items = value if isinstance(value, list) else [value]
        return f"{self.places[key,]}: {key}", ",".join(map(str, items))

    def part(self, key: str) -> dict[str, Any]:
        """A mapping; {} where there is none. Raises SpecError where it is something else."""
        value = self.values.get(key, {})
        if not isinstance(value, dict):
            raise SpecError(f"{self.places[key,]}: {key} is {value!r}; allowed: a mapping")
        return value

    def below(self, *keys: str) -> dict[Place, str]:
        """The lines of what stands under these keys, by the places from there on."""
        n = len(keys)
        return {p[n:]: line for p, line in self.places.items() if p[:n] == keys and len(p) > n}


def read_grid(path: Path | None) -> GridFile:
    """The grid in a file; an empty one without a file.

    Raises:
        FileNotFoundError: no such file.
        SpecError: not YAML, not a mapping, or an unknown key.
    """
    if path is None:
        return GridFile("")
    _, source = read_file(path)
    for key in source.data:
        if key not in KEYS:
            hint = nearest(str(key), [*KEYS])
            raise SpecError(f"{source.where((key,))}{key}; allowed: {', '.join(KEYS)}{hint}")
    grid = GridFile(path.stem, source.data, source.places)
    _check_part(grid, "run")
    if _maps(source.data.get("mixers")):  # of a name alone, "gsa:", the value is None
        named = source.data["mixers"].items()
        source.data["mixers"] = {str(n): {} if v is None else v for n, v in named}
    for key in ("mixers", "lengths"):
        for name in source.data[key] if _maps(source.data.get(key)) else []:
            _check_part(grid, key, name)
    return grid


def _check_part(grid: GridFile, *at: Any) -> None:
    """Raise SpecError where what stands there, if anything, has not the form of a run spec."""
    value: Any = grid.values
    for key in at:
        value = value.get(key, {})
    inner = [((*at, key), value[key]) for key in SECTIONS if key in value] if _maps(value) else []
    for place, part in [(at, value), *inner]:
        if not _maps(part):
            at = tuple(map(str, place))
            raise SpecError(f"{grid.places[at]}: {'.'.join(at)} is {part!r}; allowed: a mapping")


def _maps(value: Any) -> bool:
    return isinstance(value, dict)


def whole_numbers(name: str, text: str, least: int) -> list[int]:
    """The integers in "64,128", without repeats. Raises ValueError; `name` is the option's."""
    allowed = f"whole numbers of {least} or more, 64,128"
    items = names(name, text, allowed)
    for item in items:
        if not (item.isascii() and item.isdigit()) or int(item) < least:
            raise ValueError(f"{name} has {item!r}; allowed: {allowed}")
    return list(dict.fromkeys(map(int, items)))


def learning_rates(name: str, text: str) -> list[float]:
    """The learning rates in "1e-3,3e-3", without repeats. Raises ValueError."""
    allowed = "numbers above 0, 1e-3,3e-3"
    rates: list[float] = []
    for item in names(name, text, allowed):
        try:
            rates.append(float(item))
        except ValueError:
            raise ValueError(f"{name} has {item!r}; allowed: {allowed}") from None
        if not 0 < rates[-1] < math.inf:
            raise ValueError(f"{name} has {item!r}; allowed: {allowed}")
    return list(dict.fromkeys(rates))


def names(name: str, text: str, allowed: str) -> list[str]:
    """The items in "a,b", without repeats. Raises ValueError."""
    items = [item.strip() for item in text.split(",")]
    if not all(items):
        raise ValueError(f"{name} is {text!r}; allowed: {allowed}")
    return list(dict.fromkeys(items))
