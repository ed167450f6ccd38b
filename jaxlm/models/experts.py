"""A mixture of experts as the feed-forward: each token goes through a few of many (2401.04088).

Letters: B batch, L length, T tokens, D width, F width of an expert; E experts, C experts chosen for
each token, P = T·C pairs of a token and an expert; S slots for pairs in blocks of N; I and O what a
kernel takes and gives.

The router's softmax is over all experts; the largest C weights are kept and made to sum to 1. No
token is ever dropped: pairs are sorted by their expert, each expert's run is filled up to whole
blocks, and each block is multiplied by the kernels of its expert, so that next to all products of a
dense feed-forward only the filling is spent, about an eighth. `jax.lax.ragged_dot` promises
the same, but on CPUs jax 0.10 multiplies every token by every expert for it.

On a mesh each device does so for its own tokens, with a slice of the width of every expert (the
axis "ffn"), so no expert's popularity lets other devices wait; kernels are stored split by "embed"
too, as dense ones are, and gathered block by block. Or devices have whole experts, whose kernels
stay where they are (`config.model.experts_over`): then they wait for the most popular one, and
`expert_shards` says what is won.

The load-balance loss is that of Switch (2101.03961) as Hugging Face counts it: E · Σ f·p over the
tokens of all layers together, f the pairs per token and p the mean weight that an expert gets. It
is C at the least, where all are even, and as a product of means no sum over rows: accumulated
micro-batches are balanced each for itself.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from jaxlm.models import expert_shards, layers, lora, quantized
from jaxlm.models.expert_blocks import block_size, slots
from jaxlm.models.expert_devices import on_each_device, summed
from jaxlm.models.options import ACTIVATIONS, DecoderConfig
from jaxlm.models.products import needed


class Routed(NamedTuple):
    """How a layer's tokens were routed; sums, so that layers add up."""

    pairs_E: jax.Array  # how many tokens chose each expert
    weights_E: jax.Array  # summed softmax of each, with gradient
    tokens: jax.Array


class Kernel(nnx.Module):
    """One kernel of every expert."""

    def __init__(self, name, inputs, outputs, config, rngs, *, variance=1.0):
        draw = layers.truncated_normal(config.init_scale**2 * variance, batch_axis=0)
        shape = config.experts, inputs, outputs
        self.kernel = nnx.Param(draw(rngs.params(), shape, config.param_dtype))
        self.axes = expert_shards.kernel_axes(name, config.experts_over)
        self.low_rank = None

    def __call__(self, dtype):
        """The kernel, and the factors beside it if there are such."""
        expert, takes, gives = self.axes
        kernel = layers.kernel_of(self, dtype, *self.axes)
        if isinstance(kernel, dict):
            kernel = quantized.gathered(kernel, *self.axes)
        kernels = [kernel]
        if self.low_rank is not None:
            kernels += [
                layers.gathered(self.low_rank[lora.A], dtype, expert, takes, None),
                layers.gathered(self.low_rank[lora.B], dtype, expert, None, gives),
            ]
        return tuple(kernels)


class Experts(nnx.Module):
    """The kernels of all experts."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        D, F = config.width, config.ffn_width
        gated = ACTIVATIONS[config.activation][1]
        self.gate = Kernel("gate", D, F, config, rngs) if gated else None
        self.up = Kernel("up", D, F, config, rngs)
        self.down = Kernel("down", F, D, config, rngs, variance=1 / (2 * config.layers))

    def __call__(self, dtype):
        """What of them there is, by name."""
        return {
            name: kernel(dtype)
            for name, kernel in (("gate", self.gate), ("up", self.up), ("down", self.down))
            if kernel is not None
        }


class Mixture(nnx.Module):
    """The feed-forward of the experts that a router chooses for each token."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        self.router = layers.Dense("router", config.width, config.experts, config, rngs)
        self.experts = Experts(config, rngs)
        self.config = config

    def __call__(self, x_BLD, context: layers.Context):
        """The output, its taps, and how the tokens were routed."""
        c, mask_BL = self.config, context.mask_BL
        logits_BLE, router_tap = self.router(x_BLD, mask_BL)
        weights_BLE = jax.nn.softmax(logits_BLE.astype(jnp.float32), axis=-1)
        weights_BLC, chosen_BLC = jax.lax.top_k(weights_BLE, c.experts_per_token)
        weights_BLC /= jnp.sum(weights_BLC, axis=-1, keepdims=True)
        operands = self.experts(x_BLD.dtype), x_BLD, chosen_BLC, weights_BLC, mask_BL
        if c.experts_over:
            apply = functools.partial(expert_shards.apply, c)
        else:
            apply = functools.partial(_apply, ACTIVATIONS[c.activation][0])
        y_BLD, taps = on_each_device(apply, c, *operands)
        chose_BLE = jnp.sum(jax.nn.one_hot(chosen_BLC, c.experts), axis=2)
        routed = Routed(
            jnp.sum(chose_BLE * mask_BL[..., None], axis=(0, 1)),
            jnp.sum(weights_BLE * mask_BL[..., None], axis=(0, 1)),
            jnp.sum(mask_BL),
        )
        experts_taps = {name: {"kernel": tap} for name, tap in taps.items()}
        return y_BLD, {"router": router_tap, "experts": experts_taps}, routed


def load_balance(routed: Routed) -> jax.Array:
    """The loss of tokens so routed, [] float32."""
    rows = jnp.maximum(routed.tokens, 1)
    shares_E = jax.lax.stop_gradient(routed.pairs_E) / rows
    return len(shares_E) * jnp.sum(shares_E * routed.weights_E / rows)


@jax.custom_vjp
def grouped_product(x_SI: jax.Array, kernel_EIO: Any, expert_B: jax.Array) -> jax.Array:
    """Each block of rows times the kernel of its expert, [S, O]; B blocks, in the order of rows.

    The kernels may be held in few bits (`models.quantized`)."""
    return _multiplied(x_SI, kernel_EIO, expert_B)


def _multiplied(x_SI, kernel_EIO, expert_B):
    kernel_EIO = quantized.array(kernel_EIO, x_SI.dtype)

    def one(_, block):
        x_NI, expert = block
        return None, x_NI @ kernel_EIO[expert]

    y_BNO = jax.lax.scan(one, None, (_blocks(x_SI, expert_B), expert_B))[1]
    return y_BNO.reshape(len(x_SI), -1)


def _forward(x_SI, kernel_EIO, expert_B):
    kernel = jax.tree.map(lambda part: part.value, kernel_EIO)
    y_SO = _multiplied(x_SI.value, kernel, expert_B.value)
    # The kernel is stored in any case, for its shape: it is there anyway.
    x_SI, _ = needed(x_SI, kernel_EIO)
    return y_SO, (x_SI, kernel, expert_B.value)


def _backward(saved, d_SO):
    x_SI, kernel_EIO, expert_B = saved
    kernel_EIO, d_SO = quantized.array_again(kernel_EIO, d_SO)
    trained = x_SI is not None

    def one(d_kernel_EIO, block):
        x_NI, d_NO, expert = block
        if trained:
            d_here_IO = jnp.einsum("NI,NO->IO", x_NI, d_NO, preferred_element_type=jnp.float32)
            d_kernel_EIO = d_kernel_EIO.at[expert].add(d_here_IO)
        return d_kernel_EIO, d_NO @ kernel_EIO[expert].T

    zeros = jnp.zeros(kernel_EIO.shape, jnp.float32) if trained else None
    blocks = _blocks(x_SI, expert_B) if trained else None, _blocks(d_SO, expert_B), expert_B
    d_kernel_EIO, d_x_BNI = jax.lax.scan(one, zeros, blocks)
    if d_kernel_EIO is not None:
        d_kernel_EIO = d_kernel_EIO.astype(kernel_EIO.dtype)
    return d_x_BNI.reshape(len(d_SO), -1), d_kernel_EIO, None


grouped_product.defvjp(_forward, _backward, symbolic_zeros=True)


def _blocks(x_SI, expert_B):
    return x_SI.reshape(len(expert_B), -1, x_SI.shape[-1])


def _apply(nonlinearity, split, kernels, x_BLD, chosen_BLC, weights_BLC, mask_BL):
    """The mixture for the tokens of one device, and taps of all; with a slice of each expert."""
    B, L, C = chosen_BLC.shape
    x_TD, expert_P = x_BLD.reshape(B * L, -1), chosen_BLC.reshape(-1)
    E = len(jax.tree.leaves(kernels["up"][0])[0])
    size = block_size(len(expert_P), E)
    slot_P, expert_B, _ = slots(expert_P, E, size)
    S = len(expert_B) * size
    token_P = jnp.arange(len(expert_P)) // C
    # The slots that nobody takes hold a row of zeros behind the last token.
    token_S = jnp.full(S, B * L).at[slot_P].set(token_P)
    padded = lambda x_T: jnp.concatenate([x_T, jnp.zeros_like(x_T[:1])])
    x_SD = padded(x_TD)[token_S]
    mask_S = padded(mask_BL.reshape(-1))[token_S]

    def tap(y_SO):
        size_SO = jnp.abs(y_SO).astype(jnp.float32) * mask_S[:, None]
        of_expert = functools.partial(jax.ops.segment_sum, segment_ids=expert_B, num_segments=E)
        sums = of_expert(size_SO.reshape(len(expert_B), size, -1).sum(1))
        return summed((sums, of_expert(mask_S.reshape(-1, size).sum(1))), split.tokens)

    found = {"up": _product(x_SD, kernels["up"], expert_B)}
    inner_SF = found["up"]
    if "gate" in kernels:
        found["gate"] = _product(x_SD, kernels["gate"], expert_B)
        inner_SF = nonlinearity(found["gate"]) * inner_SF
    else:
        inner_SF = nonlinearity(inner_SF)
    part_SD = _product(inner_SF, kernels["down"], expert_B)  # of the width that is here
    part_TCD = part_SD[slot_P].reshape(B * L, C, -1).astype(jnp.float32)
    part_TD = jnp.sum(part_TCD * weights_BLC.reshape(B * L, C, 1), axis=1).astype(x_TD.dtype)
    y_BLD = summed(part_TD, split.width).reshape(x_BLD.shape)
    known = {name: jax.lax.stop_gradient(y) for name, y in found.items()}
    known["down"] = summed(jax.lax.stop_gradient(part_SD), split.width)
    return y_BLD, {name: tap(y_SO) for name, y_SO in known.items()}


def _product(x_SI, kernels, expert_B):
    """With the product of the factors beside a kernel added, if there are such."""
    kernel_EIO, *factors = kernels
    y_SO = grouped_product(x_SI, kernel_EIO, expert_B)
    if not factors:
        return y_SO
    inner_SR = grouped_product(x_SI, factors[0], expert_B)
    return y_SO + grouped_product(inner_SR, factors[1], expert_B)
