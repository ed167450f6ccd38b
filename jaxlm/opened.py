"""A finished model, opened to be used: to generate, to evaluate, to be compared.

    opened = open_model("runs/quickstart")
    with jax.set_mesh(opened.mesh):
        hidden_BLD, _, _ = opened.lm.hidden(opened.params, batch)

What can be opened: the work folder of a run, a folder that `jaxlm.convert` made, and a Hugging Face
folder, whose tensors go onto the devices one by one.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxlm import config as configs
from jaxlm import sharding
from jaxlm.build import build
from jaxlm.contract import LM
from jaxlm.data import tokenizer as tokenizers
from jaxlm.data.tokenizer import Tokenizer
from jaxlm.hf import folder as hf
from jaxlm.hf import kept
from jaxlm.hf.load import load as load_hf
from jaxlm.host import cluster
from jaxlm.models.options import DecoderConfig
from jaxlm.models.transformer import decoder
from jaxlm.params import load as load_params
from jaxlm.sharding import MeshSpec


class Opened(NamedTuple):
    """A model on its devices; run it under `jax.set_mesh(opened.mesh)`."""

    lm: LM  # keeps the documents of a row apart, and so padding from text
    params: Any
    tokenizer: Tokenizer
    model: DecoderConfig
    mesh: jax.sharding.Mesh
    length: int  # tokens of context that it was trained with
    folder: Path  # of the tokenizer, where a chat template lies too if there is one
    ends: frozenset[int]  # tokens that end a text: eos, and what a generation_config.json names


def open_model(
    path: str | Path,
    *,
    step: int | None = None,
    mesh: MeshSpec | None = None,
    devices: list | None = None,
    say: Callable[[str], None] = print,
) -> Opened:
    """The model of a folder, its params laid out on `devices`.

    `step`: of the checkpoint; None = the newest good one. `devices`: by default the first one, and
    where several processes run together, all. `say` is called with a sentence about each checkpoint
    that is skipped. Raises `ValueError` for people.
    """
    folder = Path(path).expanduser()
    if devices is None:
        devices = jax.devices() if cluster.several() else jax.devices()[:1]
    spec = mesh or MeshSpec()
    if (folder / "run.json").is_file() or not (hf.is_one(folder) or kept.read(folder)):
        return _run(folder, step, spec, devices, say)
    if found := kept.read(folder):
        load = lambda abstract: load_params(folder, abstract, step=step, say=say)
        where = folder / "tokenizer"
        return _model(found.options, found.length, load, where, found.generation, spec, devices)
    if step is not None:
        raise ValueError(
            f"--step={step}: {folder} is a Hugging Face folder, which holds one model and no steps"
        )
    source = hf.open_folder(folder)
    for note in source.notes:
        say(f"Note: {note}.")
    load = lambda abstract: load_hf(source, abstract, source.options)
    model, length = source.options, kept.length(source.config)
    return _model(model, length, load, folder, kept.generation(folder), spec, devices)


def _model(model, length, load, folder, generation, spec, devices):
    """Of options and a function from the params' shapes and layout to the params."""
    tokenizer = tokenizers.load(folder)
    hf.require_rows(tokenizer, model.vocabulary, folder)
    length = min(length, model.learned_positions or length)  # beyond, there is no row to look up
    with jax.set_mesh(mesh := sharding.make_mesh(spec, devices)):
        lm = decoder(model, sharding.platform(mesh), sequence=mesh.shape["sequence"])
        shapes = jax.eval_shape(lm.init, jax.random.key(0))
        where = sharding.param_shardings(lm.axes, shapes, mesh)
        place = lambda x, layout: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout)
        params = load(jax.tree.map(place, shapes, where))
    ends = frozenset({tokenizer.eos, *kept.ends(generation)})
    return Opened(lm, params, tokenizer, model, mesh, length, folder.absolute(), ends)


def _run(workdir, step, spec, devices, say):
    """Of the work folder of a run."""
    if not workdir.is_dir():
        raise ValueError(f"there is no folder {workdir}, which is to hold the model")
    try:
        saved = json.loads((workdir / "run.json").read_text())
    except (OSError, ValueError):
        raise ValueError(
            f"{workdir} holds no model: neither the run.json of a run, nor what jaxlm.convert "
            "makes (model.json), nor a Hugging Face model (config.json)"
        ) from None
    run = configs.from_saved(configs.flatten(saved["config"]))
    folder = workdir / "tokenizer"
    tokenizer = tokenizers.load(folder)
    ways = sharding.rows_divide_by(mesh := sharding.make_mesh(spec, devices))
    run = dataclasses.replace(run, mesh=spec, batch=ways, accumulate=1)
    with jax.set_mesh(mesh):
        built = build(run, tokenizer.vocabulary_size, devices)
        params = load_params(workdir, built.abstract.params, step=step, say=say)
    began = kept.read(workdir)  # if it was with a Hugging Face model
    ends = frozenset({tokenizer.eos, *kept.ends(began.generation if began else {})})
    length, where = run.data.length, folder.absolute()
    return Opened(built.scorer, params, tokenizer, built.apart, mesh, length, where, ends)
