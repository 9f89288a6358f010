"""The cut of packed sequences is made once for all layers, and never kept beyond a forward pass."""

import torch

from glactl.kernels.triton_layout import cut, steady
from glactl.models.lm import LMSpec, build_lm

CPU = torch.device("cpu")


def test_within_steady_a_cut_is_made_once_for_a_tensor():
    cu, other = torch.tensor([0, 300, 700]), torch.tensor([0, 300, 700])
    with steady():
        one = cut(1, 700, cu, 4, 8, CPU)
        assert cut(1, 700, cu, 4, 8, CPU) is one
        assert cut(1, 700, other, 4, 8, CPU) is not one
        assert cut(1, 700, cu, 4, 1, CPU) is not one  # longer segments
        assert cut(1, 700, cu, 4, 8, CPU) is one
    cu[1] = 100
    again = cut(1, 700, cu, 4, 8, CPU)
    assert not torch.equal(again.blocks, one.blocks)
    with steady():
        assert torch.equal(cut(1, 700, cu, 4, 8, CPU).blocks, again.blocks)


def test_layers_of_a_model_share_it(monkeypatch):
    size = {"d_model": 16, "n_layers": 3, "vocab_size": 11}
    lm = build_lm(LMSpec.model_validate(size | {"mixer": {"kind": "gla", "heads": 2}}), 0)
    cuts = []

    def forward(self, x, state, cu_seqlens, longest):
        cuts.append(cut(1, x.shape[1], cu_seqlens, 2, 4, x.device))
        return x, None

    monkeypatch.setattr(type(lm.blocks[0].mixer), "forward", forward)
    for bounds in ([0, 2, 6], [0, 5, 6]):
        lm(torch.zeros(1, 6, dtype=torch.int64), cu_seqlens=torch.tensor(bounds))
    assert cuts[0] is cuts[1] is cuts[2]
    assert cuts[3] is cuts[5] is not cuts[0]
    assert not torch.equal(cuts[3].blocks, cuts[0].blocks)
