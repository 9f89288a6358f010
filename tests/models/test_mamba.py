"""Mamba's block: its equations by hand, its start, its cost, what decays."""

import math

import pytest
import torch
import torch.nn.functional as F
from drawn import draw, filled, same

from glactl.models.cost import lm_cost
from glactl.models.lm import LMSpec, build_lm
from glactl.models.mixers.mamba import Mamba
from glactl.spec import OptimSpec
from glactl.train.optim import make_optimizer


def test_the_block_by_its_equations():
    layer, x = filled(Mamba.Spec(state=3, conv=3).build(8, False, 1e-6)), draw(2, 7, 8)
    inner, z = layer.inner(x).chunk(2, -1)
    u = torch.zeros_like(inner)
    for t in range(7):
        for j in range(min(3, t + 1)):
            u[:, t] += layer.weight[:, 0, 2 - j] * inner[:, t - j]
    u = F.silu(u + layer.bias)  # (2)
    r, B, C = layer.select(u).split([1, 3, 3], -1)  # (3)
    step = layer.dt(r).exp().log1p()
    A = -layer.A_log.exp()  # (4)
    h, y = torch.zeros(2, 16, 3, dtype=torch.float64), []
    for t in range(7):
        h = (step[:, t, :, None] * A).exp() * h
        h = h + (step[:, t] * u[:, t])[..., None] * B[:, t, None]  # (5)
        y.append((h * C[:, t, None]).sum(-1) + layer.D * u[:, t])
    same(layer(x)[0], layer.out(torch.stack(y, 1) * F.silu(z)))  # (6)


def test_the_start():
    spec = LMSpec.model_validate({"d_model": 64, "vocab_size": 11, "mixer": "mamba"})
    layer = build_lm(spec, 0).requires_grad_(False).blocks[0].mixer
    steps = F.softplus(layer.dt.bias)
    assert steps.min() == pytest.approx(1e-3, rel=0.05)
    assert steps.max() == pytest.approx(0.1, rel=0.05)
    assert steps.log().mean() == pytest.approx(math.log(1e-2), abs=1e-4)
    torch.testing.assert_close(layer.A_log.exp(), torch.arange(1.0, 17).expand(128, 16))
    assert (layer.D == 1).all()
    assert layer.rank == 4
    assert layer.dt.weight.square().mean().sqrt() == pytest.approx((3 * 4) ** -0.5)
    assert layer.weight.square().mean().sqrt() == pytest.approx((3 * 4) ** -0.5)


def test_cost_by_hand():
    spec = LMSpec.model_validate(
        {"d_model": 8, "n_layers": 1, "vocab_size": 10, "mixer": {"kind": "mamba", "state": 3}}
        | {"ffn": "none"}
    )
    cost = lm_cost(spec, 100)
    matrices = 8 * 32 + 16 * (1 + 2 * 3) + 1 * 16 + 16 * 8
    assert cost.params == matrices + 16 + 16 * 5 + 16 * 3 + 16 + 2 * 8 + 2 * 10 * 8
    assert cost.flops_token == 2 * (matrices + 10 * 8) + 2 * 4 * 16 + 4 * 16 * 3
    assert cost.state_bytes == 4 * (16 * 3 + 3 * 16)


def test_rates_do_not_decay():
    spec = LMSpec.model_validate({"d_model": 8, "vocab_size": 11, "mixer": "mamba"})
    lm = build_lm(spec, 0)
    decays, spared = make_optimizer(lm, OptimSpec(weight_decay=0.1)).param_groups
    assert (decays["weight_decay"], spared["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in lm.named_parameters()}
    left_out = {names[id(p)] for p in spared["params"]}
    assert {f"blocks.0.mixer.{n}" for n in ("A_log", "D", "dt.bias", "bias")} <= left_out
    assert {names[id(p)] for p in decays["params"]} | left_out == set(names.values())
    assert "blocks.0.mixer.weight" not in left_out


def test_steps_out_of_order():
    with pytest.raises(ValueError, match=r"mixer mamba: dt_min 0.2 is above dt_max 0.1"):
        LMSpec.model_validate({"mixer": {"kind": "mamba", "dt_min": 0.2}})
