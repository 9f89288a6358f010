"""The trials of `glactl mqar`: a preset, the command's options, and the run specs they make.

A preset is YAML. `run` is a run spec without what the sweep varies; `lengths` says what else
changes with data.seq_len (the pairs, the batch), `mixers` what else changes with the mixer, both as
parts of a run spec; `dims`, `lrs` and `seeds` are the values of model.d_model, optim.lr and seed.
A later one of run, lengths, mixers and the grid's own values wins. `form` is identity, a mixer in
every layer, or hybrid, a gated convolution first and the mixer in every second layer; a list of
mixers stays as it is.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from glactl.models.cost import lm_cost
from glactl.models.lm import LMSpec
from glactl.models.mixers import KINDS
from glactl.spec import RunSpec, check, spec_hash, with_vocab
from glactl.spec_source import Place, Source, SpecError, nearest, preset_names, preset_text
from glactl.sweep.file import GridFile, learning_rates, names, read_grid, whole_numbers
from glactl.tasks.mqar import MQARSpec

FORMS = ["identity", "hybrid"]
STEPS = {  # what trial_steps.py does, of the ways in which a spec may have a step taken
    "recompute": (False,),
    "loss": ("auto", "whole"),
    "parallel": ("auto", "none"),
}
FIRST = {"kind": "conv", "width": 3}  # of a hybrid


@dataclass(frozen=True)
class Trial:
    """One run of the sweep.

    key is spec_hash(spec); state_bytes is what one sequence keeps after data.seq_len tokens (fp32);
    work is the floating point operations of all its steps and validations.
    """

    mixer: str
    dim: int
    lr: float
    seed: int
    spec: RunSpec
    key: str
    params: int
    state_bytes: int
    work: float

    @property
    def data(self) -> MQARSpec:
        """Of the spec."""
        assert isinstance(self.spec.data, MQARSpec)  # make_grid lets nothing else through
        return self.spec.data

    @property
    def label(self) -> str:
        """The trial in a few words."""
        return f"{self.mixer} d {self.dim} lr {self.lr:g} seed {self.seed}"


@dataclass(frozen=True)
class Grid:
    """A whole sweep, checked: every trial's spec is valid."""

    preset: str
    form: str
    dims: list[int]
    mixers: dict[str, dict[str, Any]]  # name -> what it changes in the run spec
    lrs: list[float]
    seeds: list[int]
    run: dict[str, Any]  # the run spec that all trials start from
    cells: list[list[Trial]]  # the rates of one (dim, mixer, seed), in the order they are tried

    @property
    def trials(self) -> list[Trial]:
        """All trials, in order."""
        return [t for cell in self.cells for t in cell]

    @property
    def key(self) -> str:
        """The sha256 (64 hex digits) of its trials' keys: what a table or a figure stands for."""
        return hashlib.sha256(" ".join(sorted(t.key for t in self.trials)).encode()).hexdigest()

    @property
    def slices(self) -> list[str]:
        """Lengths and numbers of pairs that are asked for, each "L/n", in order."""
        return slice_names(self.trials[0].data)

    @property
    def title(self) -> str:
        """The data in a few words."""
        data = self.trials[0].data
        if data.train is None:
            rows = f"{data.pairs} pairs in {data.seq_len} tokens"
        else:
            most = max(data.segments("train"), key=lambda part: (part.seq_len, part.pairs))
            rows = f"trained up to {most.seq_len}/{most.pairs}, asked up to {self.slices[-1]}"
        return f"MQAR, {rows}, vocabulary {data.vocab_size:,}"

    def resolved(self) -> str:
        """The grid as YAML, the key of every trial beside it."""
        trials = {
            t.key: {"mixer": t.mixer, "dim": t.dim, "lr": t.lr, "seed": t.seed} for t in self.trials
        }
        names = ("key", "preset", "form", "dims", "lrs", "seeds", "mixers", "run")
        return yaml.safe_dump(
            {name: getattr(self, name) for name in names} | {"trials": trials}, sort_keys=False
        )


def make_grid(
    preset: str | None = None,
    *,
    file: Path | None = None,
    dims: str | None = None,
    mixers: str | None = None,
    lrs: str | None = None,
    seeds: str | None = None,
    pairs: int | None = None,
    seqlen: int | None = None,
    form: str | None = None,
) -> Grid:
    """The sweep of `preset`, changed by a file, changed by the options that are not None.

    Args:
        preset: a name of `presets()`; None is the file's, or "quick".
        file: a grid; see file.py.
        dims, lrs, seeds: numbers with commas between them.
        mixers: names with commas between them: the preset's, or a mixer's kind; "all": the preset's
            and every other kind but conv, which alone sees two tokens back.
        pairs, seqlen: data.pairs and data.seq_len.
        form: one of FORMS.

    Raises:
        ValueError: an option that is not such a list, or a trial whose spec is not valid.
        FileNotFoundError: no such file.
    """
    asked = read_grid(file)
    base = preset or asked.values.get("preset") or "quick"
    data = read_preset(base)
    changed: dict[str, Any] = {
        "run": _merged(data["run"], asked.part("run")),
        "lengths": _merged(data.get("lengths", {}), asked.part("lengths")),
    }

    def listed(key: str, option: str | None) -> tuple[str, str]:
        if option is not None:
            return f"--{key}", option
        return asked.text(key) or (f"preset {base}: {key}", ",".join(map(str, data[key])))

    widths = whole_numbers(*listed("dims", dims), least=1)
    rates = learning_rates(*listed("lrs", lrs))
    draws = whole_numbers(*listed("seeds", seeds), least=0)
    where, form = asked.text("form") or ("", "") if form is None else ("--form", form)
    form = form if where else data.get("form", "identity")
    if form not in FORMS:
        raise ValueError(f"{where} is {form!r}; allowed: {', '.join(FORMS)}{nearest(form, FORMS)}")
    chosen = _mixers(data["mixers"], mixers, asked)

    run, places = changed["run"], asked.below("run")
    if seqlen is not None:
        run = _merged(run, {"data": {"seq_len": seqlen}})
        places["data", "seq_len"] = f"--seqlen {seqlen}"
    run = _merged(run, changed["lengths"].get(run["data"].get("seq_len"), {}))
    run = _merged(run, asked.part("run"))
    if pairs is not None:
        run = _merged(run, {"data": {"pairs": pairs}})
        places["data", "pairs"] = f"--pairs {pairs}"
    cells = [
        [_trial(run, places, form, n, changes, dim, lr, seed) for lr in rates]
        for dim in widths
        for n, changes in chosen.items()
        for seed in draws
    ]
    return Grid(asked.name or base, form, widths, chosen, rates, draws, run, cells)


def _mixers(
    known: dict[str, dict[str, Any]], option: str | None, asked: GridFile
) -> dict[str, dict[str, Any]]:
    """The mixers that were asked for, and what each changes.

    A change that says no mixer is one to the preset's of that name, or to the kind.
    """
    if isinstance(asked.values.get("mixers"), dict):
        known = known | {n: _change(known, asked, n) for n in asked.part("mixers")}
        written = "mixers", ",".join(asked.part("mixers"))
    else:
        written = asked.text("mixers") or ("mixers", ",".join(known))
    where, text = written if option is None else ("--mixers", option)
    chosen = names(where, text, "names, attention,gla")
    if chosen == ["all"]:
        chosen = [*known, *(kind for kind in KINDS if kind not in known and kind != "conv")]
    return {n: known.get(n, {"model": {"mixer": n}}) for n in chosen}


def _change(known: dict[str, dict[str, Any]], asked: GridFile, name: str) -> dict[str, Any]:
    """What a grid's mixer changes. Raises SpecError where there is no telling which mixer it is."""
    change = asked.part("mixers")[name]
    if "mixer" in change.get("model", {}):
        return change
    if name in known or name in KINDS:
        return _merged(known.get(name, {"model": {"mixer": name}}), change)
    if "mixer" in asked.part("run").get("model", {}):
        return change
    place, hint = asked.places["mixers", name], nearest(name, [*known, *KINDS])
    raise SpecError(f"{place}: mixers.{name} has no model.mixer and is no mixer's name{hint}")


def slice_names(data: MQARSpec) -> list[str]:
    """Lengths and numbers of pairs of the validation split, each "L/n" and once, in order."""
    return list(dict.fromkeys(f"{part.seq_len}/{part.pairs}" for part in data.segments("valid")))


def presets() -> list[str]:
    """The names of the presets."""
    return preset_names("presets_mqar")


def read_preset(name: str) -> dict[str, Any]:
    """The data of a preset. Raises SpecError where there is none of this name."""
    data: dict[str, Any] = yaml.safe_load(preset_text("presets_mqar", name))
    return data


def _trial(
    run: dict[str, Any],
    places: dict[Place, str],
    form: str,
    mixer: str,
    changes: dict[str, Any],
    dim: int,
    lr: float,
    seed: int,
) -> Trial:
    """One checked trial; a fault in its spec is reported at the option that it came from."""
    varied = {"name": f"mqar-{mixer}-{dim}", "seed": seed, "optim": {"lr": lr}}
    data = _merged(_merged(run, changes), _merged(varied, {"model": {"d_model": dim}}))
    alone = data["model"].get("mixer")
    if form == "hybrid" and alone is not None and not isinstance(alone, list):
        data["model"]["mixer"] = [FIRST, alone]
    origin: dict[Place, str] = {
        (): f"--mixers {mixer} --dims {dim}",
        ("model", "mixer"): f"--mixers {mixer}",
    }
    # a fault of the whole data (4 pairs > seq_len) is at "data": name the options that touched it
    touched = " ".join(dict.fromkeys(line for p, line in places.items() if p[0] == "data"))
    if touched:
        origin["data",] = touched
    spec = check(Source(data, {**origin, **places}))
    if not isinstance(spec.data, MQARSpec):
        raise ValueError(f"data.kind is {spec.data.kind!r}; a sweep's allowed: mqar")
    _check_steps(spec)
    model = with_vocab(spec, spec.data.vocab_size).model
    cost = lm_cost(model, spec.data.seq_len)
    work = training_work(spec, spec.data, model)
    return Trial(mixer, dim, lr, seed, spec, spec_hash(spec), cost.params, cost.state_bytes, work)


def _check_steps(spec: RunSpec) -> None:
    """Raise ValueError where a spec asks for what the steps of a trial do not have."""
    if spec.init is not None:
        raise ValueError("init is set; the trials of a sweep begin with weights of their own")
    for name, allowed in STEPS.items():
        value = getattr(spec.train, name)
        if value not in allowed:
            said = " or ".join(map(str, allowed))
            raise ValueError(f"train.{name} is {value}; allowed in a sweep: {said}")
    if spec.train.accumulate == "auto":
        raise ValueError("train.accumulate is auto; allowed in a sweep: a number")


def training_work(spec: RunSpec, data: MQARSpec, model: LMSpec) -> float:
    """Floating point operations of the steps and validations of `spec` on `data`."""
    plan, of_row, of_validation = spec.train, 0.0, 0.0
    for part in data.segments("train"):
        share = part.rows / data.n_train
        of_row += share * part.seq_len * lm_cost(model, part.seq_len).flops_token_train
    for part in data.segments("valid"):
        of_validation += part.rows * part.seq_len * lm_cost(model, part.seq_len).flops_token
    validations = -(-plan.steps // plan.valid_every)
    return plan.steps * spec.rows * of_row + validations * of_validation


def _merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with the values of `changes`; mappings are merged, but for a mixer: it is replaced."""
    result = dict(base)
    for key, value in changes.items():
        inner = result.get(key)
        both = isinstance(inner, dict) and isinstance(value, dict) and key != "mixer"
        result[key] = _merged(inner, value) if both else value  # type: ignore[arg-type]
    return result
