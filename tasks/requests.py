"""Questions in text, answered by an engine: tokens, cache and ranks lie between the two.

A continuation is told from its context as lm-eval does it: spaces at the context's end move to the
continuation, the whole text is encoded, and what follows as many tokens as the context alone has
is the continuation. A text that continues nothing follows the token that begins texts.
"""

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from lm_eval.models.utils import normalize_gen_kwargs

from glactl.models.sampling import Sampling
from glactl.tasks.cache import Cache, request_key
from glactl.tasks.engine import Ask, Engine, Pair
from glactl.tasks.ranks import ALONE, Ranks

Progress = Callable[[int, str], AbstractContextManager[Callable[..., None]]]

DEFAULT_NEW_TOKENS = 256  # of a request that names no limit, as in lm-eval


@contextmanager
def _silent(total: int, label: str) -> Iterator[Callable[..., None]]:
    yield lambda n=1: None


class Requests:
    """What may be asked of an engine.

    Args:
        engine: answers.
        cache: what was answered before, and where answers are kept; None: for this object alone.
        progress: progress(total, label) is entered for each kind of request and yields a function
            that takes the number of requests done; None shows nothing.
        ranks: who shares the work.

    Attributes:
        truncated: requests whose context was cut from the left to the model's max_length.
        cached: requests that were answered before.
    """

    def __init__(
        self,
        engine: Engine,
        cache: Cache | None = None,
        progress: Progress | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.engine, self.ranks = engine, ranks
        self.cache = Cache() if cache is None else cache
        self.progress = progress or _silent
        self.truncated = self.cached = 0

    def loglikelihood(
        self, pairs: Sequence[tuple[str, str]], revisions: Sequence[str] | None = None
    ) -> list[tuple[float, bool]]:
        """(log-likelihood in nats, is_greedy) of every (context, continuation).

        Args:
            pairs: texts.
            revisions: of the task and data of each, for the cache; None: "".
        """
        keys = self._keys("loglikelihood", pairs, revisions)

        def answer(rows: list[int], keep: Callable[[int, Any], None]) -> None:
            asked = self._pairs([pairs[row] for row in rows])
            self.engine.score(asked, lambda i, found: keep(i, list(found)))

        lengths = [len(context) + len(continuation) for context, continuation in pairs]
        # answers to one question stay on one rank, which reads it once
        contexts = [context for context, _ in pairs]
        found = self._answered("loglikelihood", keys, lengths, contexts, answer)
        return [(float(nats), bool(greedy)) for nats, greedy in found]

    def rolling(self, texts: Sequence[str], revisions: Sequence[str] | None = None) -> list[float]:
        """The log-likelihood in nats of every whole text."""
        keys = self._keys("rolling", texts, revisions)

        def answer(rows: list[int], keep: Callable[[int, Any], None]) -> None:
            # the token that begins a text stands before it in any case
            ids = self.engine.encode([texts[row] for row in rows], bos=False)
            self.engine.rolling(ids, keep)

        return self._answered("rolling", keys, list(map(len, texts)), keys, answer)

    def by_position(
        self, texts: Sequence[str], bounds: Sequence[int], revisions: Sequence[str] | None = None
    ) -> list[list[list[float]]]:
        """For every text [nats, tokens] of each part of it, part k from bounds[k] to bounds[k + 1].

        The last part has no end; parts that a text does not reach are left out.
        """
        asked = [[text, list(bounds)] for text in texts]
        keys = self._keys("positions", asked, revisions)

        def answer(rows: list[int], keep: Callable[[int, Any], None]) -> None:
            ids = self.engine.encode([texts[row] for row in rows], bos=False)
            self.engine.nats(ids, lambda i, nats: keep(i, _parts(nats, bounds)))

        return self._answered("positions", keys, list(map(len, texts)), keys, answer)

    def generate(
        self,
        asked: Sequence[tuple[str, dict[str, Any]]],
        revisions: Sequence[str] | None = None,
    ) -> list[str]:
        """The continuation of every (context, lm-eval's generation arguments), up to a stop.

        With do_sample the n-th request of one kind draws the n-th text.
        """
        alike = {repr(kwargs): kwargs for _, kwargs in asked}
        normal = {k: normalize_gen_kwargs(v, DEFAULT_NEW_TOKENS) for k, v in alike.items()}
        settings: list[Any] = [normal[repr(kwargs)] for _, kwargs in asked]
        sampled = [_sampling(s) for s in settings]
        times: dict[str, int] = {}
        what = []
        for (context, _), s, sampling in zip(asked, settings, sampled, strict=True):
            one = [context, s["until"], s["max_gen_toks"], repr(sampling)]
            number = 0
            if s["do_sample"]:
                key = request_key("", "", *one)
                number = times[key] = times.get(key, -1) + 1
            what.append([*one, number])
        keys = self._keys("generate", what, revisions)

        def answer(rows: list[int], keep: Callable[[int, Any], None]) -> None:
            prompts = self.engine.encode([asked[row][0] for row in rows])
            asks = [
                Ask(
                    ids or [self.engine.first],
                    settings[row]["max_gen_toks"],
                    tuple(settings[row]["until"]),
                    sampled[row],
                    int(keys[row], 16),
                )
                for row, ids in zip(rows, prompts, strict=True)
            ]
            self.engine.generate(asks, keep)

        lengths = [len(context) for context, _ in asked]
        return self._answered("generate", keys, lengths, keys, answer)

    def _keys(self, kind: str, asked: Sequence[Any], revisions: Sequence[str] | None) -> list[str]:
        of = [""] * len(asked) if revisions is None else revisions
        parts = [(one,) if isinstance(one, str) else one for one in asked]
        return [request_key(r, kind, *one) for r, one in zip(of, parts, strict=True)]

    def _answered(
        self,
        kind: str,
        keys: list[str],
        lengths: list[int],
        groups: Sequence[Hashable],
        answer: Callable[[list[int], Callable[[int, Any], None]], None],
    ) -> list[Any]:
        """The answers of all keys; those that the cache lacks are asked for, each once.

        answer(rows, keep) calls keep(i, value) for every i of rows, by its number in them.
        """
        counts = Counter(keys)
        rows: dict[str, int] = {}
        for row, key in enumerate(keys):
            rows.setdefault(key, row)
        share = self._share(list(rows.values()), lengths, groups)
        # of each answer also whether it was there before; ranks may not see the same file
        made = {keys[r]: (*self.cache[keys[r]], True) for r in share if keys[r] in self.cache}
        mine = [row for row in share if keys[row] not in made]
        with self.progress(len(keys), kind) as advance:
            if made:
                advance(sum(counts[key] for key in made))

            def keep(i: int, value: Any) -> None:
                key = keys[mine[i]]
                self.cache.add(key, value, i in self.engine.cut)
                made[key] = (*self.cache[key], False)
                advance(counts[key])

            answer(mine, keep)
            everyone = self.ranks.together(made)
            if others := sum(counts[key] for key in everyone if key not in made):
                advance(others)
        found = [everyone[key] for key in keys]
        self.truncated += sum(cut for _, cut, _ in found)
        self.cached += sum(known for _, _, known in found)
        return [value for value, _, _ in found]

    def _share(self, rows: list[int], lengths: list[int], groups: Sequence[Hashable]) -> list[int]:
        """The part of `rows` that this rank answers; those of one group stay together."""
        members: dict[Hashable, list[int]] = {}
        for row in rows:
            members.setdefault(groups[row], []).append(row)
        longest = sorted(members.values(), key=lambda m: (-max(lengths[r] for r in m), m[0]))
        return [row for group in self.ranks.mine(longest) for row in group]

    def _pairs(self, texts: Sequence[tuple[str, str]]) -> list[Pair]:
        """Contexts and continuations in tokens; contexts are not empty."""
        moved = []
        for context, continuation in texts:
            kept = context.rstrip()
            moved.append((kept, context[len(kept) :] + continuation))
        wholes = self.engine.encode([context + rest for context, rest in moved])
        # answers to one question have one context
        contexts = list(dict.fromkeys(context for context, _ in moved if context))
        encoded = dict(zip(contexts, self.engine.encode(contexts), strict=True))
        alone = [i for i, (context, _) in enumerate(moved) if not context]
        rest = self.engine.encode([moved[i][1] for i in alone], bos=False)
        found: list[Pair] = []
        for (context, _), whole in zip(moved, wholes, strict=True):
            n = len(encoded[context]) if context else 0
            found.append((whole[:n], whole[n:]))
        for i, ids in zip(alone, rest, strict=True):
            first = self.engine.first
            # a continuation may itself begin with the token that begins texts
            begins = len(ids) > 0 and ids[0] == first
            found[i] = (ids[:1], ids[1:]) if begins else ([first], ids)
        return found


def _parts(nats: Sequence[float], bounds: Sequence[int]) -> list[list[float]]:
    ends = [*bounds[1:], len(nats)]
    parts = (nats[a:b] for a, b in zip(bounds, ends, strict=True) if a < len(nats))
    return [[sum(part), len(part)] for part in parts]


def _sampling(settings: Any) -> Sampling:
    """lm-eval's generation arguments as ours; greedy unless do_sample."""
    if not settings["do_sample"]:
        return Sampling()
    return Sampling(
        temperature=float(settings.get("temperature") or 1.0),
        top_k=settings.get("top_k") or None,
        top_p=float(settings.get("top_p") or 1.0),
        seed=int(settings.get("seed") or 0),
    )
