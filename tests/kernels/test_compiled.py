"""The opaque operators that stand for the chunked engine in a compiled graph on the CPU."""

import pytest
import torch

from glactl.kernels import compiled
from glactl.kernels import gla as gla_whole
from glactl.kernels import gsa as gsa_whole
from glactl.kernels import scan as scan_whole

B, T, H, K, V, M = 2, 40, 2, 8, 6, 5
STATES = {"gla": 1, "gsa": 2, "scan": 1}  # the last inputs


def draw(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(name, dtype, N):
    """q, k, v, the gate and the initial states; of scan u, dt, A, B, C, D, z, dt_bias and h_0."""
    rows = (B, T, H) if N == B else (1, B * T, H)
    if name == "scan":
        widths = K, K, M, M, K
        u, dt, b, c, z = (draw(*rows[:2], d, seed=i).to(dtype) for i, d in enumerate(widths))
        A, D, bias = -draw(K, M, seed=5).exp(), draw(K, seed=6), draw(K, seed=7)
        made = [u, dt, A, b, c, D, z, bias, draw(N, K, M, seed=8)]
        return [x.requires_grad_() for x in made]
    gate = M if name == "gsa" else K
    states = [(K, M), (M, V)] if name == "gsa" else [(K, V)]
    q, k, v = (draw(*rows, d, seed=i).to(dtype) for i, d in enumerate((K, K, V)))
    g = -draw(*rows, gate, seed=3).abs() / 8
    made = [q, k, v, g, *(draw(N, H, *s, seed=4 + i) for i, s in enumerate(states))]
    return [x.requires_grad_() for x in made]


def call(name, operator, xs, cu, final, state=True):
    """The operator of this name in the way the layers call it."""
    initial = None
    if state:
        initial = tuple(xs[4:]) if name == "gsa" else xs[-1]
    return operator(*xs[: 8 if name == "scan" else 4], initial, final, cu)


def plain(name, xs, cu, final, state=True):
    def whole(q, k, v, g, initial, final, cu):
        options = {"initial_state": initial, "output_final_state": final, "cu_seqlens": cu}
        if name == "gla":
            return gla_whole(q, k, v, gk=g, **options)
        return gsa_whole(q, k, v, None, g, **options)

    def whole_scan(u, dt, A, B, C, D, z, bias, initial, final, cu):
        return scan_whole(
            u, dt, A, B, C, D, z=z, dt_bias=bias, initial_state=initial, output_final_state=final,
            cu_seqlens=cu,
        )  # fmt: skip

    return call(name, whole_scan if name == "scan" else whole, xs, cu, final, state)


def flat(result):
    o, final = result
    return [o, *(final if isinstance(final, tuple) else [] if final is None else [final])]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("final", [False, True])
@pytest.mark.parametrize("state", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", STATES)
def test_compiled_is_not_compiled(name, dtype, state, final, packed):
    torch.compiler.reset()
    cu = torch.tensor([0, 7, 7, B * T]) if packed else None
    xs = inputs(name, dtype, 3 if packed else B)
    leaves = xs if state else xs[: -STATES[name]]
    whole = torch.compile(
        lambda *xs: call(name, getattr(compiled, name), xs, cu, final, state),
        backend="aot_eager",
        fullgraph=True,
    )
    ours, truth = flat(whole(*xs)), flat(plain(name, xs, cu, final, state))
    weights = [draw(*x.shape, seed=9).to(x.dtype) for x in truth]
    grads = [torch.autograd.grad(out, leaves, weights) for out in (ours, truth)]
    for a, b in zip([*ours, *grads[0]], [*truth, *grads[1]], strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("given", ["gla gk", "gsa g", "scan D z dt_bias", "scan "])
def test_the_operator_keeps_what_it_promises(given):
    """Schema, shapes without values and the registration of the gradient, by torch's own check."""
    xs = inputs(given.split()[0], torch.float32, B)
    if given == "scan ":
        xs = [*xs[:5], xs[-1]]
    torch.library.opcheck(compiled._whole, (given, xs, None, 0.5))


@pytest.mark.parametrize("name", STATES)
def test_outside_of_a_graph_it_is_the_operator_itself(name, monkeypatch):
    monkeypatch.setattr(compiled, "_whole", None)
    xs = inputs(name, torch.float32, B)
    assert torch.equal(call(name, getattr(compiled, name), xs, None, False)[0],
                       plain(name, xs, None, False)[0])  # fmt: skip
