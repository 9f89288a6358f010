"""A sweep of seconds, and how to read the table that it prints."""

import re

import yaml

TINY = {
    "dims": [16],
    "lrs": [1e-2, 1e-3, 1e-1],
    "seeds": [0],
    "mixers": {
        "attention": {"model": {"mixer": {"kind": "attention", "heads": 1}}},
        "gla": {"model": {"mixer": {"kind": "gla", "heads": 2}}},
    },
    "run": {
        "model": {"n_layers": 1, "ffn": "none", "short_conv": 3, "positions": "none"},
        "data": {
            "kind": "mqar",
            "vocab_size": 32,
            "seq_len": 8,
            "pairs": 2,
            "n_train": 64,
            "n_valid": 16,
        },
        "optim": {"warmup_steps": 1},
        "train": {"steps": 4, "batch_size": 8, "valid_every": 2, "stop_accuracy": 0.99},
    },
    "lengths": {8: {"data": {"pairs": 2}}, 16: {"data": {"pairs": 4}, "train": {"steps": 5}}},
}


def json_copy(data):
    return yaml.safe_load(yaml.safe_dump(data))


def table(result):
    """The cells of the table on stdout, columns parted by two spaces or more."""
    head, *rows = (re.split(r"\s{2,}", line) for line in result.stdout.splitlines())
    return [dict(zip(head, row, strict=True)) for row in rows]
