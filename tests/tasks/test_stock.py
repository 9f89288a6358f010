import json
import os
from pathlib import Path

import pytest
import yaml
from huggingface_hub import HfApi, constants

from glactl.tasks import DataUnavailable, stock, stock_tasks

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def load_tasks(names, data):
    return list(stock_tasks.load_tasks(names, data)["tasks"].values())


NAMED = "swde,fda,squad,nq,triviaqa,drop,arc,lambada"


@pytest.fixture
def data(tmp_path):
    """A data folder with swde, of one row."""
    folder = tmp_path / "data" / "swde"
    folder.mkdir(parents=True)
    row = {"doc_id": "1", "key": "title", "value": "Moor", "text": "A page about Moor\ntitle:"}
    (folder / "validation.jsonl").write_text(json.dumps(row) + "\n\n")
    return folder.parent


def test_our_names_stand_for_lm_evals():
    assert stock.resolve(NAMED) == [
        "swde",
        "fda",
        "squad_completion",
        "nq_open",
        "triviaqa",
        "drop",
        "arc_easy",
        "arc_challenge",
        "lambada_openai",
    ]
    assert stock.resolve(" arc , arc_easy,piqa") == ["arc_easy", "arc_challenge", "piqa"]


def test_any_of_lm_evals_own_names_is_known():
    assert stock.resolve("mmlu_anatomy") == ["mmlu_anatomy"]
    assert stock.is_group("mmlu")
    assert stock.is_group("ai2_arc")  # one of a list of tags
    assert not stock.is_group("swde")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("swed", r"task 'swed' is not known to lm-eval [\d.]+; did you mean swde"),
        ("zzzzzzzzqq", r"task 'zzzzzzzzqq' is not known to lm-eval [\d.]+$"),
        (" , ", "tasks is empty; name some, e.g. swde,squad"),
    ],
)
def test_names_that_are_no_task(names, message):
    with pytest.raises(ValueError, match=message):
        stock.resolve(names)


def test_the_sample_has_rows_for_every_named_task():
    tasks = load_tasks(stock.resolve(NAMED + ",wikitext"), stock.SAMPLE)
    assert [t.task_name for t in tasks] == stock.resolve(NAMED + ",wikitext")
    for task in tasks:
        for doc in task.eval_docs:
            assert task.doc_to_text(doc) or task.doc_to_target(doc)
            if task.task_name in stock.CLASSES:
                gold = task.doc_to_target(doc)
                assert gold.lower() in task.doc_to_text(doc).lower()


def test_cloze_tasks_stop_at_a_line_and_have_a_standard_error(data):
    for task in load_tasks(["swde", "fda", "squad_completion"], stock.SAMPLE):
        docs = list(task.eval_docs)
        (request,) = task.construct_requests(docs[0], task.doc_to_text(docs[0]))
        assert request.args[1] == {"until": ["\n"], "max_gen_toks": 48}
        assert task.VERSION == 1
        assert task.process_results(docs[0], [" " + docs[0]["value"].upper()]) == {"contains": 1}
        assert task.process_results(docs[0], ["something else"]) == {"contains": 0}


def test_a_data_folder_is_read(data):
    (task,) = load_tasks(["swde"], data)
    assert [doc["value"] for doc in task.eval_docs] == ["Moor"]


def test_a_folder_may_have_lm_evals_name(data):
    (data / "swde").rename(data / "squad_completion")
    assert len(load_tasks(["squad_completion"], data)) == 1


def test_splits_that_are_absent_are_not_asked_for(tmp_path):
    folder = tmp_path / "nq"
    folder.mkdir()
    (folder / "validation.jsonl").write_text('{"question": "what", "answer": ["this"]}\n')
    (task,) = load_tasks(["nq_open"], tmp_path)
    assert not task.has_training_docs()
    (folder / "train.jsonl").write_text('{"question": "who", "answer": ["that"]}\n')
    (task,) = load_tasks(["nq_open"], tmp_path)
    assert task.has_training_docs()


def write(folder, name, text):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)


def test_errors_of_a_data_folder(data):
    def refused(error, task, message, at=data):
        with pytest.raises(error, match=message):
            load_tasks([task], at)

    refused(FileNotFoundError, "swde", "--data-dir .*/nowhere is not a folder", data / "nowhere")
    refused(FileNotFoundError, "fda", "--data-dir .*/data has no folder fda; it has: swde")
    write(data / "fda", "train.jsonl", "{}\n")
    refused(FileNotFoundError, "fda", "fda has no validation.jsonl, which fda is measured on")
    write(data / "arc_easy", "validation.jsonl", "{}\n")
    refused(FileNotFoundError, "arc_easy", "arc_easy has no test.jsonl")
    write(data / "fda", "validation.jsonl", '{"text": "x"}\n{"text": \n')
    refused(ValueError, "fda", r"fda/validation.jsonl:2: not JSON: ")
    write(data / "fda", "validation.jsonl", "[1]\n")
    refused(ValueError, "fda", r"fda/validation.jsonl:1: a row must be a JSON object, not '\[1\]'")
    write(data / "fda", "validation.jsonl", "\n")
    refused(ValueError, "fda", r"fda/validation.jsonl has no rows")
    write(data / "fda", "validation.jsonl", '{"text": "x", "value": 1}\n{"text": [], "value": 2}\n')
    refused(ValueError, "fda", r"fda/validation.jsonl: fields differ from row to row: ")
    write(data / "fda", "validation.jsonl", '{"text": "x"}\n')
    refused(ValueError, "fda", "the rows of fda lack a field: 'value'")
    write(data / "nq", "validation.jsonl", '{"answer": ["x"]}\n')
    refused(ValueError, "nq_open", "the rows of nq_open lack a field: 'question'")
    refused(ValueError, "mmlu", "mmlu is a group of tasks; with --data-dir name single tasks")


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """No network, and an empty cache."""
    import datasets

    def fail(self, *args, **kwargs):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(HfApi, "dataset_info", fail)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", constants.HF_HUB_OFFLINE)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", datasets.config.HF_HUB_OFFLINE)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize(
    ("task", "hub", "folder"),
    [
        ("squad_completion", "hazyresearch/based-squad", "squad"),
        ("triviaqa", "mandarjoshi/trivia_qa", "triviaqa"),
    ],
)
def test_without_the_hub_the_error_says_what_to_do(offline, task, hub, folder):
    with pytest.raises(DataUnavailable) as caught:
        load_tasks([task], None)
    text = str(caught.value)
    assert text.startswith(f"data set {hub} of task {task}: the hub does not answer")
    assert f"--data-dir DIR with DIR/{folder}/*.jsonl" in text
    assert "--sample" in text
    assert "\n" not in text


def test_a_hub_that_answers_is_asked(monkeypatch):
    class Answered(Exception):
        response = "404"

    def answer(self, *args, **kwargs):
        raise Answered

    monkeypatch.setattr(HfApi, "dataset_info", answer)
    before = constants.HF_HUB_OFFLINE
    stock.reach_data(["swde"])
    assert before == constants.HF_HUB_OFFLINE
    if not before:
        error = stock.unavailable(ConnectionError("gated\n data set"), "swde")
        assert "based-swde-v2 of task swde: gated data set; give" in str(error)
        error = stock.unavailable(ConnectionError("gated"), "mmlu")
        assert str(error) == "a data set of mmlu: gated; with a network it can be had"


def test_task_files_override_only_what_must_differ(tmp_path):
    stock.write_tasks(["piqa"], tmp_path)
    own = yaml.safe_load((tmp_path / "piqa.yaml").read_text())
    assert own.keys() == {"task", "include"}
    assert os.path.exists(own["include"])


@pytest.mark.skipif(not SHARED.is_dir(), reason="the shared data folder is not here")
def test_the_shared_data_is_in_this_layout():
    names = stock.resolve(NAMED + ",wikitext,piqa,hellaswag,winogrande")
    tasks = load_tasks(names, SHARED)
    assert [len(list(t.eval_docs)) for t in tasks] == [
        36 if n == "wikitext" else 120 for n in names
    ]
