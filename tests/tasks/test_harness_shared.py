"""Real rows of every kind of task: neither the batch nor the reuse of what is shared matters.

fp32, as models are measured on a CPU; likelihoods to 1e-4, all else equal.
"""

import os
from pathlib import Path

import pytest
import torch

from glactl.convert.command import read_model
from glactl.models.lm import LMSpec, build_lm
from glactl.tasks.engine_lm import LMEngine
from glactl.tasks.measure import measure_stock
from glactl.tasks.requests import Requests
from glactl.tasks.stock_tasks import load_tasks
from glactl.tasks.tokenizer import load_tokenizer

SHARED = Path(
    os.environ.get("GLACTL_SHARED", Path(__file__).resolve().parents[2].parent / "shared")
)
LLAMA = SHARED / "data" / "stories260k" / "hf"
TASKS = ["fda", "squad_completion", "lambada_openai", "arc_easy", "hellaswag", "piqa", "winogrande"]
DOCUMENTS = 16

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not LLAMA.is_dir(), reason="the shared data folder is not here"),
]


def model(name):
    tokenizer = load_tokenizer(str(LLAMA))
    if name == "stories":
        return read_model(LLAMA, torch.device("cpu"))[0], tokenizer
    spec = {"d_model": 32, "n_layers": 2, "init_std": 0.3, "vocab_size": 512}
    mixer = {"kind": name, "heads": 2}
    return build_lm(LMSpec.model_validate(spec | {"mixer": mixer}), 0).eval(), tokenizer


class OneByOne(LMEngine):
    """Batches of one row."""

    def _score(self, pairs, keep):
        for i, pair in enumerate(pairs):
            super()._score([pair], lambda _, found, i=i: keep(i, found))

    def _generate(self, asks, keep):
        for i, ask in enumerate(asks):
            super()._generate([ask], lambda _, text, i=i: keep(i, text))


@pytest.mark.parametrize("name", ["stories", "gla", "gsa"])
def test_neither_the_batch_nor_the_reuse_matters(name):
    lm, tokenizer = model(name)
    loaded = load_tasks(TASKS, SHARED / "data")
    data = dict.fromkeys(TASKS, ("shared", None))

    def outcomes(kind, **options):
        for task in loaded["tasks"].values():
            task._instances = None
        engine = kind(lm, tokenizer, max_length=512, **options)
        return measure_stock(Requests(engine), loaded, data, DOCUMENTS)

    expected = outcomes(OneByOne)
    for other in (outcomes(LMEngine, shortest=8), outcomes(LMEngine, reuse=False)):
        for one, two in zip(expected, other, strict=True):
            for a, b in zip(one.rows, two.rows, strict=True):
                if isinstance(a.output, str):
                    assert a.output == b.output
                else:
                    assert [x[2] for x in a.output] == [x[2] for x in b.output]
                    nats = [x[1] for x in a.output]
                    assert nats == pytest.approx([x[1] for x in b.output], rel=1e-4)
            for name_, metric in one.metrics.items():
                if name_ != "perplexity":
                    assert two.metrics[name_].value == metric.value
