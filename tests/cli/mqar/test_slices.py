"""Accuracy for each length and number of pairs, from the rows to a trial's result."""

import json

import pytest
import torch

from glactl.spec import RunSpec
from glactl.tasks import Batch
from glactl.train.loop import train
from glactl.train.slices import Slices, of_slices

MIXTURE = {
    "kind": "mqar",
    "vocab_size": 64,
    "train": [{"seq_len": 8, "pairs": 1, "rows": 12}, {"seq_len": 16, "pairs": 2, "rows": 12}],
    "valid": [
        {"seq_len": 8, "pairs": 2, "rows": 6},
        {"seq_len": 16, "pairs": 2, "rows": 2},
        {"seq_len": 16, "pairs": 4, "rows": 4},
    ],
}


def batch(L, *asked):
    """Rows of length L with so many targets, at the end of each."""
    targets = torch.full((len(asked), L), -100)
    for row, n in zip(targets, asked, strict=True):
        row[L - n :] = 1
    return Batch(
        targets, targets, pairs=torch.tensor(asked), lengths=torch.tensor([L] * len(asked))
    )


def test_a_row_counts_as_much_as_any_other():
    slices = Slices()
    slices.add(batch(8, 1, 2, 1), torch.tensor([True, True, False, False]))
    slices.add(batch(16, 4), torch.tensor([True, True, True, False]))
    slices.add(batch(8, 2), torch.tensor([True, True]))
    numbers = slices.numbers()
    assert of_slices(numbers) == {"8/1": 0.5, "8/2": 0.75, "16/4": 0.75}
    assert numbers["accuracy"] == pytest.approx((1 + 0.5 + 0 + 0.75 + 1) / 5)


def test_rows_of_one_kind_have_no_slices():
    slices = Slices()
    assert slices.numbers() == {}
    slices.add(Batch(torch.zeros(1, 2), torch.zeros(1, 2)), torch.tensor([True, True]))
    slices.add(batch(8, 2), torch.tensor([True, False]))
    assert slices.numbers() == {}


def test_training_on_a_mixture_tells_them_and_repeats_itself():
    """Batches of 8 reach over both lengths; the numbers are a function of the spec."""
    spec = RunSpec.model_validate(
        {
            "model": {"d_model": 16, "n_layers": 2, "mixer": ["conv", "gla"], "ffn": "none"},
            "data": MIXTURE,
            "train": {"steps": 6, "batch_size": 8, "accumulate": 2, "valid_every": 3},
        }
    )
    first, again = ([s.valid for s in train(spec, device="cpu")] for _ in range(2))
    assert first == again
    for valid in (first[2], first[5]):
        parts = of_slices(valid)
        assert list(parts) == ["8/2", "16/2", "16/4"]
        mean = (6 * parts["8/2"] + 2 * parts["16/2"] + 4 * parts["16/4"]) / 12
        assert valid["accuracy"] == pytest.approx(mean)


def test_a_sweep_keeps_and_shows_them(glactl, preset, tmp_path):
    preset["run"]["data"] = MIXTURE
    preset["lengths"] = {}
    done = glactl("--lrs", "1e-2")
    assert done.exit_code == 0, done.output
    folder = tmp_path / "sweeps" / "quick"
    records = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    assert [list(r["slices"]) for r in records] == [["8/2", "16/2", "16/4"]] * 2
    head, attention, gla = done.stdout.split("accuracy by length/pairs")[1].splitlines()[1:]
    assert head.split() == ["mixer", "dim", "8/2", "16/2", "16/4"]
    assert attention.split()[:2] == ["attention", "16"]
    shown = [f"{x:.4g}" for x in records[1]["slices"].values()]
    assert [float(x) for x in gla.split()[2:]] == pytest.approx([float(x) for x in shown])
    text = (folder / "slices.csv").read_text().splitlines()
    assert len(text) == 1 + 2 * 3
    again = glactl("--lrs", "1e-2", "--plot-only")
    assert again.stdout == done.stdout
