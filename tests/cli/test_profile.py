import csv
import json
import math
import sys
import time
import types
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from glactl import measure
from glactl.cli.main import app
from glactl.measure import Rates, peak_bytes, quantile, saved_bytes, timing
from glactl.models.cost import lm_cost
from glactl.models.lm import LMSpec
from glactl.profile import operators
from glactl.profile import peers as operators_peers
from glactl.profile import process as profile_process
from glactl.profile.calls import make_call
from glactl.profile.cases import Case, Failed, Measured, allowed_error, crossover
from glactl.profile.command import NoMemory, WrongResults, _judge
from glactl.profile.operators import OPERATORS, Operator, Shape, error
from glactl.profile.plan import parse_lengths

CPU = torch.device("cpu")
RATES = Rates(1e10, 1e11, "float32")


@pytest.fixture
def glactl(tmp_path, monkeypatch):
    """Run the command line in an empty folder, on a machine whose rates are known."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("glactl.profile.command.rates", lambda *_: RATES)
    monkeypatch.setattr("glactl.profile.plan.SECONDS", 0.0)
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


SMALL = ["--heads", 2, "--width", 8]


def test_the_command_end_to_end(glactl, tmp_path):
    some = ["--parts", "operators,layers,models", "--mixers", "attention,decay,gla"]
    done = glactl("profile", "--seqlen", "32,64", *SMALL, *some)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0].startswith("CPU, ")
    assert "copies 10.0 GB/s, multiplies 100 GFLOP/s" in lines[0]
    assert lines[1].startswith("on a CPU the PyTorch forms run")
    assert lines[2] == "64 tokens a call, 2 heads of 8, 64 slots; models of 2 layers, width 16"
    # of 2 lengths: 3 operators and 2 layers of 2 works, 2 models of 3; below, three lines
    n = 2 * (3 * 2 + 2 * 2 + 2 * 3)
    assert lines[4].split()[:3] == ["attention", "fwd", "32"]
    assert f"; {n} of {n} rows are right, that is below 3e-04 times" in lines[4 + n + 1]
    assert [line.split(":")[0] for line in lines[4 + n + 3 :]] == [
        f"crossover attention / {name}, {part}"
        for part, names in (
            ("operator", ("decay", "gla")),
            ("layer", ("gla",)),
            ("model", ("gla",)),
        )
        for name in names
    ]
    (folder,) = (tmp_path / "profiles").iterdir()
    pictures = {f"{name}.{end}" for name in ("seqlen", "roofline") for end in ("svg", "png")}
    assert {p.name for p in folder.iterdir()} == {
        "results.json", "results.csv", "report.html", *pictures,
    }  # fmt: skip
    with open(folder / "results.csv") as f:
        rows = list(csv.DictReader(f))
    assert len(rows) == n
    for row in rows:
        assert float(row["p10"]) <= float(row["median"]) <= float(row["p90"])
        assert int(row["batch"]) * int(row["T"]) == 64
        tokens = int(row["batch"]) if row["work"] == "decode" else 64
        assert float(row["tokens_per_s"]) == pytest.approx(tokens / float(row["median"]))
        assert float(row["error"]) < 1e-4
        terms = {"memory": float(row["moved"]) / 1e10, "compute": float(row["flops"]) / 1e11}
        assert row["bound"] == max(terms, key=terms.get)
        assert float(row["of_floor"]) == pytest.approx(max(terms.values()) / float(row["median"]))
        keeps = row["work"] in ("forward+backward", "train")
        assert (int(row["saved"] or 0) > 0) == keeps
    page = (folder / "report.html").read_text()
    assert page.count("<svg") == 2
    assert "gla model" in page


def test_one_length_is_scanned_for_the_crossover(glactl):
    mixers = ["--mixers", "attention,decay", "--heads", 1, "--width", 8]
    done = glactl("profile", "--seqlen", 512, *mixers, "--json", "--quiet", "--phase", "prefill")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert {r["T"] for r in result["results"]} == {512}
    assert {(r["T"], r["batch"]) for r in result["scan"]} == {(256, 2)}
    assert result["crossover"]["operator"]["decay"]["from"] == 256
    assert list(result["models"]) == ["attention"]
    assert {r["work"] for r in result["results"] if r["part"] == "model"} == {"prefill"}
    assert done.stderr.splitlines()[-1].startswith("wrote profiles/")


HYBRID = """
model: {d_model: 16, n_layers: 2, mixer: [{kind: gsa, heads: 2}, {kind: mamba, state: 4}]}
"""


def test_the_model_of_a_spec_and_its_kernels(glactl, tmp_path):
    (tmp_path / "my.yaml").write_text(HYBRID)
    args = ["--seqlen", 32, "--mixers", "gla", "--width", 8, "--spec", "my.yaml", "--json"]
    done = glactl("profile", *args, "--parts", "layers,models", "--kernels")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    assert {(r["part"], r["name"]) for r in result["results"]} == {
        ("layer", "gsa 1"),
        ("layer", "mamba 2"),
        ("model", "my"),
    }
    assert [m["kind"] for m in result["models"]["my"]["mixer"]] == ["gsa", "mamba"]
    for row in result["results"]:
        names = [kernel["name"] for kernel in row["kernels"]]
        assert any("mm" in name for name in names), names
        assert all(kernel["seconds"] > 0 and kernel["calls"] > 0 for kernel in row["kernels"])


def test_a_preset(glactl):
    args = ["--preset", "tiny", "--seqlen", 16, "--parts", "models", "--phase", "decode", "--json"]
    done = glactl("profile", *args)
    assert done.exit_code == 0, done.output
    (row,) = json.loads(done.stdout)["results"]
    assert (row["name"], row["work"], row["T"]) == ("tiny", "decode", 16)


def test_a_baseline(glactl, tmp_path):
    args = ["--seqlen", 16, "--mixers", "gla", "--parts", "operators", *SMALL, "--quiet"]
    assert glactl("profile", *args, "--out", "first").exit_code == 0
    (before,) = (tmp_path / "first").glob("*/results.json")
    same = glactl("profile", "--baseline", before, "--fail-above", "100000%", "--json")
    assert same.exit_code == 0, same.output  # sizes are the baseline's
    result = json.loads(same.stdout)
    assert [row["failed"] for row in result["baseline"]["rows"]] == [False, False]
    assert result["settings"]["heads"] == 2
    report = json.loads(before.read_text())
    for row in report["results"]:
        row |= {name: row[name] / 1e6 for name in ("median", "p10", "p90")}
    before.write_text(json.dumps(report))
    slower = glactl("profile", "--baseline", before.parent)
    assert slower.exit_code == 1
    assert "error: 2 of 2 rows are over 5%: operator gla forward T=16, " in slower.stderr
    assert slower.stdout.count("regression") == 2
    report["device"] = "abacus"
    before.write_text(json.dumps(report))
    other = glactl("profile", "--baseline", before)
    assert other.exit_code == 2
    assert "has device 'abacus'; allowed: 'CPU, " in other.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--seqlen", "1k"], "error: seqlen is '1k'; allowed: lengths"),
        (
            ["--mixers", "glaa"],
            "error: mixers has 'glaa'; allowed: attention, gla, decay, gsa, linear, ",
        ),
        (["--mixers", ","], "error: mixers is empty; allowed: attention"),
        (["--dtype", "fp8"], "error: dtype is 'fp8'; allowed: fp32, bf16, fp16"),
        (["--tokens", "8"], "error: tokens is 8; allowed: at least the longest seqlen, 1024"),
        (["--spec", "gone.yaml"], "error: no spec at gone.yaml"),
        (["--device", "tpu"], "error: device 'tpu' is not known"),
        (["--parts", "layer"], "error: parts has 'layer'; allowed: operators, layers, models; did"),
        (["--phase", "test"], "error: phase has 'test'; allowed: train, prefill, decode"),
        (["--fail-above", "much"], "error: fail_above is 'much'; allowed: a share of 0 or more"),
        (["--baseline", "gone.json"], "error: no such file: gone.json"),
        (["--spec", "a.yaml", "--preset", "tiny"], "error: both a spec (a.yaml) and --preset tiny"),
        (["--heads", "0"], "Invalid value for '--heads'"),
    ],
)
def test_errors_are_one_line(glactl, args, message):
    done = glactl("profile", *args)
    assert done.exit_code == 2
    assert message in done.stderr
    assert done.stdout == ""


def measured(name, T, seconds):
    work = "forward+backward"
    return [Measured("operator", name, work, T, 1, seconds, 0, 0, 1, 0, 0, 0, 0, 0, "memory")]


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


def test_the_fastest_attention_counts_for_the_crossover():
    rows = measured("attention flash", 256, 2.0) + measured("attention cudnn", 256, 1.0)
    found = crossover(rows + measured("gla", 256, 0.25))["gla"]
    assert found["ratio"] == pytest.approx(4.0)


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


def a_case(part, items, **changes):
    spec = LMSpec(d_model=16, n_layers=2, mixer={"kind": "gla", "heads": 2}, vocab_size=19)
    shape = Shape(2, 32, 2, 8, 4, torch.float32)
    case = Case(part, "gla", tuple(items), shape, "cpu", RATES, 0.0, spec)
    return replace(case, **changes)


def test_what_ends_a_process_costs_one_row():
    """An inner length of 10^9 cannot be had; the lengths around it can."""
    items = [("forward", 32), ("forward", 10**9), ("forward", 64)]
    rows = list(profile_process.run(a_case("operator", items)))
    assert [type(row) for row in rows] == [Measured, Failed, Measured]
    assert rows[1].reason == "out of memory"
    assert [row.T for row in rows] == [32, 10**9, 64]


def test_an_error_is_a_failed_row():
    (row,) = profile_process.run(a_case("model", [("train", 8)], spec=LMSpec()))
    assert row.reason == "ValueError: vocab_size is not set; a model needs the number of its tokens"
    (late,) = profile_process.run(a_case("operator", [("forward", 8)]), limit=0.0)
    assert late.reason == "no result after 0 s"


def test_rows_that_are_not_right_end_the_command():
    (good,) = measured("gla", 8, 1.0)
    good = replace(good, error=1e-6, allowed=allowed_error(torch.float32))
    lost = Failed("operator", "gla", "forward", 8, 1, "out of memory")
    _judge([good], [lost])
    with pytest.raises(WrongResults, match=r"1 rows .*T=8: error 1\.0e-03"):
        _judge([replace(good, error=1e-3)], [])
    with pytest.raises(WrongResults, match="error nan"):
        _judge([replace(good, error=math.nan)], [])
    with pytest.raises(WrongResults, match="the process ended"):
        _judge([good], [replace(lost, reason="the process ended with exit code -11")])
    with pytest.raises(NoMemory, match="out of memory in all of 1 rows"):
        _judge([], [lost])


def test_decode_reads_weights_and_states():
    """GLA: weights but for the embedding, and the states twice; attention reads its past once."""
    case = a_case("model", [("decode", 32)])
    cost = lm_cost(case.spec, 32)
    weights = 4 * (cost.params - cost.params_embedding)
    assert make_call(case, "decode", 32).moved == weights + 2 * 2 * cost.state_bytes
    spec = LMSpec(d_model=16, n_layers=2, mixer="attention", vocab_size=19)
    cost = lm_cost(spec, 32)
    weights = 4 * (cost.params - cost.params_embedding)
    call = make_call(replace(case, spec=spec), "decode", 32)
    counters = 2 * 2 * 8  # of layers and rows, int64: read and written
    assert call.moved == weights + 2 * cost.state_bytes + counters


def test_a_wrong_backward_of_a_layer_and_of_training_is_seen(monkeypatch):
    items = [("forward+backward", 32)]
    assert make_call(a_case("layer", items), items[0][0], 32).error()[0] < 1e-5
    assert make_call(a_case("model", items), "train", 32).error()[0] < 1e-5
    from glactl.models.layers import RMSNorm

    right = RMSNorm.forward

    def wrong(self, x, *gate):  # a gradient of fp32 alone
        y = right(self, x, *gate)
        return y if x.dtype == torch.float64 else y.detach() + 0.9 * (y - y.detach())

    monkeypatch.setattr(RMSNorm, "forward", wrong)
    assert make_call(a_case("layer", items), items[0][0], 32).error()[0] > 1e-3
    assert make_call(a_case("model", items), "train", 32).error()[0] > 1e-3


def test_saved_bytes():
    w, x = torch.ones(3, 5, requires_grad=True), torch.ones(7, 3, requires_grad=True)
    assert saved_bytes(lambda: x @ w) == 4 * (21 + 15)
    assert saved_bytes(lambda: x @ w, [w]) == 4 * 21
    assert saved_bytes(lambda: (x @ w).exp(), [w]) == 4 * (21 + 35)  # exp keeps its result
    with torch.no_grad():
        assert saved_bytes(lambda: x @ w) == 0


def test_attention_by_kernel_and_fla(monkeypatch):
    gpu, bf16 = torch.device("cuda"), torch.bfloat16
    names = ["attention", "gla", "gsa"]
    assert operators_peers.measured(names, CPU, bf16, False) == names
    found = operators_peers.measured(names, gpu, bf16, False)
    assert found == ["attention flash", "attention cudnn", "gla", "gsa"]
    assert operators_peers.measured(names, gpu, torch.float32, False) == names
    with pytest.raises(operators_peers.NoFla, match="runs on a CUDA device alone"):
        operators_peers.measured(names, CPU, bf16, True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(operators_peers.NoFla, match="is not installed; pip install"):
        operators_peers.measured(names, gpu, bf16, True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    found = operators_peers.measured(names[1:], gpu, bf16, True)
    assert found == ["gla", "gla fla", "gsa", "gsa fla"]


def test_the_calls_of_fla_are_those_of_ours(monkeypatch):
    """Our reference stands in for fla's functions, with the arguments that fla's have."""
    stand_ins = {
        "gla": {"chunk_gla": lambda q, k, v, g: operators.gla_reference(q, k, v, gk=g)},
        "simple_gla": {
            "chunk_simple_gla": lambda q, k, v, g: operators.gla_reference(q, k, v, g=g)
        },
        "gsa": {
            "chunk_gsa": lambda q, k, v, s, g, scale: operators.gsa_reference(
                q, k, v, s, g, scale=scale
            )
        },
    }
    for name in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for name, functions in stand_ins.items():
        module = types.ModuleType(f"fla.ops.{name}")
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, f"fla.ops.{name}", module)
    for name in ("gla", "decay", "gsa"):
        peer = operators_peers.operator(f"{name} fla")
        found, _ = error(peer, Shape(1, 20, 2, 8, 4, torch.float64), CPU, 0)
        assert found < 1e-12
        shape = Shape(1, 20, 2, 8, 4, torch.float32)
        own = operators_peers.operator(name)
        assert peer.flops(shape, True) == own.flops(shape, True)
        assert peer.moved(shape, True) == own.moved(shape, True)


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
    seconds = iter([0.05])  # a first call that compiles
    compiled = timing(lambda: time.sleep(next(seconds, 0.002)), CPU, 0.05)
    assert compiled.repeats > 2
    assert compiled.p90 < 0.05


def test_peak_bytes_sees_what_a_call_holds():
    size = 64 * 2**20
    found = peak_bytes(lambda: torch.ones(size, dtype=torch.uint8), CPU)
    if found is None:
        pytest.skip("this kernel does not reset the peak of the resident set")
    assert found == pytest.approx(size, rel=0.1)
    kept = peak_bytes(lambda: None, CPU)
    assert kept is not None
    assert kept < size / 10


def test_a_cpu_s_rate_in_half_precision_is_at_least_that_of_fp32(monkeypatch):
    found = {torch.float32: 3.0, torch.bfloat16: 1.0}
    monkeypatch.setattr(measure, "_products", lambda dtype, device: found[dtype])
    assert measure.rates(CPU, torch.bfloat16).matmul == 3.0
    found[torch.bfloat16] = 5.0
    assert measure.rates(CPU, torch.bfloat16).matmul == 5.0


def test_rates_are_those_of_a_machine():
    found = measure.rates(CPU, torch.float32)
    # any machine of this century, and none of the next years
    assert 1e8 < found.copy < 1e14
    assert 1e8 < found.matmul < 1e16
    assert found.dtype == "float32"
    assert Rates(10.0, 100.0, "").floor(20.0, 100.0) == 2.0
    assert Rates(10.0, 100.0, "").floor(1.0, 100.0) == 1.0
    assert math.isfinite(found.floor(1, 1))
