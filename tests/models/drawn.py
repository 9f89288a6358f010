"""What the tests of layers share: weights and inputs drawn in fp64, and how close is equal."""

import torch

TOL = 1e4 * torch.finfo(torch.float64).eps  # sums of tens of terms, a few of them nested


def filled(module, std=0.5):
    g = torch.Generator().manual_seed(1)
    module = module.double()
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(std * torch.randn(p.shape, generator=g, dtype=p.dtype))
    return module


def draw(*size, seed=0):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same(a, b):
    torch.testing.assert_close(a, b, rtol=TOL, atol=TOL)
