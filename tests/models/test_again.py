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


def run(lm, prompts, limits, sampling, again=None, piece=3):
    """The tokens of each row, read in pieces."""
    need = max(map(len, prompts)) + max(limits)
    room = None if again is None else again.room(len(prompts), need)
    hidden, state = prefill(lm, prompts, piece, capacity=need, room=room)
    assert room is None or state is room
    made = [[] for _ in prompts]
    sampler = Sampler(sampling, range(len(prompts)))
    for step in decode(lm, hidden, state, limits, sampler, lambda *_: False, 20, again=again):
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
        assert run(lm, prompts, limits, sampling, again, 2 + 3 * (n % 2)) == alone
        fresh.append(len(graphs) > before)
    assert fresh == [True, True, False, True, False, True, True, True, False]


@pytest.mark.parametrize("mixer", ["attention", "gla", "abc", "mamba"])
def test_what_a_room_held_is_not_read(mixer, graphs):
    """Nor moved: the state lies where the captured steps have it."""
    spec = LMSpec(d_model=16, n_layers=2, mixer=mixer, vocab_size=23, init_std=0.3, short_conv=3)
    lm, again = build_lm(spec, 0, dtype=torch.float64).eval(), Again()
    prompts, limits = BATCHES[0]
    expected = run(lm, prompts, limits, GREEDY, again)
    room = again.room(3, 19)
    with torch.inference_mode():
        for x in (x for layer in room.layers for x in layer.values()):
            x.fill_(7)
    assert run(lm, prompts, limits, GREEDY, again) == expected
    places = [x.data_ptr() for layer in again.room(3, 19).layers for x in layer.values()]
    assert places == [x.data_ptr() for layer in room.layers for x in layer.values()]
    assert len(graphs) == 1


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
