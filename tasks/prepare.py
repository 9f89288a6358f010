"""A source of text to a folder of shards (shards.py), on all cores, in the order of the source.

This process reads the source and hands out shards; the others turn them into tokens and write them
(prepare_shard.py). The files are the same bytes whatever the number of processes and however often
the work was stopped. A shard is finished once its record, shards/00000.json, is there: behind its
other files, each synced and renamed into its place, with a hash of the text it was made from.
Preparing a folder that was begun reads the source again from its start, holds the text of finished
shards against their records and makes those that lack; a data set of the hub is not read again, but
from behind the shards that are finished without a gap. A process that is killed loses the shards at
hand. At the end the manifest takes the records' place.

Reading JSON lines takes one process 1 / 95 of the time in which Mistral's tokenizer turns them into
tokens (128 against 1.34 MB/s on one core), so that it keeps as many others busy.
"""

import fcntl
import json
import multiprocessing
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from errno import EDQUOT, EFBIG, ENOSPC
from itertools import chain
from pathlib import Path
from typing import Any

from glactl.tasks.errors import Interrupted, NoSpace
from glactl.tasks.frames import Frames, ends
from glactl.tasks.prepare_shard import (
    SPLITS,
    Job,
    Recipe,
    make,
    record_path,
    start,
    to_do,
    worker_make,
)
from glactl.tasks.shards import FORMAT, MANIFEST, commit, fingerprint, read_manifest
from glactl.tasks.tokenizer import Tokenizer, load_tokenizer, tokenizer_hash

BEGUN = "prepare.json"  # the recipe of a folder that is not finished


@dataclass(frozen=True)
class Progress:
    """Shards finished so far, those among them that were there before, and what is in them."""

    shards: int = 0
    kept: int = 0
    documents: int = 0
    tokens: int = 0
    bytes: int = 0

    def plus(self, record: dict[str, Any], kept: bool) -> "Progress":
        """With one more shard."""
        found = [record[split] for split in SPLITS if record[split]]
        more = {n: sum(f[n] for f in found) for n in ("documents", "tokens", "bytes")}
        more |= {"shards": 1, "kept": int(kept)}
        return Progress(**{name: value + more[name] for name, value in asdict(self).items()})


def prepare(recipe: Recipe, out: Path, jobs: int) -> Iterator[Progress]:
    """Make the folder `out` of `recipe`, or finish it.

    Args:
        recipe: what of.
        out: made where it is not there; it may have been begun by the same recipe.
        jobs: processes that make shards, 1 or more; with 1 it is this one.

    Yields:
        Progress, whenever a shard is finished; the last one once the manifest is there.

    Raises:
        ValueError, FileNotFoundError, DataUnavailable: the source or the tokenizer cannot be used,
            see `documents` and `load_tokenizer`; `out` is of another recipe or holds other
            things; the source changed since `out` was begun; a split has no document.
        NoSpace: the disk is full. Interrupted: SIGINT. OSError: a process was killed.
            All leave the finished shards for a later call.
    """
    tokenizer = load_tokenizer(recipe.tokenizer)
    if recipe.frame == "bos" and tokenizer.bos_id is None:
        raise ValueError(f"frame is bos, but tokenizer {recipe.tokenizer} has no BOS")
    plan = asdict(recipe) | {"tokenizer_sha256": tokenizer_hash(tokenizer)}
    if (out / MANIFEST).is_file():
        _same(out, read_manifest(out)["recipe"], plan)
        yield _finished(out)
        return
    if (out / BEGUN).is_file():
        _same(out, json.loads((out / BEGUN).read_bytes()), plan)
    before = _marked(out)
    work = to_do(recipe, before)
    first = next(work, None)  # a source that cannot be read leaves no folder
    if first is None and not before:
        raise ValueError(f"source {recipe.source} has no text")
    try:
        with _folder(out, plan):
            tokenizer.save(out / "tokenizer")
            done, records = Progress(), {}
            work = chain([] if first is None else [first], work)
            todo = chain(before, _unfinished(work, out))
            for record, kept in _records(todo, recipe, out, jobs):
                done = done.plus(record, kept)
                records[record["index"]] = record
                yield done
            _finish(out, plan, tokenizer, [records[i] for i in sorted(records)])
    except KeyboardInterrupt:
        raise Interrupted(f"stopped; {_later(out)}") from None
    except BrokenProcessPool:
        raise OSError(f"a process was killed; {_later(out)}, with fewer --jobs") from None
    except OSError as error:
        if error.errno not in (ENOSPC, EDQUOT, EFBIG):
            raise
        raise NoSpace(f"no space left on the disk of {out}; {_later(out)}") from None
    yield done


def _later(out: Path) -> str:
    finished = len(list((out / "shards").glob("*.json")))
    return f"{out} keeps {finished} finished shards, and the same command goes on"


def _records(
    todo: Iterator[Job | dict[str, Any]], recipe: Recipe, out: Path, jobs: int
) -> Iterator[tuple[dict[str, Any], bool]]:
    """The record of each shard once it is there, and whether it was there before; in any order."""
    if jobs == 1:
        tokenizer = load_tokenizer(str(out / "tokenizer"))
        for found in todo:
            if isinstance(found, Job):
                yield make(found, tokenizer, recipe, out), False
            else:
                yield found, True
        return
    # threads, as tokenizers has, do not live in a fork: forked is a process that has none
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([start.__module__])
    with ProcessPoolExecutor(jobs, context, start, (recipe, out)) as pool:
        running: set[Future[dict[str, Any]]] = set()
        try:
            for found in todo:
                if not isinstance(found, Job):
                    yield found, True
                    continue
                running.add(pool.submit(worker_make, found))
                if len(running) < 2 * jobs:
                    continue
                ready, running = wait(running, return_when=FIRST_COMPLETED)
                yield from ((f.result(), False) for f in ready)
            while running:
                ready, running = wait(running, return_when=FIRST_COMPLETED)
                yield from ((f.result(), False) for f in ready)
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)  # those at hand are finished and kept
            raise


def _marked(out: Path) -> list[dict[str, Any]]:
    """The records from the first on, without a gap, where the source can go on behind them."""
    found: list[dict[str, Any]] = []
    while (path := record_path(out, len(found))).is_file():
        found.append(json.loads(path.read_bytes()))
    return found if found and found[-1]["mark"] is not None else []


def _unfinished(found: Iterable[Job], out: Path) -> Iterator[Job | dict[str, Any]]:
    """The jobs of a source; in the place of a finished one its record."""
    for job in found:
        path = record_path(out, job.index)
        if not path.is_file():
            yield job
            continue
        record: dict[str, Any] = json.loads(path.read_bytes())
        if record["text"] != job.text:
            raise ValueError(
                f"the text of shard {job.index} is not what it was when {out} was begun; "
                "prepare into another folder"
            )
        yield record


@contextmanager
def _folder(out: Path, plan: dict[str, Any]) -> Iterator[None]:
    """The folder with its recipe, locked."""
    begun = out / BEGUN
    if out.is_dir() and not begun.is_file() and any(out.iterdir()):
        raise ValueError(f"{out} holds other things; prepare into an empty or new folder")
    (out / "shards").mkdir(parents=True, exist_ok=True)
    if not begun.is_file():
        commit(begun, json.dumps(plan).encode())
    with begun.open("rb") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{out} is being prepared by another process") from None
        yield


def _same(out: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    changed = [
        f"{name} {then.get(name)} -> {now[name]}" for name in now if then.get(name) != now[name]
    ]
    if changed:
        raise ValueError(
            f"{out} was prepared with other settings: {', '.join(changed)}; "
            "prepare into another folder"
        )


def _finish(
    out: Path, plan: dict[str, Any], tokenizer: Tokenizer, records: list[dict[str, Any]]
) -> None:
    """Write the manifest in the place of the records."""
    splits = {}
    for split in SPLITS:
        shards = [r[split] for r in records if r[split]]
        sums = {n: sum(s[n] for s in shards) for n in ("documents", "tokens", "bytes")}
        splits[split] = sums | {"shards": shards}
    total = sum(splits[split]["documents"] for split in SPLITS)
    for split, other in (("train", "smaller"), ("valid", "larger")):
        if not splits[split]["documents"] and (split == "train" or plan["valid"] > 0):
            raise ValueError(
                f"of {total} documents none is for {split} at --valid {plan['valid']:g}; more "
                f"documents or a {other} share give some, prepared into another folder"
            )
    lead, tail = ends(tokenizer, plan["frame"])
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "recipe": plan,
        "tokenizer": {
            "sha256": plan["tokenizer_sha256"],
            "vocab_size": tokenizer.vocab_size,
            "end": lead[0] if lead and not tail else None,
        },
        "frame": plan["frame"],
        "dtype": Frames(tokenizer, plan["frame"]).width.__name__,
        "splits": splits,
    }
    manifest["fingerprint"] = fingerprint(manifest)
    commit(out / MANIFEST, json.dumps(manifest, indent=1).encode())
    _clean(out)


def _clean(out: Path) -> None:
    for path in [*(out / "shards").glob("*.json"), out / BEGUN]:
        path.unlink(missing_ok=True)


def _finished(out: Path) -> Progress:
    """What a finished folder has; all of it was there before."""
    _clean(out)  # a process may have been killed between the manifest and this
    splits = read_manifest(out)["splits"].values()
    sums = {n: sum(s[n] for s in splits) for n in ("documents", "tokens", "bytes")}
    shards = len({s["name"].partition("-")[2] for split in splits for s in split["shards"]})
    return Progress(shards=shards, kept=shards, **sums)
