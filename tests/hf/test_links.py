"""The forms of arrays, ours and theirs, lose nothing on the way."""

import jax
import numpy as np
import pytest

from jaxlm.hf import links

FORMS = {
    "same": (links.SAME, [(3, 4)]),
    "transposed": (links.TRANSPOSED, [(3, 4)]),
    "kernels of heads": (links.HeadwiseQKV(2), [(5, 6)] * 3),
    "biases of heads": (links.HeadwiseQKV(2), [(6,)] * 3),
    "columns": (links.Columns(3), [(5, 6)] * 3),
    "biases in turn": (links.Columns(3), [(6,)] * 3),
    "each expert": (links.EachExpert(), [(4, 5, 6)]),
    "all experts": (links.AllExperts(2), [(4, 5, 6)] * 2),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_there_and_back_gives_the_same(form):
    form, shapes = form
    arrays = [np.random.default_rng(i).standard_normal(s, np.float32) for i, s in enumerate(shapes)]
    theirs = form.theirs(*map(jax.numpy.asarray, arrays))
    assert sum(x.size for x in theirs) == sum(x.size for x in arrays)
    for back, array in zip(form.ours(*theirs), arrays, strict=True):
        np.testing.assert_array_equal(back, array)


def test_query_key_and_value_of_a_head_stand_together():
    heads, width, inputs = 2, 3, 5
    query, key, value = (np.full((inputs, heads * width), i, np.float32) for i in (1, 2, 3))
    query[:, width:] = 10  # of the second head
    (fused,) = links.HeadwiseQKV(heads).theirs(*map(jax.numpy.asarray, (query, key, value)))
    assert fused.shape == (heads * 3 * width, inputs)
    rows = [1] * 3 + [2] * 3 + [3] * 3 + [10] * 3 + [2] * 3 + [3] * 3
    np.testing.assert_array_equal(fused[:, 0], rows)


def test_a_path_that_a_family_does_not_know_is_told():
    found, unknown = links.linked(
        ["blocks/1/mlp/up/kernel", "blocks/1/mlp/odd/kernel"], {"mlp/up": "up"}, layer="h.{}."
    )
    assert [link.theirs for link in found] == [("h.1.up.weight",)]
    assert unknown == ["blocks/1/mlp/odd/kernel"]
