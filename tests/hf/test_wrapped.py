"""A language model taken out of one for images and text: its options, its names, what is left."""

import json
from collections import Counter

import numpy as np
import pytest
from adapted import TOWER, a_run
from cases import CASES, draw, save
from fake import OTHERS, shapes_of

from jaxlm.config import check, defaults, source
from jaxlm.convert import from_hf, to_hf, to_peft
from jaxlm.hf import folder, kept, peft, tensors, wrapped
from jaxlm.models.options import DecoderConfig, resolve

# As the 4B model is published.
PUBLISHED = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "boi_token_index": 255999,
    "eoi_token_index": 256000,
    "eos_token_id": [1, 106],
    "image_token_index": 262144,
    "initializer_range": 0.02,
    "mm_tokens_per_image": 256,
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16",
    "transformers_version": "4.50.0.dev0",
    "vision_config": {"hidden_size": 1152, "model_type": "siglip_vision_model"},
}


def options_of(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    return folder.options(tmp_path)


def test_what_a_published_config_leaves_out_is_what_transformers_takes_for_usual(tmp_path):
    told = options_of(tmp_path, PUBLISHED)
    model = DecoderConfig(**told.options)
    assert told.inside == "gemma3"
    assert (model.vocabulary, model.width, model.layers) == (262_208, 2560, 34)
    assert (model.heads, model.kv_heads, model.head_width, model.ffn_width) == (8, 4, 256, 10240)
    assert (model.tied, model.norm_eps, model.attention_scale) == (True, 1e-6, 1 / 16)
    kinds = model.kinds
    assert [i for i, kind in enumerate(kinds) if not kind.window] == [5, 11, 17, 23, 29]
    assert {kind.window for kind in kinds} == {0, 1024}
    slow = {(kind.rope_theta, kind.rope_scaling) for kind in kinds if not kind.window}
    assert slow == {(1e6, "linear factor=8")}
    assert {(k.rope_theta, k.rope_scaling) for k in kinds if k.window} == {(1e4, "")}
    assert kept.length(told.config) == 131_072
    assert told.config["eos_token_id"] == [1, 106], "the larger config.json decides what ends"
    assert told.config["architectures"] == ["Gemma3ForCausalLM"]


def test_the_newer_form_of_a_config_says_the_same(tmp_path):
    full = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}
    turns = {
        "full_attention": full,
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    }
    inner = {k: v for k, v in PUBLISHED["text_config"].items() if k != "rope_scaling"}
    newer = PUBLISHED | {"text_config": inner | {"rope_parameters": turns}}
    older = options_of(tmp_path, PUBLISHED).options
    assert options_of(tmp_path, newer).options == older


def test_the_larger_config_decides_whether_the_head_is_tied(tmp_path):
    inner = PUBLISHED["text_config"] | {"tie_word_embeddings": True}
    config = PUBLISHED | {"text_config": inner, "tie_word_embeddings": False}
    assert not options_of(tmp_path, config).options["tied"]


def test_with_windows_in_all_layers_no_scaling_is_left(tmp_path):
    config = PUBLISHED | {"text_config": PUBLISHED["text_config"] | {"num_hidden_layers": 5}}
    model = DecoderConfig(**options_of(tmp_path, config).options)
    resolve(model, "cpu")
    assert {(kind.rope_theta, kind.rope_scaling) for kind in model.kinds} == {(1e4, "")}


@pytest.mark.parametrize("inner", [None, {"model_type": "gemma2"}])
def test_another_model_inside_is_refused(tmp_path, inner):
    with pytest.raises(ValueError, match="text_config of a gemma3 has to be that of a gemma3_text"):
        options_of(tmp_path, PUBLISHED | {"text_config": inner})


def test_an_unknown_model_is_named_with_what_it_holds(tmp_path):
    with pytest.raises(
        ValueError, match=r"'mistral3' \(around a 'mistral'\), .*known are gemma2, "
    ):
        options_of(tmp_path, {"model_type": "mistral3", "text_config": {"model_type": "mistral"}})


PREFIXES = {
    "published": "language_model.model.",
    "in memory": "model.language_model.",
    "headless": "language_model.",
}


@pytest.mark.parametrize("prefix", PREFIXES.values(), ids=PREFIXES)
def test_every_prefix_gives_the_same_names_and_other_parts_are_counted(prefix):
    outer = "model." if prefix.startswith("model.") else ""
    found = {
        f"{prefix}layers.0.mlp.up_proj.weight": 1,
        f"{prefix}norm.weight": 2,
        f"{outer}vision_tower.vision_model.head.probe": 3,
        f"{outer}vision_tower.vision_model.post_layernorm.bias": 4,
        f"{outer}multi_modal_projector.mm_soft_emb_norm.weight": 5,
        "audio_tower.odd": 6,
    }
    text, others = wrapped.taken_out(found)
    assert text == {
        "model.layers.0.mlp.up_proj.weight": 1,
        "model.norm.weight": 2,
        "audio_tower.odd": 6,
    }
    assert others == Counter(vision_tower=2, multi_modal_projector=1)


def test_a_head_has_its_name_and_two_tensors_for_one_are_refused():
    for name in ("lm_head.weight", "language_model.lm_head.weight"):
        assert wrapped.taken_out({name: 0})[0] == {"lm_head.weight": 0}
    both = {"language_model.model.norm.weight": 0, "model.language_model.norm.weight": 1}
    with pytest.raises(ValueError, match=r"two tensors for model\.norm\.weight"):
        wrapped.taken_out(both)


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    """A folder as published, tiny."""
    path = tmp_path_factory.mktemp("hf") / "gemma"
    save(path, CASES[TOWER], shapes_of(CASES[TOWER]))
    return path


def test_what_is_left_out_is_told_in_one_line(larger):
    (note,) = folder.open_folder(larger).notes
    assert "a gemma3_text, and exported as such; left out are the tensors of multi_" in note
    assert note.endswith("multi_modal_projector (1) and vision_tower (2)")


def test_a_recipe_takes_the_text_model(larger):
    c = defaults()
    c.data.mix.code = source(source="stdlib-code", weight=1.0)
    c.init.hf, c.data.tokenizer = str(larger), "byte"
    run = check(c)
    assert (run.model.heads, run.model.vocabulary, run.model.layers) == (8, 61, 6)


@pytest.mark.slow
def test_a_tensor_of_no_part_is_refused_by_name(tmp_path):
    shapes = shapes_of(CASES[TOWER]) | {"language_model.model.odd": (3,), "audio_tower.odd": (3,)}
    save(tmp_path / "hf", CASES[TOWER], shapes)
    with pytest.raises(ValueError, match=r"without a place in the model: audio_tower.odd, model.o"):
        from_hf(tmp_path / "hf", tmp_path / "out", say=lambda text: None)


@pytest.mark.slow
def test_it_comes_back_as_the_text_model_alone(larger, tmp_path):
    said = []
    from_hf(larger, tmp_path / "ours", say=said.append)
    to_hf(tmp_path / "ours", tmp_path / "back", say=said.append)
    of_model = [text for text in said if "gemma3" in text]
    assert len(of_model) == 2
    assert "it has the text model alone, and is written as such, a gemma3_text" in of_model[1]
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (config["model_type"], config["eos_token_id"]) == ("gemma3_text", [1, 6])
    assert "vision_config" not in config
    back = folder.open_folder(tmp_path / "back")
    assert back.options == kept.read(tmp_path / "ours").options
    shapes = shapes_of(CASES[TOWER]).keys() - OTHERS.keys()
    assert back.tensors.keys() == {name.removeprefix("language_model.") for name in shapes}
    for name, spec in back.tensors.items():
        drawn = draw(f"language_model.{name}", spec.shape)
        np.testing.assert_array_equal(tensors.view(spec), drawn)


@pytest.mark.slow
def test_an_adapter_is_written_for_the_larger_model(larger, tmp_path):
    a_run(tmp_path / "run", larger)
    to_peft(tmp_path / "run", tmp_path / "adapter", say=lambda text: None)
    config = json.loads((tmp_path / "adapter" / peft.CONFIG).read_text())
    assert config["target_modules"].startswith(r".*\blanguage_model\..*\.(mlp\.down_proj|")
    names = tensors.specs(tmp_path / "adapter" / peft.WEIGHTS)
    assert all(name.startswith("base_model.model.model.language_model.layers.") for name in names)
    found = folder.open_folder(larger)
    adapter = peft.read(tmp_path / "adapter", found.inside)
    peft.require_places(adapter, found.tensors)
    assert len(adapter.factors) == 6 * 7
    assert not adapter.others
