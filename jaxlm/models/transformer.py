"""One decoder for many families: pure functions outside, Flax NNX modules inside.

Letters: B batch, L length, D width, V vocabulary.

Params are a plain dict:
  embed/table [V, D], embed/positions [N, D] where positions are learned
  blocks/…/attention_norm, attention/{query, key, value, output}, attention_post_norm, and the same
  of mlp/{gate, up, down}, or of mlp/router and mlp/experts/{gate, up, down} [E, in, out]
  final_norm/scale, head/kernel [D, V] unless tied
Scanned, each leaf of `blocks` has a leading layer axis; else there is one dict per layer, named
"0", "1", ... . The numbers are the same: `stack_layers` and `unstack_layers` go between the two.

Embedding and head have variance 1/(4·width): logits then start with a standard deviation of 1/2,
and the loss within 0.25 of log V. A tied head's too, since what the blocks write to the residual
stream, with a scale near 1, drowns the token's own embedding.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm import sharding
from jaxlm.contract import LM, Params
from jaxlm.models import (
    attention_ring,
    cache,
    expert_shards,
    experts,
    layers,
    lookup,
    lora,
    pattern,
    quantized,
    rope,
)
from jaxlm.models.masks import Places, document_lengths
from jaxlm.models.options import REMAT, DecoderConfig, resolve
from jaxlm.models.products import float32_product

__all__ = ["DecoderConfig", "decoder", "parameter_count_by_part", "stack_layers", "unstack_layers"]


class Beside(NamedTuple):
    """What a block gives next to its output."""

    taps: Any
    routed: experts.Routed | None  # how tokens went to experts
    new: cache.Memory  # what is to be remembered of them


class Block(nnx.Module):
    """x + attention(norm(x)), then + mlp(norm(·)): of the sum, or of x when parallel.

    Norms stand before both parts, after them, or on both sides.
    """

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        before, after = (config.norm_place in (side, "both") for side in ("before", "after"))
        norm = lambda here: layers.Norm(config.width, config) if here else None
        self.attention_norm = norm(before)
        self.attention = layers.SelfAttention(config, rngs)
        self.attention_post_norm = norm(after)
        self.mlp_norm = norm(before)
        feed_forward = experts.Mixture if config.experts else layers.FeedForward
        self.mlp = feed_forward(config, rngs)
        self.mlp_post_norm = norm(after)
        self.parallel = config.parallel_residual

    def __call__(self, x_BLD, context: layers.Context, past: cache.Memory | None = None):
        with jax.named_scope("attention"):
            input_BLD = _normed(self.attention_norm, x_BLD)
            mixed_BLD, attention_taps, new = self.attention(input_BLD, context, past)
        between_BLD = x_BLD + _normed(self.attention_post_norm, mixed_BLD)
        mlp_input_BLD = _normed(self.mlp_norm, x_BLD if self.parallel else between_BLD)
        with jax.named_scope("mlp"):
            fed_BLD, mlp_taps, routed = self.mlp(mlp_input_BLD, context)
        y_BLD = between_BLD + _normed(self.mlp_post_norm, fed_BLD)
        return y_BLD, Beside({"attention": attention_taps, "mlp": mlp_taps}, routed, new)

    def looks(self, x_BLD, context: layers.Context):
        """See `layers.SelfAttention`."""
        return self.attention.looks(_normed(self.attention_norm, x_BLD), context)


def _normed(norm, x):
    return x if norm is None else norm(x)


class Embedding(nnx.Module):
    """A vector per token, learned positions if there are such, and a tied head's logits."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        draw = layers.truncated_normal(config.init_scale**2 / 4, "fan_out")
        shape = config.vocabulary, config.width
        self.table = nnx.Param(draw(rngs.params(), shape, config.param_dtype))
        places = config.learned_positions, config.width
        learned = lambda: nnx.Param(draw(rngs.params(), places, config.param_dtype))
        self.positions = learned() if config.learned_positions else None
        self.scale, self.dtype = config.embedding_scale, config.dtype

    def __call__(self, tokens_BL, positions_BL):
        x_BLD = lookup.rows(self.table[...], tokens_BL, self.dtype)
        if self.scale != 1:
            x_BLD = x_BLD * jnp.asarray(self.scale, self.dtype)  # rounded to it first, as in Gemma
        if self.positions is None:
            return x_BLD
        table_ND = layers.gathered(self.positions, self.dtype, "positions", "embed")
        if tokens_BL.shape[1] > len(table_ND):
            raise ValueError(
                f"rows of {tokens_BL.shape[1]} tokens do not fit config.model.learned_positions = "
                f"{len(table_ND)}: the model knows no positions beyond."
            )
        return x_BLD + sharding.take_rows(table_ND, positions_BL, "batch", "length", "width")

    def logits(self):
        """hidden -> logits; gathers the table first."""
        table_VD = layers.gathered(self.table, self.dtype, "vocabulary", "embed")
        return lambda hidden: float32_product("...D,VD->...V", hidden, table_VD)


class Head(nnx.Module):
    """Logits from a kernel of its own."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        draw = layers.truncated_normal(config.init_scale**2 / 4)
        shape = config.width, config.vocabulary
        self.kernel = nnx.Param(draw(rngs.params(), shape, config.param_dtype))
        self.dtype = config.dtype

    def logits(self):
        """hidden -> logits; gathers the kernel first."""
        kernel_DV = layers.gathered(self.kernel, self.dtype, *layers.KERNEL_AXES["head"])
        return lambda hidden: float32_product("...D,DV->...V", hidden, kernel_DV)


class Ends(nnx.Module):
    """What lies before and after the blocks."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.embed = Embedding(config, rngs)
        self.final_norm = layers.Norm(config.width, config)
        self.head = None if config.tied else Head(config, rngs)


def decoder(config: DecoderConfig, platform: str, *, packed: bool = True, sequence: int = 1) -> LM:
    """The language model of a config on a platform: `cpu`, `gpu` or `tpu`.

    `packed`: rows may hold several documents. `sequence`: devices that split the positions of a
    row. Raises `ValueError` for shapes that cannot be and names that are not known.
    """
    config = resolve(config, platform, packed=packed, sequence=sequence)
    init_ends, ends_of = functional(lambda rngs: Ends(config, rngs))
    init_block, block_of = functional(lambda rngs: Block(config, rngs))
    scanned = config.scan_layers == "on"

    def init(key):
        ends_key, blocks_key = jax.random.split(key)
        blocks = jax.vmap(init_block)(jax.random.split(blocks_key, config.layers))
        params = {**init_ends(ends_key), "blocks": blocks}
        return params if scanned else unstack_layers(params)

    def hidden(params, batch, key=None):
        del key  # nothing here is random
        return read(params, batch, watched=False)

    def attended(params, batch, key=None):
        del key
        return read(params, batch, watched=True)

    def read(params, batch, watched):
        balanced = config.attention == "ring" and attention_ring.can_balance(batch["tokens"])
        batch = attention_ring.balance(batch) if balanced else batch
        ends = ends_of(_without_blocks(params))
        contexts = _contexts(config, batch)

        def block(kind, x_BLD, block_params):
            x_BLD, beside = block_of(block_params)(x_BLD, contexts[kind])
            x_BLD = sharding.constrain(x_BLD, "batch", "length", "width")
            return x_BLD, (beside.taps, beside.routed)

        with jax.named_scope("embedding"):
            x_BLD = ends.embed(batch["tokens"], batch["positions"])
        of_kind = lambda kind: rematerialized(functools.partial(block, kind), config)
        of_kind, x = (_with_input(of_kind), (x_BLD, x_BLD)) if watched else (of_kind, x_BLD)
        x, beside = pattern.through(of_kind, config.kinds, x, scanned, params["blocks"])
        x_BLD, *before = x if watched else (x,)
        x_BLD = ends.final_norm(x_BLD)
        looks = [of_last(params["blocks"], x_BLD, contexts) for x_BLD in before]
        taps, routed = _apart(beside, scanned)
        penalties = {}
        if routed is not None and config.router_balance:
            penalties = {"load_balance": config.router_balance * experts.load_balance(routed)}
        x_BLD = attention_ring.in_order(x_BLD) if balanced else x_BLD
        return x_BLD, {"blocks": taps}, penalties, *looks

    def of_last(blocks, x_BLD, contexts):
        last = jax.tree.map(lambda x: x[-1], blocks) if scanned else blocks[str(config.layers - 1)]
        of = lambda last, x_BLD: block_of(last).looks(x_BLD, contexts[config.kinds[-1]])
        return jax.checkpoint(of)(last, x_BLD)  # the scores of all heads are not stored

    def remembered(params, batch, memory=(), slots=None):
        ends = ends_of(_without_blocks(params))
        contexts = _contexts(config, batch, slots)

        def block(kind, x_BLD, block_params, *memory):
            x_BLD, beside = block_of(block_params)(x_BLD, contexts[kind], *memory)
            return sharding.constrain(x_BLD, "batch", "length", "width"), beside.new

        parts = params["blocks"], *memory
        x_BLD = ends.embed(batch["tokens"], batch["positions"])
        of_kind = lambda kind: functools.partial(block, kind)
        x_BLD, new = pattern.through(of_kind, config.kinds, x_BLD, scanned, *parts)
        return ends.final_norm(x_BLD), new

    def begin(params, batch, length):
        hidden_BLD, new = remembered(params, batch)
        return hidden_BLD, cache.begin(new, Places(batch["segments"], batch["positions"]), length)

    def extend(params, batch, past):
        here = Places(batch["segments"], batch["positions"])
        slots = cache.slots(past, here, write=not scanned)
        hidden_BLD, new = remembered(params, batch, [past.blocks], slots)
        return hidden_BLD, cache.extended(past, new, here, slots)

    def head(params):
        ends = ends_of(_without_blocks(params))
        logits = (ends.embed if config.tied else ends.head).logits()
        return lambda hidden: layers.soft_cap(logits(hidden), config.logit_soft_cap)

    def unembed(params, hidden):
        return head(params)(hidden)

    shapes = jax.eval_shape(init, jax.random.key(0))
    axes = jax.tree_util.tree_map_with_path(lambda path, _: _axes(path, config), shapes)
    lm = LM(init, hidden, unembed, axes, config.loss_chunk, head, begin, extend)
    lm = lm._replace(low_rank=True, positions=config.learned_positions)
    # Where devices split the positions of a row, these are in another order.
    return lm if config.attention == "ring" else lm._replace(attended=attended)


def functional(make: Callable[[nnx.Rngs], nnx.Module]) -> tuple[Callable, Callable]:
    """A module as two functions: key -> plain dict of params, and that dict -> module.

    The dict may hold factors beside kernels (`models.lora`), which the modules of these then have,
    and kernels in few bits (`models.quantized`).
    """

    def init(key):
        return nnx.to_pure_dict(nnx.split(make(nnx.Rngs(key)), nnx.Param, ...)[1])

    graphdef = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))[0]

    def of(params):
        plain, low_rank = lora.apart(params)
        plain, few_bits = quantized.apart(plain)
        module = nnx.merge(graphdef, plain)
        part: Any = lambda path: functools.reduce(getattr, path, module)
        for path, factors in low_rank.items():
            part(path).low_rank = nnx.data(factors)
        for path, kernel in few_bits.items():
            part(path).kernel = nnx.data(kernel)
        return module

    return init, of


def rematerialized(block: Callable, config: DecoderConfig) -> Callable:
    """The block, storing for its backward pass only what `config.remat` says."""
    if config.remat == "none":
        return block
    # A scan's body is its own computation already; unrolled, XLA could merge the two passes.
    prevent_cse = config.scan_layers == "off"
    return jax.checkpoint(block, policy=REMAT[config.remat], prevent_cse=prevent_cse)


def stack_layers(params: Params) -> Params:
    """Params (or taps) with `blocks` as one stack; those that have it already are returned."""
    blocks = params["blocks"]
    if "0" not in blocks:
        return params
    ordered = [blocks[str(i)] for i in range(len(blocks))]
    return {**params, "blocks": jax.tree.map(lambda *leaves: jnp.stack(leaves), *ordered)}


def unstack_layers(params: Params) -> Params:
    """Params (or taps) with `blocks` as a dict of layers; the inverse of `stack_layers`."""
    blocks = params["blocks"]
    if "0" in blocks:
        return params
    count = jax.tree.leaves(blocks)[0].shape[0]
    layer = lambda i: jax.tree.map(lambda leaf: leaf[i], blocks)
    return {**params, "blocks": {str(i): layer(i) for i in range(count)}}


def parameter_count_by_part(params: Any) -> dict[str, int]:
    """Parameters of the embedding, attention, mlp, norms and head, from params or their shapes."""
    parts = {"embed": "embedding", "attention": "attention", "mlp": "mlp", "head": "head"}
    counts = dict.fromkeys((*parts.values(), "norms"), 0)
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        names = _names(path)
        of_norm = any(name.endswith("norm") for name in names)
        part = "norms" if of_norm else next(parts[name] for name in names if name in parts)
        counts[part] += math.prod(leaf.shape)
    return counts


def _with_input(of_kind):
    """Blocks that hand on what they read next to what they give."""

    def of(kind):
        block = of_kind(kind)

        def both(x, *parts):
            y_BLD, beside = block(x[0], *parts)
            return (y_BLD, x[0]), beside

        return both

    return of


def _apart(beside, scanned):
    """Taps in the form of the blocks, and how their tokens went to experts, all layers together."""
    if scanned:
        taps, routed = beside
        return taps, jax.tree.map(lambda leaf: leaf.sum(axis=0), routed)
    taps = {i: taps for i, (taps, _) in beside.items()}
    return taps, jax.tree.map(lambda *leaves: sum(leaves), *(r for _, r in beside.values()))


def _contexts(config, batch, past=None):
    """What the blocks of each kind read of a batch; `past`: where stands what they remember."""
    places = Places(batch["segments"], batch["positions"])
    kinds, turns = dict.fromkeys(config.kinds), {}
    if config.rotary_width:
        dynamic = any(kind.rope_scaling.startswith("dynamic") for kind in kinds)
        lengths_BL = document_lengths(places) if dynamic else None
        turns = {
            how: rope.turns(places.positions_BL, config.rotary_width, *how, lengths_BL)
            for how in dict.fromkeys((kind.rope_theta, kind.rope_scaling) for kind in kinds)
        }
    mask_BL = (places.segments_BL > 0).astype(jnp.float32)
    return {
        kind: layers.Context(mask_BL, *places, turns.get(kind[1:]), kind.window, past)
        for kind in kinds
    }


def _axes(path, config):
    """Logical axes of the param at a path."""
    *parents, kind = _names(path)
    if parents[0] == "embed":
        return "vocabulary" if kind == "table" else "positions", "embed"
    if parents[-1].endswith("norm"):
        axes = ("norm",)
    elif "experts" in parents:
        axes = expert_shards.kernel_axes(parents[-1], config.experts_over)
    else:
        axes = layers.KERNEL_AXES[parents[-1]]
        axes = axes[1:] if kind == "bias" else axes
    stacked = config.scan_layers == "on" and parents[0] == "blocks"
    return ("layers", *axes) if stacked else axes


def _names(path):
    return [entry.key for entry in path]


def _without_blocks(params):
    return {name: part for name, part in params.items() if name != "blocks"}
