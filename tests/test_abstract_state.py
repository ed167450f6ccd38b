"""What a run is made of, told from shapes alone: its models, and their FLOPs as MFU counts them."""

import dataclasses

import jax
import pytest
import tiny

from jaxlm import build as build_module
from jaxlm import sharding
from jaxlm.build import build, remade
from jaxlm.config import check
from jaxlm.flops import count_flops, visible_share
from jaxlm.models import transformer

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


@pytest.mark.slow
def test_the_optimizer_is_not_the_model():
    c = tiny.get_config()
    one_device = jax.devices()[:1]
    counts = []
    for name in ("adamw", "muon"):
        c.optimizer.name = name
        counts.append(build(check(c), V, one_device).model_flops())
    assert counts[0] == counts[1] > 0


def test_evaluation_keeps_documents_apart_whatever_training_does(monkeypatch):
    made = []

    def decoder(config, platform, **how):
        made.append((config.attention, how.get("packed", True)))
        return transformer.decoder(config, platform, **how)

    monkeypatch.setattr(build_module, "decoder", decoder)
    c = tiny.get_config()
    c.model.attention = "xla"
    c.data.attend_across_documents = True
    built = build(check(c), V, jax.devices()[:1])
    assert made == [("xla", False), ("auto", True)]
    assert built.scorer is not built.lm


def test_an_axis_that_is_no_dimension_of_the_torus_is_made_of_parts(monkeypatch):
    def refuse(*_, **__):
        raise NotImplementedError("no axis of 8 on a torus of 4 x 4 x 4")

    whole = sharding.make_mesh(sharding.MeshSpec(fsdp=4, tensor=2), explicit=True)
    monkeypatch.setattr(jax, "make_mesh", refuse)
    parts = sharding.make_mesh(sharding.MeshSpec(fsdp=4, tensor=2), explicit=True)
    assert parts.shape == whole.shape
    assert parts.are_all_axes_explicit
    assert {device.id for device in parts.devices.flat} == set(range(8))


def test_copies_count_where_an_axis_is_split_only_in_part():
    mesh = sharding.make_mesh(sharding.MeshSpec(fsdp=4, tensor=2))
    leaf = lambda *shape: {"kernel": jax.ShapeDtypeStruct(shape, "float32")}
    axes = {"kernel": ("embed", "ffn")}
    sharding.refuse_replicated(axes, leaf(128, 256), mesh)
    for shape, share in (((130, 256), "75%"), ((130, 255), "88%")):
        with pytest.raises(ValueError, match=f"{share} of the parameter bytes replicated"):
            sharding.refuse_replicated(axes, leaf(*shape), mesh)


@pytest.mark.slow
def test_model_flops_depend_on_no_way_to_save_time_or_memory():
    plain = built_with()
    count = plain.model_flops()
    for how in ({"remat": "full"}, {"scan_layers": "on"}, {"loss_chunk": 16}):
        changed = remade(plain, dataclasses.replace(plain.run.model, **how))
        assert changed.model_flops() == count, how
    full = remade(plain, dataclasses.replace(plain.run.model, remat="full"))
    assert count_flops(full.trace().jaxpr) > 1.2 * count


def test_moments_go_to_the_host_only_where_there_are_both(monkeypatch):
    c = tiny.get_config()
    c.model.update(width=D, layers=1, vocabulary=V)
    c.optimizer.update(name="sgd", offload=True)
    with pytest.raises(ValueError, match=r"offload=True.*sgd keeps no moments"):
        build(check(c), V, jax.devices()[:1])
    c.optimizer.name = "adamw"
    moments = jax.tree.leaves(build(check(c), V, jax.devices()[:1]).abstract.opt_state)
    assert {x.sharding.memory_kind for x in moments if x.ndim > 2} == {sharding.HOST}
    monkeypatch.setattr(sharding, "HOST", "no_such_kind")
    with pytest.raises(ValueError, match="knows of no 'no_such_kind' memory next to a cpu"):
        build(check(c), V, jax.devices()[:1])
