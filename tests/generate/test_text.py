"""Text comes token by token; stop strings and letters may lie across several."""

from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlm.generate.text import Text


def as_bytes(ids):
    return bytes(ids).decode(errors="replace")


def stream(text, pieces, at_once):
    """The text of bytes that come a few at a time, and what was told of it, part by part."""
    told = []
    for start in range(0, len(pieces), at_once):
        stopped = text.add(pieces[start : start + at_once])
        last = stopped or start + at_once >= len(pieces)
        told.append(text.news(last=last))
        if stopped:
            break
    return told


@settings(deadline=None)
@given(st.text("ab€", max_size=30), st.lists(st.text("ab€", min_size=1, max_size=4), max_size=3),
       st.integers(1, 7))  # fmt: skip
def test_text_ends_before_the_first_stop_string_and_nothing_told_is_taken_back(
    written, stops, at_once
):
    text = Text(as_bytes, list(b"before"), stops)
    told = stream(text, list(written.encode()), at_once)
    # Bytes come until a stop is whole; another that begins earlier may be unfinished then.
    shortest = min(
        (at + len(stop) for stop in stops if (at := written.find(stop)) >= 0), default=None
    )
    seen = written[:shortest]
    cut = min((at for stop in stops if (at := seen.find(stop)) >= 0), default=None)
    assert text.text == seen[:cut]
    assert "".join(told) == text.text
    assert bytes(text.ids).decode() == seen


def test_a_letter_is_told_when_it_is_whole():
    text = Text(as_bytes, [])
    assert stream(text, list("a€b".encode()), 1) == ["a", "", "", "€", "b"]


def test_what_may_begin_a_stop_string_is_held_back():
    text = Text(as_bytes, [], ("\n\nQ",))
    assert stream(text, list(b"a\n\nb\n\nQx"), 1) == ["a", "", "", "\n\nb", "", "", ""]


def test_a_token_is_decoded_by_what_stands_before_it():
    """As tokenizers do that drop the space in front of a text's first word."""
    words = {1: " one", 2: " two"}
    decode = lambda ids: "".join(words[i] for i in ids).removeprefix(" ")
    text = Text(decode, [1])
    text.add([2])
    assert text.text == " two"
