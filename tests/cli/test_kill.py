"""A run killed at random moments ends as one that was left alone; see benchmarks/kill.py."""

import importlib.util
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kill.py"


@pytest.mark.slow
def test_nothing_is_lost_to_kills(tmp_path):
    spec = importlib.util.spec_from_file_location("kill", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    found = script.kill_test(tmp_path, kills=3, steps=90, seed=1)
    assert found["kills"] == 3
    assert found["inside_saves"] >= 1
    assert found["losses_equal"]
    assert found["weights_equal"]
    assert found["most_steps_lost"] < 3 * script.SAVE_EVERY  # steps go on while one is written
