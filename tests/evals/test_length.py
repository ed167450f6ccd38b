"""Length limits: violations, and that no judge can save one."""

import pytest

from jaxlm.evals.length import SCALES, Limited, kept, scaled

ASKED = [Limited("a", 2, "x"), Limited("b", 4, "y")]


def test_by_hand():
    found = kept(ASKED, ["one two three", "one two"])
    assert found.violations == 0.5
    assert found.words == 2.5
    assert found.share_of_limit == (3 / 2 + 2 / 4) / 2
    assert found.wins is None


def test_a_violation_loses_whatever_the_judge_says():
    seen = []

    def judge(prompt, response, baseline):
        seen.append((prompt, baseline))
        return 1.0

    assert kept(ASKED, ["one two three", "one two"], judge).wins == 0.5
    assert seen == [("b", "y")]


def test_exactly_the_limit_is_kept():
    assert kept(ASKED, ["one two", "one two three four"]).violations == 0


def test_scaled_limits_only_grow_harder():
    limits = [[each.limit for each in scaled(ASKED, scale)] for scale in SCALES]
    assert limits[0] == [2, 4]
    assert limits[-1] == [1, 1]
    assert limits == sorted(limits, reverse=True)


def test_nothing_to_compare_is_refused():
    with pytest.raises(ValueError, match="2 prompts with 1 responses"):
        kept(ASKED, ["one"])
