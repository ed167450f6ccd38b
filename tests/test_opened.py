"""A model is opened on whatever devices there are, wherever it was trained."""

import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxlm.checkpoint import Checkpoints
from jaxlm.config import check, defaults, nest, source
from jaxlm.data import tokenizer as tokenizers
from jaxlm.models.options import DecoderConfig
from jaxlm.models.transformer import decoder
from jaxlm.opened import SHARE, fitting, open_model, placed
from jaxlm.sharding import MeshSpec

SHAPE: dict = {"vocabulary": 64, "width": 32, "layers": 1, "heads": 8, "ffn_width": 64}
# Embedding, head and two norms; four kernels of attention, three of the feed-forward.
BYTES = 4 * (2 * 64 * 32 + 3 * 32 + 4 * 32 * 32 + 3 * 32 * 64)


def machine(memory, devices=8):
    said = {"bytes_limit": memory} if memory else None
    return [SimpleNamespace(memory_stats=lambda: said) for _ in range(devices)]


def test_a_model_is_spread_where_one_device_cannot_hold_it():
    model = DecoderConfig(**SHAPE, tied=False)
    cpus, large, small = machine(None), machine(BYTES / SHARE + 1), machine(BYTES / SHARE - 1)
    assert placed(model, cpus) == (cpus[:1], MeshSpec())
    assert placed(model, large) == (large[:1], MeshSpec())
    assert placed(model, small) == (small, MeshSpec(tensor=8))
    assert placed(model, large, 2) == (large[:2], MeshSpec(tensor=2))


@pytest.mark.parametrize("odd", [{"kv_heads": 2}, {"vocabulary": 65}, {"ffn_width": 68}])
def test_what_the_devices_do_not_divide_is_split_by_width(odd):
    model = DecoderConfig(**SHAPE | odd)
    assert placed(model, machine(1), 8)[1] == MeshSpec(tensor=1)


def test_more_devices_than_there_are_is_refused():
    with pytest.raises(ValueError, match="--devices=9: this machine has 8"):
        placed(DecoderConfig(**SHAPE), machine(None), 9)


# A width, heads and units that 8 devices do not divide.
ODD: dict = {"width": 20, "layers": 2, "heads": 2, "ffn_width": 36, "vocabulary": 259}


def run_of(workdir, steps=(3,), **model):
    """The work folder that a run leaves; its params are drawn from the number of the step."""
    c = defaults()
    c.workdir = str(workdir)
    c.data.mix.code = source(source="gone")
    c.data.update(tokenizer="byte", length=32)
    c.model.update(ODD | model)
    tokenizers.save_byte(workdir / "tokenizer")
    (workdir / "run.json").write_text(json.dumps({"config": nest(check(c).config)}))
    init = jax.jit(decoder(DecoderConfig(**ODD), "cpu").init)
    with Checkpoints(workdir / "checkpoints", keep=9) as checkpoints:
        for step in steps:
            checkpoints.save(step, {"params": init(jax.random.key(step))}, {"config": {}})
    return workdir


def logits(workdir, devices):
    """Of a row for each device, under the model as it is opened on so many."""
    opened = open_model(workdir, devices=jax.devices()[:devices])
    row = {"tokens": [1, 2, 3, 4], "segments": [1, 1, 2, 2], "positions": [0, 1, 0, 1]}
    batch = {name: np.asarray(8 * [values]) for name, values in row.items()}
    read = lambda params, batch: opened.lm.unembed(params, opened.lm.hidden(params, batch)[0])
    with jax.set_mesh(opened.mesh):
        return jax.device_get(jax.jit(read)(opened.params, batch))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """What one device says of the model."""
    return logits(run_of(tmp_path_factory.mktemp("plain")), 1)


@pytest.mark.slow
def test_devices_that_do_not_divide_a_model_say_what_one_does(tmp_path, plain):
    np.testing.assert_allclose(logits(run_of(tmp_path), 8), plain, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "made_for",
    [
        {"attention": "splash", "scan_layers": "on", "remat": "dots_offloaded"},
        {"attention": "ring", "loss_chunk": 64},
        {"attention": "cudnn"},
    ],
)
def test_a_run_is_opened_on_other_devices_than_it_was_configured_for(tmp_path, plain, made_for):
    np.testing.assert_array_equal(logits(run_of(tmp_path, **made_for), 1), plain)


def test_products_are_not_rounded_where_nothing_multiplies_what_they_are_rounded_to():
    said = []
    model = DecoderConfig(**SHAPE, quantize="fp8")
    of_kind = lambda kind: SimpleNamespace(platform="gpu", device_kind=kind)
    assert fitting(model, of_kind("NVIDIA H100 80GB HBM3"), said.append).quantize == "fp8"
    assert not said
    assert fitting(model, of_kind("NVIDIA A100-SXM4-80GB"), said.append).quantize == "off"
    assert "A100" in said[0]


def test_a_model_is_opened_in_another_dtype_and_for_another_length(tmp_path):
    said = []
    workdir = run_of(tmp_path)
    short = open_model(workdir, dtype="bfloat16", length=20, say=said.append)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(short.params)} == {"bfloat16"}
    assert (short.model.dtype, short.length, said) == ("bfloat16", 20, [])
    assert open_model(workdir, length=99, say=said.append).length == 99
    assert said == ["Note: it was trained with a context of 32 tokens, and gets 99."]


def test_beyond_a_table_of_positions_is_nothing(tmp_path):
    workdir = run_of(tmp_path, steps=(), learned_positions=40)
    with pytest.raises(ValueError, match=r"--max_length=41: .* a table of 40 positions"):
        open_model(workdir, length=41)
