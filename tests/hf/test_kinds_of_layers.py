"""Which layers are local, from a config.json."""

import json

import pytest
from cases import CASES

from jaxlm.hf import folder
from jaxlm.models.options import DecoderConfig


@pytest.mark.parametrize(("kind", "theta"), [("full_attention", 1e6), ("sliding_attention", 1e4)])
def test_layers_all_of_one_kind_turn_as_that_kind_does(tmp_path, kind, theta):
    config = CASES["gemma3"] | {"layer_types": [kind] * 3}
    (tmp_path / "config.json").write_text(json.dumps(config))
    kinds = DecoderConfig(**folder.options(tmp_path).options).kinds
    assert [layer.rope_theta for layer in kinds] == [theta] * 3
    assert {bool(layer.window) for layer in kinds} == {kind == "sliding_attention"}
