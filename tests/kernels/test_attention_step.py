"""One token of softmax attention: the definition against sums in fp64, the kernels against it; and
the writing of many tokens into a state."""

import os

import pytest
import torch
from oracle import CUDA, DEVICE
from torch import Tensor

from glactl.kernels.attention import (
    attention_room,
    attention_step,
    attention_step_reference,
    attention_write,
    attention_write_reference,
)

pytest.importorskip("triton")
from glactl.kernels import triton_attention
from glactl.kernels.triton_attention import (
    _shares,
    _tile,
    attention_step_triton,
    attention_write_triton,
)
from glactl.models.mixers.attention import Attention

runs = pytest.mark.skipif(
    not CUDA and os.environ.get("TRITON_INTERPRET") != "1", reason="needs CUDA or TRITON_INTERPRET"
)
needs_cuda = pytest.mark.skipif(not CUDA, reason="needs a CUDA device")
EPS32 = torch.finfo(torch.float32).eps
THETA = 100.0
CASES = {  # query heads, heads of keys, D, rows of the state, lengths before
    "ragged": (2, 2, 16, 40, [0, 1, 17, 39, 5]),
    "a window, wrapped": (2, 1, 16, 20, [0, 19, 20, 21, 63]),
    "shared keys": (6, 2, 24, 33, [32, 0, 18]),
    "many shared keys": (17, 1, 8, 30, [29, 3]),
    "odd width": (2, 2, 20, 64, [0, 40, 63]),
    "wide": (1, 1, 128, 100, [7, 99]),
    "room to spare": (2, 2, 64, 500, [3, 70, 128]),
    "one row": (3, 3, 16, 1, [0, 5]),
}


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """What is not written stays NaN."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: empty(*a, **k).fill_(torch.nan))


def inputs(
    case: tuple, dtype: torch.dtype, held: torch.dtype | None = None, empty: float = torch.nan
) -> tuple:
    """q, k, v as parts of wider rows, the state, `empty` where no token is, and lengths."""
    HQ, H, D, L, lengths = case
    N, g = len(lengths), torch.Generator().manual_seed(D + L)
    randn = lambda *s: torch.randn(*s, generator=g)  # noqa: E731
    z = (2 * randn(N, (HQ + 2 * H) * D + 8)).to(DEVICE, dtype)
    q, k, v, _ = z.split([HQ * D, H * D, H * D, 8], 1)
    q, k, v = (x.unflatten(1, (-1, D)) for x in (q, k, v))
    length = torch.tensor(lengths, device=DEVICE)
    count = torch.arange(L, device=DEVICE) < length[:, None]
    state = tuple(
        randn(N, L, H, D).to(DEVICE, held or dtype).masked_fill(~count[..., None, None], empty)
        for _ in range(2)
    )
    return q, k, v, state, length


def heads_first(state: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The same state, a head's rows one after another in memory."""
    made = tuple(attention_room(*x.shape, x.dtype, x.device) for x in state)
    assert made[0].transpose(1, 2).is_contiguous()
    return tuple(x.copy_(old) for x, old in zip(made, state, strict=True))


def rotated(x: Tensor, place: int, theta: float | None) -> Tensor:
    """The two halves as real and imaginary part, turned by e^(i place f)."""
    if theta is None:
        return x
    D = x.shape[-1]
    f = theta ** (-torch.arange(0, D, 2, device=x.device, dtype=torch.float64) / D)
    z = torch.complex(x[..., : D // 2], x[..., D // 2 :]) * torch.exp(1j * place * f)
    return torch.cat([z.real, z.imag], -1)


def definition(q, k, v, state, length, theta) -> tuple[Tensor, Tensor, Tensor]:
    """(1) to (3) in fp64, sequence by sequence and head by head: o, keys, values."""
    o, (keys, values) = torch.zeros_like(q), (x.clone() for x in state)
    L, R, D = keys.shape[1], q.shape[1] // k.shape[1], q.shape[2]
    for n, p in enumerate(length.tolist()):
        keys[n, p % L], values[n, p % L] = rotated(k[n], p, theta), v[n]
        for h, x in enumerate(rotated(q[n], p, theta)):
            K, V = (held[n, : min(p + 1, L), h // R] for held in (keys, values))
            o[n, h] = (K @ x / D**0.5).softmax(0) @ V
    return o, keys, values


def check(
    step, case: tuple, dtype: torch.dtype, theta: float | None, held=None, empty=torch.nan,
    layout=tuple,
) -> None:  # fmt: skip
    """The state: to two roundings to its type and, turned, by angles off by 4 p eps.

    The result: a score is a sum of D terms as large as |q| |k| / sqrt(D), and off by so many
    roundings to fp32, by the roundings of q and k to their types, and by angles. It makes p off by
    as much, relatively, and o by that share of the largest value. Sums over the rows round as
    random walks, and p and o are rounded once.
    """
    q, k, v, state, length = inputs(case, dtype, held, empty)
    before, state = length.clone(), layout(state)
    wide = [x.double() for x in (q, k, v)]
    o, *after = definition(*wide, [x.double() for x in state], length, theta)
    made = step(q, k, v, state, length, theta)
    assert made.dtype == v.dtype
    assert torch.equal(length, before + 1)
    D, L, type_eps = q.shape[2], state[0].shape[1], torch.finfo(state[0].dtype).eps
    turn = 0.0 if theta is None else 4 * EPS32 * (1 + before)
    for name, ours, truth in zip(("keys", "values"), state, after, strict=True):
        assert torch.equal(ours.isnan(), truth.isnan()), name
        off = (ours.double() - truth).nan_to_num().flatten(1).abs().amax(1)
        most = truth.nan_to_num().flatten(1).abs().amax(1)
        assert (off <= (2 * type_eps + 2 * turn) * most).all(), name
    score = wide[0].norm(dim=-1).amax(1) * after[0].nan_to_num().norm(dim=-1).flatten(1).amax(1)
    share = score / D**0.5 * (D**0.5 * EPS32 + 2 * type_eps + 2 * turn)
    share = share + (L**0.5 + 4) * EPS32 + 2 * type_eps
    most = after[1].nan_to_num().abs().flatten(1).amax(1)
    error = (made.double() - o).abs().flatten(1).amax(1)
    assert torch.isfinite(made).all()
    assert (error <= share * most + 2 * torch.finfo(v.dtype).eps * most).all(), (error, share)


@pytest.mark.parametrize("theta", [None, THETA])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_definition_is_its_equations(name: str, theta: float | None, dtype) -> None:
    """Which masks the rows that no token is in, and reads them."""
    check(attention_step_reference, CASES[name], dtype, theta, empty=1e3)


@runs
@pytest.mark.parametrize("theta", [None, THETA])
@pytest.mark.parametrize(
    ("programs", "layout"),
    [(1, tuple), (1, heads_first), (264, heads_first)],
    ids=["whole", "whole, heads first", "shares"],
)
@pytest.mark.parametrize("name", CASES)
def test_kernels_match_the_definition(name, programs, layout, theta, monkeypatch) -> None:
    """Rows whole, in tiles of a few, or cut into shares, of which some have none."""
    monkeypatch.setattr(triton_attention, "PROGRAMS", programs)
    monkeypatch.setattr(triton_attention, "_tile", lambda R, wide: (max(16, 256 // wide), 4))
    check(attention_step_triton, CASES[name], torch.float32, theta, layout=layout)


@runs
def test_keys_may_be_wider_than_what_comes() -> None:
    """As under autocast; fp16, as the interpreter has no bf16."""
    check(attention_step_triton, CASES["ragged"], torch.float16, THETA, torch.float32)


@runs
@pytest.mark.parametrize("HQ", [2, 6])
def test_steps_follow_each_other(HQ: int) -> None:
    """From nothing past the end of a window, each on what the one before left."""
    q, k, v, state, length = inputs((HQ, 2, 16, 7, [0, 0, 3]), torch.float32)
    truth = [[x.double() for x in state], length.clone()]
    for _ in range(12):
        made = attention_step_triton(q, k, v, state, length, THETA)
        o = attention_step_reference(*(x.double() for x in (q, k, v)), *truth, THETA)
    assert length.tolist() == truth[1].tolist() == [12, 12, 15]
    torch.testing.assert_close(made.double(), o, rtol=1e-4, atol=1e-4)


@runs
def test_far_places_and_large_scores() -> None:
    """Scores of some 2,000, one of them chosen; p of 30,000 in a window."""
    q, k, v, state, length = inputs((2, 2, 16, 9, [30_000, 8]), torch.float32)
    q = 400 * q
    truth = definition(*(x.double() for x in (q, k, v)), [x.double() for x in state], length, None)
    made = attention_step_triton(q, k, v, state, length, None)
    torch.testing.assert_close(made.double(), truth[0], rtol=1e-2, atol=1e-2)


def test_a_cpu_takes_the_definition() -> None:
    both = [inputs(CASES["shared keys"], torch.float64, empty=0.0) for _ in range(2)]
    q, k, v, state, length = (x.cpu() if torch.is_tensor(x) else x for x in both[0])
    state = tuple(x.cpu() for x in state)
    made = attention_step(q, k, v, state, length, THETA)
    expected = attention_step_reference(*both[1], THETA)
    assert torch.equal(made, expected.cpu())
    assert not made.requires_grad


@runs
def test_a_state_that_would_be_copied_is_refused() -> None:
    q = torch.zeros(2, 2, 16, device=DEVICE)
    held = torch.zeros(2, 2, 4, 16, device=DEVICE).transpose(1, 2)
    longer = torch.zeros(2, 5, 2, 16, device=DEVICE)[:, :4]
    apart = torch.zeros(2, 4, 2, 32, device=DEVICE)[..., ::2]
    one = torch.zeros(2, 1, 2, 16, device=DEVICE).expand(2, 4, 2, 16)
    length = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    for state in ((held.contiguous(), held), (held.contiguous(), longer), (apart,) * 2, (one,) * 2):
        with pytest.raises(ValueError, match="state has the strides"):
            attention_step_triton(q, q, q, state, length, None)
        with pytest.raises(ValueError, match="state has the strides"):
            attention_write_triton(q, q, state, length, length)


@runs
@pytest.mark.parametrize("window", [None, 4])
def test_a_layer_goes_on_where_a_forward_pass_ended(window, monkeypatch) -> None:
    """Sums of some 30 terms in fp32."""
    spec = Attention.Spec(heads=4, kv_heads=2, window=window)
    layer = spec.build(32, True, 1e-6).to(DEVICE)
    x = torch.randn(3, 11, 32, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    with torch.no_grad():
        expected = layer(x)[0]
        _, state = layer(x[:, :6], layer.initial_state(3, x.device))
        assert state["k"].transpose(1, 2).is_contiguous()
        monkeypatch.setattr("glactl.kernels.attention.launches", lambda x: True)
        monkeypatch.setattr("glactl.kernels.attention.attention_step_reference", None)
        made = torch.stack([layer.step(x[:, t], state) for t in range(6, 11)], 1)
    torch.testing.assert_close(made, expected[:, 6:], rtol=1e-5, atol=1e-5)


def test_shares_fill_the_chip() -> None:
    assert _shares(63 * 16, 2048, 64, 264) == _shares(264, 2048, 64, 264) == 1
    assert _shares(252, 2048, 64, 264) == 2
    assert _shares(16, 2048, 64, 264) == _shares(16, 2048, 64, 2048) == 32
    assert _shares(1600, 2048, 64, 2048) == 2
    assert _shares(16, 65, 64, 264) == 2  # two tiles
    assert _shares(16, 64, 64, 264) == 1
    assert _shares(1, 10**6, 64, 264) == 64


def test_tiles_are_as_measured() -> None:
    assert [_tile(1, wide)[0] for wide in (16, 64, 128, 256)] == [128, 32, 16, 16]
    assert [_tile(R, wide)[0] for R, wide in ((2, 64), (4, 128), (4, 256))] == [64, 32, 16]


WRITES = {  # N, L, H, D, rows of the tokens, those of 7 left out
    "one": (1, 7, 2, 16, [[6]]),
    "ragged": (3, 7, 2, 16, [[0, 1, 2], [], [5, 3]]),
    "a window": (2, 7, 1, 24, [[7, 7, 2, 3], [7, 0]]),
    "odd width": (2, 7, 3, 20, [[1], [0, 6]]),
}


def written(name: str, dtype: torch.dtype, held: torch.dtype, grad: bool = False) -> tuple:
    """k and v as parts of wider rows, the state, and where each token goes."""
    N, L, H, D, rows = WRITES[name]
    g = torch.Generator().manual_seed(N + D)
    sequence = torch.tensor([n for n, r in enumerate(rows) for _ in r], device=DEVICE)
    row = torch.tensor([r for part in rows for r in part], device=DEVICE)
    z = torch.randn(len(row), 2 * H * D + 8, generator=g).to(DEVICE, dtype).requires_grad_(grad)
    k, v = (x.unflatten(1, (H, D)) for x in z[:, :-8].chunk(2, 1))
    state = tuple(torch.randn(N, L, H, D, generator=g).to(DEVICE, held) for _ in range(2))
    return z, k, v, state, sequence, row


def check_write(write, name: str, dtype: torch.dtype, held: torch.dtype, layout=tuple) -> None:
    """(7) token by token: the numbers themselves, rounded once."""
    _, k, v, state, sequence, row = written(name, dtype, held)
    expected = [x.clone() for x in state]
    for i, (n, r) in enumerate(zip(sequence.tolist(), row.tolist(), strict=True)):
        if r < state[0].shape[1]:
            expected[0][n, r], expected[1][n, r] = k[i].to(held), v[i].to(held)  # (7)
    state = layout(state)
    write(k, v, state, sequence, row)
    assert all(torch.equal(x, y) for x, y in zip(state, expected, strict=True))


@pytest.mark.parametrize("layout", [tuple, heads_first], ids=["rows", "heads"])
@pytest.mark.parametrize("name", WRITES)
def test_tokens_are_written_by_the_definition(name: str, layout) -> None:
    drops = name == "a window"
    for both in ((torch.float64,) * 2, (torch.float64, torch.float32)):
        check_write(lambda *a: attention_write_reference(*a, drops), name, *both, layout)


@runs
@pytest.mark.parametrize("layout", [tuple, heads_first], ids=["rows", "heads"])
@pytest.mark.parametrize("name", WRITES)
def test_the_kernel_writes_as_the_definition(name: str, layout) -> None:
    for both in ((torch.float32,) * 2, (torch.float32, torch.float16)):
        check_write(attention_write_triton, name, *both, layout)


@pytest.mark.parametrize("name", ["ragged", "a window"])
def test_gradients_go_through_what_is_written(name: str) -> None:
    z, k, v, state, sequence, row = written(name, torch.float64, torch.float64, grad=True)
    attention_write(k, v, state, sequence, row, drops=True)
    (state[0].sum() + 2 * state[1].sum()).backward()
    kept = (row < 7).double()[:, None]
    half = (z.shape[1] - 8) // 2
    expected = torch.cat([kept.expand(-1, half), 2 * kept.expand(-1, half)], 1)
    assert torch.equal(z.grad[:, :-8], expected)


GPU = {
    "63 of 16": (16, 16, 64, 600, [(37 * n) % 600 for n in range(63)]),
    "one": (16, 16, 64, 2100, [2048]),
    "one, short": (4, 4, 128, 700, [70]),
    "GQA": (32, 4, 128, 300, [299, 0, 150, 64, 65]),
    "GQA, filled": (8, 2, 64, 128, [(11 * n) % 400 for n in range(140)]),
    "wide": (2, 2, 256, 200, [199, 3]),
}


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("theta", [None, 10_000.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", [*CASES, *GPU])
def test_gpu_matches_the_definition(name: str, dtype: torch.dtype, theta: float | None) -> None:
    for layout in (tuple, heads_first):
        check(attention_step, (CASES | GPU)[name], dtype, theta, layout=layout)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", WRITES)
def test_gpu_writes_as_the_definition(name: str, dtype: torch.dtype) -> None:
    for layout in (tuple, heads_first):
        check_write(attention_write, name, dtype, dtype, layout)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("N", [1, 140], ids=["shares", "whole"])
def test_gpu_steps_that_follow_each_other(N: int) -> None:
    """Each may begin while the one before is at work; in a graph as without."""
    case = (2, 2, 64, 400, [50] * N)
    both = [inputs(case, torch.float32) for _ in range(2)]
    q, k, v, state, length = both[0]
    for _ in range(40):
        made = attention_step(q, k, v, state, length, THETA)
    q, k, v, other, count = both[1]
    attention_step(q, k, v, other, count, THETA)  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = attention_step(q, k, v, other, count, THETA)
    for _ in range(39):
        graph.replay()
    assert torch.equal(length, count)
    assert torch.equal(made, replayed)
    assert torch.equal(state[0].nan_to_num(), other[0].nan_to_num())
