import random

import pytest

from glactl.tasks.stream import TextStream, prompt_ids
from glactl.tasks.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()


def pieces(data, stops=()):
    """What a stream shows for each byte, and at the end."""
    stream = TextStream(TOKENIZER, stops)
    shown = [stream.push(b) for b in data]
    return [*shown, stream.flush()], stream


@pytest.mark.parametrize("text", ["", "plain", "naïve café", "日本語 🙂 done", "a\u0301"])
def test_characters_are_whole(text):
    shown, stream = pieces(text.encode())
    assert "".join(shown) == stream.text == text
    assert all("\ufffd" not in piece for piece in shown)


def test_invalid_bytes_are_shown_once_they_are_known_to_be():
    data = b"a\xff\xfeb\xe3\x81"
    shown, stream = pieces(data)
    assert "".join(shown) == stream.text == data.decode(errors="replace")
    assert shown[0] == "a"


def test_random_bytes_read_as_when_decoded_at_once():
    random_bytes = random.Random(0)
    for n in (1, 5, 150, 1000):
        data = bytes(random_bytes.randrange(256) for _ in range(n))
        assert pieces(data)[1].text == data.decode(errors="replace")
        text = "".join(random_bytes.choice("aé日🙂") for _ in range(n))
        assert "".join(pieces(text.encode())[0]) == text


@pytest.mark.parametrize(
    ("text", "stops", "expected"),
    [
        ("one\ntwo", ["\n"], "one"),
        ("one. two\n", ["\n", "."], "one"),
        ("abcabd", ["abd"], "abc"),
        ("aaab", ["aab"], "a"),
        ("no stop here", ["\n\n"], "no stop here"),
        ("half a stop\n", ["\n\n"], "half a stop\n"),
        ("日本。語", ["。"], "日本"),
        ("text", [""], "text"),
        ("\nafter", ["\n"], ""),
    ],
)
def test_the_text_ends_before_the_first_stop_string(text, stops, expected):
    shown, stream = pieces(text.encode(), stops)
    assert "".join(shown) == stream.text == expected
    assert stream.stopped == (expected != text)


def test_a_token_may_hold_several_stop_strings():
    class Words:
        def decode(self, ids):
            return "".join(["one, two. three\n", "four"][i] for i in ids)

    stream = TextStream(Words(), ["\n", ".", ","])
    assert stream.push(1) == "four"
    assert stream.push(0) == "one"
    assert stream.stopped
    assert stream.text == "fourone"


def test_no_part_of_a_stop_string_is_shown():
    stream = TextStream(TOKENIZER, ["END"])
    assert [stream.push(b) for b in b"xENE"] == ["x", "", "", "EN"]
    assert [stream.push(b) for b in b"ND"] == ["", ""]
    assert stream.stopped
    assert stream.push(ord("y")) == ""


def test_an_empty_prompt_is_the_token_that_begins_a_text():
    assert prompt_ids(TOKENIZER, "") == [TOKENIZER.bos_id]
    assert prompt_ids(TOKENIZER, "é") == list("é".encode())

    class Bare:
        bos_id = eos_id = None

        def encode(self, text):
            return []

    with pytest.raises(ValueError, match="an empty prompt needs a tokenizer with a BOS or EOS"):
        prompt_ids(Bare(), "")
    Bare.eos_id = 7
    assert prompt_ids(Bare(), "") == [7]
