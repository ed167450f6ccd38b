"""Whole experts on each device: the numbers of one device, nothing dropped, no kernel sent."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from toy_decoder import toy

from jaxlm import sharding
from jaxlm.build import build
from jaxlm.config import check
from jaxlm.flops import count_flops
from jaxlm.models import expert_shards, experts, layers, lora, quantized
from jaxlm.models.expert_blocks import block_size
from jaxlm.models.transformer import functional
from jaxlm.plan import hlo
from jaxlm.plan.collectives import collectives
from jaxlm.sharding import MeshSpec

B, L, D, F, E = 4, 16, 32, 48, 8


@functools.cache
def mixture(over=""):
    """Key -> params, and (params, frozen, x, mask) -> (loss, (output, taps, routing)), slopes."""
    config = toy(experts=E, ffn_width=F, experts_over=over)
    init, of = functional(lambda rngs: experts.Mixture(config, rngs))

    def loss(params, frozen, x_BLD, mask_BL):
        params = {**frozen, **params, "experts": _both(frozen, params)}
        context: Any = layers.Context(mask_BL, *(mask_BL.astype(int),) * 2, None, 0)
        y_BLD, taps, routed = of(params)(x_BLD, context)
        wave_BLD = jnp.sin(jnp.arange(y_BLD.size, dtype=y_BLD.dtype)).reshape(y_BLD.shape)
        return jnp.sum(y_BLD * wave_BLD) + experts.load_balance(routed), (y_BLD, taps, routed)

    return init, jax.jit(jax.value_and_grad(loss, (0, 2), has_aux=True))


def _both(frozen, params):
    """Of each kernel what is frozen and what is trained."""
    part = lambda tree, name: tree.get("experts", {}).get(name, {})
    return {name: part(frozen, name) | part(params, name) for name in ("gate", "up", "down")}


def axes_of(tree, over):
    """Logical axes of params: of the router, and of what the kernels of experts consist of."""

    def one(path, _):
        name, part = [entry.key for entry in path if entry.key not in quantized.PARTS][-2:]
        if name == "router":
            return layers.KERNEL_AXES[name]
        expert, takes, gives = expert_shards.kernel_axes(name, over)
        beside = {lora.A: (expert, takes, None), lora.B: (expert, None, gives)}
        return beside.get(part, (expert, takes, gives))

    return jax.tree_util.tree_map_with_path(one, tree)


def tokens():
    """At random; and such that all want the same two experts. The last of each row are padding."""
    x_BLD = jax.random.normal(jax.random.key(1), (B, L, D))
    mask_BL = jnp.broadcast_to(jnp.arange(L) < 13, (B, L)).astype(jnp.float32)
    return (x_BLD, mask_BL), (x_BLD.at[..., 0].set(8.0), mask_BL)


def on_mesh(mesh, over, frozen, params, x_BLD, mask_BL):
    """Everything that comes of it on a mesh, and the compiled program."""
    place = lambda tree: jax.device_put(
        tree, sharding.param_shardings(axes_of(tree, over), tree, mesh)
    )
    rows = lambda x: sharding.constrain(x, "batch", "length", *(None,) * (x.ndim - 2))
    with jax.set_mesh(mesh):
        operands = place(params), place(frozen), jax.jit(rows)(x_BLD), jax.jit(rows)(mask_BL)
        return mixture(over)[1](*operands), operands


def equal(actual, expected):
    def close(a, b):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * max(1, np.abs(b).max()))

    jax.tree.map(close, actual, expected)


LAYOUTS = {
    "fsdp": ("fsdp", MeshSpec(fsdp=4, tensor=2), False),
    "fsdp, few rows": ("fsdp", MeshSpec(data=2, fsdp=4), False),  # which every device then has
    "tensor": ("tensor", MeshSpec(fsdp=2, sequence=2, tensor=2), True),
}


@pytest.fixture(scope="module")
def first():
    """Params whose router wants the experts 5 and 2 for all that have a large first number."""
    params = mixture()[0](jax.random.key(0))
    router = params["router"]["kernel"].at[0].set(0.0).at[0, jnp.array([5, 2])].set(1.0)
    return {**params, "router": {"kernel": router}}


@pytest.mark.slow
@pytest.mark.parametrize(("over", "spec", "explicit"), LAYOUTS.values(), ids=LAYOUTS)
def test_whole_experts_on_eight_devices_equal_one(first, over, spec, explicit):
    mesh = sharding.make_mesh(spec, explicit=explicit)
    for x_BLD, mask_BL in tokens():
        expected = mixture()[1](first, {}, x_BLD, mask_BL)
        equal(on_mesh(mesh, over, {}, first, x_BLD, mask_BL)[0], expected)
    pairs_E = expected[0][1][2].pairs_E
    np.testing.assert_array_equal(pairs_E, [0, 0, B * 13, 0, 0, B * 13, 0, 0])


@pytest.mark.slow
def test_without_a_mesh_they_are_the_same(first):
    x_BLD, mask_BL = tokens()[0]
    equal(*(mixture(over)[1](first, {}, x_BLD, mask_BL) for over in ("fsdp", "")))


@pytest.mark.slow
def test_factors_beside_a_frozen_base_in_few_bits(first):
    """Its kernels have no gradient and the factors do, wherever the experts are."""
    base = {"blocks": {"experts": first["experts"]}}
    frozen = {"experts": quantized.quantized(base, "int8")["blocks"]["experts"]}
    wave = lambda *shape: (
        0.1 * jnp.sin(jnp.arange(np.prod(shape), dtype=jnp.float32)).reshape(shape)
    )
    sizes = {"gate": (D, F), "up": (D, F), "down": (F, D)}
    params = {"router": first["router"], "experts": {}}
    for name, (takes, gives) in sizes.items():
        factors = {lora.A: wave(E, takes, 3), lora.B: wave(E, 3, gives)}
        params["experts"][name] = factors
    x_BLD, mask_BL = tokens()[0]
    expected = mixture()[1](params, frozen, x_BLD, mask_BL)
    mesh = sharding.make_mesh(MeshSpec(fsdp=4, tensor=2))
    equal(on_mesh(mesh, "fsdp", frozen, params, x_BLD, mask_BL)[0], expected)


@pytest.mark.slow
def test_over_fsdp_no_kernel_is_sent_and_an_even_share_is_counted(first):
    (x_BLD, mask_BL), _ = tokens()
    mesh = sharding.make_mesh(MeshSpec(fsdp=4, tensor=2))
    program = {}
    for over in ("", "fsdp"):
        _, operands = on_mesh(mesh, over, {}, first, x_BLD, mask_BL)
        with jax.set_mesh(mesh):
            traced = mixture(over)[1].trace(*operands)
        program[over] = hlo.parse(traced.lower().compile().as_text())
    sent = {
        over: [one for one in collectives(found, dict(mesh.shape)) if "fsdp" in one.axes]
        for over, found in program.items()
    }
    of_tokens, of_kernel = 4 * B * L * D * 3 / 4, 4 * E * D * F / 2 * 3 / 4
    assert max(one.bytes for one in sent["fsdp"]) == of_tokens
    assert max(one.bytes for one in sent[""]) >= of_kernel
    assert sum(one.total for one in sent["fsdp"]) == pytest.approx(5 * of_tokens, rel=0.2)
    assert not program["fsdp"].unknown_loops
    unknown = []
    pairs, block = B * L * 2, block_size(B * L * 2, E)
    blocks = E * (pairs / E / block + 0.5)  # an even share, and half a block for each expert
    router = 3 * 2 * B * L * D * E
    flops = 11 * 2 * blocks * block * D * F + router
    assert count_flops(traced.jaxpr, unknown) == flops
    assert not unknown


def test_an_axis_that_does_not_divide_the_experts_is_refused():
    c = tiny.get_config()
    c.model.update(vocabulary=256, experts=6, experts_over="fsdp")
    with pytest.raises(ValueError, match=r"experts=6 must be a multiple of config.mesh.fsdp=8"):
        build(check(c), 256, jax.devices())
