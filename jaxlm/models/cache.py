"""The keys and values that generation remembers, and attention over them.

Letters: B rows, L new tokens, M slots, H query heads, G key/value heads, R query heads per
key/value head (H = G·R), S = R·L, K head width.

A cache has M slots, of which the first `used` are taken. The tokens of one call go into the next
slots, the same in every row. A token of segment 0 takes a slot too, which nobody sees: so rows of
different lengths lie side by side, padded on either side or in between, and only segments and
positions say who sees whom, as in packed rows.

Blocks only read their part and return the keys and values of the new tokens, which are written
once behind all blocks: a scan over layers would copy whatever of the cache it also writes.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlm import sharding
from jaxlm.models.masks import MASKED, Places, visible_between


class Memory(NamedTuple):
    """What one block remembers; of a stack of blocks, with a leading layer axis."""

    key_BGMK: jax.Array
    value_BGMK: jax.Array


class Cache(NamedTuple):
    """What a decoder remembers of a batch."""

    blocks: Any  # a `Memory`, or a dict of one per layer, as the params are
    places: Places  # of the slots, [B, M] each; segment 0 in those that are not taken
    used: jax.Array  # [] int32, slots taken

    @property
    def length(self) -> int:
        """How many tokens of a row fit in."""
        return self.places.segments_BL.shape[1]


def remember(key_BLGK: jax.Array, value_BLGK: jax.Array) -> Memory:
    """The keys and values of new tokens, as they lie in a cache."""
    return Memory(*(_laid_out(x.swapaxes(1, 2)) for x in (key_BLGK, value_BLGK)))


def begin(blocks: Any, places: Places, length: int) -> Cache:
    """A cache of `length` slots whose first hold what the blocks made of a first call."""
    used = jnp.int32(places.segments_BL.shape[1])
    return lengthened(Cache(blocks, places, used), length)


def lengthened(cache: Cache, length: int) -> Cache:
    """The cache with `length` slots."""
    more = length - cache.length

    def padded(x, axis):
        return jnp.pad(x, [(0, more if i == axis % x.ndim else 0) for i in range(x.ndim)])

    blocks = jax.tree.map(lambda x: padded(x, -2), cache.blocks)
    return Cache(blocks, Places(*(padded(x, 1) for x in cache.places)), cache.used)


def write(cache: Cache, blocks: Any, places: Places) -> Cache:
    """The cache with what the blocks made of new tokens in its next slots, which have to be free.

    There is no error where they are not: the newest tokens would overwrite some before them.
    """

    def put(x, new, axis):
        return jax.lax.dynamic_update_slice_in_dim(x, new, cache.used, axis % x.ndim)

    return Cache(
        jax.tree.map(lambda x, new: put(x, new, -2), cache.blocks, blocks),
        Places(*(put(x, new, 1) for x, new in zip(cache.places, places, strict=True))),
        cache.used + places.segments_BL.shape[1],
    )


def attend(
    query_BLHK: jax.Array,
    new: Memory,
    past: Memory,
    *,
    places: Places,
    past_places: Places,
    window: int = 0,
    soft_cap: float = 0.0,
) -> jax.Array:
    """`attention.attention` of new tokens that see each other and what is remembered."""
    B, L, H, K = query_BLHK.shape
    G = new.key_BGMK.shape[1]
    query_BGSK = query_BLHK.reshape(B, L, G, -1, K).transpose(0, 2, 3, 1, 4).reshape(B, G, -1, K)

    def scores(memory, places_of_keys):
        scores_BGSM = _product("BGSK,BGMK->BGSM", query_BGSK, memory.key_BGMK) * K**-0.5
        if soft_cap:
            scores_BGSM = soft_cap * jnp.tanh(scores_BGSM / soft_cap)
        seen_BLM = visible_between(places, places_of_keys, window)
        scores_BGRLM = scores_BGSM.reshape(B, G, H // G, *seen_BLM.shape[1:])
        scores_BGRLM = jnp.where(seen_BLM[:, None, None], scores_BGRLM, MASKED)
        return scores_BGRLM.reshape(scores_BGSM.shape)

    found = [(scores(past, past_places), past), (scores(new, places), new)]
    top_BGS1 = jnp.maximum(*(jnp.max(s, axis=-1, keepdims=True) for s, _ in found))
    weights = [(jnp.exp(scores_BGSM - top_BGS1), memory) for scores_BGSM, memory in found]
    sum_BGS1 = jnp.add(*(jnp.sum(w_BGSM, axis=-1, keepdims=True) for w_BGSM, _ in weights))
    out_BGSK = jnp.add(
        *(
            _product("BGSM,BGMK->BGSK", w_BGSM.astype(query_BLHK.dtype), memory.value_BGMK)
            for w_BGSM, memory in weights
        )
    )
    out_BGRLK = (out_BGSK / sum_BGS1).reshape(B, G, H // G, L, K)
    return out_BGRLK.transpose(0, 3, 1, 2, 4).reshape(B, L, H, K).astype(query_BLHK.dtype)


def _product(equation, x, y):
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)


def _laid_out(x_BGMK):
    return sharding.constrain(x_BGMK, "batch", "kv_heads", None, None)
