"""Tasks by name: what is refused, in one sentence each, and the figures that are kept."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("lm_eval")

from jaxlm.evals import tasks
from tests.evals import local_tasks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tasks")
    local_tasks.write_tasks(folder)
    lost = json.loads((folder / "local_text.yaml").read_text())
    lost |= {"task": "local_lost", "dataset_kwargs": {"data_files": {"test": "no/such.jsonl"}}}
    (folder / "local_lost.yaml").write_text(json.dumps(lost))
    hub = lost | {"task": "local_hub", "dataset_path": "nobody/no-such-data", "dataset_kwargs": {}}
    (folder / "local_hub.yaml").write_text(json.dumps(hub))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ["local_lost", "local_hub"])
def test_a_data_set_that_is_not_here_is_one_sentence(folder, name):
    with pytest.raises(ValueError, match=f"data set of the task '{name}' is not on this") as error:
        tasks.load((name,), include=str(folder))
    assert "\n" not in str(error.value)


@pytest.mark.slow
def test_a_task_is_known_by_its_file_too(folder):
    _, found = tasks.load((str(folder / "local_choice.yaml"),))
    assert [task.task_name for task in found] == ["local_choice"]


@pytest.mark.slow
def test_an_unknown_task_names_the_nearest(folder, monkeypatch):
    small = tasks._manager(("local_text",), str(folder))
    monkeypatch.setattr(tasks, "_manager", lambda *a: small)  # reading all 14,000 files takes 10 s
    with pytest.raises(ValueError, match=r"no task 'local_chioce'; did you mean local_choice"):
        tasks.load(("local_chioce",), include=str(folder))


@pytest.mark.slow
def test_more_examples_than_there_are_are_refused(folder):
    silent = tasks.load(("local_choice",), include=str(folder))  # a task that says no number
    for count in (None, 0, len(silent[1][0].sampler.df) - 1):
        tasks.require_examples(silent, count)
    loaded = tasks.load(("local_chosen_few",), include=str(folder))
    has = len(loaded[1][0].sampler.df)
    tasks.require_examples(loaded, None)
    tasks.require_examples(loaded, has - 1)  # of its own questions: all but the one that is asked
    with pytest.raises(ValueError, match=f"{has} solved .* and has {has - 1}; give --num_fewshot"):
        tasks.require_examples(loaded, has)


def test_a_file_whose_ending_was_left_out_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").touch()
    with pytest.raises(ValueError, match=r"no task 'mine', but a file: give mine\.yaml"):
        tasks._resolve(SimpleNamespace(task_index={}, all_tasks=["mined"]), "mine")


@pytest.mark.slow
def test_git_says_nothing_where_there_is_no_repository(tmp_path, monkeypatch, capfd):
    from lm_eval import evaluator

    monkeypatch.chdir(tmp_path)
    with tasks._no_word_of_git():
        assert evaluator.get_git_commit_hash() is None
    assert capfd.readouterr().err == ""
    assert evaluator.get_git_commit_hash.__name__ == "get_git_commit_hash"


@pytest.mark.slow
def test_no_name_and_no_folder_are_told(folder):
    with pytest.raises(ValueError, match="no task is named"):
        tasks.load(())
    with pytest.raises(ValueError, match="is no folder"):
        tasks.load(("local_text",), include=str(folder / "nowhere"))


def test_lm_eval_missing_is_one_sentence(monkeypatch):
    monkeypatch.setattr(tasks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"not installed: pip install 'jaxlm\[eval\]'"):
        tasks.load(("arc_easy", "again"))


def test_figures_have_names_for_charts():
    metrics = {
        "alias": "x",
        "acc,none": 0.5,
        "acc_stderr,none": 0.1,
        "em,strict": 1,
        "n,none": "N/A",
    }
    results = {"results": {"some": metrics | {"sample_len": 3}}}
    assert tasks.figures(results) == {"task/some/acc": 0.5, "task/some/em/strict": 1.0}


@pytest.mark.slow
def test_no_torch_is_imported(folder):
    local_tasks.write_model(folder / "model", bos=True)
    code = (
        "import pathlib, sys\n"
        "from jaxlm.evals import harness, model, tasks, texts\n"
        f"tasks.load(('local_text',), include={str(folder)!r})\n"
        f"texts.load(pathlib.Path({str(folder)!r}) / 'model')\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)
