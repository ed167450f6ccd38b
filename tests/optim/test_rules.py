"""Rules by name: which wins, and what is refused."""

import pytest
from toy import toy

from jaxlm.optim import rules


def of(text, scan=False, weight_decay=0.1):
    return rules.per_parameter(text, toy(scan=scan).axes, weight_decay)


def test_by_default_norms_and_biases_do_not_decay():
    rates, decays = of("")
    assert set(map(type, (decays["final_norm"]["scale"],))) == {float}
    block = decays["blocks"]["0"]
    assert (decays["final_norm"]["scale"], block["mlp_norm"]["scale"]) == (0, 0)
    assert (block["mlp"]["up"]["bias"], block["mlp"]["up"]["kernel"]) == (0, 0.1)
    assert (decays["embed"]["table"], rates["embed"]["table"]) == (0.1, 1.0)


def test_the_last_match_wins_key_by_key():
    rates, decays = of("embed|head: weight_decay=0, learning_rate=0.5; head: weight_decay=0.3")
    assert (rates["embed"]["table"], decays["embed"]["table"]) == (0.5, 0)
    assert (rates["head"]["kernel"], decays["head"]["kernel"]) == (0.5, 0.3)
    assert of("bias: weight_decay=0.2")[1]["blocks"]["1"]["mlp"]["up"]["bias"] == 0.2


def test_layer_numbers_are_no_part_of_a_path():
    for scan in (False, True):
        blocks = of("^blocks/mlp/down/kernel$: learning_rate=2", scan)[0]["blocks"]
        for block in (blocks,) if scan else blocks.values():
            assert (block["mlp"]["down"]["kernel"], block["mlp"]["up"]["kernel"]) == (2, 1)


def test_a_colon_may_stand_in_the_pattern():
    assert of("(?:embed): weight_decay=0")[1]["embed"]["table"] == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("haed: weight_decay=0", "'haed' matches no parameter. Some parameters are head/kernel"),
        ("head weight_decay=0", "should read 'pattern: key=value'"),
        ("head: weigth_decay=0", "did you mean 'weight_decay'"),
        ("head: momentum=0", "weight_decay and learning_rate"),
        ("head: weight_decay=none", "'none', which is not a number"),
        ("head: learning_rate=-1", "may not be negative"),
        ("he(ad: weight_decay=0", "no valid regular expression"),
    ],
)
def test_refused(text, said):
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        of(text)
