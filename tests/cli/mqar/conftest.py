"""The command in an empty folder, with a tiny preset; and training that is only pretended."""

import pytest
from sweeping import TINY, json_copy
from typer.testing import CliRunner

from glactl.cli.main import app
from glactl.sweep.trial import Record


@pytest.fixture
def preset(monkeypatch):
    """Any preset is this one, TINY; a test may change it."""
    data = json_copy(TINY)
    monkeypatch.setattr("glactl.sweep.grid.read_preset", lambda name: json_copy(data))
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
        yield Record(1, 0.5, 1.5)
        if isinstance(found, BaseException):
            raise found
        valid = {"loss": 1.0, "accuracy": found}
        yield Record(2, 1.0, 1.5, curve=((2, found),), valid=valid, done=True)

    monkeypatch.setattr("glactl.sweep.run.run_trial", fake)
    monkeypatch.setattr("glactl.sweep.estimate.train", lambda *_, **__: iter(()))
    fake.calls, fake.accuracies = calls, accuracies
    return fake
