"""Tables, bars and lists of facts: what the sections of the page are made of."""

from collections.abc import Container, Iterable
from typing import Any

from jaxlm.report.markup import NONE, Html, el


def table(
    head: list[Any],
    rows: list[list[Any]],
    *,
    caption: str,
    words: Container[int] = (),
    wide: bool = False,
) -> Html:
    """A table that scrolls in its own box; columns hold numbers, but for the first and `words`."""
    kind = lambda i: "num" if i and i not in words else None
    titles = [el("th", name, scope="col", class_=kind(i)) for i, name in enumerate(head)]
    body = []
    for first, *rest in rows:
        cells = [el("td", cell, class_=kind(i)) for i, cell in enumerate(rest, 1)]
        body.append(el("tr", el("th", first, scope="row"), cells))
    inner = el("table", el("caption", caption), el("thead", el("tr", titles)), el("tbody", body))
    box = "scroll wide" if wide else "scroll"
    return el("div", inner, class_=box, tabindex="0", role="region", aria_label=caption)


def meter(share: float, text: str, hue: str = "plain") -> Html:
    """A number behind a bar that shows its share of the largest; for a cell of a table."""
    bar = el("span", class_=f"fill {hue}", style=f"width:{100 * share:.1f}%")
    return el("span", el("span", bar, class_="bar", aria_hidden="true"), text, class_="meter")


def stack(shares: list[tuple[str, str, float]], name: str) -> Html:
    """One bar cut into (colour class, name, share of the whole)."""
    spoken = ", ".join(f"{text} {share:.1%}" for _, text, share in shares)
    pieces = []
    for hue, text, share in shares:
        width, title = f"width:{100 * share:.2f}%", f"{text}: {share:.1%}"
        pieces.append(el("span", class_=f"fill {hue}", style=width, title=title))
    return el("div", pieces, class_="stack", role="img", aria_label=f"{name}: {spoken}")


def facts(pairs: Iterable[tuple[str, Any]]) -> Html:
    """Names with their values, side by side; what has no value is left out."""
    shown = [el("div", el("dt", k), el("dd", v)) for k, v in pairs if v and v != NONE]
    return el("dl", shown, class_="facts-list") if shown else Html("")


def key(hue: str, name: Any) -> Html:
    """A name behind its colour."""
    return el("span", el("i", class_=f"key {hue}"), name, class_="keyed")


def plural(number: int, noun: str) -> str:
    """A count with its noun, which takes an s but for one."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def digest(value: Any) -> Html | None:
    """The start of a hash, with all of it where one points."""
    text = str(value or "")
    return el("code", text if len(text) <= 16 else text[:12] + "…", title=text) if text else None
