"""What was evaluated: lm-eval's tasks, corpora that were compressed, length limits. Curves of the
run, and finished figures."""

from typing import Any

import numpy as np

from jaxlm.report.chart import Line, chart
from jaxlm.report.markup import NONE, Html, el, finite, join
from jaxlm.report.read import Folder, items, mapping, named
from jaxlm.report.tables import table

CURVES = 12  # figures drawn; the tables have all
HUES = 8  # of the style sheet


def curves(folder: Folder) -> Html:
    """Each figure of a task over the steps at which it was looked at."""
    found = {n: y for n, y in named(folder.evals, "task/").items() if np.isfinite(y).sum() > 1}
    drawn = []
    for i, (name, y) in enumerate(list(found.items())[:CURVES]):
        known = np.isfinite(y)
        line = Line(name, folder.evals["step"][known], y[known], f"s{i % HUES}")
        drawn.append(chart(name, "of lm-eval", [line], x_name="step", form="decimals"))
    return el("div", drawn, class_="charts") if drawn else Html("")


def finished(folder: Folder) -> Html:
    """Tables: the tasks at the end of the run, and whatever was evaluated since."""
    parts = [_tasks("At the end of the run", mapping(folder.results.get("tasks")))]
    for file, found in folder.evaluations.items():
        name = f"{file}{_which(found)}"
        parts.append(_tasks(name, found))
        parts.append(_corpora(name, mapping(found.get("compression"))))
        parts.append(_lengths(name, found))
    return join([part for part in parts if part])


def _which(found: dict[str, Any]) -> str:
    """Of which step, and of what else than the params themselves, such as their average."""
    step, of = finite(found.get("step")), found.get("params")
    said = "" if step is None else f", step {step:,.0f}"
    return said + (f", of {of}" if of and of != "params" else "")


def _tasks(title: str, found: dict[str, Any]) -> Html:
    rows = []
    for task, metrics in mapping(found.get("results")).items():
        shots = mapping(found.get("n-shot")).get(task)
        metrics = mapping(metrics)
        for key in sorted(k for k in metrics if "," in k and "_stderr," not in k):
            metric, _, chosen = key.partition(",")
            shown = metric if chosen == "none" else f"{metric} ({chosen})"
            error = metrics.get(f"{metric}_stderr,{chosen}")
            shots_ = NONE if shots is None else str(shots)
            rows.append([task, shown, _number(metrics[key]), _number(error), shots_])
    head = ["task", "metric", "value", "standard error", "shots"]
    return table(head, rows, caption=title, words={1}) if rows else Html("")


def _corpora(title: str, found: dict[str, Any]) -> Html:
    rows = []
    for source, figures in found.items():
        figures = mapping(figures)
        window = f"{figures.get('window', '?')} / {figures.get('stride', '?')}"
        numbers = [_number(figures.get(key)) for key in ("bits_per_character", "min_k")]
        rows.append([source, *numbers, _number(figures.get("characters"), 0), window])
    head = ["source", "bits per character", "min-k %", "characters", "window / stride"]
    return table(head, rows, caption=title) if rows else Html("")


def _lengths(title: str, found: dict[str, Any]) -> Html:
    """Limits kept and broken at each scale."""
    rows = []
    for figures in map(mapping, items(found.get("lengths"))):
        shares = ("violations", "share_of_limit", "cut_off", "wins")
        broken, used, cut, wins = (_percent(figures.get(key)) for key in shares)
        scale, prompts = _number(figures.get("scale"), 1), _number(figures.get("prompts"), 0)
        rows.append(
            [f"×{scale}", prompts, broken, _number(figures.get("words"), 1), used, cut, wins]
        )
    head = ["limits", "prompts", "broken", "words", "words / limit", "cut off", "wins"]
    return table(head, rows, caption=title) if rows else Html("")


def _percent(value: Any) -> str:
    known = finite(value)
    return NONE if known is None else f"{known:.1%}"


def _number(value: Any, digits: int = 4) -> str:
    known = finite(value)
    return NONE if known is None else f"{known:,.{digits}f}"
