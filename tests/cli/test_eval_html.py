import re
from html.parser import HTMLParser

from glactl.evaluate import html as eval_html
from glactl.evaluate.html import page, worst_first
from glactl.tasks.outcome import Metric, Outcome, Row


def outcome(rows, higher=True):
    metric = next(iter(rows[0].scores))
    return Outcome(
        task="swde",
        protocol="jrt",
        version="1",
        data="hub",
        revision=None,
        context_length=2000,
        documents=len(rows),
        of=len(rows),
        metrics={metric: Metric(0.5, 0.1, higher)},
        rows=rows,
    )


def rows(*scores, metric="contains"):
    return [
        Row(f"d{n}", f"<prompt> {n} with the Answer\nkey:", ["answer"], f"<out> {n}", {metric: x})
        for n, x in enumerate(scores)
    ]


def places(text):
    return re.findall(r"<summary>(d\d)", text)


def test_failures_come_first():
    text = page(["m"], [("heading", ["task"], [["swde"]])], [[outcome(rows(1.0, 0.0, 1.0, 0.0))]])
    assert places(text) == ["d1", "d3", "d0", "d2"]
    assert text.count('class="wrong"') == text.count('class="right"') == 2


def test_where_less_is_better_the_largest_come_first():
    assert worst_first([outcome(rows(1.0, 3.0, 2.0, metric="nats"), higher=False)]) == [1, 2, 0]


def test_what_two_models_differ_in_comes_first():
    a, b = outcome(rows(0.0, 1.0, 1.0)), outcome(rows(0.0, 1.0, 0.0))
    assert worst_first([a, b]) == [2, 0, 1]
    text = page(["one", "two"], [], [[a, b]])
    assert "one: contains 1" in text
    assert "two: contains 0" in text


def test_prompt_gold_and_output_are_there_and_nothing_is_markup():
    text = page(["<m>"], [], [[outcome(rows(0.0))]])
    assert "&lt;prompt&gt; 0 with the <mark>Answer</mark>\nkey:" in text
    assert "<pre>&lt;out&gt; 0</pre>" in text
    assert "<title>&lt;m&gt;</title>" in text


def test_likelihoods_are_a_table():
    one = Row("d0", "p", 0, [[" a", -1.25, True], [" b", -2.0, False]], {"acc": 1.0})
    text = page(["m"], [], [[outcome([one])]])
    assert "<td> a</td><td>-1.25</td><td>True</td>" in text


def test_more_documents_than_are_shown(monkeypatch):
    monkeypatch.setattr(eval_html, "SHOWN", 2)
    text = page(["m"], [], [[outcome(rows(1.0, 0.0, 1.0, 0.0))]])
    assert places(text) == ["d1", "d3"]
    assert "4 documents, the worst first; 2 more in swde.samples.jsonl" in text


def test_the_page_is_whole_and_refers_to_nothing():
    class Checked(HTMLParser):
        def __init__(self):
            super().__init__()
            self.open = []

        def handle_starttag(self, tag, attrs):
            assert not {"src", "href"} & {name for name, _ in attrs}
            if tag not in ("meta",):
                self.open.append(tag)

        def handle_endtag(self, tag):
            assert self.open.pop() == tag

    reader = Checked()
    reader.feed(page(["m"], [("h", ["a"], [[None], [0.25]])], [[outcome(rows(1.0, 0.0))]]))
    assert reader.open == []
