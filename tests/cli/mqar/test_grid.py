"""What the sweep is made of: presets, options, and what is refused."""

import re

import pytest
from typer.testing import CliRunner

from glactl.cli.main import app
from glactl.models.cost import lm_cost
from glactl.models.mixers import KINDS
from glactl.spec import spec_hash
from glactl.sweep.grid import make_grid, presets
from glactl.train.loop import with_vocab

NAMES = ", ".join(KINDS)


def test_state_bytes_are_the_cost_models(glactl):
    for trial in make_grid(dims="16,32").trials:
        cost = lm_cost(with_vocab(trial.spec, 32).model, 8)
        assert (trial.state_bytes, trial.params) == (cost.state_bytes, cost.params)
        assert trial.key == spec_hash(trial.spec)


ERRORS = [
    (["--dims", ""], "--dims is ''; allowed: whole numbers of 1 or more, 64,128"),
    (["--dims", "64,,128"], "--dims is '64,,128'; allowed: whole numbers of 1 or more, 64,128"),
    (["--dims", "64,x"], "--dims has 'x'; allowed: whole numbers of 1 or more, 64,128"),
    (["--dims", "0"], "--dims has '0'; allowed: whole numbers of 1 or more, 64,128"),
    (["--seeds", "-1"], "--seeds has '-1'; allowed: whole numbers of 0 or more, 64,128"),
    (["--lrs", "1e-3,"], "--lrs is '1e-3,'; allowed: numbers above 0, 1e-3,3e-3"),
    (["--lrs", "0"], "--lrs has '0'; allowed: numbers above 0, 1e-3,3e-3"),
    (["--lrs", "nan"], "--lrs has 'nan'; allowed: numbers above 0, 1e-3,3e-3"),
    (["--lrs", "fast"], "--lrs has 'fast'; allowed: numbers above 0, 1e-3,3e-3"),
    (["--mixers", ","], "--mixers is ','; allowed: names, attention,gla"),
    (
        ["--mixers", "gsaa"],
        f"--mixers gsaa: model.mixer.kind is 'gsaa'; allowed: {NAMES}; did you mean gsa?",
    ),
    (["--dims", "15"], r"--mixers gla --dims 15: model: mixer gla: .*d_model 15.*"),
    (["--dims", "18"], r"--mixers gla --dims 18: model: mixer gla: .*heads 2 .*9.*"),
    (["--pairs", "3"], r"--pairs 3: data: .*pairs.*"),
    (["--pairs", "0"], r"--pairs 0: .*pairs.*"),
    (["--seqlen", "20", "--pairs", "100"], r"--seqlen 20 --pairs 100: data: .*pairs.*"),
    (["--pairs", "17", "--seqlen", "68"], r"--seqlen 68 --pairs 17: data: .*"),  # vocabulary 32
    (["--form", "hybird"], "--form is 'hybird'; allowed: identity, hybrid; did you mean hybrid?"),
    (
        ["--mixers", "all", "--dims", "18"],
        r"--mixers gla --dims 18: model: mixer gla: .*heads 2 .*",
    ),
    (["--device", "gpu"], "device 'gpu' is not known; allowed: cpu, cuda, .*"),
]


@pytest.mark.parametrize(("args", "message"), ERRORS, ids=[" ".join(a) for a, _ in ERRORS])
def test_bad_input_is_one_line_before_anything_starts(args, message, glactl, trained, tmp_path):
    bad = CliRunner().invoke(app, ["mqar", *args])
    assert bad.exit_code == 2, bad.output
    assert bad.stdout == ""
    assert bad.stderr.count("\n") == 1
    line = bad.stderr.removeprefix("error: ").rstrip("\n")
    assert line == message or re.fullmatch(message, line), bad.stderr
    assert trained.calls == []
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_preset_and_a_file_as_folder(tmp_path):
    bad = CliRunner().invoke(app, ["mqar", "--preset", "zoolog"])
    assert bad.exit_code == 2
    expected = "--preset is 'zoolog'; allowed: based, gsa, quick, zoology; did you mean zoology?"
    assert bad.stderr == f"error: {expected}\n"
    (tmp_path / "f").write_text("")
    bad = CliRunner().invoke(app, ["mqar", "--out", str(tmp_path / "f")])
    assert bad.exit_code == 2
    assert "is a file; allowed: a folder" in bad.stderr


def test_a_mixture_has_its_own_lengths_and_pairs(tmp_path):
    for option in ("--seqlen", "--pairs"):
        bad = CliRunner().invoke(app, ["mqar", "--preset", "based", option, "64"])
        assert bad.exit_code == 2
        assert bad.stderr.startswith(f"error: {option} 64: data: ")
        assert bad.stderr.endswith(
            "the segments of train and valid make it "
            + ("1024" if option == "--seqlen" else "256")
            + "; allowed: to leave it out\n"
        )


def test_the_length_brings_its_settings_and_pairs_win(glactl):
    (cell,) = make_grid(mixers="gla", lrs="1e-3", seqlen=16).cells
    data, plan = cell[0].spec.data, cell[0].spec.train
    assert (data.seq_len, data.pairs, plan.steps) == (16, 4, 5)
    (cell,) = make_grid(mixers="gla", lrs="1e-3", seqlen=16, pairs=1).cells
    assert cell[0].spec.data.pairs == 1


PRESETS = {  # the mixers of each
    "quick": ["attention", "gla", "gsa"],
    "zoology": ["attention", "gla", "gsa"],
    "gsa": ["gsa", "gla", "retnet", "hgrn2", "mamba", "abc", "attention"],
    "based": ["attention", "gla", "gsa", "retnet", "hgrn2", "mamba", "abc"],
}


@pytest.mark.parametrize("name", presets())
def test_the_presets_are_valid(name):
    grid = make_grid(name)
    assert len({t.key for t in grid.trials}) == len(grid.trials)
    assert list(grid.mixers) == PRESETS[name]
    assert all(t.spec.train.stop_accuracy == 0.99 for t in grid.trials)


def test_the_gsa_papers_figure_3a():
    """Its three numbers; all else is Zoology's at 512 tokens, where the mixers are the same."""
    grid, zoology = make_grid("gsa"), make_grid("zoology", seqlen=512)
    assert grid.dims == [64, 128, 256, 512]
    assert {(t.data.seq_len, t.data.pairs) for t in grid.trials} == {(512, 64)}
    assert {t.spec.train.precision for t in grid.trials} == {"bf16"}
    assert {t.spec.train.precision for t in zoology.trials} == {"fp32"}
    bf16 = {"train": zoology.trials[0].spec.train.model_copy(update={"precision": "bf16"})}
    assert {spec_hash(t.spec.model_copy(update=bf16)) for t in zoology.trials} < {
        t.key for t in grid.trials
    }


def test_baseds_mixture():
    grid = make_grid("based")
    (trial,) = (t for t in grid.cells[1] if t.lr == 1e-2)
    data, plan = trial.data, trial.spec.train
    kinds = [(p.seq_len, p.pairs, p.rows) for p in data.segments("train")]
    assert kinds[0] == (64, 4, 100_000)
    assert kinds[1:] == [(L, n, 20_000) for L, n in ((128, 8), (256, 16), (256, 32), (256, 64))]
    kinds = [(p.seq_len, p.pairs) for p in data.segments("valid")]
    assert kinds == [(64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256)]
    assert {p.rows for p in data.segments("valid")} == {1000}
    assert data.random_non_queries
    assert not data.shuffle
    assert plan.steps * plan.batch_size == 32 * data.n_train
    assert [m.kind for m in trial.spec.model.mixers] == ["conv", "gla"]
    assert grid.lrs == pytest.approx([10**x for x in (-3, -2.5, -2, -1.5)], rel=1e-3)
    (mamba, *_) = (t for t in grid.trials if t.mixer == "mamba")
    assert [m.kind for m in mamba.spec.model.mixers] == ["mamba", "mamba"]


def test_a_form_is_an_option():
    """A hybrid has a convolution first; the identity form is every layer the mixer."""
    plain, hybrid = (make_grid("gsa", form=form).trials[0] for form in (None, "hybrid"))
    assert [m.kind for m in plain.spec.model.mixers] == ["gsa", "gsa"]
    assert [m.kind for m in hybrid.spec.model.mixers] == ["conv", "gsa"]
    assert hybrid.spec.model.mixers[0].width == 3
    assert hybrid.key != plain.key
    assert [m.kind for m in make_grid("based", form="identity").trials[0].spec.model.mixers] == [
        "attention",
        "attention",
    ]


def test_all_mixers(glactl):
    grid = make_grid(mixers="all")
    assert list(grid.mixers) == ["attention", "gla", *(k for k in KINDS[2:] if k != "conv")]
    assert grid.trials[0].spec.model.mixers[0].heads == 1  # the preset's own


def test_the_work_of_a_trial_counts_every_segment_and_validation():
    trial = make_grid("based", mixers="attention", dims="64", form="identity").trials[0]
    plan, model = trial.spec.train, with_vocab(trial.spec, 8192).model
    train = sum(
        rows / 180_000 * L * lm_cost(model, L).flops_token_train
        for L, rows in ((64, 100_000), (128, 20_000), (256, 60_000))
    )
    valid = sum(
        rows * L * lm_cost(model, L).flops_token
        for L, rows in ((64, 3000), (128, 1000), (256, 1000), (512, 1000), (1024, 1000))
    )
    steps = plan.steps * plan.batch_size * train
    assert trial.work == pytest.approx(steps + 32 * valid, rel=1e-12)


@pytest.mark.parametrize(
    ("length", "pairs", "batch", "steps"),
    [(64, 4, 512, 12544), (128, 8, 512, 12544), (256, 16, 256, 25024), (512, 64, 128, 50048)],
)
def test_zoologys_figure_2(length, pairs, batch, steps):
    """64 epochs of 100,000 rows: 64 * ceil(100,000 / batch) steps, validated after each epoch."""
    grid = make_grid("zoology", seqlen=length)
    assert (grid.dims, grid.lrs) == ([64, 128, 256, 512], [1e-4, 4.64e-4, 2.15e-3, 1e-2])
    for trial in grid.trials:
        data, plan = trial.spec.data, trial.spec.train
        assert (data.seq_len, data.pairs, data.n_train, data.n_valid) == (
            length,
            pairs,
            10**5,
            3000,
        )
        assert (plan.batch_size, plan.steps) == (batch, steps)
        assert plan.steps == 64 * plan.valid_every == 64 * -(-data.n_train // batch)
        assert trial.spec.model.positions == ("learned" if trial.mixer == "attention" else "none")
