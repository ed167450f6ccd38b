"""A language model small enough to compile in no time that keeps the whole contract.

Each position reads the mean of what it may see of its own document, then a small MLP: logical
axes, taps, a stacked and an unstacked form, documents packed in one row, dropout-free.

B rows, L and M positions, D width, F hidden units, V vocabulary, N layers.
"""

import jax
import jax.numpy as jnp

from jaxlm.contract import LM

KERNELS = {
    ("attention", "value"): ("embed", "heads"),
    ("attention", "output"): ("heads", "embed"),
    ("mlp", "up"): ("embed", "ffn"),
    ("mlp", "down"): ("ffn", "embed"),
}


def toy(*, scan: bool = False, layers: int = 2, D: int = 16, F: int = 32, V: int = 32) -> LM:
    """`scan` stacks the layers; the two forms of one key hold the same numbers."""
    sizes = {"embed": D, "heads": D, "ffn": F}

    def init_block(key):
        keys = jax.random.split(key, len(KERNELS))
        block = {"mlp_norm": {"scale": jnp.ones(D)}}
        for key, ((part, name), (rows, columns)) in zip(keys, KERNELS.items(), strict=True):
            shape = sizes[rows], sizes[columns]
            kernel = jax.random.normal(key, shape) / shape[0] ** 0.5
            block.setdefault(part, {})[name] = {"kernel": kernel}
        block["mlp"]["up"]["bias"] = jnp.full(F, 0.1)
        return block

    def init(key):
        embed, head, *blocks = jax.random.split(key, 2 + layers)
        params = {
            "embed": {"table": jax.random.normal(embed, (V, D))},
            "final_norm": {"scale": jnp.ones(D)},
            "head": {"kernel": jax.random.normal(head, (D, V)) / D**0.5},
            "blocks": {str(i): init_block(key) for i, key in enumerate(blocks)},
        }
        return stack(params) if scan else params

    def hidden(params, batch, key=None):
        del key
        segments_BL = batch["segments"]
        same_BLM = segments_BL[:, :, None] == segments_BL[:, None, :]
        see_BLM = (same_BLM & jnp.tri(segments_BL.shape[1], dtype=bool)[None]).astype(jnp.float32)
        see_BLM = see_BLM / see_BLM.sum(-1, keepdims=True)
        real_BL = (segments_BL > 0).astype(jnp.float32)
        block = lambda x_BLD, block: _block(block, x_BLD, see_BLM, real_BL)
        x_BLD = params["embed"]["table"][batch["tokens"]]
        if scan:
            x_BLD, taps = jax.lax.scan(block, x_BLD, params["blocks"])
        else:
            taps = {}
            for i in range(layers):
                x_BLD, taps[str(i)] = block(x_BLD, params["blocks"][str(i)])
        return _norm(params["final_norm"], x_BLD), {"blocks": taps}, {}

    def unembed(params, hidden):
        return hidden @ params["head"]["kernel"]

    block_axes = {"mlp_norm": {"scale": ("norm",)}}
    for (part, name), names in KERNELS.items():
        block_axes.setdefault(part, {})[name] = {"kernel": names}
    block_axes["mlp"]["up"]["bias"] = ("ffn",)
    stacked = jax.tree.map(
        lambda names: ("layers", *names), block_axes, is_leaf=lambda x: isinstance(x, tuple)
    )
    axes = {
        "embed": {"table": ("vocabulary", "embed")},
        "final_norm": {"scale": ("norm",)},
        "head": {"kernel": ("embed", "vocabulary")},
        "blocks": stacked if scan else {str(i): block_axes for i in range(layers)},
    }
    return LM(init, hidden, unembed, axes)


def stack(params):
    """Params of the unstacked form in the stacked one."""
    blocks = [params["blocks"][str(i)] for i in range(len(params["blocks"]))]
    return {**params, "blocks": jax.tree.map(lambda *xs: jnp.stack(xs), *blocks)}


def unstack(params):
    """The inverse of `stack`."""
    layers = len(jax.tree.leaves(params["blocks"])[0])
    one = lambda i: jax.tree.map(lambda x: x[i], params["blocks"])
    return {**params, "blocks": {str(i): one(i) for i in range(layers)}}


def batch(rows: int = 8, length: int = 12, vocabulary: int = 32, seed: int = 0, padding: int = 2):
    """Packed rows of two documents with `padding` empty positions at the end."""
    tokens_key, border_key = jax.random.split(jax.random.key(seed))
    words = jax.random.randint(tokens_key, (rows, length + 1), 0, vocabulary)
    border_B = jax.random.randint(border_key, (rows,), 3, length - padding - 2)
    place_BL = jnp.broadcast_to(jnp.arange(length), (rows, length))
    real_BL = place_BL < length - padding
    second_BL = place_BL >= border_B[:, None]
    last_BL = (place_BL == border_B[:, None] - 1) | (place_BL == length - padding - 1)
    return {
        "tokens": jnp.where(real_BL, words[:, :-1], 0),
        "targets": jnp.where(real_BL, words[:, 1:], 0),
        "weights": (real_BL & ~last_BL).astype(jnp.float32),
        "segments": jnp.where(real_BL, 1 + second_BL, 0),
        "positions": place_BL - jnp.where(second_BL, border_B[:, None], 0),
        "source": jnp.arange(rows) % 2,
        "index": jnp.arange(rows),
    }


def pairs(number: int = 8, length: int = 12, seed: int = 0):
    """Chosen and rejected responses to one prompt, with padding behind them: [P, 2, L] each."""
    prompt, shortest = 4, 6
    keys = jax.random.split(jax.random.key(seed), 3)
    words = jax.random.randint(keys[0], (number, 2, length + 1), 0, 32)
    opening = jax.random.randint(keys[1], (number, 1, prompt), 0, 32)
    words = words.at[..., :prompt].set(opening)
    real_P2 = jax.random.randint(keys[2], (number, 2), shortest, length + 1)
    place_P2L = jnp.broadcast_to(jnp.arange(length), (number, 2, length))
    real_P2L = place_P2L < real_P2[..., None]
    return {
        "tokens": jnp.where(real_P2L, words[..., :-1], 0),
        "targets": jnp.where(real_P2L, words[..., 1:], 0),
        "weights": (real_P2L & (place_P2L >= prompt - 1)).astype(jnp.float32),
        "segments": real_P2L.astype(jnp.int32),
        "positions": place_P2L,
    }


def _block(params, x_BLD, see_BLM, real_BL):
    taps = {}

    def dense(part, name, x):
        y = x @ params[part][name]["kernel"]
        if "bias" in params[part][name]:
            y = y + params[part][name]["bias"][None, None]
        loud = jnp.einsum("bl,blf->f", real_BL, jax.lax.stop_gradient(jnp.abs(y)))
        taps.setdefault(part, {})[name] = {"kernel": (loud, real_BL.sum())}
        return y

    seen_BLD = jnp.einsum("blm,bmd->bld", see_BLM, dense("attention", "value", x_BLD))
    x_BLD = x_BLD + dense("attention", "output", jnp.tanh(seen_BLD))
    up_BLF = jax.nn.gelu(dense("mlp", "up", _norm(params["mlp_norm"], x_BLD)))
    return x_BLD + dense("mlp", "down", up_BLF), taps


def _norm(params, x):
    x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), -1, keepdims=True) + 1e-6)
    return x * params["scale"][None, None]
