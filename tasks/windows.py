r"""Passages cut to a number of tokens: the JRT window, and a cut from the left.

The JRT window of context length L leaves A = 50 tokens for the answer, so that D = L - A tokens of
the passage stay. With n tokens in the passage, of which a lie before the character that the window
is to be centred on (the anchor):

    start = max(0, a - floor(D / 2)),   end = min(n, start + D)                            (1)

start does not move left where end is clipped: a passage whose anchor is near its end keeps as few
as D / 2 tokens. The window is decoded, and the prompt made of the text; a prompt so has about D
tokens and those of the question.

The anchor is where the earliest of some strings first stands, in any case (`find`). Where none
does, it is the last character; or, if the row says where its answer is in tokens, and more than D
tokens lie before the last character, that place.

A tokenizer that begins every text with a token of its own (Mistral's <s>) does so here too: it
counts as one of the n, and one of the a, and is left out of the text.

The window knows the answer. It is part of the definition of what the papers report, and raises
FDA's scores a great deal; a left cut of real FDA rows to 1,000 tokens loses most of the answers.

Source: arXiv:2407.05483; HazyResearch/prefix-linear-attention at 7490f22.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from glactl.tasks.tokenizer import Tokenizer

ANSWER_LENGTH = 50  # A


@dataclass(frozen=True)
class Window:
    """What is left of a passage, and whether that is less than all of it."""

    text: str
    cut: bool


@dataclass(frozen=True)
class Passage:
    """What is to be cut.

    Attributes:
        text: without spaces at its ends, as the definition has it.
        anchor: a character of `text`; None: no string that it could be was found.
        token_anchor: what a row says of its answer's place, where `anchor` is None.
    """

    text: str
    anchor: int | None
    token_anchor: int | None = None

    @property
    def head(self) -> str:
        """The text before the anchor."""
        return self.text[:-1] if self.anchor is None else self.text[: self.anchor]


def find(text: str, strings: Iterable[str]) -> int | None:
    """The first character of the earliest match of any of `strings` in `text`, in any case."""
    matches = (re.search(re.escape(s), text, re.IGNORECASE) for s in strings)
    return min((m.start() for m in matches if m), default=None)


def windows(
    passages: Sequence[Passage], tokenizer: "Tokenizer", context_length: int
) -> list[Window]:
    """The window (1) of each passage.

    Args:
        tokenizer: measures L.
        context_length: L, above ANSWER_LENGTH.

    Raises:
        ValueError: context_length is too short.
    """
    if context_length <= ANSWER_LENGTH:
        raise ValueError(
            f"context length is {context_length}; the window keeps {ANSWER_LENGTH} tokens for the "
            f"answer, so give {ANSWER_LENGTH + 1} or more"
        )
    length = context_length - ANSWER_LENGTH  # D
    leading = leading_tokens(tokenizer)
    found = []
    whole = tokenizer.encode_all([p.text for p in passages])
    heads = tokenizer.encode_all([p.head for p in passages])
    for passage, ids, head in zip(passages, whole, heads, strict=True):
        n = leading + len(ids)
        before = leading + len(head)  # a
        if passage.anchor is None and passage.token_anchor is not None and before > length:
            before = passage.token_anchor
        start = max(0, before - length // 2)  # (1)
        end = min(n, start + length)
        first, last = max(0, start - leading), max(0, end - leading)
        found.append(Window(tokenizer.decode(ids[first:last]), first > 0 or last < len(ids)))
    return found


def left_cuts(
    texts: Sequence[str], tokenizer: "Tokenizer", context_length: int, new_tokens: int
) -> list[Window]:
    """The last context_length - new_tokens tokens of each text, which may have fewer.

    What is left is decoded; a tokenizer may take a token or two more for it when it reads it anew.
    Source: lm-eval's hf backend, which so fits a prompt and its continuation into a model.

    Raises:
        ValueError: no token of a text would be left.
    """
    length = context_length - new_tokens
    if length < 1:
        raise ValueError(
            f"context length is {context_length}; the continuation takes {new_tokens} tokens, so "
            f"give {new_tokens + 1} or more"
        )
    return [
        Window(text, cut=False)
        if len(ids) <= length
        else Window(tokenizer.decode(ids[-length:]), cut=True)
        for text, ids in zip(texts, tokenizer.encode_all(texts), strict=True)
    ]


def leading_tokens(tokenizer: "Tokenizer") -> int:
    """How many tokens `tokenizer` would by its own rule put before a text."""
    return int(getattr(tokenizer, "leading", 0))
