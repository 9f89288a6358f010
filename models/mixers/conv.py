r"""Gated short convolution: the first layer of the hybrid models that recall is measured on.

For x_t (d), with the causal convolution of layers.ShortConv, which adds its input,

    y_t = (conv(x)_t + b) * (W x_t + c) + x_t                                          (1)

with one filter of `width` taps a channel. A token sees width - 1 tokens before it: alone it recalls
nothing, in front of a mixer it lets a key and its value meet.

Source: Arora et al., "Zoology", ICLR 2024, arXiv:2312.04927, BaseConv with a kernel of 3 in its
released code. There the convolution is drawn uniformly and adds no input of its own: with (1)
w_0 + 1 stands for its w_0, the functions are the same.
"""

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from glactl.models.layers import Cost, ShortConv, State, linear_cost
from glactl.models.mixers import base
from glactl.models.mixers.base import ALONE, Depth


class Conv(nn.Module):
    """Gated short convolution; see (1). State: "past" (N, width - 1, d), the last inputs."""

    class Spec(base.Spec):
        """width counts the tokens seen, the present one among them."""

        kind: Literal["conv"] = "conv"
        width: int = Field(3, ge=2)

        def check(self, d_model: int, rope: bool) -> None:
            """Every width can be built; rope has no effect here."""

        def build(self, d_model: int, rope: bool, eps: float, at: Depth = ALONE) -> "Conv":
            """The layer; there is no norm in it that would take eps."""
            return Conv(d_model, self)

        def cost(self, d_model: int, rope: bool, T: int, at: Depth = ALONE) -> Cost:
            """Of the layer, at any T."""
            bias = Cost(params=d_model)  # fused into the convolution
            conv = ShortConv.cost(d_model, self.width)
            return conv + bias + linear_cost(d_model, d_model, bias=True)

    def __init__(self, d_model: int, s: Spec) -> None:
        super().__init__()
        self.conv = ShortConv(d_model, s.width)
        self.conv_bias = nn.Parameter(torch.zeros(d_model))
        self.gate = nn.Linear(d_model, d_model)

    def initial_state(self, N: int, device: torch.device, capacity: int = 0) -> State:
        """The state of N sequences that have not begun."""
        return {"past": self.conv.initial_state(N, device)["conv"]}

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        cu_seqlens: Tensor | None = None,
        longest: int | None = None,
    ) -> tuple[Tensor, State | None]:
        """(B, T, d) -> (B, T, d) and, where a state went in, the state after."""
        before = None if state is None else {"conv": state["past"]}
        mixed, after = self.conv(x, before, cu_seqlens)
        return self._gated(mixed, x), None if after is None else {"past": after["conv"]}

    def step(self, x: Tensor, state: State, longest: int | None = None) -> Tensor:
        """One token a sequence, (N, d) -> (N, d); `state` is updated in place."""
        return self._gated(self.conv.step(x, {"conv": state["past"]}), x)

    def _gated(self, mixed: Tensor, x: Tensor) -> Tensor:
        y: Tensor = (mixed + self.conv_bias) * self.gate(x) + x  # (1)
        return y
