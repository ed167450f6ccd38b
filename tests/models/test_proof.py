"""A kernel must show on the machine itself that it keeps documents apart."""

import jax
import jax.numpy as jnp
import pytest
from toy_decoder import toy

from jaxlm import sharding
from jaxlm.models import attention, proof

MESHES = {"one": ({}, 1), "eight": ({"fsdp": 4, "tensor": 2}, 8)}


def prove(mesh="one", **options):
    sizes, devices = MESHES[mesh]
    mesh = sharding.make_mesh(sharding.MeshSpec(**sizes), jax.devices()[:devices])
    with jax.set_mesh(mesh):
        proof.require_right(toy(head_width=16, **options), mesh)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("options", [{}, {"window": 50, "attention_soft_cap": 5.0}])
def test_a_right_kernel_passes(mesh, options):
    prove(mesh, attention="flash_interpreted", **options)


def test_plain_products_need_no_proof(monkeypatch):
    monkeypatch.setattr(proof, "_largest_error", lambda *args: pytest.fail("it was asked for"))
    prove(attention="xla")
    prove(attention="cpu_blocks")


def across_documents(query, key, value, *, segments_BL, positions_BL, **options):
    everywhere = jnp.broadcast_to(jnp.arange(segments_BL.shape[1]), segments_BL.shape)
    whole = jnp.ones_like(segments_BL)
    return attention.xla(query, key, value, segments_BL=whole, positions_BL=everywhere, **options)


def not_a_number(query, *args, **options):
    return query * jnp.nan


@pytest.mark.slow
@pytest.mark.parametrize("broken", [across_documents, not_a_number])
def test_a_kernel_that_is_wrong_is_refused(broken, monkeypatch):
    monkeypatch.setitem(attention.BACKENDS, "flash_interpreted", attention.Backend(broken))
    with pytest.raises(ValueError, match=r"'flash_interpreted' is wrong on this .*'xla'"):
        prove(attention="flash_interpreted")
