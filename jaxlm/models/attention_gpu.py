"""Attention for GPUs: a kernel for packed rows, and cuDNN's for rows of one document.

Letters: B batch, L length, H query heads, G key/value heads, R query heads per key/value head
(H = G·R), K head width; C queries and M keys of a tile, T tiles of a row.

`flash` is FlashAttention 2 (arXiv 2307.08691) in Pallas' dialect of Triton: a program holds one
tile of queries and walks over tiles of keys; backward, one kernel holds keys and walks over the
queries of all their heads, another holds queries and walks over keys. Which tiles a program walks
over is worked out before, from the documents and positions in each, so other documents, the future
and what lies left of the window cost nothing. Nothing else depends on the order of the tokens.

Softmax and sums are float32, in powers of two; products take operands of the inputs' type.
`interpret` runs the kernels on any platform, slowly, for the tests. Tiles are those that are usual
for Ampere and Hopper; not tuned. jax 0.12 still has this dialect but announces its end: a later one
needs these kernels in Mosaic's.

`cudnn` masks by the order of tokens in a row alone, so it must not see packed rows.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from jaxlm.models.attention_shards import on_each_device
from jaxlm.models.masks import MASKED, Places, bounds, may_see, padding_last

SMALLEST = 16  # tile that a tensor core takes
LOG2E = math.log2(math.e)


class Tiles(NamedTuple):
    """Sizes of a kernel's tiles; `held` stays with the program, it walks over the others."""

    held: int
    walked: int
    stages: int = 3  # tiles loaded ahead


class Options(NamedTuple):
    window: int
    soft_cap: float
    interpret: bool = False
    forward: Tiles = Tiles(128, 64)  # holds queries
    keys: Tiles = Tiles(128, 32)  # backward, holds keys
    queries: Tiles = Tiles(128, 32)  # backward, holds queries

    def fitting(self, length: int, itemsize: int) -> "Options":
        """With tiles no longer than a row, and half of them for operands of four bytes."""
        longest = max(SMALLEST, pl.next_power_of_2(length))
        size = lambda tokens: max(SMALLEST, min(tokens * 2 // itemsize, longest))
        fit = lambda tiles: Tiles(size(tiles.held), size(tiles.walked), tiles.stages)
        return self._replace(
            forward=fit(self.forward), keys=fit(self.keys), queries=fit(self.queries)
        )

    @property
    def multiple(self) -> int:
        """What the length of a row has to be a multiple of."""
        return max(max(t.held, t.walked) for t in (self.forward, self.keys, self.queries))


def cudnn(query_BLHK, key_BLGK, value_BLGK, *, segments_BL, positions_BL, window, soft_cap):
    """What `attention.attention` promises for rows of one document, padded on the right."""
    del segments_BL, positions_BL, soft_cap  # `attention.refusal` has seen to them
    attend = functools.partial(
        jax.nn.dot_product_attention,
        is_causal=True,
        local_window_size=(window - 1, 0) if window else None,
        implementation="cudnn",
    )
    return on_each_device(attend, query_BLHK, key_BLGK, value_BLGK)


def flash(
    query_BLHK, key_BLGK, value_BLGK, *, segments_BL, positions_BL, window, soft_cap, **options
):
    """What `attention.attention` promises. `options`: of `Options`."""
    _, L, _, K = query_BLHK.shape
    chosen = Options(window, soft_cap, **options).fitting(L, query_BLHK.dtype.itemsize)
    longer, wider = -L % chosen.multiple, pl.next_power_of_2(max(K, SMALLEST)) - K
    pad = lambda x: jnp.pad(x, ((0, 0), (0, longer), (0, 0), (0, wider)))
    out_BLHK = on_each_device(
        functools.partial(_attend, (chosen, K**-0.5)),
        *map(pad, (query_BLHK, key_BLGK, value_BLGK)),
        padding_last(jnp.pad(segments_BL, ((0, 0), (0, longer)))),
        jnp.pad(positions_BL, ((0, 0), (0, longer))),
    )
    return out_BLHK[:, :L, :, :K]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static, query_BLHK, key_BLGK, value_BLGK, segments_BL, positions_BL):
    return _forward(static, query_BLHK, key_BLGK, value_BLGK, segments_BL, positions_BL)[0]


def _forward(static, query_BLHK, key_BLGK, value_BLGK, segments_BL, positions_BL):
    """The output; and what the backward pass reads: inputs, output, log2 of the softmax's sums."""
    options, _ = static
    B, L, H, K = query_BLHK.shape
    C = options.forward.held
    spec = Specs(L, K, group=H // key_BLGK.shape[2])
    places = segments_BL, positions_BL
    out_BLHK, lse_BHL = pl.pallas_call(
        functools.partial(_forward_kernel, static),
        grid=(L // C, B, H),
        in_specs=[
            *[spec.walk()] * 2,
            spec.tile(C),
            *[spec.row_of_keys()] * 2,
            *[spec.tokens(C)] * 2,
            *[spec.all_tokens()] * 2,
        ],
        out_specs=[spec.tile(C), spec.sums(C)],
        out_shape=[
            jax.ShapeDtypeStruct(query_BLHK.shape, query_BLHK.dtype),
            jax.ShapeDtypeStruct((B, H, L), jnp.float32),
        ],
        **_how(options, options.forward, K),
        name="flash_forward",
    )(
        *_walks(places, options.forward, options.window),
        *(query_BLHK, key_BLGK, value_BLGK),
        *places,
        *places,
    )
    out_BLHK, lse_BHL = (checkpoint_name(x, "attended") for x in (out_BLHK, lse_BHL))
    return out_BLHK, (query_BLHK, key_BLGK, value_BLGK, *places, out_BLHK, lse_BHL)


def _backward(static, residuals, d_out_BLHK):
    query_BLHK, key_BLGK, value_BLGK, *places, out_BLHK, lse_BHL = residuals
    products_BLHK = out_BLHK.astype(jnp.float32) * d_out_BLHK.astype(jnp.float32)
    delta_BHL = jnp.sum(products_BLHK, axis=-1).swapaxes(1, 2)
    known = value_BLGK, d_out_BLHK, lse_BHL, delta_BHL, *places, *places
    d_query_BLHK = _backward_of_queries(static, query_BLHK, key_BLGK, *known)
    d_key_BLGK, d_value_BLGK = _backward_of_keys(static, query_BLHK, key_BLGK, *known)
    return d_query_BLHK, d_key_BLGK, d_value_BLGK, None, None


_attend.defvjp(_forward, _backward)


def _backward_of_keys(static, query_BLHK, key_BLGK, *known):
    options, _ = static
    (B, L, H, K), G = query_BLHK.shape, key_BLGK.shape[2]
    M = options.keys.held
    spec = Specs(L, K, group=H // G)
    like_keys = jax.ShapeDtypeStruct(key_BLGK.shape, key_BLGK.dtype)
    return pl.pallas_call(
        functools.partial(_backward_kernel_of_keys, static),
        grid=(L // M, B, G),
        in_specs=[
            *[spec.walk()] * 2,
            spec.rows_of_queries(),
            *[spec.tile(M)] * 2,
            spec.rows_of_queries(),
            *[spec.rows_of_sums()] * 2,
            *[spec.all_tokens()] * 2,
            *[spec.tokens(M)] * 2,
        ],
        out_specs=[spec.tile(M)] * 2,
        out_shape=[like_keys] * 2,
        **_how(options, options.keys, K),
        name="flash_backward_of_keys",
    )(
        *_walks(known[-2:], options.keys, options.window, by_keys=True),
        query_BLHK,
        key_BLGK,
        *known,
    )


def _backward_of_queries(static, query_BLHK, key_BLGK, *known):
    options, _ = static
    B, L, H, K = query_BLHK.shape
    C = options.queries.held
    spec = Specs(L, K, group=H // key_BLGK.shape[2])
    return pl.pallas_call(
        functools.partial(_backward_kernel_of_queries, static),
        grid=(L // C, B, H),
        in_specs=[
            *[spec.walk()] * 2,
            spec.tile(C),
            *[spec.row_of_keys()] * 2,
            spec.tile(C),
            *[spec.sums(C)] * 2,
            *[spec.tokens(C)] * 2,
            *[spec.all_tokens()] * 2,
        ],
        out_specs=spec.tile(C),
        out_shape=jax.ShapeDtypeStruct(query_BLHK.shape, query_BLHK.dtype),
        **_how(options, options.queries, K),
        name="flash_backward_of_queries",
    )(*_walks(known[-2:], options.queries, options.window), query_BLHK, key_BLGK, *known)


# What the kernels see of each array: programs are numbered by tile, row and head.


class Specs(NamedTuple):
    """Parts of arrays that one program reads or writes; `group`: query heads to a key head."""

    length: int
    width: int
    group: int

    def walk(self):
        return pl.BlockSpec((None, 1), lambda t, b, h: (b, t))

    def tile(self, tokens):
        return pl.BlockSpec((None, tokens, None, self.width), lambda t, b, h: (b, t, h, 0))

    def tokens(self, tokens):
        return pl.BlockSpec((None, tokens), lambda t, b, h: (b, t))

    def all_tokens(self):
        return pl.BlockSpec((None, self.length), lambda t, b, h: (b, 0))

    def sums(self, tokens):
        return pl.BlockSpec((None, None, tokens), lambda t, b, h: (b, h, t))

    def row_of_keys(self):
        shape = (None, self.length, None, self.width)
        return pl.BlockSpec(shape, lambda t, b, h: (b, 0, h // self.group, 0))

    def rows_of_queries(self):
        shape = (None, self.length, self.group, self.width)
        return pl.BlockSpec(shape, lambda t, b, g: (b, 0, g, 0))

    def rows_of_sums(self):
        return pl.BlockSpec((None, self.group, self.length), lambda t, b, g: (b, g, 0))


def _how(options, tiles, width):
    params = triton.CompilerParams(num_warps=4 if width <= 64 else 8, num_stages=tiles.stages)
    return {"compiler_params": params, "interpret": options.interpret}


def _walks(places, tiles, window, *, by_keys=False):
    """For each held tile the first of the tiles to walk over, and that after the last, [B, T]."""
    segments_BL, positions_BL = places
    B, L = segments_BL.shape
    cut = lambda size: bounds(
        Places(segments_BL.reshape(B, L // size, size), positions_BL.reshape(B, L // size, size))
    )
    column = lambda bounds: jax.tree.map(lambda x_BT: x_BT[:, :, None], bounds)
    row = lambda bounds: jax.tree.map(lambda x_BT: x_BT[:, None], bounds)
    held, walked = column(cut(tiles.held)), row(cut(tiles.walked))
    seen = may_see(walked, held, window) if by_keys else may_see(held, walked, window)
    after_last = seen.shape[2] - jnp.argmax(seen[:, :, ::-1], axis=2)
    return jnp.argmax(seen, axis=2).astype(jnp.int32), after_last.astype(jnp.int32)


# The kernels. A `_ref` is a view of what the program may read or write.


def _forward_kernel(
    static,
    first_ref,
    end_ref,
    query_ref,
    key_ref,
    value_ref,
    segments_ref,
    positions_ref,
    key_segments_ref,
    key_positions_ref,
    out_ref,
    lse_ref,
):
    query_CK = query_ref[...]
    places = segments_ref[...], positions_ref[...]
    M = static[0].forward.walked

    def look(tile, found):
        out_CK, top_C, total_C = found
        keys = pl.ds(tile * M, M)
        value_MK = value_ref[keys, :]
        key_places = key_segments_ref[keys], key_positions_ref[keys]
        scores_CM, _ = _scores(static, query_CK, key_ref[keys, :], places, key_places)
        new_top_C = jnp.maximum(top_C, jnp.max(scores_CM, axis=1))
        weights_CM = jnp.exp2(scores_CM - new_top_C[:, None])
        kept_C = jnp.exp2(top_C - new_top_C)
        out_CK = out_CK * kept_C[:, None] + _dot(weights_CM.astype(value_MK.dtype), value_MK)
        return out_CK, new_top_C, total_C * kept_C + jnp.sum(weights_CM, axis=1)

    C, K = query_CK.shape
    nothing = jnp.zeros((C, K), jnp.float32), jnp.full(C, MASKED, jnp.float32), jnp.zeros(C)
    out_CK, top_C, total_C = jax.lax.fori_loop(first_ref[0], end_ref[0], look, nothing)
    out_ref[...] = (out_CK / total_C[:, None]).astype(out_ref.dtype)
    lse_ref[...] = top_C + jnp.log2(total_C)


def _backward_kernel_of_keys(
    static,
    first_ref,
    end_ref,
    query_ref,
    key_ref,
    value_ref,
    d_out_ref,
    lse_ref,
    delta_ref,
    segments_ref,
    positions_ref,
    key_segments_ref,
    key_positions_ref,
    d_key_ref,
    d_value_ref,
):
    key_MK, value_MK = key_ref[...], value_ref[...]
    key_places = key_segments_ref[...], key_positions_ref[...]
    C = static[0].keys.walked

    def of_head(head, sums):
        def look(tile, sums):
            d_key_MK, d_value_MK = sums
            queries = pl.ds(tile * C, C)
            query_CK, d_out_CK = query_ref[queries, head, :], d_out_ref[queries, head, :]
            places = segments_ref[queries], positions_ref[queries]
            scores_CM, slope = _scores(static, query_CK, key_MK, places, key_places)
            weights_CM = jnp.exp2(scores_CM - lse_ref[head, queries][:, None])
            d_value_MK += _dot(weights_CM.astype(d_out_CK.dtype).T, d_out_CK)
            d_weights_CM = _dot(d_out_CK, value_MK.T)
            d_scores_CM = weights_CM * (d_weights_CM - delta_ref[head, queries][:, None]) * slope
            d_key_MK += _dot(d_scores_CM.astype(query_CK.dtype).T, query_CK)
            return d_key_MK, d_value_MK

        return jax.lax.fori_loop(first_ref[0], end_ref[0], look, sums)

    zeros_MK = jnp.zeros(key_MK.shape, jnp.float32)
    heads = query_ref.shape[1]
    d_key_MK, d_value_MK = jax.lax.fori_loop(0, heads, of_head, (zeros_MK, zeros_MK))
    d_key_ref[...] = d_key_MK.astype(d_key_ref.dtype)
    d_value_ref[...] = d_value_MK.astype(d_value_ref.dtype)


def _backward_kernel_of_queries(
    static,
    first_ref,
    end_ref,
    query_ref,
    key_ref,
    value_ref,
    d_out_ref,
    lse_ref,
    delta_ref,
    segments_ref,
    positions_ref,
    key_segments_ref,
    key_positions_ref,
    d_query_ref,
):
    query_CK, d_out_CK = query_ref[...], d_out_ref[...]
    lse_C1, delta_C1 = lse_ref[...][:, None], delta_ref[...][:, None]
    places = segments_ref[...], positions_ref[...]
    M = static[0].queries.walked

    def look(tile, d_query_CK):
        keys = pl.ds(tile * M, M)
        key_MK = key_ref[keys, :]
        key_places = key_segments_ref[keys], key_positions_ref[keys]
        scores_CM, slope = _scores(static, query_CK, key_MK, places, key_places)
        weights_CM = jnp.exp2(scores_CM - lse_C1)
        d_weights_CM = _dot(d_out_CK, value_ref[keys, :].T)
        d_scores_CM = weights_CM * (d_weights_CM - delta_C1) * slope
        return d_query_CK + _dot(d_scores_CM.astype(key_MK.dtype), key_MK)

    zeros_CK = jnp.zeros(query_CK.shape, jnp.float32)
    d_query_CK = jax.lax.fori_loop(first_ref[0], end_ref[0], look, zeros_CK)
    d_query_ref[...] = d_query_CK.astype(d_query_ref.dtype)


def _scores(static, query_CK, key_MK, places, key_places):
    """Scores times log2(e), capped and masked; and the derivative of scores by query · key."""
    options, scale = static
    scores_CM, slope = _dot(query_CK, key_MK.T) * scale, scale
    if options.soft_cap:
        # By exponentials: they are the same on every platform.
        tanh_CM = 1 - 2 / (jnp.exp2(scores_CM * (2 * LOG2E / options.soft_cap)) + 1)
        scores_CM, slope = options.soft_cap * tanh_CM, scale * (1 - tanh_CM * tanh_CM)
    (segments_C, positions_C), (key_segments_M, key_positions_M) = places, key_places
    distance_CM = positions_C[:, None] - key_positions_M[None]
    seen_CM = (segments_C[:, None] == key_segments_M[None]) & (distance_CM >= 0)
    if options.window:
        seen_CM &= distance_CM < options.window
    return jnp.where(seen_CM, scores_CM * LOG2E, MASKED), slope


def _dot(x, y):
    """In true float32 for operands of it."""
    exact = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return triton.dot(x, y, precision=exact)
