"""Mistral: a Llama whose layers may see only the last `sliding_window` positions."""

from jaxlm.hf import common, pattern
from jaxlm.hf.families import llama
from jaxlm.hf.family import Family, Json
from jaxlm.models.options import DecoderConfig


def options(hf: Json) -> Json:
    window = hf.get("sliding_window", 4096)
    return common.shape(hf) | pattern.options(window, pattern.local(hf, lambda i: True))


def config(c: DecoderConfig) -> Json:
    plain = common.config(c, FAMILY.architecture, FAMILY.model_type)
    return plain | {"sliding_window": c.window or None}


FAMILY = Family(
    "mistral",
    "MistralForCausalLM",
    "model.",
    options,
    config,
    llama.links,
    common.SHAPE_KEYS | {"sliding_window", "layer_types"},
    (llama.ROTARY,),
)
