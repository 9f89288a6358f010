"""The command in an empty folder, with a tiny preset; and training that is only pretended."""

import pytest
from sweeping import TINY, json_copy
from typer.testing import CliRunner

from glactl.cli import app
from glactl.train import Step


@pytest.fixture
def preset(monkeypatch):
    """Any preset is this one, TINY; a test may change it."""
    data = json_copy(TINY)
    monkeypatch.setattr("glactl.sweep_grid.read_preset", lambda name: json_copy(data))
    return data


@pytest.fixture
def glactl(preset, tmp_path, monkeypatch):
    """Run the command line in an empty folder."""
    monkeypatch.chdir(tmp_path)
    return lambda *args: CliRunner().invoke(app, ["mqar", *map(str, args), "--device", "cpu"])


@pytest.fixture
def trained(monkeypatch):
    """Replace training: a trial's accuracy is what `accuracies` has for its rate, or it raises."""
    calls, accuracies = [], {}

    def fake(spec, **_):
        calls.append((spec.model.d_model, spec.model.mixer.kind, spec.optim.lr, spec.seed))
        found = accuracies.get(spec.optim.lr, 0.5)
        yield step(1, None)
        if isinstance(found, BaseException):
            raise found
        yield step(2, {"loss": 1.0, "accuracy": found})

    def step(n, valid):
        return Step(n, 4, 64 * n, 1.5, 0.1, 1.0, 100.0, 1.0, valid=valid)

    monkeypatch.setattr("glactl.sweep.train", fake)
    monkeypatch.setattr("glactl.sweep_estimate.train", lambda *_, **__: iter(()))
    fake.calls, fake.accuracies = calls, accuracies
    return fake
