"""Whatever stands in a config.json: a model that is right, or one sentence that names the key."""

import copy
import json
import re

import pytest
from cases import CASES
from fake import alone

from jaxlm.hf import folder, keys
from jaxlm.hf.families import FAMILIES
from jaxlm.hf.family import canonical, unread, whole
from jaxlm.models.options import DecoderConfig

MISSING = object()
ODD = (None, "7", 0, -1, 2.5, True, [], [3], {"a": 1}, float("nan"), 10**40, MISSING)
# A case of each family, and of each way to stretch positions.
OF_FAMILIES = ["llama", "mistral", "qwen2, window from a layer on", "qwen3", "mixtral", "olmo2"]
OF_FAMILIES += ["gemma2", "gemma3", "gemma3, with a tower for images", "gpt_neox", "gpt2"]
OF_ROPE = ["llama 3.1", "llama, linear", "llama, dynamic", "llama, yarn with all numbers"]
OF_ROPE += ["gemma3, in the form of transformers 5"]

# What is no mistake: null or 0 where they mean something.
NULLS = {
    *("num_key_value_heads", "head_dim", "n_inner", "sliding_window", "max_position_embeddings"),
    *("sliding_window_pattern", "_sliding_window_pattern", "use_bidirectional_attention"),
    *("layer_types", "rope_scaling", "rope_parameters", "final_logit_softcapping"),
    "attn_logit_softcapping",
}
ZEROS = {"max_window_layers", "router_aux_loss_coef", "router_jitter_noise"}
SWITCHES = {key for key, kind in keys.KINDS.items() if kind.fits(True)}
FRACTIONS = {key for key, kind in keys.KINDS.items() if kind.fits(2.5)}
OBJECTS = {"rope_scaling", "rope_parameters"}


def read(tmp_path, config):
    """The model of a config.json, or what is said against it."""
    (tmp_path / "config.json").write_text(json.dumps(config))
    try:
        told = folder.options(tmp_path)
    except ValueError as error:
        return str(error)
    return whole(DecoderConfig(**told.options))


def changed(config, path, value):
    """The config with the key at the end of a path set to something, or gone."""
    config = copy.deepcopy(config)
    *groups, key = path
    inner = config
    for group in groups:
        inner = inner[group]
    inner.pop(key, None)
    if value is not MISSING:
        inner[key] = value
    return config


def may_be(key, value):
    """Whether a value of `ODD` is right for that key."""
    if value is None:
        return key in NULLS
    if isinstance(value, bool):
        return key in SWITCHES
    if value == 0 and isinstance(value, int):
        return key in ZEROS
    return (value == 2.5 and key in FRACTIONS) or (isinstance(value, dict) and key in OBJECTS)


@pytest.mark.parametrize("name", OF_FAMILIES)
def test_each_key_of_each_family(name, tmp_path):
    config = CASES[name]
    inside = ("text_config",) if "text_config" in config else ()
    read_here = FAMILIES[alone(config)["model_type"]].reads & keys.KINDS.keys()
    for key in sorted(read_here - ({"hidden_act"} if "gemma" in name else set())):
        for value in ODD:
            said = read(tmp_path, changed(config, (*inside, key), value))
            if value is MISSING or may_be(key, value):
                assert not isinstance(said, str) or key in said, said
            else:
                assert isinstance(said, str), (key, value)
                assert re.search(rf"{key}[=.\[]", said), said
                assert keys.shown(value) in said, said


def places_of_rope(config):
    """The paths to what a config says of rotary positions."""
    for name in OBJECTS & config.keys():
        for key, value in config[name].items():
            if isinstance(value, dict):
                yield from ((name, key, inner) for inner in value)
            else:
                yield name, key


@pytest.mark.parametrize("name", OF_ROPE)
def test_each_number_of_rotary_positions(name, tmp_path):
    config = CASES[name]
    for path in places_of_rope(config):
        for value in ODD:
            said = read(tmp_path, changed(config, path, value))
            kind = keys.ROPE_KINDS[path[-1]]
            if value is MISSING or kind.fits(value):
                assert not isinstance(said, str) or path[-1] in said or "rope_type" in said, said
            else:
                assert f"{'.'.join(path)}={keys.shown(value)}, where {kind.words}" in said


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("llama", {"num_attention_heads": 5}, "num_key_value_heads=2, which does not divide"),
        ("qwen2", {"hidden_size": 30}, "num_attention_heads=4, which does not divide hidden_size"),
        ("gpt2", {"n_head": 3}, "n_head=3, which does not divide n_embd=32"),
        ("gpt_neox", {"num_attention_heads": 3}, "does not divide hidden_size=32"),
        ("mixtral", {"num_experts_per_tok": 5}, "num_experts_per_tok=5, more than num_local"),
        ("llama", {"head_dim": 7}, "has to be even"),
        ("qwen3", {"layer_types": ["full_attention"]}, "of 1 layers, and num_hidden_layers=2"),
        ("gemma2", {"layer_types": ["full_attention"] * 4}, "of 4 layers"),
        ("mistral", {"layer_types": ["full_attention", "odd"]}, 'layer_types[1]="odd", which is'),
        ("gemma3", {"layer_types": ["chunked_attention"] * 3}, "known are sliding_attention and"),
        ("llama", {"rope_scaling": {"type": "linear"}}, "lacks factor, which that needs"),
        ("llama", {"rope_scaling": {"partial_rotary_factor": 0.5}}, "has not"),
        ("llama", {"rope_parameters": {"full_attention": {}}}, "full_attention={} of rotary"),
        ("llama, yarn", {"max_position_embeddings": "64"}, 'max_position_embeddings="64", where'),
        ("llama", {"model_type": ["llama"]}, "has to be a JSON object with a model_type"),
        ("llama", {"quantization_config": "gptq"}, "are quantized (gptq)"),
        ("gemma3, with a tower for images", {"text_config": []}, "text_config of a gemma3"),
    ],
)
def test_what_does_not_fit_together(name, change, words, tmp_path):
    assert words in str(read(tmp_path, CASES[name] | change))


def test_a_model_of_another_length_is_not_stretched_by_a_guess(tmp_path):
    without = {k: v for k, v in CASES["llama, dynamic"].items() if k != "max_position_embeddings"}
    assert "lacks max_position_embeddings" in read(tmp_path, without)


def test_a_neox_has_another_name_for_theta(tmp_path):
    config = CASES["gpt_neox"] | {"rope_theta": 5.0}
    assert read(tmp_path, config).rope_theta == 10000.0
    assert unread(FAMILIES["gpt_neox"], config) == ["rope_theta"]


def test_keys_of_rotary_positions_without_meaning_are_told(tmp_path):
    config = CASES["llama"] | {"rope_scaling": {"type": "linear", "factor": 2, "finetuned": True}}
    assert unread(FAMILIES["llama"], config) == ["rope_scaling.finetuned"]


@pytest.mark.parametrize("name", CASES)
def test_what_we_write_passes_the_door(name, tmp_path):
    model, family = read(tmp_path, CASES[name]), FAMILIES[alone(CASES[name])["model_type"]]
    assert canonical(read(tmp_path, family.config(model))) == canonical(model)
