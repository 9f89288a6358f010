"""A task and a run small enough to train on within a test."""

import json
import sys
from pathlib import Path

import pytest
import torch

from glactl.models.lm import build_lm
from glactl.run import Position, Run
from glactl.spec import RunSpec
from glactl.tasks import Batch
from glactl.tasks.tokenizer import ByteTokenizer

sys.path.insert(0, str(Path(__file__).parent))  # for fla_layers.py

TINY = {
    "name": "toy",
    "model": {"d_model": 16, "n_layers": 2, "mixer": {"kind": "gla", "heads": 2}, "dropout": 0.1},
    "data": {"kind": "text", "seq_len": 12},
    "optim": {"lr": 1e-2, "warmup_steps": 2},
    "train": {"steps": 8, "batch_size": 4, "accumulate": 2, "valid_every": 4, "save_every": 4},
}

BYTES = {
    "name": "bytes",
    "model": {
        "d_model": 16,
        "n_layers": 2,
        "mixer": {"kind": "gla", "heads": 2},
        "vocab_size": 259,
        "init_std": 0.3,
    },
}


class ToyTask:
    """Counting modulo 13 from a random start; batch `index` is a function of (seed, index)."""

    vocab_size = 13
    tokenizer = None
    n_train = 40

    def __init__(self, seed=0, fingerprint="toy"):
        self.seed, self.fingerprint, self.asked = seed, fingerprint, []

    def _batch(self, seed, rows):
        start = torch.randint(13, (rows, 1), generator=torch.Generator().manual_seed(seed))
        counted = (start + torch.arange(13)) % 13
        return Batch(tokens=counted[:, :-1], targets=counted[:, 1:], n_bytes=rows * 12)

    def train_batch(self, index, batch_size):
        self.asked.append((index, batch_size))
        return self._batch(1_000_000 * (self.seed + 1) + index, batch_size)

    def valid_batches(self, batch_size):
        yield self._batch(1, 3)
        yield self._batch(2, 2)

    def floors(self):
        return {}


@pytest.fixture
def toy():
    return ToyTask()


@pytest.fixture
def make_toy():
    return ToyTask


@pytest.fixture
def tiny_data():
    """The plain data of a tiny spec; a test may change it."""
    return json.loads(json.dumps(TINY))


@pytest.fixture
def tiny_spec(tiny_data):
    return RunSpec.model_validate(tiny_data)


@pytest.fixture
def corpus(tmp_path):
    """A file of 60 short documents."""
    path = tmp_path / "corpus.jsonl"
    words = ["red", "green", "blue", "one", "two", "three"]
    lines = [
        json.dumps({"text": " ".join(words[(i * j + i) % 6] for j in range(40))}) for i in range(60)
    ]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def byte_run(tmp_path):
    """A run that saved an untrained byte model once, at step 3; its weights are fp32."""
    run = Run.create(RunSpec.model_validate(BYTES), "", tmp_path / "runs")
    ByteTokenizer().save(run.path / "tokenizer")
    model = build_lm(run.spec.model, 0)
    optimizer = torch.optim.AdamW(model.parameters())
    run.save_checkpoint(model, optimizer, Position(0, 40, "toy", step=3))
    return run
