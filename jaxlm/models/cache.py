"""The keys and values that generation remembers, and attention over them.

Letters: B rows, L new tokens, M slots, H query heads, G key/value heads, R query heads per
key/value head (H = G·R), S = R·L, K head width.

A cache has M slots, of which the first `used` are taken. The tokens of one call go into the next
slots, the same in every row. A token of segment 0 takes a slot too, which nobody sees: so rows of
different lengths lie side by side, padded on either side or in between, and only segments and
positions say who sees whom, as in packed rows. Keys lie with their slots last: the product of a
few queries with all keys reads them as they lie, and is 1.5 to 3 times as fast on a CPU so.

Nothing of a cache is to be copied. A block on its own first writes and then reads what it wrote;
the other way round the compiler would copy all of it. Blocks in a scan over layers only read, for
that copies whatever it writes; all of them are written at once behind it.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm import sharding
from jaxlm.models.masks import MASKED, Places, visible_between


class Memory(NamedTuple):
    """What one block remembers; of a stack of blocks, with a leading layer axis."""

    key_BGKM: jax.Array
    value_BGMK: jax.Array


SLOT_AXES = -1, -2  # of the keys, of the values


class Cache(NamedTuple):
    """What a decoder remembers of a batch."""

    blocks: Any  # a `Memory`, or a dict of one per layer, as the params are
    places: Places  # of the slots, [B, M] each; segment 0 in those that are not taken
    used: jax.Array  # [] int32, slots taken

    @property
    def length(self) -> int:
        """How many tokens of a row fit in."""
        return self.places.segments_BL.shape[1]


class Slots(NamedTuple):
    """Where a block finds what it remembers, and writes more."""

    places: Places  # those of the new tokens included if the block writes them
    at: jax.Array | None  # the slot of the first new token; None = the block only reads


def remember(key_BLGK: jax.Array, value_BLGK: jax.Array) -> Memory:
    """The keys and values of new tokens, as they lie in a cache."""
    return Memory(
        _laid_out(key_BLGK.transpose(0, 2, 3, 1)), _laid_out(value_BLGK.transpose(0, 2, 1, 3))
    )


def begin(blocks: Any, places: Places, length: int) -> Cache:
    """A cache of `length` slots whose first hold what the blocks made of a first call."""
    used = jnp.int32(places.segments_BL.shape[1])
    return lengthened(Cache(blocks, places, used), length)


def lengthened(cache: Cache, length: int) -> Cache:
    """The cache with `length` slots."""
    more = length - cache.length

    def padded(x, axis):
        return jnp.pad(x, [(0, more if i == axis % x.ndim else 0) for i in range(x.ndim)])

    blocks = _of_memories(padded, cache.blocks)
    return Cache(blocks, Places(*(padded(x, 1) for x in cache.places)), cache.used)


def slots(cache: Cache, new: Places, write: bool) -> Slots:
    """What blocks need to know to read, or to write and read, the cache for new tokens."""
    if not write:
        return Slots(cache.places, None)
    return Slots(_placed(cache, new), cache.used)


def extended(cache: Cache, blocks: Any, new: Places, at: Slots) -> Cache:
    """The cache with what the blocks returned for new tokens: all, or that of these tokens.

    Their slots have to be free; there is no error where they are not.
    """
    used = cache.used + new.segments_BL.shape[1]
    if at.at is not None:
        return Cache(blocks, at.places, used)
    return Cache(_written(cache.blocks, blocks, cache.used), _placed(cache, new), used)


def _placed(cache, new):
    return Places(
        *(_put(x, x_new, cache.used, 1) for x, x_new in zip(cache.places, new, strict=True))
    )


def _written(blocks, new, at):
    """Memories with those of new tokens from the slot `at` on."""
    return _of_memories(lambda x, axis, x_new: _put(x, x_new, at, axis), blocks, new)


def _of_memories(fn, blocks, *others):
    """`fn(array, its axis of slots, *the others' arrays)` for each array of some memories."""

    def one(memory, *others):
        return Memory(*map(fn, memory, SLOT_AXES, *others))

    return jax.tree.map(one, blocks, *others, is_leaf=lambda x: isinstance(x, Memory))


def _put(x, new, at, axis):
    return jax.lax.dynamic_update_slice_in_dim(x, new, at, axis % x.ndim)


def attend(
    query_BLHK: jax.Array,
    new: Memory,
    past: Memory,
    slots: Slots,
    places: Places,
    *,
    window: int = 0,
    soft_cap: float = 0.0,
) -> tuple[jax.Array, Memory]:
    """`attention.attention` of new tokens that see each other and what is remembered.

    `places`: of the new tokens. Returns also what the block is to return of its memory.
    """
    if slots.at is None:
        parts = [(past, slots.places), (new, places)]
    else:
        new = _written(past, new, slots.at)
        parts = [(new, slots.places)]
    return _attend(query_BLHK, parts, places, window, soft_cap), new


def _attend(query_BLHK, parts, places, window, soft_cap):
    """Of queries at `places` to several runs of keys, each with its places, as if to one."""
    B, L, H, K = query_BLHK.shape
    G = parts[0][0].key_BGKM.shape[1]
    query_BGSK = query_BLHK.reshape(B, L, G, -1, K).transpose(0, 2, 3, 1, 4).reshape(B, G, -1, K)

    def scores(memory, places_of_keys):
        scores_BGSM = _product("BGSK,BGKM->BGSM", query_BGSK, memory.key_BGKM) * K**-0.5
        if soft_cap:
            scores_BGSM = soft_cap * jnp.tanh(scores_BGSM / soft_cap)
        seen_BLM = visible_between(places, places_of_keys, window)
        scores_BGRLM = scores_BGSM.reshape(B, G, H // G, *seen_BLM.shape[1:])
        scores_BGRLM = jnp.where(seen_BLM[:, None, None], scores_BGRLM, MASKED)
        return scores_BGRLM.reshape(scores_BGSM.shape)

    found = [scores(memory, places_of_keys) for memory, places_of_keys in parts]
    tops = (jnp.max(scores_BGSM, axis=-1, keepdims=True) for scores_BGSM in found)
    top_BGS1 = functools.reduce(jnp.maximum, tops)
    weights = [jnp.exp(scores_BGSM - top_BGS1) for scores_BGSM in found]
    sums = (jnp.sum(weights_BGSM, axis=-1, keepdims=True) for weights_BGSM in weights)
    sum_BGS1 = functools.reduce(jnp.add, sums)
    outs = (
        _product("BGSM,BGMK->BGSK", weights_BGSM.astype(query_BLHK.dtype), memory.value_BGMK)
        for weights_BGSM, (memory, _) in zip(weights, parts, strict=True)
    )
    out_BGSK = functools.reduce(jnp.add, outs)
    out_BGRLK = (out_BGSK / sum_BGS1).reshape(B, G, H // G, L, K)
    return out_BGRLK.transpose(0, 3, 1, 2, 4).reshape(B, L, H, K).astype(query_BLHK.dtype)


def _product(equation, x, y):
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)


def _laid_out(x):
    return sharding.constrain(x, "batch", "kv_heads", None, None)
