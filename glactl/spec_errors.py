"""What pydantic found wrong with a spec, as one line: place, value, what is allowed instead."""

import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from glactl.spec_source import Place, Source, dotted, nearest

_WANTED = {  # by the beginning of pydantic's error type
    "int": "an integer",
    "float": "a number",
    "finite_number": "a finite number",
    "bool": "true or false",
    "string_pattern_mismatch": "letters, digits and . _ - after a first letter or digit",
    "string": "text",
    "tuple": "a list",
    "list": "a list",
    "model": "a mapping of fields to values",
    "none_required": "null",
    "too_long": "a shorter list",
    "too_short": "a longer list",
}
_BOUNDS = {
    "greater_than": ("gt", "more than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}


def explain(error: ValidationError, root: type[BaseModel], source: Source) -> str:
    """The first thing that `error` holds against the spec in `source`, a spec of type `root`.

    Of several complaints about one place the deepest counts: a value that fits no branch of a
    union is reported by the branch that it came nearest to.
    """
    found = [(_place(e, source.data), e) for e in error.errors(include_url=False)]
    place, first = max(found, key=lambda f: (len(f[0]), f[1]["type"] == "extra_forbidden"))
    others = len({p for p, _ in found if p[: len(place)] != place and place[: len(p)] != p})
    more = f" (and {others} more)" if others else ""
    return source.where(place) + _sentence(place, first, root, source.data) + more


def _place(e: ErrorDetails, data: Any) -> Place:
    """The location of `e` without the names of union branches that pydantic puts between keys."""
    place: list[str | int] = []
    for step in e["loc"]:
        if (isinstance(data, dict) and step in data) or (
            isinstance(data, list) and isinstance(step, int) and step < len(data)
        ):
            place.append(step)
            data = data[step]  # type: ignore[index]
    if e["type"] == "missing":
        place.append(e["loc"][-1])
    return tuple(place)


def _sentence(place: Place, e: ErrorDetails, root: type[BaseModel], data: Any) -> str:
    kind, path = e["type"], dotted(place)
    if kind in ("extra_forbidden", "invalid_key"):
        return _unknown(place, root, data)
    if kind == "missing":
        return f"{path} is missing"
    if kind in ("value_error", "assertion_error"):
        reason = str(e["ctx"]["error"])
        return f"{path}: {reason}" if place else reason
    if kind in ("union_tag_invalid", "union_tag_not_found"):
        tags = str(e["ctx"].get("expected_tags", "")).replace("'", "").split(", ")
        tags = [t for t in tags if t] or _kinds(place, root, data)
        tag = str(e["ctx"].get("tag", ""))
        allowed = f"allowed: {', '.join(tags)}{nearest(tag, tags)}"
        return f"{path}.kind is {tag!r}; {allowed}" if tag else f"{path} has no kind; {allowed}"
    value = _shown(e["input"])
    if kind == "literal_error":
        allowed = str(e["ctx"]["expected"]).replace(" or ", ", ").replace("'", "")
        return (
            f"{path} is {value}; allowed: {allowed}{nearest(str(e['input']), allowed.split(', '))}"
        )
    if kind in _BOUNDS:
        key, words = _BOUNDS[kind]
        return f"{path} is {value}; allowed: {words} {e['ctx'][key]:g}"
    for start, wanted in _WANTED.items():
        if kind.startswith(start):
            return f"{path} is {value}; allowed: {wanted}"
    return f"{path} is {value}: {e['msg']}"


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _unknown(place: Place, root: type[BaseModel], data: Any) -> str:
    """A field that does not exist: its nearest neighbour, the same name elsewhere, or all names."""
    name = str(place[-1])
    owner = _model_at(place[:-1], root, data)
    names = [f for f in (owner or root).model_fields if f != "kind"]
    title = (owner or root).__qualname__.removesuffix(".Spec")
    hint = nearest(name, names)
    if not hint:
        elsewhere = [p for p in _all_paths(root, data) if p.rpartition(".")[2] == name]
        hint = f"; did you mean {elsewhere[0]}?" if elsewhere else f"; fields: {', '.join(names)}"
    return f"{dotted(place)} is not a field of {title}{hint}"


def _models(annotation: Any) -> list[type[BaseModel]]:
    """The models that a value of this type can be, also inside of a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    origin = get_origin(annotation)
    args = get_args(annotation)
    if origin is Annotated:
        return _models(args[0])
    if origin in (Union, types.UnionType, list, tuple):
        return [m for a in args for m in _models(a)]
    return []


def _tag(model: type[BaseModel]) -> str | None:
    field = model.model_fields.get("kind")
    if field is None or get_origin(field.annotation) is not Literal:
        return None
    return str(get_args(field.annotation)[0])


def _model_at(place: Place, root: type[BaseModel], data: Any) -> type[BaseModel] | None:
    """The model that describes the mapping at `place`; None where that cannot be told."""
    model: type[BaseModel] | None = root
    options: list[type[BaseModel]] = [root]
    for step in place:
        data = data[step]
        if isinstance(step, str):
            if model is None or step not in model.model_fields:
                return None
            options = _models(model.model_fields[step].annotation)
        kind = data.get("kind") if isinstance(data, dict) else None
        model = next((m for m in options if len(options) == 1 or _tag(m) == kind), None)
    return model


def _kinds(place: Place, root: type[BaseModel], data: Any) -> list[str]:
    owner = _model_at(place[:-1], root, data) if place else None
    field = owner.model_fields.get(str(place[-1])) if owner and place else None
    tags = (_tag(m) for m in _models(field.annotation)) if field else ()
    return list(dict.fromkeys(t for t in tags if t))


def _all_paths(root: type[BaseModel], data: Any, prefix: str = "") -> Iterator[str]:
    """Every field of `root` as a dotted path, breadth first; of a union, the branch in `data`."""
    inner: list[tuple[type[BaseModel], Any, str]] = []
    for name, field in root.model_fields.items():
        yield prefix + name
        options = _models(field.annotation)
        below = data.get(name) if isinstance(data, dict) else None
        default = field.get_default(call_default_factory=True)
        kind = below.get("kind") if isinstance(below, dict) else getattr(default, "kind", None)
        chosen = next((m for m in options if len(options) == 1 or _tag(m) == kind), None)
        if chosen is not None:
            inner.append((chosen, below, f"{prefix}{name}."))
    for model, below, path in inner:
        yield from _all_paths(model, below, path)
