"""The table of tiles: what it may say, where it is, and what becomes of a bad one."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from glactl.kernels import triton_gla, triton_gsa, triton_scalar, tuned
from glactl.kernels.tuned import COLUMNS, Key, changed, kernels

GPU = torch.device("cuda", 0)
KEY = Key(128, 256, 0, 1, torch.bfloat16)
RULE = triton_gla.tiles(128, 256, torch.bfloat16)


@pytest.fixture
def table(tmp_path, monkeypatch):
    """The path of a table that this process has not read yet, for a device of ours."""
    monkeypatch.setenv("GLACTL_TILES", str(tmp_path / "new" / "tiles.json"))
    place = {"device": "GPU 9000", "triton": "3.6.0"}
    monkeypatch.setattr(tuned, "place", lambda device: place)
    monkeypatch.setattr(tuned, "used", {})
    forget()
    yield tmp_path / "new" / "tiles.json"
    forget()


def forget():
    tuned._entries.cache_clear()
    tuned._seen.clear()


def entry(tiles, **other):
    own = {"device": "GPU 9000", "triton": "3.6.0", "engine": "key"} | KEY.plain
    return own | other | {"tiles": tiles}


def test_round_trip(table):
    assert tuned.tuned("key", GPU, KEY, RULE) is RULE  # no file, no change
    forget()
    tuned.write(table, [entry({"sweep": {"warps": 8, "V": 128}, "back": {"stages": 2}})])
    found = tuned.tuned("key", GPU, KEY, RULE)
    assert found.sweep == triton_gla.Tile(128, 128, 8, RULE.sweep.stages)
    assert found.back == triton_gla.Tile(128, 64, RULE.back.warps, 2)
    unchanged = set(kernels(RULE)) - {"sweep", "back"}
    assert all(getattr(found, name) == getattr(RULE, name) for name in unchanged)
    assert found.programs == RULE.programs
    assert tuned.used == {("key", KEY): found}
    assert [p.name for p in table.parent.iterdir()] == ["tiles.json"]  # no part is left behind


@pytest.mark.parametrize(
    "other",
    [
        {"device": "GPU 9001"},
        {"triton": "3.7.0"},
        {"engine": "scalar"},
        {"K": 64},
        {"V": 128},
        {"M": 64},
        {"R": 2},
        {"dtype": "float32"},
    ],
    ids=str,
)
def test_an_entry_is_for_what_it_names_alone(table, other):
    tuned.write(table, [entry({"sweep": {"warps": 8}}, **other)])
    assert tuned.tuned("key", GPU, KEY, RULE) == RULE


def test_an_entry_replaces_that_for_the_same(table):
    tuned.write(table, [entry({"sweep": {"warps": 8}}), entry({"back": {"warps": 8}}, R=2)])
    tuned.write(table, [entry({"sweep": {"warps": 16}})])
    entries = tuned.read(table)
    assert [(e["R"], e["tiles"]) for e in entries] == [
        (2, {"back": {"warps": 8}}),
        (1, {"sweep": {"warps": 16}}),
    ]


def test_a_table_is_read_once_and_not_at_all_for_a_cpu(table):
    table.parent.mkdir()
    table.write_text("not a table")
    assert tuned.tuned("key", torch.device("cpu"), KEY, RULE) is RULE
    table.write_text("[]")
    assert tuned.tuned("key", GPU, KEY, RULE) is RULE
    table.write_text("not a table")
    assert tuned.tuned("key", GPU, KEY._replace(R=2), RULE) is RULE


def test_where_the_table_is(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("GLACTL_TILES", raising=False)
    assert tuned.path() == Path("/home/me/.cache/glactl/tiles.json")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert tuned.path() == Path("/caches/glactl/tiles.json")
    monkeypatch.setenv("GLACTL_TILES", "mine.json")
    assert tuned.path() == Path("mine.json")
    monkeypatch.setenv("GLACTL_TILES", "/dev/null/tiles.json")
    assert tuned.read(tuned.path()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no table of tiles: Expecting value"),
        ("{}", "is no table of tiles: it holds no list"),
        ("[1]", "entry 0 has 1; allowed: "),
        ('[{"engine": "key"}]', r"entry 0 has \['engine'\]; allowed: \['K', 'M',"),
        (json.dumps([entry({}, engine="lock")]), "entry 0 has engine 'lock'; allowed: key, scalar"),
        (json.dumps([entry([])]), r"engine key: tiles is \[\]; allowed: an object"),
        (json.dumps([entry({"swep": {}})]), "engine key: tiles has 'swep'; allowed: prepare, "),
        (json.dumps([entry({"sweep": 8})]), "sweep has 8; allowed: warps, stages, V"),
        (json.dumps([entry({"sweep": {"K": 64}})]), r"sweep has \['K'\]; allowed: warps, stages"),
        (json.dumps([entry({"sweep": {"warps": 3}})]), "sweep.warps is 3; allowed: powers of two"),
        (json.dumps([entry({"sweep": {"warps": True}})]), "sweep.warps is True; allowed: "),
        (json.dumps([entry({"sweep": {"warps": 32}})]), "sweep.warps is 32; allowed: "),
        (json.dumps([entry({"sweep": {"stages": 0}})]), "sweep.stages is 0; allowed: 1 to 8"),
        (json.dumps([entry({"sweep": {"V": 512}})]), "sweep.V is 512; allowed: powers of two"),
        (json.dumps([entry({"sweep": {"V": 32}})]), "sweep.V is 32; allowed: powers of two from"),
        (json.dumps([entry({"gradients": {"K": 128}})]), "gradients.K is 128; allowed: at most"),
    ],
)
def test_a_bad_table_is_one_error_that_names_it(table, text, message):
    table.parent.mkdir()
    table.write_text(text)
    with pytest.raises(ValueError, match=message) as caught:
        tuned.tuned("key", GPU, KEY, RULE)
    assert str(table) in str(caught.value)


def test_a_table_that_is_a_folder(table):
    table.mkdir(parents=True)
    with pytest.raises(ValueError, match=r"tiles.json is no table of tiles: .*Is a directory"):
        tuned.tuned("key", GPU, KEY, RULE)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("engine", "rule", "key"),
    [
        ("key", lambda k: triton_gla.tiles(k.K, k.V, k.dtype), Key(512, 64, 0, 1, torch.bfloat16)),
        ("scalar", lambda k: triton_scalar.tiles(k.K, k.V, k.dtype), KEY),
        ("slots", lambda k: triton_gsa.tiles(*k), Key(192, 64, 64, 2, torch.bfloat16)),
    ],
    ids=["key", "scalar", "slots"],
)
def test_the_rule_is_among_what_a_table_may_say(engine, rule, key, dtype):
    """Every kernel is named, and its own fields are allowed values."""
    key = key._replace(dtype=dtype)
    own = rule(key)
    assert set(kernels(own)) == set(COLUMNS[engine])
    same = {
        kernel: {f: getattr(kernels(own)[kernel], f) for f in ("warps", "stages", *columns)}
        for kernel, columns in COLUMNS[engine].items()
    }
    assert changed(engine, key, own, same) == own


def test_a_pair_of_kernels():
    key = Key(128, 128, 64, 1, torch.bfloat16)
    own = triton_gsa.tiles(*key)
    found = changed("slots", key, own, {"slot_gradients.1": {"warps": 4}})
    assert found.slot_gradients[0] == own.slot_gradients[0]
    assert found.slot_gradients[1].warps == 4
    assert found.slot_gradients[1].slots == own.slot_gradients[1].slots


@pytest.mark.parametrize("engine", COLUMNS)
def test_the_engines_ask(engine, monkeypatch):
    """A plan has the tiles that `tuned` gives it."""
    asked = []

    def other(name, device, key, rule):
        asked.append((name, device.type, key))
        return changed(name, key, rule, {next(iter(COLUMNS[name])): {"stages": 4}})

    modules = {"key": triton_gla, "scalar": triton_scalar, "slots": triton_gsa}
    monkeypatch.setattr(modules[engine], "tuned", other)
    q, k, v = torch.zeros(1, 16, 4, 64), torch.zeros(1, 16, 2, 64), torch.zeros(1, 16, 2, 32)
    if engine == "slots":
        p = triton_gsa.plan(q, k, v, None, torch.zeros(1, 16, 2, 16), 1.0, 16, None)
    elif engine == "key":
        p = triton_gla.plan(q, k, v, torch.zeros(1, 16, 2, 64), 1.0, None)
    else:
        p = triton_scalar.plan(q, k, v, None, 1.0, None)
    assert asked == [(engine, "cpu", Key(64, 32, 16 * (engine == "slots"), 2, torch.float32))]
    assert kernels(p.tiles)[next(iter(COLUMNS[engine]))].stages == 4
