"""Logits and gradients of every family against fixtures from torch (tools/parity.py --fixtures)."""

import jax
import pytest
from cases import CASES, save, texts
from fake import shapes_of
from reckoning import LIMIT, Ours, fixture, load_fixture, packed, padded, summed

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def whole_precision():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.mark.parametrize("name", CASES)
def test_logits_and_gradients_are_those_of_torch(name, tmp_path):
    config = CASES[name]
    save(tmp_path / "hf", config, shapes_of(config))
    ours, documents = Ours(tmp_path / "hf"), texts(config["vocab_size"])
    logits, gradients = load_fixture(fixture(name))
    assert ours.difference(documents, logits, packed) < LIMIT
    assert ours.difference(documents, logits, padded) < LIMIT
    found = ours.gradients(documents)
    assert found.keys() == gradients.keys()
    for tensor, (size, total) in gradients.items():
        norm, weighted = summed(tensor, found[tensor])
        assert abs(norm - size) < LIMIT * max(size, 1e-3), tensor
        assert abs(weighted - total) < LIMIT * max(size, 1e-3), tensor
