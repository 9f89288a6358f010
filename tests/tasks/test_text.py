import hashlib
import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from huggingface_hub import HfApi, constants

from glactl.tasks import DataUnavailable, load_task
from glactl.tasks.corpus import documents
from glactl.tasks.text import TextSpec
from glactl.tasks.tokenizer import ByteTokenizer

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
BOS, EOS = 256, 257


def write(path, texts):
    """A file of documents."""
    path.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return str(path)


@pytest.fixture
def texts():
    """200 documents of a few hundred bytes, some of them not ASCII."""
    rng = np.random.default_rng(0)
    words = ["red", "grün", "blue", "eins", "two", "三", "four", "🙂"]
    return [f"{i} " + " ".join(rng.choice(words, rng.integers(1, 60))) for i in range(200)]


@pytest.fixture
def source(tmp_path, texts):
    return write(tmp_path / "corpus.jsonl", texts)


def held_out(text):
    return hashlib.sha256(text.encode()).digest()[0] < 16


def framed(texts):
    """The stream of some documents in bytes."""
    return [t for text in texts for t in (BOS, *text.encode(), EOS)]


def joined(batches):
    """The tokens and targets of some batches, laid end to end."""
    batches = list(batches)
    tokens = torch.cat([b.tokens.flatten() for b in batches])
    return tokens.tolist(), torch.cat([b.targets.flatten() for b in batches]).tolist()


def test_validation_is_the_held_out_stream_in_order(source, texts):
    task = load_task(TextSpec(source=source, seq_len=32), 0)
    out = [t for t in texts if held_out(t)]
    assert 3 < len(out) < 30
    stream = framed(out)
    batches = list(task.valid_batches(3))
    tokens, targets = joined(batches)
    n = len(stream) - 1
    assert tokens[:n] == stream[:-1]
    assert targets[:n] == stream[1:]
    assert set(targets[n:]) <= {-100}
    assert len(targets) - n < 32
    for b in batches:
        assert b.n_bytes == ((b.targets >= 0) & (b.targets < 256)).sum()
    assert sum(b.n_bytes for b in batches) == sum(len(t.encode()) for t in out)
    assert {len(b.tokens) for b in batches[:-1]} == {3}


def test_training_is_every_other_document_once_an_epoch(source, texts):
    task = load_task(TextSpec(source=source, seq_len=32), 0)
    stream = framed(t for t in texts if not held_out(t))
    rows = [stream[i : i + 33] for i in range(0, len(stream) - 32, 32)]
    assert task.n_train == len(rows)
    first, second = task.train_batch(0, len(rows)), task.train_batch(1, len(rows))
    for batch in (first, second):
        whole = torch.cat([batch.tokens, batch.targets[:, -1:]], 1)
        assert sorted(whole.tolist()) == sorted(rows)
        assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])
        assert batch.tokens.dtype == batch.targets.dtype == torch.int64
    assert not torch.equal(first.tokens, second.tokens)


def test_a_batch_is_a_function_of_spec_seed_and_index(source):
    spec = TextSpec(source=source, seq_len=32)
    n = load_task(spec, 0).n_train
    whole = torch.cat([load_task(spec, 0).train_batch(i, n).tokens for i in range(2)])
    task = load_task(spec, 0)
    size = 7
    last = 2 * n // size - 1
    for index in (last, 0, n // size, last):  # n // size reaches into the second epoch
        rows = whole[size * index : size * index + size]
        assert torch.equal(task.train_batch(index, size).tokens, rows)
    assert not torch.equal(load_task(spec, 1).train_batch(0, n).tokens, whole[:n])


def test_the_split_does_not_depend_on_seed_order_or_number(source, texts, tmp_path):
    def valid(path, seed=0):
        return joined(load_task(TextSpec(source=path, seq_len=32), seed).valid_batches(4))

    assert valid(source, 1) == valid(source)
    more = [*texts, *(t for t in map(str, range(1000, 1100)) if not held_out(t))]
    assert valid(write(tmp_path / "more.jsonl", more)) == valid(source)
    copies = load_task(TextSpec(source=write(tmp_path / "twice.jsonl", texts * 2), seq_len=32), 0)
    out = [t for t in texts if held_out(t)]
    assert joined(copies.valid_batches(1))[0][: len(framed(out)) * 2 - 1] == framed(out * 2)[:-1]


def test_of_documents_none_of_which_is_held_out_the_least_hash_is(tmp_path):
    names = [t for t in map(str, range(100, 120)) if not held_out(t)][:6]
    task = load_task(TextSpec(source=write(tmp_path / "a.jsonl", names), seq_len=4), 0)
    least = min(names, key=lambda t: hashlib.sha256(t.encode()).digest())
    assert joined(task.valid_batches(1))[0][:4] == [BOS, *least.encode()]


def packed_by_hand(stream, starts, rows, T):
    """Bounds and targets of rows, token by token."""
    bounds, targets = {0}, []
    for i, r in enumerate(rows):
        for t in range(T):
            at = r * T + t
            if t == 0 or at in starts:
                bounds.add(i * T + t)
            beyond = at + 1 >= len(stream) or at + 1 in starts
            targets.append(-100 if beyond else stream[at + 1])
    return sorted(bounds | {len(rows) * T}), targets


@pytest.mark.parametrize("T", [1, 3, 4, 7, 64])
def test_packed_documents(T, source, texts):
    task = load_task(TextSpec(source=source, seq_len=T, packed=True), 0)
    for side, out in ((task.valid_batches(5), True), ([task.train_batch(2, 5)], False)):
        own = [t for t in texts if held_out(t) == out]
        stream = framed(own)
        ends = np.cumsum([len(t.encode()) + 2 for t in own]).tolist()
        starts = {0, *ends[:-1]}
        at = 0
        for batch in side:
            rows = range(at, at + len(batch.tokens)) if out else task._order.rows(2, 5)
            at += len(batch.tokens)
            bounds, targets = packed_by_hand(stream, starts, rows, T)
            assert batch.cu_seqlens.tolist() == bounds
            assert batch.cu_seqlens.dtype == torch.int32
            assert batch.targets.flatten().tolist() == targets
    total = sum(b.n_bytes for b in task.valid_batches(5))
    assert total == sum(len(t.encode()) for t in texts if held_out(t))


class Ends(ByteTokenizer):
    """Bytes with other tokens at a document's ends."""

    def __init__(self, bos, eos):
        self.bos_id, self.eos_id = bos, eos


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ((1, 2), [1, 65, 66, 2, 1, 67, 2]),
        ((3, 3), [3, 65, 66, 3, 67, 3]),
        ((None, 3), [3, 65, 66, 3, 67, 3]),
        ((3, None), [3, 65, 66, 3, 67, 3]),
        ((None, None), [65, 66, 67]),
    ],
)
@pytest.mark.parametrize("packed", [False, True])
def test_how_documents_are_joined(ends, packed, expected, monkeypatch):
    texts = ["x" * 9, "AB", "C", "y"]
    monkeypatch.setattr("glactl.tasks.text.documents", lambda *args: iter(texts))
    monkeypatch.setattr("glactl.tasks.text.load_tokenizer", lambda name: Ends(*ends))
    monkeypatch.setattr(
        "glactl.tasks.text._split", lambda texts: ((b"", t, t in ("AB", "C")) for t in texts)
    )
    (batch,) = load_task(TextSpec(seq_len=8, packed=packed), 0).valid_batches(1)
    n = len(expected) - 1
    assert batch.tokens[0, :n].tolist() == expected[:-1]
    targets = expected[1:]
    if packed and ends in ((1, 2), (None, None)):  # "C" begins where nothing is before it
        targets[expected.index(67) - 1 - (ends == (1, 2))] = -100
    assert batch.targets[0].tolist() == targets + [-100] * (8 - n)
    assert batch.n_bytes == sum(t in (65, 66, 67) for t in targets)


@pytest.mark.parametrize("name", ["gpt2", "mistral-v1"])
def test_every_byte_is_counted_whatever_the_tokenizer(name, source, texts):
    folder = SHARED / "tokenizers" / name
    if not folder.is_dir():
        pytest.skip("no sample tokenizers beside the repository")
    task = load_task(TextSpec(source=source, tokenizer=str(folder), seq_len=32), 0)
    total = sum(b.n_bytes for b in task.valid_batches(3))
    assert total == sum(len(t.encode()) for t in texts if held_out(t))


def test_floors_are_of_the_held_out_text(source, monkeypatch):
    floors = load_task(TextSpec(source=source), 0).floors()
    assert set(floors) == {"gzip -9", "bigram", "order-5 n-gram"}
    assert 0 < floors["order-5 n-gram"] < floors["bigram"] < 8
    monkeypatch.setattr("glactl.tasks.text.MAX_TEXT", 1000)
    assert set(load_task(TextSpec(source=source), 0).floors()) == {"gzip -9"}


def test_the_fingerprint_is_of_the_data_and_its_settings(source, texts, tmp_path):
    def fingerprint(**fields):
        return load_task(TextSpec(**{"source": source, "seq_len": 32} | fields), 0).fingerprint

    same = write(tmp_path / "elsewhere.jsonl", texts)
    assert fingerprint() == fingerprint(source=same)
    changed = write(tmp_path / "changed.jsonl", [*texts[:-1], texts[-1] + "!"])
    order = write(tmp_path / "order.jsonl", texts[::-1])
    other = [{"source": changed}, {"source": order}, {"seq_len": 33}, {"packed": True}]
    found = {fingerprint(), *(fingerprint(**fields) for fields in [*other, {"limit": 199}])}
    assert len(found) == 6
    assert {len(f) for f in found} == {64}


def test_the_embedded_corpus_begins_with_the_help_topics():
    read = list(documents("pydoc", 100))
    assert read == list(documents("pydoc", 100))
    assert any('The "assert" statement' in t for t in read)
    # behind them come modules: abc is among the first
    assert any("Abstract Base Classes (ABCs)" in t for t in read)


@pytest.mark.slow
def test_the_embedded_corpus_is_the_same_in_another_process_and_imports_nothing():
    read = list(documents("pydoc"))
    assert 400 < len(read) < 1000
    assert 1.5e6 < sum(len(t.encode()) for t in read) < 3e6
    code = """
import hashlib, sys
from glactl.tasks.corpus import documents
print(hashlib.sha256("|".join(documents("pydoc")).encode()).hexdigest())
print([m for m in ("this", "antigravity", "turtle", "tkinter") if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    expected = hashlib.sha256("|".join(read).encode()).hexdigest()
    assert done.stdout.split("\n") == [expected, "[]", ""]


def test_a_folder_is_all_its_files_in_order(tmp_path):
    (tmp_path / "b").mkdir()
    write(tmp_path / "b" / "one.jsonl", ["one", "", " \n", "two"])
    (tmp_path / "c.txt").write_text("three<|endoftext|>\nfour\n<|endoftext|>\n")
    table = pyarrow.table({"n": [1, 2], "text": ["five", "six"]})
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet")
    (tmp_path / "README.md").write_text("not text to train on")
    expected = ["one", "two", "three", "four", "five", "six"]
    assert list(documents(str(tmp_path))) == expected
    assert list(documents(str(tmp_path), 3)) == expected[:3]


@pytest.mark.parametrize(
    "text", ["word " * 999, "line\n" * 9999, "no-space" * 999, "日本語🙂" * 999]
)
def test_a_text_file_is_cut_without_loss(text, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(text)
    pieces = list(documents(str(path)))
    assert "".join(pieces) == text
    assert 10 <= len(pieces) <= 21
    assert max(len(p.encode()) for p in pieces) <= 2 * len(text.encode()) / 20 + 4
    if " " in text or "\n" in text:
        assert {p[-1] for p in pieces} <= {" ", "\n"}


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.jsonl", b"", "a.jsonl is empty"),
        ("a.txt", b"", "a.txt is empty"),
        ("a.txt", b" \n\n", "a.txt has no text"),
        ("a.csv", b"x", "a.csv ends in '.csv'; allowed: .txt, .jsonl, .parquet"),
        ("a", b"x", "a ends in ''; allowed: .txt, .jsonl, .parquet"),
        ("a.txt", b"fine\nna\xefve\n" * 99, r"a.txt:2: not UTF-8 text \(byte 7\)"),
        ("a.jsonl", b'{"text": "a"}\n\n{"txt": 1}', 'a.jsonl:3: no "text", or not a string'),
        ("a.jsonl", b'{"text": 1}', 'a.jsonl:1: no "text", or not a string'),
        ("a.jsonl", b"[]", 'a.jsonl:1: no "text", or not a string'),
        ("a.jsonl", b'{"text": "a"}\n{"text', "a.jsonl:2: not JSON: Unterminated string"),
        ("a.jsonl", b'{"text": "\xff"}', r"a.jsonl:1: not UTF-8 text \(byte 10 of the line\)"),
        ("a.jsonl", b'{"text": "\\ud800"}', 'a.jsonl:1: "text" has half a surrogate pair'),
        ("a.jsonl", b'{"text": "one"}', "a.jsonl has one document, which is held out for val"),
        (
            "a.jsonl",
            b'{"text": "one"}\n{"text": "two"}',
            "a.jsonl has 5 tokens to train on; one row of seq_len 256 needs 257",
        ),
        ("a.parquet", b"PAR1", "a.parquet is not a parquet file"),
    ],
)
def test_a_file_that_cannot_be_used(name, data, message, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        load_task(TextSpec(source=str(tmp_path / name)), 0)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_table_without_text(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["a"], "n": [1]}), path)
    with pytest.raises(ValueError, match=r"has no column 'text'; its columns: body, n$"):
        list(documents(str(path)))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None]}), path)
    with pytest.raises(ValueError, match=r"a.parquet: row 2 has no text in column 'text'"):
        list(documents(str(path)))


def test_a_source_that_is_not_there(tmp_path):
    write(tmp_path / "corpus.jsonl", ["a"])
    with pytest.raises(FileNotFoundError, match=r"no text at .*; did you mean corpus.jsonl\?"):
        load_task(TextSpec(source=str(tmp_path / "corpsu.jsonl")), 0)
    for absent in ("absent.txt", "./absent", "/absent", "a/b/c"):
        with pytest.raises(FileNotFoundError, match=f"no text at {absent}"):
            load_task(TextSpec(source=absent), 0)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty has no file that ends in .txt, .jsonl, .parquet"):
        load_task(TextSpec(source=str(tmp_path / "empty")), 0)
    with pytest.raises(ValueError, match="'wiki' is no file or folder here; for a data set of the"):
        load_task(TextSpec(source="wiki"), 0)


def test_a_hub_that_does_not_answer(monkeypatch):
    def silent(self, name, timeout):
        raise ConnectionError

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "dataset_info", silent)
    with pytest.raises(DataUnavailable) as caught:
        load_task(TextSpec(source="no-such-owner/none", limit=10), 0)
    assert str(caught.value) == (
        "data set no-such-owner/none is no file here, nor on the hub: the hub does not answer, "
        "and its cache lacks it"
    )


def test_a_data_set_of_the_hub(monkeypatch, texts):
    asked = []

    def load_dataset(name, config, split, streaming):
        asked.append((name, config, split, streaming))
        if config == "none":
            raise ValueError("no config 'none';\n there are: a, b")
        return ({"body" if config == "body" else "text": t} for t in texts)

    monkeypatch.setattr(HfApi, "dataset_info", lambda *args, **more: None)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(documents("owner/name:config", 150)) == texts[:150]
    assert list(documents("owner/name", 1)) == texts[:1]
    assert asked == [("owner/name", "config", "train", True), ("owner/name", None, "train", True)]
    with pytest.raises(ValueError, match=r"name:none: no config 'none'; there are: a, b$"):
        list(documents("owner/name:none", 1))
    with pytest.raises(ValueError, match=r"name:body has no field 'text'; its fields: body$"):
        list(documents("owner/name:body", 1))


@pytest.mark.parametrize("fields", [{"seq_len": 0}, {"limit": 0}, {"seqlen": 3}, {"packed": 1}])
def test_bad_settings(fields):
    with pytest.raises(ValueError, match="validation error for TextSpec"):
        TextSpec(**fields)


@pytest.mark.parametrize(("frame", "T"), [("both", 400), ("bos", 400), ("bos", 20)])
def test_rows_of_documents(source, texts, frame, T):
    """Each document from its frame on, cut behind T targets; with BOS alone the next one's, too."""
    spec = TextSpec(source=source, seq_len=T, rows="documents", frame=frame)
    task = load_task(spec, 0)
    end = EOS if frame == "both" else BOS
    for batches, out in ((task.valid_batches(3), True), ([task.train_batch(0, 150)], False)):
        wanted = [[BOS, *t.encode(), end] for t in texts if held_out(t) == out]
        seen = []
        for batch in batches:
            bounds = batch.cu_seqlens.tolist()
            assert batch.tokens.shape == batch.targets.shape == (1, bounds[-1])
            for a, b in pairwise(bounds):
                seen.append([*batch.tokens[0, a:b].tolist(), batch.targets[0, b - 1].item()])
                assert torch.equal(batch.tokens[0, a + 1 : b], batch.targets[0, a : b - 1])
            if out:
                assert batch.n_bytes == int((batch.targets < 256).sum())
        cut = [row[: T + 1] for row in wanted]
        if out:
            assert seen == cut
        else:
            assert len(seen) == 150
            assert all(row in cut for row in seen)


def test_held_out_documents_of_another_source(source, texts, tmp_path):
    other = ["one story", "another story", "a third"]
    held = write(tmp_path / "held.jsonl", other)
    task = load_task(TextSpec(source=source, valid=held, seq_len=8), 0)
    assert joined(task.valid_batches(2))[0][: len(framed(other)) - 1] == framed(other)[:-1]
    assert task.n_train == (len(framed(texts)) - 1) // 8
    swapped = load_task(TextSpec(source=held, valid=source, seq_len=8), 0)
    assert swapped.fingerprint != task.fingerprint
    assert load_task(TextSpec(source=source, seq_len=8), 0).fingerprint != task.fingerprint


def test_rows_of_documents_are_packed_already():
    with pytest.raises(ValueError, match="packed is true, but rows of documents"):
        TextSpec(packed=True, rows="documents")
