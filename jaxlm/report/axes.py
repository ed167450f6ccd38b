"""What stands around a plot: numbers on its axes, names of its horizontal lines.

All of it is HTML, at its own size on any screen; only lines are drawn.
"""

import dataclasses
from collections.abc import Sequence

from jaxlm.report.markup import Html, bits, el, number, percent, short
from jaxlm.report.series import Scale

HEIGHT = 236  # pixels of a plot, as the style sheet says too
LABEL = 17  # pixels between two labels in the margin
FORMATS = {  # the script knows the same names
    "number": number,
    "short": short,
    "decimals": bits,
    "percent": lambda share: percent(share, 1),
}


@dataclasses.dataclass(frozen=True)
class Rule:
    """A horizontal line with its label in the margin."""

    name: str
    value: float
    dash: str = ""


def stroke(data: str, kind: str, *, dash: str = "", **more: str) -> Html:
    """A line of the class `kind`."""
    return el("path", d=data, class_=kind, stroke_dasharray=dash or None, **more)


def y_labels(axis: Scale, form: str) -> list[Html]:
    return [
        el("span", _tick(tick, axis, form), style=f"top:{100 - axis.share(tick):.2f}%")
        for tick in axis.ticks()
    ]


def _tick(value: float, axis: Scale, form: str) -> str:
    if abs(value) < (axis.high - axis.low) * 1e-9:
        return "0"
    if form == "percent":
        return percent(value, 0 if axis.high - axis.low > 0.03 else 1)
    return short(value) if abs(value) >= 1000 else number(value, 4)


def x_labels(axis: Scale, name: str) -> list[Html]:
    """Round positions; the last that has room for it carries the name of the axis."""
    ticks = axis.ticks(5)
    named = [tick for tick in ticks if axis.share(tick) <= 85][-1:]
    labels = []
    for tick in ticks:
        text = short(tick) if tick else "0"
        text = f"{text} {name}" if tick in named else text
        edge = "start" if axis.share(tick) < 3 else "end" if axis.share(tick) > 95 else None
        labels.append(el("span", text, style=f"left:{axis.share(tick):.2f}%", class_=edge))
    return labels


def margin(rules: Sequence[Rule], axis: Scale) -> Html:
    """Labels of the horizontal lines, pushed apart where lines lie close, each with a leader."""
    rules = sorted(rules, key=lambda rule: -rule.value)
    wanted = [HEIGHT * (1 - axis.share(rule.value) / 100) for rule in rules]
    placed = _apart(wanted)
    leaders = [
        stroke(f"M0 {a:.1f}L16 {b:.1f}", "leader") for a, b in zip(wanted, placed, strict=True)
    ]
    labels = [
        el("span", rule.name, " ", el("b", f"{rule.value:.3f}"), style=f"top:{at:.1f}px")
        for rule, at in zip(rules, placed, strict=True)
    ]
    svg = el("svg", leaders, viewBox=f"0 0 16 {HEIGHT}", width=16, height=HEIGHT)
    return el("div", svg, labels, class_="margin", aria_hidden="true")


def _apart(wanted: list[float]) -> list[float]:
    """The nearest heights in pixels that are LABEL apart and inside the plot; `wanted` rises."""
    placed: list[float] = []
    for at in wanted:
        placed.append(max(at, placed[-1] + LABEL) if placed else max(at, LABEL / 2))
    limit = HEIGHT - LABEL / 2
    for i in reversed(range(len(placed))):
        placed[i] = min(placed[i], limit)
        limit = placed[i] - LABEL
    return placed
