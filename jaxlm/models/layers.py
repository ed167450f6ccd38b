"""The parts of a block as NNX modules.

Letters: B batch, L length, D width, H query heads, G key/value heads, K head width, I and O what
a kernel takes and gives.

Kernels are two-dimensional, [in, out], in the parameter dtype; activations and products are in the
compute dtype; statistics of norms and rotary angles are float32.

Every dense kernel reports a tap next to its output: (sum over tokens of mask·|y| [O], sum of
mask []), float32, without gradient. Taps are returned, never stored on the module, so a program
that does not read them does not compute them.

Initial kernels are truncated normals with variance 1/in, so that products keep the scale of what
they read; what writes to the residual stream has 1/(in·2·layers), so that the sum of all blocks
keeps it too (GPT-2).
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from jaxlm import sharding
from jaxlm.models import cache
from jaxlm.models.attention import attention
from jaxlm.models.masks import Places
from jaxlm.models.options import ACTIVATIONS, DecoderConfig
from jaxlm.models.products import project

# Logical axes of each kernel, by name. A bias has the last one.
KERNEL_AXES = {
    "query": ("embed", "heads"),
    "key": ("embed", "kv_heads"),
    "value": ("embed", "kv_heads"),
    "output": ("heads", "embed"),
    "gate": ("embed", "ffn"),
    "up": ("embed", "ffn"),
    "down": ("ffn", "embed"),
    "head": ("embed", "vocabulary"),
}


class Context(NamedTuple):
    """What every block reads of a batch."""

    mask_BL: jax.Array  # float32; 0 = padding
    segments_BL: jax.Array
    positions_BL: jax.Array
    turns_BLK: tuple[jax.Array, jax.Array]  # cosine and sine, each [B, L, K/2] float32
    past: Places | None = None  # of what the blocks remember


def truncated_normal(variance: float, fan: Literal["fan_in", "fan_out"] = "fan_in"):
    """Initializer with that variance over the fan, cut at two standard deviations."""
    return jax.nn.initializers.variance_scaling(variance, fan, "truncated_normal")


def rope_turns(positions_BL, head_width: int, theta: float):
    """Cosine and sine of each pair's angle at each position (RoPE, arXiv 2104.09864)."""
    pairs_K = jnp.arange(head_width // 2, dtype=jnp.float32)
    speed_K = theta ** (-2.0 * pairs_K / head_width)
    angle_BLK = positions_BL.astype(jnp.float32)[:, :, None] * speed_K[None, None]
    return jnp.cos(angle_BLK), jnp.sin(angle_BLK)


def turn(x_BLHK, turns_BLK):
    """Rotates the pairs (k, k + K/2) of each head: Hugging Face's pairing, not the paper's."""
    cos_BL1K, sin_BL1K = (part_BLK[:, :, None, :] for part_BLK in turns_BLK)
    left, right = jnp.split(x_BLHK.astype(jnp.float32), 2, axis=-1)
    turned = (left * cos_BL1K - right * sin_BL1K, right * cos_BL1K + left * sin_BL1K)
    return jnp.concatenate(turned, axis=-1).astype(x_BLHK.dtype)


def soft_cap(x, cap: float):
    """Squeezes x smoothly into ±cap; 0 = leaves it."""
    return cap * jnp.tanh(x / cap) if cap else x


class RMSNorm(nnx.Module):
    """x / rms(x) · scale over the last axis, in float32 inside (arXiv 1910.07467)."""

    def __init__(self, width: int, config: DecoderConfig):
        self.scale = nnx.Param(jnp.ones(width, config.param_dtype))
        self.eps = config.norm_eps

    def __call__(self, x):
        x32 = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        scale = self.scale[...].astype(jnp.float32).reshape((1,) * (x.ndim - 1) + (-1,))
        return (x32 * inverse * scale).astype(x.dtype)


class Dense(nnx.Module):
    """y = x·W (+ b), and its tap. `name` is the kernel's row in `KERNEL_AXES`."""

    def __init__(self, name, inputs, outputs, config, rngs, *, variance=1.0, bias=False):
        draw = truncated_normal(config.init_scale**2 * variance)
        self.kernel = nnx.Param(draw(rngs.params(), (inputs, outputs), config.param_dtype))
        self.bias = nnx.Param(jnp.zeros(outputs, config.param_dtype)) if bias else None
        self.axes = KERNEL_AXES[name]
        self.quantize = config.quantize

    def __call__(self, x_BLI, mask_BL):
        takes, gives = self.axes
        kernel_IO = gathered(self.kernel, x_BLI.dtype, takes, gives)
        y_BLO: jax.Array = project(x_BLI, kernel_IO, takes, gives, self.quantize)
        if self.bias is not None:
            y_BLO += gathered(self.bias, x_BLI.dtype, gives)[None, None]
        size_BLO = jnp.abs(jax.lax.stop_gradient(y_BLO)).astype(jnp.float32)
        tap = jnp.sum(size_BLO * mask_BL[:, :, None], axis=(0, 1)), jnp.sum(mask_BL)
        return y_BLO, {"kernel": tap}


class SelfAttention(nnx.Module):
    """Grouped-query attention with rotary positions.

    Returns the output, its taps, and the keys and values of the tokens. `past`: what the block
    remembers of the tokens before them.
    """

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        H, G, K, D = config.heads, config.kv_heads, config.head_width, config.width
        bias = config.bias or config.qkv_bias
        residual = 1 / (2 * config.layers)
        self.query = Dense("query", D, H * K, config, rngs, bias=bias)
        self.key = Dense("key", D, G * K, config, rngs, bias=bias)
        self.value = Dense("value", D, G * K, config, rngs, bias=bias)
        self.output = Dense("output", H * K, D, config, rngs, variance=residual, bias=config.bias)
        self.query_norm = RMSNorm(K, config) if config.qk_norm else None
        self.key_norm = RMSNorm(K, config) if config.qk_norm else None
        self.config = config

    def __call__(self, x_BLD, context: Context, past: cache.Memory | None = None):
        c = self.config
        B, L, _ = x_BLD.shape
        query, query_tap = self.query(x_BLD, context.mask_BL)
        key, key_tap = self.key(x_BLD, context.mask_BL)
        value, value_tap = self.value(x_BLD, context.mask_BL)
        query_BLHK = query.reshape(B, L, c.heads, c.head_width)
        key_BLGK = key.reshape(B, L, c.kv_heads, c.head_width)
        value_BLGK = value.reshape(B, L, c.kv_heads, c.head_width)
        if self.query_norm is not None and self.key_norm is not None:
            query_BLHK, key_BLGK = self.query_norm(query_BLHK), self.key_norm(key_BLGK)
        query_BLHK = turn(query_BLHK, context.turns_BLK)
        key_BLGK = turn(key_BLGK, context.turns_BLK)
        options = {"window": c.window, "soft_cap": c.attention_soft_cap}
        new = cache.remember(key_BLGK, value_BLGK)
        if past is None or context.past is None:
            mixed_BLHK = attention(
                *(checkpoint_name(x, "attention") for x in (query_BLHK, key_BLGK, value_BLGK)),
                segments_BL=context.segments_BL,
                positions_BL=context.positions_BL,
                backend=c.attention,
                **options,
            )
        else:
            here = Places(context.segments_BL, context.positions_BL)
            mixed_BLHK = cache.attend(
                query_BLHK, new, past, places=here, past_places=context.past, **options
            )
        mixed_BLI = mixed_BLHK.reshape(B, L, -1)
        y_BLD, output_tap = self.output(mixed_BLI, context.mask_BL)
        taps = {"query": query_tap, "key": key_tap, "value": value_tap, "output": output_tap}
        return y_BLD, taps, new


class FeedForward(nnx.Module):
    """SwiGLU and its kin (arXiv 2002.05202), or the plain two-kernel form."""

    def __init__(self, config: DecoderConfig, rngs: nnx.Rngs):
        D, F, bias = config.width, config.ffn_width, config.bias
        self.nonlinearity, gated = ACTIVATIONS[config.activation]
        residual = 1 / (2 * config.layers)
        self.gate = Dense("gate", D, F, config, rngs, bias=bias) if gated else None
        self.up = Dense("up", D, F, config, rngs, bias=bias)
        self.down = Dense("down", F, D, config, rngs, variance=residual, bias=bias)

    def __call__(self, x_BLD, context: Context):
        taps = {}
        inner_BLF, taps["up"] = self.up(x_BLD, context.mask_BL)
        if self.gate is None:
            inner_BLF = self.nonlinearity(inner_BLF)
        else:
            gate_BLF, taps["gate"] = self.gate(x_BLD, context.mask_BL)
            inner_BLF = self.nonlinearity(gate_BLF) * inner_BLF
        y_BLD, taps["down"] = self.down(inner_BLF, context.mask_BL)
        return y_BLD, taps


def gathered(param: nnx.Param, dtype, *logical):
    """A param in the compute dtype, whole along the axis that only its storage splits.

    Cast first: in bfloat16 that halves what travels between devices. Its gradient is asked for as
    it is stored: devices then sum the parts that they keep (a reduce-scatter) and not all of it.
    """
    whole: jax.Array = _whole(param[...].astype(dtype), logical)
    return whole


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _whole(x, logical):
    x = sharding.constrain(x, *logical)  # else XLA may gather first and cast then
    return sharding.constrain(x, *(None if axis == "embed" else axis for axis in logical))


_whole.defvjp(
    lambda x, logical: (_whole(x, logical), None),
    lambda logical, _, d: (sharding.constrain(d, *logical),),
)
