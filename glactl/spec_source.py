"""Where each value of a spec was written: YAML with line numbers, and changes by --set.

A `Source` holds the plain data of a spec and, for each path in it, the place that wrote it, so that
an error can say `spec.yaml:14` or `--set model.d_model=x`.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

Place = tuple[str | int, ...]  # keys and list indices from the root, e.g. ("model", "mixer", 0)


class SpecError(ValueError):
    """A spec that cannot be used; the message is one line with the place."""


@dataclass
class Source:
    """The data of a spec and where each part of it stands."""

    data: dict[str, Any] = field(default_factory=dict)
    places: dict[Place, str] = field(default_factory=dict)

    def where(self, place: Place) -> str:
        """The innermost known place around `place`, as "spec.yaml:14: ", or "" where none is."""
        for n in range(len(place), -1, -1):
            if place[:n] in self.places:
                return self.places[place[:n]] + ": "
        return ""


def nearest(name: str, names: list[str]) -> str:
    """ "; did you mean X?" for the name in `names` that is most like `name`, or ""."""
    match = get_close_matches(name, names, n=1, cutoff=0.6)
    return f"; did you mean {match[0]}?" if match else ""


def read_file(path: Path) -> tuple[str, Source]:
    """The text and the data of the spec at `path`.

    Raises:
        FileNotFoundError: no such file; names the nearest one in its folder.
        SpecError: not text, not YAML, not a mapping, or a key given twice.
    """
    if path.is_dir():
        raise SpecError(f"{path} is a folder, not a spec; to continue a run: --resume {path}")
    if not path.exists():
        folder = path.parent
        beside = sorted(p.name for p in folder.glob("*.y*ml")) if folder.is_dir() else []
        raise FileNotFoundError(f"no spec at {path}{nearest(path.name, beside)}")
    try:
        text = path.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise SpecError(f"{path}: not UTF-8 text (byte {error.start})") from None
    return text, parse(text, str(path))


def parse(text: str, name: str) -> Source:
    """The data of a spec given as YAML text; `name` stands in the places. Raises SpecError."""
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            raise SpecError(f"{name} is empty; a spec is a mapping such as `train: {{steps: 100}}`")
        places = {(): name, **dict(_walk(node, (), name))}
        data = loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f":{mark.line + 1}" if mark else ""
        raise SpecError(f"{name}{line}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        reason = str(error).split("\n")[0]
        raise SpecError(f"{name}: not valid YAML: {reason}") from None
    if not isinstance(data, dict):
        kind = "list" if isinstance(data, list) else type(data).__name__
        raise SpecError(f"{name}:1: a spec is a mapping of fields to values, not a {kind}")
    return Source(data, places)


def _walk(
    node: yaml.Node, place: Place, name: str, above: tuple[int, ...] = ()
) -> Iterator[tuple[Place, str]]:
    """Each place under `node` with its line; raises SpecError at a key that stands twice."""
    line = node.start_mark.line + 1
    if id(node) in above:
        raise SpecError(f"{name}:{line}: an alias must not contain itself")
    above = (*above, id(node))
    if isinstance(node, yaml.SequenceNode):
        for i, item in enumerate(node.value):
            yield (*place, i), f"{name}:{item.start_mark.line + 1}"
            yield from _walk(item, (*place, i), name, above)
    elif isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key_node, value in node.value:
            line = key_node.start_mark.line + 1
            key = key_node.value if isinstance(key_node, yaml.ScalarNode) else "?"
            if key in seen:
                path = dotted((*place, key))
                raise SpecError(f"{name}:{line}: {path} is given twice, first in line {seen[key]}")
            seen[key] = line
            yield (*place, key), f"{name}:{line}"
            yield from _walk(value, (*place, key), name, above)


def dotted(place: Place) -> str:
    """`place` as a user writes it: model.mixer.0.heads."""
    return ".".join(map(str, place))


def apply_set(source: Source, setting: str, defaults: dict[str, Any]) -> None:
    """Change `source` as `--set a.b=value` says; the value is YAML.

    Args:
        source: changed in place.
        setting: "a.b=value"; a number in the path picks from a list.
        defaults: the complete data of the default spec: what a change inside of a part that the
            source leaves out starts from, and where the kind of that part comes from.

    Raises:
        SpecError: no "=", an empty key, a value that is not YAML, a path through a plain value.
    """
    name = f"--set {setting}"
    key, equals, text = setting.partition("=")
    if not equals or not all(key.split(".")):
        raise SpecError(f"{name}: allowed: --set KEY=VALUE, e.g. --set model.d_model=256")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise SpecError(f"{name}: the value is not valid YAML; quote it") from None
    *path, last = (int(k) if k.isdigit() else k for k in key.split("."))
    at: Any = source.data
    default: Any = defaults
    for n, step in enumerate(path):
        default = default.get(step) if isinstance(default, dict) else None
        child = _get(at, step)
        if child is None and isinstance(default, dict):
            # a part left out keeps the kind that it has by default
            child = {k: v for k, v in default.items() if k == "kind"}
        elif child is None:
            child = {} if default is None else default
        elif isinstance(child, str):
            child = {"kind": child}  # `mixer: gla` is short for `mixer: {kind: gla}`
        if not isinstance(child, (dict, list)):
            raise SpecError(f"{name}: {dotted((*path[: n + 1],))} is {child!r} and has no fields")
        _put(at, step, child, name)
        at = child
    _put(at, last, value, name)
    place = (*path, last)
    for below in [p for p in source.places if p[: len(place)] == place]:
        del source.places[below]
    source.places[place] = name


def _get(at: Any, step: str | int) -> Any:
    if isinstance(at, dict):
        return at.get(step)
    return at[step] if isinstance(step, int) and step < len(at) else None


def _put(at: Any, step: str | int, value: object, name: str) -> None:
    if isinstance(at, list) and not (isinstance(step, int) and step < len(at)):
        raise SpecError(f"{name}: {step!r} is not in this list; allowed: 0 to {len(at) - 1}")
    at[step] = value


def preset_names(folder: str) -> list[str]:
    """The names of the presets in a folder of this package."""
    files = resources.files("glactl").joinpath(folder).iterdir()
    return sorted(f.name.removesuffix(".yaml") for f in files if f.name.endswith(".yaml"))


def preset_text(folder: str, name: str) -> str:
    """The YAML of one of them. Raises SpecError where there is none of this name."""
    known = preset_names(folder)
    if name not in known:
        hint = nearest(name, known)
        raise SpecError(f"--preset is {name!r}; allowed: {', '.join(known)}{hint}")
    return resources.files("glactl").joinpath(folder, f"{name}.yaml").read_text()
