import csv
import json
import math
import time

import pytest
import torch
from typer.testing import CliRunner

from glactl import measure, operators
from glactl.cli import app
from glactl.measure import Rates, peak_bytes, quantile, timing
from glactl.operators import OPERATORS, Operator, Shape, error
from glactl.profile import parse_lengths
from glactl.profile_cases import Measured, crossover

CPU = torch.device("cpu")


@pytest.fixture
def glactl(tmp_path, monkeypatch):
    """Run the command line in an empty folder, on a machine whose rates are known."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("glactl.profile.rates", lambda *_: Rates(1e10, 1e11, "float32"))
    monkeypatch.setattr("glactl.profile_cases.SECONDS", 0.0)
    return lambda *args: CliRunner().invoke(app, [str(a) for a in args])


@pytest.mark.parametrize(
    ("text", "lengths"),
    [
        ("512", [512]),
        (" 1024, 512 ,512", [512, 1024]),
        ("512:8192:x2", [512, 1024, 2048, 4096, 8192]),
        ("100:1000:x3", [100, 300, 900]),
        ("64:128,7", [7, 64, 128]),
    ],
)
def test_lengths(text, lengths):
    assert parse_lengths(text) == lengths


@pytest.mark.parametrize(
    "text", ["", "0", "-1", "1k", "8:4:x2", "4:8:x1", "0:8:x2", "4:8:x", "1,,2"]
)
def test_lengths_that_are_none(text):
    with pytest.raises(ValueError, match=r"seqlen is .*; allowed: lengths of 1 or more"):
        parse_lengths(text)


def test_the_command_end_to_end(glactl, tmp_path):
    done = glactl("profile", "--seqlen", "32,64", "--heads", 2, "--width", 8)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0].startswith("CPU, ")
    assert "copies 10.0 GB/s, multiplies 100 GFLOP/s" in lines[0]
    assert lines[1] == "64 tokens a call, 2 heads of 8, 64 slots; each model has 2 layers, width 16"
    # 4 operators and 3 models, 2 works, 2 lengths, below two lines and the heads of the columns
    assert len(lines) == 3 + 28 + 1 + 3
    assert lines[3].split()[:3] == ["attention", "fwd", "32"]
    assert [line.split(",")[0] for line in lines[-3:]] == [
        f"crossover attention / {name}" for name in ("gla", "decay", "gsa")
    ]
    (folder,) = (tmp_path / "profiles").iterdir()
    assert {p.name for p in folder.iterdir()} == {
        "results.json",
        "results.csv",
        "seqlen.svg",
        "seqlen.png",
    }
    with open(folder / "results.csv") as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == 28
    for row in rows:
        assert float(row["p10"]) <= float(row["median"]) <= float(row["p90"])
        assert int(row["batch"]) * int(row["T"]) == 64
        assert float(row["tokens_per_s"]) == pytest.approx(64 / float(row["median"]))
        assert float(row["error"]) < 1e-4
        floor = max(float(row["moved"]) / 1e10, float(row["flops"]) / 1e11)
        assert float(row["of_floor"]) == pytest.approx(floor / float(row["median"]))


def test_one_length_is_scanned_for_the_crossover(glactl):
    done = glactl(
        "profile",
        "--seqlen",
        512,
        "--mixers",
        "attention,decay",
        "--heads",
        1,
        "--width",
        8,
        "--json",
        "--quiet",
    )
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert {r["T"] for r in result["results"]} == {512}
    assert {(r["T"], r["batch"]) for r in result["scan"]} == {(256, 2)}
    assert result["crossover"]["decay"]["from"] == 256
    assert list(result["models"]) == ["attention"]
    assert done.stderr.splitlines()[-1].startswith("wrote profiles/")


def test_the_model_of_a_spec(glactl, tmp_path):
    (tmp_path / "my.yaml").write_text(
        "model: {d_model: 16, n_layers: 1, mixer: {kind: gsa, heads: 2}}"
    )
    args = ["--seqlen", 32, "--mixers", "gla", "--width", 8, "--spec", "my.yaml", "--json"]
    done = glactl("profile", *args)
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert {(r["part"], r["name"]) for r in result["results"]} == {
        ("operator", "gla"),
        ("model", "my"),
    }
    assert result["models"]["my"]["mixer"]["kind"] == "gsa"
    assert result["crossover"] == {}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--seqlen", "1k"], "error: seqlen is '1k'; allowed: lengths"),
        (
            ["--mixers", "glaa"],
            "error: mixers has 'glaa'; allowed: attention, gla, decay, gsa; did",
        ),
        (["--mixers", ","], "error: mixers is empty; allowed: attention"),
        (["--dtype", "fp8"], "error: dtype is 'fp8'; allowed: fp32, bf16, fp16"),
        (["--tokens", "8"], "error: tokens is 8; allowed: at least the longest seqlen, 1024"),
        (["--spec", "gone.yaml"], "error: no spec at gone.yaml"),
        (["--device", "tpu"], "error: device 'tpu' is not known"),
        (["--heads", "0"], "Invalid value for '--heads'"),
    ],
)
def test_errors_are_one_line(glactl, args, message):
    done = glactl("profile", *args)
    assert done.exit_code == 2
    assert message in done.stderr
    assert done.stdout == ""


def measured(name, T, seconds):
    row = Measured("operator", name, "forward+backward", T, 1, seconds, 0, 0, 1, 0, 0, 0, 0, 0)
    return [row]


def test_crossover_is_where_the_two_power_laws_meet():
    rows = []
    for T in (256, 1024, 4096):
        rows += measured("attention", T, T**2 / 1e6) + measured("gla", T, T / 1e3)
    found = crossover(rows)["gla"]
    assert found["length"] == 1000  # T^2 / 1e6 = T / 1e3
    assert found["faster"] == "gla"
    assert found["ratio"] == pytest.approx(4.096)


@pytest.mark.parametrize(("factor", "faster"), [(2.0, "attention"), (0.5, "gla")])
def test_no_crossover(factor, faster):
    rows = measured("attention", 256, 1.0) + measured("gla", 256, factor)
    rows += measured("attention", 512, 2.0) + measured("gla", 512, 2 * factor)
    found = crossover(rows)["gla"]
    assert found["length"] is None
    assert (found["faster"], found["from"], found["to"]) == (faster, 256, 512)
    assert found["ratio"] == pytest.approx(2.0)
    assert crossover(measured("gla", 256, 1.0)) == {}


def test_least_work_of_known_shapes():
    """Counted independently for 32,768 tokens of 4 heads in bf16, gates and write strengths too.

    GSA with K = V = 256 and 64 slots: 302 MB
    forward, 840 MB and 100 GFLOP forward and backward.
    """
    gsa = next(o for o in OPERATORS if o.name == "gsa")
    shape = Shape(4, 8192, 4, 256, 64, torch.float32)
    # half the bytes, as of bf16; the write strength is read as well there, not 1 - exp(gate)
    strength = 2 * shape.tokens * 4 * 64
    assert gsa.moved(shape, False) / 2 + strength == pytest.approx(302e6, rel=0.01)
    assert gsa.moved(shape, True) / 2 + 3 * strength == pytest.approx(0.84e9, rel=0.01)
    assert gsa.flops(shape, True) == pytest.approx(100e9, rel=0.03)


def test_attention_counts_the_lower_triangle():
    attention = OPERATORS[0]
    shape = Shape(3, 5, 2, 7, 64, torch.float32)
    pairs = sum(i + 1 for i in range(5))  # query, key
    assert attention.flops(shape, False) == 3 * 2 * pairs * 2 * (2 * 7)
    assert attention.flops(shape, True) == 3.5 * attention.flops(shape, False)


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda o: o.name)
def test_error_against_fp64(operator):
    shape = Shape(2, 70, 2, 8, 4, torch.float64)
    exact, T = error(operator, shape, CPU, 0)
    assert T == 70
    assert exact < 1e-9
    rough, T = error(operator, Shape(1, 1000, 2, 8, 4, torch.float32), CPU, 0)
    assert T == operators.ERROR_T
    assert exact < rough < 1e-4


def test_error_sees_a_wrong_gradient():
    gla = OPERATORS[1]

    def wrong(q, k, v, g):
        return gla.call(q, k.detach() + 0.99 * (k - k.detach()), v, g)

    broken = Operator("gla", gla.inputs, wrong, gla.reference)
    found, _ = error(broken, Shape(1, 20, 2, 8, 4, torch.float64), CPU, 0)
    assert found == pytest.approx(0.01, rel=1e-6)


def test_quantiles():
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert quantile([0.0, 10.0], 0.1) == pytest.approx(1.0)
    assert quantile([5.0], 0.9) == 5.0


def test_timing(monkeypatch):
    found = timing(lambda: time.sleep(0.002), CPU, 0.05)
    assert found.repeats >= 3
    assert 0.002 <= found.p10 <= found.median <= found.p90
    monkeypatch.setattr(measure, "LONG", 0.001)
    assert timing(lambda: time.sleep(0.002), CPU, 10).repeats == 2


def test_peak_bytes_sees_what_a_call_holds():
    size = 64 * 2**20
    found = peak_bytes(lambda: torch.ones(size, dtype=torch.uint8), CPU)
    if found is None:
        pytest.skip("this kernel does not reset the peak of the resident set")
    assert found == pytest.approx(size, rel=0.1)
    kept = peak_bytes(lambda: None, CPU)
    assert kept is not None
    assert kept < size / 10


def test_rates_are_those_of_a_machine():
    found = measure.rates(CPU, torch.float32)
    # any machine of this century, and none of the next years
    assert 1e8 < found.copy < 1e14
    assert 1e8 < found.matmul < 1e16
    assert found.dtype == "float32"
    assert Rates(10.0, 100.0, "").floor(20.0, 100.0) == 2.0
    assert Rates(10.0, 100.0, "").floor(1.0, 100.0) == 1.0
    assert math.isfinite(found.floor(1, 1))
