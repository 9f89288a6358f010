"""Language modelling on prepared data: one folder of shards, or a mixture of several by weight.

Row j of training is row k of source i as mixture.py orders them, cut from the source's stream as
packing.py says. A global batch of B rows is rows s B .. s B + B - 1 of that order: a function of
(spec, seed, s) alone. Whoever computes it in parts, micro-batches or processes, asks for parts of
equal size by their number, and the parts end to end are the global batch.

The held-out rows are those of each source's own split in turn, or of the folder `valid`. They have
the bytes of their text with them, so that a loss can be told in bits a byte.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, Self

import numpy as np
from pydantic import Field, model_validator

from glactl.models.spec import Spec
from glactl.tasks.mixture import Mixture, Shuffle
from glactl.tasks.packing import pack
from glactl.tasks.shards import Prepared, Split, read_manifest
from glactl.tasks.task import Batch
from glactl.tasks.tokenizer import Tokenizer


class SourceSpec(Spec):
    """One of several prepared folders. weight: its share of the rows, over the sum of weights."""

    path: str
    weight: float = Field(1.0, gt=0)


class ShardsSpec(Spec):
    """Language modelling on folders that `glactl data prepare` made; one path, or sources."""

    kind: Literal["shards"] = "shards"
    path: str | None = None
    sources: list[SourceSpec] | None = Field(None, min_length=1)
    seq_len: int = Field(2048, ge=1)  # tokens a row
    packed: bool = True  # the state begins anew at each document; false: only at each row
    valid: str | None = None  # a folder whose held-out split is taken; None: each source's own
    valid_rows: int | None = Field(None, ge=1)  # held-out rows of each folder at most

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.path is None) == (self.sources is None):
            raise ValueError("data of kind shards needs either a path or sources")
        return self

    @property
    def mixed(self) -> list[SourceSpec]:
        """The sources; of a single path one."""
        return self.sources or [SourceSpec(path=str(self.path))]

    @property
    def vocab_size(self) -> int:
        """Of the prepared tokens; reads a manifest, whose errors are those of `Prepared`."""
        return int(read_manifest(Path(self.mixed[0].path))["tokenizer"]["vocab_size"])


class ShardsTask:
    """The prepared data of `spec`; a `Task` (see there).

    Args:
        spec: which folders, and how rows are cut.
        seed: of the order of the training rows.

    Raises:
        ValueError, FileNotFoundError: see `Prepared`; also ValueError where folders are of two
            tokenizers or frames, or a split that is needed fills no row. train_batch and
            valid_batches raise Damaged, naming the file, where it is not what was written.

    Cost: the manifests in memory, and the shards that are open; tokens stay on the disk.
    """

    def __init__(self, spec: ShardsSpec, seed: int) -> None:
        self.spec = spec
        sources = [Prepared(source.path) for source in spec.mixed]
        held = sources if spec.valid is None else [Prepared(spec.valid)]
        for other in [*sources, *held]:
            _agree(sources[0], other)
        self.tokenizer: Tokenizer | None = sources[0].tokenizer()
        self.vocab_size = int(sources[0].manifest["tokenizer"]["vocab_size"])
        self._train = [source.train for source in sources]
        rows = [_rows(s, spec.seq_len) for s in sources]
        self.n_train = sum(rows)
        self._orders = [Shuffle(n, (seed, i)) for i, n in enumerate(rows)]
        self._mixture = Mixture([source.weight for source in spec.mixed])
        self._valid = [folder.valid for folder in held if folder.valid.length > 1]
        if not self._valid:
            raise ValueError(
                f"{held[0].folder} has no held-out text; name a folder that has in data.valid"
            )
        seen = [[s.fingerprint for s in sources], [h.fingerprint for h in held], spec.seq_len]
        mixed = [spec.packed, spec.valid_rows, [s.weight for s in spec.mixed]]
        self.fingerprint = hashlib.sha256(json.dumps([seen, mixed]).encode()).hexdigest()

    def train_batch(self, index: int, batch_size: int) -> Batch:
        """Rows index * batch_size and following of the global order.

        Returns:
            tokens and targets (batch_size, seq_len); cu_seqlens where the spec says packed.
        """
        source, number = self._mixture.rows(index * batch_size, batch_size)
        row = np.empty_like(number)
        for i in np.unique(source):
            row[source == i] = self._orders[i].rows(number[source == i])
        rows = [(self._train[i], int(r)) for i, r in zip(source, row, strict=True)]
        return pack(rows, self.spec.seq_len, self.spec.packed)

    def valid_batches(self, batch_size: int) -> Iterator[Batch]:
        """The held-out rows in order, with n_bytes; each folder's last row asks for what is left.

        Every token but each folder's first is asked for once (packed: but each document's first).
        """
        rows = [(split, r) for split in self._valid for r in range(self._held(split))]
        for start in range(0, len(rows), batch_size):
            yield pack(rows[start : start + batch_size], self.spec.seq_len, self.spec.packed)

    def floors(self) -> dict[str, float]:
        """{}: the text itself is not kept."""
        return {}

    def _held(self, split: Split) -> int:
        rows = -(-(split.length - 1) // self.spec.seq_len)
        return rows if self.spec.valid_rows is None else min(rows, self.spec.valid_rows)


def _rows(source: Prepared, T: int) -> int:
    """Rows of T tokens that a folder has for training."""
    n = (source.train.length - 1) // T
    if n < 1:
        raise ValueError(
            f"{source.folder} has {source.train.length} tokens to train on; one row of seq_len {T} "
            f"needs {T + 1}"
        )
    return n


def _agree(one: Prepared, other: Prepared) -> None:
    for name in ("frame", "tokenizer"):
        if one.manifest[name] != other.manifest[name]:
            raise ValueError(
                f"{one.folder} and {other.folder} were prepared with another {name} each; "
                "a mixture needs the same"
            )
