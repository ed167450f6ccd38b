"""`jaxlm.evaluate`: flags that mean nothing are refused, and files hold what is true."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm.evaluate import __main__ as command
from jaxlm.evaluate import write
from jaxlm.evaluate.answers import file_of


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--min_k=nan", "a share in percent"),
        ("--limit=nan", "must be a number above 0"),
        ("--limit=inf", "must be a number above 0"),
        ("--stride=2000", "would leave tokens unscored"),
        ("--window=0", "must be at least 1"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(flag, words):
    flags = command._flags().parse_args(["--checkpoint=x", "--compression=y", flag])
    with pytest.raises(ValueError, match=words):
        command._refuse(flags)


@pytest.mark.parametrize("below", ["", "/more", "/more/and more"])
def test_results_that_cannot_be_written_are_refused_before_anything_is_scored(tmp_path, below):
    (tmp_path / "file").write_text("x")
    words = ["--checkpoint=x", "--compression=y", f"--output={tmp_path}/file{below}"]
    with pytest.raises(ValueError, match="is no folder"):
        command._refuse(command._flags().parse_args(words))
    write.require_folder(tmp_path / "new" / "one")


def test_no_file_holds_nan(tmp_path):
    odd = {"a": np.float32("nan"), "b": [float("inf")], "c": np.int64(3)}
    path = write.corpora(tmp_path, {"x": odd}, {}, {})
    refuse = lambda text: pytest.fail(f"{text} is no JSON")
    found = json.loads(path.read_text(), parse_constant=refuse)
    assert found["compression"]["x"] == {"a": "nan", "b": ["inf"], "c": 3}


def test_each_model_has_its_own_file_of_answers():
    params = {"a": jnp.arange(6.0).reshape(2, 3), "b": jnp.ones(4, jnp.bfloat16)}
    others = [params | {"a": params["a"].at[1, 2].add(1e-3)}, params | {"a": params["a"][::-1]}]
    names = [file_of("f", *args) for args in ((params, 9), (params, 8), *((p, 9) for p in others))]
    assert file_of("f", params, 9) == names[0]
    assert len(set(names)) == 4
    assert all(name.startswith("f-") for name in names)
