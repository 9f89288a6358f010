"""Continuing prompts one token at a time on the model's state.

A batch of ragged prompts is read at once, packed end to end with their boundaries in cu_seqlens,
so that no row is padded and none sees another. Each row then takes one-token steps on its own
state, and a row that ends leaves the batch.

The next token of a row with logits z, temperature c > 0 and u uniform in [0, 1):

    p = softmax(z / c), kept for the top_k largest only                                (1)
    p = kept for the fewest of the largest whose sum reaches top_p times the sum       (2)
    token = the first j, from the largest p on, with p_1 + ... + p_j > u * sum(p)      (3)

Temperature 0 takes the largest logit. The u of a row come from a generator of its own, made from
(seed, row), so that a row's text does not depend on the rows beside it.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from glactl.models.layers import to_device
from glactl.models.lm import LM, LMState


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn.

    temperature divides the logits, 0 takes the largest; top_k keeps that many tokens (None: all);
    top_p keeps the most probable tokens up to that share, in (0, 1]; seed is any integer.

    Raises:
        ValueError: a value out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature is {self.temperature}; allowed: 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}; allowed: 1 or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; allowed: more than 0, at most 1")


class Sampler:
    """Draws the next token of each row.

    Args:
        sampling: how.
        rows: the number of each row; rows of one number and seed draw the same u.
    """

    def __init__(self, sampling: Sampling, rows: Sequence[int]) -> None:
        self.sampling = sampling
        # Python's own generator: the same numbers on every device and in every batch.
        self._random = [random.Random(f"{sampling.seed}/{row}") for row in rows]

    def __call__(self, logits: Tensor, rows: Sequence[int]) -> Tensor:
        """The next tokens, (n,) int64, from logits (n, vocab) of the rows at these indices."""
        if self.sampling.temperature == 0:
            return logits.argmax(-1)
        z, token = logits.float().sort(dim=-1, descending=True, stable=True)
        p = torch.softmax(z / self.sampling.temperature, -1)
        if self.sampling.top_k is not None:
            p[:, self.sampling.top_k :] = 0  # (1)
        before = p.cumsum(-1) - p
        p = p.where(before < self.sampling.top_p * p.sum(-1, keepdim=True), 0)  # (2)
        u = torch.tensor([[self._random[r].random()] for r in rows], dtype=p.dtype)
        total, u = p.cumsum(-1), to_device(u, p.device)
        j = torch.searchsorted(total, u * total[:, -1:], right=True)  # (3)
        kept = (p > 0).sum(-1, keepdim=True)  # u next to 1 may round up to the whole sum
        return token.gather(-1, j.minimum(kept - 1)).squeeze(-1)


@torch.inference_mode()
def prefill(lm: LM, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, LMState]:
    """Read every prompt, packed into one row.

    Args:
        lm: the model, in evaluation mode.
        prompts: N lists of token ids, none empty.

    Returns:
        hidden (N, D) after the last token of each prompt, and the state of N sequences.

    Raises:
        ValueError: no prompt, or an empty one.

    Cost: one forward pass over the sum of the lengths.
    """
    empty = [i for i, prompt in enumerate(prompts) if len(prompt) == 0]
    if empty or not prompts:
        raise ValueError(f"prompt {empty[0]} is empty" if empty else "prompts is empty")
    device = lm.device
    tokens = torch.tensor([[t for p in prompts for t in p]])
    ends = torch.tensor([0, *(len(p) for p in prompts)]).cumsum(0)
    state = lm.initial_state(len(prompts), device=device)
    hidden, state = lm.forward(to_device(tokens, device), state, cu_seqlens=ends)
    return hidden[0, to_device(ends[1:] - 1, device)], state


@torch.inference_mode()
def decode(
    lm: LM,
    hidden: Tensor,
    state: LMState,
    limits: Sequence[int],
    sampler: Sampler,
    stop: Callable[[int, int], bool],
    vocab: int | None = None,
) -> Iterator[list[tuple[int, int]]]:
    """Continue N prompts.

    Args:
        lm: the model, in evaluation mode.
        hidden: (N, D) after the last token of each prompt, from `prefill`.
        state: the state of N sequences; it is used up.
        limits: N numbers, the most tokens to make for each.
        sampler: draws the tokens; its rows are those of hidden.
        stop: stop(row, token) is asked after every token; true ends the row.
        vocab: ids below it may be drawn; None: all that the model has.

    Yields:
        (row, token) of all rows that made one, rows counted from 0; ends when no row is left.

    Cost: one step of the rows still alive per token; softmax attention also reads its past. The
    host waits for the device once a token, for the tokens that `stop` is asked about.
    """
    rows = list(range(hidden.shape[0]))
    made = 0
    alive = [i for i in rows if limits[i] > 0]
    if len(alive) < len(rows):
        rows, hidden, state = _keep(alive, rows, hidden, state)
    while rows:
        tokens = sampler(lm.logits(hidden)[:, :vocab], rows)
        made += 1
        new = list(zip(rows, tokens.tolist(), strict=True))
        ended = {row for row, token in new if stop(row, token) or made >= limits[row]}
        yield new
        alive = [i for i, row in enumerate(rows) if row not in ended]
        if not alive:
            return
        if ended:
            rows, tokens, state = _keep(alive, rows, tokens, state)
        hidden = lm.step(tokens, state)


def _keep(
    alive: list[int], rows: list[int], of_rows: Tensor, state: LMState
) -> tuple[list[int], Tensor, LMState]:
    """What is left of a batch: its rows at the indices `alive`."""
    index = to_device(torch.tensor(alive, dtype=torch.int64), of_rows.device)
    layers = [{name: part[index] for name, part in layer.items()} for layer in state.layers]
    kept = LMState(layers, state.position[index], state.longest)
    return [rows[i] for i in alive], of_rows[index], kept
