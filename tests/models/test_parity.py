"""Our models against flash-linear-attention's own (benchmarks/parity.py), and the script itself."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "parity.py"
WANTED = 1e-3  # of the largest logit


@pytest.fixture(scope="module")
def parity():
    spec = importlib.util.spec_from_file_location("parity", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:  # importing it sets what fla's kernels read
        patch.setenv("FLA_CACHE_RESULTS", "0")
        patch.setenv("TRITON_F32_DEFAULT", "ieee")
        spec.loader.exec_module(module)
        yield module


SMALL = [
    *("transformer", "gla", "gsa", "retnet", "hgrn2", "abc", "transformer-grouped"),
    *("gla-grouped", "gla-tied", "gla-hybrid", "gsa-grouped", "gsa-hybrid"),
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", SMALL)
def test_gpu_logits_are_those_of_fla(parity, case):
    try:
        parity.need()
    except parity.Missing as error:
        pytest.skip(str(error))
    row = parity.apart(case)
    value = parity.largest(row)
    assert value is not None, row
    assert value <= WANTED, row


def test_the_small_cases_are_all_there(parity):
    assert set(SMALL) == {name for name in parity.CASES if not name.endswith("-wide")}


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_what_is_missing_is_one_line():
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("parity needs a GPU, fla and transformers: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("window", [None, 3])
def test_the_attention_that_stands_in_is_torchs(parity, window):
    """Of 4 queries that end 7 keys, heads in groups of 2, and of documents."""
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 4, 4, 6, generator=generator)
    k, v = torch.randn(2, 2, 7, 2, 6, generator=generator)
    seen = torch.ones(4, 7, dtype=torch.bool).tril(3)
    size = (-1, -1)
    if window is not None:
        seen, size = seen.triu(3 - window + 1), (window - 1, 0)
    wanted = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=seen, enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(parity.attend(q, k, v, window_size=size), wanted)
    bounds = torch.tensor([0, 1, 4])
    parts = [parity.attend(*(x[:1, a:b] for x in (q, k, v)), window_size=size)
             for a, b in ((0, 1), (1, 4))]  # fmt: skip
    packed = parity.attend_packed(q[0], k[0, :4], v[0, :4], bounds, window_size=size)
    torch.testing.assert_close(packed, torch.cat(parts, 1)[0])


def test_a_difference_of_what_is_not_finite_is_an_error(parity):
    x = torch.tensor([1.0, -4.0])
    assert parity.difference(x + 0.5, x) == 0.125
    with pytest.raises(ValueError, match="not all of fla's are finite"):
        parity.difference(x, x / 0)


def test_the_largest_difference_wants_every_one(parity):
    row = {"whole": 1e-6, "packed": 3e-6, "steps, ours": 1.0}
    assert parity.largest(row) == 3e-6
    assert parity.largest(row | {"stepped": {"error": "x"}}) is None
    assert parity.largest({"case": "gla", "error": "x"}) is None
