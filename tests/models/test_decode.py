import importlib.util
import json
from pathlib import Path

import pytest
import torch

from glactl.models import decode as decoding
from glactl.models import steps as stepping
from glactl.models.decode import decode, prefill
from glactl.models.greedy import Greedy
from glactl.models.lm import LM, LMSpec, build_lm
from glactl.models.sampling import Sampler, Sampling
from glactl.models.steps import Stepper

VOCAB = 23
PROMPTS = [[3], [1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8], [0, 22]]


@pytest.fixture(params=["attention", "gla", "gsa"])
def lm(request):
    mixer = {"kind": request.param, "heads": 2}
    spec = LMSpec(d_model=16, n_layers=2, mixer=mixer, vocab_size=VOCAB, init_std=0.3, short_conv=3)
    return build_lm(spec, 0, dtype=torch.float64).eval()


def continued(
    lm, prompts, tokens, sampling=None, rows=None, stop=lambda row, token: False, block=16
):
    hidden, state = prefill(lm, prompts)
    sampler = Sampler(sampling or Sampling(), rows or range(len(prompts)), prompts)
    limits = [tokens] * len(prompts) if isinstance(tokens, int) else tokens
    made = [[] for _ in prompts]
    for step in decode(lm, hidden, state, limits, sampler, stop, block=block):
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


SAMPLINGS = [Sampling(), Sampling(0.9, None, 0.8, 5, min_p=0.05, repetition_penalty=1.5)]


@pytest.mark.parametrize("sampling", SAMPLINGS)
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


class Replayed:
    """A call as a CUDA graph repeats it: all that it reads and writes stays where it is, and what
    it tells the host when it is captured is all that it ever tells."""

    def __init__(self, device):
        self.places = None

    @staticmethod
    def _where(stepper):
        state = stepper.state
        parts = [part for layer in state.layers for part in layer.values()]
        return [x.data_ptr() for x in (*parts, state.position, stepper._token)]

    def __call__(self, call):
        stepper = call.__self__
        self.places = self.places or self._where(stepper)
        call()
        assert self._where(stepper) == self.places
        stepper.state.longest = -1


@pytest.mark.parametrize("block", [1, 3, 16])
@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_blocks_and_captured_steps_change_nothing(lm, sampling, captured, block, monkeypatch):
    free = continued(lm, PROMPTS, 30, sampling, block=1)
    ends = free[2][10], free[0][17]

    def stop(row, token):
        return (row, token) in ((2, ends[0]), (0, ends[1]))

    expected = [made[:] for made in free]
    for row, end in ((2, ends[0]), (0, ends[1])):
        expected[row] = free[row][: free[row].index(end) + 1]
    expected[3] = free[3][:5]
    if captured:
        monkeypatch.setattr(stepping, "captures", lambda device: True)
        monkeypatch.setattr(stepping, "Graph", Replayed)
    assert continued(lm, PROMPTS, [30, 30, 30, 5], sampling, None, stop, block) == expected


def test_captured_rows_that_have_ended_do_not_run_out_of_positions(monkeypatch):
    """Row 0 may make 2 tokens, to the last position; the others go on with it for 20 more."""
    spec = LMSpec(
        d_model=16, n_layers=1, mixer="attention", vocab_size=VOCAB, init_std=0.3,
        positions="learned", max_len=24,
    )  # fmt: skip
    lm = build_lm(spec, 0, dtype=torch.float64).eval()
    prompts, limits = [[1] * 23, [2], [3], [4]], [2, 22, 22, 20]
    expected = continued(lm, prompts, limits)
    monkeypatch.setattr(stepping, "captures", lambda device: True)
    monkeypatch.setattr(stepping, "Graph", Replayed)
    seen = []
    rest = Stepper.rest
    monkeypatch.setattr(Stepper, "rest", lambda self, rows: (seen.append(rows), rest(self, rows)))
    assert continued(lm, prompts, limits) == expected
    assert [0] in seen


GREEDY = {"d_model": 16, "n_layers": 2, "mixer": "gsa", "vocab_size": VOCAB, "init_std": 0.6}


@pytest.mark.parametrize("vocab", [None, 9])
@pytest.mark.parametrize(
    "more", [{}, {"embedding_scale": 3.0, "tie_embeddings": True}, {"mixer": "attention"}], ids=str
)
@pytest.mark.parametrize("rows", [1, 3])
def test_greedy_rows_end_their_steps_by_themselves(rows, more, vocab, monkeypatch):
    """And make the tokens that they make where steps are not captured."""
    lm = build_lm(LMSpec.model_validate(GREEDY | more), 7, dtype=torch.float64).eval()
    monkeypatch.setattr(stepping, "Graph", Replayed)
    made = []
    for captured in (False, True):
        monkeypatch.setattr(stepping, "captures", lambda device, captured=captured: captured)
        if captured:
            monkeypatch.setattr(LM, "step", None)  # is not called
        hidden, state = prefill(lm, [[1, 4, 1], [5], [9, 2]][:rows])
        with torch.inference_mode():
            sampler = Sampler(Sampling(), range(rows)).start(hidden.device, VOCAB)
            first = sampler.draw(lm.logits(hidden)[:, :vocab], sampler.uniform(state.position))
        stepper = Stepper(lm, first, state, sampler, 30, vocab, block=4)
        made.append([stepper.run(n) for n in (4, 1, 3, 4)])
        assert state.position.tolist() == [15, 13, 14][:rows]
        assert state.longest == 15
        made[-1].append(stepper.keep(range(rows)[-1::-2]).run(4))
    assert made[0] == made[1]
    assert len({token for part in made[0][:4] for tokens in part for token in tokens}) > 2


@pytest.mark.parametrize(
    ("more", "sampling"),
    [
        ({}, Sampling(1.0)),
        ({}, Sampling(repetition_penalty=1.5)),
        ({"norm": "layernorm"}, Sampling()),
        ({"positions": "learned", "max_len": 40}, Sampling()),
    ],
    ids=str,
)
def test_what_is_not_a_greedy_step(more, sampling):
    assert Greedy.takes(build_lm(LMSpec.model_validate(GREEDY), 0), Sampling(top_k=3))
    assert not Greedy.takes(build_lm(LMSpec.model_validate(GREEDY | more), 0), sampling)


def test_a_greedy_draw_looks_at_logits_as_they_are(monkeypatch):
    """No copy of them in fp32; 1 and 1.001 are one number in bf16."""
    monkeypatch.setattr(torch.Tensor, "float", None)  # is not called
    sampler = Sampler(Sampling(), [0]).start(torch.device("cpu"), 3)
    logits, u = torch.tensor([[0.5, 1.0, 1.001]]), torch.zeros(1)
    assert sampler.draw(logits, u).tolist() == [2]
    assert sampler.draw(logits.bfloat16(), u).tolist() == [1]


@pytest.mark.parametrize(
    ("mixer", "captured", "temperature"),
    [("attention", False, 1.0), ("attention", True, 1.0), ("gla", True, 1.0), ("gla", True, 0.0)],
)
def test_a_compiled_step_is_compiled_once(mixer, captured, temperature, monkeypatch):
    """Captured or not: the longest row, which the host counts, is no part of the graph."""
    torch.compiler.reset()
    spec = LMSpec(d_model=16, n_layers=2, mixer=mixer, vocab_size=VOCAB, init_std=0.3)
    lm = build_lm(spec, 0, dtype=torch.float64).eval()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(stepping, "captures", lambda device: captured)
    monkeypatch.setattr(stepping, "Graph", Replayed)
    made = []
    for read in (None, torch.compile(lm.step, backend=backend, fullgraph=True, dynamic=False)):
        hidden, state = prefill(lm, [[1, 2, 3]])
        with torch.inference_mode():
            sampler = Sampler(Sampling(temperature), [0]).start(hidden.device, VOCAB)
            first = sampler.draw(lm.logits(hidden), sampler.uniform(state.position))
            stepper = Stepper(lm, first, state, sampler, 12, block=4, read=read)
            made.append([token for _ in range(3) for token in stepper.run(4)])
    assert made[0] == made[1]
    assert len(graphs) == 1


@pytest.mark.parametrize("piece", [1, 2, 5, 100])
def test_prompts_in_pieces_are_the_prompts(lm, piece):
    """Sums of a few hundred terms in fp64."""
    whole, after = prefill(lm, PROMPTS)
    hidden, state = prefill(lm, PROMPTS, piece)
    torch.testing.assert_close(hidden, whole, rtol=1e-12, atol=1e-12)
    assert state.longest == after.longest == 7
    assert torch.equal(state.position, after.position)
    for x, y in zip(state.layers, after.layers, strict=True):
        for name in y:
            for n in range(len(PROMPTS)):
                a, b = x[name][n], y[name][n]
                if "length" in y and b.ndim:  # of attention's rows others are never read
                    a, b = a[: y["length"][n]], b[: y["length"][n]]
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("piece", [4, 100])
def test_prompts_are_read_with_room_for_more(lm, piece):
    """What is read and what comes after it is the same; attention has as many rows as asked for."""
    limits = [6] * len(PROMPTS)
    made = []
    for capacity in (0, 7 + 6, 40):
        hidden, state = prefill(lm, PROMPTS, piece, capacity=capacity)
        assert state.longest == 7
        for layer in state.layers:
            rows = layer["k"].shape[1] if "length" in layer else capacity
            assert rows >= capacity
        sampler = Sampler(Sampling(), range(len(PROMPTS)))
        made.append([*decode(lm, hidden, state, limits, sampler, lambda *_: False)])
    assert made[0] == made[1] == made[2]


def test_prompts_continue_a_past(lm):
    whole, after = prefill(lm, PROMPTS)
    past = prefill(lm, [p[:1] for p in PROMPTS])
    kept = {name: part.clone() for name, part in past[1].layers[0].items()}
    hidden, state = prefill(lm, [p[1:] for p in PROMPTS], 3, past)  # the first of them is empty
    torch.testing.assert_close(hidden, whole, rtol=1e-12, atol=1e-12)
    assert torch.equal(state.position, after.position)
    hidden, state = prefill(lm, [[]] * 4, past=past)
    assert torch.equal(hidden, past[0])
    list(decode(lm, hidden, state, [3] * 4, Sampler(Sampling(), range(4)), lambda *_: False))
    assert all(torch.equal(past[1].layers[0][name], kept[name]) for name in kept)


def test_a_draw_depends_on_the_place_and_not_on_how_it_was_reached(lm):
    """Text made, read again as a prompt, goes on as it did."""
    sampling = Sampling(1.0, seed=2)
    made = continued(lm, PROMPTS, 9, sampling)
    longer = [prompt + text[:4] for prompt, text in zip(PROMPTS, made, strict=True)]
    assert continued(lm, longer, 5, sampling) == [text[4:] for text in made]


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


@pytest.mark.parametrize(
    ("prompts", "piece", "message"),
    [
        ([], 9, "prompts is empty"),
        ([[1], []], 9, "prompt 1 is empty"),
        ([[1]], 0, "piece is 0; allowed: 1 or more"),
    ],
)
def test_prefill_needs_tokens(lm, prompts, piece, message):
    with pytest.raises(ValueError, match=message):
        prefill(lm, prompts, piece)


def test_a_block_has_steps(lm):
    with pytest.raises(ValueError, match="block is 0; allowed: 1 or more"):
        continued(lm, PROMPTS, 3, block=0)


def test_steps_are_compared_with_a_forward_pass(lm):
    assert decoding.step_error(lm, PROMPTS[1]) < 1e-12
    lm.blocks[0].conv.step = lambda x, state: x  # a step that is not the forward pass's
    assert decoding.step_error(lm, PROMPTS[1]) > 1e-3


def test_the_benchmark_runs(tmp_path, monkeypatch, capsys):
    script = Path(__file__).resolve().parents[2] / "benchmarks" / "decode.py"
    spec = importlib.util.spec_from_file_location("decode_benchmark", script)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    file = tmp_path / "decode.json"
    options = {
        "--device": "cpu", "--models": "gsa_340m", "--batches": "1,3", "--positions": "5,9",
        "--tokens": "16", "--prefill": "40", "--piece": "16", "--write": str(file),
    }  # fmt: skip
    words = [word for option in options.items() for word in option]
    monkeypatch.setattr("sys.argv", ["decode.py", "--tiny", *words])
    benchmark.main()
    rows = json.loads(file.read_text())["results"]
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == rows
    timed = [(r["batch"], r["position"], r["sampling"]) for r in rows if "batch" in r]
    first = [(n, 5, way) for n in (1, 3) for way in ("greedy", "temperature", "top_p")]
    assert timed == [*first, (1, 9, "greedy"), (3, 9, "greedy")]
    assert all(r["tokens_per_s"] > 0 for r in rows)
    assert [r["prefill"] for r in rows if "prefill" in r] == [40]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mixer", ["attention", "gla", "gsa"])
def test_gpu_greedy_steps_make_the_tokens_of_others(mixer, monkeypatch):
    """fp32, in which no two logits are near each other."""
    spec = LMSpec(d_model=64, n_layers=2, mixer=mixer, vocab_size=VOCAB, init_std=0.3)
    lm = build_lm(spec, 0, "cuda").eval()
    made = continued(lm, PROMPTS, 40)
    alone = continued(lm, PROMPTS[1:2], 40)
    monkeypatch.setattr(Greedy, "takes", lambda lm, sampling: False)
    assert continued(lm, PROMPTS, 40) == made
    assert continued(lm, PROMPTS[1:2], 40) == alone


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("sampling", [*SAMPLINGS, Sampling(1.0, top_k=7)])
@pytest.mark.parametrize("mixer", ["attention", "gla", "gsa"])
def test_gpu_replays_the_steps(mixer, sampling, monkeypatch):
    """Captured and plain steps launch the same kernels: the same tokens, to the last one."""
    spec = LMSpec(d_model=64, n_layers=2, mixer=mixer, vocab_size=VOCAB, init_std=0.3)
    lm = build_lm(spec, 0, "cuda", torch.bfloat16).eval()
    limits = [60, 9, 40, 21]
    replays = []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(
        torch.cuda.CUDAGraph, "replay", lambda self: (replays.append(1), replay(self))
    )
    captured = continued(lm, PROMPTS, limits, sampling)
    assert len(replays) > 50
    alone = continued(lm, PROMPTS[1:2], 40, sampling, [1])
    monkeypatch.setattr(stepping, "Graph", lambda device: lambda call: call())
    assert continued(lm, PROMPTS, limits, sampling) == captured
    assert continued(lm, PROMPTS[1:2], 40, sampling, [1]) == alone
