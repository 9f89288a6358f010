"""`glactl profile --tune`: tile shapes searched on the device at hand, for the Triton kernels.

From the rule's tiles on, one field of one kernel after the other takes the values around it: 4, 8
or 16 warps, 1 to 4 stages, half and twice the columns. A value is kept where its candidate

    errs, in every tensor, at most f times as much as the rule does, and two roundings         (1)
    takes at most 98 % of the time of the tiles so far, measured again beside it               (2)

and what was kept is written where, in the end, it is faster than the rule by 2 % in one case of
the gates and slower by 2 % in none (3). Each candidate runs in a process of its own,
tune_trial.py.

f is 2, and 16 for a tensor of a few numbers, the gradient of a decay of the heads: the errors of
two right kernels are two draws there, and at two heads one is twice the other in a case of 5, 16
times in a case of 250.
"""

import json as json_
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from glactl import console
from glactl.device import DeviceUnavailable, pick_device
from glactl.kernels import tuned
from glactl.models.lm import LMSpec
from glactl.models.mixers import base
from glactl.profile.plan import SLOTS, parse_dtype, parse_lengths
from glactl.profile.tune_trial import Trial, Work, parse
from glactl.spec import load
from glactl.spec_source import nearest

GAIN = 0.02  # of the time, from which a difference counts
WARPS, STAGES = (4, 8, 16), (1, 2, 3, 4)
FEW = 64  # numbers, of which two right kernels differ by 2 in one case of 10 million
TOKENS = 16_384  # of a call, so that the device is full
LIMIT = 900.0  # seconds of a candidate; the first one compiles every kernel
ENGINES = {"gla": "key", "decay": "scalar", "gsa": "slots"}  # by operator of `glactl profile`
# Kernels that have work where gates are strong only, and are timed there.
STRONG = {
    ("key", "prepare_exact"),
    ("key", "gradients_exact"),
    ("slots", "slot_gradients.1"),
}
Tiles = dict[str, dict[str, int]]
Shape = tuple[str, int, int, int, int, int]  # engine, K, V, M, heads, heads of keys
Runner = Callable[[Work, tuned.Key | None, Tiles], Trial]


class TuneFailed(RuntimeError):
    """The rule's own tiles do not run, so there is nothing to compare with."""

    exit_code = 1


@dataclass(frozen=True)
class Step:
    """A field that was changed; seconds before and after, in the case it is timed for."""

    kernel: str
    field: str
    rule: int
    found: int
    before: float
    after: float


@dataclass
class Found:
    """What a search came to.

    Attributes:
        tiles: of each kernel the fields that differ from the rule; empty where nothing is kept.
        refused: kernel, field, value and the reason of each candidate that was not believed.
        before, after: case of the gates -> seconds with the rule and with what was found.
    """

    work: Work
    key: tuned.Key
    tiles: Tiles = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    refused: list[tuple[str, str, int, str]] = field(default_factory=list)
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)


def tune_command(
    *,
    seqlen: str,
    mixers: str | None = None,
    spec: Path | None = None,
    tokens: int | None = None,
    heads: int = 4,
    width: int | None = None,
    dtype: str | None = None,
    device: str | None = None,
    json: bool = False,
    quiet: bool = False,
) -> None:
    """Run `glactl profile --tune`; the arguments are the command's options.

    Raises:
        ValueError: an option out of range, a spec or a table that cannot be used.
        DeviceUnavailable: no CUDA device.
        TuneFailed: the rule's own tiles do not run here.
    """
    lengths = parse_lengths(seqlen)
    if len(lengths) > 1:
        raise ValueError(f"seqlen is {seqlen!r}; allowed with --tune: one length")
    kind = str(parse_dtype(dtype or "bf16")).removeprefix("torch.")
    T = lengths[0]
    batch = max(1, (tokens or max(T, TOKENS)) // T)
    if spec is not None and mixers is not None:
        raise ValueError("--spec and --mixers exclude each other with --tune")
    shapes = _of_spec(spec) if spec is not None else _of_operators(mixers, heads, width or 128)
    where = pick_device(device)
    if where.type != "cuda":
        raise DeviceUnavailable(f"--tune is of the kernels of a CUDA device; this is {where}")
    file = tuned.path()
    tuned.write(file, [])  # a table that cannot be added to is found before the search
    found: list[Found] = []
    entries: list[dict[str, Any]] = []
    name = f"cuda:{where.index or 0}"  # whole: the process of a trial makes it its current device
    works = [Work(*shape, kind, T, batch, name) for shape in shapes]
    turns = sum(2 + len(c) for w in works for c in tuned.COLUMNS[w.engine].values())
    with console.progress(turns, "field", quiet=quiet) as advance:
        for work in works:
            found.append(search(work, in_a_process, advance))
            if found[-1].tiles:  # at once: a later search may fail, or be stopped
                entries.append(entry(work, found[-1].key, found[-1].tiles))
                tuned.write(file, entries[-1:])
    if json:
        console.result(
            {"path": str(file), "entries": entries, "searches": [_plain(f) for f in found]}
        )
    else:
        for f in found:
            _print(f)
    if entries:
        console.note(f"wrote {file}: {len(entries)} of {len(found)} shapes have tiles of their own")
    else:
        console.note(f"{file} is as it was: nothing is faster than the rule by 2 %")


def search(work: Work, run: Runner, advance: Callable[..., None]) -> Found:
    """Look for tiles that are faster than the rule's.

    Args:
        work: what is tuned.
        run: verifies and times one candidate, of which it is given the key and what differs from
            the rule; no key for the rule itself.
        advance: called after each field.

    Raises:
        TuneFailed: the rule's own tiles do not run.
    """
    first = run(work, None, {})
    if first.refused is not None:
        raise TuneFailed(f"{_name(work)}: the rule's tiles do not run: {first.refused}")
    bad = wrong(first, first, work.dtype)
    if bad is not None:
        raise TuneFailed(f"{_name(work)}: the rule's tiles are wrong: {bad}")
    K, V, M, R = first.key
    dtype = torch.bfloat16 if work.dtype == "bfloat16" else torch.float32  # of the operands
    found = Found(work, tuned.Key(K, V, M, R, dtype))
    rule = _rule(work.engine, found.key)
    for kernel, columns in tuned.COLUMNS[work.engine].items():
        case = "strong" if (work.engine, kernel) in STRONG else work.cases[0]
        for name in ("warps", "stages", *columns):
            _field(found, rule, first, kernel, name, case, run)
            advance(1)
    if found.tiles:
        rule_again, last = run(work, None, {}), run(work, found.key, found.tiles)
        found.before, found.after = rule_again.seconds, last.seconds
        bad = rule_again.refused or last.refused or wrong(last, first, work.dtype)
        if bad is not None or not _faster(found.before, found.after):
            found.tiles = {}
    else:
        found.before = found.after = first.seconds
    return found


def _field(
    found: Found, rule: Any, first: Trial, kernel: str, name: str, case: str, run: Runner
) -> None:
    """One step of the search: the best value of one field, kept in `found` if it is faster."""
    now = tuned.changed(found.work.engine, found.key, rule, found.tiles)
    own = getattr(tuned.kernels(now)[kernel], name)
    trials = []
    for value, tiles in candidates(found, now, kernel, name):
        trial = run(found.work, found.key, tiles)
        reason = trial.refused or wrong(trial, first, found.work.dtype)
        if reason is None:
            trials.append((trial.seconds[case], value, tiles))
        else:
            found.refused.append((kernel, name, value, reason))
    if not trials:
        return
    after, value, tiles = min(trials, key=lambda t: t[0])
    again = run(found.work, found.key, found.tiles)  # clocks drift in minutes
    before = again.seconds.get(case, 0.0)
    if after <= (1 - GAIN) * before:  # (2)
        found.steps.append(Step(kernel, name, own, value, before, after))
        found.tiles = tiles


def candidates(found: Found, now: Any, kernel: str, name: str) -> Iterator[tuple[int, Tiles]]:
    """The other values of a field that the shape allows, each with all that differs from the rule
    then."""
    own = getattr(tuned.kernels(now)[kernel], name)
    for value in {"warps": WARPS, "stages": STAGES}.get(name, (own // 2, 2 * own)):
        tiles = found.tiles | {kernel: found.tiles.get(kernel, {}) | {name: value}}
        try:
            tuned.changed(found.work.engine, found.key, now, {kernel: {name: value}})
        except ValueError:  # a width that these columns do not divide, or another kernel forbids
            continue
        if value != own:
            yield value, tiles


def wrong(trial: Trial, rule: Trial, dtype: str) -> str | None:
    """Why a candidate's results are not to be believed, by (1); None if they are right."""
    eps = torch.finfo(getattr(torch, dtype)).eps
    for name, (own, size, numbers) in rule.errors.items():
        factor = 2 if numbers >= FEW else 16
        allowed = factor * own + 2 * eps * size  # (1)
        error = trial.errors.get(name, [float("nan")])[0]
        if not error <= allowed:  # NaN too
            return f"{name}: rms error {error:.2e} > {allowed:.2e} allowed"
    return None


def in_a_process(work: Work, key: tuned.Key | None, tiles: Tiles) -> Trial:
    """Run one candidate in a process of its own; however it ends, the search goes on."""
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "tiles.json"
        if key is not None:
            table.write_text(json_.dumps([entry(work, key, tiles)]))
        try:
            done = subprocess.run(
                [sys.executable, "-m", "glactl.profile.tune_trial"],
                input=json_.dumps(asdict(work)),
                env=os.environ | {"GLACTL_TILES": str(table)},
                capture_output=True,
                text=True,
                timeout=LIMIT,
            )
        except subprocess.TimeoutExpired:
            return Trial(refused=f"not done in {LIMIT:.0f} s")
    if done.returncode == 0:
        return parse(done.stdout)
    last = (done.stderr.strip() or "no message").splitlines()[-1]
    return Trial(refused=f"its process ended with {done.returncode}: {last}")


def entry(work: Work, key: tuned.Key, tiles: Tiles) -> dict[str, Any]:
    """The entry of the table that gives `work` these tiles."""
    place = tuned.place(torch.device(work.device))
    return place | {"engine": work.engine} | key.plain | {"tiles": tiles}


def _faster(before: dict[str, float], after: dict[str, float]) -> bool:
    """(3)."""
    ratios = [after[case] / before[case] for case in before]
    return min(ratios) <= 1 - GAIN and max(ratios) <= 1 + GAIN


def _rule(engine: str, key: tuned.Key) -> Any:
    # Triton is there where a device was tuned for, not wherever this file is imported
    from glactl.kernels import triton_gla, triton_gsa, triton_scalar

    if engine == "slots":
        return triton_gsa.tiles(*key)
    rule = {"key": triton_gla.tiles, "scalar": triton_scalar.tiles}[engine]
    return rule(key.K, key.V, key.dtype)


def _of_operators(mixers: str | None, heads: int, width: int) -> list[Shape]:
    """The shapes that `glactl profile` measures its operators in."""
    names = list(ENGINES) if mixers is None else [n for n in mixers.split(",") if n]
    for name in names or [""]:
        if name not in ENGINES:
            raise ValueError(
                f"mixers has {name!r}; allowed with --tune: {', '.join(ENGINES)}"
                f"{nearest(name, list(ENGINES))}"
            )
    engines = [ENGINES[name] for name in dict.fromkeys(names)]
    return [(e, width, width, SLOTS * (e == "slots"), heads, heads) for e in engines]


def _of_spec(spec: Path) -> list[Shape]:
    """Those of the mixers of a spec's model, each once."""
    model: LMSpec = load(spec).model
    found = []
    for mixer, at in zip(model.mixers, model.depths, strict=True):
        with torch.device("meta"):
            layer: Any = mixer.build(model.d_model, model.rope, model.norm_eps, at)
        slots = getattr(layer, "slots", 0)
        if slots or isinstance(layer, base.Linear):
            engine = "slots" if slots else "key" if layer.axis == "gk" else "scalar"
            heads = getattr(layer, "heads", None) or layer.groups
            K, V = getattr(layer, "widths", None) or (layer.D, layer.D)
            found.append((engine, K, V, slots, heads, getattr(layer, "groups", heads)))
    if not found:
        raise ValueError(f"{spec} has no mixer with Triton kernels to tune")
    return list(dict.fromkeys(found))


def _name(work: Work) -> str:
    slots = f", {work.M} slots" if work.M else ""
    return (
        f"engine {work.engine}, {work.heads} heads of K {work.K}, V {work.V}{slots}, "
        f"{work.dtype}, {work.batch} x {work.seqlen} tokens"
    )


def _plain(found: Found) -> dict[str, Any]:
    return asdict(found) | {"key": found.key.plain}


def _print(found: Found) -> None:
    console.say(_name(found.work))
    rows: list[list[object]] = [
        [f"{s.kernel}.{s.field}", s.rule, s.found, 1e3 * s.before, 1e3 * s.after]
        for s in found.steps
    ]
    for case, before in found.before.items():
        what = f"fwd+bwd, {case}"
        rows.append([what, None, None, 1e3 * before, 1e3 * found.after.get(case, before)])
    console.table(["", "rule", "found", "ms before", "ms after"], rows)
    if found.steps and not found.tiles:
        console.say("not kept: together they are not faster than the rule in every case")
    if found.refused:
        columns = ["refused", "value", "reason"]
        console.table(columns, [[f"{k}.{n}", v, why] for k, n, v, why in found.refused])
