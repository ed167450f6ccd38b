"""What a run needs, told from shapes alone: the model's FLOPs as MFU counts them."""

import dataclasses

import jax
import pytest
import tiny

from jaxlm.build import build, remade
from jaxlm.config import check
from jaxlm.flops import count_flops, visible_share

ROWS, LENGTH, D, F, V, LAYERS, H, G, K = 8, 32, 32, 64, 300, 2, 4, 2, 8


def built_with(**model):
    c = tiny.get_config()
    c.model.update(width=D, layers=LAYERS, heads=H, kv_heads=G, ffn_width=F, vocabulary=V)
    c.model.update(model)
    return build(check(c), V, jax.devices()[:1])


@pytest.mark.parametrize("window", [0, 5])
def test_model_flops_are_those_of_the_formula(window):
    # Three products for each one forward: 2·tokens·weights, and 4·tokens·seen·width in attention.
    weights = LAYERS * (2 * D * H * K + 2 * D * G * K + 3 * D * F) + D * V
    seen = visible_share(LENGTH, window) * LENGTH
    by_hand = 3 * ROWS * LENGTH * (2 * weights + LAYERS * 4 * seen * H * K)
    assert built_with(window=window).model_flops() == pytest.approx(by_hand, rel=1e-9)


def test_model_flops_depend_on_no_way_to_save_time_or_memory():
    plain = built_with()
    count = plain.model_flops()
    for how in ({"remat": "full"}, {"scan_layers": "on"}, {"loss_chunk": 16}):
        changed = remade(plain, dataclasses.replace(plain.run.model, **how))
        assert changed.model_flops() == count, how
    full = remade(plain, dataclasses.replace(plain.run.model, remat="full"))
    assert count_flops(full.trace().jaxpr) > 1.2 * count
