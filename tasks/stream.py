"""Tokens to text while they come: whole characters only, and the text before a stop string."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from glactl.tasks.tokenizer import Tokenizer

UNKNOWN = "�"  # what decoders write for bytes that are not (yet) a character
WINDOW = 64  # tokens decoded again at each new one


def prompt_ids(tokenizer: "Tokenizer", text: str) -> list[int]:
    """The tokens of `text`; for "" the token that begins a text, so that none is empty.

    Raises:
        ValueError: "" with a tokenizer that has neither BOS nor EOS.
    """
    ids = list(tokenizer.encode(text))
    if ids:
        return ids
    first = tokenizer.bos_id if tokenizer.bos_id is not None else tokenizer.eos_id
    if first is None:
        raise ValueError("an empty prompt needs a tokenizer with a BOS or EOS token")
    return [first]


class TextStream:
    """The text of one row.

    A byte-level token may end in the middle of a character, and a stop string may begin in one
    token and end in another: both are held back until it is known what they are.

    Args:
        tokenizer: its decode.
        stops: the text ends before the first of these; empty strings are left out.

    Attributes:
        text: the whole text so far that is certain.
        stopped: a stop string came.
    """

    def __init__(self, tokenizer: "Tokenizer", stops: Sequence[str] = ()) -> None:
        self.tokenizer = tokenizer
        self.stops = [s for s in stops if s]
        self.text = ""
        self.stopped = False
        self._ids: list[int] = []
        self._read = 0  # characters of decode(self._ids) that have been taken
        self._held = ""  # characters that may begin a stop string

    def push(self, token: int) -> str:
        """Add a token; returns the new text that is certain, "" after a stop string."""
        if self.stopped:
            return ""
        self._ids.append(token)
        whole = self.tokenizer.decode(self._ids)
        # An unfinished UTF-8 character is at most three bytes, and reads as one to three of these.
        tail = len(whole) - len(whole.rstrip(UNKNOWN))
        return self._take(whole, len(whole) - min(tail, 3))

    def flush(self) -> str:
        """No more tokens: returns the rest, with unfinished characters as they decode."""
        if self.stopped:
            return ""
        whole = self.tokenizer.decode(self._ids)
        new = self._take(whole, len(whole)) + self._held * (not self.stopped)
        self.text += self._held * (not self.stopped)
        self._held = ""
        return new

    def _take(self, whole: str, end: int) -> str:
        """Read whole[:end]; returns what of it is certain."""
        pending = self._held + whole[self._read : end]
        self._read = max(end, self._read)
        if len(self._ids) > 2 * WINDOW and end == len(whole):  # decode the last WINDOW only
            self._ids = self._ids[-WINDOW:]
            self._read = len(self.tokenizer.decode(self._ids))
        found = [at for at in map(pending.find, self.stops) if at >= 0]
        if found:
            self.stopped = True
            new, self._held = pending[: min(found)], ""
        else:
            keep = _overlap(pending, self.stops)
            new, self._held = pending[: len(pending) - keep], pending[len(pending) - keep :]
        self.text += new
        return new


def _overlap(text: str, stops: Sequence[str]) -> int:
    """The length of the longest end of `text` that a stop string begins with."""
    longest = max((len(s) for s in stops), default=1) - 1
    for n in range(min(longest, len(text)), 0, -1):
        if any(s.startswith(text[-n:]) for s in stops):
            return n
    return 0
