"""Which family can say the options of a model of ours."""

import dataclasses

import pytest
from cases import CASES
from fake import alone, model_of

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
