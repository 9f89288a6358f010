import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from glactl.tasks import batch_hash, load_task
from glactl.tasks.prepare import prepare
from glactl.tasks.prepare_shard import Recipe
from glactl.tasks.sharded import ShardsSpec
from glactl.tasks.shards import BLOCK, Damaged, Prepared
from glactl.tasks.text import TextSpec

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
KIB = 1 / 1024  # of a MiB
T = 48


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Two files of 160 documents of up to 600 bytes, some not ASCII."""
    rng = np.random.default_rng(0)
    words = ["red", "grün", "blue", "eins", "two", "三", "four", "🙂"]
    paths = []
    for name in "ab":
        texts = [
            f"{name}{i} " + " ".join(rng.choice(words, rng.integers(1, 120))) for i in range(160)
        ]
        paths.append(tmp_path_factory.mktemp("text") / f"{name}.jsonl")
        paths[-1].write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return paths


@pytest.fixture(scope="module")
def made(sources, tmp_path_factory):
    """Prepared folders of a source, made once for each recipe."""
    found = {}

    def make(i=0, **fields):
        key = (i, *sorted(fields.items()))
        if key not in found:
            found[key] = tmp_path_factory.mktemp("data") / "out"
            recipe = Recipe(str(sources[i]), **{"shard_mib": 8 * KIB} | fields)
            assert list(prepare(recipe, found[key], 1))[-1].shards > (fields == {})
        return found[key]

    return make


@pytest.fixture
def copy(made, tmp_path):
    """A prepared folder to damage."""
    return Path(shutil.copytree(made(), tmp_path / "copy"))


def same(a, b):
    assert torch.equal(a.tokens, b.tokens)
    assert torch.equal(a.targets, b.targets)
    assert a.n_bytes == b.n_bytes
    assert (a.cu_seqlens is None) == (b.cu_seqlens is None)
    if a.cu_seqlens is not None:
        assert torch.equal(a.cu_seqlens, b.cu_seqlens)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("frame", ["both", "bos"])
@pytest.mark.parametrize("shard", [8 * KIB, 1 * KIB, 64.0])
def test_rows_are_those_of_the_text_itself(made, sources, packed, frame, shard):
    """Held out, in order; and in training the same rows, in an order of their own."""
    folder = made(frame=frame, shard_mib=shard)
    prepared = load_task(ShardsSpec(path=str(folder), seq_len=T, packed=packed), 0)
    text = load_task(TextSpec(source=str(sources[0]), seq_len=T, packed=packed, frame=frame), 0)
    assert prepared.vocab_size == text.vocab_size
    assert prepared.n_train == text.n_train > 500
    for a, b in zip(prepared.valid_batches(7), text.valid_batches(7), strict=True):
        same(a, b)

    def epoch(task):
        batch = task.train_batch(0, task.n_train)
        return torch.cat([batch.tokens, batch.targets], 1).tolist()

    a, b = epoch(prepared), epoch(text)
    assert sorted(a) == sorted(b)
    assert a != b


@pytest.mark.parametrize("name", ["gpt2", "mistral-v1"])
def test_with_a_tokenizer_of_many_tokens(made, sources, name):
    folder = SHARED / "tokenizers" / name
    if not folder.is_dir():
        pytest.skip("no sample tokenizers beside the repository")
    out = made(tokenizer=str(folder))
    assert Prepared(out).manifest["dtype"] == "uint16"
    prepared = load_task(ShardsSpec(path=str(out), seq_len=T), 0)
    text = TextSpec(source=str(sources[0]), seq_len=T, packed=True, tokenizer=str(folder))
    for a, b in zip(prepared.valid_batches(5), load_task(text, 0).valid_batches(5), strict=True):
        same(a, b)
    assert prepared.tokenizer.encode("blue") == load_task(text, 0).tokenizer.encode("blue")


def test_wide_vocabularies_take_four_bytes(tmp_path, sources, monkeypatch):
    monkeypatch.setattr("glactl.tasks.tokenizer.ByteTokenizer.vocab_size", 70_000)
    monkeypatch.setattr("glactl.tasks.tokenizer.ByteTokenizer.bos_id", 65_536 + 256)
    list(prepare(Recipe(str(sources[0])), tmp_path / "out", 1))
    prepared = Prepared(tmp_path / "out")
    assert prepared.manifest["dtype"] == "uint32"
    read = prepared.train.read(0, prepared.train.length)
    assert (read == 65_536 + 256).sum() == prepared.manifest["splits"]["train"]["documents"]


def mixed(made, **fields):
    sources = [{"path": str(made(0)), "weight": 3}, {"path": str(made(1)), "weight": 1}]
    return ShardsSpec.model_validate({"kind": "shards", "sources": sources, "seq_len": T} | fields)


def test_a_global_batch_is_a_function_of_spec_seed_and_step(made):
    """Whoever asks, in whatever parts: ranks take parts of equal size by their number."""
    spec, rows = mixed(made), 24
    whole = [load_task(spec, 5).train_batch(step, rows) for step in range(3)]
    hashes = [batch_hash([b]) for b in whole]
    assert len(set(hashes)) == 3
    for step in (2, 0, 1):
        for parts in (1, 2, 3, 8, 24):  # of ranks times micro-batches
            tasks = [load_task(spec, 5) for _ in range(min(parts, 3))]  # a process has its own
            batches = [
                tasks[i % len(tasks)].train_batch(step * parts + i, rows // parts)
                for i in reversed(range(parts))
            ][::-1]
            assert batch_hash(batches) == hashes[step]
            assert torch.equal(torch.cat([b.tokens for b in batches]), whole[step].tokens)
    assert batch_hash([load_task(spec, 6).train_batch(0, rows)]) != hashes[0]


def test_a_hash_is_of_tokens_targets_and_bounds(made):
    spec = mixed(made)
    batch = load_task(spec, 0).train_batch(0, 8)
    other = load_task(mixed(made, packed=False), 0).train_batch(0, 8)
    assert torch.equal(batch.tokens, other.tokens)
    changed = [other]
    for name in ("tokens", "targets", "cu_seqlens"):
        x = getattr(batch, name).clone()
        x[..., 1] += 1
        changed.append(type(batch)(**{**vars(batch), name: x}))
    found = {batch_hash([b]) for b in [batch, *changed]}
    assert len(found) == 5
    assert {len(h) for h in found} == {32}


def test_a_mixture_reads_sources_by_weight_and_each_row_once_an_epoch(made):
    task = load_task(mixed(made), 0)
    alone = [load_task(ShardsSpec(path=str(made(i)), seq_len=T), 0) for i in range(2)]
    own = [{tuple(t.train_batch(i, 1).tokens[0].tolist()) for i in range(t.n_train)} for t in alone]
    assert not own[0] & own[1]
    n = 4 * (alone[0].n_train // 3)
    seen = list(map(tuple, task.train_batch(0, n).tokens.tolist()))
    of = [[row for row in seen if row in rows] for rows in own]
    assert abs(len(of[0]) - 0.75 * n) <= 2
    assert len(of[0]) + len(of[1]) == n
    assert all(len(set(rows)) == len(rows) for rows in of)
    assert task.n_train == sum(t.n_train for t in alone)


def test_sources_of_a_mixture_have_orders_of_their_own(made):
    """The same folder twice: if both had one order, every row would be read twice in a row."""
    spec = ShardsSpec.model_validate({"sources": [{"path": str(made())}] * 2, "seq_len": T})
    tokens = load_task(spec, 0).train_batch(0, 200).tokens
    pairs = [torch.equal(a, b) for a, b in zip(tokens[::2], tokens[1::2], strict=True)]
    assert sum(pairs) <= 4  # of 100 with 500 rows and more, 0.2 on average


def test_held_out_text_of_a_mixture(made):
    both = [load_task(ShardsSpec(path=str(made(i)), seq_len=T), 0) for i in range(2)]
    tokens = [torch.cat([b.tokens for b in t.valid_batches(3)]) for t in both]

    def held(**fields):
        return torch.cat([b.tokens for b in load_task(mixed(made, **fields), 0).valid_batches(4)])

    assert torch.equal(held(), torch.cat(tokens))
    assert torch.equal(held(valid=str(made(1))), tokens[1])
    assert torch.equal(held(valid_rows=5), torch.cat([t[:5] for t in tokens]))


def test_packed_documents_ask_for_nothing_across_a_bound(made):
    """By the bytes themselves: a frame begins with BOS, 256, and ends with EOS, 257."""
    batch = load_task(ShardsSpec(path=str(made()), seq_len=400), 0).train_batch(0, 40)
    tokens, targets = batch.tokens.flatten(), batch.targets.flatten()
    begun = set((tokens == 256).nonzero().flatten().tolist()) | set(range(0, 16_000, 400))
    assert set(batch.cu_seqlens.tolist()) == begun | {16_000}
    assert (targets == 256).sum() == 0
    assert (targets[tokens == 257] == -100).all()
    assert (targets[tokens != 257] >= 0).all()


def test_the_fingerprint_is_of_the_data_and_its_settings(made, sources, tmp_path):
    def fingerprint(**fields):
        return load_task(mixed(made, **fields), 0).fingerprint

    found = {fingerprint(), *(fingerprint(**f) for f in ({"packed": False}, {"seq_len": 32}))}
    found |= {fingerprint(valid=str(made(1))), fingerprint(valid_rows=3)}
    one, other = ({"path": str(made(i)), "weight": 3} for i in range(2))
    found |= {fingerprint(sources=[one, other]), fingerprint(sources=[other, one])}
    assert len(found) == 7
    moved = shutil.copytree(made(), tmp_path / "moved")
    spec = ShardsSpec(path=str(made()), seq_len=T)
    at = spec.model_copy(update={"path": str(moved)})
    assert load_task(at, 0).fingerprint == load_task(spec, 1).fingerprint
    assert Prepared(made(frame="bos")).fingerprint != Prepared(made()).fingerprint


def read_all(folder):
    task = load_task(ShardsSpec(path=str(folder), seq_len=T), 0)
    task.train_batch(0, task.n_train)
    list(task.valid_batches(8))


@pytest.mark.parametrize("suffix", ["tokens", "starts", "crc"])
@pytest.mark.parametrize("split", ["train-00003", "valid-00003"])
def test_a_shard_that_is_cut_or_missing_is_named_at_the_start(copy, split, suffix):
    file = copy / "shards" / f"{split}.{suffix}"
    size = file.stat().st_size
    with file.open("r+b") as f:
        f.truncate(size - 2)
    with pytest.raises(Damaged, match=rf"{file} has {size - 2} bytes of {size}; copy it again, or"):
        load_task(ShardsSpec(path=str(copy), seq_len=T), 0)
    file.unlink()
    with pytest.raises(Damaged, match=rf"{file} is missing; copy it again"):
        load_task(ShardsSpec(path=str(copy), seq_len=T), 0)


@pytest.mark.parametrize("name", ["train-00003.tokens", "valid-00001.tokens", "train-00003.starts",
                                  "train-00002.crc", "valid-00003.sizes"])  # fmt: skip
def test_a_flipped_bit_is_named_before_it_is_trained_on(copy, name):
    read_all(copy)
    file = copy / "shards" / name
    data = bytearray(file.read_bytes())
    at = len(data) // 2
    data[at] ^= 1
    file.write_bytes(data)
    with pytest.raises(Damaged, match=rf"{file} is damaged") as caught:
        read_all(copy)
    assert "\n" not in str(caught.value)
    if file.suffix == ".tokens":
        assert f"in bytes {at // BLOCK * BLOCK} and following" in str(caught.value)
    with pytest.raises(Damaged, match=rf"{file} is damaged"):
        Prepared(copy).check()


def test_other_blocks_of_a_damaged_shard_can_be_read(made, tmp_path):
    folder = shutil.copytree(made(shard_mib=64.0), tmp_path / "copy")
    file = folder / "shards" / "train-00000.tokens"
    data = bytearray(file.read_bytes())
    assert len(data) > 3 * BLOCK
    data[BLOCK + 5] ^= 128
    file.write_bytes(data)
    train, per = Prepared(folder).train, BLOCK // 2
    train.read(0, per)
    train.read(2 * per, 3 * per)
    for start, stop in [(per, per + 1), (0, per + 1), (2 * per - 1, 2 * per)]:
        with pytest.raises(Damaged, match=f"in bytes {BLOCK} and following"):
            train.read(start, stop)


def test_folders_that_cannot_be_used(made, tmp_path, copy):
    def fails(path, error, message):
        with pytest.raises(error, match=message) as caught:
            load_task(ShardsSpec(path=str(path), seq_len=T), 0)
        assert "\n" not in str(caught.value)

    fails(tmp_path / "none", FileNotFoundError, "no prepared data at .*none; make it: glactl data")
    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", ValueError, "empty has no manifest.json; make one: glactl data prep")
    manifest = copy / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text.replace('"format": 1', '"format": 2'))
    fails(copy, ValueError, "manifest.json is of format 2; this version reads 1")
    manifest.write_text(text[: len(text) // 2])
    fails(copy, Damaged, "manifest.json is damaged: not a manifest of prepared data")
    manifest.unlink()
    fails(copy, ValueError, "copy is not finished; the same `glactl data prepare` goes on")
    fails(made(valid=0.0), ValueError, "out has no held-out text; name a folder that has in data.v")
    with pytest.raises(
        ValueError, match=r"has \d+ tokens to train on; one row of seq_len 99999999 n"
    ):
        load_task(ShardsSpec(path=str(made()), seq_len=99_999_999), 0)
    mixture = [{"path": str(made())}, {"path": str(made(frame="bos"))}]
    spec = ShardsSpec.model_validate({"sources": mixture, "seq_len": T})
    with pytest.raises(ValueError, match="were prepared with another frame each; a mixture needs"):
        load_task(spec, 0)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"path": "a", "sources": [{"path": "b"}]},
        {"sources": []},
        {"sources": [{"path": "a", "weight": 0}]},
        {"path": "a", "seq_len": 0},
        {"path": "a", "source": "b"},
    ],
)
def test_bad_settings(fields):
    with pytest.raises(ValueError, match="validation error"):
        ShardsSpec(**fields)


def test_more_shards_than_may_be_open(made, monkeypatch):
    folder = made(shard_mib=1 * KIB)
    expected = Prepared(folder).train.read(0, 10**9)
    monkeypatch.setattr("glactl.tasks.shards.OPEN", 3)
    train = Prepared(folder).train
    assert np.array_equal(train.read(0, 10**9), expected)
    assert train._shard.cache_info().currsize == 3
