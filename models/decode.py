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
import torch.nn.functional as F
from torch import Tensor

from glactl.models.greedy import Greedy
from glactl.models.joined import Joined
from glactl.models.layers import to_device
from glactl.models.lm import LM, LMState
from glactl.models.sampling import Sampler

BLOCK = 16  # steps between two looks at the tokens: a row that ends wastes 15 at most
PIECE = 8192  # tokens of prompts that are read at once
WARM = 2  # steps before one is captured, in which kernels are compiled and libraries begin


@torch.inference_mode()
def prefill(
    lm: LM,
    prompts: Sequence[Sequence[int]],
    piece: int = PIECE,
    past: tuple[Tensor, LMState] | None = None,
) -> tuple[Tensor, LMState]:
    """Read every prompt, packed into one row, `piece` tokens at a time.

    Args:
        lm: the model, in evaluation mode.
        prompts: N lists of token ids; none empty without a past.
        piece: the most tokens read at once, 1 or more.
        past: hidden (N, D) and the state of N sequences, which the prompts continue and which is
            left as it is; None: they begin here.

    Returns:
        hidden (N, D) after the last token of each prompt, and the state of N sequences.

    Raises:
        ValueError: no prompt, an empty one, or a piece below 1.

    Cost: one forward pass over the sum of the lengths; the memory of one over `piece` tokens, and
    two states.
    """
    empty = [i for i, prompt in enumerate(prompts) if len(prompt) == 0]
    if not prompts or (empty and past is None):
        raise ValueError(f"prompt {empty[0]} is empty" if empty else "prompts is empty")
    if piece < 1:
        raise ValueError(f"piece is {piece}; allowed: 1 or more")
    device = lm.device
    tokens = torch.tensor([t for p in prompts for t in p], dtype=torch.int64)
    ends = torch.tensor([0, *(len(p) for p in prompts)]).cumsum(0)
    state = lm.initial_state(len(prompts), device=device) if past is None else past[1]
    before = state.longest
    hidden = None if past is None else past[0].clone()
    for first in range(0, len(tokens), piece):
        part = tokens[first : first + piece]
        bounds = (ends - first).clamp(0, len(part))
        last = (bounds.diff() > 0).nonzero().squeeze(-1)  # the last piece that has some of a row
        asked = to_device(bounds[1:][last] - 1, device)
        cu_seqlens = bounds if len(prompts) > 1 else None  # one row needs no bounds
        read, state = lm.forward(to_device(part[None], device), state, cu_seqlens, asked)
        # forward adds up the longest of every piece, whose rows need not be the same
        state.longest = before + int((ends[1:].clamp(max=first + len(part)) - ends[:-1]).max())
        hidden = read.new_zeros(len(prompts), read.shape[-1]) if hidden is None else hidden
        hidden.index_copy_(0, to_device(last, device), read)
    assert hidden is not None
    if len(tokens) == 0:  # a step would write into the past
        state = take(state, torch.arange(len(prompts), device=device))
    return hidden, state


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
        block: steps between two looks at the tokens, 1 or more.

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
        hidden, state, sampler = hidden[index], take(state, index), sampler.keep(index)
    token = sampler.draw(lm.logits(hidden)[:, :vocab], sampler.uniform(state.position))
    stepper = Stepper(lm, token, state, sampler, max(limits), vocab, block)
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


class Stepper:
    """Steps of N rows over buffers that stay where they are.

    One step, of rows with the last tokens x, states S and the u of this step:

        h, S = lm.step(x, S),   x = draw(logits(h), u)                                 (1)

    Captured steps launch, by layer (`glactl.models.joined`):

        |                                                  | one row       | more          |
        |--------------------------------------------------|---------------|---------------|
        | norm; q, k, v, gate's and output gate's products | 1             | 2             |
        | feature maps, log gate, the mixer's step         | GLA 1, GSA 2  | 1 (attn. 2)   |
        | norm, output gate, out, residual                 | 1             | 2             |
        | norm; gate, up, silu, product                    | 1             | 3             |
        | down, residual                                   | 1             | 1             |
        | all of a layer                                   | GLA 5, GSA 6  | 9             |
        | once: last norm, head, greedy draw, embedding    | 2             | 3             |

    Attention's step is two launches of any number of rows. Other mixers, norms and channel mixers
    launch what their `step` does. The last line is of draws that `Greedy` takes; else the
    embedding, the last norm, the head, the draw (one kernel if greedy), the count of places and
    four for x and u come one by one.

    Args:
        lm: the model, in evaluation mode.
        token: x, (N,) int64, drawn but not read yet.
        state: S of N sequences; it is used up.
        sampler: of N rows, started.
        room: the most tokens to come; softmax attention keeps room for them where steps are
            captured.
        vocab: ids below it may be drawn; None: all that the model has.
        block: the most steps of one `run`.
        read: `lm.step` or a compiled form of it; None: lm.step.
    """

    def __init__(
        self,
        lm: LM,
        token: Tensor,
        state: LMState,
        sampler: Sampler,
        room: int,
        vocab: int | None = None,
        block: int = BLOCK,
        read: Callable[[Tensor, LMState], Tensor] | None = None,
    ) -> None:
        self.lm, self.state, self.sampler, self.vocab = lm, state, sampler, vocab
        self.room, self.block, self.read = room, block, read  # of room, what is left
        N, device = len(token), token.device
        self.captured = captures(device)
        # what a captured or compiled step is told of the longest row: all that there is room for
        self._most = state.longest + room if self.captured or read is not None else None
        if self._most is not None:
            reserve(lm, state, self._most)
        joined = self.captured and read is None
        self._joined = Joined(lm) if joined else nullcontext()
        self._token = token.clone()
        self._u = torch.zeros(N, block, device=device)
        self._made = torch.zeros(N, block, device=device, dtype=torch.int64)
        self._slot = torch.zeros_like(token)
        self._graph = Graph(device) if self.captured else None
        self._greedy = None
        if joined and Greedy.takes(lm, sampler.sampling):
            buffers = self._token, state.position, self._made, self._slot
            self._greedy = Greedy(lm, *buffers, vocab)

    @torch.inference_mode()
    def run(self, n: int) -> list[list[int]]:
        """Take n steps, at most `block`; returns n lists of the N tokens. Waits for the device."""
        state = self.state
        if self._greedy is None:
            place = state.position[:, None] + torch.arange(1, n + 1, device=self._u.device)
            self._u[:, :n] = self.sampler.uniform(place)
        self._slot.zero_()
        self.room -= n
        for _ in range(n):
            longest = state.longest + 1
            if self._graph is None:
                self._once()
            else:
                self._graph(self._once)
            state.longest = longest  # a replay does not tell the host
        made: list[list[int]] = self._made[:, :n].T.tolist()
        return made

    def keep(self, stay: Sequence[int]) -> "Stepper":
        """A stepper of the rows at the indices `stay` alone."""
        index = to_device(torch.tensor(stay), self._token.device)
        state, sampler = take(self.state, index), self.sampler.keep(index)
        rest = self.room, self.vocab, self.block, self.read
        return Stepper(self.lm, self._token[index], state, sampler, *rest)

    def rest(self, ended: Sequence[int]) -> None:
        """Rows that go on only as part of a captured step: from place 0, so that they never run
        out of learned positions."""
        if ended:
            self.state.position[to_device(torch.tensor(ended), self._token.device)] = 0

    def _once(self) -> None:
        if self._most is not None:
            self.state.longest = self._most - 1
        with self._joined:
            if self._greedy is not None:
                self._greedy(self.state)
                return
            hidden = (self.read or self.lm.step)(self._token, self.state)
        u = self._u.gather(1, self._slot[:, None]).squeeze(1)
        token = self.sampler.draw(self.lm.logits(hidden)[:, : self.vocab], u)  # (1)
        self._token.copy_(token)
        self._made.scatter_(1, self._slot[:, None], token[:, None])
        self._slot += 1


class Graph:
    """A call without arguments, done `warm` times as it is, then captured once and replayed.

    All that it reads and writes must stay where it is. The call is not kept, which would keep its
    owner, and all the memory of this graph, until Python looks for cycles.
    """

    def __init__(self, device: torch.device, warm: int = WARM) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._left = warm
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, call: Callable[[], None]) -> None:
        """Do `call`, the same one every time."""
        with torch.cuda.device(self._device):
            if self._graph is None and self._left == 0:
                self._graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self._graph, stream=self._stream):
                    call()  # recorded, not done
            if self._graph is not None:
                self._graph.replay()
                return
            self._left -= 1
            here = torch.cuda.current_stream()
            self._stream.wait_stream(here)
            with torch.cuda.stream(self._stream):
                call()
            here.wait_stream(self._stream)


def captures(device: torch.device) -> bool:
    """Whether steps on this device are captured."""
    return device.type == "cuda"


def take(state: LMState, index: Tensor) -> LMState:
    """The state of the sequences at index (n,) int64, which may repeat."""
    layers = [{name: part[index] for name, part in layer.items()} for layer in state.layers]
    return LMState(layers, state.position[index], state.longest)


@torch.inference_mode()
def join(lm: LM, states: Sequence[LMState]) -> LMState:
    """The states of all sequences of `states`, one after another, as one; they are used up.

    Cost: a copy. Softmax attention has room for the longest in every row.
    """
    if len(states) == 1:
        return states[0]
    longest = max(state.longest for state in states)
    for state in states:
        reserve(lm, state, longest)
    layers = []
    for parts in zip(*(state.layers for state in states), strict=True):
        # layer by layer, so that there is never a second copy of all
        layers.append({name: torch.cat([part[name] for part in parts]) for name in parts[0]})
        for part in parts:
            part.clear()
    return LMState(layers, torch.cat([state.position for state in states]), longest)


def reserve(lm: LM, state: LMState, capacity: int) -> None:
    """Make room for `capacity` tokens of each sequence, in place, as `lm.initial_state` does."""
    for layer, like in zip(
        state.layers, lm.initial_state(0, capacity=capacity).layers, strict=True
    ):
        for name, part in layer.items():
            more = like[name].shape[1] - part.shape[1] if part.ndim > 1 else 0
            if more > 0:
                layer[name] = F.pad(part, [0, 0] * (part.ndim - 2) + [0, more])
