"""The revision of the data of lm-eval's tasks: pinned, read off the cache, or not known."""

from types import SimpleNamespace

import pytest
import yaml
from huggingface_hub import HfApi, constants

from glactl.tasks import DataUnavailable, hub, stock, stock_tasks
from glactl.tasks.pins import Pins

SHA = "0123456789abcdef" * 2 + "01234567"
OTHER = SHA[::-1]


def cached(*folders):
    """A data set whose files lie in these folders of a cache."""
    return SimpleNamespace(cache_files=[{"filename": f"/c/{f}/x.arrow"} for f in folders])


def task(folder=None, **dataset_kwargs):
    config = SimpleNamespace(dataset_kwargs=dataset_kwargs or None)
    return SimpleNamespace(
        config=config, dataset={"validation": cached(folder)} if folder else None
    )


def test_a_commit_is_read_off_the_cache_only_where_it_is_one():
    assert hub.loaded_commit(cached(SHA, SHA)) == SHA
    assert hub.loaded_commit(cached(SHA, OTHER)) is None
    assert hub.loaded_commit(cached("main")) is None
    assert hub.loaded_commit(cached()) is None
    assert hub.loaded_commit(object()) is None


def test_the_hub_is_asked_for_the_commit(monkeypatch):
    asked = []

    def info(self, name, *, revision, timeout):
        asked.append((name, revision))
        return SimpleNamespace(sha=SHA)

    monkeypatch.setattr(HfApi, "dataset_info", info)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    names = ["piqa", "swde", "ai2_arc"]  # a group has no data set of its own
    assert stock_tasks._commits(names, {"swde": "v2"}) == {"piqa": SHA, "swde": SHA}
    assert asked == [("baber/piqa", None), ("hazyresearch/based-swde-v2", "v2")]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert stock_tasks._commits(names, {}) == {}


def test_what_was_read_first_is_asked_for_again():
    pins = Pins()
    pins.keep("baber/piqa", SHA)
    names = ["piqa", "swde", "ai2_arc"]
    assert stock_tasks._asked(names, {}, pins) == {"piqa": SHA}
    assert stock_tasks._asked(names, {"piqa": "main", "swde": "v2"}, pins) == {
        "piqa": "main",
        "swde": "v2",
    }
    with pytest.raises(ValueError, match="ai2_arc is a group of tasks; with a revision name"):
        stock_tasks._asked(names, {"ai2_arc": "main"}, pins)


def test_a_pinned_commit_is_what_is_read(tmp_path):
    stock.write_tasks(["piqa", "swde", "sciq"], tmp_path, None, {"piqa": SHA, "swde": OTHER})
    read = {f.stem: f.read_text().split("class:")[0] for f in tmp_path.iterdir()}
    own = {name: yaml.safe_load(text) for name, text in read.items()}
    assert own["piqa"]["dataset_kwargs"] == {"revision": SHA}
    assert own["swde"]["dataset_kwargs"] == {"revision": OTHER}
    assert "dataset_kwargs" not in own["sciq"]


def test_the_revision_of_a_task():
    assert stock_tasks.data_revision("piqa", task(OTHER, revision=SHA), None) == SHA
    assert stock_tasks.data_revision("piqa", task(OTHER, revision="v2"), None) == OTHER
    assert stock_tasks.data_revision("piqa", task(SHA), None) == SHA
    assert stock_tasks.data_revision("piqa", task("main"), None) is None
    assert stock_tasks.data_revision("piqa", task(), None) is None
    local = stock_tasks.data_revision("piqa", task(), stock.SAMPLE)
    assert local.startswith("sha256:")
    assert local != stock_tasks.data_revision("nq_open", task(), stock.SAMPLE)


@pytest.fixture
def loads(monkeypatch):
    """Load piqa as if lm-eval had found its rows in this folder of the cache."""
    from lm_eval.tasks import TaskManager

    def done(folder, told, **options):
        written = {}

        def load(self, names):
            return {"tasks": {"piqa": task(folder, **written)}}

        def write(names, where, data, revisions):
            written.update({"revision": revisions["piqa"]} if revisions else {})

        monkeypatch.setattr(stock, "reach_data", lambda names: None)
        monkeypatch.setattr(stock, "write_tasks", write)
        monkeypatch.setattr(hub, "commit", lambda name, revision: told)
        monkeypatch.setattr(TaskManager, "__init__", lambda self, **kwargs: None)
        monkeypatch.setattr(TaskManager, "load", load)
        loaded = stock_tasks.load_tasks(["piqa"], None, **options)
        return stock_tasks.data_revision("piqa", loaded["tasks"]["piqa"], None)

    return done


def test_a_revision_is_kept_whatever_the_hub_has_then(loads, tmp_path):
    path = tmp_path / "new" / "revisions.json"
    assert loads(SHA, SHA, pins=Pins(path)) == SHA
    assert Pins(path).get("baber/piqa") == SHA
    assert loads(SHA, None, pins=Pins(path)) == SHA  # no hub: its cache has that commit
    with pytest.raises(DataUnavailable, match=f"piqa at {SHA}: .* its cache has {OTHER}"):
        loads(OTHER, None, pins=Pins(path))
    assert loads(OTHER, OTHER, pins=Pins(path), revisions={"piqa": "main"}) == OTHER
    assert Pins(path).get("baber/piqa") == SHA


def test_without_the_hub_a_revision_must_be_in_its_cache(loads):
    pins = Pins()
    assert loads(SHA, None, pins=pins) == SHA
    assert pins.get("baber/piqa") == SHA
    assert loads("main", None, pins=Pins()) is None  # not known: none is invented
    assert loads(SHA, None, revisions={"piqa": SHA}) == SHA
    for folder, asked, has in ((OTHER, SHA, OTHER), (SHA, "v2", SHA), ("x", SHA, "no commit")):
        with pytest.raises(DataUnavailable, match=f"piqa at {asked}: .* its cache has {has}"):
            loads(folder, None, revisions={"piqa": asked})


def test_pins_keep_commits_only_and_the_first(tmp_path):
    path = tmp_path / "revisions.json"
    pins = Pins(path)
    for commit in (None, "main", "sha256:0123456789abcdef"):
        pins.keep("a/b", commit)
    assert not path.exists()
    pins.keep("a/b", SHA)
    pins.keep("a/b", OTHER)
    pins.keep("c/d", OTHER)
    again = Pins(path)
    assert (again.get("a/b"), again.get("c/d"), again.get("e/f")) == (SHA, OTHER, None)
    assert [p.name for p in tmp_path.iterdir()] == ["revisions.json"]
    path.write_text("[1]")
    with pytest.raises(ValueError, match=r"revisions.json is not a JSON object .*; delete it"):
        Pins(path)
