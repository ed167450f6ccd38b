"""The tasks of lm-eval by name, and what they say about a model, in lm-eval's own form.

A task is known by its name, or by the path of its YAML file. Nothing is downloaded unless that is
asked for: a data set that is not on this machine is a sentence, not a wait.
"""

import contextlib
import difflib
import functools
import importlib.util
import io
import logging
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

BOOTSTRAP = 10_000  # resamples behind the standard errors that have no formula


def require_lm_eval() -> None:
    """Raises `ValueError` where lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError(
            "tasks are those of lm-eval, which is not installed: "
            "pip install 'jaxlm[eval]', or 'lm-eval>=0.4.13,<0.5'"
        )


@functools.lru_cache(maxsize=8)
def load(names: tuple[str, ...], include: str = "", download: bool = False) -> tuple[Any, list]:
    """lm-eval's manager and the tasks and groups of these names, their data read.

    `include`: a folder with YAML files of more tasks. Raises `ValueError` for lm-eval missing, a
    name that is not known, and a data set that is not here.
    """
    require_lm_eval()
    if not names:
        raise ValueError("no task is named; give the names of some of lm-eval's, with commas")
    if include and not Path(include).is_dir():
        raise ValueError(f"--include_path={include} is no folder")
    if not download:
        _offline()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of what was asked for
    import datasets

    datasets.disable_progress_bars()
    manager = _manager(names, include)
    wanted = [name for pattern in names for name in _resolve(manager, pattern)]
    found = []
    for name in dict.fromkeys(wanted):
        made = _load_one(manager, name, download)
        found += made if isinstance(made, list) else [made]
    return manager, found


def require_examples(loaded: tuple[Any, list], count: int | None) -> None:
    """Raises `ValueError` where a task has fewer solved examples than it is to show.

    `count`: before each question; None = as the task says. Where the examples are the questions,
    a question is none of its own.
    """
    for top in loaded[1]:
        for task in top.get_all_tasks() if hasattr(top, "get_all_tasks") else [top]:
            own = task.config.num_fewshot
            asked = own if count is None or own == 0 else count  # a task may forbid them
            if not asked or not hasattr(task, "sampler"):
                continue
            has = len(task.sampler.df) - (task.fewshot_cfg.split == task.config.test_split)
            if asked > has:
                raise ValueError(
                    f"the task {task.config.task!r} is to show {asked} solved examples before each "
                    f"question, and has {has}; give --num_fewshot={has} at most"
                )


def evaluate(lm, loaded, *, writer: bool = True, **kwargs) -> dict[str, Any]:
    """What lm-eval's `simple_evaluate` returns about the loaded tasks, samples included.

    `kwargs` are its own. In a process that writes nothing, no standard errors are drawn.
    """
    import lm_eval

    manager, tasks = loaded
    simple_evaluate: Any = lm_eval.simple_evaluate  # a decorator hides its parameters
    kwargs = {"bootstrap_iters": BOOTSTRAP if writer else 0} | kwargs
    # What it prints (a line for each bootstrap) is for nobody.
    quiet = contextlib.redirect_stdout(io.StringIO())
    with _own_randomness(), _one_process(), _no_word_of_git(), quiet:
        try:
            return simple_evaluate(lm, tasks=list(tasks), task_manager=manager, **kwargs)
        except ValueError as error:
            if "marked as unsafe" in str(error):
                raise ValueError(
                    "a task runs code that the model wrote, and that is not done here: leave it "
                    f"out ({error})"
                ) from None
            raise


def figures(results: dict[str, Any]) -> dict[str, float]:
    """`task/<name>/<metric>` of each task and group, without the standard errors.

    The name of a filter is added where it is not the plain one.
    """
    found = {}
    for task, metrics in results["results"].items():
        for key, value in metrics.items():
            metric, comma, chosen = key.partition(",")
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if comma and number and not metric.endswith("_stderr"):
                more = "" if chosen == "none" else f"/{chosen}"
                found[f"task/{task}/{metric}{more}"] = float(value)
    return found


def table(results: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Head and rows: task or group, shots, metric, value, standard error."""
    rows = []
    better = results.get("higher_is_better", {})
    for task, metrics in results["results"].items():
        shots = str(results.get("n-shot", {}).get(task, ""))
        name = str(metrics.get("alias", task)).strip()
        for key in sorted(k for k in metrics if "," in k and "_stderr," not in k):
            metric, _, chosen = key.partition(",")
            arrow = {True: " ↑", False: " ↓"}.get(better.get(task, {}).get(metric), "")
            error = metrics.get(f"{metric}_stderr,{chosen}")
            rows.append(
                [
                    name,
                    shots,
                    metric + ("" if chosen == "none" else f" ({chosen})") + arrow,
                    _number(metrics[key]),
                    f"± {error:.4f}" if isinstance(error, float) else "",
                ]
            )
    return ["task", "shots", "metric", "value", ""], rows


def _number(value):
    return f"{value:,.4f}" if isinstance(value, float) else str(value)


def _manager(names, include):
    """lm-eval's index of tasks; its own 14,000 files are read only where they are needed."""
    from lm_eval.tasks import TaskManager

    files = [name for name in names if name.endswith((".yaml", ".yml"))]
    if lost := [name for name in files if not Path(name).is_file()]:
        raise ValueError(f"there is no file {lost[0]} of a task")
    plain = [name for name in names if name not in files]
    small = TaskManager(include_path=include or None, include_defaults=False)
    if all(name in small.task_index for name in plain):
        return small
    return TaskManager(include_path=include or None)


def _resolve(manager, name) -> list[str]:
    """The names that are meant: a name, a YAML file, or a pattern with * and ?."""
    if name in manager.task_index or name.endswith((".yaml", ".yml")):
        return [name]
    if set("*?") & set(name) and (found := manager.match_tasks([name])):
        return found
    if Path(f"{name}.yaml").is_file():
        raise ValueError(f"there is no task {name!r}, but a file: give {name}.yaml")
    near = difflib.get_close_matches(name, manager.all_tasks, 3, 0.5)
    raise ValueError(
        f"there is no task {name!r}; "
        + (f"did you mean {' or '.join(near)}?" if near else "`lm-eval ls tasks` lists them all")
    )


def _load_one(manager, name, download):
    """A task, a group or a tag's list of tasks, with data."""
    try:
        made = manager.load([name])
        for task in made["tasks"].values():
            _ = task.eval_docs
    except Exception as error:  # of datasets, of the hub, of the task's own code
        reason = (str(error).strip() or repr(error)).splitlines()[0][:300]
        if _is_missing_data(error):
            remedy = (
                "check the path in its YAML file, or the network"
                if download
                else "put it into the cache of Hugging Face datasets (--download fetches it where "
                "there is a network), or name local files in the task's YAML file"
            )
            raise ValueError(
                f"the data set of the task {name!r} is not on this machine: {remedy} ({reason})"
            ) from None
        raise ValueError(f"the task {name!r} cannot be loaded: {reason}") from None
    grouped = {task for group in made.get("groups", {}).values() for task in group.get_all_tasks()}
    return _tops(made, grouped)


def _tops(made, grouped):
    """What nothing else of the loaded holds: groups of groups, and tasks in no group."""
    groups = list(made.get("groups", {}).values())
    inner = {g.name for group in groups for g in group.get_all_groups()}
    return [g for g in groups if g.name not in inner] + [
        task for task in made["tasks"].values() if task not in grouped
    ]


def _is_missing_data(error) -> bool:
    from datasets.exceptions import DatasetsError

    return isinstance(error, OSError | DatasetsError)


def _offline():
    """No library may ask the network, whether it was imported before or will be."""
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    import huggingface_hub
    from datasets import config

    config.HF_HUB_OFFLINE = True
    config.HF_DATASETS_OFFLINE = True
    huggingface_hub.constants.HF_HUB_OFFLINE = True


@contextlib.contextmanager
def _own_randomness() -> Iterator[None]:
    """lm-eval seeds the global generators; whoever called finds theirs as they were."""
    python, numbers = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)  # noqa: NPY002


@contextlib.contextmanager
def _one_process() -> Iterator[None]:
    """Its bootstrap would fork, which a process that runs JAX must not do."""
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("DISABLE_MULTIPROC")
        else:
            os.environ["DISABLE_MULTIPROC"] = before


@contextlib.contextmanager
def _no_word_of_git() -> Iterator[None]:
    """Outside of a repository git says on the terminal that there is none, when lm-eval asks it."""
    from lm_eval import evaluator

    asks = evaluator.get_git_commit_hash
    here = Path.cwd()
    if not any((folder / ".git").exists() for folder in (here, *here.parents)):
        evaluator.get_git_commit_hash = lambda: None
    try:
        yield
    finally:
        evaluator.get_git_commit_hash = asks


def parse(names: str) -> tuple[str, ...]:
    """ "a, b" as names."""
    return tuple(filter(None, (name.strip() for name in names.split(","))))
