"""Answers that are kept: nothing is asked twice, whatever the batch, the order and the end."""

import json
import subprocess
import sys

import pytest
import torch

from glactl.models.lm import LMSpec, build_lm
from glactl.tasks import cache
from glactl.tasks.cache import Cache, request_key
from glactl.tasks.engine_lm import LMEngine
from glactl.tasks.ranks import Ranks
from glactl.tasks.requests import Requests
from glactl.tasks.tokenizer import ByteTokenizer


@pytest.fixture
def path(tmp_path):
    return tmp_path / "evals" / "cache" / "x.jsonl"


def test_answers_come_back_from_the_file(path):
    first = Cache(path)
    assert first.found == 0
    first.add("a", [-1.5, True])
    first.add("b", "text\nof two lines", True)
    first.close()
    again = Cache(path)
    assert again.found == 2
    assert again["a"] == ([-1.5, True], False)
    assert again["b"] == ("text\nof two lines", True)
    assert "c" not in again


def test_half_a_line_is_passed_over_and_swallows_nothing(path):
    first = Cache(path)
    first.add("a", 1.0)
    first.close()
    with open(path, "a") as file:
        file.write('{"key": "b", "val')
    second = Cache(path)
    assert "a" in second
    assert "b" not in second
    second.add("b", 2.0)
    second.close()
    assert Cache(path)["b"] == (2.0, False)


WRITES = """
import pathlib, runpy, sys
cache = runpy.run_path(sys.argv[1])["Cache"](pathlib.Path(sys.argv[2]))
for n in range(200):
    cache.add(sys.argv[3] + str(n), sys.argv[3] * 500)
"""


def test_processes_may_add_at_the_same_time(path):
    command = [sys.executable, "-c", WRITES, cache.__file__, str(path)]
    jobs = [subprocess.Popen([*command, name]) for name in "ab"]
    assert [job.wait() for job in jobs] == [0, 0]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(lines) == 400
    assert all(line["value"] == line["key"][0] * 500 for line in lines)


def test_a_key_is_of_all_that_was_asked():
    keys = {
        request_key(revision, kind, context, continuation)
        for revision in ("1", "2")
        for kind in ("loglikelihood", "generate")
        for context, continuation in (("a", "b"), ("ab", ""), ("", "ab"))
    }
    assert len(keys) == 12
    others = [("[1]",), ([1],), ("1",), (1,), ("1", ""), ("", "1"), ("t1:1",)]
    assert len({request_key("", "generate", *asked) for asked in others}) == len(others)
    assert request_key("1", "rolling", {"b": 1, "a": 2}) == request_key(
        "1", "rolling", {"a": 2, "b": 1}
    )


class Counting(LMEngine):
    """An engine that counts what it is asked."""

    asked = 0

    def _score(self, pairs, keep):
        self.asked += len(pairs)
        super()._score(pairs, keep)

    def _generate(self, asks, keep):
        self.asked += len(asks)
        super()._generate(asks, keep)


@pytest.fixture
def engine():
    spec = {"d_model": 16, "n_layers": 1, "vocab_size": 259, "mixer": {"kind": "gla", "heads": 2}}
    lm = build_lm(LMSpec.model_validate(spec), 0, dtype=torch.float64).eval()
    return Counting(lm, ByteTokenizer())


PAIRS = [("a", "b"), ("a", "c"), ("a", "b"), ("longer", " text")]
ASKED = [("a", {"until": [], "max_gen_toks": 3}), ("b", {"until": ["x"], "max_gen_toks": 3})]


def test_nothing_is_asked_twice(engine, path):
    first = Requests(engine, Cache(path))
    expected = first.loglikelihood(PAIRS), first.rolling(["ab", "cd"]), first.generate(ASKED)
    assert engine.asked == 3 + 2 + 2  # one pair came twice
    assert first.cached == 0
    again = Requests(engine, Cache(path))
    found = again.loglikelihood(PAIRS[::-1]), again.rolling(["cd", "ab"]), again.generate(ASKED)
    assert (found[0][::-1], found[1][::-1], found[2]) == expected
    assert engine.asked == 7
    assert again.cached == 4 + 2 + 2
    # another revision of the data is another question
    again.loglikelihood(PAIRS[:1], ["other data"])
    assert engine.asked == 8


def test_what_was_answered_before_the_end_is_kept(engine, path, monkeypatch):
    class Stopped(Requests):
        def _keys(self, *args):
            found = super()._keys(*args)
            add, left = self.cache.add, [2]

            def few(*answer):
                if not left[0]:
                    raise KeyboardInterrupt
                left[0] -= 1
                add(*answer)

            self.cache.add = few
            return found

    with pytest.raises(KeyboardInterrupt):
        Stopped(engine, Cache(path)).loglikelihood(PAIRS)
    before = engine.asked
    after = Requests(engine, Cache(path))
    assert after.loglikelihood(PAIRS) == Requests(engine).loglikelihood(PAIRS)
    assert engine.asked - before == 1 + 3  # the one that was left, then all without a cache


def test_draws_of_one_request_differ_and_repeat(engine):
    kwargs = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.0}
    one, two = Requests(engine).generate([("a", kwargs)] * 2)
    assert one != two
    assert Requests(engine).generate([("b", kwargs), ("a", kwargs)])[1] == one


def test_ranks_share_what_is_asked_and_all_know_the_answers(engine):
    alone = Requests(engine).loglikelihood(PAIRS)
    before, made = engine.asked, []

    class Half(Ranks):
        def together(self, answers):
            made.append(answers)
            missing = dict.fromkeys(seen, ([0.0, True], False, False))
            return missing | {key: value for part in made for key, value in part.items()}

    seen = [request_key("", "loglikelihood", *pair) for pair in PAIRS]
    Requests(engine, ranks=Half(1, 2)).loglikelihood(PAIRS)
    assert Requests(engine, ranks=Half(0, 2)).loglikelihood(PAIRS) == alone
    assert engine.asked == before + 3
    # "a" has two continuations, which stay together
    assert [len(part) for part in made] == [2, 1]
