"""Steps of one token of many sequences, captured on a GPU; and what is done with their states."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor

from glactl.kernels.attention import attention_more_room
from glactl.models.greedy import Greedy
from glactl.models.joined import joined
from glactl.models.layers import to_device
from glactl.models.lm import LM, LMState
from glactl.models.sampling import Sampler

BLOCK = 16  # steps between two looks at the tokens: a row that ends wastes 15 at most
WARM = 2  # steps before one is captured, in which kernels are compiled and libraries begin


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
        self.left, self.block, self.read = room, block, read
        N, device = len(token), token.device
        self.captured = captures(device)
        # what a captured or compiled step is told of the longest row: all that there is room for
        self._most = state.longest + room if self.captured or read is not None else None
        if self._most is not None:
            reserve(lm, state, self._most)
        own = self.captured and read is None
        self._joined = joined(lm) if own else nullcontext()
        self.rows = N  # the first ones of those that steps take, which are asked for
        self._token = token.clone()
        self._u = torch.zeros(N, block, device=device)
        self._made = torch.zeros(N, block, device=device, dtype=torch.int64)
        self._slot = torch.zeros_like(token)
        self._graph = Graph(device) if self.captured else None
        self._greedy = None
        if own and Greedy.takes(lm, sampler.sampling):
            buffers = self._token, state.position, self._made, self._slot
            self._greedy = Greedy(lm, *buffers, vocab)

    def room(self, rows: int, need: int) -> LMState | None:
        """The memory of so many of the sequences, for others that need room for so many tokens;
        None where these steps cannot serve them: they are captured for more, or half as many or
        fewer rows are asked for, or more tokens."""
        held = len(self._token)
        serves = self.captured and held < 2 * rows <= 2 * held and need <= (self._most or 0)
        return rows_of(self.state, 0, rows) if serves else None

    @torch.inference_mode()
    def begin(
        self, token: Tensor, state: LMState, sampler: Sampler, room: int, vocab: int | None,
        block: int,
    ) -> bool:  # fmt: skip
        """Go on from other sequences, whose state lies in `room`. False, and nothing is changed,
        where what was captured cannot: they are drawn in another way, or have more to come."""
        if (
            state.longest + room > (self._most or 0)
            or (vocab, block) != (self.vocab, self.block)
            or not self.sampler.alike(sampler)
        ):
            return False
        self.rows = len(token)
        begin_anew(self.lm, rows_of(self.state, self.rows, len(self._token)))  # rows too many
        self.state.longest, self.left, self.sampler = state.longest, room, sampler
        self._token[: self.rows].copy_(token)
        if self._greedy is not None:
            self._greedy.begin(token)
        return True

    @torch.inference_mode()
    def run(self, n: int) -> list[list[int]]:
        """Take n steps, at most `block`; returns n lists of the N tokens. Waits for the device."""
        state, rows = self.state, self.rows
        if self._greedy is None:
            place = state.position[:rows, None] + torch.arange(1, n + 1, device=self._u.device)
            self._u[:rows, :n] = self.sampler.uniform(place)
        self._slot.zero_()
        self.left -= n
        for _ in range(n):
            longest = state.longest + 1
            if self._graph is None:
                self._once()
            else:
                self._graph(self._once)
            state.longest = longest  # a replay does not tell the host
        made: list[list[int]] = self._made[:rows, :n].T.tolist()
        return made

    def keep(self, stay: Sequence[int]) -> "Stepper":
        """A stepper of the rows at the indices `stay` alone."""
        index = to_device(torch.tensor(stay), self._token.device)
        state, sampler = take(self.state, index), self.sampler.keep(index)
        rest = self.left, self.vocab, self.block, self.read
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


class Again:
    """The captured steps of the last batch, for batches that need no more room or rows.

    A capture and the steps before it take some 0.1 s, as long as 20 to 50 steps of many rows.
    """

    def __init__(self) -> None:
        self._stepper: Stepper | None = None
        self._given: LMState | None = None

    def room(self, rows: int, need: int) -> LMState | None:
        """Memory for the state of so many sequences with room for so many tokens, from which
        `find` goes on; None, and no memory held, where there is none that fits."""
        self._given = None if self._stepper is None else self._stepper.room(rows, need)
        if self._given is None:
            self._stepper = None
        return self._given

    def find(
        self, token: Tensor, state: LMState, sampler: Sampler, room: int, vocab: int | None,
        block: int,
    ) -> Stepper | None:  # fmt: skip
        """The steps that are kept, begun anew; None where the state is not in their room, or they
        do not fit."""
        found, given, self._given = self._stepper, self._given, None
        more = sampler, room, vocab, block
        if found is not None and state is given and found.begin(token, state, *more):
            return found
        self._stepper = None
        return None

    def keep(self, stepper: Stepper) -> None:
        """Keep these steps, if they are captured."""
        self._stepper = stepper if stepper.captured else None


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


def copied(lm: LM, state: LMState, capacity: int) -> LMState:
    """A copy of a state with room for `capacity` tokens of each sequence."""
    made = LMState([dict(layer) for layer in state.layers], state.position.clone(), state.longest)
    reserve(lm, made, capacity)
    for layer, held in zip(made.layers, state.layers, strict=True):
        layer.update({name: x.clone() for name, x in held.items() if layer[name] is x})
    return made


def rows_of(state: LMState, first: int, last: int) -> LMState:
    """The state of the sequences from `first` to `last`, in the same memory."""
    layers = [{name: x[first:last] for name, x in layer.items()} for layer in state.layers]
    return LMState(layers, state.position[first:last], state.longest)


def begin_anew(lm: LM, state: LMState) -> None:
    """No sequence of the state has begun, in place. What has a row for every token stays as it is:
    rows are not read before they are written."""
    likes = (lm.initial_state(0, capacity=L).layers for L in (0, 1))
    for layer, some, more in zip(state.layers, *likes, strict=True):
        for name, x in layer.items():
            if some[name].shape == more[name].shape:
                x.zero_()
    state.position.zero_()
    state.longest = 0


def reserve(lm: LM, state: LMState, capacity: int) -> None:
    """Make room for `capacity` tokens of each sequence, in place, as `lm.initial_state` does."""
    for layer, like in zip(
        state.layers, lm.initial_state(0, capacity=capacity).layers, strict=True
    ):
        for name, part in layer.items():
            if part.ndim > 1 and like[name].shape[1] > part.shape[1]:
                layer[name] = attention_more_room(part, capacity)
