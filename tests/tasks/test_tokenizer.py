import json
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizers
from huggingface_hub import HfApi, constants

from glactl.tasks import DataUnavailable
from glactl.tasks.tokenizer import ByteTokenizer, load_tokenizer

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "tokenizers"
TEXTS = ["", "plain words", "naïve café, 日本語 🙂 done", "  two  spaces\n\n\tand a tab ", "a\0b"]


def write(folder, specials=("<s>", "</s>"), config=None):
    """A byte-pair tokenizer, trained on two lines, in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=list(specials),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(["the cat and the hat", "words and plain words"], trainer)
    inner.enable_truncation(4)  # it must be switched off
    inner.save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return str(folder)


def published(name):
    if not (SHARED / name).is_dir():
        pytest.skip("no sample tokenizers beside the repository")
    return load_tokenizer(str(SHARED / name))


@pytest.fixture(params=["byte", "trained", "gpt2", "mistral-v1"])
def tokenizer(request, tmp_path):
    if request.param == "byte":
        return ByteTokenizer()
    if request.param == "trained":
        return load_tokenizer(write(tmp_path / "trained"))
    return published(request.param)


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert tokenizer.array(text).tolist() == ids


@pytest.mark.parametrize("text", TEXTS)
def test_sizes_are_those_of_the_text(tokenizer, text):
    sizes = tokenizer.sizes(text)
    assert len(sizes) == len(tokenizer.encode(text))
    assert sizes.sum() == len(text.encode())
    assert (sizes >= 0).all()


def test_sizes_by_token(tmp_path):
    assert ByteTokenizer().sizes("é").tolist() == [1, 1]
    tokenizer = load_tokenizer(write(tmp_path))
    assert tokenizer.decode(tokenizer.encode("the")) == "the"
    assert tokenizer.sizes("the words").tolist() == [3, 6]  # the space is part of " words"
    assert tokenizer.sizes("🙂é").tolist() == [4, 0, 0, 0, 2, 0]  # a token for each byte


def test_sizes_of_a_tokenizer_that_drops_spaces(tmp_path):
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "bc": 1}, unk_token="a"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    inner.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.encode(" a  bc ") == [0, 1]
    assert tokenizer.sizes(" a  bc ").tolist() == [2, 5]


def test_special_tokens_are_not_shown(tokenizer):
    ids = [i for i in (tokenizer.bos_id, tokenizer.eos_id) if i is not None]
    assert ids
    assert tokenizer.decode(ids) == ""
    assert tokenizer.decode([*tokenizer.encode("the"), *ids]) == "the"


def test_what_is_saved_reads_back(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "a" / "tokenizer")
    again = load_tokenizer(str(tmp_path / "a" / "tokenizer"))
    assert type(again) is type(tokenizer)
    for name in ("vocab_size", "bos_id", "eos_id"):
        assert getattr(again, name) == getattr(tokenizer, name)
    assert again.encode(TEXTS[2]) == tokenizer.encode(TEXTS[2])
    again.save(tmp_path / "b")
    for file in (tmp_path / "b").iterdir():  # a run is known by these bytes
        assert file.read_bytes() == (tmp_path / "a" / "tokenizer" / file.name).read_bytes()


def test_bytes():
    tokenizer = load_tokenizer("byte")
    assert isinstance(tokenizer, ByteTokenizer)
    assert tokenizer.vocab_size == 259
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (256, 257, 258)
    assert tokenizer.encode("é") == [0xC3, 0xA9]
    assert tokenizer.decode([65, 256, 257, 258, 999, -1, 66]) == "AB"
    assert tokenizer.decode([0xC3]) == "\ufffd"


def test_published_special_tokens():
    gpt2, mistral = published("gpt2"), published("mistral-v1")
    assert (gpt2.vocab_size, gpt2.bos_id, gpt2.eos_id) == (50257, 50256, 50256)
    assert (mistral.vocab_size, mistral.bos_id, mistral.eos_id) == (32000, 1, 2)
    assert gpt2.encode("Hello world") == [15496, 995]


@pytest.mark.parametrize(
    ("specials", "config", "expected"),
    [
        (["<s>", "</s>"], None, ("<s>", "</s>")),
        (["<|endoftext|>"], None, ("<|endoftext|>", "<|endoftext|>")),
        (["<x>", "<y>"], None, (None, None)),
        (["<x>", "<y>"], {"bos_token": "<x>", "eos_token": {"content": "<y>"}}, ("<x>", "<y>")),
        (["<s>", "</s>"], {"bos_token": None}, (None, "</s>")),
        (["<s>", "</s>"], {"bos_token": "gone"}, (None, "</s>")),
    ],
)
def test_which_tokens_begin_and_end_a_text(specials, config, expected, tmp_path):
    tokenizer = load_tokenizer(write(tmp_path, specials, config))
    names = dict(enumerate(specials))
    assert tuple(names.get(i) for i in (tokenizer.bos_id, tokenizer.eos_id)) == expected


def test_the_file_may_be_named_itself(tmp_path):
    folder = write(tmp_path, ["<x>"], {"eos_token": "<x>"})
    assert load_tokenizer(folder + "/tokenizer.json").eos_id == 0


def test_ids_with_gaps(tmp_path):
    write(tmp_path)
    file = tmp_path / "tokenizer.json"
    plain = json.loads(file.read_text())
    plain["model"]["vocab"]["far"] = 1000
    file.write_text(json.dumps(plain))
    assert load_tokenizer(str(file)).vocab_size == 1001


def test_files_that_are_no_tokenizer(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer folder .* has no tokenizer.json"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer.json is not a tokenizer.json: [^\n]+$"):
        load_tokenizer(str(tmp_path))
    write(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(ValueError, match=r"tokenizer_config.json is not JSON"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"is a JSON list; allowed: an object"):
        load_tokenizer(str(tmp_path))
    for absent in (tmp_path / "none", "./none", "none/tokenizer.json", "a/b/c"):
        with pytest.raises(FileNotFoundError, match=f"no tokenizer at {absent}"):
            load_tokenizer(str(absent))


def test_a_hub_that_does_not_answer(monkeypatch):
    asked = []

    def silent(self, name, timeout):
        asked.append(name)
        raise ConnectionError

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "model_info", silent)
    with pytest.raises(DataUnavailable) as caught:
        load_tokenizer("no-such-owner/none")
    assert str(caught.value) == (
        "tokenizer 'no-such-owner/none' is no file here, nor on the hub: the hub does not answer, "
        "and its cache lacks it"
    )
    assert caught.value.exit_code == 3
    assert asked == ["no-such-owner/none"]


def test_a_hub_that_answers(monkeypatch, tmp_path):
    inner = tokenizers.Tokenizer.from_file(write(tmp_path) + "/tokenizer.json")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(HfApi, "model_info", lambda *args, **more: None)

    class Hub:
        @staticmethod
        def from_pretrained(name):
            if name == "owner/bpe":
                return inner
            raise Exception("404:\n no such thing")  # as the library does

    monkeypatch.setattr(tokenizers, "Tokenizer", Hub)
    assert load_tokenizer("owner/bpe").bos_id == 0
    with pytest.raises(DataUnavailable, match=r"'owner/none' .*: 404: no such thing$"):
        load_tokenizer("owner/none")


def test_importing_tasks_loads_no_large_library():
    code = """
import sys
import glactl.tasks
large = ("datasets", "lm_eval", "pyarrow", "tokenizers", "huggingface_hub", "transformers")
print([m for m in large if m in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
