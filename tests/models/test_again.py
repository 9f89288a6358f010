"""Captured steps that serve one batch after another give what fresh ones give."""

import pytest
import torch

from glactl.models import steps
from glactl.models.decode import decode, prefill
from glactl.models.lm import LMSpec, build_lm
from glactl.models.sampling import Sampler, Sampling
from glactl.models.steps import Again

BATCHES = [  # prompts, limits
    ([[1, 4, 1, 5, 9, 2, 6], [3], [2, 7]], [12, 12, 12]),
    ([[5], [8, 8, 2], [1]], [12, 3, 9]),  # rows leave, and those that stay are captured anew
    ([[5, 1], [8, 2], [1]], [11, 11, 11]),
    ([[9, 1], [2], [3], [4]], [4, 4, 4, 4]),  # more rows
    ([[1], [2, 3], [8]], [4, 2, 4]),  # fewer, more than half of them
    ([[7, 3], [6], [5, 5]], [4, 4, 0]),  # half of them
    ([[6], [5, 5], [9]], [5, 5, 5]),
    ([[1] * 9, [5, 5], [9]], [12, 5, 5]),  # more tokens than there was room for
    ([[4], [4, 2], [9]], [7, 7, 7]),
]
GREEDY, WARM = Sampling(), Sampling(0.9, 5, 0.9, seed=3)


@pytest.fixture
def graphs(monkeypatch):
    """Steps as on a GPU but for the graph, of which there is one for each capture."""
    made = []

    class Graph:
        def __init__(self, device):
            made.append(self)

        def __call__(self, call):
            call()

    monkeypatch.setattr(steps, "captures", lambda device: True)
    monkeypatch.setattr(steps, "Graph", Graph)
    return made


def run(lm, prompts, limits, sampling, again=None, cut=1):
    """The tokens of each row, of states in two parts."""
    read = [prefill(lm, part) for part in (prompts[:cut], prompts[cut:])]
    made = [[] for _ in prompts]
    hidden, states = torch.cat([h for h, _ in read]), [state for _, state in read]
    sampler = Sampler(sampling, range(len(prompts)))
    for step in decode(lm, hidden, states, limits, sampler, lambda *_: False, 20, again=again):
        for row, token in step:
            made[row].append(token)
    return made


@pytest.mark.parametrize("norm", ["rmsnorm", "layernorm"])
@pytest.mark.parametrize("sampling", [GREEDY, WARM])
@pytest.mark.parametrize("mixer", ["attention", "gla", "gsa", "mamba"])
def test_batches_are_what_they_are_alone(mixer, sampling, norm, graphs):
    spec = LMSpec(
        d_model=16, n_layers=2, mixer=mixer, vocab_size=23, init_std=0.3, norm=norm, short_conv=3
    )
    lm, again = build_lm(spec, 0, dtype=torch.float64).eval(), Again()
    fresh = []
    for n, (prompts, limits) in enumerate(BATCHES):
        alone = run(lm, prompts, limits, sampling)
        before = len(graphs)
        assert run(lm, prompts, limits, sampling, again, 1 + n % 2) == alone
        fresh.append(len(graphs) > before)
    assert fresh == [True, True, False, True, False, True, True, True, False]


def test_another_way_to_draw_is_another_capture(graphs):
    spec = LMSpec(d_model=16, n_layers=1, mixer="gla", vocab_size=23)
    lm, again = build_lm(spec, 0).eval(), Again()
    prompts, limits = BATCHES[0]
    for sampling in (GREEDY, GREEDY, WARM, Sampling(repetition_penalty=1.5)):
        assert run(lm, prompts, limits, sampling, again) == run(lm, prompts, limits, sampling)
    assert len(graphs) == 4 + 3


@pytest.mark.gpu
@pytest.mark.parametrize("mixer", ["attention", "gla", "gsa"])
def test_replayed_graphs_of_a_gpu_go_on_from_other_states(mixer):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    spec = LMSpec(d_model=64, n_layers=2, mixer=mixer, vocab_size=23, init_std=0.3)
    lm, again = build_lm(spec, 0, "cuda").eval(), Again()
    for prompts, limits in BATCHES:
        assert run(lm, prompts, limits, GREEDY, again) == run(lm, prompts, limits, GREEDY)
