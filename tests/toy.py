"""A language model small enough to compile in no time that keeps the whole contract.

Each position reads the mean of what it may see of its own document, then a small MLP: logical
axes, taps, a stacked and an unstacked form, documents packed in one row, dropout-free.

B rows, L and M positions, D width, F hidden units, V vocabulary, N layers.
"""

import jax
import jax.numpy as jnp
import numpy as np

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
        block["mlp"]["up"]["bias"] = jnp.full(F, 0.1, jnp.float32)
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
    rng = np.random.default_rng(seed)
    words = rng.integers(vocabulary, size=(rows, length + 1))
    border_B1 = rng.integers(3, length - padding - 2, size=(rows, 1))
    place_BL = np.broadcast_to(np.arange(length), (rows, length))
    real_BL = place_BL < length - padding
    second_BL = place_BL >= border_B1
    last_BL = (place_BL == border_B1 - 1) | (place_BL == length - padding - 1)
    return _arrays(
        tokens=np.where(real_BL, words[:, :-1], 0),
        targets=np.where(real_BL, words[:, 1:], 0),
        weights=(real_BL & ~last_BL).astype(np.float32),
        segments=np.where(real_BL, 1 + second_BL, 0),
        positions=place_BL - np.where(second_BL, border_B1, 0),
        source=np.arange(rows) % 2,
        index=np.arange(rows),
    )


def pairs(number: int = 8, length: int = 12, vocabulary: int = 32, seed: int = 0):
    """Chosen and rejected responses to one prompt, with padding behind them: [P, 2, L] each."""
    prompt, shortest = 4, 6
    rng = np.random.default_rng(seed)
    words = rng.integers(vocabulary, size=(number, 2, length + 1))
    words[..., :prompt] = words[:, :1, :prompt]
    end_P21 = rng.integers(shortest, length + 1, size=(number, 2, 1))
    place_P2L = np.broadcast_to(np.arange(length), (number, 2, length))
    real_P2L = place_P2L < end_P21
    return _arrays(
        tokens=np.where(real_P2L, words[..., :-1], 0),
        targets=np.where(real_P2L, words[..., 1:], 0),
        weights=(real_P2L & (place_P2L >= prompt - 1)).astype(np.float32),
        segments=real_P2L.astype(np.int32),
        positions=place_P2L,
    )


def feedback(number: int = 8, **options):
    """Responses that were liked or not, each with one that answers another prompt."""
    return pairs(number, **options) | _arrays(
        desirable=(np.arange(number) % 3 < 2).astype(np.float32)
    )


def _arrays(**fields):
    as_int = lambda x: x if x.dtype == np.float32 else x.astype(np.int32)
    return {name: jnp.asarray(as_int(x)) for name, x in fields.items()}


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
