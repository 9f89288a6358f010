import pytest
from hypothesis import given
from hypothesis import strategies as st

from glactl.tasks.tokenizer import ByteTokenizer
from glactl.tasks.windows import ANSWER_LENGTH, Passage, find, left_cuts, windows

BYTES = ByteTokenizer()
TEXT = "".join(chr(ord("a") + i % 26) for i in range(300))


class WithBOS(ByteTokenizer):
    """Bytes of which every text, left alone, begins with BOS."""

    leading = 1


def cut(anchor, length, tokenizer=BYTES, text=TEXT, token_anchor=None):
    passage = Passage(text, anchor, token_anchor)
    (found,) = windows([passage], tokenizer, length + ANSWER_LENGTH)
    return found


def test_find_takes_the_earliest_match_in_any_case():
    assert find("Panel: CHEMISTRY. chemistry", ["chemistry", "panel"]) == 0
    assert find("see (1.5) and x1y5", ["(1.5)"]) == 4  # no pattern
    assert find("abc", ["z"]) is None
    assert find("abc", []) is None


@pytest.mark.parametrize(
    ("anchor", "start", "end"),
    [
        (150, 100, 200),  # half of it before the anchor
        (151, 101, 201),
        (50, 0, 100),
        (49, 0, 100),  # at the head: all of D tokens
        (0, 0, 100),
        (260, 210, 300),  # near the end: fewer, as start does not move
        (None, 249, 300),  # as if the last character were the anchor
    ],
)
def test_the_window_is_equation_1(anchor, start, end):
    found = cut(anchor, 100)
    assert found.text == TEXT[start:end]
    assert found.cut


def test_an_odd_length_keeps_the_smaller_half_before_the_anchor():
    assert cut(150, 101).text == TEXT[100:201]


def test_a_short_passage_is_left_whole():
    for anchor in (0, 299, None):
        assert cut(anchor, 600).text == TEXT
        assert not cut(anchor, 600).cut
    assert cut(0, 300).text == TEXT
    assert cut(0, 299).cut
    assert cut(150, 299).text == TEXT[1:]
    assert cut(150, 299).cut
    assert cut(None, 10, text="").text == ""


def test_a_row_may_say_where_its_answer_is():
    assert cut(None, 100, token_anchor=80).text == TEXT[30:130]
    assert cut(150, 100, token_anchor=80).text == TEXT[100:200]  # only where none was found
    assert cut(None, 299, token_anchor=80).text == TEXT[150:]  # and the passage is longer than D
    assert cut(None, 298, token_anchor=80).text == TEXT[0:298]


def test_a_token_that_begins_every_text_counts_but_is_not_shown():
    tokenizer = WithBOS()
    assert cut(0, 100, tokenizer).text == TEXT[:99]  # it takes one of D
    assert cut(0, 300, tokenizer).text == TEXT[:299]
    assert cut(0, 301, tokenizer).text == cut(0, 600, tokenizer).text == TEXT
    assert cut(150, 100, tokenizer).text == TEXT[100:200]  # n, a and start are all one more
    assert cut(50, 100, tokenizer).text == TEXT[0:100]
    assert cut(51, 100, tokenizer).text == TEXT[1:101]


def test_characters_that_are_torn_read_as_the_unknown_one():
    found = cut(6, 6, text="日本語日本語")  # bytes 15 to 18
    assert found.text == "語"
    assert cut(1, 4, text="日本語日本語").text == "\ufffd" * 3  # bytes 1 to 5


def test_the_context_must_hold_more_than_the_answer():
    with pytest.raises(
        ValueError, match=r"context length is 50; the window keeps 50 .* 51 or more"
    ):
        windows([Passage(TEXT, 0)], BYTES, 50)
    assert windows([Passage(TEXT, 0), Passage(TEXT, 1)], BYTES, 51)[1].text == "b"


@given(st.text("abcde", max_size=80), st.integers(1, 60), st.data())
def test_a_window_has_at_most_d_tokens_and_the_one_behind_its_anchor(text, length, data):
    anchor = data.draw(st.integers(0, max(0, len(text) - 1)))
    found = cut(anchor, length, text=text).text
    assert len(found) <= length
    assert found in text
    start = max(0, anchor - length // 2)
    assert text.startswith(found, start)
    assert anchor < start + len(found) or not text


def test_a_prompt_needs_a_token():
    with pytest.raises(ValueError, match=r"context length is 48; .* takes 48 tokens, so give 49"):
        left_cuts([TEXT], BYTES, 48, 48)


@given(st.text("abcde", max_size=80), st.integers(1, 60))
def test_a_left_cut_is_an_end(text, length):
    _, found = left_cuts(["", text], BYTES, length + 48, 48)
    assert text.endswith(found.text)
    assert len(found.text) == min(length, len(text))
    assert found.cut == (len(text) > length)
