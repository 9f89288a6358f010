"""How tokens are drawn, against the equations of glactl/models/sampling.py."""

import hashlib

import pytest
import torch

from glactl.models.sampling import Sampler, Sampling

MASK = 2**64 - 1
CPU = torch.device("cpu")


def splitmix(key, place):
    """Output number `place`, from 0, of the published generator, in whole numbers."""
    state = key & MASK
    for _ in range(place + 1):
        state = (state + 0x9E3779B97F4A7C15) & MASK
        x = state
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
        x ^= x >> 31
    return x


def test_the_generator_gives_its_published_numbers():
    assert [splitmix(1234567, i) for i in range(2)] == [6457827717110365317, 3203168211198807973]


def test_u_is_that_of_the_generator():
    rows = [0, 1, 7, 2**40]
    u = Sampler(Sampling(seed=-3), rows).uniform(torch.arange(50).expand(4, -1))
    for row, found in zip(rows, u.tolist(), strict=True):
        key = int.from_bytes(hashlib.sha256(f"-3/{row}".encode()).digest()[:8], "little")
        assert found == [(splitmix(key, place) >> 40) / 2**24 for place in range(50)]


def test_u_is_uniform_and_rows_are_independent():
    """Five standard errors of a mean, of a variance and of a correlation of 64,000 numbers."""
    n, places = 64, 1000
    u = Sampler(Sampling(), range(n)).uniform(torch.arange(places).expand(n, -1)).double()
    z = (u - 0.5) * 12**0.5
    allowed = 5 / (n * places) ** 0.5
    assert u.min() >= 0
    assert u.max() < 1
    assert z.mean().abs() < allowed
    assert (z.square().mean() - 1).abs() < allowed  # the fourth moment is 1.8
    assert (z[1:] * z[:-1]).mean().abs() < allowed * 1.01
    assert (z[:, 1:] * z[:, :-1]).mean().abs() < allowed * 1.01


def draws(sampling, logits, n=4000, read=None):
    """How often each token is drawn."""
    z = torch.tensor([logits], dtype=torch.float64).expand(n, -1)
    read = None if read is None else [read] * n
    sampler = Sampler(sampling, range(n), read).start(CPU, len(logits))
    tokens = sampler.draw(z, sampler.uniform(torch.zeros(n, dtype=torch.int64)))
    return torch.bincount(tokens, minlength=len(logits)) / n


P = [0.1, 0.4, 0.2, 0.3]
LOGITS = torch.tensor(P).log().tolist()


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(1.0), P),
        (Sampling(0.5), [p**2 / 0.3 for p in P]),
        (Sampling(1.0, top_k=2), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(1.0, top_k=1), [0, 1, 0, 0]),
        (Sampling(1.0, top_k=100), P),
        (Sampling(1.0, top_p=0.6), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(1.0, top_p=1e-9), [0, 1, 0, 0]),
        # top_p is a share of what top_k has left: 0.4 and 0.3 are 0.78 of 0.9
        (Sampling(1.0, top_k=3, top_p=0.75), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(1.0, min_p=0.6), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(1.0, min_p=1.0), [0, 1, 0, 0]),
        # of the probabilities after the temperature: 0.09 is 0.56 of 0.16
        (Sampling(0.5, min_p=0.6), [0, 1, 0, 0]),
        (Sampling(1.0, top_p=0.6, min_p=0.2), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(1.0, top_p=0.95, min_p=0.6), [0, 4 / 7, 0, 3 / 7]),
        (Sampling(), [0, 1, 0, 0]),
    ],
    ids=str,
)
def test_tokens_are_drawn_with_their_probability(sampling, expected):
    # five standard errors of a share of 4,000 draws
    assert torch.allclose(
        draws(sampling, LOGITS),
        torch.tensor(expected, dtype=torch.float32),
        atol=5 * 0.5 / 4000**0.5,
    )


def test_what_was_read_is_penalized_on_both_sides_of_zero():
    z = [2.0, -1.0, 1.5, -0.5]
    p = torch.tensor([1.0, -2.0, 1.5, -0.5]).softmax(0)
    found = draws(Sampling(1.0, repetition_penalty=2.0), z, read=[1, 0, 0, 99])
    assert torch.allclose(found, p, atol=5 * 0.5 / 4000**0.5)
    assert draws(Sampling(repetition_penalty=2.0), z, read=[0])[2] == 1
    assert draws(Sampling(repetition_penalty=2.0), z)[0] == 1


def test_what_was_drawn_is_penalized_in_its_row_alone():
    sampler = Sampler(Sampling(repetition_penalty=4.0), [0, 1], [[], [0]]).start(CPU, 3)
    z = torch.tensor([[3.0, 2.0, 1.0]]).expand(2, -1)
    u = torch.zeros(2)
    assert [sampler.draw(z, u).tolist() for _ in range(3)] == [[0, 1], [1, 2], [2, 0]]
    kept = Sampler(Sampling(repetition_penalty=4.0), [5, 6], [[0], [1]]).start(CPU, 3)
    assert kept.keep(torch.tensor([1])).draw(z[:1], u[:1]).tolist() == [0]


def test_certain_tokens_are_drawn_always():
    assert draws(Sampling(1.0), [0.0, 1000.0, -1000.0])[1] == 1


@pytest.mark.parametrize("sampling", [Sampling(1.0), Sampling(1.0, top_k=3)], ids=str)
def test_the_ends_of_u_draw_tokens_that_may_be_drawn(sampling):
    u = torch.tensor([0.0, 1 - 2**-24])
    z = torch.tensor([[-torch.inf, 0.0, 0.0, 0.0, -torch.inf]]).expand(2, -1)
    assert Sampler(sampling, [0, 1]).start(CPU, 5).draw(z, u).tolist() == [1, 3]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0; allowed: 0 or more"),
        ({"temperature": float("nan")}, "temperature is nan; allowed: 0 or more"),
        ({"top_k": 0}, "top_k is 0; allowed: 1 or more"),
        ({"top_p": 0.0}, "top_p is 0.0; allowed: more than 0, at most 1"),
        ({"top_p": 1.5}, "top_p is 1.5; allowed: more than 0, at most 1"),
        ({"min_p": -0.1}, "min_p is -0.1; allowed: 0 to 1"),
        ({"min_p": 1.5}, "min_p is 1.5; allowed: 0 to 1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0; allowed: more than 0"),
    ],
)
def test_sampling_out_of_range(wrong, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**wrong)
