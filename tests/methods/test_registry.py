"""Names, knobs, and a method of one's own by dotted path."""

import pytest

from jaxlm import methods


def test_knobs_are_plain_and_cast():
    def mine(*, rate: float = 1, name: str = "a", often: int = 2, on: bool = False):
        del rate, name, often, on

    found = methods.knobs(mine)
    assert found == {"rate": 1.0, "name": "a", "often": 2, "on": False}
    assert isinstance(found["rate"], float)
    for make in methods.METHODS.values():
        methods.knobs(make)


@pytest.mark.parametrize(
    "mine", [lambda rate=1.0: rate, lambda *, rate: rate, lambda *, rate=None: rate]
)
def test_other_knobs_are_refused(mine):
    with pytest.raises(ValueError, match="the knob 'rate'"):
        methods.knobs(mine)


def test_resolve():
    assert methods.resolve("dpo") is methods.METHODS["dpo"]
    assert methods.resolve("jaxlm.methods.ema:ema") is methods.METHODS["ema"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("nexttoken", "did you mean 'next_token'"),
        ("zzz", "there are next_token, dpo"),
        ("no.such.place:idea", "No module named 'no'"),
        ("jaxlm.methods.dpo:ipo", "has no 'ipo'"),
    ],
)
def test_unknown(name, said):
    with pytest.raises(ValueError, match=said):
        methods.resolve(name)
