"""Mistral: a Llama whose layers may see only the last `sliding_window` positions."""

from jaxlm.hf import common
from jaxlm.hf.families import llama
from jaxlm.hf.family import Family, Json
from jaxlm.models.options import DecoderConfig


def options(hf: Json) -> Json:
    return common.shape(hf) | {"window": hf.get("sliding_window") or 0}


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
    common.SHAPE_KEYS | {"sliding_window"},
    (llama.ROTARY,),
)
