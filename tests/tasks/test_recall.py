"""Rows to prompts, by the task's own rules; see tasks/recall.py."""

import pytest

from glactl.tasks.recall import NQ_LENGTHS, TASKS, golds, passage

KEYED = {"key": "type of test", "value": "Optical"}
PAGE = "Shop\nPrice: 5.\n\nSummary of information above...\ncolour: red\n"
ASKED = {
    "context": " The ferry sails at nine. It is blue...  ",
    "question": " The ferry is ",
    "orig_question": "which colour is it:",
    "answers": ["blue"],
}


def prompts(task, row):
    return TASKS[task].once(dict(row)), TASKS[task].twice(dict(row))


@pytest.mark.parametrize(
    ("text", "rest"),
    [
        ("A device\nType of test:", "A device."),
        ("A device\nTYPE OF TEST:type of test:", "A device."),  # in any case, more than once
        ("A device.\nType of test:", "A device."),
        ("..A device...\n\nType of test:", "A device."),
        ("A device. \nType of test:", "A device. ."),  # a space keeps the stop from being seen
        ("A window that ends bef", "A window that ends bef."),
        ("Type of test:", "."),
    ],
)
def test_fda(text, rest):
    assert prompts("fda", KEYED | {"text": text}) == (
        f"{rest} Type of test:",
        f"Information about Type of test. {rest}\n{rest} Type of test:",
    )


def test_swde_loses_its_summary():
    row = {"key": "price", "value": "5"}
    once, twice = prompts("swde", row | {"text": PAGE + "price:"})
    assert once == "Shop\nPrice: 5. Price:"
    assert twice == "Information about Price. Shop\nPrice: 5.\nShop\nPrice: 5. Price:"


def test_swde_once_and_twice_differ_in_the_stops_they_take_off():
    row = {"key": "price", "value": "5", "text": "..Shop.. \n \nSummary of information above...x"}
    once, twice = prompts("swde", row)
    assert once == "Shop. Price:"
    assert twice == "Information about Price. Shop..\nShop.. Price:"
    assert prompts("swde", row | {"text": "Shop price:"})[0] == "Shop. Price:"
    assert prompts("swde", row | {"text": "Shop "})[1].endswith("\nShop. Price:")


def test_squad_twice_has_the_whole_context_before_the_text():
    row = {
        "text": "  t of the passage. The colour was\n",
        "context": "All of the passage. Question: no more",
        "question": "Which colour?",
        "value": "red",
    }
    assert prompts("squad", row) == (
        "t of the passage. The colour was",
        "Which colour? All of the passage. \nt of the passage. The colour was",
    )


@pytest.mark.parametrize("task", ["nq", "drop", "triviaqa"])
def test_contexts_end_in_one_full_stop(task):
    once, twice = prompts(task, ASKED)
    body = "The ferry sails at nine. It is blue"
    intro = "which colour is it" + ":" * (task == "triviaqa")
    assert once == f"{body}. The ferry is"
    assert twice == f"{intro} {body}.\n{body}. The ferry is"


def test_a_question_at_the_end_of_its_context_is_taken_off():
    row = ASKED | {"context": "It is blue. the ferry isThe ferry is"}
    assert prompts("drop", row)[0] == "It is blue. The ferry is"
    assert prompts("triviaqa", row)[0] == "It is blue. The ferry is"
    assert prompts("nq", row)[0] == "It is blue. the ferry is. The ferry is"  # once, in its case
    for task in ("nq", "drop", "triviaqa"):
        assert prompts(task, row)[1].endswith(" It is blue.\nIt is blue. The ferry is")
    assert prompts("drop", ASKED | {"question": " "})[0].endswith(". It is blue. ")


def test_triviaqa_loses_its_marks():
    row = ASKED | {"context": "[DOC] [TLE] Ferries [PAR] It is blue.[PAR]"}
    assert prompts("triviaqa", row)[0] == "Ferries  It is blue. The ferry is"
    assert prompts("triviaqa", row)[1].count("[") == 0
    assert prompts("drop", row)[0].startswith("[DOC] [TLE] Ferries [PAR]")


def test_rows_are_not_changed():
    row = {"key": "price", "value": "5", "text": PAGE + "price:"}
    kept = dict(row)
    TASKS["swde"].once(row)
    TASKS["swde"].twice(row)
    assert row == kept


def test_what_the_window_is_centred_on():
    row = {"key": "price", "value": "50", "answers": ["first", "second"]}
    row |= {"text": " it: FIRST 50, price, 50 ", "context": " not the second, the First "}

    def at(task, **fields):
        found = passage(TASKS[task], row | fields)
        return None if found is None else found.anchor

    assert passage(TASKS["fda"], row).text == row["text"].strip()
    assert at("swde") == at("fda") == at("squad") == 10  # the earlier of key and value
    assert at("fda", key="it") == 0
    assert at("squad", key="it") == 10
    assert at("nq") == 20  # the first answer, in any case
    assert at("drop") == at("triviaqa") == 0
    assert passage(TASKS["fda"], row | {"key": "no", "value": "none"}).anchor is None


def test_rows_that_are_left_out():
    row = {"key": "price", "value": "50", "answers": ["first"], "text": "50", "context": "x"}

    def left_out(task, **fields):
        return passage(TASKS[task], row | fields) is None

    assert left_out("fda", value="5")
    assert left_out("fda", value="")
    assert left_out("fda", key="p")
    assert left_out("squad", value="5")
    assert not left_out("squad", key="p")
    assert left_out("nq", answers=["7", "seven"])
    assert left_out("nq", answers=[])
    assert not left_out("drop", answers=["7"])
    assert left_out("drop", answers=[])


def test_golds():
    row = {"value": "50", "answers": ["first", "second"]}
    assert golds(TASKS["squad"], row) == ("50",)
    assert golds(TASKS["nq"], row) == ("first", "second")


def test_nq_is_read_at_the_length_that_reaches_the_window():
    nq = TASKS["nq"]
    found = {n: nq.hub_set(n).rpartition("_")[2] for n in (60, 512, 513, 1000, 2000, 2048, 9000)}
    assert list(found.values()) == ["512", "512", "1024", "1024", "2048", "2048", "2048"]
    assert {nq.hub_set(n) for n in NQ_LENGTHS} == {
        "hazyresearch/based_nq_512",
        "hazyresearch/based_nq_1024",
        "hazyresearch/based_nq_2048",
    }
    assert TASKS["swde"].hub_set(1000) == TASKS["swde"].hub_set(2000)
