"""Qwen 2 and 2.5: a Llama with biases on query, key and value; some with a window."""

from jaxlm.hf import common, pattern
from jaxlm.hf.families import llama
from jaxlm.hf.family import Family, Json
from jaxlm.models.options import DecoderConfig

WINDOW_KEYS = frozenset(
    {"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"}
)


def window(hf: Json) -> Json:
    """Layers from `max_window_layers` on have the window, or those that `layer_types` names."""
    width = hf.get("sliding_window", 4096) if hf.get("use_sliding_window") else None
    first = hf.get("max_window_layers", 28)
    return pattern.options(width, pattern.local(hf, lambda i: i >= first))


def window_config(c: DecoderConfig) -> Json:
    """The same as keys of config.json."""
    types = pattern.types(c)
    return {
        "use_sliding_window": pattern.SLIDING in types,
        "sliding_window": c.window or None,
        "max_window_layers": types.index(pattern.SLIDING) if pattern.SLIDING in types else c.layers,
        "layer_types": types,
    }


def options(hf: Json) -> Json:
    return common.shape(hf) | window(hf) | {"qkv_bias": True}


def config(c: DecoderConfig) -> Json:
    return common.config(c, FAMILY.architecture, FAMILY.model_type) | window_config(c)


FAMILY = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    "model.",
    options,
    config,
    llama.links,
    common.SHAPE_KEYS | WINDOW_KEYS,
    (llama.ROTARY,),
)
