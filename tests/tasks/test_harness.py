import math

import pytest
import torch
from lm_eval.api.instance import Instance

from glactl.models.lm import LMSpec, build_lm
from glactl.tasks.engine_lm import LMEngine
from glactl.tasks.harness import HarnessLM
from glactl.tasks.requests import Requests
from glactl.tasks.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
PAIRS = [
    ("The heron", " stands"),
    ("", "a text of its own"),
    ("one", "x"),
    ("a context with a space ", "after it"),
    (" ", "only a space"),
    ("été", " 日本"),
    ("long " * 30, "and short"),
    ("nothing follows", ""),
]


def build(mixer="gla", **fields):
    fields = {"d_model": 16, "n_layers": 2, "init_std": 0.3, "vocab_size": 259} | fields
    spec = LMSpec.model_validate({"mixer": {"kind": mixer, "heads": 2}} | fields)
    # fp64: two ways of computing one number differ by 1e-15 then, and ties do not occur
    return build_lm(spec, 0, dtype=torch.float64).eval()


def harness(lm, tokenizer=TOKENIZER, batch_tokens=16_384, progress=None, **options):
    return HarnessLM(Requests(LMEngine(lm, tokenizer, batch_tokens, **options), progress=progress))


@pytest.fixture(params=["attention", "gla", "gsa"])
def lm(request):
    return build(request.param)


def instances(kind, arguments):
    return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]


def log_p(lm, ids):
    """log p of the next token at every position, from one plain forward pass."""
    with torch.no_grad():
        hidden, _ = lm(torch.tensor([ids]))
        return lm.logits(hidden[0]).double().log_softmax(-1)


def plain(lm, context, continuation):
    """Sum of log-softmax over the continuation, and whether each token is the argmax."""
    p = log_p(lm, (context + continuation)[:-1])[len(context) - 1 :]
    n = len(continuation)
    total = sum(p[i, continuation[i]].item() for i in range(n))
    return total, all(int(p[i].argmax()) == continuation[i] for i in range(n))


def ids_of(context, continuation):
    spaces = len(context) - len(context.rstrip())
    moved = context[len(context) - spaces :] + continuation
    left = list(context.rstrip().encode()) or [TOKENIZER.bos_id]
    return left, list(moved.encode())


def test_loglikelihood_equals_the_sum_of_log_softmax(lm):
    found = harness(lm).loglikelihood(instances("loglikelihood", PAIRS[:-1]))
    for pair, (total, greedy) in zip(PAIRS, found, strict=False):
        expected, expected_greedy = plain(lm, *ids_of(*pair))
        assert total == pytest.approx(expected, rel=1e-10)
        assert greedy == expected_greedy


def test_an_empty_continuation_is_certain(lm):
    assert harness(lm).loglikelihood(instances("", PAIRS[-1:])) == [(0.0, True)]


def test_is_greedy_is_true_for_what_the_model_would_write(lm):
    ids = list(b"The ")
    for _ in range(4):
        ids.append(int(log_p(lm, ids)[-1].argmax()))
    greedy, other = ids[4:], [*ids[4:7], (ids[7] + 1) % 259]
    found = {}
    LMEngine(lm, TOKENIZER).score([(ids[:4], greedy), (ids[:4], other)], found.__setitem__)
    assert [g for _, g in (found[0], found[1])] == [True, False]


@pytest.mark.parametrize("batch_tokens", [7, 40, 100])
def test_the_batch_does_not_matter(lm, batch_tokens):
    pairs = [PAIRS[i % len(PAIRS)] for i in range(16)]
    one, many = (harness(lm, batch_tokens=n) for n in (batch_tokens, 100_000))
    a, b = (h.loglikelihood(instances("loglikelihood", pairs)) for h in (one, many))
    assert [x for x, _ in a] == pytest.approx([x for x, _ in b], rel=1e-10)
    assert [g for _, g in a] == [g for _, g in b]
    texts = [(context,) for context, _ in pairs]
    a, b = (h.loglikelihood_rolling(instances("loglikelihood_rolling", texts)) for h in (one, many))
    assert a == pytest.approx(b, rel=1e-10)
    asked = [
        (context, {"until": ["e"], "max_gen_toks": 1 + i}) for i, (context, _) in enumerate(pairs)
    ]
    a, b = (h.generate_until(instances("generate_until", asked)) for h in (one, many))
    assert a == b


def test_rolling_scores_every_token_once(lm):
    text = "Every token once, 日本."
    (found,) = harness(lm).loglikelihood_rolling(instances("", [(text,)]))
    expected, _ = plain(lm, [TOKENIZER.bos_id], list(text.encode()))
    assert found == pytest.approx(expected, rel=1e-10)


def test_rolling_reads_a_long_text_in_windows_of_max_len():
    lm = build("attention", positions="learned", max_len=8)
    ids = list(b"0123456789abcdefghi")
    (found,) = harness(lm).loglikelihood_rolling(instances("", [(bytes(ids).decode(),)]))
    first = [TOKENIZER.bos_id, *ids]
    expected = plain(lm, first[:1], first[1:9])[0] + plain(lm, first[8:9], first[9:17])[0]
    # the last window is filled with what stands before it, and only the rest is scored
    expected += plain(lm, first[11:17], first[17:])[0]
    assert found == pytest.approx(expected, rel=1e-10)


def test_an_empty_text_has_probability_one(lm):
    assert harness(lm).loglikelihood_rolling(instances("", [("",)])) == [0.0]


def greedy(lm, context, tokens):
    ids = list(context.encode()) or [TOKENIZER.bos_id]
    start = len(ids)
    for _ in range(tokens):
        # ids above the tokenizer's vocabulary are never drawn
        ids.append(int(log_p(lm, ids)[-1, : TOKENIZER.vocab_size].argmax()))
        if ids[-1] == TOKENIZER.eos_id:
            return TOKENIZER.decode(ids[start:-1])
    return TOKENIZER.decode(ids[start:])


def test_generate_until_equals_naive_greedy_decoding(lm):
    contexts = ["The heron", "", "x", "été " * 10]
    asked = [(c, {"until": [], "max_gen_toks": 3 + 5 * i}) for i, c in enumerate(contexts)]
    found = harness(lm).generate_until(instances("generate_until", asked))
    assert found == [greedy(lm, c, 3 + 5 * i) for i, c in enumerate(contexts)]


def test_generate_until_ends_before_a_stop_string(lm):
    free = greedy(lm, "The heron", 20)
    stop = free[5:7]
    asked = [
        ("The heron", {"until": ["not in it", stop], "max_gen_toks": 20}),
        ("The heron", {"until": stop, "max_gen_toks": 20}),
    ]
    found = harness(lm).generate_until(instances("generate_until", asked))
    assert found == [free[: free.index(stop)]] * 2


def test_generate_until_ends_at_eos():
    lm = build("gla")
    with torch.no_grad():
        lm.head.weight.zero_()
        lm.head.weight[TOKENIZER.eos_id] = 0  # all logits equal: argmax is 0, a byte
    asked = instances("generate_until", [("x", {"until": [], "max_gen_toks": 4})])
    assert harness(lm).generate_until(asked) == ["\0\0\0\0"]

    class EndsAtZero(ByteTokenizer):
        eos_id = 0

    assert harness(lm, EndsAtZero()).generate_until(asked) == [""]


def test_sampling_is_a_function_of_the_seed():
    lm = build()
    kwargs = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.0}
    a, b, c = (
        harness(lm).generate_until(instances("generate_until", [("x", kwargs | {"seed": seed})]))
        for seed in (1, 1, 2)
    )
    assert a == b != c


def test_a_long_context_is_cut_from_the_left_and_counted():
    lm = build("attention", positions="learned", max_len=12)
    measured = harness(lm)
    context, continuation = "0123456789abcdef", "xyz"
    ((total, _),) = measured.loglikelihood(instances("loglikelihood", [(context, continuation)]))
    # 12 positions read the tokens that predict: all but the last
    kept = list(context.encode())[-10:]
    assert total == pytest.approx(plain(lm, kept, list(continuation.encode()))[0], rel=1e-10)
    asked = instances("generate_until", [(context, {"until": [], "max_gen_toks": 4})])
    assert measured.generate_until(asked) == [greedy(lm, context[-8:], 4)]
    assert measured.asked.truncated == 2
    measured.loglikelihood(instances("loglikelihood", [("short", "er")]))
    assert measured.asked.truncated == 2


def test_models_without_a_table_of_positions_have_no_limit(lm):
    assert LMEngine(lm, TOKENIZER).max_length is None
    assert LMEngine(build("gla", max_len=4), TOKENIZER).max_length is None


def test_what_the_positions_cannot_hold():
    measured = harness(build("attention", positions="learned", max_len=4))
    with pytest.raises(ValueError, match=r"a continuation of 5 tokens is longer than .* max_len 4"):
        measured.loglikelihood(instances("loglikelihood", [("a", "12345")]))
    asked = instances("generate_until", [("a", {"until": [], "max_gen_toks": 4})])
    with pytest.raises(ValueError, match=r"max_gen_toks 4 leaves no room .* max_len is 4"):
        measured.generate_until(asked)


def test_batch_tokens_out_of_range(lm):
    with pytest.raises(ValueError, match="batch_tokens is 0; allowed: 1 or more"):
        LMEngine(lm, TOKENIZER, 0)


def test_progress_counts_every_request(lm):
    seen = []

    class Bar:
        def __init__(self, total, label):
            self.total, self.label, self.done = total, label, 0

        def __enter__(self):
            seen.append(self)
            return self.advance

        def __exit__(self, *error):
            pass

        def advance(self, n=1):
            self.done += n

    measured = harness(lm, TOKENIZER, 50, Bar)
    measured.loglikelihood(instances("loglikelihood", PAIRS))
    measured.generate_until(instances("generate_until", [("a", {"max_gen_toks": 1})] * 3))
    assert [(bar.label, bar.total, bar.done) for bar in seen] == [
        ("loglikelihood", len(PAIRS), len(PAIRS)),
        ("generate", 3, 3),
    ]


def test_in_fp32_the_batch_matters_by_rounding_only():
    """The type that models are measured in: sums of n terms err by about sqrt(n) roundings."""
    lm = build().float()
    pairs = PAIRS[:-1] * 3
    one, many = (
        [x for x, _ in harness(lm, batch_tokens=size).loglikelihood(instances("", pairs))]
        for size in (1, 100_000)
    )
    widest = max(len(c.encode()) for _, c in pairs)
    allowed = 16 * math.sqrt(widest) * torch.finfo(torch.float32).eps
    assert one == pytest.approx(many, rel=allowed)
