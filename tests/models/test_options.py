"""What a decoder refuses, in words that name the key; what zeros stand for; the known shapes."""

import dataclasses

import jax
import pytest
from toy_decoder import toy

from jaxlm.models import presets
from jaxlm.models.options import experts_fit, resolve
from jaxlm.models.transformer import DecoderConfig, decoder, parameter_count_by_part

REFUSED = [
    ({"heads": 4, "kv_heads": 3}, ["config.model.heads", "kv_heads = 3"]),
    ({"width": 30}, ["config.model.width is 30", "head_width"]),
    ({"head_width": 7}, ["config.model.head_width is 7", "even"]),
    ({"width": 20, "heads": 4}, ["head_width is 5", "even"]),
    ({"activation": "swigelu"}, ["config.model.activation", "did you mean 'swiglu'"]),
    ({"remat": "dot"}, ["config.model.remat", "did you mean 'dots'"]),
    ({"dtype": "bf16"}, ["config.model.dtype", "'bfloat16'"]),
    ({"param_dtype": "float"}, ["config.model.param_dtype", "did you mean 'float32'"]),
    ({"scan_layers": "true"}, ["config.model.scan_layers", "'on'"]),
    ({"attention": "xlaa"}, ["config.model.attention", "did you mean 'xla'"]),
    ({"window": -1}, ["config.model.window is -1", "negative"]),
    ({"loss_chunk": -8}, ["config.model.loss_chunk is -8"]),
    ({"attention_soft_cap": -1.0}, ["config.model.attention_soft_cap"]),
    ({"vocabulary": 0}, ["config.model.vocabulary is 0", "tokenizer"]),
    ({"layers": 0}, ["config.model.layers is 0", "at least 1"]),
    ({"rope_theta": 0.0}, ["config.model.rope_theta", "greater than 0"]),
    ({"init_scale": float("nan")}, ["config.model.init_scale"]),
    ({"attention_soft_cap": float("nan")}, ["config.model.attention_soft_cap is nan"]),
    ({"logit_soft_cap": float("inf")}, ["config.model.logit_soft_cap is inf"]),
    ({"norm_eps": float("inf")}, ["config.model.norm_eps is inf"]),
    ({"experts_per_token": 4}, ["config.model.experts_per_token is 4", "config.model.experts:"]),
    ({"router_balance": 0.1}, ["config.model.router_balance is 0.1", "config.model.experts:"]),
    ({"experts_over": "fsdp"}, ["config.model.experts_over is 'fsdp'", "config.model.experts:"]),
    ({"experts": 4, "experts_over": "data"}, ["experts_over is 'data'", "'tensor'"]),
    ({"qk_norm_over": "width"}, ["config.model.qk_norm_over", "config.model.qk_norm:"]),
    *(
        ({"learned_positions": 9, key: value}, [f"config.model.{key}", "learned_positions = 9"])
        for key, value in (
            *(("rotary_fraction", 0.5), ("local_rope_theta", 10.0), ("rope_theta", 1e6)),
            ("rope_scaling", "linear factor=2"),
        )
    ),
    ({"experts": 4, "experts_per_token": 5}, ["experts_per_token is 5", "experts = 4"]),
    ({"experts": 4, "mlp_bias": True}, ["config.model.experts", "mlp_bias"]),
    ({"experts": 4, "quantize": "int8"}, ["config.model.quantize is 'int8'", "'off'"]),
    ({"experts": -1}, ["config.model.experts is -1"]),
    ({"layer_pattern": "local*0"}, ["config.model.layer_pattern", "'local*0'", "'local*5'"]),
    ({"layer_pattern": "lokal"}, ["config.model.layer_pattern", "'lokal'"]),
    ({"local_rope_theta": -1.0}, ["config.model.local_rope_theta", "rope_theta"]),
    ({"norm": "rsm"}, ["config.model.norm is 'rsm'", "did you mean 'rms'"]),
    ({"norm_place": "pre"}, ["config.model.norm_place", "'before'"]),
    ({"qk_norm_over": "heads"}, ["config.model.qk_norm_over", "did you mean 'head'"]),
    ({"rotary_fraction": 1.5}, ["config.model.rotary_fraction is 1.5", "above 1"]),
    ({"rotary_fraction": 0.4}, ["head_width is 8, and of them only 3", "rotary_fraction"]),
    ({"attention_scale": -1.0}, ["config.model.attention_scale", "1/sqrt(head_width)"]),
    (
        {"local_rope_theta": 10.0, "rope_scaling": "linear factor=2"},
        ["config.model.rope_scaling", "no layer uses", "layer_pattern"],
    ),
    (
        {"rope_theta": 1.0, "rope_scaling": "yarn factor=2 length=8"},
        ["config.model.rope_theta is 1", "above 1", "yarn"],
    ),
    (
        {"head_width": 2, "rope_scaling": "dynamic factor=2 length=8"},
        ["config.model.rope_scaling", "only 2 units"],
    ),
]


@pytest.mark.parametrize(("options", "words"), REFUSED, ids=[str(o) for o, _ in REFUSED])
def test_what_cannot_be_is_refused_by_name(options, words):
    with pytest.raises(ValueError, match=r"^config\.model\.") as error:
        decoder(toy(**options), "cpu")
    assert all(word in str(error.value) for word in words)


def test_zeros_and_autos_are_filled_in():
    config = resolve(DecoderConfig(vocabulary=9, width=512, heads=8), "cpu")
    assert (config.kv_heads, config.head_width, config.ffn_width) == (8, 64, 1408)
    assert config.scan_layers == "off"
    assert resolve(config, "cpu") == config
    assert resolve(DecoderConfig(vocabulary=9), "tpu").scan_layers == "on"
    assert resolve(toy(activation="gelu"), "cpu").ffn_width == 4 * 32
    assert decoder(toy(loss_chunk=7), "cpu").chunk == 7


KNOWN = {  # vocabulary and parameters, as published
    "LLAMA_1B": (128256, 1_235_814_400),
    "LLAMA_8B": (128256, 8_030_261_248),
    "LLAMA_70B": (128256, 70_553_706_496),
}


@pytest.mark.parametrize("name", KNOWN)
def test_presets_have_the_published_number_of_parameters(name):
    vocabulary, parameters = KNOWN[name]
    config = DecoderConfig(**getattr(presets, name), vocabulary=vocabulary, scan_layers="on")
    shapes = jax.eval_shape(decoder(config, "tpu").init, jax.random.key(0))
    assert sum(parameter_count_by_part(shapes).values()) == parameters


def test_every_preset_is_a_decoder():
    fields = {field.name for field in dataclasses.fields(DecoderConfig)}
    for name in (n for n in dir(presets) if n.isupper() and not n.startswith("_")):
        assert getattr(presets, name).keys() <= fields
        resolve(DecoderConfig(**getattr(presets, name), vocabulary=9), "gpu")


def test_experts_over_no_axis_is_told_before_the_mesh_is_asked():
    odd = DecoderConfig(experts=4, experts_over="expert")
    with pytest.raises(ValueError, match="experts_over is 'expert', which is not one of"):
        experts_fit(odd, {"data": 1, "fsdp": 2, "sequence": 1, "tensor": 1})
