"""The prompts of our own sample rows, kept whole in golden/ so that they can be read.

Each file has the rows of a task under a protocol, once uncut and once cut to few bytes; a line of a
prompt stands between bars. `python tests/tasks/test_recall_golden.py` writes them anew: read what
changed before keeping it.

shared.json has the sha256 of the prompts of real rows, which are not ours to keep. When it was
written they were those of the published code (prefix-linear-attention at 7490f22) run on the same
rows, as were 18,640 prompts in all: real and made rows, five lengths, two tokenizers.
"""

import hashlib
import json
from pathlib import Path

import pytest

from glactl.tasks.protocols import RECALL_TASKS, load_protocol
from glactl.tasks.recall import BASED
from glactl.tasks.tokenizer import ByteTokenizer, load_tokenizer

GOLDEN = Path(__file__).parent / "golden"
LENGTHS = {"jrt": (2000, 190), "jrt-twice": (2000, 190), "based": (2048, 190)}  # bytes
SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
CASES = [(name, task) for name in ("jrt", "jrt-twice") for task in RECALL_TASKS]
CASES += [("based", task) for task in BASED]


def render(name, task):
    lines = []
    for length in LENGTHS[name]:
        documents = load_protocol(
            name, task, tokenizer=ByteTokenizer(), context_length=length, sample=True
        )
        lines.append(
            f"# protocol {name}, version {documents.version}, task {task}, {length} bytes, "
            f"{len(documents)} documents, {documents.dropped} dropped, {documents.cut} cut, "
            f"answer inside {documents.inside}"
        )
        for d in documents:
            lines += ["", f"## {d.doc_id}: {' or '.join(d.gold)}{', cut' * d.cut}"]
            lines += [f"|{line}|" for line in d.prompt.split("\n")]
        lines.append("")
    return "\n".join(lines)


@pytest.mark.parametrize(("name", "task"), CASES)
def test_prompts_are_the_ones_that_were_reviewed(name, task):
    assert render(name, task) == (GOLDEN / f"{name}-{task}.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def mistral():
    folder = SHARED / "tokenizers" / "mistral-v1"
    if not folder.is_dir():
        pytest.skip("the shared data folder is not here")
    return load_tokenizer(str(folder))


@pytest.mark.parametrize("name", ["jrt", "jrt-twice"])
def test_prompts_of_real_rows_are_those_of_the_published_code(mistral, name):
    digests = json.loads((GOLDEN / "shared.json").read_text())[name]
    for task, digest in digests.items():
        documents = load_protocol(
            name, task, tokenizer=mistral, context_length=1000, data_dir=SHARED, limit=40
        )
        text = "\0".join(d.prompt for d in documents)
        assert hashlib.sha256(text.encode()).hexdigest() == digest, task


if __name__ == "__main__":
    for case in CASES:
        (GOLDEN / f"{case[0]}-{case[1]}.txt").write_text(render(*case), encoding="utf-8")
