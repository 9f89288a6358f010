"""A grid in a file: what it changes, what wins, and faults with their lines."""

import pytest
from sweeping import table

from glactl.sweep.grid import make_grid


@pytest.fixture
def write(tmp_path):
    def file(text):
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        return path

    return file


GRID = """\
dims: [16, 32]
lrs: [1e-3]
seeds: 7
mixers:
  slow: {model: {mixer: {kind: gla, heads: 1}}, train: {steps: 6}}
run:
  model: {n_layers: 2}
  data: {seq_len: 16}
lengths:
  16: {train: {valid_every: 3}}
"""


def test_a_file_changes_the_preset(preset, write):
    grid = make_grid(file=write(GRID))
    assert (grid.preset, grid.dims, grid.lrs, grid.seeds) == ("mine", [16, 32], [1e-3], [7])
    assert list(grid.mixers) == ["slow"]
    for trial in grid.trials:
        assert (trial.spec.model.n_layers, trial.spec.model.mixer.heads) == (2, 1)
        # 16 tokens bring the preset's pairs, with what the file adds; the mixer's steps win
        assert (trial.data.pairs, trial.spec.train.steps, trial.spec.train.valid_every) == (4, 6, 3)


def test_a_value_of_run_wins_over_the_lengths(preset, write):
    (trial, *_) = make_grid(file=write("run: {data: {seq_len: 16, pairs: 1}}"), mixers="gla").trials
    assert (trial.data.seq_len, trial.data.pairs) == (16, 1)


def test_an_option_wins_over_the_file(preset, write):
    path = write(GRID)
    grid = make_grid(file=path, dims="48", lrs="1e-2,1e-1", seeds="1", mixers="gla", pairs=2)
    assert (grid.dims, grid.lrs, grid.seeds, list(grid.mixers)) == (
        [48],
        [1e-2, 1e-1],
        [1],
        ["gla"],
    )
    assert grid.trials[0].data.pairs == 2


def test_a_list_of_mixers_and_a_form(preset, write):
    grid = make_grid(file=write("mixers: [gla, retnet]\nform: hybrid\nrun: {model: {n_layers: 2}}"))
    assert list(grid.mixers) == ["gla", "retnet"]
    assert [m.kind for m in grid.trials[-1].spec.model.mixers] == ["conv", "retnet"]


def test_a_change_that_names_no_mixer_is_one_to_the_mixer_of_that_name(preset, write):
    text = "mixers: {gla: {optim: {weight_decay: 0.5}}, retnet: , mine: {model: {mixer: abc}}}"
    trials = make_grid(file=write(f"dims: [16]\nlrs: [1e-3]\n{text}")).trials
    assert [t.spec.model.mixers[0].kind for t in trials] == ["gla", "retnet", "abc"]
    plain = make_grid(file=write("mixers: [gla]"), dims="16", lrs="1e-3").trials[0].spec
    assert trials[0].spec.model == plain.model  # with what the preset says of it
    assert (trials[0].spec.optim.weight_decay, plain.optim.weight_decay) == (0.5, 0.01)
    text = "run: {model: {mixer: hgrn2}}\nmixers: {mine: {optim: {weight_decay: 0.5}}}"
    assert make_grid(file=write(text)).trials[0].spec.model.mixers[0].kind == "hgrn2"


def test_the_preset_is_the_files(write):
    grid = make_grid(file=write("preset: zoology\ndims: [64]"))
    assert grid.dims == [64]
    assert grid.trials[0].data.vocab_size == 8192
    assert make_grid("gsa", file=write("preset: zoology")).trials[0].data.pairs == 64


def test_the_command_names_its_folder_by_the_file(glactl, trained, write, tmp_path):
    done = glactl(write(GRID))
    assert done.exit_code == 0, done.output
    assert [row["dim"] for row in table(done)] == ["16", "32"]
    assert (tmp_path / "sweeps" / "mine" / "results.jsonl").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dim: [16]", "{}:1: dim; allowed: preset, dims, .*; did you mean dims?"),
        ("lrs: [1e-3]\ndims: [16, x]", "{}:2: dims has 'x'; allowed: whole numbers"),
        ("lrs: {a: 1}", "{}:1: lrs has "),
        ("form: hybird", "{}:1: form is 'hybird'; allowed: identity, hybrid; did you mean hybrid?"),
        ("preset: gsaa", "--preset is 'gsaa'"),
        ("run: 3", "{}:1: run is 3; allowed: a mapping"),
        ("run: {data: 3}", "{}:1: run.data is 3; allowed: a mapping"),
        ("lengths: {16: 3}", "{}:1: lengths.16 is 3; allowed: a mapping"),
        ("lengths: {16: {optim: []}}", "{}:1: lengths.16.optim is []; allowed: a mapping"),
        ("mixers:\n  gla: 0", "{}:2: mixers.gla is 0; allowed: a mapping"),
        ("mixers: {gsaa: {}}", "{}:1: mixers.gsaa has no model.mixer and is no mixer's name; did"),
        ("run:\n  train:\n    step: 3", "{}:3: train.step"),
        ("run: {data: {pairs: 3}}", "{}:1: data: pairs 3 do not fit"),
        ("mixers: [gla, gsaa]", "--mixers gsaa: model.mixer.kind is 'gsaa'"),
        ("run: {init: {from: x}}", "init is set; the trials of a sweep begin with weights of"),
        ("run: {train: {recompute: true}}", "train.recompute is True; allowed in a sweep: False"),
        ("run: {train: {loss: liger}}", "train.loss is liger; allowed in a sweep: auto or whole"),
        ("run: {train: {accumulate: auto}}", "train.accumulate is auto; allowed in a sweep: a nu"),
        ("run: {data: {kind: text}}", "{}:1: data.n_train is not a field of TextSpec"),
        ("a: [", "{}:1: not valid YAML"),
        ("[]", "{}:1: a spec is a mapping"),
    ],
)
def test_faults_are_one_line_with_their_place(text, message, write, glactl, trained, monkeypatch):
    if "gsaa" in text and "preset" in text:
        monkeypatch.undo()
    path = write(text)
    bad = glactl(path)
    assert bad.exit_code == 2, bad.output
    assert bad.stderr.count("\n") == 1
    line = bad.stderr.removeprefix("error: ")
    head, *rest = message.format(path).split(".*")
    assert line.startswith(head)
    assert all(part in line for part in rest)
    assert trained.calls == []


def test_no_file(glactl, tmp_path):
    (tmp_path / "grid.yaml").write_text("dims: [16]")
    bad = glactl("grit.yaml")
    assert bad.exit_code == 2
    assert "grit.yaml; did you mean grid.yaml?" in bad.stderr
