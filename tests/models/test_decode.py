import pytest
import torch

from glactl.models.decode import Sampler, Sampling, decode, prefill
from glactl.models.lm import LMSpec, build_lm

VOCAB = 23
PROMPTS = [[3], [1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8], [0, 22]]


@pytest.fixture(params=["attention", "gla", "gsa"])
def lm(request):
    mixer = {"kind": request.param, "heads": 2}
    spec = LMSpec(d_model=16, n_layers=2, mixer=mixer, vocab_size=VOCAB, init_std=0.3, short_conv=3)
    return build_lm(spec, 0, dtype=torch.float64).eval()


def continued(lm, prompts, tokens, sampling=None, rows=None, stop=lambda row, token: False):
    hidden, state = prefill(lm, prompts)
    sampler = Sampler(sampling or Sampling(), rows or range(len(prompts)))
    limits = [tokens] * len(prompts) if isinstance(tokens, int) else tokens
    made = [[] for _ in prompts]
    for step in decode(lm, hidden, state, limits, sampler, stop):
        for row, token in step:
            made[row].append(token)
    return made


def naive(lm, prompt, tokens):
    """Greedy decoding that reads everything again for each token."""
    ids = list(prompt)
    for _ in range(tokens):
        with torch.no_grad():
            hidden, _ = lm(torch.tensor([ids]))
            ids.append(int(lm.logits(hidden[0, -1]).argmax()))
    return ids[len(prompt) :]


def test_greedy_decoding_of_ragged_prompts_equals_full_forward_passes(lm):
    assert continued(lm, PROMPTS, 8) == [naive(lm, prompt, 8) for prompt in PROMPTS]


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.9, top_k=7, top_p=0.8, seed=5)])
def test_a_row_does_not_depend_on_the_rows_beside_it(lm, sampling):
    # rows end at different times, so the batch is cut down while others go on
    limits = [9, 2, 5, 0]
    together = continued(lm, PROMPTS, limits, sampling)
    for row, prompt in enumerate(PROMPTS):
        assert together[row] == continued(lm, [prompt], [limits[row]], sampling, [row])[0]
    assert [len(made) for made in together] == limits


def test_a_row_ends_where_stop_says_so(lm):
    free = continued(lm, PROMPTS, 8)
    last = free[1][3]
    ended = continued(lm, PROMPTS, 8, stop=lambda row, token: row == 1 and token == last)
    assert ended[1] == free[1][: free[1].index(last) + 1]
    assert [ended[0], *ended[2:]] == [free[0], *free[2:]]


def test_sampling_depends_on_the_seed_alone(lm):
    first = continued(lm, PROMPTS, 8, Sampling(1.0, seed=1))
    assert continued(lm, PROMPTS, 8, Sampling(1.0, seed=1)) == first
    assert continued(lm, PROMPTS, 8, Sampling(1.0, seed=2)) != first
    same = continued(lm, [PROMPTS[1]] * 2, 8, Sampling(1.0))
    assert same[0] != same[1]


def test_vocab_limits_what_is_drawn(lm):
    hidden, state = prefill(lm, PROMPTS)
    sampler = Sampler(Sampling(5.0), range(4))
    steps = decode(lm, hidden, state, [20] * 4, sampler, lambda row, token: False, vocab=2)
    assert {token for step in steps for _, token in step} == {0, 1}


def draws(sampling, logits, n=4000):
    """How often each token is drawn."""
    z = torch.tensor([logits], dtype=torch.float64)
    sampler = Sampler(sampling, range(n))
    tokens = sampler(z.expand(n, -1), range(n))
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


def test_certain_tokens_are_drawn_always():
    assert draws(Sampling(1.0), [0.0, 1000.0, -1000.0])[1] == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1.0; allowed: 0 or more"),
        ({"temperature": float("nan")}, "temperature is nan; allowed: 0 or more"),
        ({"top_k": 0}, "top_k is 0; allowed: 1 or more"),
        ({"top_p": 0.0}, "top_p is 0.0; allowed: more than 0, at most 1"),
        ({"top_p": 1.5}, "top_p is 1.5; allowed: more than 0, at most 1"),
    ],
)
def test_sampling_out_of_range(wrong, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**wrong)


@pytest.mark.parametrize(
    ("prompts", "message"), [([], "prompts is empty"), ([[1], []], "prompt 1 is empty")]
)
def test_prefill_needs_tokens(lm, prompts, message):
    with pytest.raises(ValueError, match=message):
        prefill(lm, prompts)
