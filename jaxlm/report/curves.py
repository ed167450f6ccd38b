"""Every curve of a run: loss, bits per character beside compressors, schedule, speed, the rest."""

import numpy as np

from jaxlm.report import preferences, result
from jaxlm.report.axes import Rule
from jaxlm.report.chart import Line, chart
from jaxlm.report.markup import Html, bits, el, finite, join, short
from jaxlm.report.read import Folder, Table, named
from jaxlm.report.series import thin
from jaxlm.report.tables import plural, table

DASHES = {"gzip": "2 4", "bz2": "7 3 2 3", "xz": "6 4", "xz primed": ""}
DRAWN = {
    "step",
    "tokens",
    "loss",
    "bits_per_char",
    "learning_rate",
    "norm/grads",
    "tokens_per_second",
    "peak_fraction",
    "skipped",
    "weight",
    "time",
}
MOST = 24  # further metrics beyond so many are named and not drawn


def learning(folder: Folder) -> Html:
    """Loss, and bits per character of each source with the compressors as horizontal lines."""
    x, name = _x(folder.metrics)
    marks = _restarts(folder)
    lines = _held_out(folder, "loss/")
    if "loss" in folder.metrics:
        lines.insert(0, Line("training", x, folder.metrics["loss"], "ink", noisy=True))
    note = "Dotted verticals: the run was resumed there." if marks else ""
    of_pairs = preferences.methods(folder.metrics)
    unit = f"nats per {'pair or response' if of_pairs else 'token'}; lower is better"
    charts = [
        chart("Loss", unit, lines, marks=marks, note=note, wide=True, x_name=name, form="decimals"),
        *(_bits_chart(folder, source) for source in result.sources(folder)),
    ]
    if not any(charts):
        return Html("")
    rivals = any(result.compressors(folder, source) for source in result.sources(folder))
    footnote = el("p", result.SAME_TEXT, class_="note") if rivals else None
    return join([el("div", charts, class_="charts"), footnote, _evaluations(folder)])


def _held_out(folder: Folder, prefix: str, only: str = "") -> list[Line]:
    """Curves of the evaluations, of every source or of one, with those of averaged weights."""
    x, _ = _x(folder.evals)
    lines = []
    for start, dash in (("", ""), ("ema/", "6 4")):
        for source, y in named(folder.evals, start + prefix).items():
            if only in ("", source):
                name = "held out" if only else f"held-out {source}"
                name += ", averaged weights" if start else ""
                lines.append(Line(name, x, y, result.color(folder, source), dash))
    return lines


def _bits_chart(folder: Folder, source: str) -> Html:
    rivals = result.compressors(folder, source)
    rules = [Rule(name, value, DASHES.get(name, "1 3")) for name, value in rivals.items()]
    _, name = _x(folder.evals)
    return chart(
        f"Bits per character: {source}",
        "held-out text" + (" beside compressors on the same text" if rules else ""),
        _held_out(folder, "bits_per_char/", source),
        rules=rules,
        x_name=name,
        form="decimals",
    )


def running(folder: Folder) -> Html:
    """Learning rate, gradient norm, throughput and share of peak."""
    skipped = folder.metrics.get("skipped", np.zeros(0))
    skipped = float(np.nanmax(skipped)) if np.isfinite(skipped).any() else 0.0
    note = f"Updates skipped in all: {skipped:,.0f}." if skipped else ""
    charts = [
        _one(folder, "learning_rate", "Learning rate", "per step", floor=0.0),
        _one(folder, "norm/grads", "Gradient norm", "logarithmic", log=True, noisy=True, note=note),
        _one(
            folder,
            "tokens_per_second",
            "Throughput",
            "tokens per second",
            floor=0.0,
            noisy=True,
            form="short",
        ),
        _one(
            folder,
            "peak_fraction",
            "Share of peak",
            "model FLOP/s as a share of this device’s matmul peak",
            floor=0.0,
            noisy=True,
            form="percent",
        ),
    ]
    return el("div", charts, class_="charts") if any(charts) else Html("")


def others(folder: Folder) -> Html:
    """Whatever else the method and the optimizer logged, one small chart each."""
    names = [
        name
        for name, y in folder.metrics.items()
        if name not in DRAWN
        and not name.startswith("weights/")
        and not preferences.is_drawn(folder.metrics, name)
        and np.isfinite(y).any()
    ]
    if not names:
        return Html("")
    charts = [_one(folder, name, name, "per step", noisy=True) for name in names[:MOST]]
    rest = names[MOST:]
    more = el("p", f"Not drawn: {', '.join(rest[:200])}.", class_="note") if rest else None
    opener = el("summary", f"Every other metric ({len(names)})")
    return el("details", opener, el("div", charts, class_="charts"), more)


def mixture(folder: Folder) -> Html:
    """Mixture weights over time, where they change."""
    x, x_name = _x(folder.metrics)
    weights = named(folder.metrics, "weights/")
    if not any(np.isfinite(y).any() and np.nanmax(y) > np.nanmin(y) for y in weights.values()):
        return Html("")
    lines = [
        Line(name, x, y, result.color(folder, name), "" if i < 8 else "6 4")
        for i, (name, y) in enumerate(list(weights.items())[:16])
    ]
    unit = "share of the rows drawn from each source"
    drawn = chart("Mixture", unit, lines, floor=0.0, x_name=x_name, form="percent")
    return el("div", drawn, class_="charts") if drawn else Html("")


def _one(
    folder: Folder,
    key: str,
    title: str,
    unit: str,
    *,
    noisy: bool = False,
    log: bool = False,
    floor: float | None = None,
    note: str = "",
    form: str = "number",
) -> Html:
    if key not in folder.metrics:
        return Html("")
    x, x_name = _x(folder.metrics)
    y = folder.metrics[key]
    if log:
        y = np.where(y > 0, y, np.nan)
    line = Line(title.lower() if key != title else title, x, y, "ink", noisy=noisy)
    return chart(title, unit, [line], log=log, floor=floor, note=note, x_name=x_name, form=form)


def _x(table_: Table) -> tuple[np.ndarray, str]:
    """What curves are drawn over: tokens, or steps where tokens were not written."""
    tokens = table_.get("tokens", np.zeros(0))
    if len(tokens) and np.isfinite(tokens).all():
        return tokens, "tokens"
    return table_.get("step", np.zeros(0)), "steps"


def _restarts(folder: Folder) -> list[float]:
    """Where the run was resumed, on the axis of the curves; at most the last 40."""
    x, _ = _x(folder.metrics)
    steps = [finite(e.get("step")) for e in folder.events if e.get("kind") == "resume"]
    steps = [step for step in steps if step]
    if not steps or not len(x):
        return []
    return np.interp(steps, folder.metrics["step"], x).tolist()[-40:]


def _evaluations(folder: Folder) -> Html | None:
    """The evaluations as numbers, at most 20 of them."""
    columns = {
        n: y
        for n, y in folder.evals.items()
        if "bits_per_char/" in n or n.startswith("loss/") or "/accuracy/" in n or "/margin/" in n
    }
    if not columns or not len(folder.evals["step"]):
        return None
    columns = dict(list(columns.items())[:12])
    index = thin(len(folder.evals["step"]), 20)
    tokens = folder.evals.get("tokens")
    rows = [
        [
            f"{folder.evals['step'][i]:,.0f}",
            "–" if tokens is None else short(tokens[i]),
            *(bits(y[i]) for y in columns.values()),
        ]
        for i in index
    ]
    total = len(folder.evals["step"])
    many = f"{len(rows)} of " if total > len(rows) else ""
    many += plural(total, "evaluation")
    inner = table(["step", "tokens", *columns], rows, caption=f"{many} as numbers")
    return el("details", el("summary", f"The numbers: {many}"), inner)
