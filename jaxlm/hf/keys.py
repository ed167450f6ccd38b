"""What may stand in a config.json: of each key that some family reads, the kind of its value.

These files are edited by hand and written by many tools, and JSON has no kinds. So each value is
looked at before a family reads it; whether a key may be missing is the family's to say. What null
stands for is what transformers (5.23) takes it for.
"""

import json
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

Json = dict[str, Any]

LENGTH = "max_position_embeddings"  # read of every model
SHOWN = 60  # characters of a value in a message
MOST = 2**31  # sizes stay below


class Kind(NamedTuple):
    """What has to stand there, in words, and whether a value is that."""

    words: str
    fits: Callable[[Any], bool]


def _whole(least: int) -> Kind:
    kind = lambda value: isinstance(value, int) and not isinstance(value, bool)
    words = f"a whole number that is at least {least}"
    return Kind(words, lambda value: kind(value) and least <= value < MOST)


def _number(words: str, fits: Callable[[Any], bool]) -> Kind:
    kind = lambda value: isinstance(value, (int, float)) and not isinstance(value, bool)
    return Kind(words, lambda value: kind(value) and fits(value) and value < 1e30)


def _or_null(kind: Kind) -> Kind:
    return Kind(f"{kind.words}, or null", lambda value: value is None or kind.fits(value))


SIZE, COUNT = _whole(1), _whole(0)
POSITIVE = _number("a number above 0", lambda value: value > 0)
NOT_NEGATIVE = _number("a number that is not negative", lambda value: value >= 0)
STRETCH = _number("a number that is at least 1", lambda value: value >= 1)
SHARE = _number("a share above 0 and up to 1", lambda value: 0 < value <= 1)
SWITCH = Kind("true or false", lambda value: isinstance(value, bool))
NAME = Kind("a name", lambda value: isinstance(value, str))
OBJECT = Kind("an object", lambda value: isinstance(value, dict))
NAMES = Kind(
    "a list of names",
    lambda value: isinstance(value, list) and all(isinstance(one, str) for one in value),
)
TOKENS = _or_null(
    Kind(
        "the number of a token, or a list of them",
        lambda value: all(map(COUNT.fits, value if isinstance(value, list) else [value])),
    )
)

KINDS = {
    key: kind
    for kind, keys in (
        (SIZE, ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")),
        (SIZE, ("intermediate_size", "num_local_experts", "num_experts_per_tok")),
        (SIZE, ("n_embd", "n_layer", "n_head", "n_positions")),
        (_or_null(SIZE), ("num_key_value_heads", "head_dim", "n_inner", "sliding_window")),
        (_or_null(SIZE), ("sliding_window_pattern", "_sliding_window_pattern", LENGTH)),
        (COUNT, ("max_window_layers",)),
        (POSITIVE, ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon")),
        (POSITIVE, ("query_pre_attn_scalar", "rope_theta", "rotary_emb_base")),
        (POSITIVE, ("rope_local_base_freq",)),
        (NOT_NEGATIVE, ("router_aux_loss_coef", "router_jitter_noise")),
        (_or_null(POSITIVE), ("attn_logit_softcapping", "final_logit_softcapping")),
        (SHARE, ("rotary_pct",)),
        (SWITCH, ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window")),
        (SWITCH, ("use_parallel_residual", "scale_attn_weights", "add_cross_attention")),
        (SWITCH, ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn")),
        (_or_null(SWITCH), ("use_bidirectional_attention",)),
        (NAME, ("hidden_act", "hidden_activation", "activation_function")),
        (_or_null(NAMES), ("layer_types",)),
        (_or_null(OBJECT), ("rope_scaling", "rope_parameters")),
        (TOKENS, ("eos_token_id",)),
    )
    for key in keys
}

# Inside of `rope_scaling` and `rope_parameters`, or of what these say of a kind of layers.
ROPE_KINDS = {
    key: kind
    for kind, keys in (
        (NAME, ("rope_type", "type")),
        (POSITIVE, ("rope_theta",)),
        (_or_null(STRETCH), ("factor", "original_max_position_embeddings")),
        (_or_null(POSITIVE), ("beta_fast", "beta_slow")),
        (_or_null(NOT_NEGATIVE), ("low_freq_factor", "high_freq_factor", "attention_factor")),
        (_or_null(NOT_NEGATIVE), ("mscale", "mscale_all_dim")),
        (_or_null(SWITCH), ("truncate",)),
        (SHARE, ("partial_rotary_factor",)),
        (_or_null(OBJECT), ("full_attention", "sliding_attention")),
    )
    for key in keys
}


def require(hf: Json, reads: Collection[str]) -> None:
    """Raises `ValueError` that names each key among `reads` whose value is of another kind."""
    looked = {key: hf[key] for key in sorted({*reads, LENGTH, "eos_token_id"}) if key in hf}
    wrong = [_wrong(key, value, KINDS[key]) for key, value in looked.items() if key in KINDS]
    for key in ("rope_scaling", "rope_parameters"):
        if isinstance(looked.get(key), dict):
            wrong += _wrong_of_rope(key, looked[key])
    if wrong := [text for text in wrong if text]:
        raise ValueError(f"config.json says {'; and '.join(wrong)}")


def _wrong_of_rope(name: str, said: Json) -> list[str]:
    """Of rotary positions, for all layers or for each kind of them."""
    found = []
    for key, value in said.items():
        if key in ROPE_KINDS:
            found.append(_wrong(f"{name}.{key}", value, ROPE_KINDS[key]))
        if isinstance(value, dict):
            found += _wrong_of_rope(f"{name}.{key}", value)
    return found


def _wrong(name: str, value: Any, kind: Kind) -> str:
    """What is wrong, in words; "" if nothing is."""
    if kind.fits(value):
        return ""
    return f"{name}={shown(value)}, where {kind.words} has to stand"


def shown(value: Any) -> str:
    """A value of a message, as it stands in the file."""
    text = json.dumps(value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} ..."
