"""A run folder: what was asked, with what it was made, how it went, and its checkpoints.

    runs/NAME-7f3a91/             the spec's name and the first 6 digits of its hash
      spec.yaml                   what the user wrote, byte for byte
      spec.resolved.yaml          every default written out
      manifest.json               versions, platform, git, arguments, seed; fingerprints of the data
      tokenizer/                  where the task has one
      metrics.jsonl               a line a step
      events.jsonl                start, resume, save, skip, stop, end
      init.json                   where its weights come from, of a run that begins with others'
      checkpoints/step-000123/    see checkpoints.py

The folder appears whole, and no run is ever written into another's.
"""

import json
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glactl.console import finite
from glactl.manifest import manifest_of, now
from glactl.spec import RunSpec, load, resolved_yaml, spec_hash

if TYPE_CHECKING:  # a run is listed and opened without torch's distributed parts
    import torch

    from glactl.models.lm import LM
    from glactl.tasks import Task
    from glactl.tasks.tokenizer import Tokenizer

FREE = (  # what a resume may change
    "name",
    *(
        f"train.{field}"
        for field in (
            *("log_every", "save_every", "keep_last", "keep_every", "accumulate", "parallel"),
            *("loss", "compile", "recompute", "capture"),
        )
    ),
)


class NoRun(FileNotFoundError):
    """There is no such run, or none that has saved anything yet."""


@dataclass(frozen=True)
class Position:
    """Where a run is in its data: sample `sample` of the order that (seed, fingerprint) fix.

    step counts the optimizer steps done, tokens the tokens read, and sample the rows read, since
    the start; n_train is the rows of an epoch. done: the run has ended by its own rules. ahead: the
    hash of the next global batches, None of a checkpoint that has none.
    """

    seed: int
    n_train: int
    fingerprint: str
    step: int = 0
    tokens: int = 0
    sample: int = 0
    done: bool = False
    ahead: str | None = None

    @property
    def epoch(self) -> int:
        """Epochs completed."""
        return self.sample // self.n_train


class Run:
    """An existing run folder.

    lead: whether this process writes metrics and events; of several that train one model, one does.
    """

    def __init__(self, path: Path | str) -> None:
        self.path, self.lead = Path(path), True
        self.spec: RunSpec = load(self.path / "spec.resolved.yaml")

    @classmethod
    def create(cls, spec: RunSpec, text: str, root: Path | str = "runs") -> "Run":
        """Make the folder of a new run, with a suffix -2, -3, ... where its name is taken.

        Args:
            spec: the checked spec.
            text: the YAML that the user wrote.
            root: the folder to make it in.
        """
        root = Path(root)
        root.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=".new-", dir=root))
        part.chmod(0o755)  # mkdtemp's folders are its user's alone
        try:
            (part / "spec.yaml").write_text(text)
            (part / "spec.resolved.yaml").write_text(resolved_yaml(spec))
            _write_json(part / "manifest.json", manifest_of(spec))
            (part / "checkpoints").mkdir()
            stem = f"{spec.name}-{spec_hash(spec)[:6]}"
            for n in range(1, 10_000):
                path = root / (stem if n == 1 else f"{stem}-{n}")
                try:
                    part.rename(path)  # fails on a folder that is not empty: no race, no overwrite
                    return cls(path)
                except OSError:
                    if not path.exists():
                        raise
            raise FileExistsError(f"{root} has 9,999 runs named {stem}")
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise

    @classmethod
    def open(cls, path: Path | str) -> "Run":
        """The run at `path`. Raises NoRun."""
        path = Path(path)
        if not (path / "spec.resolved.yaml").exists():
            beside = sorted(p.parent.name for p in path.parent.glob("*/spec.resolved.yaml"))
            hint = f"; runs there: {', '.join(beside[-5:])}" if beside else ""
            raise NoRun(f"{path} is not a run folder{hint}")
        return cls(path)

    @classmethod
    def newest(cls, root: Path | str = "runs") -> "Run":
        """The run in `root` that saved a checkpoint last. Raises NoRun."""
        saved = Path(root).glob("*/checkpoints/step-*/COMMITTED")
        times = [(m.stat().st_mtime_ns, m.parent.parent.parent) for m in saved]
        if not times:
            raise NoRun(f"no run with a checkpoint in {root}; make one: glactl train")
        return cls.open(max(times)[1])

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest, as it stands."""
        found: dict[str, Any] = json.loads((self.path / "manifest.json").read_text())
        return found

    def begin(self, spec: RunSpec, task: "Task", resume: bool = False) -> None:
        """Record the complete `spec` and what `task` is; with `resume`, check that neither changed.

        Raises:
            NoRun: with `resume`, where nothing was saved.
            ValueError: with `resume`, where something differs: each difference, old -> new.
        """
        from glactl.tasks.tokenizer import tokenizer_hash

        data = {
            "fingerprint": task.fingerprint,
            "vocab_size": task.vocab_size,
            "n_train": task.n_train,
            "tokenizer": None if task.tokenizer is None else tokenizer_hash(task.tokenizer),
        }
        self.spec, plain = spec, spec.model_dump(mode="json")
        if resume:
            self.newest_checkpoint()
            then = self.manifest
            changed = _differences(_flat(then["spec"]), _flat(plain), FREE)
            changed += _differences(_flat(then["data"], "data "), _flat(data, "data "))
            if changed:
                raise ValueError(
                    f"{self.path} cannot be resumed, it was made with other settings: "
                    f"{', '.join(changed)}; start a new run instead"
                )
            return
        if not self.lead:
            return
        if task.tokenizer is not None:
            task.tokenizer.save(self.path / "tokenizer")
        _replace(self.path / "spec.resolved.yaml", resolved_yaml(spec))
        manifest = self.manifest | {"data": data, "spec": plain}
        _replace(self.path / "manifest.json", json.dumps(manifest, indent=1) + "\n")
        self.event("start", argv=sys.argv)

    def save_checkpoint(
        self, model: "LM", optimizer: "torch.optim.Optimizer", at: Position, keep: int = 2
    ) -> Path:
        """Commit the state at `at`; all but the last `keep` checkpoints go."""
        from glactl import checkpoints

        began = time.monotonic()
        position = asdict(at) | {"epoch": at.epoch}
        path = checkpoints.save(
            self.path / "checkpoints", at.step, model, optimizer, position, keep
        )
        self.event("save", step=at.step, seconds=round(time.monotonic() - began, 3))
        return path

    def save_weights(self, model: "LM", at: Position) -> Path:
        """Commit the weights at `at` alone: an optimizer begins anew behind them."""
        from glactl import checkpoints

        state = model.state_dict()
        shapes = {name: tuple(x.shape) for name, x in state.items()}
        path = checkpoints.save_weights(
            self.path / "checkpoints",
            at.step,
            shapes,
            lambda name: state[name].detach().cpu(),
            asdict(at) | {"epoch": at.epoch},
        )
        self.event("save", step=at.step)
        return path

    def record_start(self, start: dict[str, Any]) -> None:
        """Note where the weights come from: whole in init.json, in short in the manifest."""
        _write_json(self.path / "init.json", start)
        short = {name: start[name] for name in ("source", "family", "fingerprint")}
        manifest = self.manifest | {"init": short}
        _replace(self.path / "manifest.json", json.dumps(manifest, indent=1) + "\n")

    def start(self) -> dict[str, Any] | None:
        """What record_start noted; None of a run with weights of its own."""
        path = self.path / "init.json"
        return json.loads(path.read_text()) if path.exists() else None

    def copied(self) -> frozenset[str]:
        """The weights that came from another checkpoint."""
        rows = (self.start() or {"rows": []})["rows"]
        return frozenset(row["tensor"] for row in rows if row["action"] == "copied")

    def newest_position(self) -> Position:
        """Where the newest checkpoint was taken. Raises NoRun."""
        from glactl import checkpoints

        position = checkpoints.read_position(self.newest_checkpoint())
        position.pop("epoch")
        return Position(**position)

    def load_checkpoint(
        self, model: "LM", optimizer: "torch.optim.Optimizer", at: Position
    ) -> Position:
        """Read the newest checkpoint; returns its position.

        Raises:
            NoRun: there is none.
            ValueError: it is damaged, or another data order than that of `at`.
        """
        from glactl import checkpoints

        path = self.newest_checkpoint()
        position = checkpoints.load(path, model, optimizer)
        position.pop("epoch")
        found = Position(**position)
        for name in ("seed", "n_train", "fingerprint"):
            then, now = getattr(found, name), getattr(at, name)
            if then != now:
                raise ValueError(f"{path} was made with {name} {then}, the data now has {now}")
        self._rewind(found.step)
        return found

    def _rewind(self, step: int) -> None:
        """Drop the metrics after `step`, of a process that died before it could save them."""
        if not self.lead:
            return
        path = self.path / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if line.endswith("\n")]  # the last write may be half done
        _replace(path, "".join(line for line in whole if json.loads(line)["step"] <= step))

    def newest_checkpoint(self) -> Path:
        """The newest committed checkpoint. Raises NoRun."""
        from glactl import checkpoints

        found = checkpoints.committed(self.path / "checkpoints")
        if not found:
            raise NoRun(f"{self.path} has no checkpoint")
        return found[-1]

    def load_model(
        self, device: "torch.device | str" = "cpu"
    ) -> "tuple[LM, Tokenizer | None, RunSpec]":
        """The trained model in evaluation mode, its tokenizer and the spec of the run.

        Raises NoRun where nothing is saved, ValueError where it is damaged.
        """
        from glactl import checkpoints
        from glactl.models.lm import build_lm
        from glactl.tasks.tokenizer import load_tokenizer

        path = self.newest_checkpoint()
        model = build_lm(self.spec.model, self.spec.seed, device=device)
        checkpoints.load_model(path, model)
        folder = self.path / "tokenizer"
        tokenizer = load_tokenizer(str(folder)) if folder.exists() else None
        return model.eval(), tokenizer, self.spec

    def log(self, record: dict[str, Any]) -> None:
        """Add a line to metrics.jsonl."""
        if self.lead:
            _append(self.path / "metrics.jsonl", record)

    def event(self, name: str, **details: Any) -> None:
        """Add a line to events.jsonl."""
        if self.lead:
            _append(self.path / "events.jsonl", {"event": name, "time": now(), **details})


def new_folder(stem: Path) -> Path:
    """Make the folder `stem`, with a suffix -2, -3, ... where it is taken; no result is lost."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    n, folder = 1, stem
    while True:
        try:
            folder.mkdir()
            return folder
        except FileExistsError:
            n += 1
            folder = stem.with_name(f"{stem.name}-{n}")


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested dictionaries as one with dotted keys; lists are values."""
    if not isinstance(value, dict):
        return {prefix.rstrip("."): value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flat(inner, f"{prefix}{key}.")
    return flat


def _differences(
    then: dict[str, Any], now: dict[str, Any], free: tuple[str, ...] = ()
) -> list[str]:
    names = [n for n in {**then, **now} if n not in free and then.get(n) != now.get(n)]
    return [f"{n} {then.get(n)} -> {now.get(n)}" for n in names]


def _append(path: Path, record: dict[str, Any]) -> None:
    with open(path, "a") as f:
        f.write(json.dumps(finite(record), allow_nan=False) + "\n")


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=1) + "\n")


def _replace(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.tmp")
    part.write_text(text)
    part.replace(path)
