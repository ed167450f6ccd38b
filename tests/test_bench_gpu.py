"""The benchmark for GPUs runs at toy size on a CPU; its FLOPs are those of the program."""

import dataclasses
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from jaxlm import flops
from jaxlm.methods.likelihood import summed_nll
from jaxlm.models.transformer import DecoderConfig, decoder

ROOT = pathlib.Path(__file__).resolve().parents[1]
TOOL = ROOT / "tools" / "bench_gpu.py"
sys.path.append(str(TOOL.parent))

import bench_gpu  # noqa: E402


def test_flops_are_those_of_the_program_but_for_what_no_query_sees():
    shape = bench_gpu.SHAPES["toy"]
    sizes = dataclasses.asdict(shape)
    rows, length = sizes.pop("batch"), sizes.pop("length")
    lm = decoder(DecoderConfig(**sizes, attention="xla"), "cpu")
    params = jax.eval_shape(lm.init, jax.random.key(0))
    ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)
    batch = dict.fromkeys(("tokens", "targets", "segments", "positions"), ids)
    batch["weights"] = jax.ShapeDtypeStruct((rows, length), jnp.float32)
    program = jax.make_jaxpr(jax.grad(lambda p, b: summed_nll(lm, p, b)[0]))(params, batch)
    unseen = 6 * shape.layers * shape.width * (length - 1) * rows * length
    assert flops.count_flops(program) - unseen == bench_gpu.model_flops(shape)


@pytest.mark.slow
def test_a_toy_passes_and_prints_its_rates():
    command = [sys.executable, TOOL, "--shape=toy", "--steps=1", "--backends=xla"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("  pass") == 4
    rows = [line for line in done.stdout.splitlines() if line.startswith("xla") and "loss" in line]
    assert [row.split("  ")[0] for row in rows] == ["xla", "xla, scanned"]
    rates = [float(row[39:50].replace(",", "")) for row in rows]
    assert min(rates) > 0


@pytest.mark.slow
def test_a_contestant_that_fails_is_named_and_the_rest_go_on():
    command = [sys.executable, TOOL, "--shape=toy", "--steps=1", "--only=steps"]
    command += ["--backends=none", "--torch=/bin/false"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 1
    assert done.stdout.count("failed: nothing") == 4
