"""Every kind of damage that the fault campaign does is seen, and costs one checkpoint at most."""

import importlib.util
import pathlib
import random
import shutil

import jax.numpy as jnp
import pytest

from jaxlm.checkpoint import Checkpoints

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture(scope="module")
def faults():
    spec = importlib.util.spec_from_file_location("faults", ROOT / "tools" / "faults.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    with Checkpoints(folder) as checkpoints:
        for step in (10, 20):
            checkpoints.save(step, {"params": {"table": jnp.ones((64, 64)) * step}}, {})
    return folder


def test_damage_is_seen_and_costs_one_checkpoint(faults, saved, tmp_path):
    seen = set()
    for seed in range(24):
        run = faults.Disturbed(tmp_path, "a-run", random.Random(seed))
        shutil.copytree(saved, run.folder / "checkpoints")
        kind = run.damage()
        said = []
        good = Checkpoints(run.folder / "checkpoints", say=said.append).steps()
        assert good == ([10, 20] if kind == "half-written" else [10]), kind
        assert len(said) == 1
        assert run.damage() == "" or kind == "half-written"  # never the last good one
        seen.add(kind)
    assert seen == {"flipped", "truncated", "deleted", "no digest", "half-written"}
