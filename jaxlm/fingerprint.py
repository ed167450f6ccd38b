"""A short name of what params hold: the same on any mesh, another as soon as a number differs.

Layers count one by one, stacked or not: which of the two a model has is the platform's choice.

Each device adds up a mix of the bits of every number and its place (the finalizer of MurmurHash3),
four times with other seeds, modulo 2^32: integers, whose sum no order of adding changes. So nothing
leaves the devices but four numbers an array. Against accidents, not against an adversary.
"""

import functools
import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.checkpoint.digest import named
from jaxlm.checkpoint.stacks import of_layers, places

SEEDS = (0x9E3779B9, 0x7F4A7C15, 0xF39CC060, 0x5CEDC834)
OF_SIZE = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


def fingerprint(params: Any) -> str:
    """Of names, shapes, dtypes and every bit of a tree of arrays."""
    arrays = {name: jnp.asarray(x) for name, x in named(params).items()}
    meshes = {x.sharding.mesh for x in arrays.values() if isinstance(x.sharding, NamedSharding)}
    whole = NamedSharding(meshes.pop(), PartitionSpec()) if meshes else None
    shapes = {name: jax.ShapeDtypeStruct(x.shape, x.dtype) for name, x in arrays.items()}
    where = places(shapes)
    stacked = frozenset(name for name, layer in where.values() if layer is not None)
    sums = jax.device_get(_program(whole, stacked)(arrays))
    content = {}
    for path, shape in sorted(of_layers(shapes).items()):
        name, layer = where[path]
        found = sums[name] if layer is None else sums[name][layer]
        content[path] = [shape, str(shapes[name].dtype), found.tolist()]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


@functools.cache
def _program(whole, stacked):
    def program(arrays):
        of = lambda name: jax.vmap(_sums) if name in stacked else _sums
        return {name: of(name)(x) for name, x in arrays.items()}

    return jax.jit(program, out_shardings=whole)


def _sums(x):
    """Four numbers of an array, [4] uint32."""
    bits = x if x.dtype == jnp.bool_ else jax.lax.bitcast_convert_type(x, OF_SIZE[x.dtype.itemsize])
    bits, place = bits.astype(jnp.uint32), jnp.zeros(x.shape, jnp.uint32)
    for axis, size in enumerate(x.shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    mixed = [_mix(bits ^ _mix(place ^ jnp.uint32(seed))) for seed in SEEDS]
    return jnp.stack([jnp.sum(m, dtype=jnp.uint32) for m in mixed])


def _mix(x):
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
