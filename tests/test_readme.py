"""The README's commands are the program's: every line is parsed, and `.ci/run` runs the two."""

import json
import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command

from glactl.cli.main import app
from glactl.models.cost import lm_cost
from glactl.spec import load

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
    _, name, *args = shlex.split(line.split(" > ")[0])
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


PARITY = ROOT / "benchmarks" / "results" / "parity_h100.json"
CHECKS = ("whole", "whole, chunked", "whole, reference", "packed", "stepped")
CELLS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in README.splitlines()
    if re.match(r"\| `\w+` \| \[", line)
]
MIXERS = {cells[0].strip("`"): cells for cells in CELLS}


@pytest.mark.parametrize("mixer", MIXERS)
def test_the_parameters_and_the_state_of_a_mixer(mixer):
    spec = load(ROOT / "specs" / f"{mixer}_1.3b.yaml")
    cost = lm_cost(spec.model, 2048)
    assert MIXERS[mixer][3] == f"{cost.params / 1e9:.3f} B"
    assert MIXERS[mixer][4].split(" after")[0] == f"{cost.state_bytes / 2**20:.0f} MiB"


@pytest.mark.parametrize("mixer", MIXERS)
def test_the_difference_of_a_mixer_is_the_largest_measured(mixer):
    shown = "-"
    if PARITY.exists() and "fla" in MIXERS[mixer][6]:
        rows = [r for r in json.loads(PARITY.read_text())["results"] if r.get("mixer") == mixer]
        shown = f"{max(row[check] for row in rows for check in CHECKS if check in row):.1e}"
    assert MIXERS[mixer][7] == shown
