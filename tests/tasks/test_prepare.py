import json
import signal
import subprocess
import sys
import time
from errno import ENOSPC
from hashlib import sha256
from pathlib import Path

import datasets
import numpy as np
import pytest

from glactl.tasks import prepare as module
from glactl.tasks import prepare_shard
from glactl.tasks.errors import DataUnavailable, Interrupted, NoSpace
from glactl.tasks.prepare import prepare
from glactl.tasks.prepare_shard import Recipe
from glactl.tasks.shards import Prepared

KIB = 1 / 1024  # of a MiB


@pytest.fixture
def source(tmp_path):
    """400 documents of up to 600 bytes, about 120 KB, some not ASCII."""
    rng = np.random.default_rng(0)
    words = ["red", "grün", "blue", "eins", "two", "三", "four", "🙂"]
    texts = [f"{i} " + " ".join(rng.choice(words, rng.integers(1, 120))) for i in range(400)]
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return str(path)


@pytest.fixture
def recipe(source):
    return Recipe(source, shard_mib=16 * KIB)


def files(folder):
    """All files of a folder and their bytes, but for where it is read from."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def made(recipe, out, jobs=1):
    """Prepare; the last progress."""
    return list(prepare(recipe, out, jobs))[-1]


@pytest.fixture
def whole(recipe, tmp_path):
    """What an undisturbed prepare makes."""
    made(recipe, tmp_path / "whole")
    return files(tmp_path / "whole")


def test_the_manifest_counts_and_is_held_by_check(recipe, tmp_path):
    done = made(recipe, tmp_path / "out")
    folder = Prepared(tmp_path / "out")
    splits = folder.manifest["splits"]
    assert done.documents == 400 == sum(s["documents"] for s in splits.values())
    assert done.tokens == done.bytes + 2 * 400 == sum(s["tokens"] for s in splits.values())
    assert done.shards == len(splits["train"]["shards"]) > 4
    assert done.kept == 0
    sizes = [p.stat().st_size for p in (tmp_path / "out" / "shards").iterdir()]
    assert folder.check() == sum(sizes)
    assert not list((tmp_path / "out").rglob("*.part"))


def test_a_finished_folder_is_left_alone(recipe, tmp_path):
    first = made(recipe, tmp_path / "out")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}
    again = made(recipe, tmp_path / "out")
    assert (again.tokens, again.kept) == (first.tokens, first.shards)
    assert before == {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}


def test_several_processes_make_the_same_bytes(recipe, whole, tmp_path):
    assert made(recipe, tmp_path / "out", jobs=2).kept == 0
    assert files(tmp_path / "out") == whole


def failing(monkeypatch, name, error, times):
    """Raise `error` at the times-th call of a function that prepare calls."""
    real, calls = getattr(prepare_shard, name), []

    def call(*args):
        calls.append(args)
        if len(calls) == times:
            raise error
        return real(*args)

    monkeypatch.setattr(prepare_shard, name, call)


def test_a_full_disk_is_one_line_and_loses_nothing(recipe, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    failing(monkeypatch, "write_shard", OSError(ENOSPC, "No space left on device"), 6)
    with pytest.raises(NoSpace) as caught:
        made(recipe, out)
    finished = len(list((out / "shards").glob("*.json")))
    assert finished >= 2
    assert str(caught.value) == (
        f"no space left on the disk of {out}; {out} keeps {finished} finished shards, and the same "
        "command goes on"
    )
    assert caught.value.exit_code == 3
    with pytest.raises(ValueError, match=r"out is not finished; the same `glactl data prepare`"):
        Prepared(out)
    assert made(recipe, out).kept == finished
    assert files(out) == whole


def test_a_disk_that_is_full_in_the_middle_of_a_file(recipe, whole, tmp_path, monkeypatch):
    """The real write fails, behind a part of the data: no file is left, half of it neither."""
    out, left = tmp_path / "out", [30_000]
    real = Path.open

    def short(self, mode="r", *args, **more):
        f = real(self, mode, *args, **more)
        if mode == "wb":
            write = f.write

            def limited(data):
                n = min(len(data), left[0])
                left[0] -= n
                write(data[:n])
                if n < len(data):
                    raise OSError(ENOSPC, "No space left on device")
                return n

            return _Wrapped(f, limited)
        return f

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", short)
        with pytest.raises(NoSpace):
            made(recipe, out)
    assert not list(out.rglob("*.part"))
    made(recipe, out)
    assert files(out) == whole


class _Wrapped:
    def __init__(self, file, write):
        self._file, self.write = file, write

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._file.close()

    def __getattr__(self, name):
        return getattr(self._file, name)


def test_an_interrupted_one_goes_on(recipe, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        failing(patch, "write_shard", KeyboardInterrupt(), 5)
        with pytest.raises(Interrupted, match=r"stopped; .* keeps \d finished shards, and the sam"):
            made(recipe, out)
    assert made(recipe, out).kept >= 2
    assert files(out) == whole


KILLED = """
import sys
from pathlib import Path
from glactl.tasks.prepare import prepare
from glactl.tasks.prepare_shard import Recipe
if __name__ == "__main__":
    for done in prepare(Recipe(sys.argv[1], shard_mib=4 / 1024), Path(sys.argv[2]), 2):
        print(done.shards, flush=True)
"""


@pytest.mark.slow
def test_kills_lose_at_most_the_shards_at_hand(source, tmp_path):
    """kill -9 of the process that reads, at some shard; its processes end with it."""
    recipe = Recipe(source, shard_mib=4 * KIB)
    made(recipe, tmp_path / "whole")
    script, out = tmp_path / "killed.py", tmp_path / "out"
    script.write_text(KILLED)
    seen = 0
    for more in (1, 5):
        run = [sys.executable, str(script), source, str(out)]
        with subprocess.Popen(run, stdout=subprocess.PIPE, text=True) as process:
            while (n := int(process.stdout.readline())) < seen + more:
                pass
            process.send_signal(signal.SIGKILL)
        kept = len(list((out / "shards").glob("*.json")))
        assert kept >= n
        seen = kept
    time.sleep(1)
    kept = len(list((out / "shards").glob("*.json")))
    time.sleep(1)  # a process that outlived its parent would make more
    assert kept == len(list((out / "shards").glob("*.json")))
    assert not (out / "manifest.json").exists()
    assert made(recipe, out, 2).kept == kept
    assert files(out) == files(tmp_path / "whole")


def test_a_killed_process_is_one_line(recipe, tmp_path, monkeypatch):
    from concurrent.futures.process import BrokenProcessPool

    def broken(*args):
        raise BrokenProcessPool

    monkeypatch.setattr(module, "_records", broken)
    with pytest.raises(OSError, match=r"a process was killed; .* keeps 0 finished.*fewer --jobs$"):
        made(recipe, tmp_path / "out")


def test_a_source_that_changed_is_told(recipe, source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        failing(patch, "write_shard", KeyboardInterrupt(), 5)
        with pytest.raises(Interrupted):
            made(recipe, out)
    text = Path(source).read_text()
    Path(source).write_text(text.replace("red", "rad", 1))
    with pytest.raises(ValueError, match=r"the text of shard 0 is not what it was when .*out was"):
        made(recipe, out)


def test_other_settings_are_told(recipe, source, tmp_path):
    out = tmp_path / "out"
    made(recipe, out)
    with pytest.raises(
        ValueError, match=r"out was prepared with other settings: valid 0.0625 -> 0.1"
    ):
        made(Recipe(source, shard_mib=16 * KIB, valid=0.1), out)
    with pytest.raises(
        ValueError, match=r"corpus.jsonl -> pydoc, .*; prepare into another folder$"
    ):
        made(Recipe("pydoc"), out)


@pytest.mark.parametrize("limit", [None, 250])
def test_a_data_set_of_the_hub_goes_on_without_being_read_again(
    limit, source, tmp_path, monkeypatch
):
    """A stream of the `datasets` library, as from the hub, over the same file; one that counts."""
    read = []

    def stream(name, config, split, streaming):
        found = datasets.load_dataset_("json", data_files=[source], split=split, streaming=True)
        return found.map(lambda row: read.append(row["text"]) or row)

    monkeypatch.setattr(datasets, "load_dataset_", datasets.load_dataset, raising=False)
    monkeypatch.setattr(datasets, "load_dataset", stream)
    monkeypatch.setattr("glactl.tasks.hub.reach", lambda kind, name: None)
    recipe = Recipe("owner/name", shard_mib=16 * KIB, limit=limit)
    made(recipe, tmp_path / "whole")
    n = len(read)
    assert n == (limit or 400)
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        failing(patch, "write_shard", KeyboardInterrupt(), 6)
        with pytest.raises(Interrupted):
            made(recipe, out)
    read.clear()
    finished = len(list((out / "shards").glob("*.json")))
    assert made(recipe, out).kept == finished >= 2
    assert len(read) < n - 50
    assert files(out) == files(tmp_path / "whole")


def test_two_at_once(recipe, tmp_path):
    first = prepare(recipe, tmp_path / "out", 1)
    next(first)
    with pytest.raises(ValueError, match="out is being prepared by another process"):
        made(recipe, tmp_path / "out")
    assert list(first)[-1].documents == 400


def test_what_cannot_be_read_leaves_no_folder(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for recipe, error, message in [
        (Recipe(source + "x"), FileNotFoundError, "did you mean corpus.jsonl?"),
        (Recipe("no-such-owner/none"), DataUnavailable, "is no file here, nor on the hub: the hub"),
        (Recipe(source, tokenizer="./none"), FileNotFoundError, "no tokenizer at ./none"),
    ]:
        with pytest.raises(error) as caught:
            made(recipe, out)
        assert message in str(caught.value)
        assert not out.exists()
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"out holds other things; prepare into an empty or new"):
        made(Recipe(source), out)
    assert files(out) == {"notes.txt": b"mine"}


def test_of_few_documents_one_is_held_out(tmp_path):
    """As of text that is read at once: see test_text.py."""
    texts = [t for t in map(str, range(100, 120)) if sha256(t.encode()).digest()[0] >= 16]
    path = tmp_path / "few.jsonl"
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    made(Recipe(str(path)), tmp_path / "out")
    valid = Prepared(tmp_path / "out").valid
    least = min(texts, key=lambda t: sha256(t.encode()).digest())
    assert valid.read(0, 99).tolist() == [256, *least.encode(), 257]
    path.write_text(json.dumps({"text": "alone"}))
    with pytest.raises(
        ValueError, match=r"of 1 documents none is for train at --valid 0.0625; more"
    ):
        made(Recipe(str(path)), tmp_path / "alone")


def test_a_split_without_documents(source, tmp_path):
    with pytest.raises(ValueError, match=r"of 400 documents none is for valid at --valid 1e-09; m"):
        made(Recipe(source, valid=1e-9, shard_mib=16 * KIB), tmp_path / "a")
    made(Recipe(source, valid=0.0), tmp_path / "b")
    assert Prepared(tmp_path / "b").valid.length == 0
    for valid in (-0.1, 1.0, float("nan")):
        with pytest.raises(ValueError, match=r"valid is .*; allowed: a share from 0 to below 1"):
            Recipe(source, valid=valid)
    with pytest.raises(ValueError, match="shard size is 0 MiB; allowed: more than 0"):
        Recipe(source, shard_mib=0)
