"""The language model: one for all mixers.

For tokens x_1 .. x_T with embeddings e, positions p where they are learned, L layers:

    h_t = scale * e(x_t) (+ p_t)                                                       (1)
    h <- h + mixer(conv(norm(h))),   h <- h + ffn(norm(h))    in every layer           (2)
    hidden = norm(h),   logits = W hidden                                              (3)

conv and ffn are left out where the spec has none; dropout is on (1) and on both branches of (2).
Position t of the hidden states depends on tokens up to t of its own sequence alone, and a state
holds all that later tokens need: a text read in pieces, or token by token, gives the same numbers.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from types import MethodType
from typing import overload

import torch
from torch import Tensor, nn

from glactl.kernels.triton_layout import steady
from glactl.models.layers import (
    GLU,
    LayerNorm,
    RMSNorm,
    ShortConv,
    State,
    check_layout,
    layout,
    readable,
    to_device,
)
from glactl.models.lm_spec import LMSpec
from glactl.models.mixers import MixerSpec
from glactl.models.mixers.base import Depth


@dataclass
class LMState:
    """What N sequences need to go on.

    layers holds the tensors of each layer, all (N, ...); position (N,) int64 counts the tokens
    that each sequence has read, and longest, which the host knows, is at least its largest entry.
    """

    layers: list[State]
    position: Tensor
    longest: int


class Block(nn.Module):
    """One layer: (2)."""

    def __init__(self, spec: LMSpec, mixer: MixerSpec, at: Depth) -> None:
        super().__init__()
        d, norm = spec.d_model, RMSNorm if spec.norm == "rmsnorm" else LayerNorm
        self.norm = norm(d, spec.norm_eps)
        self.conv = None if spec.short_conv is None else ShortConv(d, spec.short_conv)
        self.mixer = mixer.build(d, spec.rope, spec.norm_eps, at)
        self.ffn_norm = norm(d, spec.norm_eps) if spec.hidden else None
        self.ffn = GLU(d, spec.hidden, spec.ffn) if spec.hidden else None
        self.dropout = nn.Dropout(spec.dropout)

    def initial_state(self, N: int, device: torch.device, capacity: int) -> State:
        """The state of N sequences that have not begun."""
        conv = {} if self.conv is None else self.conv.initial_state(N, device)
        return self.mixer.initial_state(N, device, capacity) | conv

    def forward(
        self,
        h: Tensor,
        state: State | None,
        cu_seqlens: Tensor | None,
        longest: int,
        shared: Tensor | None,
        asked: Tensor | None = None,
        before: int | None = None,
    ) -> tuple[Tensor, State | None]:
        """(B, T, d) -> (B, T, d), and the state after where one went in.

        shared: this layer's row of what its kind of mixer shares; None: nothing. asked: (n,) of the
        B T places, those alone of which (n, d) is wanted; None: all. before: at least the tokens of
        the longest sequence before this call; `state` is then updated in place and returned.
        """
        x = self.norm(h)
        after: State = {}
        if self.conv is not None:
            x, conv = self.conv(x, state, cu_seqlens)
            after |= conv or {}
        extends = None if before is None else getattr(self.mixer, "extend", None)
        if extends is not None:
            h = extends(h, x, state, cu_seqlens, before, longest)
        else:
            more = () if shared is None else (shared,)
            y, mixed = self.mixer(x, state, cu_seqlens, longest, *more)
            after |= mixed or {}
            h = h + self.dropout(y)
        if asked is not None:
            h = h.flatten(0, 1).index_select(0, asked)
        h = self._channels(h, before is not None)
        if state is None:
            return h, None
        if before is None:
            return h, after
        for name, part in after.items():
            state[name].copy_(part)
        return h, state

    def step(self, h: Tensor, state: State, longest: int, shared: Tensor | None) -> Tensor:
        """(N, d) -> (N, d); `state` is updated in place."""
        joined = getattr(self.mixer, "joined_step", None)  # see glactl.models.joined
        if self.conv is None and joined is not None and isinstance(self.norm, RMSNorm):
            made = joined(h, self.norm, state, longest)
            if made is not None:
                return self._channels(made)
        x = self.norm(h)
        if self.conv is not None:
            x = self.conv.step(x, state)
        more = () if shared is None else (shared,)
        return self._channels(h + self.dropout(self.mixer.step(x, state, longest, *more)))

    def _channels(self, h: Tensor, over: bool = False) -> Tensor:
        """over: it is read without gradients, and h may be written over."""
        if self.ffn is None or self.ffn_norm is None:
            return h
        if over:
            return self.ffn.onto(h, self.ffn_norm(h))
        if isinstance(self.ffn_norm, RMSNorm) and h.ndim == 2:
            made = self.ffn.joined_step(h, self.ffn_norm)
            if made is not None:
                return made
        y: Tensor = h + self.dropout(self.ffn(self.ffn_norm(h)))
        return y


class LM(nn.Module):
    """A causal language model; see the equations above. Made by `build_lm`."""

    def __init__(self, spec: LMSpec) -> None:
        super().__init__()
        self.spec = spec
        d = spec.d_model
        self.embed = nn.Embedding(spec.vocab, d)
        learned = spec.positions == "learned" and spec.max_len is not None
        self.positions = nn.Embedding(spec.max_len or 0, d) if learned else None
        self.dropout = nn.Dropout(spec.embed_dropout)
        layers = list(zip(spec.mixers, spec.depths, strict=True))
        self.blocks = nn.ModuleList(Block(spec, mixer, at) for mixer, at in layers)
        # one for all layers of a kind: that of its first layer
        shared = {m.kind: m.shared(d, at.layers) for m, at in layers if at.layer == 0}
        self.shared = nn.ModuleDict({k: part for k, part in shared.items() if part is not None})
        self._rows = [(m.kind, at.layer) for m, at in layers]
        self.norm = (RMSNorm if spec.norm == "rmsnorm" else LayerNorm)(d, spec.norm_eps)
        self.head = nn.Linear(d, spec.vocab, bias=False)
        if spec.tie_embeddings:
            self.head.weight = self.embed.weight

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.head.weight.device

    def initial_state(
        self, N: int, device: torch.device | str | None = None, capacity: int = 0
    ) -> LMState:
        """The state of N sequences that have not begun.

        Args:
            N: sequences, 0 or more.
            device: None: the weights'.
            capacity: tokens of each sequence that softmax attention has room for from the start,
                so that a captured `step` may be replayed so often; more tokens copy the state.
        """
        where = self.device if device is None else torch.device(device)
        layers = [block.initial_state(N, where, capacity) for block in self._blocks()]
        return LMState(layers, torch.zeros(N, device=where, dtype=torch.int64), 0)

    @overload
    def forward(
        self, tokens: Tensor, state: None = None, cu_seqlens: Tensor | None = None,
        asked: Tensor | None = None,
    ) -> tuple[Tensor, None]: ...  # fmt: skip
    @overload
    def forward(
        self, tokens: Tensor, state: LMState, cu_seqlens: Tensor | None = None,
        asked: Tensor | None = None,
    ) -> tuple[Tensor, LMState]: ...  # fmt: skip
    def forward(
        self, tokens: Tensor, state: LMState | None = None, cu_seqlens: Tensor | None = None,
        asked: Tensor | None = None,
    ) -> tuple[Tensor, LMState | None]:  # fmt: skip
        """Read tokens.

        Args:
            tokens: (B, T) int64, in [0, vocab_size).
            state: of the N sequences so far, which is left as it is; None: they begin here.
            cu_seqlens: (N + 1,) int32 or int64, from 0 to T and never falling: N sequences, which
                may be empty, packed into one row (B = 1). None: every row is a sequence (N = B).
                On the CPU its values are checked, and it is copied to the device; on a GPU only
                type and shape are, and T stands for the length of the longest sequence.
            asked: (n,) int64 on the device of tokens, the places of which hidden is wanted, in the
                B T places laid end to end; None: all. The last norm is of those alone, and the
                last channel mixer in evaluation mode.

        Returns:
            hidden (B, T, d_model), or (n, d_model) of what is asked, and the state after, None
            where none went in.

        Raises:
            ValueError: shapes or bounds that do not fit together, or more tokens than max_len
                where positions are learned (on a GPU: in a row that begins there).

        Nothing waits for a GPU, and all but a copy of cu_seqlens can be captured in a CUDA graph.
        Under autocast the residual, norms, gates and states are as wide as without it, and
        products are of autocast's type.
        """
        return self._read(tokens, state, cu_seqlens, asked, None)

    @torch.no_grad()
    def extend(
        self, tokens: Tensor, state: LMState, cu_seqlens: Tensor | None = None,
        asked: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """`forward` in evaluation mode and without gradients that updates `state` in place; returns
        hidden.

        Where the state has the capacity for all tokens, what it is made of stays where it is.
        """
        hidden, after = self._read(tokens, state, cu_seqlens, asked, state.longest)
        assert after is not None
        state.position.copy_(after.position)
        state.longest = after.longest
        return hidden

    def _read(
        self, tokens: Tensor, state: LMState | None, cu_seqlens: Tensor | None,
        asked: Tensor | None, before: int | None,
    ) -> tuple[Tensor, LMState | None]:  # fmt: skip
        """`forward`, or `extend` of a state whose longest sequence has `before` tokens."""
        longest = check_layout(tokens, None if state is None else len(state.position), cu_seqlens)
        if state is not None:
            longest += state.longest
        B, T = tokens.shape
        if cu_seqlens is not None:
            cu_seqlens = to_device(cu_seqlens, tokens.device)
        h = self.embed(tokens)
        if self.spec.embedding_scale != 1:
            h = h * self.spec.embedding_scale
        at = layout(B, T, cu_seqlens, tokens.device)
        if self.positions is not None:
            place = at.place if state is None else at.place + state.position[at.sequence]
            h = h + self._position(place, 0 if cu_seqlens is not None else T).view_as(h)
        h = self.dropout(h)  # (1)
        layers: list[State] = []
        shared = self._shared()
        # while it is trained, all layers are of one shape and compiled once
        early = asked is not None and not self.training
        with nullcontext() if cu_seqlens is None else steady():
            for i, block in enumerate(self._blocks()):
                held = None if state is None else state.layers[i]
                more: tuple[Tensor | int | None, ...] = ()
                if (last := early and i + 1 == len(shared)) or before is not None:
                    more = (asked if last else None, before)
                h, after = block(h, held, cu_seqlens, longest, shared[i], *more)  # (2)
                if after is not None:
                    layers.append(after)
        if asked is not None and not early:
            h = h.flatten(0, 1).index_select(0, asked)
        h = self.norm(h)
        if state is None:
            return h, None
        return h, LMState(layers, state.position + at.length, longest)

    @torch.no_grad()
    def step(self, tokens: Tensor, state: LMState) -> Tensor:
        """Read one token a sequence; without gradients.

        Args:
            tokens: (N,) int64.
            state: of N sequences; updated in place.

        Returns:
            hidden (N, d_model), as `forward` gives it.

        Raises:
            ValueError: as of `forward`.

        Nothing waits for a GPU. A CUDA graph of it replays in place on the same state, which needs
        a capacity for all tokens to come where attention has no window.
        """
        if tokens.shape != state.position.shape:
            raise ValueError(
                f"tokens are {tuple(tokens.shape)}; allowed: {tuple(state.position.shape)}, one "
                "for each sequence of the state"
            )
        h = self.embed(tokens)
        if self.spec.embedding_scale != 1:
            h = h * self.spec.embedding_scale
        if self.positions is not None:
            h = h + self._position(state.position, 1)
        h = self.dropout(h)  # (1)
        h = self.step_layers(h, state)
        state.position += 1
        state.longest += 1
        hidden: Tensor = self.norm(h)
        return hidden

    def step_layers(self, h: Tensor, state: LMState) -> Tensor:
        """(2) in `step`, (N, d_model) -> the same; of `state`, the layers' are updated in place."""
        for block, layer, row in zip(self._blocks(), state.layers, self._shared(), strict=True):
            h = block.step(h, layer, state.longest + 1, row)  # (2)
        return h

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., d_model) -> (..., vocab_size), in the weights' dtype: (3)."""
        z: Tensor = self.head(hidden)
        return z

    def _blocks(self) -> list[Block]:
        return [b for b in self.blocks if isinstance(b, Block)]

    def _shared(self) -> list[Tensor | None]:
        """For each layer its row of what the layers of its kind share; None: nothing."""
        rows = {kind: part() for kind, part in self.shared.items()}
        return [rows[kind][row] if kind in rows else None for kind, row in self._rows]

    def _position(self, place: Tensor, least: int) -> Tensor:
        """Embeddings of these places, of which some sequence is known to have `least`."""
        assert self.positions is not None
        most = self.positions.num_embeddings
        if readable(place) and place.numel():
            least = int(place.max()) + 1
        if least > most:
            raise ValueError(f"position {least} is beyond the model's max_len {most}")
        p: Tensor = self.positions(place)
        return p


def build_lm(
    spec: LMSpec,
    seed: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> LM:
    """The model of `spec` with fresh weights, in training mode.

    Weights of two or more axes are N(0, spec.std), those of a short convolution N(0, 1 / width),
    those of norms 1, biases 0; a module with a method start() then sets its own. They are drawn on
    the CPU in fp32 by a generator made of `seed`, so they are the same on every device and, up to
    rounding, in every dtype; no other generator is touched.

    Args:
        spec: with vocab_size set.
        seed: any integer.
        device: None is the CPU.
        dtype: of all weights; None is fp32.

    Raises:
        ValueError: vocab_size is not set.
    """
    with torch.device("meta"):  # so that torch draws no weights of its own
        lm = LM(spec)
    lm = lm.to_empty(device="cpu")
    if spec.tie_embeddings:
        lm.head.weight = lm.embed.weight
    generator = torch.Generator().manual_seed(seed)
    for name, p in lm.named_parameters():
        if p.ndim >= 2:
            std = p.shape[0] ** -0.5 if name.endswith("conv.weight") else spec.std
            nn.init.normal_(p, std=std, generator=generator)
        else:
            nn.init.constant_(p, 0.0 if name.endswith("bias") else 1.0)
    for module in lm.modules():
        if isinstance(start := getattr(module, "start", None), MethodType):
            start()
    return lm.to(device=device, dtype=dtype)
