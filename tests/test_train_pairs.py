"""Whole runs on preferences and conversations, as users start them."""

import json
import math
import shutil

import pytest
from whole_runs import lines, losses, run

pytestmark = pytest.mark.slow
RECIPE = "tests/tiny_pairs.py"


@pytest.fixture(scope="module")
def pairs(home):
    rows = [
        {"prompt": f"q{i}", "chosen": f"yes {i % 7}", "rejected": "no" * (1 + i % 3)}
        for i in range(120)
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (home / "text" / "pairs.jsonl").write_text(text)
    return run(home, "pairs", recipe=RECIPE)


def test_a_run_on_preferences_scores_and_answers(home, pairs):
    metrics, (first, last) = lines(home, "pairs"), lines(home, "pairs", "evals.jsonl")
    assert metrics[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert "bits_per_char" not in metrics[0]
    assert metrics[-1]["tokens"] == 20 * 8 * 2 * 32, "both members are read"
    assert (first["step"], last["step"]) == (10, 20)
    assert {"loss/likes", "dpo/accuracy/likes", "dpo/margin/likes"} <= last.keys()
    assert 0 < last["dpo/kl_reference/likes"] < last["dpo/entropy/likes"] < math.log(258)
    assert last["loss/likes"] < 0.69
    assert "held-out likes: loss" in pairs
    assert "likes (pairs): the tokens are those of responses" in pairs
    sample = lines(home, "pairs", "samples.jsonl")[-1]
    assert sample["prompt"].startswith("user:\nq")
    assert sample["prompt"].endswith("assistant:\n")
    results = json.loads((home / "pairs" / "results.json").read_text())
    assert results["figures"]["loss/likes"] == last["loss/likes"]
    page = (home / "pairs" / "report.html").read_text()
    assert "Preferences" in page
    assert "nats per pair or response" in page
    assert "nats per token" not in page
    assert "finished" in run(home, "pairs", recipe=RECIPE)


def test_a_run_on_preferences_goes_on_exactly(home, pairs):
    shutil.copytree(home / "pairs", home / "again")
    shutil.rmtree(home / "again" / "checkpoints" / "20")
    (home / "again" / "results.json").unlink()
    out = run(home, "again", recipe=RECIPE)
    assert "continuing at step 10 of 20" in out
    assert losses(home, "again") == losses(home, "pairs")
    assert (
        lines(home, "again", "evals.jsonl")[-1]["loss/likes"]
        == (lines(home, "pairs", "evals.jsonl")[-1]["loss/likes"])
    )


def test_adapters_with_a_precomputed_reference(home, pairs):
    """Training and evaluation both read the column, of the base: who does not move stays at log 2,
    with each record's own number."""
    flags = ("--config.method=dpo + lora", "--config.dpo.reference=precomputed")
    still = ("--config.steps=3", "--config.lora.rank=2", "--config.optimizer.learning_rate=1e-9")
    quick = ("--config.model.layers=1", "--config.eval.samples=1")
    out = run(home, "kept", *flags, *still, *quick, recipe=RECIPE)
    assert "'reference' of every record takes" in out
    assert losses(home, "kept") == pytest.approx([math.log(2)] * 3, abs=1e-4)
    last = lines(home, "kept", "evals.jsonl")[-1]
    assert last["loss/likes"] == pytest.approx(math.log(2), abs=1e-4)
    assert not (home / "kept" / "checkpoints" / "once" / "reference").exists()


def test_limits_on_the_length_are_evaluated_in_one_go(home, pairs):
    asked = {"original_instruction": "q1", "instruction": "2: q1", "output": "Yes 1."}
    file = home / "alpaca.json"
    file.write_text(json.dumps([asked | {"max_len": 2}, asked | {"max_len": 40}]))
    flags = (f"--checkpoint={home / 'pairs'}", f"--lengths={file}", "--chat", "--log_samples")
    judge = "--judge=tests.evals.judges:favourable"
    flags = (*flags, judge, "--max_tokens=6", "--step=best", "--params=reference")
    out = run(home, "", *flags, module="evaluate")
    assert "×1" in out
    (path,) = (home / "pairs" / "evaluations").glob("lengths_*.json")
    written = json.loads(path.read_text())
    best = max(lines(home, "pairs", "evals.jsonl"), key=lambda line: line["dpo/accuracy/likes"])
    assert (written["step"], written["params"]) == (best["step"], "reference")
    assert f"--step=best is step {best['step']}, by max:dpo/accuracy/likes" in out
    (found,) = written["lengths"]
    assert (found["prompts"], found["scale"]) == (2, 1.0)
    assert found["violations"] + found["wins"] == pytest.approx(1), "a judge that is always for it"
    (path,) = (home / "pairs" / "evaluations").glob("answers_*.jsonl")
    assert len(path.read_text().splitlines()) == 2
    assert "words / limit" in (home / "pairs" / "report.html").read_text()


def test_what_was_trained_on_conversations_is_asked_with_their_template(home, pairs):
    asked = home / "asked.jsonl"
    asked.write_text('{"messages": [{"role": "user", "content": "q1"}]}\n')
    written = home / "said.jsonl"
    flags = (f"--checkpoint={home / 'pairs'}", f"--prompts={asked}", f"--output={written}")
    run(home, "", *flags, "--tokens=4", module="generate")
    assert json.loads(written.read_text())["finish"] in ("stop", "length")
    assert (home / "pairs" / "tokenizer" / "chat_template.jinja").is_file()
