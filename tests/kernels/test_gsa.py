"""Gated slot attention by chunks against the recurrence, and the recurrence against its sums."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from glactl.kernels import gsa, gsa_reference

PACKED = [0, 30, 30, 77]
# With every gate closed, or as good as, all slots are equal and the gradient of q is 0 but for
# rounding; those cases are given a write strength of their own.
CASES = [(48.0, False), (1.0, False), (0.1, False), ("mixed", False), ("mixed", True),
         ("closed", True), ("-30", True), ("none", True)]  # fmt: skip


def inputs(
    kind: float | str,
    strength: bool,
    B: int,
    T: int,
    H: int,
    R: int,
    K: int,
    V: int,
    M: int,
    N: int,
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The tensors of a call by name, fp64; gradients of the output and of the final states."""
    generator = torch.Generator().manual_seed(T + 1000 * K)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    xs = {"q": randn(B, T, H * R, K), "k": randn(B, T, H, K), "v": randn(B, T, H, V)}
    xs |= {"Sk": randn(N, H, K, M), "Sv": randn(N, H, M, V)}
    if strength:
        xs["s"] = randn(B, T, H, M)
    g = F.logsigmoid(randn(B, T, H, M))
    if kind == "mixed":
        u = torch.rand(g.shape, generator=generator)
        xs["g"] = (g / 16).masked_fill(u < 0.1, -30.0).masked_fill(u < 0.05, -torch.inf)
    elif not isinstance(kind, str):
        xs["g"] = g / kind
    elif kind != "none":
        xs["g"] = torch.full_like(g, {"closed": -torch.inf, "-30": -30.0}[kind])
    return xs, [randn(B, T, H * R, V), randn(N, H, K, M), randn(N, H, M, V)]


def with_gradients(
    op: Callable[..., tuple], xs: dict[str, Tensor], grads: list[Tensor], **options
) -> dict[str, Tensor]:
    """o, the final states and the gradient of every input."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in xs.items()}
    rest = {"s": None, "g": None, **leaves}
    state = (rest.pop("Sk"), rest.pop("Sv"))
    o, (Sk, Sv) = op(**rest, initial_state=state, output_final_state=True, **options)
    found = torch.autograd.grad([o, Sk, Sv], list(leaves.values()), grads)
    gradients = {f"d{n}": x for n, x in zip(leaves, found, strict=True)}
    return {"o": o, "Sk": Sk, "Sv": Sv, **gradients}


@pytest.mark.parametrize(("kind", "strength"), CASES)
@pytest.mark.parametrize("packed", [False, True])
def test_chunks_match_the_recurrence_in_fp64(kind: float | str, strength: bool, packed: bool):
    cu = torch.tensor(PACKED) if packed else None
    B, N = (1, 3) if packed else (2, 2)
    xs, grads = inputs(kind, strength, B, 77, 2, 2, 5, 7, 6, N)
    truth = with_gradients(gsa_reference, xs, grads, scale=0.7, cu_seqlens=cu)
    for name, x in with_gradients(gsa, xs, grads, scale=0.7, cu_seqlens=cu).items():
        assert (x - truth[name]).norm() <= 1e-9 * truth[name].norm(), name  # NaN fails


@pytest.mark.parametrize("T", [1, 32, 33])
def test_any_length(T: int) -> None:
    xs, grads = inputs(8.0, False, 1, T, 1, 1, 3, 2, 4, 1)
    truth = with_gradients(gsa_reference, xs, grads)
    for name, x in with_gradients(gsa, xs, grads).items():
        assert (x - truth[name]).norm() <= 1e-9 * truth[name].norm(), name


def test_the_recurrence_is_attention_over_sums() -> None:
    xs, _ = inputs(4.0, False, 1, 8, 1, 2, 3, 4, 5, 1)
    q, k, v, g, Sk, Sv = (xs[n][0] for n in ("q", "k", "v", "g", "Sk", "Sv"))
    o, final = gsa_reference(*(xs[n] for n in "qkv"), None, xs["g"], scale=0.7,
                             initial_state=(xs["Sk"], xs["Sv"]))  # fmt: skip
    assert final is None
    for t in range(8):
        weight = torch.stack(
            [(1 - g[j, 0].exp()) * g[j + 1 : t + 1, 0].sum(0).exp() for j in range(t + 1)]
        )
        start = g[: t + 1, 0].sum(0).exp()
        keys = weight.T @ k[: t + 1, 0] + (Sk[0] * start).T
        values = weight.T @ v[: t + 1, 0] + start[:, None] * Sv[0]
        expected = (0.7 * q[t] @ keys.T).softmax(-1) @ values
        torch.testing.assert_close(o[0, t], expected, rtol=1e-12, atol=1e-12)


def test_a_state_handed_over_continues_the_sequence() -> None:
    xs, grads = inputs(48.0, True, 2, 90, 1, 1, 4, 6, 5, 2)
    truth = with_gradients(gsa_reference, xs, grads)

    def halves(initial_state: tuple[Tensor, Tensor], output_final_state: bool, **xs: Tensor):
        o, state = [], initial_state
        for rows in (slice(0, 37), slice(37, 90)):
            part = {n: x[:, rows] for n, x in xs.items()}
            y, state = gsa(**part, initial_state=state, output_final_state=output_final_state)
            o.append(y)
        return torch.cat(o, 1), state

    for name, x in with_gradients(halves, xs, grads).items():
        assert (x - truth[name]).norm() <= 1e-9 * truth[name].norm(), name


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


@pytest.mark.parametrize("kind", [48.0, 1.0, "mixed"], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_as_good_as_the_recurrence(kind: float | str, dtype: torch.dtype) -> None:
    """As of linear attention: twice the recurrence's error from the same inputs, plus two
    roundings to their type and the random walk of T fp32 sums; here through both passes, so of
    twice as many sums."""
    xs, grads = inputs(kind, False, 2, 130, 1, 2, 16, 24, 12, 2)
    states = ("Sk", "Sv")
    xs = {n: x.to(torch.float32 if n in states else dtype) for n, x in xs.items()}
    grads = [x.to(t) for x, t in zip(grads, (dtype, *[torch.float32] * 2), strict=True)]
    wide = {n: x.double() for n, x in xs.items()}
    truth = with_gradients(gsa_reference, wide, [x.double() for x in grads])
    plain = with_gradients(gsa_reference, xs, grads)
    eps = torch.finfo(dtype).eps + 260**0.5 * torch.finfo(torch.float32).eps
    for name, x in with_gradients(gsa, xs, grads).items():
        error = rms(x - truth[name])
        allowed = 2 * rms(plain[name] - truth[name]) + 2 * eps * rms(truth[name])
        assert error <= allowed, f"{name}: rms error {error:.2e} > {allowed:.2e} allowed"


def test_no_tokens() -> None:
    xs, _ = inputs(1.0, False, 2, 0, 1, 1, 4, 6, 5, 2)
    state = (xs["Sk"], xs["Sv"])
    for backend in ("chunked", "reference"):
        o, final = gsa(
            xs["q"], xs["k"], xs["v"], None, xs["g"], initial_state=state,
            output_final_state=True, backend=backend,
        )  # fmt: skip
        assert o.shape == (2, 0, 1, 6)
        assert all(torch.equal(a, b) for a, b in zip(final, state, strict=True))


def test_types_of_the_results_and_autocast() -> None:
    xs, _ = inputs(1.0, False, 1, 40, 1, 1, 4, 4, 3, 1)
    q, k, v, g = (xs[n].bfloat16() for n in "qkvg")
    for op in (gsa, gsa_reference):
        o, (Sk, Sv) = op(q, k, v, None, g, output_final_state=True)
        assert (o.dtype, Sk.dtype, Sv.dtype) == (torch.bfloat16, *[torch.float32] * 2)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            cast, (Tk, Tv) = op(q, k, v, None, g, output_final_state=True)
        assert torch.equal(o, cast)
        assert torch.equal(Sk, Tk)
        assert torch.equal(Sv, Tv)


X = torch.zeros(1, 3, 2, 5)
ERRORS = [
    ({"s": None, "g": None}, "s and g are None; allowed: at least one of them given"),
    ({"s": X[..., :4]}, r"g has the shape \(1, 3, 2, 5\); allowed: \(1, 3, 2, 4\)"),
    ({"g": X + 1}, "g has a value of 1; allowed: log gates"),
    ({"initial_state": (torch.zeros(1, 2, 5, 5), X)}, r"initial_state\[1\] has the shape"),
    ({"cu_seqlens": torch.tensor([0, 2])}, "cu_seqlens goes from 0 to 2; allowed: from 0 to T = 3"),
]


@pytest.mark.parametrize(("wrong", "message"), ERRORS)
def test_errors_name_the_argument(wrong: dict, message: str) -> None:
    for op in (gsa, gsa_reference):
        with pytest.raises(ValueError, match=message):
            op(**{"q": X, "k": X, "v": X, "s": X, "g": X, **wrong})
