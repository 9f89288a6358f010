import json
import os
import platform
import re
import signal
import subprocess
import sys
import time
from importlib.metadata import version as version_of
from pathlib import Path

import pytest
from typer.testing import CliRunner

from glactl import __version__
from glactl.cli.main import app
from glactl.spec import RunSpec
from glactl.tasks import DataUnavailable

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def glactl(tmp_path, monkeypatch):
    """Run a command in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def glactl(*args):
        return CliRunner().invoke(app, [str(a) for a in args], prog_name="glactl")

    return glactl


@pytest.fixture
def spec(tiny_data, corpus, tmp_path):
    tiny_data["data"] |= {"source": str(corpus)}
    path = tmp_path / "spec.yaml"
    path.write_text(json.dumps(tiny_data))
    return path


def fails(result, code, message):
    """The command ended with `code` and this one line on stderr, and nothing on stdout."""
    assert result.exit_code == code, result.output
    assert result.stdout == ""
    assert re.fullmatch(f"error: {message}\n", result.stderr), result.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["trian"], "No such command 'trian'. Did you mean 'train'\\?"),
        (["train", "--plam"], r"No such option: --plam \(Possible options: .*--plan\)"),
        (["train", "--steps", "x"], "Invalid value for '--steps': .* valid integer.*"),
        (["train", "--steps", "0"], "Invalid value for '--steps': .*"),
        (["train", "a.yaml", "b.yaml"], r"Got unexpected extra argument.*"),
        (["train", "--preset"], "Option '--preset' requires an argument."),
        (["train", "absent.yaml"], "no spec at absent.yaml"),
        (
            ["train", "--preset", "huge"],
            "--preset is 'huge'; allowed: default, t2r_mistral_7b, tiny",
        ),
        (["train", "--preset", "tiny", "--resume"], "--preset tiny and --resume exclude .*"),
        (["train", "--set", "seed"], "--set seed: allowed: --set KEY=VALUE, .*"),
        (["train", "--name", "a b"], "--set name='a b': name is 'a b'; allowed: letters, .*"),
        (["train", "--device", "gpu"], "device 'gpu' is not known; allowed: cpu, cuda, .*"),
        (["train", "--resume"], "no run with a checkpoint in runs; make one: glactl train"),
        (["train", "--resume", "absent"], "absent is not a run folder"),
        (["train", "--set", "data.source=absent.txt"], ".*absent.txt.*"),
    ],
    ids=" ".join,
)
def test_bad_input_is_one_line_and_code_2(args, message, glactl):
    fails(glactl(*args), 2, message)
    assert not Path("runs").exists()


def test_an_absent_device(glactl):
    fails(glactl("train", "--device", "cuda:99"), 3, "device 'cuda:99' is not here: .*")


def test_data_that_cannot_be_reached(glactl, monkeypatch):
    def absent(*args):
        raise DataUnavailable("wiki could not be reached; is there a network?")

    monkeypatch.setattr("glactl.train.session.load_task", absent)
    fails(glactl("train"), 3, "wiki could not be reached.*")


def test_out_of_memory(glactl, spec, monkeypatch):
    def full(*args, **kwargs):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory\n  at x.cpp")

    monkeypatch.setattr("glactl.train.loss.Objective.forward", full)
    result = glactl("train", spec, "--quiet")
    assert result.exit_code == 4
    assert re.fullmatch(
        r"error: out of memory on cpu \(.* GiB\): largest are activations, about .* GiB with "
        r"micro-batches of 2 rows; train.accumulate 4 \(of 1 rows\) should fit",
        result.stderr.splitlines()[-1],
    )


def test_numerics(glactl, spec):
    result = glactl("train", spec, "--quiet", "--set", "optim.lr=1e38", "--set", "optim.clip=null")
    assert result.exit_code == 5
    last = result.stderr.splitlines()[-1]
    assert re.match("error: the loss or its gradient was not finite in 3 steps in a row", last)


@pytest.mark.parametrize(
    ("words", "expected"), [("glactl pro", "profile"), ("glactl profile --base", "--baseline")]
)
def test_completion_in_a_shell(words, expected):
    env = os.environ | {"_GLACTL_COMPLETE": "complete_bash", "COMP_WORDS": words}
    command = [Path(sys.executable).parent / "glactl"]
    env["COMP_CWORD"] = str(len(words.split()) - 1)
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.split() == [expected]


def test_version_and_no_command(glactl):
    version, python, packages, system = glactl("--version").stdout.splitlines()
    assert version == f"glactl {__version__}"
    assert python == f"Python {platform.python_version()}"
    assert f"torch {version_of('torch')}, " in packages
    assert system.startswith(platform.system())
    nothing = glactl()
    assert nothing.exit_code == 0
    assert "Commands:" in nothing.stdout


def test_every_command_is_there(glactl):
    for command in ("train", "mqar", "eval", "generate", "profile", "schema"):
        shown = glactl(command, "--help")
        assert shown.exit_code == 0
        assert f"Usage: glactl {command}" in shown.stdout


def test_schema(glactl):
    shown = glactl("schema")
    assert json.loads(shown.stdout) == RunSpec.model_json_schema()
    assert shown.stderr == ""


def test_train_prints_the_result_and_says_where_it_is(glactl, spec):
    shown = glactl("train", spec, "--device", "cpu")
    assert shown.exit_code == 0, shown.output
    (run,) = Path("runs").iterdir()
    lines = shown.stdout.splitlines()
    assert lines[0].split() == ["held-out", "text", "bits", "per", "byte"]
    rows = {line.rsplit(maxsplit=1)[0].strip() for line in lines[1:-2]}
    assert {"toy", "gzip -9"} <= rows
    assert re.fullmatch(
        r"loss \d\.\d{4}  ppl [\d.]+  accuracy [\d.]+  bpb [\d.]+  "
        r"steps 8  tokens 384  seconds [\d.]+",
        lines[-2],
    )
    assert lines[-1] == f"run {run}"
    progress = [line for line in shown.stderr.splitlines() if line.startswith("step")]
    assert re.fullmatch(r"step 8/8  loss [\d.]+  tokens/s [\d,]+  eta 0:00", progress[-1])
    assert "validation after step 4: loss" in shown.stderr
    assert f'glactl generate {run} --prompt "The "' in shown.stderr
    assert (run / "spec.yaml").read_text() == spec.read_text()


def test_train_json(glactl, spec):
    shown = glactl("train", spec, "--json", "--quiet", "--steps", "4", "--name", "other")
    events = [json.loads(line) for line in shown.stdout.splitlines()]
    assert [e["event"] for e in events] == ["run", "valid", "end"]
    assert events[-1]["step"] == 4
    assert events[-1]["valid"]["bpb"] > 0
    assert "gzip -9" in events[-1]["floors"]
    assert Path(events[-1]["path"]).name.startswith("other-")


def test_plan_computes_and_writes_nothing(glactl, spec):
    shown = glactl("train", spec, "--plan", "--set", "train.steps=1000")
    assert shown.exit_code == 0, shown.output
    assert not Path("runs").exists()
    lines = shown.stdout.splitlines()
    assert lines[0] == "toy: 2 layers of gla, d_model 16, on text"
    names = [line.split("  ")[1].strip() for line in lines[1:]]
    assert names == [
        "parameters",
        "state/sequence",
        "FLOPs/token",
        "bytes/token",
        "memory",
        "tokens/step",
        "steps",
        "time",
        "disk",
    ]
    assert "48 = 4 rows x 12 in 2 micro-batches" in shown.stdout
    assert "1,000   (48 k tokens" in shown.stdout


def test_plan_json_is_the_cost_model(glactl, spec, tiny_spec):
    from glactl.models.cost import lm_cost
    from glactl.train.loop import with_vocab

    numbers = json.loads(glactl("train", spec, "--plan", "--json").stdout)
    cost = lm_cost(with_vocab(tiny_spec, 259).model, 12)
    assert numbers["params"] == cost.params
    assert numbers["state_bytes"] == cost.state_bytes
    assert numbers["tokens"] == 8 * 4 * 12
    assert numbers["flops"] == cost.flops_token_train * 8 * 4 * 12
    memory = numbers["memory_bytes"]
    assert memory["weights"] == memory["gradients"] == 4 * cost.params
    assert memory["sum"] == sum(v for k, v in memory.items() if k != "sum")


def test_plan_of_mqar(glactl):
    shown = glactl("train", "--set", "data={kind: mqar}", "--plan", "--json")
    assert json.loads(shown.stdout)["tokens_step"] == 16 * 64


def test_resume_takes_the_newest_run_or_the_one_named(glactl, spec, monkeypatch):
    from glactl.train.loop import train

    def cut(*args, **kwargs):
        for step in train(*args, **kwargs):
            yield step
            if step.step == 5:
                os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr("glactl.train.session.train", cut)
        stopped = glactl("train", spec)
    (run,) = Path("runs").iterdir()
    assert stopped.exit_code == 6
    told = f"stopped after step 5, saved; resume: glactl train --resume {run}"
    assert stopped.stderr.splitlines()[-1] == told
    refused = glactl("train", "--resume", run, "--steps", "9")
    assert refused.exit_code == 2
    assert refused.stderr.splitlines()[-1] == (
        f"error: {run} cannot be resumed, it was made with other settings: train.steps 8 -> 9; "
        "start a new run instead"
    )
    resumed = glactl("train", "--resume")
    assert resumed.exit_code == 0, resumed.output
    assert "step 8/8" in resumed.stderr
    metrics = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in metrics] == list(range(1, 9))
    finished = glactl("train", "--resume", run)
    assert finished.exit_code == 2
    last = f"error: {run} is finished (step 8); nothing to resume"
    assert finished.stderr.splitlines()[-1] == last
    whole = glactl("train", spec)
    assert whole.stdout.splitlines()[:-2] == resumed.stdout.splitlines()[:-2]  # the same bits


def test_ctrl_c_of_the_real_command(spec, tmp_path):
    """A process that gets SIGINT while it trains saves and exits with 6."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [
        sys.executable,
        "-m",
        "glactl.cli",
        "train",
        str(spec),
        "--steps",
        "100000",
        "--json",
    ]
    process = subprocess.Popen(
        command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert json.loads(process.stdout.readline())["event"] == "run"
    assert json.loads(process.stdout.readline())["event"] == "valid"  # it is training
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 6, error
    assert re.match("stopped after step .* glactl train --resume runs/toy-", error.splitlines()[-1])
    assert time.monotonic() - began < 20


@pytest.mark.parametrize(
    ("wish", "found"),
    [({}, "5000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")],
    ids=str,
)
def test_threads_give_way_to_other_processes(wish, found):
    """It is said before torch, whose threads read it as they begin; the user's wish counts."""
    code = "import os, sys, glactl.cli; print(os.environ.get('GOMP_SPINCOUNT'))"
    code += "; print('torch' in sys.modules)"
    env = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    run = subprocess.run(
        [sys.executable, "-c", code], env=env | wish, capture_output=True, text=True, check=True
    )
    assert run.stdout.split() == [found, "False"]
