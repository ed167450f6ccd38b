"""A finished model, opened to be used: to generate, to evaluate, to be compared.

    opened = open_model("runs/quickstart")
    with jax.set_mesh(opened.mesh):
        hidden_BLD, _, _ = opened.lm.hidden(opened.params, batch)

What can be opened: the work folder of a run, a folder that `jaxlm.convert` made, and a Hugging Face
folder, whose tensors go onto the devices one by one.
"""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxlm import chips, sharding, stored
from jaxlm.contract import LM
from jaxlm.data import chat
from jaxlm.data import tokenizer as tokenizers
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.hf import folder as hf
from jaxlm.hf import kept
from jaxlm.host import cluster
from jaxlm.models.options import DecoderConfig, anywhere, resolve
from jaxlm.models.proof import require_right
from jaxlm.models.transformer import decoder
from jaxlm.sharding import MeshSpec
from jaxlm.stored import Stored

SHARE = 0.7  # of a device's memory that params may take; the rest is for caches and logits


class Opened(NamedTuple):
    """A model on its devices; run it under `jax.set_mesh(opened.mesh)`."""

    lm: LM  # keeps the documents of a row apart, and so padding from text
    params: Any
    tokenizer: Tokenizer
    model: DecoderConfig
    mesh: jax.sharding.Mesh
    length: int  # tokens of context: those it was trained with, unless others are wished
    folder: Path  # of the tokenizer, where a chat template lies too if there is one
    ends: frozenset[int]  # tokens that end a text: eos, and what a generation_config.json names
    step: int | None  # of the checkpoint of a run


def open_model(
    path: str | Path,
    *,
    step: int | str | None = None,
    devices: list | int = 0,
    which: str = "",
    dtype: str = "",
    length: int = 0,
    say: Callable[[str], None] = print,
) -> Opened:
    """The model of a folder, its params laid out on `devices`.

    `step`: of the checkpoint, or "best"; None = the newest good one. `devices`: which, or how many
    of this machine; 0 = as few as the model fits into, and where several processes run together,
    all. `which`: an extra of a run in the place of its params, such as their average "ema".
    `dtype`: of params and products; "" = as they are. `length`: tokens of context; 0 = as in
    training. `say` is called with a sentence about each checkpoint that is skipped. Raises
    `ValueError` for people.
    """
    spec, found = MeshSpec(), _wished(stored.look(path), dtype, length, say)
    if isinstance(devices, int) and cluster.several():
        devices = jax.devices()
    elif isinstance(devices, int):
        devices, spec = placed(found.options, jax.devices(), devices)
    for note in found.notes:
        say(f"Note: {note}.")
    model = fitting(found.options, devices[0], say)
    tokenizer = tokenizers.load(found.tokenizer)
    hf.require_rows(tokenizer, model.vocabulary, found.tokenizer)
    place = found.find(step, which=which, say=say)
    with jax.set_mesh(mesh := sharding.make_mesh(spec, devices)):
        require_right(model, mesh)
        lm = decoder(model, sharding.platform(mesh), sequence=mesh.shape["sequence"])
        # What the mesh does not divide lies whole on each device: refused in training alone.
        params = found.load(sharding.abstract_params(lm, mesh), place, which=which)
    ends = frozenset({tokenizer.eos, *kept.ends(found.generation)})
    if found.run and found.run.data.structured:  # the template's, which ended each answer
        ends |= chat.stops(tokenizer, found.tokenizer)
    where = found.tokenizer.absolute()
    at = int(place.name) if found.run else None
    return Opened(lm, params, tokenizer, model, mesh, found.length, where, ends, at)


def _wished(found: Stored, dtype: str, length: int, say: Callable[[str], None]) -> Stored:
    """With these, where they are given."""
    options, rows = found.options, found.options.learned_positions
    if dtype:
        options = dataclasses.replace(options, dtype=dtype, param_dtype=dtype)
    if rows and length > rows:
        raise ValueError(
            f"--max_length={length}: {found.folder} has a table of {rows:,} positions, and none "
            "beyond"
        )
    if length > found.length:
        say(f"Note: it was trained with a context of {found.length:,} tokens, and gets {length:,}.")
    # Beyond a table of positions there is no row to look up.
    length = length or min(found.length, rows or found.length)
    return found._replace(options=options, length=length)


def placed(options: DecoderConfig, devices: list, count: int = 0) -> tuple[list, MeshSpec]:
    """On which devices to generate with a model, and how it lies there.

    `count`: of devices; 0 = one if its memory holds the params, which is quickest, else all. On
    several each has its heads, where these divide, so that no token waits for weights of others.
    """
    if count > len(devices):
        raise ValueError(f"--devices={count}: this machine has {len(devices)}")
    model = resolve(anywhere(options), "cpu")
    if not count:
        memory = (devices[0].memory_stats() or {}).get("bytes_limit", math.inf)
        shapes = jax.eval_shape(decoder(model, "cpu").init, jax.random.key(0))
        size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
        count = 1 if size <= SHARE * memory else len(devices)
    sizes = model.heads, model.kv_heads, model.ffn_width, model.vocabulary
    tensor = count if all(size % count == 0 for size in sizes) else 1
    return devices[:count], MeshSpec(tensor=tensor)


def fitting(options: DecoderConfig, device, say: Callable[[str], None]) -> DecoderConfig:
    """The model as it is run on devices like this one, whatever it was trained on."""
    model = anywhere(options)
    # A CPU, slow at it, stands in for tests.
    if model.quantize == "fp8" and device.platform != "cpu" and not chips.has_fp8(device):
        say(
            f"Note: its products were rounded to 8-bit floats in training, which a "
            f"{device.device_kind} does not multiply; here they are not rounded."
        )
        model = dataclasses.replace(model, quantize="off")
    return model
