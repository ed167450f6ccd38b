"""What a family of models is: its options from and to a Hugging Face config, and its names."""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

from jaxlm.hf import keys
from jaxlm.hf.links import Link
from jaxlm.models import rope
from jaxlm.models.options import DecoderConfig, resolve

Json = dict[str, Any]

# Keys of `config.model` that say how a model is run or begun, and not what it is.
RUNTIME = (
    *("init_scale", "dtype", "param_dtype", "quantize", "scan_layers", "remat", "attention"),
    *("loss_chunk", "experts_over"),
)


class Family(NamedTuple):
    """One `model_type` of Hugging Face; each file of `families` makes one."""

    model_type: str
    architecture: str
    prefix: str
    """Of all names but the head's; files of a model without head lack it."""
    options: Callable[[Json], Json]
    """config.json -> fields of `DecoderConfig`. Raises `ValueError` for what we cannot be."""
    config: Callable[[DecoderConfig], Json]
    """The opposite, of `whole` options: keys of config.json. What they cannot say is left out, and
    noticed by whoever reads them back."""
    links: Callable[[list[str], DecoderConfig, Collection[str]], tuple[list[Link], list[str]]]
    """(our paths, options, names that a file has) -> links, and the paths it has no name for."""
    reads: frozenset[str]
    """Keys of config.json that `options` reads."""
    harmless: tuple[str, ...] = ()
    """Patterns of tensors that some files have and no computation needs."""


# Keys of config.json that change nothing of what a model computes outside of training.
HARMLESS_KEYS = frozenset(
    {
        *("architectures", "model_type", "torch_dtype", "dtype", "transformers_version"),
        *("_name_or_path", "auto_map", "use_cache", "initializer_range", "pretraining_tp"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "sep_token_id"),
        *("attention_dropout", "hidden_dropout", "embd_pdrop", "attn_pdrop", "resid_pdrop"),
        *("max_position_embeddings", "classifier_dropout", "output_router_logits"),
        *("id2label", "label2id", "num_labels", "problem_type", "task_specific_params"),
        *("output_attentions", "output_hidden_states", "return_dict", "chunk_size_feed_forward"),
        *("tokenizer_class", "is_decoder", "is_encoder_decoder", "cache_implementation"),
        *("_attn_implementation", "_attn_implementation_autoset", "bad_words_ids"),
    }
)


def unread(family: Family, config: Mapping[str, Any]) -> list[str]:
    """Keys of a config.json that neither the family reads nor anybody needs."""
    known = family.reads | HARMLESS_KEYS
    found = [key for key, value in config.items() if key not in known and value is not None]
    for name in family.reads & {"rope_scaling", "rope_parameters"}:
        found += [f"{name}.{key}" for key in (config.get(name) or {}) if key not in keys.ROPE_KINDS]
    return sorted(found)


def whole(config: DecoderConfig) -> DecoderConfig:
    """With what zeros stand for filled in, and nothing said of how it is run."""
    plain = {f.name: f.default for f in dataclasses.fields(DecoderConfig) if f.name in RUNTIME}
    return resolve(dataclasses.replace(config, **plain), "cpu", packed=False)


def canonical(config: DecoderConfig) -> Json:
    """The options that say what a model is, each in one spelling."""
    resolved = whole(config)
    found = {k: v for k, v in dataclasses.asdict(resolved).items() if k not in RUNTIME}
    found["rope_scaling"] = rope.parse(resolved.rope_scaling)
    kinds = resolved.kinds
    found["window"] = tuple(kind.window for kind in kinds)
    found["local_rope_theta"] = tuple(
        (kind.rope_theta, rope.parse(kind.rope_scaling)) for kind in kinds
    )
    del found["layer_pattern"]
    found["attention_scale"] = resolved.attention_scale or resolved.head_width**-0.5
    bias = found.pop("bias")
    found["mlp_bias"] |= bias
    found["attention_bias"] |= bias
    found["qkv_bias"] |= found["attention_bias"]
    return found


def differences(family: Family, config: DecoderConfig) -> list[str]:
    """The options that a config.json of this family cannot say, in words."""
    wanted = canonical(config)
    try:
        said = canonical(DecoderConfig(**family.options(family.config(whole(config)))))
    except ValueError as error:
        return [str(error)]
    return [
        f"config.model.{key}={wanted[key]!r} (there {said[key]!r})"
        for key in wanted
        if wanted[key] != said[key]
    ]
