"""What every model must do, whatever its mixers; taken from the union, so a new one is in it."""

import pytest
import torch

from glactl.models.joined import Joined
from glactl.models.lm import build_lm
from glactl.models.losses import token_losses

T = 13
# fp64. Two layers of up to 8 nested products, each a sum of at most 64 terms, whose intermediate
# values are at most about 10 times the result: 2 * 8 * 64 * 10 roundings.
TOL = 1e4 * torch.finfo(torch.float64).eps


@pytest.fixture
def lm(spec):
    return build_lm(spec, 0, dtype=torch.float64).eval()


def draw(*size, seed=0, vocab=11):
    return torch.randint(vocab, size, generator=torch.Generator().manual_seed(seed))


def same(a, b):
    torch.testing.assert_close(a, b, rtol=TOL, atol=TOL)


def same_state(a, b):
    """Equal where a sequence has tokens: attention may hold rows beyond them."""
    assert torch.equal(a.position, b.position)
    for x, y in zip(a.layers, b.layers, strict=True):
        assert x.keys() == y.keys()
        for name in x:
            if "length" in x and x[name].ndim > 1:
                for n, length in enumerate(x["length"].tolist()):
                    same(x[name][n, :length], y[name][n, :length])
            else:
                same(x[name], y[name])


def size(state):
    return sum(t.nbytes for layer in state.layers for t in layer.values())


def grows(spec):
    return any(m.kind == "attention" and m.window is None for m in spec.mixers)


def read(lm, *args, **kwargs):
    with torch.no_grad():
        return lm(*args, **kwargs)


@pytest.mark.parametrize("shape", [(1, 1), (2, T), (3, 0), (0, 4)], ids=str)
def test_shapes(lm, shape):
    hidden, state = read(lm, draw(*shape))
    assert hidden.shape == (*shape, 16)
    assert hidden.dtype == torch.float64
    assert state is None
    assert lm.logits(hidden).shape == (*shape, 11)
    _, state = read(lm, draw(*shape), lm.initial_state(shape[0]))
    assert state.position.tolist() == [shape[1]] * shape[0]
    assert all(x.shape[0] == shape[0] for layer in state.layers for x in layer.values())


def test_no_position_depends_on_later_tokens(lm):
    tokens = draw(2, T)
    hidden, _ = read(lm, tokens)
    for t in range(T):
        other = tokens.clone()
        other[:, t:] = (other[:, t:] + 1 + draw(2, T - t, seed=t, vocab=10)) % 11
        changed, _ = read(lm, other)
        same(changed[:, :t], hidden[:, :t])
        assert (changed[:, t] - hidden[:, t]).abs().max() > 1e-3


def test_every_later_position_depends_on_the_first_token(spec):
    """Mixing along time does take place; what lies beyond all windows is left out."""
    lm = build_lm(spec, 0, dtype=torch.float64).eval()
    tokens = draw(1, 4)
    other = tokens.clone()
    other[0, 0] = (other[0, 0] + 1) % 11
    moved = (read(lm, tokens)[0] - read(lm, other)[0]).abs().amax((0, 2))
    reach = 3 if all(getattr(m, "window", None) for m in spec.mixers) else 4
    assert (moved[:reach] > 1e-6).all(), moved


def test_steps_equal_the_forward_pass(lm):
    tokens = draw(2, T)
    expected, after = read(lm, tokens, lm.initial_state(2))
    same(read(lm, tokens)[0], expected)
    state = lm.initial_state(2)
    hidden = [lm.step(tokens[:, t], state) for t in range(T)]
    same(torch.stack(hidden, 1), expected)
    same_state(state, after)


@pytest.mark.parametrize("cut", [0, 1, 5, 12, 13])
def test_a_text_may_be_cut_anywhere(lm, cut):
    tokens = draw(2, T)
    expected, after = read(lm, tokens, lm.initial_state(2))
    first, middle = read(lm, tokens[:, :cut], lm.initial_state(2))
    kept = [{name: x.clone() for name, x in layer.items()} for layer in middle.layers]
    second, state = read(lm, tokens[:, cut:], middle)
    same(torch.cat([first, second], 1), expected)
    same_state(state, after)
    for layer, before in zip(middle.layers, kept, strict=True):  # a state that goes in stays
        assert all(torch.equal(layer[name], before[name]) for name in before)
    stepped = [lm.step(tokens[:, t], middle) for t in range(cut, T)]
    same(torch.stack([*first.unbind(1), *stepped], 1), expected)


@pytest.mark.parametrize("cut", [0, 1, 5, 13])
@pytest.mark.parametrize("lengths", [[T], [4, 0, 9]], ids=str)
def test_a_state_may_be_extended_where_it_is(lm, lengths, cut):
    """`extend` is `forward` whose state stays in its place."""
    tokens, N = draw(1, T), len(lengths)
    cut_of = [min(cut, n) for n in lengths]
    whole = torch.tensor([0, *lengths]).cumsum(0)
    expected, after = read(lm, tokens, lm.initial_state(N), whole)
    state = lm.initial_state(N, capacity=T + 2)
    places = [x.data_ptr() for layer in state.layers for x in layer.values()]
    found = torch.full_like(expected, torch.nan)
    for first, last in (([0] * N, cut_of), (cut_of, lengths)):
        parts = list(zip(whole.tolist(), first, last, strict=False))
        index = torch.cat([torch.arange(n + a, n + b) for n, a, b in parts])
        bounds = torch.tensor([0, *(b - a for _, a, b in parts)]).cumsum(0)
        found[:, index] = lm.extend(tokens[:, index], state, bounds)
    same(found, expected)
    same_state(state, after)
    assert state.longest >= max(lengths)
    assert [x.data_ptr() for layer in state.layers for x in layer.values()] == places


def test_a_state_without_room_grows_as_it_is_extended(lm):
    tokens = draw(2, T)
    expected, after = read(lm, tokens, lm.initial_state(2))
    state = lm.initial_state(2)
    found = [lm.extend(tokens[:, :4], state), lm.extend(tokens[:, 4:], state)]
    same(torch.cat(found, 1), expected)
    same_state(state, after)


def test_joined_products_read_the_same(lm):
    tokens = draw(2, T)
    expected, after = read(lm, tokens, lm.initial_state(2))
    state = lm.initial_state(2, capacity=T)
    with Joined(lm):
        found = lm.extend(tokens, state)
    same(found, expected)
    same_state(state, after)


def test_every_parameter_gets_a_gradient(spec):
    lm = build_lm(spec, 0, dtype=torch.float64)
    hidden, _ = lm(draw(3, T))
    token_losses(lm, hidden, draw(3, T, seed=1)).mean().backward()
    for name, p in lm.named_parameters():
        assert torch.isfinite(p.grad).all(), name
        assert p.grad.abs().max() > 0, name


def test_gradients_are_those_of_finite_differences(spec):
    lm = build_lm(spec, 0, dtype=torch.float64)
    tokens, targets = draw(2, 7), draw(2, 7, seed=1)

    def loss():
        return token_losses(lm, lm(tokens)[0], targets).mean()

    parameters = list(lm.parameters())
    gradients = torch.autograd.grad(loss(), parameters)
    g = torch.Generator().manual_seed(2)
    along = [torch.randn(p.shape, generator=g, dtype=p.dtype) for p in parameters]
    slope = sum((a * b).sum() for a, b in zip(gradients, along, strict=True)).item()
    h = 1e-6  # the error of a central difference is about h^2 + eps / h
    values = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, a in zip(parameters, along, strict=True):
                p += sign * h * a
            values.append(loss().item())
            for p, a in zip(parameters, along, strict=True):
                p -= sign * h * a
    assert (values[0] - values[1]) / (2 * h) == pytest.approx(slope, rel=1e-5, abs=1e-6)


def test_two_builds_with_one_seed_are_equal(spec):
    before = torch.get_rng_state()
    a, b, c = (build_lm(spec, seed).state_dict() for seed in (5, 5, 6))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert any(not torch.equal(a[name], c[name]) for name in a)
    double = build_lm(spec, 5, dtype=torch.float64).state_dict()
    assert all(torch.equal(a[name].double(), double[name]) for name in a)


def test_a_state_of_one_size(lm, spec):
    states = [lm.initial_state(2), *(read(lm, draw(2, n), lm.initial_state(2))[1] for n in (1, 9))]
    sizes = [size(state) for state in states]
    if grows(spec):
        assert sizes[0] < sizes[1] < sizes[2]
    else:
        assert len(set(sizes)) == 1


def test_a_state_lies_in_one_piece_for_the_steps_kernels(lm):
    """As it begins, and so after `extend`; attention's keys and values lie head by head."""
    for layer in lm.initial_state(2, capacity=3).layers:
        for part in layer.values():
            assert part.is_contiguous() or part.transpose(1, 2).is_contiguous()


def packed(lengths):
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    return [draw(1, n, seed=i) for i, n in enumerate(lengths)], bounds


@pytest.mark.parametrize(
    ("lengths", "dtype"),
    [
        ([5, 1, 0, 7, 3], torch.int32),
        ([0, 4, 0], torch.int64),
        ([0], torch.int32),
        ([1, 5, 1, 8, 2], torch.int64),
    ],
    ids=str,
)
def test_packed_documents_equal_separate_ones(lm, lengths, dtype):
    documents, bounds = packed(lengths)
    together, none = read(lm, torch.cat(documents, 1), cu_seqlens=bounds.to(dtype))
    assert none is None
    same(together, torch.cat([read(lm, d)[0] for d in documents], 1))


@pytest.mark.parametrize("lengths", [[5, 1, 0, 7], [0, 4, 2, 0]], ids=str)
def test_packed_documents_with_states_equal_separate_ones(lm, lengths):
    """Each document goes on from a past of another length; one has none."""
    N = len(lengths)
    pasts, past_bounds = packed([6, 0, 3, 1])
    _, state = read(lm, torch.cat(pasts, 1), lm.initial_state(N), cu_seqlens=past_bounds)
    documents, bounds = packed(lengths)
    together, after = read(lm, torch.cat(documents, 1), state, cu_seqlens=bounds)
    hidden, ends = [], []
    for past, document in zip(pasts, documents, strict=True):
        _, single = read(lm, past, lm.initial_state(1))
        h, single = read(lm, document, single)
        hidden.append(h)
        ends.append(single)
    same(together, torch.cat(hidden, 1))
    assert after.position.tolist() == [s.position.item() for s in ends]
    tokens = draw(N, seed=9)
    expected = [lm.step(tokens[i : i + 1], s) for i, s in enumerate(ends)]
    same(lm.step(tokens, after), torch.cat(expected))


def test_gradients_do_not_cross_documents(spec):
    lm = build_lm(spec, 0, dtype=torch.float64)
    documents, bounds = packed([4, 3, 5])
    seen = []
    lm.embed.register_forward_hook(lambda m, i, o: seen.append(o.requires_grad_()))
    hidden, _ = lm(torch.cat(documents, 1), cu_seqlens=bounds)
    (g,) = torch.autograd.grad(hidden[0, 4:7].square().sin().sum(), seen)
    assert (g[0, 4:7] != 0).any(-1).all()
    assert (g[0, :4] == 0).all()
    assert (g[0, 7:] == 0).all()


def test_a_batch_does_not_matter(lm):
    tokens = draw(4, T)
    together, _ = read(lm, tokens)
    same(together[2:3], read(lm, tokens[2:3])[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_lower_precision_keeps_its_type_and_wide_states(spec, dtype):
    """Near fp64 by that type's rounding: 2 * 8 nested products, values up to 10 times larger."""
    lm = build_lm(spec, 0, dtype=dtype).eval()
    exact = build_lm(spec, 0, dtype=torch.float64)
    exact.load_state_dict(lm.state_dict())
    tokens = draw(2, T)
    hidden, state = read(lm, tokens, lm.initial_state(2))
    assert hidden.dtype == dtype
    kept = {x.dtype for layer in state.layers for n, x in layer.items() if n == "s"}
    assert kept <= {torch.float32}
    losses = token_losses(lm, hidden, draw(2, T, seed=1))
    assert losses.dtype == torch.float32
    error = (hidden.double() - read(exact.eval(), tokens)[0]).square().mean().sqrt()
    assert error < 2 * 8 * 10 * torch.finfo(dtype).eps
