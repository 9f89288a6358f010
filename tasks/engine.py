"""What an evaluation asks of a model: the one interface to models of ours and of transformers.

For a context c and a continuation x of n tokens

    loglikelihood = sum_i log p(x_i | c, x_<i)                                             (1)
    is_greedy = all_i (x_i = argmax p(. | c, x_<i))                                        (2)

and of a whole text x, c being the token that begins a text, (1) alone: the rolling likelihood. A
model with max_length positions reads a text in windows of so many tokens, each token scored once,
as lm-eval cuts them (lm_eval.utils.get_rolling_token_windows).

A generated text ends at EOS, at BOS, which begins another text, or before a stop string.

Answers are handed to `keep` as they are made, in any order, and do not depend on what else is asked
(in floating point: up to rounding).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from glactl.models.sampling import Sampling
from glactl.tasks.stream import prompt_ids

if TYPE_CHECKING:
    from glactl.tasks.tokenizer import Tokenizer

Pair = tuple[list[int], list[int]]  # context, not empty, and continuation
Score = tuple[float, bool]  # (1) in nats, (2)
GREEDY = Sampling()


@dataclass(frozen=True)
class Ask:
    """A text to be continued.

    ids: the prompt, not empty. limit: the most tokens to make, 1 or more. stops: the text ends
    before the first of these. number: of its random numbers, with sampling.seed.
    """

    ids: list[int]
    limit: int
    stops: tuple[str, ...] = ()
    sampling: Sampling = GREEDY
    number: int = 0


class Engine(ABC):
    """A model with its tokenizer.

    Args:
        tokenizer: text to tokens and back.
        max_length: tokens that the model reads at most; None: any number.
        bos: texts begin with the tokenizer's BOS token.

    Attributes:
        cut: requests of the last call, by index, whose context was cut from the left to max_length.

    Raises:
        ValueError: bos without a BOS token.
    """

    def __init__(self, tokenizer: "Tokenizer", max_length: int | None, bos: bool) -> None:
        if bos and tokenizer.bos_id is None:
            raise ValueError("bos is asked for, but the tokenizer has no BOS token")
        self.tokenizer, self.max_length, self.bos = tokenizer, max_length, bos
        self.cut: set[int] = set()

    @property
    def first(self) -> int:
        """The token that begins a text: the context of a continuation without one."""
        return prompt_ids(self.tokenizer, "")[0]

    def encode(self, texts: Sequence[str], bos: bool = True) -> list[list[int]]:
        """The tokens of texts, which begin with BOS where the engine and `bos` say so."""
        found = self.tokenizer.encode_all(texts)
        if not (bos and self.bos):
            return found
        first = self.first
        return [ids if ids[:1] == [first] else [first, *ids] for ids in found]

    def score(self, pairs: Sequence[Pair], keep: Callable[[int, Score], None]) -> None:
        """keep(i, ((1), (2))) for every pair i; (0, true) of an empty continuation.

        Raises:
            ValueError: a continuation that the model's positions cannot hold.
        """
        self.cut.clear()
        asked, index = [], []
        for i, (context, continuation) in enumerate(pairs):
            if not continuation:
                keep(i, (0.0, True))
                continue
            if self.max_length is not None and len(continuation) > self.max_length:
                raise ValueError(
                    f"a continuation of {len(continuation)} tokens is longer than the model's "
                    f"max_len {self.max_length}"
                )
            # the last token is predicted, never read
            whole = self._kept(i, context + continuation, -1)
            asked.append((whole[: len(whole) - len(continuation)], continuation))
            index.append(i)
        self._score(asked, lambda i, found: keep(index[i], found))

    def rolling(self, texts: Sequence[list[int]], keep: Callable[[int, float], None]) -> None:
        """keep(i, (1)) for the tokens of every whole text i, 0 for an empty one."""
        self.cut.clear()
        windows, of = [], []
        left = [0] * len(texts)
        totals = [0.0] * len(texts)
        for i, ids in enumerate(texts):
            # max_length positions read as many tokens, the first among them
            size = self.max_length or len(ids) + 1
            for window in get_rolling_token_windows(ids, self.first, size, context_len=1):
                windows.append(make_disjoint_window(window))
                of.append(i)
                left[i] += 1
            if not ids:
                keep(i, 0.0)

        def add(window: int, found: Score) -> None:
            i = of[window]
            totals[i] += found[0]
            left[i] -= 1
            if left[i] == 0:
                keep(i, totals[i])

        self._score(windows, add)

    def nats(self, texts: Sequence[list[int]], keep: Callable[[int, list[float]], None]) -> None:
        """keep(i, [-log p(x_t | x_<t) for every token]) for the tokens of every text i.

        Of a text longer than max_length that is its beginning.
        """
        self.cut.clear()
        read = []
        for i, ids in enumerate(texts):
            read.append(ids[: self.max_length])
            if len(read[i]) < len(ids):
                self.cut.add(i)
        self._nats(read, keep)

    def generate(self, asks: Sequence[Ask], keep: Callable[[int, str], None]) -> None:
        """keep(i, text) for every ask i: the new text alone.

        Raises:
            ValueError: a limit that leaves no room for a prompt.
        """
        self.cut.clear()
        kept = list(asks)
        for i, ask in enumerate(asks):
            ids = self._kept(i, ask.ids, ask.limit)
            if ids is not ask.ids:
                kept[i] = replace(ask, ids=ids)
        groups: dict[Sampling, list[int]] = {}
        for i, ask in enumerate(kept):
            groups.setdefault(ask.sampling, []).append(i)
        for members in groups.values():
            self._generate([kept[i] for i in members], _renumbered(keep, members))

    @abstractmethod
    def _score(self, pairs: Sequence[Pair], keep: Callable[[int, Score], None]) -> None:
        """`score` for contexts and continuations that are not empty and fit."""

    @abstractmethod
    def _nats(self, texts: Sequence[list[int]], keep: Callable[[int, list[float]], None]) -> None:
        """`nats` for texts that fit."""

    @abstractmethod
    def _generate(self, asks: Sequence[Ask], keep: Callable[[int, str], None]) -> None:
        """`generate` for prompts that fit, all with the same sampling."""

    def text(self, ids: list[int], stops: Sequence[str]) -> str:
        """The text of new tokens, up to its first stop string."""
        text = self.tokenizer.decode(ids)
        found = [at for at in (text.find(stop) for stop in stops if stop) if at >= 0]
        return text[: min(found)] if found else text

    def ends(self, ids: list[int], stops: Sequence[str]) -> bool:
        """Whether new tokens have a stop string in them."""
        text = self.tokenizer.decode(ids)
        return any(stop in text for stop in stops if stop)

    def _kept(self, i: int, ids: list[int], room: int) -> list[int]:
        """The end of `ids` that leaves `room` of the model's positions free, of request i."""
        if self.max_length is None or len(ids) <= self.max_length - room:
            return ids
        if room >= self.max_length:
            raise ValueError(
                f"max_gen_toks {room} leaves no room for a prompt: the model's max_len is "
                f"{self.max_length}"
            )
        self.cut.add(i)
        return ids[room - self.max_length :]


def _renumbered(keep: Callable[[int, str], None], of: Sequence[int]) -> Callable[[int, str], None]:
    return lambda i, text: keep(of[i], text)
