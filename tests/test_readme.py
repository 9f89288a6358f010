"""The README's commands are the program's: every line is parsed, and `.ci/run` runs the two."""

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from glactl.cli import app

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(?:sh|console)\n(.*?)^```", README, re.M | re.S)
LINES = [line.split("#")[0].strip() for block in BLOCKS for line in block.splitlines()]
COMMANDS = [line.removeprefix("$ ") for line in LINES if line.removeprefix("$ ")]
OURS = sorted({c for c in COMMANDS if c.startswith("glactl ")})


def test_the_commands_were_found():
    shown = {shlex.split(c)[1] for c in OURS}
    assert {"train", "mqar", "eval", "generate", "profile", "schema"} <= shown


@pytest.mark.parametrize("line", OURS)
def test_a_command_of_the_readme_is_understood(line):
    _, name, *args = shlex.split(line)
    commands = get_command(app).commands
    commands[name].make_context(name, args)  # parses and checks, and runs nothing


@pytest.mark.parametrize("target", ["demo", "test"])
def test_the_two_commands_exist_and_ci_runs_them(target):
    assert f"make {target}" in COMMANDS
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)
    assert re.search(rf"^make {target}$", (ROOT / ".ci" / "run").read_text(), re.M)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_a_link_of_the_readme_leads_somewhere(path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize("code", re.findall(r"^```python\n(.*?)^```", README, re.M | re.S))
def test_a_python_example_of_the_readme_runs(code):
    names = {}
    exec(code, names)
    assert names["state"].shape == (1, 4, 64, 64)
