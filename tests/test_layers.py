"""Imports point one way, and a command loads only what it needs; read from import statements."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ["kernels", "models", "tasks"]  # each may import those before it, and glactl all of them


def modules() -> dict[str, Path]:
    """The name of every module of the package and its file."""
    found = {}
    for top in ["glactl", *LAYERS]:
        for file in sorted((ROOT / top).rglob("*.py")):
            parts = file.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts if parts[0] == "glactl" else ("glactl", *parts))
            if top != "glactl" or parts[1] not in LAYERS:  # those are the links to the others
                found[name.removesuffix(".__init__")] = file
    return found


def imports(name: str, file: Path) -> Iterator[str]:
    """Every module that `file` imports, wherever in it; `from a import b` gives a and a.b."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} imports relatively in line {node.lineno}"
            assert node.module is not None
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


MODULES = modules()
IMPORTS = {name: set(imports(name, file)) for name, file in MODULES.items()}


def layer(name: str) -> int | None:
    """The place of a module of ours in the order of layers; None for foreign ones."""
    parts = name.split(".")
    if parts[0] != "glactl":
        return None
    return LAYERS.index(parts[1]) if parts[1:2] and parts[1] in LAYERS else len(LAYERS)


def test_the_tree_was_found():
    some = {"glactl.cli.main", "glactl.train.loop", "glactl.models.lm", "glactl.tasks"}
    assert some <= set(MODULES)


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_one_way(name):
    own = layer(name)
    for imported in IMPORTS[name]:
        assert imported.split(".")[0] not in LAYERS, f"{name}: write glactl.{imported}"
        if own < len(LAYERS) and layer(imported) is not None:
            assert layer(imported) <= own, f"{name} imports {imported}"
            assert imported != "glactl", f"{name} imports the top of the package"


def reached(start: str) -> set[str]:
    """All modules of ours that `start` imports, directly or not."""
    todo, seen = [start], set()
    while todo:
        name = todo.pop()
        if name in MODULES and name not in seen:
            seen.add(name)
            todo += IMPORTS[name]
    return seen


@pytest.mark.parametrize("part", ["train", "sweep", "generate", "profile"])
def test_transformers_is_not_needed(part):
    parts = {name for name in MODULES if name.startswith(f"glactl.{part}.")}
    used = set().union(*map(reached, parts))
    assert parts
    assert parts <= used
    for name in used:
        assert not any(i.split(".")[0] == "transformers" for i in IMPORTS[name]), name


def test_nobody_imports_click():
    assert not [n for n, found in IMPORTS.items() if any(i.split(".")[0] == "click" for i in found)]


def test_help_loads_neither_torch_nor_pydantic():
    code = """
import sys
from glactl.cli.main import app
try:
    app(["--help"])
except SystemExit as e:
    assert e.code == 0, e.code
print([m for m in ("torch", "numpy", "pydantic", "rich", "transformers") if m in sys.modules])
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "profile" in done.stdout
