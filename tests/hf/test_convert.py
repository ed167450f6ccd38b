"""Conversion there and back: every bit, any form of the layers, any mesh."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from cases import CASES, draw, save
from fake import shapes_of
from safetensors.numpy import load_file, save_file

from jaxlm import convert, params
from jaxlm.checkpoint import Checkpoints
from jaxlm.checkpoint.digest import named
from jaxlm.convert import from_hf, to_hf
from jaxlm.data import tokenizer as tokenizers
from jaxlm.hf import folder, kept, load
from jaxlm.models import proof
from jaxlm.models.transformer import decoder
from jaxlm.opened import open_model
from jaxlm.sharding import MeshSpec, make_mesh, param_shardings

pytestmark = pytest.mark.slow
quiet = {"say": lambda text: None}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder in several files, with a tokenizer that leaves rows of the embedding unused."""
    path = tmp_path_factory.mktemp("hf") / "model"
    config = CASES["qwen3"] | {"vocab_size": 259}  # no mesh divides it
    save(path, config, shapes_of(config), shard_bytes=20_000)
    tokenizers.save_byte(path)
    (path / "generation_config.json").write_text('{"eos_token_id": 2}')
    return path


@pytest.fixture(scope="module")
def ours(source):
    from_hf(source, source.parent / "ours", **quiet)
    return source.parent / "ours"


def files(path):
    return {name: x for file in path.glob("*.safetensors") for name, x in load_file(file).items()}


def test_import_after_export_gives_every_bit_and_the_config_back(source, ours, tmp_path):
    to_hf(ours, tmp_path / "back", **quiet)
    before, after = files(source), files(tmp_path / "back")
    assert before.keys() == after.keys()
    for name, x in before.items():
        np.testing.assert_array_equal(after[name], x)
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config == json.loads((source / "config.json").read_text()) | {"dtype": "float32"}
    assert (tmp_path / "back" / "generation_config.json").is_file()
    assert (tmp_path / "back" / "tokenizer.json").is_file()
    from_hf(tmp_path / "back", tmp_path / "again", **quiet)
    again, first = params_of(tmp_path / "again"), params_of(ours)
    jax.tree.map(np.testing.assert_array_equal, again, first)


def params_of(path, scan="off"):
    model = dataclasses.replace(kept.read(path).options, scan_layers=scan)
    return params.load(path, jax.eval_shape(decoder(model, "cpu").init, jax.random.key(0)))


def test_an_average_of_the_params_is_written_in_their_place(ours, tmp_path):
    plain = params_of(ours)
    average = jax.tree.map(lambda x: 2 * x, plain)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(0, {"params": plain, "extras": {"ema": average}}, {})
    kept.write(tmp_path, kept.read(ours))
    to_hf(tmp_path, tmp_path / "hf", which="ema", **quiet)
    name = "model.layers.1.mlp.up_proj.weight"
    np.testing.assert_array_equal(files(tmp_path / "hf")[name], 2 * draw(name, (48, 32)))
    with pytest.raises(ValueError, match="beside its own it has ema"):
        to_hf(tmp_path, tmp_path / "no", which="eam", **quiet)
    with pytest.raises(ValueError, match=r"--params=ema: .* holds one model and nothing beside it"):
        open_model(ours, which="ema", **quiet)


def test_kernels_lie_as_the_model_has_them(ours):
    found = params_of(ours)
    name = "model.layers.1.mlp.up_proj.weight"
    np.testing.assert_array_equal(
        found["blocks"]["1"]["mlp"]["up"]["kernel"], draw(name, (48, 32)).T
    )


def test_layers_are_stacked_and_unstacked_on_the_way(ours, tmp_path):
    plain, stacked = params_of(ours), params_of(ours, scan="on")
    for name, x in named(plain).items():
        head, _, rest = name.removeprefix("blocks/").partition("/")
        other = named(stacked)
        same = other[f"blocks/{rest}"][int(head)] if head.isdecimal() else other[name]
        np.testing.assert_array_equal(same, x)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(0, {"params": stacked}, {})
    jax.tree.map(np.testing.assert_array_equal, params_of_checkpoint(tmp_path, plain), plain)
    kept.write(tmp_path, kept.read(ours))
    to_hf(tmp_path, tmp_path / "hf", **quiet)
    to_hf(ours, tmp_path / "hf too", **quiet)
    one, two = files(tmp_path / "hf"), files(tmp_path / "hf too")
    assert one.keys() == two.keys()
    for name, x in one.items():
        np.testing.assert_array_equal(two[name], x)


def params_of_checkpoint(path, like):
    return params.load(path, jax.eval_shape(lambda: like))


@pytest.mark.parametrize("scan", ["off", "on"])
def test_tensors_go_straight_onto_a_mesh(source, ours, scan):
    found = folder.open_folder(source)
    model = dataclasses.replace(found.options, scan_layers=scan)
    mesh = make_mesh(MeshSpec(fsdp=2, tensor=4))
    lm = decoder(model, "cpu")
    shapes = jax.eval_shape(lm.init, jax.random.key(0))
    where = param_shardings(lm.axes, shapes, mesh)
    abstract = jax.tree.map(
        lambda x, layout: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout), shapes, where
    )
    for tree in (load.load(found, abstract, model), params.load(ours, abstract)):
        assert jax.tree.map(lambda x: x.sharding, tree) == where
        jax.tree.map(np.testing.assert_array_equal, tree, params_of(ours, scan))


def test_experts_in_one_tensor_are_those_of_many(tmp_path):
    config = CASES["mixtral"]
    shapes = shapes_of(config)
    save(tmp_path / "each", config, shapes)
    layers = "model.layers.{}.".format
    whole = files(tmp_path / "each")
    for i in range(2):
        old, new = layers(i) + "block_sparse_moe.", layers(i) + "mlp."
        part = lambda e, name, old=old: whole.pop(f"{old}experts.{e}.{name}.weight")
        gates, downs, ups = (np.stack([part(e, n) for e in range(4)]) for n in ("w1", "w2", "w3"))
        whole[new + "experts.gate_up_proj"] = np.concatenate([gates, ups], axis=1)
        whole[new + "experts.down_proj"] = downs
        whole[new + "gate.weight"] = whole.pop(old + "gate.weight")
    shutil.copytree(tmp_path / "each", tmp_path / "all")
    save_file(whole, tmp_path / "all" / "model.safetensors")
    for name in ("each", "all"):
        from_hf(tmp_path / name, tmp_path / f"our {name}", **quiet)
    one, two = params_of(tmp_path / "our each"), params_of(tmp_path / "our all")
    jax.tree.map(np.testing.assert_array_equal, one, two)
    up = one["blocks"]["1"]["mlp"]["experts"]["up"]["kernel"]
    drawn = draw("model.layers.1.block_sparse_moe.experts.3.w3.weight", (48, 32))
    np.testing.assert_array_equal(up[3], drawn.T)


def test_another_dtype_is_that_of_all_tensors(source, tmp_path):
    from_hf(source, tmp_path / "half", dtype="bfloat16", **quiet)
    assert kept.read(tmp_path / "half").options.param_dtype == "bfloat16"
    to_hf(tmp_path / "half", tmp_path / "back", **quiet)
    whole = files(source)
    for name, x in files(tmp_path / "back").items():
        np.testing.assert_array_equal(x, whole[name].astype(x.dtype))
        assert x.dtype.name == "bfloat16"
    to_hf(tmp_path / "half", tmp_path / "float32", dtype="float32", **quiet)
    assert {x.dtype.name for x in files(tmp_path / "float32").values()} == {"float32"}
    full = dataclasses.replace(kept.read(tmp_path / "half").options, param_dtype="float32")
    wanted = jax.eval_shape(decoder(full, "cpu").init, jax.random.key(0))
    widened = params.load(tmp_path / "half", wanted)  # as training in float32 does
    assert {x.dtype.name for x in jax.tree.leaves(widened)} == {"float32"}


def test_a_tokenizer_with_more_tokens_than_rows_is_refused(source, tmp_path):
    config = CASES["qwen3"]
    save(tmp_path / "hf", config, shapes_of(config))
    tokenizers.copy(source, tmp_path / "hf")
    with pytest.raises(ValueError, match=r"has 258 tokens, and the embedding .* only 61 rows"):
        from_hf(tmp_path / "hf", tmp_path / "out", **quiet)
    assert not (tmp_path / "out").exists()


def test_folders_are_named_as_one_types_them(source, ours, tmp_path, monkeypatch):
    shutil.copytree(source, tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    from_hf(Path("model"), Path("out"), **quiet)
    to_hf(Path("out"), Path("back"), **quiet)
    jax.tree.map(np.testing.assert_array_equal, params_of(Path("out")), params_of(ours))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "model", "out"]


def test_a_failed_export_leaves_nothing(ours, tmp_path, monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("jaxlm.convert.export.write", full)
    with pytest.raises(ValueError, match="back could not be written: No space"):
        to_hf(ours, tmp_path / "back", **quiet)
    assert list(tmp_path.iterdir()) == []


def test_both_folders_open_as_the_same_model(source, ours):
    one, two = open_model(source, **quiet), open_model(ours, **quiet)
    jax.tree.map(np.testing.assert_array_equal, one.params, two.params)
    assert one.length == two.length == 64
    assert one.model == two.model
    assert one.tokenizer.vocabulary_size == 258
    assert one.ends == two.ends == {2, one.tokenizer.eos}, "generation_config.json comes along"


def test_a_model_whose_attention_is_wrong_here_does_not_open(source, monkeypatch):
    monkeypatch.setattr(proof, "KERNELS", ("cpu_blocks", "xla"))
    monkeypatch.setattr(proof, "_largest_error", lambda *args: 1.0)
    with pytest.raises(ValueError, match=r"the attention kernel .* is wrong on this"):
        open_model(source, **quiet)


def test_the_context_ends_with_the_table_of_positions(tmp_path):
    config = CASES["gpt2"] | {"vocab_size": 258, "max_position_embeddings": 4096}
    save(tmp_path / "gpt2", config, shapes_of(config))
    tokenizers.save_byte(tmp_path / "gpt2")
    assert open_model(tmp_path / "gpt2", **quiet).length == config["n_positions"]


def test_what_can_be_done_with_a_folder_is_said(source, tmp_path, monkeypatch, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in source.glob("*model*"):
        shutil.copy(path, bare)
    shutil.copy(source / "config.json", bare)
    for path, out in ((source, "whole"), (bare, "without")):
        monkeypatch.setattr("sys.argv", ["convert", "from-hf", str(path), str(tmp_path / out)])
        assert convert.main() == 0
    whole, without = capsys.readouterr().out.splitlines()
    assert "jaxlm.generate" in whole
    assert "jaxlm.generate" not in without
    assert f"--config.init.checkpoint={tmp_path / 'without'}" in without
    assert str(tmp_path / "without" / "tokenizer") in without


def test_a_hugging_face_folder_has_no_steps(source):
    with pytest.raises(ValueError, match="--step=3"):
        open_model(source, step=3, **quiet)


def test_only_a_folder_with_a_model_opens(source, tmp_path):
    with pytest.raises(ValueError, match=r"there is no folder .*absent"):
        open_model(tmp_path / "absent", **quiet)
    with pytest.raises(ValueError, match="holds no model"):
        open_model(tmp_path, **quiet)
    (tmp_path / "run.json").touch()
    (tmp_path / "checkpoints" / "3").mkdir(parents=True)
    for inside in ("checkpoints", "checkpoints/3"):
        with pytest.raises(ValueError, match=f"the run is {tmp_path}, and --step=N names one"):
            open_model(tmp_path / inside, **quiet)


def test_a_damaged_part_is_noticed(ours, tmp_path):
    shutil.copytree(ours, tmp_path / "copy")
    data = next((tmp_path / "copy" / "checkpoints" / "0" / "part-0").rglob("d/*"))
    data.write_bytes(b"\0" + data.read_bytes()[1:])
    with pytest.raises(ValueError, match="no usable checkpoint"):
        to_hf(tmp_path / "copy", tmp_path / "back", **quiet)
