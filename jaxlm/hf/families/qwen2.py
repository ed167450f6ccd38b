"""Qwen 2 and 2.5: a Llama with biases on query, key and value; some with a window."""

from jaxlm.hf import common
from jaxlm.hf.families import llama
from jaxlm.hf.family import Family, Json
from jaxlm.models.options import DecoderConfig

WINDOW_KEYS = frozenset(
    {"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"}
)


def window(hf: Json) -> Json:
    """Layers from `max_window_layers` on have the window, or those that `layer_types` names."""
    width = hf.get("sliding_window") if hf.get("use_sliding_window") else None
    layers = hf["num_hidden_layers"]
    sliding = [width is not None and i >= hf.get("max_window_layers", 28) for i in range(layers)]
    if hf.get("layer_types"):
        sliding = [kind == "sliding_attention" for kind in hf["layer_types"]]
    if not any(sliding):
        return {}
    if not all(sliding):
        raise ValueError(
            f"a window from layer {sliding.index(True)} on (config.json: max_window_layers, "
            "layer_types) is not supported, only one of all layers or of none"
        )
    return {"window": width}


def window_config(c: DecoderConfig) -> Json:
    """The same as keys of config.json."""
    return {
        "use_sliding_window": bool(c.window),
        "sliding_window": c.window or None,
        "max_window_layers": 0 if c.window else c.layers,
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
