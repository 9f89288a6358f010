"""Continuing prompts one token at a time on the model's state.

A batch of ragged prompts is packed end to end with their boundaries in cu_seqlens, so that no row
is padded and none sees another, and is read in pieces of so many tokens, which may cut a prompt:
with a mixer of constant state the memory does not depend on how long prompts are. Each row then
takes one-token steps on its own state.

A step reads the last token of each row, draws the next one (`glactl.models.sampling`) and writes it
where the following step reads it, so the host has nothing to say between two steps. On a GPU one
step is captured as a CUDA graph and replayed, and the tokens of a block of steps are looked at
together: a row that has ended is found out at the end of its block. On a CPU the same code runs as
it is.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from glactl.models.joined import joined
from glactl.models.layers import end_to_end, to_device
from glactl.models.lm import LM, LMState
from glactl.models.sampling import Sampler
from glactl.models.steps import (
    BLOCK,
    Again,
    Stepper,
    begin_anew,
    captures,
    copied,
    rows_of,
    take,
)

PIECE = 8192  # tokens of prompts that are read at once


@torch.inference_mode()
def prefill(
    lm: LM,
    prompts: Sequence[Sequence[int]],
    piece: int = PIECE,
    past: tuple[Tensor, LMState] | None = None,
    capacity: int = 0,
    room: LMState | None = None,
) -> tuple[Tensor, LMState]:
    """Read every prompt, packed end to end, `piece` tokens at a time.

    Args:
        lm: the model, in evaluation mode.
        prompts: N lists of token ids; none empty without a past.
        piece: the most tokens read at once, 1 or more; only a longer prompt is cut.
        past: hidden (N, D) and the state of N sequences, which the prompts continue and which is
            left as it is; None: they begin here.
        capacity: tokens of each sequence that softmax attention has room for afterwards, if it
            holds fewer.
        room: without a past, the state of N sequences with the capacity for all tokens; what it
            holds is written over, and it is what is returned. None: memory of its own.

    Returns:
        hidden (N, D) after the last token of each prompt, and the state of N sequences.

    Raises:
        ValueError: no prompt, an empty one, or a piece below 1.

    Cost: one forward pass over the sum of the lengths; the memory of one over `piece` tokens, and
    one state.
    """
    empty = [i for i, prompt in enumerate(prompts) if len(prompt) == 0]
    if not prompts or (empty and past is None):
        raise ValueError(f"prompt {empty[0]} is empty" if empty else "prompts is empty")
    if piece < 1:
        raise ValueError(f"piece is {piece}; allowed: 1 or more")
    N, device, before = len(prompts), lm.device, 0 if past is None else past[1].longest
    capacity = max(capacity, before + max(map(len, prompts)))
    hidden = None
    if past is not None:
        hidden, state = past[0].clone(), copied(lm, past[1], capacity)
    elif room is not None:
        state = room
        begin_anew(lm, state)
    else:
        state = lm.initial_state(N, capacity=capacity)
    with joined(lm) if captures(device) else nullcontext():  # as captured steps have it
        for first, part, done in _pieces(prompts, piece):
            some = rows_of(state, first, first + len(part))
            some.longest = before + done
            tokens, bounds = end_to_end(part)
            asked = to_device(bounds[1:] - 1, device)
            cu_seqlens = bounds if len(part) > 1 else None  # one row needs no bounds
            read = lm.extend(to_device(tokens[None], device), some, cu_seqlens, asked)
            hidden = read.new_zeros(N, read.shape[-1]) if hidden is None else hidden
            hidden[first : first + len(part)] = read
    assert hidden is not None
    state.longest = before + max(map(len, prompts))
    return hidden, state


def _pieces(
    prompts: Sequence[Sequence[int]], piece: int
) -> Iterator[tuple[int, list[Sequence[int]], int]]:
    """Prompts one after the other in pieces of at most so many tokens: the first prompt's number,
    the tokens of it and of those behind it, and how many of it came before. Without empty ones.

    A prompt that is cut is in pieces of its own.
    """
    part: list[Sequence[int]] = []
    for i, prompt in enumerate([*prompts, ()]):
        if part and (len(prompt) == 0 or sum(map(len, part)) + len(prompt) > piece):
            yield i - len(part), part, 0
            part = []
        if 0 < len(prompt) <= piece:
            part.append(prompt)
        elif len(prompt) > piece:
            for at in range(0, len(prompt), piece):
                yield i, [prompt[at : at + piece]], at


@torch.inference_mode()
def decode(
    lm: LM,
    hidden: Tensor,
    state: LMState,
    limits: Sequence[int],
    sampler: Sampler,
    stop: Callable[[int, int], bool],
    vocab: int | None = None,
    block: int = BLOCK,
    again: Again | None = None,
) -> Iterator[list[tuple[int, int]]]:
    """Continue N prompts.

    Args:
        lm: the model, in evaluation mode.
        hidden: (N, D) after the last token of each prompt, from `prefill`.
        state: the state of N sequences; used up.
        limits: N numbers, the most tokens to make for each.
        sampler: draws the tokens; its rows are those of hidden.
        stop: stop(row, token) is asked after every token; true ends the row.
        vocab: ids below it may be drawn; None: all that the model has.
        block: steps between two looks at the tokens, 1 or more.
        again: keeps what was captured for the next call with it, which goes on from a state in
            its room; None: nothing is kept.

    Yields:
        (row, token) of all rows that made one, rows counted from 0; ends when no row is left.

    Raises:
        ValueError: a block below 1.

    Cost: one step of all rows per token; softmax attention also reads its past. The host waits for
    the device once a block. A row that has ended leaves the batch at the end of its block or, where
    steps are captured, when half of the rows have; a graph is captured again each time.
    """
    if block < 1:
        raise ValueError(f"block is {block}; allowed: 1 or more")
    rows = [i for i in range(hidden.shape[0]) if limits[i] > 0]
    if not rows:
        return
    sampler = sampler.start(hidden.device, lm.spec.vocab if vocab is None else vocab)
    if len(rows) < hidden.shape[0]:
        index = to_device(torch.tensor(rows), hidden.device)
        state = take(state, index)
        hidden, sampler = hidden[index], sampler.keep(index)
    token = sampler.draw(lm.logits(hidden)[:, :vocab], sampler.uniform(state.position))
    more = sampler, max(limits), vocab, block
    stepper = None if again is None else again.find(token, state, *more)
    if stepper is None:
        stepper = Stepper(lm, token, state, *more)
        if again is not None:
            again.keep(stepper)
    columns, made, alive = [token.tolist()], 0, set(rows)
    while True:
        for column in columns:
            made += 1
            new = [(row, t) for row, t in zip(rows, column, strict=True) if row in alive]
            alive -= {row for row, t in new if stop(row, t) or made >= limits[row]}
            yield new
            if not alive:
                return
        stay = [i for i, row in enumerate(rows) if row in alive]
        if stepper.captured and 2 * len(stay) > len(rows):
            stepper.rest([i for i, row in enumerate(rows) if row not in alive])
        elif len(stay) < len(rows):
            rows, stepper = [rows[i] for i in stay], stepper.keep(stay)
        columns = stepper.run(min(block, min(limits[row] for row in alive) - made))


@torch.inference_mode()
def step_error(lm: LM, tokens: Sequence[int]) -> float:
    """How far one-token steps are from one forward pass over the same text.

    Args:
        lm: the model, in evaluation mode.
        tokens: one text, not empty.

    Returns:
        the largest difference of the logits after every token, over the largest logit.
    """
    text = torch.tensor([tokens], device=lm.device)
    whole, state = lm.logits(lm(text)[0][0]), lm.initial_state(1)
    steps = torch.cat([lm.logits(lm.step(token, state)) for token in text.T])
    return float((steps - whole).abs().max() / whole.abs().max())
