"""lm-eval's tasks on our model: the answers and metrics of its `hf` backend on torch, item by item.

The committed answers were made by tools/evaluation_parity.py.
"""

import json
import pathlib

import pytest

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance

from jaxlm.evals import tasks, texts
from jaxlm.evals.harness import Jaxlm
from tests.evals import local_tasks
from tools.evaluation_parity import RUNS, opened

FIXTURE = pathlib.Path(__file__).parent / "fixtures" / "lm_eval_hf.json"
THEIRS = json.loads(FIXTURE.read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Holds the tasks, and a model for each of `RUNS`."""
    folder = tmp_path_factory.mktemp("evaluation")
    local_tasks.write_tasks(folder / "tasks")
    for name, (bos, _) in RUNS.items():
        local_tasks.write_model(folder / name, bos)
    return folder


@pytest.fixture(scope="module")
def loaded(folder):
    return tasks.load(local_tasks.TASKS, include=str(folder / "tasks"))


@pytest.mark.slow
@pytest.mark.parametrize("run", RUNS)
def test_answers_and_metrics_are_those_of_lm_evals_hf_backend(run, folder, loaded):
    model = opened(folder / run)
    results = tasks.evaluate(model, loaded, bootstrap_iters=100, **RUNS[run][1])
    ours = local_tasks.kept(results)
    for task, theirs in THEIRS[run].items():
        assert local_tasks.largest_gap(theirs["answers"], ours[task]["answers"]) < 1e-3, task
        assert local_tasks.same_metrics(theirs["metrics"], ours[task]["metrics"]), task
    assert model.shortened, "the tasks hold contexts that are too long"


@pytest.mark.slow
def test_how_to_generate_is_refused_in_our_words(folder):
    model = opened(folder / "plain")
    ask = Instance("generate_until", {}, ("a", {"temperature": "abc"}), 0)
    with pytest.raises(ValueError, match=r"generation_kwargs mean nothing: .*'abc'"):
        model.generate_until([ask])
    ask = Instance("generate_until", {}, ("a", {"top_p": "hot", "max_gen_toks": 8}), 0)
    with pytest.raises(ValueError, match=r"'top_p': 'hot', .* all have to be numbers"):
        model.generate_until([ask])


def test_an_empty_context_is_the_bos(tmp_path):
    """Of a tokenizer that puts none before a text by itself."""
    local_tasks.write_tokenizer(tmp_path, bos=False, length=96)
    asked = []

    def generate(prompts):
        asked.extend(prompts)
        return [[1] for _ in prompts]

    model = Jaxlm(texts.load(tmp_path), 96, lambda requests: [], generate)
    until = {"until": ["e"], "max_gen_toks": 8}
    model.generate_until([Instance("generate_until", {}, (text, until), 0) for text in ("", "a")])
    assert [prompt.ids for prompt in asked] == [[model.prefix_token_id], model.tok_encode("a")]
