"""The gated short convolution against its equation; all else is in the contract."""

import torch

from glactl.models.mixers.conv import Conv


def test_a_token_at_a_time_by_the_equation():
    generator = torch.Generator().manual_seed(0)
    B, T, d, width = 2, 7, 5, 3
    layer = Conv(d, Conv.Spec(width=width)).double()
    for p in layer.parameters():
        torch.nn.init.normal_(p, generator=generator)
    x = torch.randn(B, T, d, dtype=torch.float64, generator=generator)
    w, b, W, c = layer.conv.weight, layer.conv_bias, layer.gate.weight, layer.gate.bias
    rows = []
    for t in range(T):
        conv = x[:, t] + sum(w[j] * x[:, t - j] for j in range(min(width, t + 1)))
        rows.append((conv + b) * (x[:, t] @ W.T + c) + x[:, t])  # (1)
    # sums of 5 and 4 terms, a product of both: less than 100 roundings of numbers below 100
    torch.testing.assert_close(layer(x)[0], torch.stack(rows, 1), rtol=1e-13, atol=1e-12)
