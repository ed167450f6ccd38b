"""Arms that are finished are kept, under all that their numbers depend on."""

import numpy as np
import pytest

from jaxlm.host.console import Console
from jaxlm.studies.arms import Arms

OF = {"one": {"beta": 0.1}, "two": {"beta": 1.0}}


@pytest.fixture
def start(tmp_path):
    return lambda key="settings": Arms(tmp_path, Console(quiet=True), key)


def test_finished_arms_are_taken_from_before(start):
    first = start()
    assert first.missing(OF) == ["one", "two"]
    first.run("one", OF["one"], lambda: {"loss": np.array([0.1, np.nan]), "steps": np.int64(3)})
    again = start()
    assert again.missing(OF) == ["two"]
    assert again.numbers["one"] == first.numbers["one"] == {"loss": [0.1, None], "steps": 3}


def test_an_arm_that_is_stopped_is_not_kept(start):
    def stopped():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start().run("one", OF["one"], stopped)
    assert start().missing(OF) == ["one", "two"]


def test_other_settings_or_knobs_are_other_arms(start):
    start().run("one", OF["one"], lambda: {})
    assert start("others").missing(OF) == ["one", "two"]
    assert start().missing({"one": {"beta": 0.2}}) == ["one"]
    assert start().missing({"one": {"beta": 0.1}}) == []
