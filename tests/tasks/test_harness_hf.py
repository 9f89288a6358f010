"""A trained Llama through our engine and through lm-eval's hf backend, on the sample of every task.

Needs transformers and accelerate, which the hf backend imports, and the shared data.
"""

import os
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
SHARED = Path(
    os.environ.get("GLACTL_SHARED", Path(__file__).resolve().parents[2].parent / "shared")
)
LLAMA = SHARED / "data" / "stories260k" / "hf"
if not LLAMA.is_dir():
    pytest.skip("the shared data folder is not here", allow_module_level=True)

import transformers  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402

from glactl.convert.command import read_model  # noqa: E402
from glactl.tasks.engine_hf import HFEngine, own_tokenizer  # noqa: E402
from glactl.tasks.engine_lm import LMEngine  # noqa: E402
from glactl.tasks.harness import HarnessLM  # noqa: E402
from glactl.tasks.requests import Requests  # noqa: E402
from glactl.tasks.stock_tasks import load_tasks  # noqa: E402
from glactl.tasks.tokenizer import load_tokenizer  # noqa: E402

CONTEXT = 512  # positions that the Llama was trained with
GENERATED = ["swde", "fda", "squad_completion", "nq_open", "triviaqa", "drop"]
SCORED = ["lambada_openai", "arc_easy", "arc_challenge", "hellaswag", "piqa", "winogrande"]
ALL = [*GENERATED, *SCORED, "wikitext"]
CLOSE = 1e-4  # relative, of likelihoods


@pytest.fixture(scope="module")
def theirs():
    model = transformers.AutoModelForCausalLM.from_pretrained(LLAMA, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(LLAMA)


@pytest.fixture(scope="module")
def ours():
    return read_model(LLAMA, torch.device("cpu"))[0], load_tokenizer(str(LLAMA))


def answers(lm, task, limit=None):
    """metrics, and every request's answer in the order of the documents."""
    from lm_eval import evaluate

    loaded = load_tasks([task], SHARED / "data")
    for one in loaded["tasks"].values():
        one.set_config(key="num_fewshot", value=0)
    found = evaluate(lm=lm, task_dict=loaded, limit=limit, bootstrap_iters=0)
    return found["results"][task], [r for one in found["samples"][task] for r in one["resps"]]


def backend(theirs, **options):
    model, tokenizer = theirs
    return HFLM(pretrained=model, tokenizer=tokenizer, max_length=CONTEXT, batch_size=16, **options)


def engine(ours, **options):
    return HarnessLM(Requests(LMEngine(*ours, max_length=CONTEXT, **options)))


def assert_same(one, two):
    (metrics, answered), (metrics2, answered2) = one, two
    for a, b in zip(answered, answered2, strict=True):
        if isinstance(a[0], str):
            assert a == b
        elif isinstance(a[0], tuple):
            assert a[0][0] == pytest.approx(b[0][0], rel=CLOSE)
            assert a[0][1] == b[0][1]
        else:
            assert a[0] == pytest.approx(b[0], rel=CLOSE)
    for name, value in metrics.items():
        if isinstance(value, float) and "perplexity" not in name:
            assert metrics2[name] == pytest.approx(value, rel=CLOSE if "bits" in name else 1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("task", ALL)
def test_answers_are_those_of_the_hf_backend(theirs, ours, task):
    expected = answers(backend(theirs, add_bos_token=False), task)
    assert_same(expected, answers(engine(ours), task))


@pytest.mark.slow
@pytest.mark.parametrize("task", ["fda", "lambada_openai", "arc_easy", "winogrande"])
def test_answers_after_bos_are_those_of_the_hf_backend(theirs, ours, task):
    """The backend's default: the tokenizer's own rule adds <s>."""
    expected = answers(backend(theirs), task, 40)
    assert_same(expected, answers(engine(ours, bos=True), task, 40))


@pytest.mark.slow
@pytest.mark.parametrize("task", ["swde", "squad_completion", "arc_easy", "winogrande", "wikitext"])
def test_a_model_of_transformers_through_our_engine(theirs, task):
    model, tokenizer = theirs
    ours = HFEngine(model, own_tokenizer(tokenizer), max_length=CONTEXT)
    assert ours.tokenizer.bos_id == tokenizer.bos_token_id
    expected = answers(backend(theirs, add_bos_token=False), task, 30)
    assert_same(expected, answers(HarnessLM(Requests(ours)), task, 30))
