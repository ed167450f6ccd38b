"""Evaluation as users start it: inside training, and afterwards with four processes."""

import json
import os
import subprocess
import sys

import pytest
from whole_runs import ROOT, environment, lines, run

pytest.importorskip("lm_eval")

from tests.evals import local_tasks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(home):
    """A work folder whose run looked at two tasks on its way."""
    local_tasks.write_tasks(home / "tasks")
    files = [str(home / "tasks" / f"{name}.yaml") for name in ("local_choice", "local_text")]
    run(
        home,
        "run",
        f"--config.eval.tasks={','.join(files)}",
        "--config.eval.tasks_every=10",
        "--config.eval.tasks_limit=4",
        "--config.data.length=96",
        "--config.eval.samples=",
    )
    return home / "run"


def test_tasks_run_inside_training(home, trained):
    rows = lines(home, "run", "evals.jsonl")
    assert [row["step"] for row in rows] == [10, 20]
    assert all(0 <= row["task/local_choice/acc"] <= 1 for row in rows)
    assert rows[0]["task/local_text/bits_per_byte"] > rows[1]["task/local_text/bits_per_byte"]
    assert "loss/code" in rows[1], "one row a step"
    final = json.loads((trained / "results.json").read_text())["tasks"]
    assert final["n-samples"]["local_choice"] == {"original": 12, "effective": 4}
    assert "local_choice" in (trained / "report.html").read_text()
    assert "step 10: tasks: local_choice/acc" in (trained / "train.log").read_text()


def test_a_run_is_refused_for_its_tasks_before_its_data_is_prepared(home):
    out = run(home, "refused", "--config.eval.tasks=none.yaml,", code=1)
    assert "there is no file none.yaml of a task" in out
    assert "[2/6]" not in out
    assert not (home / "refused" / "checkpoints").exists()


def test_four_processes_find_what_one_did(home, trained):
    command = [sys.executable, "-m", "launch.local", "--processes=4", "--devices=1"]
    command += [sys.executable, "-m", "jaxlm.evaluate", f"--checkpoint={trained}", "--limit=4"]
    command += ["--tasks=local_last_word,local_text", "--log_samples"]
    command += [f"--include_path={home / 'tasks'}"]
    command += [f"--compression={home / 'text' / 'prose'}", "--window=64", "--stride=16"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment(home), text=True, capture_output=True, timeout=400
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("bits/char") == 1, "process 0 alone says it"
    folder = trained / "evaluations"
    (results,) = (json.loads(p.read_text()) for p in folder.glob("results_*.json"))
    whole = {"results", "configs", "versions", "n-shot", "n-samples", "config", "git_hash", "date"}
    whole |= {"group_subtasks", "higher_is_better", "model_name", "task_hashes", "lm_eval_version"}
    assert whole <= results.keys(), "what lm-eval itself would have written"
    one = json.loads((trained / "results.json").read_text())["tasks"]["results"]["local_text"]
    for figure in ("bits_per_byte,none", "word_perplexity,none"):
        assert results["results"]["local_text"][figure] == pytest.approx(one[figure], rel=1e-5)
    assert (results["step"], results["params"]) == (20, "params")
    (samples,) = folder.glob("samples_local_last_word_*.jsonl")
    first = json.loads(samples.read_text().splitlines()[0])
    assert first["arguments"]["gen_args_0"]["arg_1"] == first["target"]
    (corpora,) = (json.loads(p.read_text()) for p in folder.glob("compression_*.json"))
    assert (corpora["step"], corpora["params"]) == (20, "params")
    prose = corpora["compression"]["prose"]
    assert prose["documents"] == 60
    assert prose["characters"] == sum(
        os.path.getsize(path) for path in (home / "text" / "prose").iterdir()
    )
    assert 0 < prose["min_k_lowest"] <= prose["min_k"]
    page = (trained / "report.html").read_text()
    assert "local_last_word" in page
    assert "bits per character" in page
