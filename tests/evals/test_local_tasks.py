"""What holds answers side by side notices what is no number."""

import math

from tests.evals import local_tasks


def test_an_answer_that_is_no_number_is_no_small_gap():
    theirs = [[[-1.0, True]], [[-2.0, False]]]
    assert local_tasks.largest_gap(theirs, [[[-1.5, True]], [[-2.0, False]]]) == 0.5
    for first, second in ((math.nan, -2.0), (-1.0, math.nan)):
        ours = [[[first, True]], [[second, False]]]
        assert not local_tasks.largest_gap(theirs, ours) < 1e-3
    assert local_tasks.largest_gap(theirs, [[[-1.0, False]], [[-2.0, False]]]) == math.inf
