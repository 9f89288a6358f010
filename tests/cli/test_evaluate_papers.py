from dataclasses import replace

from glactl.evaluate.papers import paper_tables
from glactl.evaluate.report import Measured
from glactl.tasks.outcome import Metric, Outcome


def outcome(task, metric, value, protocol="jrt", length=2000):
    return Outcome(
        task=task,
        protocol=protocol,
        version="1",
        data="hub",
        revision="abc",
        context_length=length,
        documents=100,
        of=100,
        metrics={metric: Metric(value, 0.0123, True)},
    )


RECALL = [
    outcome(task, "contains", value)
    for task, value in (("fda", 0.267), ("swde", 0.301), ("squad", 0.35), ("nq", 0.2))
]
MODEL = Measured("mine@3", {"parameters": 1.37e9}, RECALL)


def shown(*models, sample=False, limit=None):
    return {
        heading.split(" (")[0]: rows for heading, _, rows in paper_tables(models, sample, limit)
    }


def test_a_model_of_that_size_stands_above_the_papers_rows():
    found = shown(MODEL)
    assert found.keys() == {
        "GSA paper, Table 3b: recall",
        "MoM paper, Table 2: recall of the released models of 1.3B",
    }
    rows = found["GSA paper, Table 3b: recall"]
    errors = ["26.7 ± 1.2", "30.1 ± 1.2", "35.0 ± 1.2", "20.0 ± 1.2"]
    # triviaqa and drop were not asked, so there is no average
    assert rows[0] == ["mine@3", "1,370M", *errors, None, None, None]
    assert rows[-1] == ["GSA", "1.3B", 23.6, 29.8, 36.0, 23.2, 57.0, 20.9, 31.8]
    assert {row[1] for row in rows[1:]} == {"1.3B"}


def test_the_average_is_of_what_the_paper_averages():
    more = [outcome("triviaqa", "contains", 0.5), outcome("drop", "contains", 0.1)]
    rows = shown(replace(MODEL, outcomes=RECALL + more))["GSA paper, Table 3b: recall"]
    assert rows[0][-1] == "28.6"  # (26.7 + 30.1 + 35 + 20 + 50 + 10) / 6
    stock = [
        outcome("wikitext", "word_perplexity", 17.2, "stock", None),
        outcome("piqa", "acc", 0.7, "stock", None),
    ]
    rows = shown(replace(MODEL, outcomes=stock))["GLA paper, Table 2: zero-shot"]
    assert rows[0][2] == "17.2 ± 0.0"
    assert rows[0][5] == "70.0 ± 1.2"


def test_another_protocol_length_or_size_has_no_table():
    assert shown(replace(MODEL, facts={"parameters": 7e9})) == {}
    assert shown(replace(MODEL, outcomes=[outcome("fda", "contains", 0.2, length=1500)])) == {}
    found = shown(replace(MODEL, outcomes=[outcome("fda", "contains", 0.2, "based", 2048)]))
    assert "GSA paper, Table 3b: recall" not in found
    assert "GLA paper, Table 3: recall" in found


def test_fewer_rows_have_no_table():
    assert shown(MODEL, sample=True) == {}
    assert shown(MODEL, limit=5) == {}


def test_two_models_of_two_sizes_share_a_table():
    other = Measured("large@9", {"parameters": 2.6e9}, RECALL)
    rows = shown(MODEL, other)["GSA paper, Table 3b: recall"]
    assert [row[0] for row in rows[:2]] == ["mine@3", "large@9"]
    assert {row[1] for row in rows[2:]} == {"1.3B", "2.7B"}
