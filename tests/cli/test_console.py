import json
import os
import pty
import re

import pytest
import typer

from glactl import console
from glactl.device import DeviceUnavailable, pick_device
from glactl.tasks import DataUnavailable


def test_a_table_is_aligned_numbers_to_the_right(capsys):
    console.table(["name", "value"], [("a", 1.23456), ("long name", 1234567), ("c", None)], "title")
    assert capsys.readouterr().out.splitlines() == [
        "title",
        "name           value",
        "a              1.235",
        "long name  1,234,567",
        "c                  -",
    ]


def test_a_result_is_one_line_of_strict_json(capsys):
    console.result({"a": float("nan"), "b": [1, float("inf")], "c": 0.5})
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    assert json.loads(out, parse_constant=pytest.fail) == {"a": None, "b": [1, None], "c": 0.5}


class OwnError(Exception):
    exit_code = 1


@pytest.mark.parametrize(
    ("raised", "code", "message"),
    [
        (ValueError("bad value"), 2, "error: bad value"),
        (FileNotFoundError("no spec at x"), 2, "error: no spec at x"),
        (FileNotFoundError(2, "No such file", "data.txt"), 2, "error: no such file: data.txt"),
        (DataUnavailable("no network"), 3, "error: no network"),
        (PermissionError(13, "Permission denied", "runs"), 3, "Permission denied: 'runs'"),
        (ModuleNotFoundError("No module", name="pyarrow"), 3, "pip install pyarrow"),
        (MemoryError(), 4, "error: out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate 9 bytes\nmore"), 4, "batch_size"),
        (FloatingPointError("not finite"), 5, "error: not finite"),
        (OwnError("a check failed"), 1, "error: a check failed"),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, Exception) else None,
)
def test_errors_are_one_line_and_a_code(raised, code, message, capsys):
    with pytest.raises(typer.Exit) as exit, console.errors():
        raise raised
    shown = capsys.readouterr()
    assert exit.value.exit_code == code
    assert message in shown.err
    assert shown.err.count("\n") == 1
    assert shown.out == ""


@pytest.mark.parametrize(
    "raised", [KeyError("x"), RuntimeError("x"), ModuleNotFoundError("x", name="glactl.x")]
)
def test_a_fault_of_the_program_keeps_its_trace(raised):
    with pytest.raises(type(raised)), console.errors():
        raise raised


def test_the_trace_can_be_asked_for(monkeypatch):
    monkeypatch.setenv("GLACTL_TRACEBACK", "1")
    with pytest.raises(ValueError, match="bad"), console.errors():
        raise ValueError("bad")


def test_progress_is_plain_lines_where_there_is_no_terminal(capsys, monkeypatch):
    monkeypatch.setattr(console, "PLAIN_EVERY", 1e9)
    with console.progress(4, "step", done=1) as advance:
        for _ in range(3):
            advance(loss=2.5)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines() == ["step 4/4  loss 2.5  eta 0:00"]  # the last one always


def test_progress_can_be_quiet(capsys):
    with console.progress(1, "step", quiet=True) as advance:
        advance(loss=1.0)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("no_color", [False, True])
def test_on_a_terminal_there_is_a_bar_and_no_color_is_kept(no_color, monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    reader, writer = pty.openpty()
    with os.fdopen(writer, "w") as terminal:
        monkeypatch.setattr("sys.stderr", terminal)
        with console.progress(2, "step") as advance:
            advance(loss=1.5)
            console.note("a note")
            advance(loss=1.25)
        console.error("bad")
        terminal.flush()
        shown = ""
        while "bad" not in shown:  # a terminal hands over what it has so far
            shown += os.read(reader, 1 << 16).decode(errors="replace")
    os.close(reader)
    assert "2/2" in shown
    assert re.search(r"[\r\n](\x1b\[2K)?a note\r?\n", shown)  # a line of its own
    assert "loss 1.25" in shown
    colours = re.findall(r"\x1b\[[0-9;]*3[0-9][0-9;]*m", shown)
    assert bool(colours) != no_color


def test_a_live_table_on_a_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    reader, writer = pty.openpty()
    with os.fdopen(writer, "w") as terminal:
        monkeypatch.setattr("sys.stderr", terminal)
        with console.live(["mixer", "accuracy"]) as show:
            show([["gla", 0.5], ["[b]", None]], "2 to go")
            console.note("a note")
        console.error("bad")
        terminal.flush()
        shown = ""
        while "bad" not in shown:
            shown += os.read(reader, 1 << 16).decode(errors="replace")
    os.close(reader)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    assert re.search(r"mixer +accuracy *\r?\ngla +0\.5 *\r?\n\[b\] +- *\r?\n2 to go", plain)
    assert re.search(r"[\r\n]a note\r?\n", plain)


@pytest.mark.parametrize(
    ("every", "quiet", "lines"), [(1e9, False, []), (0, False, ["a", "b"]), (0, True, [])]
)
def test_a_live_table_elsewhere_is_its_line(every, quiet, lines, capsys, monkeypatch):
    monkeypatch.setattr(console, "PLAIN_EVERY", every)
    with console.live(["mixer"], quiet) as show:
        show([["gla"]], "a")
        show([["gsa"]], "b")
    shown = capsys.readouterr()
    assert (shown.out, shown.err.splitlines()) == ("", lines)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (61.4, "1:01"), (3599.6, "1:00:00"), (7325, "2:02:05")]
)
def test_clock(seconds, text):
    assert console.clock(seconds) == text


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cpux", "mps"])
def test_an_unknown_device_is_bad_input(name):
    with pytest.raises(ValueError, match=f"device '{name}' is not known; allowed: cpu, cuda"):
        pick_device(name)


def test_an_absent_device_is_the_environments_fault():
    with pytest.raises(DeviceUnavailable, match=r"device 'cuda:99' is not here: .* --device cpu"):
        pick_device("cuda:99")


def test_a_gpu_without_a_number_is_any(monkeypatch):
    """Which several processes, and sweeps on all GPUs, need."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert [pick_device(name).index for name in (None, "cuda", "cuda:0", "cuda:01")] == [
        None, None, 0, 1,
    ]  # fmt: skip


def test_the_device_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("GLACTL_DEVICE", "cpu")
    assert pick_device().type == "cpu"
    monkeypatch.setenv("GLACTL_DEVICE", "tpu")
    with pytest.raises(ValueError, match="device 'tpu' is not known"):
        pick_device()
