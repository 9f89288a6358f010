import json
import math

import numpy as np
import pytest
import torch

from glactl.models.lm import LMSpec, build_lm
from glactl.tasks import positions
from glactl.tasks.engine_lm import LMEngine
from glactl.tasks.positions import load_texts, measure_positions, perplexity
from glactl.tasks.requests import Requests
from glactl.tasks.tokenizer import ByteTokenizer

TEXTS = ["a bird " * 5, "another one, longer, " * 9, "x", ""]


def build(mixer, **fields):
    fields = {"d_model": 16, "n_layers": 2, "init_std": 0.3, "vocab_size": 259} | fields
    spec = LMSpec.model_validate({"mixer": {"kind": mixer, "heads": 2}} | fields)
    return build_lm(spec, 0, dtype=torch.float64).eval()


@pytest.mark.parametrize("mixer", ["attention", "gla"])
@pytest.mark.parametrize("batch_tokens", [25, 10_000])
def test_parts_are_those_of_one_forward_pass(mixer, batch_tokens):
    lm = build(mixer)
    found = Requests(LMEngine(lm, ByteTokenizer(), batch_tokens)).by_position(TEXTS, (0, 10, 40))
    for text, parts in zip(TEXTS, found, strict=True):
        ids = list(text.encode())
        with torch.no_grad():
            log_p = lm.logits(lm(torch.tensor([[256, *ids[:-1]]]))[0])[0].log_softmax(-1)
        nats = [-log_p[t, i].item() for t, i in enumerate(ids)]
        wanted = [part for part in (nats[:10], nats[10:40], nats[40:]) if part]
        assert [n for _, n in parts] == [len(part) for part in wanted]
        assert [s for s, _ in parts] == pytest.approx([sum(part) for part in wanted], rel=1e-10)


def test_a_text_longer_than_the_model_is_read_to_there_and_counted():
    lm = build("attention", positions="learned", max_len=30)
    requests = Requests(LMEngine(lm, ByteTokenizer()))
    found = requests.by_position(TEXTS, (0, 10))
    assert [[n for _, n in parts] for parts in found] == [[10, 20], [10, 20], [1], []]
    assert requests.truncated == 2


def test_perplexity_of_a_model_that_knows_nothing_is_the_vocabulary(tmp_path):
    lm = build("gla")
    with torch.no_grad():
        lm.head.weight.zero_()
    folder = tmp_path / "positions"
    folder.mkdir()
    rows = [json.dumps({"text": "y" * n}) for n in (300, 700)]
    (folder / "test.jsonl").write_text("\n".join(rows))
    texts = load_texts(tmp_path, False, None, None, None)
    found = measure_positions(Requests(LMEngine(lm, ByteTokenizer())), texts)
    assert (found.documents, found.protocol, found.data) == (2, "positions", str(tmp_path))
    assert list(found.metrics) == [f"perplexity from {b}" for b in (0, 256, 512)]
    for metric in found.metrics.values():
        assert metric.value == pytest.approx(259)
    assert found.rows[0].scores["perplexity from 512"] == (0.0, 0)
    assert found.aggregate["perplexity from 512"] is perplexity


def test_the_standard_error_is_that_of_many_draws_of_texts():
    """The bootstrap's, to its own noise: 2,000 draws know a deviation to about 1.6 %."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(50, 150, 400)
    parts = [(float(n * generator.normal(3, 0.3)), int(n)) for n in tokens]
    drawn = [perplexity([parts[j] for j in generator.integers(400, size=400)]) for _ in range(2000)]
    assert positions._error(parts) == pytest.approx(np.std(drawn), rel=0.08)
    assert positions._error(parts[:1]) is None


def test_no_tokens_and_too_many_nats():
    assert math.isnan(perplexity([]))
    assert perplexity([(1e6, 1)]) == math.exp(700)


def test_rows_without_text(tmp_path):
    (tmp_path / "positions").mkdir()
    (tmp_path / "positions" / "test.jsonl").write_text('{"page": "x"}\n')
    with pytest.raises(ValueError, match=r"test.jsonl: row 1 lacks the field text"):
        load_texts(tmp_path, False, None, None, None)


def test_without_texts_of_its_own_it_reads_wikitext():
    texts = load_texts(None, True, None, None, 1)
    assert (texts.data, len(texts.texts), texts.rows) == ("sample", 1, 2)
    assert texts.revision.startswith("sha256:")
