"""Attention of rows whose positions are split over devices: keys travel, queries stay.

Letters: B batch, L length of a device's run, H query heads, G key/value heads, R query heads per
key/value head, K head width; P pieces of a run, C queries and M keys of a piece.

Ring Attention (arXiv 2310.01889): each device holds a run of every row. Keys and values go round
the ring of the mesh axis "sequence", one device a step, while each device attends from its queries
to the keys that it just holds, and adds up by the running maximum and sum of the softmax. The
backward pass goes round again, and the gradients of keys and values travel with them. Nothing of
the size of whole rows is ever on one device; all sums are float32.

A run is taken in pieces. What a piece of queries cannot see of a piece of keys, by the bounds of
their documents and positions, is skipped: the future, other documents, what the window hides. So it
does not matter which tokens a device holds, and `balanced` gives each an early and a late piece, or
the last device would do twice the average and the others wait for it.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxlm.models.attention_shards import on_each_device, tokens_on_each_device
from jaxlm.models.masks import MASKED, Places, bounds, may_see, padding_last, visible_between
from jaxlm.sharding import LOGICAL

PIECE = 1024  # tokens of a piece, at most: its scores take 4 MB a head
RING = LOGICAL["length"]


class Options(NamedTuple):
    window: int
    soft_cap: float


def ring(query_BLHK, key_BLGK, value_BLGK, *, segments_BL, positions_BL, window, soft_cap):
    """What `attention.attention` promises, under a mesh whose axis "sequence" divides the rows."""
    return on_each_device(
        functools.partial(_attend, Options(window, soft_cap)),
        query_BLHK,
        key_BLGK,
        value_BLGK,
        padding_last(segments_BL),
        positions_BL,
        split_length=True,
    )


def can_balance(tokens_BL: jax.Array) -> bool:
    """Whether the current mesh splits rows, and each device's run has an even length."""
    ways = ring_size()
    return ways > 1 and tokens_BL.shape[1] % (2 * ways) == 0


def balance(batch):
    """What attention and embedding read of a batch, with an early and a late piece for each device.

    Of 2N pieces of a row device i has numbers i and 2N-1-i, so all have as much to do.
    """
    last = 2 * ring_size() - 1
    order = [piece for i in range(ring_size()) for piece in (i, last - i)]

    def one(x_BL):
        pieces = jnp.split(x_BL, len(order), axis=1)
        return jnp.concatenate([pieces[number] for number in order], axis=1)

    return {name: one(batch[name]) for name in ("tokens", "segments", "positions")}


def in_order(x_BLD: jax.Array) -> jax.Array:
    """Back from the order of `balance` to that of the row, each piece moved once."""
    size = ring_size()
    last = 2 * size - 1
    # Of a device's two pieces one has an even number; number p is to lie on device p // 2.
    even = [i if i % 2 == 0 else last - i for i in range(size)]
    to_left = [(i, even[i] // 2) for i in range(size)]
    to_right = [(i, (last - even[i]) // 2) for i in range(size)]

    def move(x_BLD):
        early, late = jnp.split(x_BLD, 2, axis=1)
        early_is_even = jax.lax.axis_index(RING) % 2 == 0
        left = jnp.where(early_is_even, early, late)
        right = jnp.where(early_is_even, late, early)
        moved = jax.lax.ppermute(left, RING, to_left), jax.lax.ppermute(right, RING, to_right)
        return jnp.concatenate(moved, axis=1)

    return tokens_on_each_device(move, x_BLD)


def ring_size() -> int:
    """Devices that the current mesh splits a row over."""
    return dict(jax.sharding.get_abstract_mesh().shape).get(RING, 1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(options, query_BLHK, key_BLGK, value_BLGK, segments_BL, positions_BL):
    return _forward(options, query_BLHK, key_BLGK, value_BLGK, segments_BL, positions_BL)[0]


def _forward(options, query_BLHK, key_BLGK, value_BLGK, segments_BL, positions_BL):
    """The output; and for the backward pass that, the log of each softmax's sum, and the inputs."""
    pieces = _number_of_pieces(query_BLHK.shape[1])
    query_PBCGRK = _queries(query_BLHK, key_BLGK.shape[2], pieces)
    places = Places(_split(segments_BL, pieces), _split(positions_BL, pieces))
    keys = _split(key_BLGK, pieces), _split(value_BLGK, pieces), places

    sums_PBGRC1 = jnp.zeros((*_scores_shape(query_PBCGRK), 1), jnp.float32)
    found = jnp.zeros((*_scores_shape(query_PBCGRK), query_BLHK.shape[3]), jnp.float32)
    found = found, jnp.full_like(sums_PBGRC1, MASKED), sums_PBGRC1

    def step(found, keys):
        def of_queries(_, piece):
            query_BCGRK, places, found = piece
            add = functools.partial(_add_values, options, query_BCGRK, places)
            return None, jax.lax.scan(lambda found, keys: (add(found, keys), None), found, keys)[0]

        return jax.lax.scan(of_queries, None, (query_PBCGRK, places, found))[1]

    def travel(carry, _):
        found, keys = carry
        return (step(found, keys), _to_next(keys)), None

    # The last step by itself: after it nothing has to travel.
    steps = jax.lax.axis_size(RING) - 1
    (found, keys_now), _ = jax.lax.scan(travel, (found, keys), length=steps)
    out, top, total = step(found, keys_now)
    out_BLHK = _as_query(out / total, query_BLHK)
    lse = top + jnp.log(total)
    out_BLHK, lse = (checkpoint_name(x, "attended") for x in (out_BLHK, lse))
    return out_BLHK, (query_BLHK, key_BLGK, value_BLGK, segments_BL, positions_BL, out_BLHK, lse)


def _backward(options, residuals, d_out_BLHK):
    query_BLHK, key_BLGK, value_BLGK, segments_BL, positions_BL, out_BLHK, lse = residuals
    G, pieces = key_BLGK.shape[2], _number_of_pieces(query_BLHK.shape[1])
    query, d_out, out = (_queries(x, G, pieces) for x in (query_BLHK, d_out_BLHK, out_BLHK))
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), axis=-1, keepdims=True)
    delta_PBGRC1 = jnp.moveaxis(delta, 2, 4)
    places = Places(_split(segments_BL, pieces), _split(positions_BL, pieces))
    keys = _split(key_BLGK, pieces), _split(value_BLGK, pieces), places
    zeros = lambda x: jnp.zeros(x.shape, jnp.float32)

    def travel(carry, _):
        d_query, keys, d_keys = carry

        def of_queries(d_keys, piece):
            d_query, *known = piece
            add = functools.partial(_add_gradients, options, *known)
            d_query, d_keys = jax.lax.scan(add, d_query, (keys, d_keys))
            return d_keys, d_query

        known = query, places, d_out, delta_PBGRC1, lse
        d_keys, d_query = jax.lax.scan(of_queries, d_keys, (d_query, *known))
        return (d_query, _to_next(keys), _to_next(d_keys)), None

    carry = zeros(query), keys, (zeros(keys[0]), zeros(keys[1]))
    (d_query, _, (d_key, d_value)), _ = jax.lax.scan(travel, carry, length=jax.lax.axis_size(RING))
    gradients = _join(d_query).reshape(query_BLHK.shape), _join(d_key), _join(d_value)
    return *(g.astype(query_BLHK.dtype) for g in gradients), None, None


_attend.defvjp(_forward, _backward)


def _add_values(options, query_BCGRK, places, found, keys):
    """What a piece of queries found so far, and what it finds among a piece of keys."""
    key_BMGK, value_BMGK, key_places = keys

    def look(found):
        out, top, total = found
        scores_BGRCM, _ = _scores(options, query_BCGRK, key_BMGK, places, key_places)
        new_top = jnp.maximum(top, jnp.max(scores_BGRCM, axis=-1, keepdims=True))
        weights_BGRCM = jnp.exp(scores_BGRCM - new_top)
        kept = jnp.exp(top - new_top)
        here = _product("BGRCM,BMGK->BGRCK", weights_BGRCM.astype(value_BMGK.dtype), value_BMGK)
        total = kept * total + jnp.sum(weights_BGRCM, axis=-1, keepdims=True)
        return kept * out + here, new_top, total

    return _if_seen(options, places, key_places, look, found)


def _add_gradients(
    options, query_BCGRK, places, d_out_BCGRK, delta_BGRC1, lse_BGRC1, d_query, keys_and_theirs
):
    """The gradients so far of a piece of queries and one of keys, and what they owe each other."""
    (key_BMGK, value_BMGK, key_places), d_keys = keys_and_theirs

    def look(gradients):
        d_query, (d_key, d_value) = gradients
        scores_BGRCM, slope = _scores(options, query_BCGRK, key_BMGK, places, key_places)
        weights_BGRCM = jnp.exp(scores_BGRCM - lse_BGRC1)
        d_weights_BGRCM = _product("BCGRK,BMGK->BGRCM", d_out_BCGRK, value_BMGK)
        d_scores_BGRCM = weights_BGRCM * (d_weights_BGRCM - delta_BGRC1) * slope
        d_scores_BGRCM, weights_BGRCM = (
            x.astype(query_BCGRK.dtype) for x in (d_scores_BGRCM, weights_BGRCM)
        )
        d_query += _product("BGRCM,BMGK->BCGRK", d_scores_BGRCM, key_BMGK)
        d_key += _product("BGRCM,BCGRK->BMGK", d_scores_BGRCM, query_BCGRK)
        d_value += _product("BGRCM,BCGRK->BMGK", weights_BGRCM, d_out_BCGRK)
        return d_query, (d_key, d_value)

    return _if_seen(options, places, key_places, look, (d_query, d_keys))


def _if_seen(options, places, key_places, look, found):
    seen_B = may_see(bounds(places), bounds(key_places), options.window)
    return jax.lax.cond(jnp.any(seen_B), look, lambda found: found, found)


def _scores(options, query_BCGRK, key_BMGK, places, key_places):
    """Scores, capped and masked, and their derivative by query · key."""
    slope = query_BCGRK.shape[-1] ** -0.5
    scores_BGRCM = _product("BCGRK,BMGK->BGRCM", query_BCGRK, key_BMGK) * slope
    if options.soft_cap:
        tanh_BGRCM = jnp.tanh(scores_BGRCM / options.soft_cap)
        scores_BGRCM, slope = options.soft_cap * tanh_BGRCM, slope * (1 - tanh_BGRCM**2)
    seen_BCM = visible_between(places, key_places, options.window)
    return jnp.where(seen_BCM[:, None, None], scores_BGRCM, MASKED), slope


def _to_next(tree):
    size = jax.lax.axis_size(RING)
    ring = [(device, (device + 1) % size) for device in range(size)]
    return jax.tree.map(lambda x: jax.lax.ppermute(x, RING, ring), tree)


def _number_of_pieces(length):
    """Two or more, none longer than `PIECE`; one where the length is odd."""
    fitting = range(2, length + 1, 2)
    return next((n for n in fitting if length % n == 0 and length // n <= PIECE), 1)


def _split(x_BL, pieces):
    """[B, L, ...] -> [P, B, C, ...]."""
    return jnp.moveaxis(x_BL.reshape(x_BL.shape[0], pieces, -1, *x_BL.shape[2:]), 1, 0)


def _join(x_PBC):
    """The inverse of `_split`."""
    x_BPC = jnp.moveaxis(x_PBC, 0, 1)
    return x_BPC.reshape(x_BPC.shape[0], -1, *x_BPC.shape[3:])


def _queries(x_BLHK, kv_heads, pieces):
    """[B, L, H, K] -> [P, B, C, G, R, K]."""
    B, L, H, K = x_BLHK.shape
    return _split(x_BLHK.reshape(B, L, kv_heads, H // kv_heads, K), pieces)


def _scores_shape(query_PBCGRK):
    P, B, C, G, R, _ = query_PBCGRK.shape
    return P, B, G, R, C


def _as_query(out_PBGRCK, query_BLHK):
    out_PBCGRK = jnp.moveaxis(out_PBGRCK, 4, 2)
    return _join(out_PBCGRK).reshape(query_BLHK.shape).astype(query_BLHK.dtype)


def _product(equation, x, y):
    return jnp.einsum(equation, x, y, preferred_element_type=jnp.float32)
