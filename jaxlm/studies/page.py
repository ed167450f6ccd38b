"""What a study tells, as one self-contained page, a picture, and lines on the console."""

import base64
import io
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxlm.report.markup import Html, el
from jaxlm.report.tables import facts, table

COLORS = ("#0072b2", "#d55e00", "#009e73", "#b0568f", "#e69f00", "#56b4e9", "#8a7f00", "#6b7078")


class Line(NamedTuple):
    """A curve, and its interval where there is one."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    color: int = 0  # of COLORS
    style: str = "-"  # of matplotlib: "-", "--", ":"
    marker: str = "o"
    bars: bool = False  # the interval as bars, not as a band


class Panel(NamedTuple):
    """One plot of the figure."""

    title: str
    x_name: str
    y_name: str
    lines: Sequence[Line]
    log_x: bool = False
    levels: Sequence[float] = ()  # horizontal lines
    y_range: tuple[float, float] | None = None


class Table(NamedTuple):
    """Rows of text under a head."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""


class Verdict(NamedTuple):
    """A claim, and what the numbers say of it."""

    claim: str
    holds: bool
    numbers: str  # a sentence

    @property
    def found(self) -> str:
        return "Reproduced" if self.holds else "Not reproduced"

    def __str__(self):
        return f"{self.found}: {self.claim}. {self.numbers}"


class Told(NamedTuple):
    """All that a study has to say; made from the numbers of its arms alone."""

    title: str
    verdicts: Sequence[Verdict]
    tables: Sequence[Table]
    panels: Sequence[Panel]
    how: Sequence[str]  # paragraphs


def write(folder: Path, told: Told, setup: dict[str, Any], results: dict[str, Any]) -> Path:
    """Writes report.html, figure.png and results.json; returns the page's path."""
    folder.mkdir(parents=True, exist_ok=True)
    picture = figure(told.panels)
    verdicts = [{"holds": v.holds, "claim": v.claim, "numbers": v.numbers} for v in told.verdicts]
    record = {"title": told.title, "setup": setup, "verdicts": verdicts, "arms": results}
    page = folder / "report.html"
    for path, data in (
        (folder / "figure.png", picture),
        (folder / "results.json", json.dumps(record, indent=1).encode()),
        (page, html(told, setup, picture).encode()),
    ):
        half = path.with_name(f".{path.name}.part")
        half.write_bytes(data)
        half.replace(path)
    return page


def html(told: Told, setup: dict[str, Any], picture: bytes) -> str:
    """The page as text; it loads nothing."""
    style = resources.files("jaxlm.report").joinpath("page.css").read_text("utf-8")
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
    data = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
    spoken = "; ".join(f"{p.title}: {p.y_name} over {p.x_name}" for p in told.panels)
    head = [
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=policy),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("meta", name="color-scheme", content="light dark"),
        el("title", f"{told.title} · jaxlm"),
        el("link", rel="icon", href="data:,"),
        el("style", Html(style)),
    ]
    body = [
        el("p", "jaxlm · study", class_="mark"),
        el("h1", told.title),
        [_verdict(verdict) for verdict in told.verdicts],
        el(
            "main",
            _section("Figure", el("img", src=data, alt=spoken, style="width:100%;height:auto")),
            _section("Numbers", [_table(each) for each in told.tables]),
            _section("How", [el("p", text, class_="lead") for text in told.how]),
            _section("Setup", facts((name, str(value)) for name, value in setup.items())),
        ),
    ]
    whole = el("html", el("head", head), el("body", el("div", body, class_="page")), lang="en")
    return f"<!doctype html>\n{whole}\n"


def _verdict(verdict: Verdict) -> list[Html]:
    claim = el("p", el("b", verdict.found), f": {verdict.claim}.", class_="verdict")
    return [claim, el("p", verdict.numbers, class_="facts")]


def _section(title: str, inside: Any) -> Html:
    return el("section", el("h2", title), inside)


def _table(each: Table) -> Html:
    rows = [list(row) for row in each.rows]
    shown = table(list(each.head), rows, caption=each.caption, wide=True)
    note = el("p", each.note, class_="note") if each.note else None
    return el("section", el("h3", each.caption), shown, note)


def figure(panels: Sequence[Panel]) -> bytes:
    """The panels side by side, two in a row, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    height = -(-len(panels) // 2)
    settings: dict[Any, Any] = {"font.size": 9, "axes.titlesize": 10, "axes.titleweight": "bold"}
    settings |= {"axes.spines.top": False, "axes.spines.right": False}
    with pyplot.rc_context(settings):
        fig, grid = pyplot.subplots(height, 2, figsize=(11, 4 * height), layout="constrained")
        for axes, panel in zip(np.ravel(grid), panels, strict=False):
            _draw(axes, panel)
        for axes in np.ravel(grid)[len(panels) :]:
            axes.set_axis_off()
        out = io.BytesIO()
        fig.savefig(out, format="png", dpi=150, metadata={"Software": ""})
        pyplot.close(fig)
    return out.getvalue()


def _draw(axes, panel: Panel) -> None:
    for value in panel.levels:
        axes.axhline(value, color="#9a9a9a", linewidth=0.8, zorder=0)
    for line in panel.lines:
        color = COLORS[line.color % len(COLORS)]
        axes.plot(
            line.x,
            line.y,
            line.style,
            color=color,
            label=line.name,
            marker=line.marker,
            markersize=3.5,
            linewidth=1.5,
        )
        if len(line.low) and line.bars:
            axes.vlines(line.x, line.low, line.high, color=color, linewidth=1.2, alpha=0.6)
        elif len(line.low):
            axes.fill_between(line.x, line.low, line.high, color=color, alpha=0.15, linewidth=0)
    if panel.log_x:
        axes.set_xscale("log")
    if panel.y_range:
        axes.set_ylim(*panel.y_range)
    axes.set_title(panel.title, loc="left")
    axes.set_xlabel(panel.x_name)
    axes.set_ylabel(panel.y_name)
    axes.grid(color="#ececec", linewidth=0.8)
    axes.set_axisbelow(True)
    if len(panel.lines) > 1:
        axes.legend(fontsize=8, framealpha=0.85, edgecolor="none")
