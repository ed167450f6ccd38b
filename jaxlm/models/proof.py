"""Shows on the machine itself that its attention kernel keeps packed documents apart.

A kernel that is right in an interpreter, or on another chip or driver, may attend across documents
in silence. So before a run trains with one, its outputs and gradients on rows of three documents
and some padding are held against plain attention's, on the devices of the mesh; it takes seconds.

Letters: B batch, L length, H query heads, G key/value heads, K head width.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm import sharding
from jaxlm.models import attention
from jaxlm.models.options import DecoderConfig, resolve

KERNELS = ("flash", "flash_interpreted", "splash", "splash_interpreted")
LENGTH = 256
BORDERS = (0, 90, 170, 240)  # of documents; the rest is padding
# bfloat16 and a GPU's TF32 stay below 0.03 of the largest number; a look across a border is near 1.
LIMIT = 0.1


def require_right(config: DecoderConfig, mesh: jax.sharding.Mesh) -> None:
    """Raises `ValueError` if the kernel that `config` trains packed rows with is wrong here.

    Does nothing for backends made of plain products. Call under `jax.set_mesh(mesh)`, on all hosts.
    """
    config = resolve(config, sharding.platform(mesh), sequence=mesh.shape["sequence"])
    if config.attention not in KERNELS:
        return
    windows = dict.fromkeys(kind.window for kind in config.kinds)
    off = max(float(_largest_error(config, mesh, window)) for window in windows)
    if not off < LIMIT:
        raise ValueError(
            f"the attention kernel {config.attention!r} is wrong on this {_device(mesh)}: for "
            f"packed rows it is {off:.0%} off plain attention; set config.model.attention='xla'"
        )


def _largest_error(config, mesh, window):
    """Of outputs and gradients, relative to the largest number of each, as a scalar."""
    c, rows = config, sharding.rows_divide_by(mesh)
    segments_L = np.searchsorted(BORDERS, np.arange(LENGTH), side="right")
    segments_L[BORDERS[-1] :] = 0
    positions_L = np.arange(LENGTH) - np.asarray((*BORDERS, 0))[segments_L - 1]
    real_L11 = (segments_L > 0)[:, None, None]

    def run(backend, *operands):
        return attention.attention(
            *operands,
            segments_BL=jnp.broadcast_to(segments_L.astype(np.int32), (rows, LENGTH)),
            positions_BL=jnp.broadcast_to(positions_L.astype(np.int32), (rows, LENGTH)),
            window=window,
            soft_cap=c.attention_soft_cap,
            backend=backend,
        )

    def look(backend, operands):
        out_BLHK, pull = jax.vjp(lambda *x: run(backend, *x), *operands)
        seen_BLHK = jnp.where(real_L11[None], out_BLHK, 0)
        return seen_BLHK, *pull(seen_BLHK)

    def error():
        shapes = [
            (rows, LENGTH, heads, c.head_width) for heads in (c.heads, c.kv_heads, c.kv_heads)
        ]
        keys = jax.random.split(jax.random.key(0), 3)
        operands = [jax.random.normal(k, s, c.dtype) for k, s in zip(keys, shapes, strict=True)]
        names = ("heads", "kv_heads", "kv_heads")
        operands = [
            sharding.constrain(x, "batch", None, name, None)
            for x, name in zip(operands, names, strict=True)
        ]
        pairs = zip(look(c.attention, operands), look("xla", operands), strict=True)
        wide = [[x.astype(jnp.float32) for x in pair] for pair in pairs]
        return jnp.stack([jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)) for a, b in wide]).max()

    return jax.jit(error, out_shardings=sharding.replicated(mesh))()


def _device(mesh):
    return mesh.devices.flat[0].device_kind
