"""Every recipe builds, shrinks and takes two steps; the quickstart's first losses are on record.

The record (tests/golden.json) holds 20 losses of the quickstart's model, optimizer and method on
rows made from a fixed seed, since the built-in corpora differ between versions of Python. To make
it anew: `python tests/test_recipes.py`, and say in the commit why the curve may change.
"""

import importlib.util
import json
import pathlib
import sys

import jax
import numpy as np
import pytest

from jaxlm.build import build
from jaxlm.config import check

ROOT = pathlib.Path(__file__).parents[1]
RECIPES = sorted((ROOT / "configs").glob("*.py"))
GOLDEN = ROOT / "tests" / "golden.json"
VOCABULARY = 512


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def rows(run, step):
    """Rows with something to learn: each token follows from the one before, most of the time."""
    rng = np.random.default_rng((0, step))
    shape = (run.rows, *([run.members] if run.members > 1 else []), run.data.length + 1)
    tokens = np.cumsum(rng.integers(0, 3, shape), axis=-1) * 7 % VOCABULARY
    ones = np.ones_like(tokens[..., 1:], np.int32)
    return {
        "tokens": tokens[..., :-1].astype(np.int32),
        "targets": tokens[..., 1:].astype(np.int32),
        "weights": ones.astype(np.float32),
        "segments": ones,
        "positions": np.broadcast_to(np.arange(run.data.length, dtype=np.int32), ones.shape),
        "source": np.ones(run.rows, np.int32),
        "index": np.ones(run.rows, np.int32),
    }


def losses(run, steps):
    built = build(run, VOCABULARY, jax.devices()[:1])
    with jax.set_mesh(built.mesh):
        step, between = built.step()
        state, found = built.first_state(), []
        for i in range(steps):
            state, metrics = step(state, built.put(rows(run, i)), jax.random.key(0))
            state = between(i + 1, state)
            found.append(float(metrics["loss"]))
    assert step._cache_size() == 1, "the step compiles once"
    return found


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_shrinks_and_takes_two_steps(path):
    c = load(path)
    c.model.update(width=64, layers=2, heads=2, kv_heads=0, head_width=0, ffn_width=0, vocabulary=0)
    c.batch, c.accumulate, c.data.length = 2, 1, 32
    c.init.checkpoint = ""
    found = losses(check(c), 2)
    assert np.isfinite(found).all()


@pytest.mark.parametrize("path", RECIPES, ids=lambda p: p.stem)
def test_a_recipe_reads_like_an_abstract(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 80
    head = text.split('"""')[1]
    assert "python -m jaxlm" in head
    assert "Expect:" in head


def golden_losses():
    c = load(ROOT / "configs" / "quickstart.py")
    c.model.layers, c.batch, c.data.length = 2, 4, 64
    return losses(check(c), 20)


@pytest.mark.slow
def test_the_first_losses_are_those_on_record():
    # Sums run in another order from one release of XLA to the next; the curve stays.
    recorded = json.loads(GOLDEN.read_text())["cpu"]
    np.testing.assert_allclose(golden_losses(), recorded, rtol=1e-4)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps({"cpu": golden_losses()}, indent=1) + "\n")
    sys.stdout.write(GOLDEN.read_text())
