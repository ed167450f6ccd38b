"""Adapters of PEFT's: merged as PEFT would, written as PEFT reads them (tools/lora_parity.py has
both live), and refused where they mean more."""

import json

import jax
import numpy as np
import pytest
from adapted import KNOBS, a_run, draw_adapter
from cases import CASES, save, texts
from fake import shapes_of
from reckoning import LIMIT, Ours, fixture, packed, split
from safetensors.numpy import load_file

from jaxlm import params
from jaxlm.convert import from_hf, to_hf, to_peft
from jaxlm.data import tokenizer as tokenizers
from jaxlm.hf import peft

pytestmark = pytest.mark.slow
quiet = {"say": lambda text: None}


@pytest.fixture(scope="module", autouse=True)
def whole_precision():
    with jax.default_matmul_precision("highest"):
        yield


@pytest.fixture(scope="module")
def hf_folder(tmp_path_factory):
    return folder_of("llama", tmp_path_factory.mktemp("llama"))


def folder_of(name, path):
    save(path / "hf", CASES[name], shapes_of(CASES[name]))
    return path / "hf"


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox"])
def test_an_adapter_merged_says_what_peft_says(name, tmp_path):
    folder = folder_of(name, tmp_path)
    draw_adapter(tmp_path / "adapter", name)
    ours, batch = Ours(folder, adapter=tmp_path / "adapter"), packed(texts())
    expected = np.load(fixture(f"peft {name}")).values()
    for one, theirs in zip(ours.of_documents(batch), expected, strict=True):
        assert np.abs(one - theirs).max() < LIMIT
    assert ours.difference(texts(), list(Ours(folder).of_documents(batch)), packed) > 100 * LIMIT


def test_a_run_is_written_as_an_adapter_and_merged_and_both_say_what_it_says(hf_folder, tmp_path):
    logits, batch = a_run(tmp_path / "run", hf_folder), packed(texts())
    expected, said = list(split(batch, logits(batch))), []
    tokenizers.save_byte(tmp_path / "run" / "tokenizer")
    (tmp_path / "run" / "run.json").write_text('{"config": {}}')
    to_peft(tmp_path / "run", tmp_path / "adapter", say=said.append)
    assert said == []
    assert (tmp_path / "adapter" / "tokenizer.json").is_file()
    to_hf(tmp_path / "run", tmp_path / "merged", **quiet)
    for ours in (
        Ours(hf_folder, adapter=tmp_path / "adapter"),
        Ours(tmp_path / "merged"),
    ):
        assert ours.difference(texts(), expected, packed) < LIMIT
    config = json.loads((tmp_path / "adapter" / peft.CONFIG).read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"]) == (2, 6.0, True)
    assert config["base_model_name_or_path"] == str(hf_folder)
    assert "self_attn.q_proj" in config["target_modules"]
    found = load_file(tmp_path / "adapter" / peft.WEIGHTS)
    shape = found["base_model.model.model.layers.1.mlp.down_proj.lora_A.weight"].shape
    assert shape == (KNOBS["rank"], 48)
    assert len(found) == 2 * 2 * 7


@pytest.mark.slow
def test_a_run_on_a_base_in_few_bits_is_written_merged(hf_folder, tmp_path):
    logits, batch = a_run(tmp_path / "run", hf_folder, base="nf4"), packed(texts())
    to_hf(tmp_path / "run", tmp_path / "merged", **quiet)
    said = []
    to_peft(tmp_path / "run", tmp_path / "adapter", say=said.append)
    assert "trained on a base rounded to few bits" in said[0]
    expected = list(split(batch, logits(batch)))
    # Added to kernels, the loud factors are rounded otherwise than beside them.
    assert Ours(tmp_path / "merged").difference(texts(), expected, packed) < 3 * LIMIT
    assert Ours(hf_folder).difference(texts(), expected, packed) > 100 * LIMIT


def test_a_fused_kernel_is_no_adapter_of_its_own(tmp_path):
    a_run(tmp_path / "run", folder_of("gpt2", tmp_path))
    with pytest.raises(ValueError, match=r"has them in one tensor with others.* to-hf"):
        to_peft(tmp_path / "run", tmp_path / "adapter", **quiet)
    assert not (tmp_path / "adapter").exists()
    a_run(tmp_path / "other", tmp_path / "hf", targets="output|mlp")
    to_peft(tmp_path / "other", tmp_path / "adapter", **quiet)
    config = json.loads((tmp_path / "adapter" / peft.CONFIG).read_text())
    assert config["fan_in_fan_out"]
    assert config["target_modules"] == ["attn.c_proj", "mlp.c_fc", "mlp.c_proj"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"use_dora": True}, "use_dora=True, which is not supported"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern="),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern="),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save="),
        ({"bias": "all"}, "bias='all'"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
        ({"peft_type": "LOHA"}, "of the kind 'LOHA'"),
        ({"r": None}, "does not say r, and"),
        ({"r": 7}, "says r=7, by which factors are scaled, and those of .* have a rank of"),
        ({"lora_alpha": float("nan")}, "does not say lora_alpha"),
        ({"r": 0, "lora_alpha": None}, "does not say r and lora_alpha"),
    ],
)
def test_an_adapter_that_means_more_is_refused(options, said, tmp_path):
    draw_adapter(tmp_path / "adapter", "llama", **options)
    with pytest.raises(ValueError, match=said):
        peft.read(tmp_path / "adapter")


def test_an_adapter_of_another_model_is_refused(hf_folder, tmp_path):
    draw_adapter(tmp_path / "adapter", "gpt2")
    with pytest.raises(ValueError, match="factors for what the model has not: transformer"):
        from_hf(hf_folder, tmp_path / "out", adapter=tmp_path / "adapter", **quiet)
    with pytest.raises(ValueError, match="no folder of a PEFT adapter"):
        from_hf(hf_folder, tmp_path / "out", adapter=hf_folder, **quiet)


def test_a_checkpoint_without_its_base_is_told(hf_folder, tmp_path):
    a_run(tmp_path / "run", hf_folder)
    (tmp_path / "run" / "checkpoints" / "3").rename(tmp_path / "3")
    with pytest.raises(ValueError, match="holds adapters alone"):
        params.load(tmp_path / "3", Ours(hf_folder).params)
