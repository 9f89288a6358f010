"""The commands of docs/ are the program's, its sessions run, and its worked example works."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from glactl.cli.main import app

ROOT = Path(__file__).resolve().parent.parent
DOCS = {path.stem: path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("docs/*.md"))}
BLOCK = re.compile(r"(?:<!-- (?P<what>.*?) -->\n)?```(?P<kind>\w*)\n(?P<body>.*?)^```", re.M | re.S)
# what stands above a session that is run, and the codes that its commands may end with
RUNS = {
    "runs in the tests": {0},
    "fails in the tests": {2},
    "ends with 0 or 1 in the tests": {0, 1},
}
PAGES = {"export": "import"}  # a command -> the page that it shares
ENVIRONMENT = {
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    "OMP_NUM_THREADS": "1",
}


def commands(page):
    """(command, the codes it may end with; None: it is not run) of every line to type."""
    for block in BLOCK.finditer(DOCS[page]):
        lines = block["body"].splitlines()
        if block["kind"] == "sh":
            yield from ((line.split("#")[0].strip(), None) for line in lines if line.strip())
        elif block["kind"] == "console":
            codes = RUNS.get(block["what"])
            yield from ((line[2:], codes) for line in lines if line.startswith("$ "))


ALL = sorted({(page, line) for page in DOCS for line, _ in commands(page) if "glactl" in line})
SESSIONS = [page for page in DOCS if any(codes for _, codes in commands(page))]


def test_every_command_has_a_page():
    assert {PAGES.get(name, name) for name in get_command(app).commands} <= DOCS.keys()
    assert set(PAGES.values()) <= DOCS.keys()
    for page in DOCS:
        if page != "README":
            assert f"({page}.md)" in DOCS["README"]


@pytest.mark.parametrize(("page", "line"), ALL)
def test_a_command_is_understood(page, line):
    words = shlex.split(re.split(r" > | 2>", line)[0])
    if words[0] != "glactl":
        pytest.skip("makes a file")
    assert not re.search(r"[|;&]", line), "one command a line"
    if words[1].startswith("--"):
        get_command(app).make_context("glactl", words[1:], resilient_parsing=True)
        return
    command, words = get_command(app).commands[words[1]], words[2:]
    while hasattr(command, "commands"):
        command, words = command.commands[words[0]], words[1:]
    command.make_context(command.name, words)  # parses and checks, and runs nothing


@pytest.mark.parametrize(
    ("page", "path"),
    sorted(
        {(p, path) for p, text in DOCS.items() for path in re.findall(r"\]\(([^)#:]+)\)", text)}
    ),
)
def test_a_link_leads_somewhere(page, path):
    assert (ROOT / "docs" / path).exists()


def test_paths_are_a_reader_s():
    for page, text in DOCS.items():
        assert not re.search(r"/(tmp|work|root)/", text), page


def test_the_scripts_that_tables_come_from_exist():
    scripts = set(re.findall(r"benchmarks/\w+\.py", DOCS["reproduce"]))
    assert len(scripts) >= 7
    assert all((ROOT / script).exists() for script in scripts)


@pytest.mark.slow
@pytest.mark.parametrize("page", SESSIONS)
def test_a_session_runs(page, tmp_path):
    env = os.environ | ENVIRONMENT | {"HOME": str(tmp_path), "GLACTL_DEVICE": "cpu"}
    for line, codes in commands(page):
        if codes is None:
            continue
        done = subprocess.run(
            ["bash", "-c", line], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=120
        )
        assert done.returncode in codes, f"{line}\n{done.stderr[-1500:]}"
        assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_the_mixer_of_the_worked_example(tmp_path):
    """The file and the two lines that the page has, put into a copy of the tree."""
    for part in ("kernels", "models", "tasks", "glactl", "tests", "pyproject.toml"):
        if (ROOT / part).is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / part, tmp_path / part, symlinks=True, ignore=ignore)
        else:
            shutil.copy(ROOT / part, tmp_path / part)
    union = tmp_path / "models" / "mixers" / "__init__.py"
    done = set()
    for block in BLOCK.finditer(DOCS["add-a-mixer"]):
        what, _, at = (block["what"] or "").partition(": ")
        if what == "file":
            (tmp_path / at).write_text(block["body"])
        elif what == "add before":
            text = union.read_text()
            assert text.count(f"\n{at.rstrip()}") == 1
            here = text.index(f"\n{at.rstrip()}") + 1
            union.write_text(text[:here] + block["body"] + text[here:])
        done.add(what)
    assert {"file", "add before"} <= done
    env = os.environ | ENVIRONMENT | {"PYTHONPATH": str(tmp_path), "GLACTL_DEVICE": "cpu"}
    train = "-m glactl.cli train --preset tiny --set model.mixer=average --steps 5"
    suite = (
        "-m pytest -q -p no:cacheprovider tests/models/test_contract.py tests/models/test_cost.py"
    )
    for line in (f"{train} --plan", train, f"{suite} -k average"):
        found = subprocess.run(
            [sys.executable, *line.split()], cwd=tmp_path, env=env, capture_output=True, text=True
        )
        assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-2000:]
    assert re.search(r"\n\d\d+ passed", found.stdout), found.stdout
