"""The fingerprint of params: of their numbers and places, not of where these lie."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.fingerprint import fingerprint


def tree(value=1.0, dtype=jnp.float32):
    return {"a": {"kernel": jnp.arange(24, dtype=dtype).reshape(4, 6)}, "b": jnp.full(3, value)}


def test_same_numbers_on_another_mesh_are_the_same():
    mesh = jax.make_mesh((4, 2), ("x", "y"))
    layout = {"a": {"kernel": jax.P("x", "y")}, "b": jax.P()}
    spread = jax.device_put(tree(), jax.tree.map(lambda s: jax.NamedSharding(mesh, s), layout))
    assert fingerprint(spread) == fingerprint(tree()) == fingerprint(jax.device_get(tree()))


def test_stacked_layers_are_the_same_too():
    layers = [tree(value=float(i)) for i in range(3)]
    stacked = {"blocks": jax.tree.map(lambda *x: jnp.stack(x), *layers)}
    apart = lambda *order: {"blocks": {str(i): layers[n] for i, n in enumerate(order)}}
    assert fingerprint(stacked) == fingerprint(apart(0, 1, 2)) != fingerprint(apart(1, 0, 2))


def test_whatever_differs_shows():
    kernel = np.arange(24, dtype=np.float32).reshape(4, 6)
    swapped, bit = kernel.copy(), kernel.copy()
    swapped[0, 0], swapped[3, 5] = kernel[3, 5], kernel[0, 0]
    bit.view(np.uint32)[2, 2] ^= 1
    others = [{"a": {"kernel": x}, "b": jnp.ones(3)} for x in (swapped, bit, kernel.reshape(6, 4))]
    others += [tree(value=-1.0), tree(dtype=jnp.bfloat16), {"c": tree()["a"], "b": tree()["b"]}]
    assert len({fingerprint(x) for x in (tree(), *others)}) == len(others) + 1
