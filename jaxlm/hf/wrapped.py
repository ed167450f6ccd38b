"""A language model that stands inside a larger one, next to parts for images: taken out of it.

The larger one's config.json has that of the language model as `text_config`, where it lacks what
transformers (5.23) takes for usual. Of its tensors the language model's have a prefix:
`language_model.model.` as such models are published, and as transformers 5 stores them;
`model.language_model.` as it holds them in memory, and as some versions and PEFT name them; or
`language_model.` alone, of a model without head.
"""

import re
from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple, TypeVar

from jaxlm.hf.families import FAMILIES
from jaxlm.hf.family import Json

T = TypeVar("T")

TEXT = re.compile(r"(?:model\.)?language_model\.(?:model\.)?(.+)")
OTHER = re.compile(r"(?:model\.)?(vision_tower|multi_modal_projector)\..+")

# Keys that the larger config.json decides for the language model too.
SHARED = (
    *("eos_token_id", "bos_token_id", "pad_token_id"),
    *("tie_word_embeddings", "dtype", "torch_dtype"),
)


class Wrapper(NamedTuple):
    """One `model_type` of such a larger model."""

    text: str
    """`model_type` of the language model."""
    usual: Json
    """What its config.json would say where `text_config` is silent."""
    keys: frozenset[str]
    """Keys of the larger config.json that are about its other parts."""


WRAPPERS = {
    "gemma3": Wrapper(
        "gemma3_text",
        {
            "vocab_size": 262_208,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "hidden_activation": "gelu_pytorch_tanh",
            "max_position_embeddings": 131_072,
            "rms_norm_eps": 1e-6,
            "query_pre_attn_scalar": 256,
            "sliding_window": 4096,
            "tie_word_embeddings": True,
            "bos_token_id": 2,
            "eos_token_id": 1,
            "pad_token_id": 0,
        },
        frozenset(
            {
                *("text_config", "vision_config", "mm_tokens_per_image", "image_token_index"),
                *("boi_token_index", "eoi_token_index"),
            }
        ),
    )
}


def config(hf: Json) -> Json:
    """The config.json of the language model. Raises `ValueError` if it is another than is known."""
    wrapper, inner = WRAPPERS[hf["model_type"]], hf.get("text_config")
    if not isinstance(inner, dict) or inner.get("model_type", wrapper.text) != wrapper.text:
        kind = inner.get("model_type") if isinstance(inner, dict) else inner
        raise ValueError(
            f"the text_config of a {hf['model_type']} has to be that of a {wrapper.text}, and "
            f"config.json has {kind!r}"
        )
    beside = {key: value for key, value in hf.items() if key not in wrapper.keys}
    shared = {key: beside[key] for key in SHARED if beside.get(key) is not None}
    family = FAMILIES[wrapper.text]
    kind = {"model_type": family.model_type, "architectures": [family.architecture]}
    return beside | wrapper.usual | inner | shared | kind


def taken_out(found: Mapping[str, T]) -> tuple[dict[str, T], Counter[str]]:
    """What belongs to the language model, under the names that it has alone, and how many there are
    of each other part. A name that is of neither stays as it is.

    Raises `ValueError` where two names are of the same tensor.
    """
    text: dict[str, T] = {}
    others: Counter[str] = Counter()
    for name, value in found.items():
        if other := OTHER.fullmatch(name):
            others[other[1]] += 1
        elif (alone := _alone(name)) in text:
            raise ValueError(f"there are two tensors for {alone}, the second of them {name}")
        else:
            text[alone] = value
    return text, others


def _alone(name: str) -> str:
    inside = TEXT.fullmatch(name)
    if not inside:
        return name
    return inside[1] if inside[1].startswith("lm_head.") else f"model.{inside[1]}"


def in_memory(name: str) -> str:
    """The name that a module of the language model has in the larger one, as PEFT sees it."""
    return "model.language_model." + name.removeprefix("model.")


def told(others: Mapping[str, int]) -> str:
    """How many there are of each other part, in words."""
    return " and ".join(f"{part} ({count:,})" for part, count in sorted(others.items()))
