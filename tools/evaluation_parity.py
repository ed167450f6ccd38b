"""The local tasks of the tests through lm-eval's own `hf` backend: what ours is held against.

    python tools/evaluation_parity.py             writes tests/evals/fixtures/lm_eval_hf.json
    python tools/evaluation_parity.py --check     compares our backend with torch's, item by item

Needs torch, transformers, accelerate and lm-eval beside jaxlm. The model and the data are made from
fixed seeds (tests/evals/local_tasks.py), so that only answers and metrics are kept.
"""

import argparse
import json
import os
import pathlib
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
FIXTURE = ROOT / "tests" / "evals" / "fixtures" / "lm_eval_hf.json"
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["DISABLE_MULTIPROC"] = "1"

from tests.evals import local_tasks  # noqa: E402

# name -> does the tokenizer begin texts with a bos; what is asked of lm-eval beside the tasks
RUNS = {
    "plain": (False, {}),
    "bos": (True, {}),
    "chat": (True, {"apply_chat_template": True, "system_instruction": "Be brief."}),
}


def main():
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--check", action="store_true")
    flags = flags.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        torch = {name: through_torch(pathlib.Path(folder), name) for name in RUNS}
        if flags.check:
            return compare(torch, {n: through_jaxlm(pathlib.Path(folder), n) for n in RUNS})
    FIXTURE.parent.mkdir(exist_ok=True)
    FIXTURE.write_text(json.dumps(torch, indent=None, separators=(",", ":"), sort_keys=True) + "\n")
    print(f"{FIXTURE.relative_to(ROOT)}: {FIXTURE.stat().st_size:,} bytes")
    return 0


def prepared(folder, name):
    """The model's folder and the tasks' folder."""
    model, tasks = folder / f"model-{name}", folder / "tasks"
    local_tasks.write_tasks(tasks)
    local_tasks.write_model(model, bos=RUNS[name][0])
    return model, tasks


def through_torch(folder, name):
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    model, tasks = prepared(folder, name)
    lm = HFLM(pretrained=str(model), device="cpu", dtype="float32", batch_size=4)
    results = lm_eval.simple_evaluate(
        lm,
        tasks=list(local_tasks.TASKS),
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=100,
        **RUNS[name][1],
    )
    return local_tasks.kept(results)


def through_jaxlm(folder, name):
    import jax

    from jaxlm.evals import tasks as loader

    model, tasks = prepared(folder, name)
    loaded = loader.load(local_tasks.TASKS, include=str(tasks))
    with jax.default_matmul_precision("highest"):
        results = loader.evaluate(opened(model), loaded, bootstrap_iters=100, **RUNS[name][1])
    return local_tasks.kept(results)


def opened(folder):
    """Our lm-eval model of a Hugging Face folder."""
    from jaxlm.evals.model import Model
    from jaxlm.opened import open_model

    found = open_model(folder)
    model = Model(found.lm, found.params, found.folder, found.mesh, found.length, found.ends)
    return model.for_lm_eval()


def compare(theirs, ours):
    """A table of the largest differences; 1 if any is above 1e-3 or a metric differs."""
    wrong = 0
    print(f"{'run':8} {'task':18} {'items':>5}  {'largest difference of log p':>28}  metrics")
    for name, tasks in theirs.items():
        for task, found in tasks.items():
            gap = local_tasks.largest_gap(found["answers"], ours[name][task]["answers"])
            same = local_tasks.same_metrics(found["metrics"], ours[name][task]["metrics"])
            wrong += not (gap <= 1e-3 and same)
            said = "the same" if same else f"{found['metrics']} {ours[name][task]['metrics']}"
            print(f"{name:8} {task:18} {len(found['answers']):5}  {gap:28.2e}  {said}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
