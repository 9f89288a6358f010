"""What every part of a spec has in common: strict, frozen, no field that does not exist.

Three kinds of value are converted, since YAML cannot write them otherwise: an integer stands for
a number, a decimal text such as "1e-3" (which YAML 1.1 reads as text) stands for a number, and a
list stands for a tuple. Everything else must have its field's type.
"""

import re
import types
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, model_validator

_DECIMAL = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


class Spec(BaseModel):
    """A part of a spec; its fields, their defaults and their checks stand in the subclass.

    Raises:
        pydantic.ValidationError (a ValueError): a field that does not exist, a value of another
            type, not finite, or out of range.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _read_yaml(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        fields = cls.model_fields
        return {
            name: _converted(value, fields[name].annotation) if name in fields else value
            for name, value in data.items()
        }


def _converted(value: Any, annotation: Any) -> Any:
    """`value` as a field of this type takes it; unchanged where it cannot be told."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _converted(value, get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        for option in get_args(annotation):
            found = _converted(value, option)
            if found is not value:
                return found
    if annotation is float and isinstance(value, str) and _DECIMAL.fullmatch(value):
        return float(value)
    if origin is tuple and isinstance(value, list):
        parts = [*get_args(annotation), *[None] * len(value)]
        return tuple(_converted(v, a) for v, a in zip(value, parts, strict=False))
    return value


def divides(name: str, value: int, of: str, total: int) -> None:
    """Raise ValueError where the field `name` does not divide what it must divide."""
    if total % value:
        raise ValueError(f"{name} {value} does not divide {of} {total}")
