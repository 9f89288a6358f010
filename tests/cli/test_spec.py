import hashlib
import json
import re

import pytest
import yaml

from glactl.models.mixers import KINDS
from glactl.spec import RunSpec, SpecError, json_schema, load, presets, resolved_yaml, spec_hash
from glactl.spec_source import Source

NAMES = ", ".join(KINDS)


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "spec.yaml"
        path.write_text(text)
        return path

    return write


ERRORS = [  # the spec, and the error behind "spec.yaml:"
    (
        "model:\n  d_model: 64\n  d_modle: 3\n",
        "3: model.d_modle is not a field of LMSpec; did you mean d_model?",
    ),
    (
        "model:\n  mixer: {kind: gla, expand_kk: 1}",
        "2: model.mixer.expand_kk is not a field of GLA; did you mean expand_k?",
    ),
    (
        "model:\n  mixer:\n    - gla\n    - kind: gsa\n      slot: 3",
        "5: model.mixer.1.slot is not a field of GSA; did you mean slots?",
    ),
    (
        "model:\n  mixer: {kind: glaa}",
        f"2: model.mixer.kind is 'glaa'; allowed: {NAMES}; did you mean gla?",
    ),
    (
        "model: {mixer: glaa}",
        f"1: model.mixer.kind is 'glaa'; allowed: {NAMES}; did you mean gla?",
    ),
    (
        "model: {mixer: [gla, gsaa]}",
        f"1: model.mixer.1.kind is 'gsaa'; allowed: {NAMES}; did you mean gsa?",
    ),
    ("data: {kind: txt}", "1: data.kind is 'txt'; allowed: text, shards, mqar; did you mean text?"),
    ("data: {seq_len: 3}", "1: data has no kind; allowed: text, shards, mqar"),
    ("data: 3", "1: data is 3; allowed: a mapping of fields to values"),
    ("lr: 3", "1: lr is not a field of RunSpec; did you mean optim.lr?"),
    (
        "slots: 3",
        "1: slots is not a field of RunSpec; fields: name, seed, model, data, optim, train, init",
    ),
    ("1: 2", " 1 is not a field of RunSpec; fields: name, seed, model, data, optim, train, init"),
    ("model: {d_model: abc}", "1: model.d_model is 'abc'; allowed: an integer"),
    ("model: {d_model: 1.5}", "1: model.d_model is 1.5; allowed: an integer"),
    (
        "model: {ffn: swigl}",
        "1: model.ffn is 'swigl'; allowed: swiglu, glu, none; did you mean swiglu?",
    ),
    ("model: {tie_embeddings: 1}", "1: model.tie_embeddings is 1; allowed: true or false"),
    ("optim: {lr: fast}", "1: optim.lr is 'fast'; allowed: a number"),
    ("optim: {lr: 0}", "1: optim.lr is 0; allowed: more than 0"),
    ("optim: {lr_min_ratio: 2}", "1: optim.lr_min_ratio is 2; allowed: at most 1"),
    ("optim: {betas: [0.9]}", "1: optim.betas.1 is missing"),
    ("optim: {betas: 0.9}", "1: optim.betas is 0.9; allowed: a list"),
    (
        "optim: {betas: [0.9, 2]}",
        "1: optim: betas are [0.9, 2.0]; allowed: two numbers from 0 up to 1",
    ),
    ("optim: 3", "1: optim is 3; allowed: a mapping of fields to values"),
    ("train:\n\n  steps: 0", "3: train.steps is 0; allowed: at least 1"),
    (
        "train: {batch_size: 10, accumulate: 3}",
        "1: train: batch_size 10 is not a multiple of accumulate 3",
    ),
    ("train: {steps: x, batch_size: y}", "1: train.steps is 'x'; allowed: an integer (and 1 more)"),
    (
        "name: a b",
        "1: name is 'a b'; allowed: letters, digits and . _ - after a first letter or digit",
    ),
    ("name: 3", "1: name is 3; allowed: text"),
    (
        "model: {positions: learned, max_len: 16}",
        " data.seq_len 256 is longer than model.max_len 16",
    ),
    (
        "data: {kind: mqar}\nmodel: {vocab_size: 10}",
        " model.vocab_size 10 is smaller than the data's vocabulary 8192",
    ),
    ("seed: 1\nseed: 2", "2: seed is given twice, first in line 1"),
    ("model:\n  d_model: 1\n  d_model: 2", "3: model.d_model is given twice, first in line 2"),
    ("[1, 2]", "1: a spec is a mapping of fields to values, not a list"),
    ("abc", "1: a spec is a mapping of fields to values, not a str"),
    ("a: [1\nb: 2", "2: not valid YAML: expected ',' or ']', but got ':'"),
    ("model: &a\n  x: *a", "1: an alias must not contain itself"),
    ("a: !!python/object:os.system 1", "1: not valid YAML: could not determine a constructor"),
    ("a: \x07", " not valid YAML: "),
]


@pytest.mark.parametrize(("text", "message"), ERRORS, ids=[m for _, m in ERRORS])
def test_an_error_is_one_line_with_place_value_and_what_is_allowed(text, message, write):
    path = write(text)
    with pytest.raises(SpecError) as error:
        load(path)
    expected = f"{path}:{message}"
    assert str(error.value)[: len(expected)] == expected
    assert message.endswith((": ", "constructor")) or str(error.value) == expected


def test_heads_that_do_not_divide_are_found_at_load(write):
    with pytest.raises(SpecError, match=r"spec.yaml:1: model.*heads"):
        load(write("model: {d_model: 100, mixer: {kind: gla, heads: 3}}"))


@pytest.mark.parametrize("text", ["", "# nothing but a comment\n"])
def test_an_empty_file(text, write):
    with pytest.raises(SpecError, match=r"spec\.yaml is empty; a spec is a mapping such as"):
        load(write(text))


def test_a_file_that_is_not_text(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"name: \xff\xfe")
    with pytest.raises(SpecError, match=r"a.yaml: not UTF-8 text \(byte 6\)"):
        load(tmp_path / "a.yaml")


def test_a_missing_file_names_the_nearest(write):
    path = write("{}")
    with pytest.raises(
        FileNotFoundError, match=r"no spec at .*spce.yaml; did you mean spec.yaml\?"
    ):
        load(path.with_name("spce.yaml"))
    with pytest.raises(FileNotFoundError, match=r"no spec at /nowhere/spec.yaml$"):
        load("/nowhere/spec.yaml")


def test_a_folder_is_not_a_spec(tmp_path):
    with pytest.raises(SpecError, match=f"is a folder, not a spec; .* --resume {tmp_path}"):
        load(tmp_path)


def test_an_unknown_preset():
    with pytest.raises(
        SpecError, match=r"'tinny'; allowed: default, t2r_mistral_7b, tiny; did you mean tiny\?"
    ):
        load(preset="tinny")


def test_a_file_and_a_preset_exclude_each_other(write):
    with pytest.raises(SpecError, match=r"both a spec \(.*spec.yaml\) and --preset tiny"):
        load(write("{}"), preset="tiny")


SETS = [  # the spec, the change, and the path and value that result, or the error
    ("{}", "model.d_model=64", ("model.d_model", 64)),
    ("{}", "optim.lr=1e-2", ("optim.lr", 0.01)),
    ("{}", "model.mixer=gsa", ("model.mixer.kind", "gsa")),
    ("{}", "model.mixer.heads=2", ("model.mixer.heads", 2)),
    ("model: {mixer: gsa}", "model.mixer.slots=2", ("model.mixer.slots", 2)),
    ("model: {mixer: [gla, gsa]}", "model.mixer.1.slots=2", ("model.mixer.1.slots", 2)),
    ("{}", "data.seq_len=32", ("data.seq_len", 32)),
    ("{}", "model.max_len=null", ("model.max_len", None)),
    ("{}", "model.d_modle=3", "model.d_modle is not a field of LMSpec; did you mean d_model?"),
    ("{}", "lr=3", "lr is not a field of RunSpec; did you mean optim.lr?"),
    ("{}", "model.d_model=x", "model.d_model is 'x'; allowed: an integer"),
    ("model: {mixer: gla}", "model.mixer.slots=2", "model.mixer.slots is not a field of GLA"),
    ("{}", "model.mixer=gsaa", f"model.mixer.kind is 'gsaa'; allowed: {NAMES}"),
    (
        "model: {mixer: [gla, gsa]}",
        "model.mixer.4.slots=2",
        "4 is not in this list; allowed: 0 to 1",
    ),
    ("model: {mixer: [gla, gsa]}", "model.mixer.x=2", "'x' is not in this list; allowed: 0 to 1"),
    ("{}", "model", "allowed: --set KEY=VALUE, e.g. --set model.d_model=256"),
    ("{}", "model.=3", "allowed: --set KEY=VALUE, e.g. --set model.d_model=256"),
    ("{}", "model.d_model.x=3", "model.d_model is 128 and has no fields"),
    ("seed: 3", "seed.x=3", "seed is 3 and has no fields"),
    ("{}", "optim.lr=[1", "the value is not valid YAML; quote it"),
]


@pytest.mark.parametrize(("text", "setting", "expected"), SETS, ids=[s for _, s, _ in SETS])
def test_set(text, setting, expected, write):
    if isinstance(expected, str):
        with pytest.raises(SpecError) as error:
            load(write(text), sets=[setting])
        assert str(error.value).startswith(f"--set {setting}: {expected}")
        return
    at = load(write(text), sets=[setting]).model_dump()
    for step in expected[0].split("."):
        at = at[int(step)] if step.isdigit() else at[step]
    assert at == expected[1]


def test_later_settings_win_and_the_last_one_is_blamed(write):
    assert load(write("seed: 1"), sets=["seed=2", "seed=3"]).seed == 3
    with pytest.raises(SpecError, match="--set seed=x: seed is 'x'"):
        load(write("seed: 1"), sets=["seed=2", "seed=x"])


@pytest.mark.parametrize("name", presets())
def test_a_resolved_preset_reads_back_equal(name, write):
    spec = load(preset=name)
    again = load(write(resolved_yaml(spec)))
    assert again == spec
    assert spec_hash(again) == spec_hash(spec)


def test_the_default_preset_is_the_defaults():
    assert load(preset="default") == RunSpec(name="default")


def test_the_shipped_specs_are_valid(request):
    files = sorted((request.config.rootpath / "specs").glob("*.yaml"))
    assert files
    for file in files:
        assert load(file).name == file.stem


def test_the_hash_leaves_out_defaults_and_the_name():
    nothing = spec_hash(RunSpec())
    assert re.fullmatch("[0-9a-f]{64}", nothing)
    written_out = yaml.safe_load(resolved_yaml(RunSpec(name="other")))
    assert spec_hash(RunSpec.model_validate(written_out)) == nothing


def test_the_hash_tells_results_apart(write):
    texts = [
        "{}",
        "seed: 1",
        "model: {mixer: gsa}",
        "model: {mixer: attention}",
        "model: {mixer: [gla, gsa]}",
        "model: {mixer: {kind: gla, heads: 2}}",
        "model: {mixer: [gla]}",
        "data: {kind: mqar}",
        "optim: {lr: 1e-4}",
        "train: {steps: 10}",
    ]
    hashes = {spec_hash(load(write(t))) for t in texts}
    assert len(hashes) == len(texts)


def test_the_hash_of_a_spec_stays_what_it_was(write):
    """Results on disk are found by it: a new field must not change it."""
    text = "{seed: 3, model: {d_model: 64, mixer: {kind: gsa, slots: 32}}, train: {steps: 7}}"
    plain = {"seed": 3, "model": {"d_model": 64, "mixer": {"kind": "gsa", "slots": 32}}}
    plain |= {"train": {"steps": 7}}
    expected = hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()
    assert spec_hash(load(write(text))) == expected


def test_the_schema_names_every_part():
    schema = json.loads(json.dumps(json_schema()))
    assert set(schema["properties"]) == set(RunSpec.model_fields)
    assert schema["additionalProperties"] is False


def test_a_place_without_a_line_has_the_nearest_around_it():
    source = Source({}, {(): "s.yaml", ("a",): "s.yaml:1"})
    assert source.where(("a", "b", 0)) == "s.yaml:1: "
    assert source.where(("c",)) == "s.yaml: "
    assert Source().where(("a",)) == ""
