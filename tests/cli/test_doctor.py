import json
import urllib.error
import urllib.request
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

from glactl import doctor
from glactl.cli.main import app
from glactl.doctor import Check, Unwell
from glactl.profile import operators

CPU = torch.device("cpu")


@pytest.fixture
def glactl(tmp_path, monkeypatch):
    """Run the command in an empty folder, without asking the network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return lambda *args: CliRunner().invoke(app, ["doctor", *args])


@pytest.fixture
def quick(monkeypatch):
    """Without reading the documentation of Python, which takes seconds."""
    monkeypatch.setattr(doctor, "data", lambda: Check("data", "pydoc"))


def test_the_table(glactl):
    done = glactl("--device", "cpu")
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["found", "status", "what", "that", "costs"]
    names = ["Python", "torch", "triton", "driver", "device", "kernel gla", "kernel decay"]
    names += ["kernel gsa", "kernel step", "packages", "transformers", "fla", "data", "hub"]
    names += ["disk", "memory"]
    assert [line[:12].strip() for line in lines[1:]] == names
    assert all(" ok" in line or " missing " in line for line in lines[1:])
    (hub,) = (line for line in lines if line.startswith("hub "))
    assert "HF_HUB_OFFLINE is set" in hub
    assert "cache alone" in hub


def test_json(glactl, quick):
    checks = json.loads(glactl("--device", "cpu", "--json").stdout)["checks"]
    assert {check["status"] for check in checks} <= {"ok", "missing"}
    assert all(bool(check["costs"]) == (check["status"] == "missing") for check in checks)


def test_a_kernel_that_is_wrong_ends_with_1(glactl, quick, monkeypatch):
    own = operators.OPERATORS[1]
    broken = operators.Operator("gla", own.inputs, lambda *x: 1.1 * own.call(*x), own.reference)
    monkeypatch.setattr(doctor, "OPERATORS", (broken, *operators.OPERATORS[1:]))
    done = glactl("--device", "cpu")
    assert done.exit_code == 1
    assert "error: kernel gla: chunked PyTorch form" in done.stderr
    assert "results are wrong here" in done.stderr


def test_a_kernel_that_does_not_run_ends_with_3(glactl, quick, monkeypatch):
    def refuse(*_):
        raise RuntimeError("no such instruction\nand a long trace")

    own = operators.OPERATORS[1]
    broken = operators.Operator("gla", own.inputs, refuse, own.reference)
    monkeypatch.setattr(doctor, "OPERATORS", (broken, *operators.OPERATORS[1:]))
    done = glactl("--device", "cpu")
    assert done.exit_code == 3
    assert "error: kernel gla: no such instruction (does not run here)" in done.stderr


def test_what_is_broken_in_the_environment_counts_first(monkeypatch):
    rows = [Check("a", "x", "broken", "y", 1), Check("b", "x", "broken", "y", 3)]
    monkeypatch.setattr(doctor, "checks", lambda _: rows)
    with pytest.raises(Unwell, match=r"a: x \(y\); b: x \(y\)") as caught:
        doctor.doctor_command(device="cpu")
    assert caught.value.exit_code == 3


def test_a_package_that_is_gone(monkeypatch):
    real = doctor.importlib.util.find_spec
    gone = ("lm_eval", "fla")
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name in gone else real(name)
    )
    first, *others = doctor.packages()
    assert (first.status, first.costs) == ("broken", "pip install lm_eval")
    assert "lm_eval" not in first.found
    assert {c.name: c.status for c in others}["fla"] == "missing"


@pytest.mark.parametrize(
    ("reply", "status", "found"),
    [
        (lambda *_, **__: _Reply(200), "ok", "answers (200)"),
        (urllib.error.HTTPError("u", 503, "busy", None, None), "ok", "answers (503)"),
        (urllib.error.URLError("no route"), "missing", "does not answer in 3 s"),
    ],
)
def test_the_hub(reply, status, found, monkeypatch):
    def ask(request, timeout):
        assert timeout == 3
        if isinstance(reply, Exception):
            raise reply
        return reply()

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(urllib.request, "urlopen", ask)
    check = doctor.hub()
    assert check.status == status
    assert found in check.found


class _Reply(SimpleNamespace):
    def __init__(self, status):
        super().__init__(status=status)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


def test_a_hub_that_never_answers_is_not_waited_for(monkeypatch):
    import threading

    forever = threading.Event()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(doctor, "PATIENCE", 0.05)
    late = lambda *_, **__: forever.wait(10) and _Reply(200)  # noqa: E731
    monkeypatch.setattr(urllib.request, "urlopen", late)
    assert doctor.hub().status == "missing"
    forever.set()


def test_little_room(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**30))
    assert doctor.disk().status == "missing"
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    assert doctor.disk().status == "broken"
    monkeypatch.setattr(doctor, "_ram", lambda: (2**30, 2**34))
    assert doctor.memory(CPU).status == "missing"
    monkeypatch.setattr(doctor, "_ram", lambda: (0, 0))
    assert doctor.memory(CPU) == Check("memory", "not known")
