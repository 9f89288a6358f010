"""Protocols on our sample rows, on rows made here, and on the shared data where it is."""

import json
from pathlib import Path

import pytest

from glactl.tasks import DataUnavailable, hub, stock
from glactl.tasks.documents import tokenizer_name
from glactl.tasks.pins import Pins
from glactl.tasks.protocols import (
    CONTEXT_LENGTHS,
    PROTOCOLS,
    RECALL_TASKS,
    load_protocol,
    score,
    scores,
)
from glactl.tasks.recall import BASED
from glactl.tasks.tokenizer import ByteTokenizer, load_tokenizer

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
BYTES = ByteTokenizer()
CASES = [(p, t) for p in PROTOCOLS for t in RECALL_TASKS if p != "based" or t in BASED]
FDA = {"doc_id": "K1", "key": "panel", "value": "Chemistry", "text": "Panel: Chemistry\nPanel:"}
NQ = {
    "context": "Elder Bay lies on the sea. " * 20
    + "The tower was lit in 1811. "
    + "It rains. " * 9,
    "question": "The tower was lit in",
    "orig_question": "when was it lit",
    "answers": ["1811"],
}


def load(name, task, **options):
    return load_protocol(name, task, **{"tokenizer": BYTES} | options)


@pytest.fixture
def write(tmp_path):
    """Write rows as a task's folder of a data folder; returns the latter."""

    def done(task, *rows):
        folder = tmp_path / "data" / task
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "validation.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        return folder.parent

    return done


def oracle(document):
    """The best score of a model that writes an answer, with words before and behind."""
    around = "" if document.protocol == "stock" else "Surely "
    return max(score(document, f" {around}{gold}") for gold in document.gold)


@pytest.mark.parametrize(("name", "task"), CASES)
def test_an_oracle_scores_1_and_an_empty_model_0(name, task):
    documents = load(name, task, sample=True)
    assert len(documents) == documents.rows == 4
    for document in documents:
        assert oracle(document) == 1.0
        assert score(document, "") == 0.0
        assert score(document, "something else") == 0.0


@pytest.mark.parametrize(("name", "task"), CASES)
def test_documents_say_what_they_are(name, task):
    documents = load(name, task, sample=True)
    assert (documents.protocol, documents.task, documents.data) == (name, task, "sample")
    assert documents.tokenizer == "byte"
    assert documents.context_length == CONTEXT_LENGTHS[name]
    assert documents.revision.startswith("sha256:")
    assert len(documents.revision) == len("sha256:") + 16
    version = {"based": "0", "stock": f"lm-eval {stock.lm_eval_version()}"}.get(name, "7490f22")
    assert documents.version.endswith(version)
    for document in documents:
        assert (document.protocol, document.task) == (name, task)
        assert document.version == documents.version
    assert len({d.doc_id for d in documents}) == 4
    if name != "stock":
        wanted = ("contains", 48, ("\n",))
        assert {(d.metric, d.max_new_tokens, d.stop) for d in documents} == {wanted}


def test_lengths_of_the_papers_are_the_defaults():
    assert CONTEXT_LENGTHS == {"jrt": 2000, "jrt-twice": 1000, "based": 2048, "stock": None}


def test_contains_is_in_any_case_and_anywhere_and_literal(write):
    data = write("fda", FDA | {"value": "a+b (C)"})
    (document,) = load("jrt", "fda", data_dir=data)
    assert scores(document, "it is A+B (c), or so") == {"contains": 1.0}
    assert score(document, "aab C") == 0.0
    assert score(document, "a+b  (C)") == 0.0  # nothing is normalised


def test_any_of_the_answers_will_do(write):
    data = write("nq", NQ | {"answers": ["1811", "eighteen eleven"]})
    (document,) = load("jrt", "nq", data_dir=data)
    assert [score(document, t) for t in ("in 1811", "Eighteen Eleven", "1810")] == [1, 1, 0]


def test_the_window_is_centred_and_what_it_keeps_is_counted(write):
    far = NQ | {"answers": ["1811", "rains"], "context": NQ["context"].replace("1811", "1812")}
    data = write("nq", NQ, far | {"answers": ["1811"]}, NQ | {"answers": ["7"]}, NQ)
    whole = load("jrt", "nq", data_dir=data)
    assert (whole.rows, len(whole), whole.dropped, whole.cut, whole.inside) == (4, 3, 1, 0, 2)
    assert [d.doc_id for d in whole] == ["0", "1", "3"]
    cut = load("jrt", "nq", data_dir=data, context_length=150)
    assert (cut.dropped, cut.cut, cut.inside) == (1, 3, 2)
    at = NQ["context"].index("1811")
    around = NQ["context"][at - 50 : at + 50]  # begins with a full stop, which is taken off
    assert cut[0].prompt == around.strip().strip(".") + ". The tower was lit in"
    end = NQ["context"].strip()[-51:]  # no match: as if the last character were one
    assert cut[1].prompt == end.strip(".") + ". The tower was lit in"
    less = load("jrt", "nq", data_dir=data, limit=3)
    assert (less.rows, len(less), less.dropped) == (4, 2, 1)


def test_other_answers_and_places_of_a_row(write):
    missing = NQ | {"answers": ["absent"]}
    start = "Elder Bay"
    data = write("nq", missing | {"alt_answers": ["gone", "1811", "Elder"]})
    (document,) = load("jrt", "nq", data_dir=data, context_length=150)
    assert "lit in 1811" in document.prompt  # the first that stands there, not the earliest
    data = write("nq", missing | {"tok_pos": 3})
    (document,) = load("jrt", "nq", data_dir=data, context_length=150)
    assert document.prompt.startswith(start)
    data = write("nq", missing | {"tok_pos": None, "alt_answers": None})
    (document,) = load("jrt", "nq", data_dir=data, context_length=150)
    assert not document.prompt.startswith(start)


def test_based_takes_the_text_as_it_is(write):
    text = "\n .A device.\n\n" + "x" * 100 + "\nPanel: "
    data = write("fda", FDA | {"text": text, "value": "y"})
    (document,) = load("based", "fda", data_dir=data)
    assert document.prompt == text
    assert (document.cut, document.inside) == (False, False)
    (document,) = load("based", "fda", data_dir=data, context_length=48 + 20)
    assert document.prompt == text[-20:]
    assert document.cut


def test_stock_is_lm_evals_own(write):
    data = write("fda", FDA | {"text": "  Panel: Chemistry\nPanel: "})
    (document,) = load("stock", "fda", data_dir=data)
    assert document.prompt == "Panel: Chemistry\nPanel:"
    assert document.version == f"1 of lm-eval {stock.lm_eval_version()}"
    (document,) = load("stock", "fda", data_dir=data, context_length=48 + 6)
    assert document.prompt == "Panel:"
    nq = load("stock", "nq", sample=True)[0]
    assert nq.prompt == "Answer these questions:\n\nQ: how many sides does a hexagon have?\nA:"
    assert (nq.metric, nq.stop, nq.max_new_tokens) == ("exact_match", ("\n", ".", ","), 256)
    assert scores(nq, " The SIX!") == {"exact_match": 1.0}
    drop = load("stock", "drop", sample=True)[1]
    assert (drop.metric, score(drop, "Saturday."), score(drop, "on Saturday")) == ("em", 1, 0)
    assert scores(drop, "on Saturday") == {"em": 0.0, "f1": pytest.approx(2 / 3, abs=0.01)}


def test_jrt_rows_come_before_others_of_the_name(write):
    data = write("drop", {"passage": "not this"})
    write("drop_jrt", NQ)
    assert load("jrt", "drop", data_dir=data)[0].gold == ("1811",)
    write("based_nq_2048", NQ | {"answers": ["at 2048"]})
    write("based_nq_1024", NQ | {"answers": ["at 1024"]})
    assert load("jrt", "nq", data_dir=data)[0].gold == ("at 2048",)
    assert load("jrt-twice", "nq", data_dir=data)[0].gold == ("at 1024",)


def test_a_revision_of_a_folder_follows_its_rows(write):
    first = load("jrt", "fda", data_dir=write("fda", FDA)).revision
    assert load("jrt-twice", "fda", data_dir=write("fda", FDA)).revision == first
    assert load("jrt", "fda", data_dir=write("fda", FDA, FDA)).revision != first


def test_what_is_refused_in_one_line(write, tmp_path):
    def refused(error, message, name="jrt", task="fda", **options):
        with pytest.raises(error, match=message) as caught:
            load(name, task, **options)
        assert "\n" not in str(caught.value)

    data = write("fda", FDA)
    refused(ValueError, "protocol 'jrd' is not known; did you mean jrt?", "jrd", sample=True)
    refused(ValueError, "recall task 'sqad' is not known; did you mean squad?", task="sqad")
    refused(ValueError, "protocol based has no task nq; it has: swde, fda, squad", "based", "nq")
    refused(ValueError, "--sample and --data-dir .* exclude", sample=True, data_dir=data)
    refused(ValueError, "revision main is one of the hub's", sample=True, revision="main")
    refused(ValueError, "context length is 50; .* give 51 or more", context_length=50, sample=True)
    refused(
        ValueError, "context length is 9; .* 49 or more", "based", context_length=9, sample=True
    )
    refused(ValueError, "length is 9; .* 49 or more", "stock", context_length=9, sample=True)
    refused(FileNotFoundError, "--data-dir .*/none is not a folder", data_dir=tmp_path / "none")
    refused(FileNotFoundError, "has no folder nq; it has: fda", task="nq", data_dir=data)
    (data / "nq").mkdir()
    refused(FileNotFoundError, "nq has no validation.jsonl, which nq is", task="nq", data_dir=data)
    write("nq", NQ, {"question": "what", "answer": ["this"]})
    needs = "row 2 lacks the field context; protocol jrt needs context, question, answers$"
    refused(ValueError, needs, task="nq", data_dir=data)
    for field, value, allowed in [
        ("answers", "1811", "a list of strings"),
        ("answers", [1811], "a list of strings"),
        ("question", None, "a string"),
        ("alt_answers", "1811", "a list of strings"),
        ("tok_pos", "7", "an integer"),
    ]:
        write("nq", NQ | {field: value})
        message = rf"nq/validation.jsonl: {field} of row 1 is .*; allowed: {allowed}"
        refused(ValueError, message, task="nq", data_dir=data)
    write("nq", {k: v for k, v in NQ.items() if k != "orig_question"})
    assert len(load("jrt", "nq", data_dir=data)) == 1
    refused(ValueError, "lacks the field orig_question", "jrt-twice", "nq", data_dir=data)


SHA = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture
def hub_set(monkeypatch, tmp_path):
    """A hub that has one data set, fda, as the cache would keep it; and what it was asked for."""
    import datasets
    import huggingface_hub

    folder = tmp_path / "snapshots" / SHA
    folder.mkdir(parents=True)
    datasets.Dataset.from_list([FDA]).to_parquet(folder / "validation-00000-of-00001.parquet")
    asked = []

    def snapshot_download(name, *, repo_type, revision, local_files_only):
        asked.append((name, repo_type, revision))
        if revision == "gone" or not name.endswith("fda"):
            raise OSError(f"404: {name}\n has no {revision}")
        return str(folder)

    monkeypatch.setattr(hub, "reach", lambda kind, name: None)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return asked


def test_rows_of_the_hub_name_their_commit(hub_set):
    documents = load("jrt", "fda")
    assert (documents.data, documents.revision) == ("hazyresearch/based-fda", SHA)
    assert documents[0].gold == ("Chemistry",)
    load("jrt", "fda", revision="v2")
    assert [a[2] for a in hub_set] == [None, "v2"]


def test_a_commit_that_was_read_is_read_again(hub_set, tmp_path):
    path = tmp_path / "revisions.json"
    for name in ("jrt", "jrt-twice", "based"):
        assert load(name, "fda", pins=Pins(path)).revision == SHA
    load("jrt", "fda", pins=Pins(path), revision="v2")
    assert [a[2] for a in hub_set] == [None, SHA, SHA, "v2"]


def test_what_the_hub_has_not_is_told_in_one_line(hub_set):
    for options, what in (
        ({"task": "fda", "revision": "gone"}, "hazyresearch/based-fda at gone of task fda: 404"),
        ({"task": "nq", "context_length": 1000}, "hazyresearch/based_nq_1024 of task nq: 404"),
    ):
        with pytest.raises(DataUnavailable) as caught:
            load("jrt", **options)
        text = str(caught.value)
        assert text.startswith(f"data set {what}")
        assert f"--data-dir DIR with DIR/{options['task']}/validation.jsonl" in text
        assert "\n" not in text


def test_a_tokenizer_is_named_by_what_it_is(tmp_path):
    import tokenizers

    def save(words):
        inner = tokenizers.Tokenizer(
            tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token=words[0])
        )
        inner.save(str(tmp_path / "tokenizer.json"))
        return load_tokenizer(str(tmp_path / "tokenizer.json"))

    first = tokenizer_name(save(["a", "b", "c"]))
    assert first.startswith("3 tokens, sha256:")
    assert tokenizer_name(save(["a", "b", "c"])) == first
    assert tokenizer_name(save(["a", "b", "d"])) != first
    assert tokenizer_name(BYTES) == "byte"


def test_jsonl_strings_may_hold_other_line_ends(write):
    data = write("fda", FDA)
    row = json.dumps(FDA | {"value": "Chem\u2028istry"}, ensure_ascii=False)
    (data / "fda" / "validation.jsonl").write_text(row + "\r\n\n", encoding="utf-8")
    assert load("jrt", "fda", data_dir=data)[0].gold == ("Chem\u2028istry",)


@pytest.fixture(scope="module")
def mistral():
    folder = SHARED / "tokenizers" / "mistral-v1"
    if not folder.is_dir():
        pytest.skip("the shared data folder is not here")
    return load_tokenizer(str(folder))


@pytest.mark.parametrize(("task", "left"), [("swde", 67), ("fda", 34)])
def test_the_window_keeps_the_answers_that_a_left_cut_loses(mistral, task, left):
    options = {"tokenizer": mistral, "context_length": 1000, "data_dir": SHARED}
    for name in ("jrt", "jrt-twice"):
        documents = load(name, task, **options)
        assert (len(documents), documents.dropped) == (120, 0)
        assert documents.inside >= 0.95 * 120
    cut = load("based", task, **options)
    assert (len(cut), cut.inside) == (120, left)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_an_oracle_on_the_shared_rows(mistral, name):
    for task in RECALL_TASKS if name != "based" else BASED:
        if task == "nq" and name != "stock":
            continue  # the shared folder has its closed-book rows only
        documents = load(name, task, tokenizer=mistral, data_dir=SHARED, limit=40)
        assert {oracle(d) for d in documents} == {1.0}
        assert {score(d, "") for d in documents} == {0.0}


def test_nq_of_the_shared_folder_is_refused(mistral):
    with pytest.raises(ValueError, match=r"nq/validation.jsonl: row 1 lacks the field context"):
        load("jrt", "nq", tokenizer=mistral, data_dir=SHARED)
