import pytest

from glactl.tasks import papers, stock
from glactl.tasks.protocols import CONTEXT_LENGTHS, PROTOCOLS, RECALL_TASKS
from glactl.tasks.recall import BASED

TABLES = papers._read().tables


def test_suites_are_the_tables_they_repeat():
    assert papers.suites() == ["gla-table2", "gla-table3", "gsa-table1", "gsa-recall"]
    recall = papers.suite("gsa-recall")
    assert recall.tasks == ("fda", "swde", "squad", "nq", "triviaqa", "drop")
    assert (recall.protocol, recall.context_length) == ("jrt", 2000)
    assert [t.source[:16] for t in recall.tables] == ["arXiv:2409.07146", "arXiv:2502.13685"]
    based = papers.suite("gla-table3")
    assert (based.tasks, based.protocol) == (("fda", "swde", "squad"), "based")
    zero_shot = papers.suite("gla-table2")
    assert (zero_shot.protocol, zero_shot.context_length) == ("stock", None)
    assert set(zero_shot.tasks) == set(papers.suite("gsa-table1").tasks)
    with pytest.raises(
        ValueError, match="suite 'gla-tabel2' is not known; did you mean gla-table2"
    ):
        papers.suite("gla-tabel2")


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_of_tasks_that_can_be_run(name):
    table = TABLES[name]
    assert table.source
    assert table.protocol in PROTOCOLS
    for task in table.tasks:
        if table.protocol == "stock":
            assert stock.resolve(task) == [task]
        else:
            assert task in (BASED if table.protocol == "based" else RECALL_TASKS)
    assert (table.protocol == "stock") == (table.context_length is None)
    for heading, column in table.columns.items():
        if column == "average":
            continue
        task, metric = column
        known = ("contains",) if table.protocol != "stock" else papers.metrics(task)
        assert metric in known, heading


@pytest.mark.parametrize("name", TABLES)
def test_printed_averages_are_those_of_the_printed_numbers(name):
    """So that no number is misread; 0.05 is what one decimal leaves open, of the mean another."""
    table = TABLES[name]
    for group in table.rows:
        for model, values in group.models.items():
            pairs = list(zip(table.columns.values(), values, strict=True))
            scores = [v for c, v in pairs if c != "average" and c[1] not in papers.PERPLEXITIES]
            for average in (v for c, v in pairs if c == "average"):
                assert sum(scores) / len(scores) == pytest.approx(average, abs=0.1), model
            assert all(0 < v < 100 for v in scores)


def test_rows_without_an_average_are_those_printed():
    def gla(name):
        return [g.models["GLA"] for g in TABLES[name].rows]

    assert gla("gla-table3") == [(8.1, 18.6, 27.2), (19.9, 50.6, 42.6)]
    assert gla("jrt-table1")[0] == (48.3, 37.7, 34.7, 26.6, 55.5, 19.6)
    assert gla("jrt-table1-twice")[0] == (68.6, 53.6, 54.8, 31.3, 54.6, 33.3)


def test_a_misprint_is_marked_and_kept():
    group = papers.suite("gla-table2").tables[0].rows[1]
    assert group.models["Mamba"][4] == 40.1
    assert "misprint (50.3 in arXiv:2409.07146)" in group.notes["Mamba"]
    assert {m for t in TABLES.values() for g in t.rows for m in g.notes} == {"Mamba", "RetNet"}


def test_numbers_stand_beside_those_of_their_protocol_and_size():
    assert [t.title for t in papers.tables("jrt", 1000)] == ["JRT paper, Table 1: the passage once"]
    assert len(papers.tables("jrt", 2000)) == 2
    assert papers.tables("jrt", 1500) == []
    assert len(papers.tables("based", CONTEXT_LENGTHS["based"])) == 2
    assert len(papers.tables("jrt-twice", CONTEXT_LENGTHS["jrt-twice"])) == 1
    table = papers.suite("gla-table3").tables[0]
    assert [g.size for g in table.beside(341e6)] == ["340M"]
    assert [g.size for g in table.beside(374e6)] == ["340M"]
    assert [g.size for g in table.beside(1.365e9)] == ["1.3B"]
    assert table.beside(7e8) == []
    assert table.beside(260_032) == []


def test_metrics_of_the_papers():
    assert papers.metrics("hellaswag") == ("acc_norm",)
    assert papers.metrics("lambada_openai") == ("perplexity", "acc")
    assert papers.metrics("mmlu") is None
    assert len([stock.resolve(t) for t in papers._read().metrics]) == 11


def test_a_table_has_a_number_for_each_column():
    table = TABLES["gla-table3"].model_dump()
    table["rows"][0]["models"]["GLA"] = (1.0, 2.0)
    with pytest.raises(ValueError, match="GLA 340M has 2 numbers"):
        papers.Table.model_validate(table)
