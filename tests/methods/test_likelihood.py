"""`likelihood` against a plain log-softmax, whole and in chunks, over heads of several kinds."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlm import sharding
from jaxlm.contract import LM
from jaxlm.methods.likelihood import _number_of_chunks, summed_nll, token_logprobs

ROWS, LENGTH, WIDTH, VOCABULARY = 3, 13, 8, 37
CHUNKS = 0, 1, 15  # all at once, one position, a length that does not divide

HEADS = {
    "tied": lambda params, hidden: hidden @ params["embed"].T,
    "separate": lambda params, hidden: hidden @ params["head"],
    "soft cap": lambda params, hidden: 3 * jnp.tanh(hidden @ params["head"] / 3),
    "bias, bfloat16": lambda params, hidden: (
        hidden.astype(jnp.bfloat16) @ params["embed"].T.astype(jnp.bfloat16)
        + params["bias"].astype(jnp.bfloat16)[None, None]
    ),
}


def model(head="tied", chunk=0):
    def hidden(params, batch, key=None):
        del key
        x = jnp.tanh(params["embed"][batch["tokens"]] @ params["mix"])
        return x, {"taps": x.sum()}, {"penalty": jnp.square(x).sum()}

    return LM(lambda key: None, hidden, HEADS[head], axes=None, chunk=chunk)


def params_and_batch(rows=ROWS, length=LENGTH, vocabulary=VOCABULARY, width=WIDTH):
    keys = iter(jax.random.split(jax.random.key(0), 7))
    normal = lambda *shape: jax.random.normal(next(keys), shape)
    params = {
        "embed": normal(vocabulary, width),
        "head": normal(width, vocabulary),
        "mix": normal(width, width),
        "bias": normal(vocabulary),
    }
    words = jax.random.randint(next(keys), (rows, length + 1), 0, vocabulary)
    weights = jax.random.uniform(next(keys), (rows, length)) * (jnp.arange(length) > 2)[None]
    return params, {"tokens": words[:, :-1], "targets": words[:, 1:], "weights": weights}


def plain(head):
    """-sum(weight * log p) without any care."""

    def nll(params, batch):
        lm = model(head)
        logits = lm.unembed(params, lm.hidden(params, batch)[0]).astype(jnp.float32)
        logprobs = jax.nn.log_softmax(logits)
        picked = jnp.take_along_axis(logprobs, batch["targets"][:, :, None], axis=2)[:, :, 0]
        return -jnp.sum(batch["weights"] * picked)

    return nll


def from_logprobs(lm):
    return lambda p, batch: -jnp.sum(batch["weights"] * token_logprobs(lm, p, batch)[0])


def from_sum(lm):
    return lambda p, batch: summed_nll(lm, p, batch)[0]


def assert_close(tree, other, tolerance):
    def one(a, b):
        np.testing.assert_allclose(a, b, atol=tolerance * max(float(jnp.abs(b).max()), 1e-3))

    jax.tree.map(one, tree, other)


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("loss", [from_logprobs, from_sum])
def test_equals_a_plain_log_softmax(head, loss):
    params, batch = params_and_batch()
    expected = jax.jit(jax.value_and_grad(plain(head)))(params, batch)
    for chunk in CHUNKS:
        found = jax.jit(jax.value_and_grad(loss(model(head, chunk))))(params, batch)
        # A gradient that was summed in bfloat16 depends on the order of the sum.
        assert_close(found, expected, 2e-2 if "bfloat16" in head else 1e-5)


def test_logprobs_are_those_of_each_target():
    params, batch = params_and_batch()
    whole, taps, penalties = token_logprobs(model(), params, batch)
    logits = model().unembed(params, model().hidden(params, batch)[0])
    everything = np.asarray(jax.nn.log_softmax(logits))
    for row, place in np.ndindex(ROWS, LENGTH):
        expected = everything[row, place, batch["targets"][row, place]]
        np.testing.assert_allclose(whole[row, place], expected, rtol=1e-5)
    np.testing.assert_allclose(
        token_logprobs(model(chunk=15), params, batch)[0], whole, rtol=1e-5, atol=1e-6
    )
    assert whole.dtype == jnp.float32
    assert taps["taps"].shape == penalties["penalty"].shape == ()


@pytest.mark.slow
def test_gradients_also_reach_the_weights_and_through_penalties():
    params, batch = params_and_batch()
    logprobs = token_logprobs(model(), params, batch)[0]
    by_weights = jax.grad(
        lambda w: summed_nll(model(chunk=15), params, {**batch, "weights": w})[0]
    )(batch["weights"])
    np.testing.assert_allclose(by_weights, -logprobs, rtol=1e-5, atol=1e-6)
    penalty = lambda p: summed_nll(model(chunk=15), p, batch)[2]["penalty"]
    assert float(jnp.abs(jax.grad(penalty)(params)["mix"]).max()) > 0


def test_a_frozen_head_receives_no_gradient_and_costs_none():
    params, batch = params_and_batch()
    expected = jax.grad(plain("separate"))(params, batch)["mix"]
    nll = from_sum(model("separate", 15))
    found = jax.jit(jax.grad(lambda mix: nll({**params, "mix": mix}, batch)))(params["mix"])
    assert_close(found, expected, 1e-5)


def test_scales_with_the_cotangent_inside_a_scan():
    params, batch = params_and_batch()
    grad = jax.grad(lambda p: 3 * from_sum(model(chunk=15))(p, batch))
    total = jax.jit(
        lambda p: jax.lax.scan(
            lambda sums, _: (jax.tree.map(jnp.add, sums, grad(p)), None),
            jax.tree.map(jnp.zeros_like, p),
            length=2,
        )[0]
    )(params)
    expected = jax.tree.map(lambda g: 6 * g, jax.grad(plain("tied"))(params, batch))
    assert_close(total, expected, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("loss", [from_logprobs, from_sum])
def test_sharded_rows_and_vocabulary_stay_where_they_are(loss):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    spec = jax.sharding.PartitionSpec
    params, batch = params_and_batch(rows=8, vocabulary=38)
    on = lambda x, *axes: jax.device_put(x, jax.sharding.NamedSharding(mesh, spec(*axes)))
    sharded_params = {name: on(leaf) for name, leaf in params.items()}
    sharded_params["head"] = on(params["head"], None, "tensor")
    sharded_batch = {name: on(leaf, "fsdp") for name, leaf in batch.items()}
    step = jax.jit(jax.value_and_grad(loss(model("separate", 40))))
    assert_close(step(sharded_params, sharded_batch), step(params, batch), 1e-5)
    text = step.lower(sharded_params, sharded_batch).compile().as_text()
    assert not [op for op in ("all-to-all", "collective-permute", "all-gather") if op in text]


@pytest.mark.slow
@pytest.mark.parametrize("loss", [from_logprobs, from_sum])
def test_chunks_bound_the_memory(loss):
    params, batch = params_and_batch(rows=4, length=256, vocabulary=4096, width=16)
    logits = 4 * 4 * 256 * 4096  # 17 MB

    def temporary_bytes(chunk):
        step = jax.jit(jax.grad(loss(model("tied", chunk))))
        return step.lower(params, batch).compile().memory_analysis().temp_size_in_bytes

    assert temporary_bytes(0) > logits
    assert temporary_bytes(64) < logits / 4


def test_a_chunk_holds_tokens_of_one_device():
    """Rows split over four devices, and positions over two: an eighth of them is on each."""
    mesh = sharding.make_mesh(sharding.MeshSpec(fsdp=4, sequence=2))
    assert _number_of_chunks(16, (8, 32)) == 16
    with jax.set_mesh(mesh):
        assert _number_of_chunks(16, (8, 32)) == 2
        assert _number_of_chunks(0, (8, 32)) == 1
