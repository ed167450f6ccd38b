"""LIFT's pairs: how many, in which order, and that no winner breaks its limit."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxlm.data.lift import Triple, instructed, lift, limited, words


def text(number):
    return " ".join(["word"] * number)


def limit_of(triple):
    return int(re.search(r"using (\d+) words", triple.prompt)[1])


@pytest.mark.parametrize(
    ("said", "number"),
    [
        ("", 0),
        ("One, two; three!", 3),
        ("I don't know.", 4),
        ("It's the cat's", 5),
        ("a state-of-the-art 3.14 e.g. this", 5),
        ("wait ... “quoted”", 2),
        ("Grüße, naïve résumé", 3),
        ("one,two AT&T a:b 3,000 at 10:30 l'amour", 10),
    ],
)
def test_words_by_hand(said, number):
    assert words(said) == number


@given(
    chosen=st.integers(0, 60),
    rejected=st.integers(0, 60),
    margin=st.integers(2, 20),
    seed=st.integers(0, 5),
)
def test_two_pairs_a_triple_and_no_winner_breaks_its_limit(chosen, rejected, margin, seed):
    triple = Triple("Why?", text(chosen), text(rejected))
    found = limited(triple, seed, margin)
    if abs(chosen - rejected) < margin:
        assert found == []
        return
    above, between = found
    assert (above.chosen, above.rejected) == (triple.chosen, triple.rejected)
    assert limit_of(above) == max(chosen, rejected) + 10
    assert min(chosen, rejected) < limit_of(between) < max(chosen, rejected)
    turned = between.chosen == triple.rejected
    assert turned == (chosen > rejected)
    assert words(between.chosen) <= limit_of(between) < words(between.rejected)
    assert all(pair.prompt.endswith("\n\nWhy?") for pair in found)


def test_limits_follow_from_the_text_not_from_the_order():
    triples = [Triple(f"prompt {i}", text(5), text(45)) for i in range(20)]
    there = set(lift(triples, seed=3))
    assert there == set(lift(reversed(triples), seed=3))
    assert there != set(lift(triples, seed=4))
    assert len({limit_of(limited(t)[1]) for t in triples}) > 5  # drawn, not one number


def test_originals_are_mixed_in_or_left_out():
    triples = [Triple("a", text(5), text(45)), Triple("b", text(5), text(6))]
    assert next(iter(lift(triples))) == triples[0]
    assert len(list(lift(triples))) == 4
    assert len(list(lift(triples, originals=False))) == 2


def test_the_instruction_comes_first():
    assert instructed("Say {limit}.", 7).startswith("Answer the following instruction using 7 ")
    assert instructed("Say {limit}.", 7).endswith("\n\nSay {limit}.")


def test_a_margin_with_nothing_between_is_refused():
    with pytest.raises(ValueError, match="margin=1"):
        limited(Triple("a", "b", "c d"), margin=1)
