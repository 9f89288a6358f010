"""`glactl eval`: models measured by the papers' recall protocols and by lm-eval's own tasks.

evals/MODEL/                  -2, -3, ... where the name is taken; A--B of two models
  summary.json                what was measured, on what, by which versions
  TASK.samples.jsonl          a line a document: prompt, gold, each model's output and metrics
  report.html                 the same to read, failures first
evals/cache/HASH.jsonl        answers of one model, from which a stopped evaluation goes on
evals/cache/revisions.json    of the hub's data sets, as they were read first
evals/cache/revisions.json    the hub's data sets that were read, which are read again
"""

import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from glactl import __version__, console
from glactl.device import Precision, pick_device
from glactl.evaluate.models import Reading, open_model
from glactl.evaluate.report import Measured, evaluation, show, summary, write
from glactl.evaluate.tasks import Asked, load_stock_tasks, measure, resolve
from glactl.tasks import papers, stock
from glactl.tasks.cache import Cache
from glactl.tasks.measure import BOOTSTRAP
from glactl.tasks.names import unknown
from glactl.tasks.pins import Pins
from glactl.tasks.protocols import DEFAULT_PROTOCOL, PROTOCOLS
from glactl.tasks.ranks import Ranks, join_ranks, leave_ranks
from glactl.tasks.requests import Requests

DEFAULT_TASKS = "swde,squad"


class Interrupted(Exception):
    """Stopped by a signal; what was answered is kept."""

    exit_code = 6


def eval_command(
    runs: list[str],
    *,
    tasks: str | None = None,
    suite: str | None = None,
    protocol: str | None = None,
    context_length: int | None = None,
    data_dir: Path | None = None,
    revision: str | None = None,
    sample: bool = False,
    limit: int | None = None,
    batch_tokens: int | None = None,
    max_length: int | None = None,
    bos: bool = False,
    reuse: bool = True,
    cache: bool = True,
    precision: Precision = "auto",
    out: Path = Path("evals"),
    device: str | None = None,
    json: bool = False,
    quiet: bool = False,
) -> None:
    """Run `glactl eval`; the arguments are the command's options.

    Raises:
        ValueError: an unknown task or protocol, rows that do not fit it, a context longer than the
            model, or a run that is not about text.
        FileNotFoundError: no run, no weights in it, or no such data folder, file or split.
        DataUnavailable: a data set that is neither on the hub, as far as it can be reached, nor in
            its cache.
        Interrupted: by Ctrl-C.
    """
    if sample and data_dir is not None:
        raise ValueError(f"--sample and --data-dir {data_dir} exclude each other")
    if data_dir is not None and not data_dir.is_dir():
        raise FileNotFoundError(f"--data-dir {data_dir} is not a folder")
    tasks, protocol, context_length = _what(suite, tasks, protocol, context_length)
    kept = out / "cache" if cache else None
    pins = Pins(None if kept is None else kept / "revisions.json")
    names = resolve(tasks)
    asked = Asked(*names, protocol, context_length, data_dir, sample, revision, limit, pins)
    reading = Reading(batch_tokens, bos, max_length, reuse, precision)
    began = time.monotonic()
    ranks = join_ranks()
    try:
        where = pick_device(_device(device, ranks))
        loaded = load_stock_tasks(asked)
        found = [
            _measure(name, where, reading, asked, loaded, kept, ranks, quiet)
            for name in (*runs, None)[: max(1, len(runs))]
        ]
    except KeyboardInterrupt:
        how = "the same line goes on from what was answered" if cache else "nothing was kept"
        raise Interrupted(f"stopped; {how}") from None
    finally:
        leave_ranks()
    if ranks.rank > 0:
        return
    about = {
        "glactl": __version__,
        "lm_eval": stock.lm_eval_version(),
        "suite": suite,
        "data": asked.data,
        "comparable": asked.data == "hub" and limit is None,
        "limit": limit,
        "bootstrap": BOOTSTRAP,
        "device": str(where),
        "seconds": round(time.monotonic() - began, 3),
    }
    whole = evaluation(about, found)
    folder = write(out, whole)
    if json:
        console.result(summary(whole) | {"path": str(folder)})
    else:
        show(whole)
    console.note(f"wrote {folder}/summary.json and report.html")


def _what(
    suite: str | None, tasks: str | None, protocol: str | None, context_length: int | None
) -> tuple[str, str, int | None]:
    """Tasks, protocol and context length, of a suite or as given. Raises ValueError."""
    if suite is not None:
        given = {"--tasks": tasks, "--protocol": protocol, "--context-length": context_length}
        for option in (name for name, value in given.items() if value is not None):
            raise ValueError(f"--suite {suite} says what {option} would: leave one of them out")
        known = papers.suite(suite)
        return ",".join(known.tasks), known.protocol, known.context_length
    protocol = protocol or DEFAULT_PROTOCOL
    if protocol not in PROTOCOLS:
        raise ValueError(unknown("protocol", protocol, PROTOCOLS))
    return DEFAULT_TASKS if tasks is None else tasks, protocol, context_length


def _measure(
    name: str | None,
    device: torch.device,
    reading: Reading,
    asked: Asked,
    loaded: dict[str, Any] | None,
    kept: Path | None,
    ranks: Ranks,
    quiet: bool,
) -> Measured:
    """One model on all tasks; its weights are let go at the end."""
    model = open_model(name, device, reading)
    if name is None and ranks.rank == 0:
        console.note(f"run {model.facts['run']} (the newest)")
    cache = Cache(None if kept is None else kept / f"{model.key}.jsonl")
    progress = partial(console.progress, quiet=quiet or ranks.rank > 0)
    requests = Requests(model.engine, cache, progress, ranks)
    outcomes = measure(requests, asked, loaded)
    cache.close()
    if requests.truncated and ranks.rank == 0:
        console.note(
            f"{requests.truncated} contexts were cut from the left to the model's "
            f"{model.engine.max_length} positions"
        )
    facts = model.facts | {"truncated": requests.truncated, "cached": requests.cached}
    return Measured(model.name, facts, outcomes)


def _device(name: str | None, ranks: Ranks) -> str | None:
    """The device of this rank: its own GPU where torchrun started several processes."""
    local = os.environ.get("LOCAL_RANK", "0")
    alone = ranks.world == 1 or name is not None or not torch.cuda.is_available()
    return name if alone else f"cuda:{local}"
