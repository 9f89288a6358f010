"""The states carried between segments against the recurrence in fp64."""

import os

import pytest
import torch
from oracle import CUDA, DEVICE, rms

pytest.importorskip("triton")
from glactl.kernels import triton_layout
from glactl.kernels.triton_launch import signature
from glactl.kernels.triton_segments import carried

pytestmark = pytest.mark.skipif(
    not CUDA and os.environ.get("TRITON_INTERPRET") != "1", reason="needs CUDA or TRITON_INTERPRET"
)


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("K", "V"), [(16, 16), (32, 128)])
@pytest.mark.parametrize("length", [1, 3])
def test_carried_matches_the_fp64_recurrence(length, K, V, reverse, given) -> None:
    """Of 10 blocks, none, 1 row and 2 blocks: of the segments, cut to blocks or to 3 blocks, those
    nobody starts from and the unused entries are NaN."""
    cu = torch.tensor([0, 1250, 1250, 1251, 1500], dtype=torch.int32, device=DEVICE)
    most = triton_layout.block_count(1, 1500, 4)
    layout = triton_layout.cut(1, 1500, cu, 2, -(-most * 2 // length), torch.device(DEVICE))
    n, H, N = len(layout.segments), 2, 4
    generator = torch.Generator().manual_seed(K + length)
    local = torch.full((n, H, K, V), torch.nan)
    decay = torch.full((n, H, K), torch.nan)
    initial = torch.randn(N, H, K, V, generator=generator) if given else None
    expected = {}
    for seq, (first, count) in enumerate(layout.bounds.tolist()):
        order = range(first, first + count)[:: -1 if reverse else 1]
        S = torch.zeros(H, K, V).double() if initial is None else initial[seq].double()
        for m in order:
            expected[m] = S
            if m != order[-1]:
                local[m] = torch.randn(H, K, V, generator=generator)
                decay[m] = -torch.rand(H, K, generator=generator)
                S = decay[m].double().exp()[..., None] * S + local[m].double()
    assert len(expected) == {1: 13, 3: 6}[length]
    initial = None if initial is None else initial.to(DEVICE)
    number = signature(torch.device(DEVICE), *local.shape[1:])
    start = carried(number, layout, local.to(DEVICE), decay.to(DEVICE), initial, reverse).cpu()
    for m, S in expected.items():
        error = rms(start[m].double() - S)
        assert error <= 10 * torch.finfo(torch.float32).eps * rms(S), m
