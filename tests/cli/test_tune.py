"""`glactl profile --tune`: what the search believes, what it writes, and the trial of a candidate.

The device is a function from tiles to a trial, but for the tests of the trial itself.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

pytest.importorskip("triton")

from glactl.cli.main import app
from glactl.kernels import gla, gsa, triton_gla, tuned
from glactl.profile import tune, tune_trial
from glactl.profile.tune import TuneFailed, in_a_process, search, wrong
from glactl.profile.tune_trial import Trial, Work

WORK = Work("key", 128, 256, 0, 4, 4, "bfloat16", 2048, 8, "cuda:0")
RULE = triton_gla.tiles(128, 256, torch.bfloat16)
RIGHT = {"mild o x1": [1e-3, 1.0, 4096], "mild dg x9": [2e-3, 1.0, 4096]}


@pytest.fixture
def glactl(tmp_path, monkeypatch):
    """Run the command line in an empty folder, with a table of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GLACTL_TILES", str(tmp_path / "tiles.json"))
    return lambda *args: CliRunner().invoke(app, [str(a) for a in args])


class Machine:
    """A device on which `speeds` says how the time changes by (kernel, field, value)."""

    def __init__(self, speeds, wrong=(), crash=(), key=(128, 256, 0, 1)):
        self.speeds, self.wrong, self.crash, self.key = speeds, wrong, crash, list(key)
        self.asked = []

    def __call__(self, work, key, tiles):
        assert key is not None or tiles == {}  # tiles without a key would be the rule's
        self.asked.append(tiles)
        changes = {(k, f, v) for k, values in tiles.items() for f, v in values.items()}
        if changes & set(self.crash):
            return Trial(refused="its process ended with -6: illegal memory access")
        errors = {n: list(e) for n, e in RIGHT.items()}
        if changes & set(self.wrong):
            errors["mild dg x9"][0] = 0.5
        seconds = dict.fromkeys(work.cases, 1e-3)
        for change in changes:
            for case, factor in self.speeds.get(change, {}).items():
                seconds[case] *= factor
        return Trial(self.key, errors, seconds)


def both(factor):
    return {"mild": factor, "strong": factor}


def found_by(machine, work=WORK):
    return search(work, machine, lambda n: None)


def test_the_search_finds_what_is_faster():
    machine = Machine(
        {
            ("sweep", "warps", 8): both(0.9),
            ("sweep", "warps", 16): both(0.8),
            ("sweep", "V", 128): both(0.95),
            ("back", "stages", 4): both(0.7),
        }
    )
    found = found_by(machine)
    assert found.tiles == {"sweep": {"warps": 16, "V": 128}, "back": {"stages": 4}}
    assert [(s.kernel, s.field, s.rule, s.found) for s in found.steps] == [
        ("sweep", "warps", RULE.sweep.warps, 16),
        ("sweep", "V", RULE.sweep.V, 128),
        ("back", "stages", RULE.back.stages, 4),
    ]
    assert found.steps[1].before == pytest.approx(0.8e-3)  # on top of what was found before it
    assert found.before == pytest.approx(both(1e-3))
    assert found.after == pytest.approx(both(0.8 * 0.95 * 0.7 * 1e-3))
    assert found.refused == []


def test_every_candidate_is_one_the_table_may_hold_and_none_comes_twice():
    machine = Machine({})
    key = found_by(machine).key
    tried = [t for t in machine.asked if t]
    assert len({json.dumps(t) for t in tried}) == len(tried)
    for tiles in tried:
        assert tuned.changed("key", key, RULE, tiles) != RULE
    fields = {(k, f) for t in tried for k, values in t.items() for f in values}
    assert ("gradients_exact", "warps") in fields
    assert ("sweep", "K") not in fields


def test_a_wrong_candidate_is_refused_though_it_is_fastest():
    speeds = {("sweep", "warps", 8): both(0.9), ("sweep", "warps", 16): both(0.1)}
    found = found_by(Machine(speeds, wrong=[("sweep", "warps", 16)]))
    assert found.tiles == {"sweep": {"warps": 8}}
    ((kernel, name, value, reason),) = found.refused
    assert (kernel, name, value) == ("sweep", "warps", 16)
    # twice the rule's own error and two roundings, 2^-7 each
    assert reason == "mild dg x9: rms error 5.00e-01 > 1.96e-02 allowed"


def test_a_candidate_that_crashes_is_refused():
    speeds = {("back", "stages", 4): both(0.9)}
    found = found_by(Machine(speeds, crash=[("back", "stages", 3)]))
    assert found.tiles == {"back": {"stages": 4}}
    assert found.refused == [
        ("back", "stages", 3, "its process ended with -6: illegal memory access")
    ]


def test_less_than_two_percent_is_nothing():
    found = found_by(Machine({("sweep", "warps", 8): both(0.985)}))
    assert found.tiles == {}
    assert found.steps == []


def test_kernels_of_strong_gates_are_timed_with_them():
    speeds = {
        ("prepare_exact", "warps", 8): {"mild": 1.01, "strong": 0.5},
        ("sweep", "warps", 8): {"mild": 1.0, "strong": 0.5},
    }
    assert found_by(Machine(speeds)).tiles == {"prepare_exact": {"warps": 8}}


def test_what_slows_another_case_is_dropped_in_the_end():
    found = found_by(Machine({("prepare_exact", "warps", 8): {"mild": 1.1, "strong": 0.5}}))
    assert found.tiles == {}
    assert [s.kernel for s in found.steps] == ["prepare_exact"]


@pytest.mark.parametrize(
    ("trial", "message"),
    [
        (Trial(refused="no room"), "the rule's tiles do not run: no room"),
        (
            Trial([128, 256, 0, 1], {"o": [float("nan"), 1.0, 64]}, both(1.0)),
            "the rule's tiles are wrong: o: rms error nan",
        ),
    ],
    ids=["refused", "wrong"],
)
def test_a_rule_that_does_not_run(trial, message):
    with pytest.raises(TuneFailed, match=f"engine key, 4 heads of K 128, V 256.*: {message}"):
        search(WORK, lambda *_: trial, lambda n: None)
    assert TuneFailed.exit_code == 1


def test_an_error_that_is_missing_or_not_a_number_is_wrong():
    right = Trial(errors=RIGHT)
    assert wrong(right, right, "bfloat16") is None
    assert "nan" in wrong(Trial(errors={}), right, "bfloat16")
    nan = Trial(errors=RIGHT | {"mild o x1": [float("nan"), 1.0, 64]})
    assert wrong(nan, right, "bfloat16").startswith("mild o x1")
    # fp32 has no roundings of bf16
    double = Trial(errors={"o": [2.1e-6, 1.0, 64]})
    assert wrong(double, Trial(errors={"o": [1e-6, 1.0, 64]}), "float32") is None
    assert wrong(double, Trial(errors={"o": [0.9e-6, 1.0, 64]}), "float32") is not None
    # the errors of two numbers are two draws
    assert wrong(double, Trial(errors={"o": [0.2e-6, 1.0, 2]}), "float32") is None
    assert wrong(double, Trial(errors={"o": [0.1e-6, 1.0, 2]}), "float32") is not None


def test_the_command_writes_and_prints(glactl, tmp_path, monkeypatch):
    place = {"device": "GPU 9000", "triton": "3.6.0"}
    monkeypatch.setattr(tuned, "place", lambda device: place)
    monkeypatch.setattr(tune, "pick_device", lambda name: torch.device("cuda", 0))
    speeds = {("sweep", "warps", 8): {"mild": 0.9}, ("walk", "warps", 8): {"mild": 1.0}}
    machines = {
        "key": Machine(speeds, crash=[("back", "warps", 16)], key=(128, 128, 0, 1)),
        "slots": Machine(speeds, key=(128, 128, 64, 1)),
    }
    monkeypatch.setattr(
        tune, "in_a_process", lambda work, key, tiles: machines[work.engine](work, key, tiles)
    )
    args = ["profile", "--tune", "--mixers", "gla,gsa", "--seqlen", 2048]
    done = glactl(*args)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0] == "engine key, 4 heads of K 128, V 128, bfloat16, 8 x 2048 tokens"
    assert lines[1].split() == ["rule", "found", "ms", "before", "ms", "after"]
    assert lines[2].split() == ["sweep.warps", "4", "8", "1", "0.9"]
    assert lines[3].split() == ["fwd+bwd,", "mild", "-", "-", "1", "0.9"]
    assert lines[5].split() == ["refused", "value", "reason"]
    assert lines[6].split()[:2] == ["back.warps", "16"]
    assert lines[7].startswith("engine slots, 4 heads of K 128, V 128, 64 slots, bfloat16")
    last = done.stderr.splitlines()[-1]
    assert last == f"wrote {tmp_path / 'tiles.json'}: 1 of 2 shapes have tiles of their own"
    own = {"engine": "key", "K": 128, "V": 128, "M": 0, "R": 1, "dtype": "bfloat16"}
    assert tuned.read(tmp_path / "tiles.json") == [place | own | {"tiles": {"sweep": {"warps": 8}}}]
    result = json.loads(glactl(*args, "--json", "--quiet").stdout)
    assert result["entries"] == tuned.read(tmp_path / "tiles.json")
    assert [s["work"]["engine"] for s in result["searches"]] == ["key", "slots"]


def test_nothing_faster_writes_nothing(glactl, tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "pick_device", lambda name: torch.device("cuda", 0))
    monkeypatch.setattr(tune, "in_a_process", Machine({}, key=(64, 64, 0, 1)))
    done = glactl("profile", "--tune", "--mixers", "gla", "--width", 64)
    assert done.exit_code == 0, done.output
    table = tmp_path / "tiles.json"
    last = done.stderr.splitlines()[-1]
    assert last == f"{table} is as it was: nothing is faster than the rule by 2 %"
    assert tuned.read(table) == []


@pytest.mark.parametrize(
    ("mixer", "shapes"),
    [
        ("{kind: gla, heads: 2, kv_heads: 1}", [("key", 16, 32, 0, 2, 1)]),
        ("{kind: gla, heads: 2, gate: fixed}", [("scalar", 16, 32, 0, 2, 2)]),
        ("[hgrn2, attention]", [("key", 32, 32, 0, 2, 2)]),
        ("[{kind: gsa, heads: 2, slots: 16}, retnet]", None),
        ("{kind: abc, heads: 2, slots: 16}", [("slots", 16, 32, 16, 2, 2)]),
    ],
)
def test_the_shapes_of_a_spec(tmp_path, mixer, shapes):
    file = tmp_path / "a.yaml"
    hgrn2 = mixer.replace("hgrn2", "{kind: hgrn2, expand_ratio: 32}")
    file.write_text(f"model: {{d_model: 64, n_layers: 4, mixer: {hgrn2}}}")
    found = tune._of_spec(file)
    if shapes is None:
        assert found[0] == ("slots", 32, 32, 16, 2, 2)
        assert [s[0] for s in found] == ["slots", "scalar"]
    else:
        assert found == shapes


def test_no_cuda_device_is_one_line_and_code_3(glactl):
    done = glactl("profile", "--tune", "--device", "cpu")
    assert done.exit_code == 3
    assert done.stdout == ""
    assert done.stderr == "error: --tune is of the kernels of a CUDA device; this is cpu\n"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--seqlen", "512,1024"], "seqlen is '512,1024'; allowed with --tune: one length"),
        (["--mixers", "attention"], "mixers has 'attention'; allowed with --tune: gla, decay, gsa"),
        (["--mixers", ","], "mixers has ''; allowed with --tune: gla, decay, gsa"),
        (["--dtype", "fp8"], "dtype is 'fp8'; allowed: fp32, bf16, fp16"),
        (["--spec", "gone.yaml"], "no spec at gone.yaml"),
        (["--spec", "a.yaml"], "a.yaml has no mixer with Triton kernels to tune"),
        (["--spec", "a.yaml", "--mixers", "gla"], "--spec and --mixers exclude each other with"),
    ],
)
def test_errors_are_one_line(glactl, tmp_path, args, message):
    (tmp_path / "a.yaml").write_text("model: {mixer: attention}")
    done = glactl("profile", "--tune", *args)
    assert done.exit_code == 2
    assert done.stderr.startswith(f"error: {message}")
    assert done.stderr.count("\n") == 1


def test_a_bad_table_is_found_before_the_search(glactl, tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "pick_device", lambda name: torch.device("cuda", 0))
    (tmp_path / "tiles.json").write_text("{}")
    done = glactl("profile", "--tune")
    assert done.exit_code == 2
    assert "tiles.json is no table of tiles" in done.stderr
    (tmp_path / "tiles.json").unlink()
    (tmp_path / "file").touch()
    monkeypatch.setenv("GLACTL_TILES", str(tmp_path / "file" / "tiles.json"))
    assert glactl("profile", "--tune").exit_code == 3


def test_what_was_found_is_kept_when_a_later_search_fails(glactl, tmp_path, monkeypatch):
    monkeypatch.setattr(tuned, "place", lambda device: {"device": "GPU 9000", "triton": "3.6.0"})
    monkeypatch.setattr(tune, "pick_device", lambda name: torch.device("cuda", 0))
    machine = Machine({("sweep", "warps", 8): both(0.9)}, key=(128, 128, 0, 1))

    def run(work, key, tiles):
        return machine(work, key, tiles) if work.engine == "key" else Trial(refused="no room")

    monkeypatch.setattr(tune, "in_a_process", run)
    done = glactl("profile", "--tune", "--quiet")
    assert done.exit_code == 1
    assert done.stderr.startswith("error: engine scalar, 4 heads of K 128, V 128, bfloat16, 16 x")
    assert done.stderr.endswith("the rule's tiles do not run: no room\n")
    assert [e["engine"] for e in tuned.read(tmp_path / "tiles.json")] == ["key"]


def test_a_process_that_dies_is_a_refusal(tmp_path, monkeypatch):
    script = tmp_path / "dies"
    script.write_text("#!/bin/sh\necho CUDA error: an illegal memory access >&2\nkill -6 $$\n")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(script))
    found = in_a_process(WORK, None, {})
    assert found.refused.startswith("its process ended with -6: ")
    script.write_text("#!/bin/sh\nsleep 60\n")
    monkeypatch.setattr(tune, "LIMIT", 0.1)
    assert in_a_process(WORK, None, {}).refused == "not done in 0 s"


def test_the_process_of_a_trial(monkeypatch):
    """The real one, which here can only say what it lacks; and the table that it was given."""
    found = in_a_process(replace(WORK, device="cpu"), None, {})
    assert found.refused is not None
    assert "Error: " in found.refused
    monkeypatch.setattr(tuned, "place", lambda device: {"device": "GPU 9000", "triton": "3.6.0"})
    seen = {}

    def run(command, env, **_):
        seen["table"] = tuned.read(Path(env["GLACTL_TILES"]))
        raise tune.subprocess.TimeoutExpired(command, 1.0)

    monkeypatch.setattr(tune.subprocess, "run", run)
    key = tuned.Key(128, 256, 0, 1, torch.bfloat16)
    in_a_process(WORK, key, {"sweep": {"warps": 8}})
    assert [e["tiles"] for e in seen["table"]] == [{"sweep": {"warps": 8}}]


SMALL = {
    "key": Work("key", 8, 4, 0, 4, 2, "float32", 64, 1, "cpu"),
    "scalar": Work("scalar", 8, 4, 0, 2, 2, "float32", 64, 1, "cpu"),
    "slots": Work("slots", 4, 8, 4, 2, 1, "float32", 64, 1, "cpu"),
}


@pytest.fixture
def on_a_cpu(monkeypatch):
    """Verify the chunked engine on the CPU, at a length that takes no seconds."""
    monkeypatch.setattr(tune_trial, "T_VERIFIED", 70)
    monkeypatch.setattr(tune_trial, "FULL", 12)
    monkeypatch.setattr(tune_trial, "gla", lambda *x, backend, **o: gla(*x, **o))
    monkeypatch.setattr(tune_trial, "gsa", lambda *x, backend, **o: gsa(*x, **o))


@pytest.mark.parametrize("engine", SMALL)
def test_verification_of_a_right_engine(engine, on_a_cpu):
    work = SMALL[engine]
    errors = tune_trial.verify(work, torch.device("cpu"))
    names = {name.split()[1] for name in errors}
    states = {"dSk", "dSv"} if engine == "slots" else {"dS"}
    assert names >= {"o", "final", "dq", "dk", "dv", "dg"} | states
    copies = {name.rpartition("x")[2] for name in errors}
    assert len(copies) == 2
    assert {name.split()[0] for name in errors} == set(work.cases)
    for name, (error, size, numbers) in errors.items():
        assert error <= 1e-4 * max(size, 1.0), name
        assert size > 0, name
        assert (numbers == 2) == name.startswith("fixed dg"), name


def test_verification_sees_a_wrong_gradient(on_a_cpu, monkeypatch):
    def off(q, k, v, backend, **o):
        return gla(q, k.detach() + 0.99 * (k - k.detach()), v, **o)

    right = tune_trial.verify(SMALL["key"], torch.device("cpu"))
    monkeypatch.setattr(tune_trial, "gla", off)
    found = tune_trial.verify(SMALL["key"], torch.device("cpu"))
    reason = wrong(Trial(errors=found), Trial(errors=right), "float32")
    assert reason is not None
    assert reason.startswith("mild dk x1: ")


def test_bf16_inputs_of_a_trial_are_the_definitions_too(on_a_cpu):
    """Truth has the same rounded inputs: what is left is the error of bf16 results."""
    errors = tune_trial.verify(replace(SMALL["key"], dtype="bfloat16"), torch.device("cpu"))
    for name in ("o", "dq", "dk", "dv"):
        error, size, _ = errors[f"mild {name} x1"]
        assert 0 < error < 0.004 * size, name  # half an ulp of 2^-8
    error, size, _ = errors["mild dg x1"]
    assert error < 1e-3 * size
