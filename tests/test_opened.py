"""A model is opened on whatever devices there are, wherever it was trained."""

import argparse
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from jaxlm.checkpoint import Checkpoints, digest
from jaxlm.config import check, defaults, nest, source
from jaxlm.data import tokenizer as tokenizers
from jaxlm.hf import kept
from jaxlm.models.options import DecoderConfig
from jaxlm.models.transformer import decoder
from jaxlm.opened import SHARE, fitting, open_model, placed
from jaxlm.sharding import MeshSpec
from jaxlm.stored import a_step

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


def run_of(workdir, metrics=None, keeping=None, **model):
    """The work folder that a run leaves; its params are drawn from the number of the step.

    `metrics`: of each step that was saved; `keeping`: config.checkpoint.
    """
    c = defaults()
    c.workdir = str(workdir)
    c.data.mix.code = source(source="gone")
    c.data.update(tokenizer="byte", length=32)
    c.model.update(ODD | model)
    c.checkpoint.update({"every": 3} | (keeping or {}))
    c.eval.every = 3
    tokenizers.save_byte(workdir / "tokenizer")
    (workdir / "run.json").write_text(json.dumps({"config": nest(check(c).config)}))
    init = jax.jit(decoder(DecoderConfig(**ODD), "cpu").init)
    with Checkpoints(workdir / "checkpoints", keep=9) as checkpoints:
        for step, known in ({3: {}} if metrics is None else metrics).items():
            checkpoints.save(step, {"params": init(jax.random.key(step))}, {}, known)
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
    workdir = run_of(tmp_path, {}, learned_positions=40)
    with pytest.raises(ValueError, match=r"--max_length=41: .* a table of 40 positions"):
        open_model(workdir, length=41)


LOSSES = {3: {"loss/code": 3.0}, 6: {"loss/code": 1.0}, 9: {"loss/code": 2.0}, 12: {}}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("keep_best", "step", "found"),
    [("loss/code", "best", 6), ("max:loss/code", "best", 3), ("", None, 12), ("", 9, 9)],
)
def test_a_step_is_chosen_by_its_number_or_as_the_best(tmp_path, keep_best, step, found):
    run_of(tmp_path, LOSSES, {"keep_best": keep_best})
    said = []
    opened = open_model(tmp_path, step=step, devices=jax.devices()[:1], say=said.append)
    assert opened.step == found
    init = jax.jit(decoder(DecoderConfig(**ODD), "cpu").init)
    jax.tree.map(np.testing.assert_array_equal, opened.params, init(jax.random.key(found)))
    assert said == [f"Note: --step=best is step {found}, by {keep_best}."] * (step == "best")


def test_the_best_that_is_damaged_gives_way_to_the_next(tmp_path):
    run_of(tmp_path, LOSSES, {"keep_best": "loss/code"})
    file = max((tmp_path / "checkpoints" / "6").rglob("d/*"), key=lambda path: path.stat().st_size)
    file.write_bytes(b"\0" + file.read_bytes()[1:])
    assert open_model(tmp_path, step="best", say=lambda text: None).step == 9


def test_a_best_step_that_there_is_not_is_told(tmp_path):
    for name in ("never", "plain"):
        (tmp_path / name).mkdir()
    run_of(tmp_path / "never", {3: {}, 6: {"loss/prose": 1.0}}, {"keep_best": "loss/code"})
    with pytest.raises(ValueError, match=r"was evaluated by 'loss/code' .*; there are 3, 6$"):
        open_model(tmp_path / "never", step="best")
    run_of(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"its config.checkpoint.keep_best is empty; leave --step"):
        open_model(tmp_path / "plain", step="best")
    with pytest.raises(argparse.ArgumentTypeError, match="'bets' is no step"):
        a_step("bets")
    assert (a_step("best"), a_step("30")) == ("best", 30)


@pytest.mark.parametrize("files", [({"eos_token_id": 65}, {}), ({}, {"eos_token_id": [65]})])
def test_a_run_ends_where_the_model_does_that_it_began_with(tmp_path, files):
    kept.write(run_of(tmp_path), kept.Kept(DecoderConfig(**ODD), *files))
    assert open_model(tmp_path).ends == {257, 65}


def test_a_run_that_compares_sizes_alone_is_opened_so(tmp_path, monkeypatch):
    run_of(tmp_path, keeping={"verify": "sizes"})
    monkeypatch.setattr(digest, "_hash", lambda path: pytest.fail(f"hashed {path}"))
    assert open_model(tmp_path).step == 3
