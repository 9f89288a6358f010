"""Our engine: states in place of padding, shared beginnings, pieces, and too little memory."""

import pytest
import torch

from glactl.models.lm import LMSpec, build_lm
from glactl.models.sampling import Sampling
from glactl.tasks import engine_lm
from glactl.tasks.engine import Ask
from glactl.tasks.engine_lm import LMEngine, state_bytes
from glactl.tasks.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
QUESTIONS = ["Which bird stands in the water? It is the ", "And which one sings the best? The "]
CHOICES = ["heron", "great tit", "owl", "o"]
MIXERS = ["attention", "gla", "gsa", "mamba"]


def build(mixer, **fields):
    fields = {"d_model": 16, "n_layers": 2, "init_std": 0.3, "vocab_size": 259} | fields
    heads = {} if mixer == "mamba" else {"heads": 2}
    spec = LMSpec.model_validate({"mixer": {"kind": mixer, **heads}} | fields)
    # fp64: two ways of computing one number differ by 1e-15 then, and ties do not occur
    return build_lm(spec, 0, dtype=torch.float64).eval()


def ids(text):
    return list(text.encode())


PAIRS = [(ids(question), ids(choice)) for question in QUESTIONS for choice in CHOICES]


def scored(engine, pairs=PAIRS):
    found = {}
    engine.score(pairs, found.__setitem__)
    return [found[i] for i in range(len(pairs))]


@pytest.fixture
def reads(monkeypatch):
    """The tokens of every forward pass."""
    sizes = []

    def watch(lm, limit=None):
        def watched(whole):
            def read(tokens, *args, **kwargs):
                sizes.append(tokens.numel())
                if limit is not None and tokens.numel() > limit:
                    raise torch.OutOfMemoryError("too many tokens")
                return whole(tokens, *args, **kwargs)

            return read

        for way in ("forward", "extend"):
            monkeypatch.setattr(lm, way, watched(getattr(lm, way)))
        return sizes

    return watch


@pytest.mark.parametrize("mixer", MIXERS)
@pytest.mark.parametrize("batch_tokens", [60, 100_000])
def test_a_shared_question_is_read_once_and_changes_nothing(mixer, batch_tokens, reads):
    lm = build(mixer)
    sizes = reads(lm)
    plain = scored(LMEngine(lm, TOKENIZER, batch_tokens, reuse=False))
    apart = sum(sizes)
    sizes.clear()
    shared = scored(LMEngine(lm, TOKENIZER, batch_tokens, shortest=8))
    for (nats, greedy), (nats2, greedy2) in zip(plain, shared, strict=True):
        assert nats2 == pytest.approx(nats, rel=1e-10)
        assert greedy2 == greedy
    # each question but its last token once, then that token and all but the last of each choice
    once = sum(len(q) - 1 for q in QUESTIONS) + len(QUESTIONS) * sum(map(len, CHOICES))
    assert apart == sum(len(c) + len(x) - 1 for c, x in PAIRS)
    assert sum(sizes) == once < apart


@pytest.mark.parametrize("mixer", MIXERS)
def test_what_differs_in_the_context_shares_what_comes_before(mixer):
    """As in winogrande: two contexts, one continuation."""
    lm = build(mixer)
    pairs = [(ids(QUESTIONS[0] + name), ids(" of course.")) for name in ("heron", "hobby")]
    plain = scored(LMEngine(lm, TOKENIZER, reuse=False), pairs)
    shared = scored(LMEngine(lm, TOKENIZER, shortest=8), pairs)
    assert [n for n, _ in shared] == pytest.approx([n for n, _ in plain], rel=1e-10)


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_long_text_is_read_in_pieces(mixer, reads):
    lm = build(mixer)
    text = ids(" ".join(QUESTIONS * 5))
    whole, pieces = {}, {}
    LMEngine(lm, TOKENIZER).rolling([text], whole.__setitem__)
    sizes = reads(lm)
    LMEngine(lm, TOKENIZER, 50).rolling([text], pieces.__setitem__)
    assert pieces[0] == pytest.approx(whole[0], rel=1e-10)
    assert max(sizes) == 50
    assert sum(sizes) == len(text)


@pytest.mark.parametrize("mixer", ["gla", "attention"])
def test_too_little_memory_makes_smaller_batches(mixer, reads):
    lm = build(mixer)
    expected = scored(LMEngine(lm, TOKENIZER))
    texts = [ids(q) * 9 for q in QUESTIONS]
    rolled, found = {}, {}
    LMEngine(lm, TOKENIZER).rolling(texts, rolled.__setitem__)
    reads(lm, limit=100)
    engine = LMEngine(lm, TOKENIZER)
    assert [n for n, _ in scored(engine)] == pytest.approx([n for n, _ in expected], rel=1e-10)
    engine.rolling(texts, found.__setitem__)  # longer than what fits: read in pieces
    assert found == pytest.approx(rolled, rel=1e-10)
    assert engine._tokens.size <= 100


def texts(engine, asks):
    found = {}
    engine.generate(asks, found.__setitem__)
    return [found[i] for i in range(len(asks))]


@pytest.mark.parametrize("mixer", MIXERS)
def test_generation_does_not_depend_on_what_fits(mixer, monkeypatch):
    lm = build(mixer)
    asks = [Ask(ids(q)[: 3 + 7 * n], 5 + 9 * n) for n, q in enumerate(QUESTIONS * 2)]
    expected = [texts(LMEngine(lm, TOKENIZER), [ask])[0] for ask in asks]
    assert texts(LMEngine(lm, TOKENIZER), asks) == expected
    # prompts are read two at a time, and in pieces of 10
    assert texts(LMEngine(lm, TOKENIZER, 10), asks) == expected
    rows = []
    whole = LMEngine._continue

    def little(self, asks, again):
        rows.append(len(asks))
        if len(asks) > 1:
            raise MemoryError
        return whole(self, asks, again)

    monkeypatch.setattr(LMEngine, "_continue", little)
    assert texts(LMEngine(lm, TOKENIZER), asks) == expected
    assert rows[0] == 4
    assert rows.count(1) == 4


def test_rows_go_together_as_their_states_fit(monkeypatch):
    lm = build("attention")
    rows = []
    whole = LMEngine._continue
    monkeypatch.setattr(
        LMEngine, "_continue", lambda self, a, again: rows.append(len(a)) or whole(self, a, again)
    )
    each = state_bytes(lm, 20)
    assert (
        each > state_bytes(lm, 10) > state_bytes(build("gla"), 0) == state_bytes(build("gla"), 100)
    )
    asks = [Ask([65] * 10, 10)] * 5
    texts(LMEngine(lm, TOKENIZER, state_memory=2 * each), asks)
    assert rows == [2, 2, 1]


def test_logits_are_held_in_parts(monkeypatch):
    lm = build("gla")
    expected = scored(LMEngine(lm, TOKENIZER))
    monkeypatch.setattr(engine_lm, "LOGITS", 2 * 259)
    found = scored(LMEngine(lm, TOKENIZER))
    assert [n for n, _ in found] == pytest.approx([n for n, _ in expected], rel=1e-10)
    assert [g for _, g in found] == [g for _, g in expected]


def test_bos_is_put_before_every_text_once():
    engine = LMEngine(build("gla"), TOKENIZER, bos=True)
    assert engine.encode(["ab", ""]) == [[256, 97, 98], [256]]
    assert engine.encode(["ab"], bos=False) == [[97, 98]]

    class Named(ByteTokenizer):
        def encode(self, text):
            return [256, *super().encode(text.removeprefix("<s>"))]

    assert LMEngine(build("gla"), Named(), bos=True).encode(["<s>a"]) == [[256, 97]]

    class Without(ByteTokenizer):
        bos_id = None

    with pytest.raises(ValueError, match="the tokenizer has no BOS token"):
        LMEngine(build("gla"), Without(), bos=True)


def test_a_row_ends_at_bos_too():
    class Ends(ByteTokenizer):
        bos_id = 0

    lm = build("gla")
    with torch.no_grad():
        lm.head.weight.zero_()  # all logits equal: the first id is drawn
    assert texts(LMEngine(lm, Ends()), [Ask([65], 4)]) == [""]


def test_random_texts_are_a_function_of_seed_and_number():
    engine = LMEngine(build("gla"), TOKENIZER)

    def drawn(number, *others):
        asks = [Ask([65], 9, (), Sampling(1.0, seed=3), n) for n in (number, *others)]
        return texts(engine, asks)[0]

    assert drawn(1) == drawn(1, 2, 3) != drawn(2)


def test_max_length_beyond_the_positions():
    lm = build("attention", positions="learned", max_len=8)
    with pytest.raises(ValueError, match="max_length is 9; the model has 8 positions"):
        LMEngine(lm, TOKENIZER, max_length=9)
    assert LMEngine(lm, TOKENIZER, max_length=5).max_length == 5
