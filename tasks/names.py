"""Names that a user gives, and the line about one that is not known."""

from collections.abc import Sequence
from difflib import get_close_matches


def unknown(what: str, name: str, known: Sequence[str]) -> str:
    """The line about a name that is none of `known`, with the nearest of them."""
    near = get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]}?" if near else f"; allowed: {', '.join(known)}"
    return f"{what} {name!r} is not known{hint}"
