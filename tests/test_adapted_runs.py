"""Runs with LoRA on a base in few bits: what they store, how they go on, and that others start from
what they made."""

import types

import jax
import numpy as np
import pytest
import tiny

import jaxlm.models.lora as adapters
from jaxlm import resume
from jaxlm.build import build
from jaxlm.checkpoint import Checkpoints, storage
from jaxlm.config import check
from jaxlm.contract import BASE
from jaxlm.models import quantized
from jaxlm.models.transformer import stack_layers

pytestmark = pytest.mark.slow
VOCABULARY = 40
PREPARED = types.SimpleNamespace(
    hash="records", tokenizer=types.SimpleNamespace(vocabulary_size=VOCABULARY)
)


def built(devices=8, method="next_token + lora", scan="off"):
    c = tiny.get_config()
    c.method, c.model.scan_layers = method, scan
    c.mesh.update(**({"fsdp": 4, "tensor": 2} if devices == 8 else {}))
    c.lora.update(rank=2, dropout=0.2, base="nf4")
    return build(check(c), VOCABULARY, jax.devices()[:devices])


def rows(built, seed):
    rng = np.random.default_rng(seed)
    batch = built.zeros(built.run.rows)
    batch["tokens"] = rng.integers(0, VOCABULARY, batch["tokens"].shape).astype(np.int32)
    batch["targets"] = np.roll(batch["tokens"], -1, axis=-1)
    places = np.arange(batch["tokens"].shape[1], dtype=np.int32)
    batch["positions"] = np.broadcast_to(places, batch["tokens"].shape)
    batch["segments"], batch["weights"] = batch["segments"] + 1, batch["weights"] + 1
    return built.put_whole(batch)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on eight devices that was stopped after two steps of three, and its end."""
    workdir, run = tmp_path_factory.mktemp("run"), built()
    key = jax.random.key(0)
    with jax.set_mesh(run.mesh), Checkpoints(workdir / "checkpoints") as checkpoints:
        state, _ = resume.restore_or_start(run, PREPARED, checkpoints)
        step, _ = run.step()
        for n in range(2):
            state, _ = step(state, rows(run, n), key)
        resume.save(run, PREPARED, checkpoints, state, {})
        checkpoints.wait()
        params, base = jax.device_get((state.params, state.extras[BASE]))
        state, _ = step(state, rows(run, 2), key)
        return workdir, run, step, params, base, jax.device_get(state)


def test_it_goes_on_to_the_same_bits(trained):
    workdir, run, step, _, _, end = trained
    with jax.set_mesh(run.mesh), Checkpoints(workdir / "checkpoints") as checkpoints:
        state, at = resume.restore_or_start(run, PREPARED, checkpoints)
        assert at == 2
        state, _ = step(state, rows(run, 2), jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), end)


def test_it_goes_on_with_its_layers_stacked(trained):
    """Factors, and codes and largest numbers of each kernel of the base."""
    workdir, _, _, params, base, _ = trained
    run = built(scan="on")
    with jax.set_mesh(run.mesh), Checkpoints(workdir / "checkpoints") as checkpoints:
        state, _ = resume.restore_or_start(run, PREPARED, checkpoints)
    found = jax.device_get((state.params, state.extras[BASE]))
    jax.tree.map(np.testing.assert_array_equal, found, (stack_layers(params), stack_layers(base)))


def test_a_checkpoint_holds_the_adapter_alone_and_devices_their_part_of_the_base(trained):
    workdir, run, *_ = trained
    saved = storage.read(workdir / "checkpoints" / "2").trees
    assert {name.rpartition("/")[2] for name in saved["params"]} == {"lora_a", "lora_b"}
    assert not any(name.endswith("kernel") for name in saved["opt_state"])
    base = storage.read(workdir / "checkpoints" / "once" / BASE).trees[BASE]
    assert tuple(base["blocks/0/mlp/up/kernel/nf4"]) == ((16, 128), "uint8")
    assert not any(name.startswith("blocks") and name.endswith("kernel") for name in base)
    up = run.abstract.extras[BASE]["blocks"]["0"]["mlp"]["up"]["kernel"]
    assert up["nf4"].sharding.spec == jax.P("fsdp", "tensor")
    assert up["largest"].sharding.spec == jax.P(None, "tensor")  # 1 of 32 rows: not split
    factors = run.abstract.params["blocks"]["0"]["mlp"]["up"]
    assert factors["lora_a"].sharding.spec == jax.P("fsdp", None)
    assert factors["lora_b"].sharding.spec == jax.P(None, "tensor")


def test_another_run_starts_from_both_together(trained):
    workdir, _, _, params, base, _ = trained
    other = built(devices=1, method="next_token")
    with jax.set_mesh(other.mesh):
        found = other.load(str(workdir))
    close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6)
    base = quantized.plain(base)
    jax.tree.map(close, found, adapters.merged(base, params, 32.0 / 2))
    moved = jax.tree.map(lambda a, b: np.any(a != b), found, base)
    assert moved["blocks"]["0"]["mlp"]["up"]["kernel"]
    assert not moved["blocks"]["0"]["mlp_norm"]["scale"]


def test_a_run_counts_its_parameters_and_its_state():
    full, small = built(method="next_token"), built()
    assert small.parameters() == full.parameters() | {"adapter": small.parameters()["adapter"]}
    size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
    assert size(small.abstract.params) == small.parameters()["adapter"]
    assert size(small.abstract.opt_state) < 2.1 * size(small.abstract.params)
    assert size(small.abstract_model) == size(full.abstract.params)
    bytes_of = lambda tree: sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    blocks = lambda tree: bytes_of(tree["blocks"])
    assert blocks(small.abstract.extras[BASE]) < 0.2 * blocks(full.abstract.params)
