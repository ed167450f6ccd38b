"""Held-out figures by the objective: exact on all records, in whatever batches."""

import functools
import json
import math

import jax
import numpy as np
import pytest
from toy import toy

from jaxlm.data.batches import Gather
from jaxlm.data.prepare import prepare
from jaxlm.data.sources import SourceSpec
from jaxlm.data.spec import DataSpec
from jaxlm.evals.objective import ByObjective, padded, rows_of
from jaxlm.methods.dpo import dpo
from jaxlm.methods.kto import kto
from jaxlm.step import make_score

LENGTH = 32


def prepared(folder, form):
    path = folder / "pairs.jsonl"
    rows = [{"prompt": f"q{i}", "chosen": f"yes {i}", "rejected": "n" * (i % 7)} for i in range(60)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = SourceSpec("pref", str(path), format=form)
    options = {"length": LENGTH, "held_out": 0.3, "template": "plain", "tokenizer": "byte"}
    return prepare(DataSpec((source,), **options), folder / "cache").sources[0]


def zeros(rows, form):
    ids = ("tokens", "targets", "segments", "positions")
    batch = {name: np.zeros((rows, 2, LENGTH), np.int32) for name in ids}
    batch |= {"weights": np.zeros((rows, 2, LENGTH), np.float32)}
    if form == "feedback":
        batch |= {"desirable": np.zeros(rows, np.float32)}
    return batch | {name: np.zeros(rows, np.int32) for name in ("source", "index")}


LM = toy(V=258)
PARAMS = LM.init(jax.random.key(0))
OTHER = {"reference": LM.init(jax.random.key(1))}


def figures(source, method, form, batch, **options):
    make = functools.partial(zeros, form=form)
    put = jax.device_put
    options = {"batch": batch, "zeros": make, "put": put, "characters": 10**6} | options
    judged = ByObjective(make_score(LM, method), [source], **options)
    judged.compile(PARAMS, OTHER)
    return judged.figures(PARAMS, OTHER)


@pytest.mark.slow
def test_all_held_out_pairs_are_scored_once(tmp_path):
    source = prepared(tmp_path, "pairs")
    assert source.held_out_rows > 10
    seven, whole = (figures(source, dpo(), "pairs", size) for size in (7, source.held_out_rows))
    assert seven.keys() == whole.keys()
    for name in whole:
        np.testing.assert_allclose(seven[name], whole[name], rtol=1e-5, err_msg=name)
    batch = Gather([source], held_out=True)(np.arange(source.held_out_rows))
    loss, aux = dpo().objective(LM, PARAMS, OTHER, batch, None)
    np.testing.assert_allclose(whole["loss/pref"], loss / aux.weight, rtol=1e-5)
    assert whole["dpo/length_chosen/pref"] > whole["dpo/length_rejected/pref"]
    # A policy that is its own reference:
    score = make_score(LM, dpo())(PARAMS, {"reference": PARAMS}, batch)
    np.testing.assert_allclose(score["loss"][0] / score["loss"][1], math.log(2), rtol=1e-6)


def test_rewards_of_feedback_are_means_of_their_own_kind(tmp_path):
    source = prepared(tmp_path, "feedback")
    found = figures(source, kto(), "feedback", source.held_out_rows)
    batch = Gather([source], held_out=True)(np.arange(source.held_out_rows))
    alone = {}
    for kind in (0.0, 1.0):
        mine = batch["desirable"] == kind
        some = batch | {"weights": batch["weights"] * mine[:, None, None]}
        # k is a mean over the batch, so it is taken out before the kinds are compared.
        metrics = make_score(LM, kto())(PARAMS, OTHER, some)
        name = "kto/reward_desirable" if kind else "kto/reward_undesirable"
        k = metrics["kto/divergence"][0] / metrics["kto/divergence"][1]
        alone[name] = metrics[name][0] / metrics[name][1] + 0.1 * k
    for name, value in alone.items():
        with_k = found[f"{name}/pref"] + 0.1 * found["kto/divergence/pref"]
        np.testing.assert_allclose(with_k, value, rtol=1e-4)


def test_a_held_out_row_is_not_taken_for_one_of_training(tmp_path):
    source = prepared(tmp_path, "pairs")
    found = Gather([source], held_out=True)(np.arange(3))
    batch = padded(zeros(5, "pairs"), found, number=2)
    assert batch["index"].tolist() == [-1, -2, -3, 0, 0]
    assert set(batch["source"]) == {2}
    assert not batch["weights"][3:].any()


def test_no_more_is_scored_than_asked_for(tmp_path):
    source = prepared(tmp_path, "pairs")
    held = sum(len(document.text) for document in source.held_out)
    assert rows_of(source, held) == source.held_out_rows
    assert rows_of(source, held // 2 + 1) == source.held_out_rows // 2
    assert rows_of(source, 1) == 1


def test_nothing_held_out_gives_no_figures():
    make = functools.partial(zeros, form="pairs")
    judged = ByObjective(
        make_score(LM, dpo()), [], batch=4, zeros=make, put=jax.device_put, characters=1
    )
    judged.compile(PARAMS, OTHER)
    assert judged.rows == 0
    assert judged.figures(PARAMS, OTHER) == {}
