"""FLOPs against counts by hand: products, scans, remat, branches, custom derivatives, shards."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxlm import flops
from jaxlm.flops import count_flops, matmul_peak, peak_flops, visible_share
from jaxlm.plan import hlo

B, D, F, LAYERS = 8, 16, 32, 5
PRODUCT = 2 * B * D * F
x_BD, w_DF, w_FD = jnp.ones((B, D)), jnp.ones((D, F)), jnp.ones((F, D))


def flops_of(function, *args, unknown=None):
    return count_flops(jax.make_jaxpr(function)(*args), unknown)


def test_products():
    assert flops_of(jnp.matmul, x_BD, w_DF) == PRODUCT
    assert flops_of(jax.jit(lambda x, w: jnp.tanh(x) @ w + 1), x_BD, w_DF) == PRODUCT
    # B L heads, M keys, K wide: the heads are a batch axis
    query, key = jnp.ones((2, 7, 3, 4)), jnp.ones((2, 9, 3, 4))
    scores = lambda q, k: jnp.einsum("BLHK,BMHK->BHLM", q, k)
    assert flops_of(scores, query, key) == 2 * 2 * 3 * 7 * 9 * 4
    assert flops_of(lambda a, b: jnp.einsum("i,j->ij", a, b), jnp.ones(3), jnp.ones(5)) <= 2 * 15


def test_gradients_take_twice_the_products_and_remat_one_more():
    def loss(x, w):
        return jnp.sum(jnp.tanh(x @ w) ** 2)

    assert flops_of(jax.grad(loss, (0, 1)), x_BD, w_DF) == 3 * PRODUCT
    assert flops_of(jax.grad(jax.checkpoint(loss), (0, 1)), x_BD, w_DF) == 4 * PRODUCT


@pytest.mark.parametrize("remat", [False, True])
def test_scan_counts_each_layer_as_the_unrolled_loop_does(remat):
    def layer(x, w):
        return jnp.tanh(x @ w[0]) @ w[1], None

    layer = jax.checkpoint(layer, prevent_cse=False) if remat else layer
    stacked = jnp.ones((LAYERS, D, F)), jnp.ones((LAYERS, F, D))

    def scanned(w):
        return jnp.sum(jax.lax.scan(layer, x_BD, w)[0])

    def unrolled(w):
        x = x_BD
        for i in range(LAYERS):
            x, _ = layer(x, (w[0][i], w[1][i]))
        return jnp.sum(x)

    assert flops_of(scanned, stacked) == LAYERS * 2 * PRODUCT
    # Backward: two products for each one; remat recomputes the first only, for the tanh.
    count = flops_of(jax.grad(scanned), stacked)
    assert count == (LAYERS * 7 if remat else LAYERS * 6) * PRODUCT
    # Unrolled, the gradient with respect to the first input is never formed.
    assert count - flops_of(jax.grad(unrolled), stacked) == PRODUCT


def test_map_and_scan_inside_scan():
    def inner(x, _):
        return x @ w_DF @ w_FD, None

    def outer(x, _):
        return jax.lax.scan(inner, x, length=3)[0], None

    assert flops_of(lambda x: jax.lax.scan(outer, x, length=4)[0], x_BD) == 12 * 2 * PRODUCT
    mapped = lambda x: jax.lax.map(lambda row: row @ w_DF, x)
    assert flops_of(mapped, x_BD) == PRODUCT


def test_the_dearest_branch_counts():
    def branches(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ w_DF @ w_FD, lambda x: x, x)

    assert flops_of(branches, x_BD) == 2 * PRODUCT


def test_while_counts_once_and_says_so():
    unknown = []
    step = lambda x: x @ w_DF @ w_FD
    count = flops_of(lambda x: jax.lax.while_loop(lambda x: x[0, 0] < 9, step, x), x_BD)
    assert count == 2 * PRODUCT
    flops_of(lambda x: jax.lax.while_loop(lambda x: x[0, 0] < 9, step, x), x_BD, unknown=unknown)
    assert unknown == ["while"]
    flops_of(lambda x: jax.lax.while_loop(lambda x: x < 9, lambda x: x + 1, x), 0, unknown=unknown)
    assert unknown == ["while"]  # nothing in it that we count


def test_a_loop_may_say_how_often_it_usually_runs():
    def body(_, x):
        return jnp.tanh(x @ w_DF) @ w_FD

    @jax.jit
    def some(x, n):
        with jax.named_scope("mlp"), jax.named_scope(flops.usual_trips(7)):
            return jax.lax.fori_loop(0, n, body, x)

    unknown = []
    assert flops_of(some, x_BD, 3, unknown=unknown) == 7 * 2 * PRODUCT
    assert not unknown
    program = hlo.parse(some.lower(x_BD, 3).compile().as_text())
    assert 7.0 in program.runs.values()
    assert not program.unknown_loops


def test_custom_derivatives():
    @jax.custom_vjp
    def product(x, w):
        return x @ w

    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, t: (t @ r[1].T, r[0].T @ t))
    assert flops_of(product, x_BD, w_DF) == PRODUCT
    both = jax.grad(lambda x, w: jnp.sum(product(x, w)), (0, 1))
    assert flops_of(both, x_BD, w_DF) == 3 * PRODUCT
    tangent = jax.custom_jvp(lambda x: x @ w_DF)
    tangent.defjvp(lambda primals, tangents: (primals[0] @ w_DF, tangents[0] @ w_DF))
    assert flops_of(tangent, x_BD) == PRODUCT


@pytest.mark.parametrize("axes", [{"data"}, {"data", "tensor"}])
def test_shards_count_as_often_as_they_run(axes):
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    sharded = jax.shard_map(
        jnp.matmul,
        mesh=mesh,
        in_specs=(PartitionSpec("data"), PartitionSpec()),
        out_specs=PartitionSpec("data"),
        axis_names=axes,
    )
    # Over `tensor` every shard computes the same.
    assert flops_of(jax.jit(sharded), x_BD, w_DF) == len(axes) * PRODUCT


@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions(groups):
    x_NCHW, kernel = jnp.ones((2, 4, 10, 10)), jnp.ones((6, 4 // groups, 3, 3))
    convolve = lambda x, k: jax.lax.conv_general_dilated(
        x, k, (1, 1), "VALID", feature_group_count=groups
    )
    assert flops_of(convolve, x_NCHW, kernel) == 2 * (2 * 6 * 8 * 8) * (4 // groups * 9)


def test_traced_and_lowered_forms_alike():
    traced = jax.jit(jnp.matmul).trace(x_BD, w_DF)
    assert count_flops(traced.jaxpr) == PRODUCT


class Device:
    def __init__(self, kind, platform):
        self.device_kind, self.platform = kind, platform


@pytest.mark.parametrize(
    ("kind", "platform", "peak"),
    [
        ("TPU v4", "tpu", 275e12),
        ("TPU v5 lite", "tpu", 197e12),
        ("TPU v5p", "tpu", 459e12),
        ("TPU v5", "tpu", 459e12),
        ("TPU v6 lite", "tpu", 918e12),
        ("NVIDIA A100-SXM4-80GB", "gpu", 312e12),
        ("NVIDIA H100 80GB HBM3", "gpu", 989e12),
        ("NVIDIA H100 PCIe", "gpu", 756e12),
        ("NVIDIA H200", "gpu", 989e12),
        ("NVIDIA B200", "gpu", 2250e12),
    ],
)
def test_known_accelerators(kind, platform, peak):
    assert peak_flops(Device(kind, platform), "bfloat16") == (peak, "published")


def test_unknown_devices_are_measured(monkeypatch):
    monkeypatch.setattr(flops, "matmul_peak", lambda dtype, device: 8e9)
    assert peak_flops(Device("cpu", "cpu"), "float32") == (8e9 / jax.device_count(), "measured")
    assert peak_flops(Device("NVIDIA H100", "gpu"), "float32") == (8e9, "measured")
    assert peak_flops(Device("TPU v4", "tpu"), "float32") == (275e12, "published")


def test_matmul_peak_is_that_of_a_computer():
    assert 1e8 < matmul_peak("float32") < 1e16


def test_a_scope_counts_what_was_traced_in_it():
    def loss(x, w):
        with jax.named_scope("inner"):
            x = jax.checkpoint(
                lambda x: jax.lax.scan(lambda x, _: (x @ w[0] @ w[1], None), x, length=3)[0]
            )(x)
        return jnp.sum((x @ w[0]) ** 2)

    weights = (w_DF, w_FD)
    assert flops_of(loss, x_BD, weights) == 7 * PRODUCT
    count = lambda fn, scope: count_flops(jax.make_jaxpr(fn)(x_BD, weights), scope=scope)
    assert count(loss, "inner") == 6 * PRODUCT
    assert count(loss, "outer") == count(loss, "inne") == 0
    gradients = jax.grad(loss, (0, 1))
    # Backward two products for each one, and the loop once more; outside, the last product's three.
    assert count(gradients, "inner") == flops_of(gradients, x_BD, weights) - 3 * PRODUCT


@pytest.mark.parametrize(("length", "window"), [(8, 0), (8, 8), (8, 3), (8, 1), (1, 0)])
def test_visible_share(length, window):
    seen = sum(1 for q in range(length) for k in range(q + 1) if not window or q - k < window)
    assert visible_share(length, window) == seen / length**2
