"""Which family can say the options of a model of ours."""

import dataclasses
import json

import pytest
from cases import CASES
from fake import alone, model_of

from jaxlm import convert
from jaxlm.config import check, defaults, nest, source
from jaxlm.data import tokenizer as tokenizers
from jaxlm.hf import folder
from jaxlm.hf.export import family_of
from jaxlm.hf.families import FAMILIES
from jaxlm.hf.family import differences, unread
from jaxlm.models import presets
from jaxlm.models.options import DecoderConfig


@pytest.mark.parametrize("config", CASES.values(), ids=CASES)
def test_a_config_says_the_options_that_were_read_from_it(config):
    family = FAMILIES[alone(config)["model_type"]]
    assert differences(family, model_of(config)) == []
    assert unread(family, alone(config)) == []


def test_the_quickstart_is_a_qwen3_and_the_presets_are_llamas():
    quickstart = DecoderConfig(4096, width=128, layers=4, heads=2, qk_norm=True, loss_chunk=512)
    assert family_of(quickstart).model_type == "qwen3"
    assert family_of(DecoderConfig(4096, **presets.LLAMA_8B)).model_type == "llama"
    assert (
        family_of(dataclasses.replace(quickstart, qk_norm=False, window=9)).model_type == "mistral"
    )


def test_options_that_no_family_has_are_named():
    odd = DecoderConfig(4096, qk_norm=True, logit_soft_cap=3.0)
    with pytest.raises(ValueError, match=r"config\.model\.logit_soft_cap=3\.0 \(there 0\.0\)"):
        family_of(odd)


def test_a_run_with_a_table_of_positions_says_its_size_once(tmp_path):
    """transformers takes max_position_embeddings for another name of a GPT-2's n_positions."""
    c = defaults()
    c.workdir = str(tmp_path)
    c.data.mix.code = source(source="gone")
    c.data.update(tokenizer="byte", length=32)
    c.model.update(width=32, layers=1, learned_positions=48, norm="layer", bias=True)
    c.model.update(activation="gelu", norm_eps=1e-5, vocabulary=258)
    tokenizers.save_byte(tmp_path / "tokenizer")
    (tmp_path / "run.json").write_text(json.dumps({"config": nest(check(c).config)}))
    config = convert._model(tmp_path).hf
    assert (config["model_type"], config["n_positions"]) == ("gpt2", 48)
    assert "max_position_embeddings" not in config
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert folder.options(tmp_path).options["learned_positions"] == 48
