"""Shapes of the tensors of a Hugging Face model, from its config alone."""

import functools
import json

import jax

from jaxlm.checkpoint.digest import named
from jaxlm.hf import wrapped
from jaxlm.hf.families import FAMILIES
from jaxlm.hf.folder import their_shapes
from jaxlm.models.options import DecoderConfig
from jaxlm.models.transformer import decoder
from jaxlm.params import of_layers

# Of the parts of a larger model that are left out.
OTHERS = {
    "multi_modal_projector.mm_soft_emb_norm.weight": (16,),
    "vision_tower.vision_model.embeddings.patch_embedding.bias": (16,),
    "vision_tower.vision_model.embeddings.patch_embedding.weight": (16, 3, 14, 14),
}


def alone(config):
    """The config.json of the language model, inside another or not."""
    return wrapped.config(config) if config["model_type"] in wrapped.WRAPPERS else config


def model_of(config, **runtime) -> DecoderConfig:
    """Our options for a config.json."""
    config = alone(config)
    return DecoderConfig(**FAMILIES[config["model_type"]].options(config), **runtime)


def shapes_of(config) -> dict[str, tuple[int, ...]]:
    """Name of each tensor -> its shape."""
    return _shapes_of(json.dumps(config))


def ours_of(config) -> dict[str, tuple[int, ...]]:
    """Path of each array of ours -> its shape."""
    model = model_of(config, scan_layers="off")
    return of_layers(named(jax.eval_shape(decoder(model, "cpu").init, jax.random.key(0))))


@functools.cache
def _shapes_of(text):
    config = json.loads(text)
    model, ours = model_of(config), ours_of(config)
    links, nameless = FAMILIES[alone(config)["model_type"]].links(list(ours), model, ())
    assert not nameless
    shapes = their_shapes(links, ours)
    if alone(config) is config:
        return shapes
    return {f"language_model.{name}": shape for name, shape in shapes.items()} | OTHERS
