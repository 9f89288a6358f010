import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from glactl.models.cost import lm_cost
from glactl.models.lm import LMSpec, build_lm
from glactl.models.mixers import KINDS


def paper(mixer, **fields):
    """The models of 1.3 B parameters of both papers."""
    data = {"d_model": 2048, "n_layers": 24, "vocab_size": 32_000, "mixer": mixer}
    return LMSpec.model_validate(data | fields)


def test_parameters_are_those_of_the_built_model(spec):
    lm = build_lm(spec, 0)
    cost = lm_cost(spec, 5)
    assert cost.params == sum(p.numel() for p in lm.parameters())
    tables = [lm.embed] + ([lm.positions] if lm.positions is not None else [])
    assert cost.params_embedding == sum(t.weight.numel() for t in tables)


@pytest.mark.parametrize("T", [1, 2, 9])
def test_state_bytes_are_those_of_the_tensors(spec, T):
    lm = build_lm(spec, 0).eval()
    with torch.no_grad():
        _, state = lm(torch.zeros(1, T, dtype=torch.int64), lm.initial_state(1))
    size = sum(t.nbytes for layer in state.layers for t in layer.values())
    assert lm_cost(spec, T).state_bytes == size


def test_the_gla_paper():
    """1.3 B parameters; a state of 256 d elements a layer (Sec. 4.4 and Table 1 of GSA's)."""
    cost = lm_cost(paper("gla"), 2048)
    assert cost.params == pytest.approx(1.365e9, rel=5e-4)
    assert cost.state_bytes == 24 * 256 * 2048 * 4
    small = paper("gla", d_model=1024, tie_embeddings=True)
    assert 341e6 < lm_cost(small, 2048).params < 342e6


def test_the_gsa_paper():
    """A state of 128 d elements a layer, and 4.125 d^2 parameters in a mixer, the norm beside."""
    spec = paper("gsa")
    cost = lm_cost(spec, 2048)
    assert cost.state_bytes == 24 * 128 * 2048 * 4
    mixer = spec.mixers[0].cost(2048, True, 2048)
    assert mixer.params == 4.125 * 2048**2 + 2048


@pytest.mark.parametrize("window", [None, 5])
def test_products_are_those_that_torch_counts(window):
    """All but attention's own: torch counts the square of scores, (1) the half that is needed."""
    mixer = {"kind": "attention", "heads": 2, "kv_heads": 1, "window": window}
    spec = LMSpec(d_model=16, n_layers=2, vocab_size=11, mixer=mixer)
    T = 12
    lm = build_lm(spec, 0)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        lm.logits(lm(torch.zeros(3, T, dtype=torch.int64))[0])
    counted = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    pairs = sum(min(t + 1, window or T) for t in range(T))  # of a query and a key it sees
    mixing = 2 * 4 * 16 * pairs
    assert lm_cost(spec, T).flops_token * T == pytest.approx(counted / 3 + mixing, rel=1e-12)


def test_numbers_by_hand():
    mixer = {"kind": "gla", "heads": 2, "gate_rank": 3}
    spec = LMSpec(d_model=8, n_layers=1, vocab_size=10, mixer=mixer, ffn_hidden=5, short_conv=3)
    K, V, C = 2, 4, 64  # of a head; tokens of a chunk
    cost = lm_cost(spec, 100)
    weights = 8 * (4 + 4 + 8 + 8 + 8) + 8 * 3 + 3 * 4 + 3 * 8 * 5 + 3 * 8 + 8 * 10
    mixing = 2 * (2 * C * (K + V) + 4 * K * V)
    assert cost.flops_token == 2 * weights + mixing
    assert cost.flops_token_train == 3 * cost.flops_token
    norms = 3 * 8 + V
    assert cost.params == weights + norms + 4 + 10 * 8
    assert cost.state_bytes == 4 * (2 * K * V + 2 * 8)
    moved = (
        2 * 8  # the embedding
        + 2 * 8  # the convolution
        + (8 + 4 + 4 + 4 + 8 + 8)  # x; q, k, log a, v, r
        + 2 * 3  # the gate's inner width
        + (4 + 4 + 4 + 8 + 8)  # q, k, log a, v; o
        + (8 + 8 + 8)  # o, r; y
        + (8 + 2 * 5 + 5 + 8)  # the channel mixer
        + 2 * 8  # h beside both
        + (8 + 10)  # the head
    )
    assert cost.bytes_token == 4 * moved


def test_linear_mixers_cost_the_same_at_any_length():
    for mixer in KINDS[1:]:
        short, long = (lm_cost(paper(mixer), T) for T in (64, 65_536))
        assert short == long
    short, long = (lm_cost(paper("attention"), T) for T in (64, 65_536))
    assert long.flops_token > 3 * short.flops_token
    assert long.state_bytes > 1000 * short.state_bytes


PASSES = {  # of linear attention, with d_model 16 and 2 heads: widths of keys and values
    "gla": [(4, 8)],
    "gsa": [(8, 64), (64, 8)],
    "linear": [(8, 8)],
    "retnet": [(8, 16)],
    "transnormer": [(16, 8)],  # a first layer, whose learnt positions double the keys
    "hgrn2": [(8, 8)],
    "abc": [(4, 64), (64, 8)],
}


@pytest.mark.parametrize("kind", PASSES)
def test_products_are_all_matrices_and_the_mixing(kind):
    mixer = {"kind": kind} | ({"expand_ratio": 8} if kind == "hgrn2" else {"heads": 2})
    spec = LMSpec.model_validate(
        {"d_model": 16, "n_layers": 1, "vocab_size": 11, "mixer": mixer, "ffn_hidden": 24}
    )
    matrices = (m for m in build_lm(spec, 0).modules() if isinstance(m, torch.nn.Linear))
    weights = sum(m.weight.numel() for m in matrices)
    T = 40  # one chunk
    mixing = sum(2 * (2 * T * (K + V) + 4 * K * V) for K, V in PASSES[kind])
    assert lm_cost(spec, T).flops_token == 2 * weights + mixing


def test_arguments_out_of_range():
    with pytest.raises(ValueError, match="T is 0; allowed: 1 or more"):
        lm_cost(paper("gla"), 0)
    with pytest.raises(ValueError, match="vocab_size is not set"):
        lm_cost(LMSpec(), 5)
