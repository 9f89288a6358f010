"""Gated linear attention by chunks against the recurrence, and the recurrence against its sum."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from glactl.kernels import gla, gla_reference, pick_backend
from glactl.kernels.chunked import ROWS, SAFE

GATES = ["gk", "gv", "g", "fixed", "none"]
# Mild gates (48) carry the state through the sequence; 1 and 0.1 leave the range of one product in
# some and in all chunks; "patches" does so in one chunk of one head.
KINDS = [48.0, 1.0, 0.1, "mixed", "patches", "open", "closed", "-30"]
PACKED = [0, 0, 40, 40, 41, 77]


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Uninitialised memory holds NaN, so that an element nobody writes is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def gates(kind: float | str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Log gates in fp64: log-sigmoid over a number, or of the kind named."""
    g = F.logsigmoid(torch.randn(shape, generator=generator, dtype=torch.float64))
    if kind == "mixed":
        u = torch.rand(shape, generator=generator)
        return (g / 16).masked_fill(u < 0.1, -30.0).masked_fill(u < 0.05, -torch.inf)
    if kind == "patches":
        g = g / 48
        g[0, ROWS // 2 : ROWS, 0] -= 30
        return g
    if isinstance(kind, str):
        return torch.full_like(g, {"open": 0.0, "closed": -torch.inf, "-30": -30.0}[kind])
    return g / kind


def inputs(
    gate: str, kind: float | str, B: int, T: int, H: int, R: int, K: int, V: int, N: int
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The tensors of a call by name, fp64; gradients of the output and of the final state."""
    generator = torch.Generator().manual_seed(T + 1000 * K)

    def randn(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    xs = {"q": randn(B, T, H * R, K), "k": randn(B, T, H, K), "v": randn(B, T, H, V)}
    xs["initial_state"] = randn(N, H, K, V)
    size = {"gk": (B, T, H, K), "gv": (B, T, H, V), "g": (B, T, H), "fixed": (H,)}.get(gate)
    if size:
        xs["g" if gate == "fixed" else gate] = gates(kind, size, generator)
    return xs, [randn(B, T, H * R, V), randn(N, H, K, V)]


def with_gradients(
    op: Callable[..., tuple], xs: dict[str, Tensor], grads: list[Tensor], **options
) -> dict[str, Tensor]:
    """o, the final state and the gradient of every input."""
    xs = {name: x.detach().clone().requires_grad_() for name, x in xs.items()}
    o, final = op(**xs, output_final_state=True, **options)
    found = torch.autograd.grad(
        [o, final], list(xs.values()), [g.to(o) for g in grads[:1]] + grads[1:]
    )
    return {"o": o, "final": final, **{f"d{n}": x for n, x in zip(xs, found, strict=True)}}


def assert_equal_in_fp64(ours: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    """Equal to 1e-9 of the norm: far above 1e-16 times some hundred sums, far below a mistake."""
    for name, x in truth.items():
        assert (ours[name] - x).norm() <= 1e-9 * x.norm(), name  # NaN fails, 0 must be 0


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("gate", GATES)
def test_chunks_match_the_recurrence_in_fp64(gate: str, kind: float | str) -> None:
    if (gate == "none" and kind != "open") or (gate == "fixed" and kind in ("mixed", "patches")):
        pytest.skip("the gate has no such values")
    xs, grads = inputs(gate, kind, 2, 77, 2, 2, 5, 7, 2)
    truth = with_gradients(gla_reference, xs, grads, scale=0.3)
    assert_equal_in_fp64(with_gradients(gla, xs, grads, scale=0.3), truth)
    cu = torch.tensor(PACKED)
    xs, grads = inputs(gate, kind, 1, 77, 2, 2, 5, 7, len(PACKED) - 1)
    truth = with_gradients(gla_reference, xs, grads, cu_seqlens=cu)
    assert_equal_in_fp64(with_gradients(gla, xs, grads, cu_seqlens=cu), truth)


@pytest.mark.parametrize("T", [1, 2, 31, 32, 33, 64])
@pytest.mark.parametrize("gate", GATES)
def test_any_length(gate: str, T: int) -> None:
    for kind in (48.0, "mixed") if gate in ("gk", "gv", "g") else ("open",):
        xs, grads = inputs(gate, kind, 1, T, 1, 1, 3, 1, 1)
        truth = with_gradients(gla_reference, xs, grads)
        assert_equal_in_fp64(with_gradients(gla, xs, grads), truth)


def test_without_states() -> None:
    xs, _ = inputs("gk", 48.0, 2, 40, 1, 1, 4, 4, 2)
    S = xs.pop("initial_state")
    o, none = gla(**xs)
    assert none is None
    assert torch.equal(o, gla(**xs, initial_state=torch.zeros_like(S))[0])


@pytest.mark.parametrize("gate", GATES)
def test_the_recurrence_is_the_weighted_sum(gate: str) -> None:
    xs, _ = inputs(gate, 8.0, 1, 9, 2, 2, 3, 4, 1)
    S, o = xs["initial_state"], gla_reference(**xs)[0]
    decay = torch.zeros(1, 9, 2, 3, 4, dtype=torch.float64)
    decay += xs["gk"][..., None] if gate == "gk" else 0
    decay += xs["gv"][..., None, :] if gate == "gv" else 0
    decay += xs["g"].expand(1, 9, 2)[..., None, None] if gate in ("g", "fixed") else 0
    for t in range(9):
        state = decay[:, : t + 1].sum(1).exp() * S
        for j in range(t + 1):
            write = xs["k"][:, j, :, :, None] * xs["v"][:, j, :, None, :]
            state = state + decay[:, j + 1 : t + 1].sum(1).exp() * write
        for head in range(4):
            expected = 3**-0.5 * xs["q"][0, t, head] @ state[0, head // 2]
            torch.testing.assert_close(o[0, t, head], expected, rtol=1e-12, atol=1e-12)


def test_packed_sequences_of_the_recurrence_equal_separate_ones() -> None:
    xs, _ = inputs("gk", 48.0, 1, 77, 1, 1, 4, 4, len(PACKED) - 1)
    S = xs.pop("initial_state")
    o, final = gla_reference(
        **xs, initial_state=S, output_final_state=True, cu_seqlens=torch.tensor(PACKED)
    )
    assert final is not None
    for n, (a, b) in enumerate(pairwise(PACKED)):
        part = {name: x[:, a:b] for name, x in xs.items()}
        alone, last = gla_reference(**part, initial_state=S[n : n + 1], output_final_state=True)
        assert torch.equal(o[:, a:b], alone)
        assert torch.equal(final[n], last[0])


@pytest.mark.parametrize("gate", GATES)
def test_a_state_handed_over_continues_the_sequence(gate: str) -> None:
    xs, grads = inputs(gate, 48.0, 2, 90, 1, 2, 4, 6, 2)
    truth = with_gradients(gla_reference, xs, grads)

    def halves(**xs: Tensor) -> tuple[Tensor, Tensor]:
        S, options = xs.pop("initial_state"), {"output_final_state": xs.pop("output_final_state")}
        parts = [{n: x if x.dim() == 1 else x[:, t] for n, x in xs.items()} for t in cut]
        first, S = gla(**parts[0], initial_state=S, **options)
        second, S = gla(**parts[1], initial_state=S, **options)
        return torch.cat((first, second), 1), S

    cut = (slice(0, 37), slice(37, 90))
    assert_equal_in_fp64(with_gradients(halves, xs, grads), truth)


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


# -SAFE in every row is the most that one product may take; a little more takes the exact path.
@pytest.mark.parametrize("kind", [48.0, 1.0, "edge", "beyond", "mixed"], ids=str)
@pytest.mark.parametrize("gate", ["gk", "gv", "g"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_as_good_as_the_recurrence(gate: str, kind: float | str, dtype: torch.dtype) -> None:
    """Truth is the recurrence in fp64. Ours may err twice as much as the recurrence does from the
    same inputs, whose state is fp32 too, plus, of each result, two roundings to their type and the
    random walk of T fp32 sums."""
    edge = {"edge": 0.99, "beyond": 1.01}.get(str(kind))
    xs, grads = inputs(gate, "open" if edge else kind, 2, 130, 1, 2, 16, 24, 2)
    if edge:
        xs[gate] -= SAFE * edge
    xs = {n: x.to(torch.float32 if n == "initial_state" else dtype) for n, x in xs.items()}
    grads = [x.to(t) for x, t in zip(grads, (dtype, torch.float32), strict=True)]
    wide = {n: x.double() for n, x in xs.items()}
    truth = with_gradients(gla_reference, wide, [x.double() for x in grads])
    plain = with_gradients(gla_reference, xs, grads)
    eps = torch.finfo(dtype).eps + 130**0.5 * torch.finfo(torch.float32).eps
    for name, x in with_gradients(gla, xs, grads).items():
        error = rms(x - truth[name])
        allowed = 2 * rms(plain[name] - truth[name]) + 2 * eps * rms(truth[name])
        assert error <= allowed, f"{name}: rms error {error:.2e} > {allowed:.2e} allowed"


def test_types_of_the_results() -> None:
    xs, _ = inputs("gk", 1.0, 1, 5, 1, 1, 4, 4, 1)
    half = {n: x.bfloat16() for n, x in xs.items() if n != "initial_state"}
    for backend in ("chunked", "reference"):
        o, final = gla(**half, output_final_state=True, backend=backend)
        assert final is not None
        assert (o.dtype, final.dtype) == (torch.bfloat16, torch.float32)


def test_inputs_stay_as_they_were() -> None:
    xs, grads = inputs("gk", "mixed", 2, 64, 1, 1, 4, 4, 2)
    before = {n: x.clone() for n, x in xs.items()}
    leaves = {n: x.requires_grad_() for n, x in xs.items()}
    given = [x.clone() for x in grads]
    torch.autograd.grad(gla(**leaves, output_final_state=True), list(leaves.values()), grads)
    assert all(torch.equal(x, before[n]) for n, x in xs.items())
    assert all(torch.equal(x, y) for x, y in zip(grads, given, strict=True))


@pytest.mark.parametrize(("B", "T"), [(2, 0), (0, 5)])
@pytest.mark.parametrize("gate", GATES)
def test_no_tokens(gate: str, B: int, T: int) -> None:
    for N, cu in ((B, None), (3, torch.tensor([0, 0, 0, 0]))):
        if cu is not None and T:
            continue
        xs, _ = inputs(gate, "open", B if cu is None else 1, T, 1, 2, 4, 6, N)
        for backend in ("chunked", "reference"):
            o, final = gla(**xs, output_final_state=True, cu_seqlens=cu, backend=backend)
            assert o.shape == (len(xs["q"]), T, 2, 6)
            assert torch.equal(final, xs["initial_state"])


def test_autocast_changes_nothing() -> None:
    xs, grads = inputs("gk", "mixed", 1, 40, 1, 1, 4, 4, 1)
    xs, grads = {n: x.float() for n, x in xs.items()}, [x.float() for x in grads]
    plain = with_gradients(gla, xs, grads)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = with_gradients(gla, xs, grads)
        o, _ = gla_reference(**xs)
    assert all(torch.equal(cast[n], plain[n]) for n in plain)
    assert torch.equal(o, gla_reference(**xs)[0])


def test_backends() -> None:
    assert pick_backend("cpu") == "chunked"
    assert pick_backend("cpu", "reference") == "reference"
    with pytest.raises(ValueError, match="backend is 'fast'; allowed: chunked, reference, triton"):
        pick_backend("cpu", "fast")
    with pytest.raises(ValueError, match="backend is 'triton' on cpu; allowed: a CUDA device"):
        pick_backend("cpu", "triton")


def test_the_reference_can_be_asked_for() -> None:
    xs, _ = inputs("gk", 1.0, 1, 40, 1, 1, 4, 4, 1)
    o, _ = gla(**xs, backend="reference")
    assert torch.equal(o, gla_reference(**xs)[0])
    assert not torch.equal(o, gla(**xs, backend="chunked")[0])  # rounded otherwise


def test_triton_runs_the_key_gate_and_leaves_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = pytest.importorskip("glactl.kernels.triton_gla_op")
    calls = []

    def record(*args: Tensor, **options: object) -> tuple[Tensor, None]:
        calls.append((args, options))
        return args[2], None

    monkeypatch.setattr(engine, "gla_key", record)
    module = sys.modules["glactl.kernels.gla"]  # the package's gla is the function
    monkeypatch.setattr(module, "pick_backend", lambda *_: "triton")
    for gate in GATES:
        xs, _ = inputs(gate, "open", 1, 5, 1, 1, 4, 4, 1)
        gla(**xs)  # fp64: no kernel
        xs = {n: x.float() for n, x in xs.items()}
        gla(**xs)
        if gate == "gk":
            (args, options), *_ = calls
            assert all(x is xs[n] for n, x in zip(("q", "k", "v", "gk"), args, strict=True))
            assert options["initial_state"] is xs["initial_state"]
            assert options["scale"] == 0.5
    assert len(calls) == 1


def test_triton_is_not_needed() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch; from glactl.kernels import gla, pick_backend\n"
        "x = torch.ones(1, 3, 1, 2); print(gla(x, x, x)[0].shape, pick_backend('cuda'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "torch.Size([1, 3, 1, 2]) chunked"


X = torch.zeros(2, 3, 4, 5)
ERRORS = [
    (
        {"k": X[:, :2]},
        r"k has the shape \(2, 2, 4, 5\); allowed: \(2, 3, H, 5\) for \(B, T, H, K\)",
    ),
    ({"k": X[..., :4]}, r"k has the shape \(2, 3, 4, 4\); allowed: \(2, 3, H, 5\)"),
    ({"v": X[0]}, r"v has the shape \(3, 4, 5\); allowed: \(2, 3, 4, V\)"),
    ({"k": X[:, :, :3], "v": X[:, :, :3]}, "q has 4 heads; allowed: a multiple of the 3 of k"),
    ({"q": X.long()}, "q is of torch.int64; allowed: floating-point types"),
    ({"k": X.to("meta")}, "k is on meta; allowed: cpu"),
    ({"gk": X[..., 0]}, r"gk has the shape \(2, 3, 4\)"),
    ({"g": X}, r"g has the shape \(2, 3, 4, 5\); allowed: \(2, 3, 4\) for \(B, T, H\)"),
    ({"gk": X, "gv": X}, "gk and gv are given; allowed: one of gk, gv, g"),
    ({"gk": X + 1e-3}, r"gk has a value of 0.001; allowed: log gates in \[-inf, 0\]"),
    ({"g": X[0, 0, :, 0] + 1}, "g has a value of 1; allowed: log gates"),
    ({"initial_state": X}, r"initial_state has the shape \(2, 3, 4, 5\); allowed: \(2, 4, 5, 5\)"),
    ({"initial_state": torch.zeros(2, 4, 5, 5).int()}, "initial_state is of torch.int32"),
    ({"initial_state": torch.zeros(2, 4, 5, 5, device="meta")}, "initial_state is on meta"),
    ({"cu_seqlens": torch.tensor([0, 3])}, "q has a batch of 2; allowed with cu_seqlens: 1"),
    ({"cu_seqlens": torch.tensor([0.0, 3.0])}, r"cu_seqlens is torch.float32 of the shape \(2,\)"),
    ({"cu_seqlens": torch.tensor([0, 3], device="meta")}, "cu_seqlens is on meta; allowed: cpu"),
]
BOUNDS = [
    ([1, 3], "cu_seqlens goes from 1 to 3; allowed: from 0 to T = 3"),
    ([0, 2], "cu_seqlens goes from 0 to 2; allowed: from 0 to T = 3"),
    ([0, 2, 1, 3], r"cu_seqlens is \[0, 2, 1, 3\]; allowed: numbers that do not decrease"),
]


@pytest.mark.parametrize(("wrong", "message"), ERRORS)
def test_errors_name_the_argument(wrong: dict[str, Tensor], message: str) -> None:
    for op in (gla, gla_reference):
        with pytest.raises(ValueError, match=message):
            op(**{"q": X, "k": X, "v": X, **wrong})


@pytest.mark.parametrize(("bounds", "message"), BOUNDS)
def test_errors_of_bounds(bounds: list[int], message: str) -> None:
    x = X[:1]
    with pytest.raises(ValueError, match=message):
        gla(x, x, x, cu_seqlens=torch.tensor(bounds))


def test_nan_comes_out_again() -> None:
    x = X + torch.nan
    assert gla(X, X, X + 1, gk=x)[0].isnan().any()


@pytest.mark.parametrize(
    ("dtype", "K", "asked", "taken"),
    [
        (torch.bfloat16, 512, False, True),
        (torch.float32, 64, False, True),
        (torch.float32, 128, False, False),
        (torch.float16, 128, False, False),
        (torch.float32, 128, True, True),
        (torch.bfloat16, 1024, True, False),
    ],
    ids=str,
)
def test_kernels_run_unasked_only_where_they_were_proven(dtype, K, asked, taken) -> None:
    pytest.importorskip("triton")
    engine = import_module("glactl.kernels.gla")  # the package has a function of this name
    q = torch.zeros(1, 2, 1, K, dtype=dtype)
    for gate in ("gk", "g", None):
        assert (engine._triton(gate, q, q, q, asked) is not None) == taken
