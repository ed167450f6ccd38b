"""Logits and gradients of every family against fixtures from torch (tools/parity.py --fixtures)."""

import jax
import numpy as np
import pytest
from cases import CASES, save, texts
from fake import shapes_of
from reckoning import LIMIT, Ours, fixture, load_fixture, packed, summed

from jaxlm.sharding import MeshSpec, make_mesh

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def whole_precision():
    with jax.default_matmul_precision("highest"):
        yield


# One of each kind; make parity goes through all.
TESTED = [
    *("llama, wide heads, all biases", "llama 3.1", "llama, dynamic"),
    *("llama, yarn with all numbers", "mistral", "mixtral", "qwen2, window from a layer on"),
    *("qwen3", "olmo2", "gemma2", "gemma3, with a tower for images", "gpt_neox", "gpt2"),
]


@pytest.mark.parametrize("name", TESTED)
def test_logits_and_gradients_are_those_of_torch(name, tmp_path):
    config = CASES[name]
    save(tmp_path / "hf", config, shapes_of(config))
    ours, documents = Ours(tmp_path / "hf"), texts()
    logits, gradients = load_fixture(fixture(name))
    packed_and_padded, found = ours.at_once(documents)
    for one, expected in zip(packed_and_padded, logits * 2, strict=True):
        assert np.abs(one - expected).max() < LIMIT
    assert found.keys() == gradients.keys()
    for tensor, (size, total) in gradients.items():
        norm, weighted = summed(tensor, found[tensor])
        assert abs(norm - size) < LIMIT * max(size, 1e-3), tensor
        assert abs(weighted - total) < LIMIT * max(size, 1e-3), tensor


def test_on_a_mesh_that_does_not_divide_the_vocabulary(tmp_path):
    config = CASES["llama, tied, one KV head"]
    save(tmp_path / "hf", config, shapes_of(config))
    logits, _ = load_fixture(fixture("llama, tied, one KV head"))
    with jax.set_mesh(mesh := make_mesh(MeshSpec(data=1, fsdp=2, tensor=4))):
        ours = Ours(tmp_path / "hf", mesh)
        up = ours.params["blocks"]["0"]["mlp"]["up"]["kernel"]
        assert up.sharding.spec == jax.P("fsdp", "tensor")
        batch = {k: np.repeat(x, 2, axis=0) for k, x in packed(texts()).items()}
        found = list(ours.of_documents(batch))
    for one, expected in zip(found, logits * 2, strict=True):
        assert np.abs(one - expected).max() < LIMIT
