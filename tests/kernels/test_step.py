"""The one-token forms, folded over time, against the recurrences; their states change in place."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from glactl.kernels import gla_reference, gla_step, gsa_reference, gsa_step

N, T, H, R, K, V, M = 2, 6, 2, 2, 3, 5, 4


def randn(*size: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator, dtype=torch.float64)


def tokens() -> tuple[Tensor, Tensor, Tensor]:
    sizes = ((H * R, K), (H, K), (H, V))
    return tuple(randn(N, T, *size, seed=i) for i, size in enumerate(sizes))  # type: ignore[return-value]


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "size"), [("gk", (K,)), ("gv", (V,)), ("g", ()), ("fixed", ()), ("none", ())]
)
def test_linear_attention(name: str, size: tuple[int, ...]) -> None:
    q, k, v = tokens()
    g = F.logsigmoid(randn(N, T, H, *size, seed=3)) / 8
    g[0, 2] = -torch.inf
    state = start = randn(N, H, K, V, seed=4)
    state = state.clone()
    whole = {"fixed": {"g": g[1, 0]}, "none": {}}.get(name, {name: g})
    o, final = gla_reference(
        q, k, v, **whole, scale=0.3, initial_state=start, output_final_state=True
    )
    assert final is not None
    kept = state
    for t in range(T):
        gate = {n: x if name == "fixed" else x[:, t] for n, x in whole.items()}
        close(gla_step(q[:, t], k[:, t], v[:, t], state, **gate, scale=0.3), o[:, t])
    assert state is kept
    close(state, final)
    close(gla_step(q[:, 0], k[:, 0], v[:, 0], start.clone()) * K**0.5,
          gla_step(q[:, 0], k[:, 0], v[:, 0], start.clone(), scale=1.0))  # fmt: skip


@pytest.mark.parametrize("given", ["s", "g", "sg"])
def test_slot_attention(given: str) -> None:
    q, k, v = tokens()
    s = randn(N, T, H, M, seed=3) if "s" in given else None
    g = F.logsigmoid(randn(N, T, H, M, seed=4)) / 8 if "g" in given else None
    start = (randn(N, H, K, M, seed=5), randn(N, H, M, V, seed=6))
    state = tuple(x.clone() for x in start)
    o, final = gsa_reference(q, k, v, s, g, scale=0.7, initial_state=start, output_final_state=True)
    assert final is not None
    for t in range(T):
        s_t, g_t = (None if x is None else x[:, t] for x in (s, g))
        close(gsa_step(q[:, t], k[:, t], v[:, t], s_t, g_t, state, scale=0.7), o[:, t])
    for a, b in zip(state, final, strict=True):
        close(a, b)


def test_half_precision_inputs_keep_a_full_state() -> None:
    q, k, v = (x[:, 0].bfloat16() for x in tokens())
    state = torch.zeros(N, H, K, V)
    o = gla_step(q, k, v, state)
    assert o.dtype == torch.bfloat16
    close(state, k.float()[..., None] * v.float()[..., None, :])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gla_step(q, k, v, torch.zeros(N, H, K, V)), o)


def test_the_states_of_a_view_change() -> None:
    q, k, v = (x[:, 0] for x in tokens())
    many = torch.zeros(3, N, H, K, V, dtype=torch.float64)
    gla_step(q, k, v, many[1], g=torch.zeros(H))
    assert many[1].abs().min() > 0
    assert not many[0].any()
    assert not many[2].any()


def test_errors_leave_the_state_as_it_was() -> None:
    q, k, v = (x[:, 0] for x in tokens())
    state = torch.ones(N, H, K, V, dtype=torch.float64)
    wrong: list[tuple[dict[str, Tensor], str]] = [
        ({"gk": torch.ones(N, H, K)}, "gk has a value of 1"),
        ({"gk": torch.zeros(N, H, V)}, r"gk has the shape \(2, 2, 5\); allowed: \(2, 2, 3\)"),
        ({"gk": torch.zeros(N, H, K), "g": torch.zeros(H)}, "gk and g are given"),
        ({"state": state[..., :2]}, r"state has the shape \(2, 2, 3, 2\)"),
        ({"state": state.float()}, "state is of torch.float32; allowed: torch.float64"),
        ({"q": q[:, :3]}, "q has 3 heads; allowed: a multiple of the 2 of k"),
    ]
    for change, message in wrong:
        with pytest.raises(ValueError, match=message):
            gla_step(**{"q": q, "k": k, "v": v, "state": state, **change})
    with pytest.raises(ValueError, match=r"state\[1\] has the shape"):
        gsa_step(q, k, v, None, torch.zeros(N, H, V), (state, state[:1]))
    with pytest.raises(ValueError, match="s and g are None"):
        gsa_step(q, k, v, None, None, (state, torch.zeros(N, H, V, V, dtype=torch.float64)))
    assert (state == 1).all()
