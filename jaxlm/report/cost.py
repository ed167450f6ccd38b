"""Where the wall time went.

Events carry the seconds each part took; what a session lasted beyond them is shown as time that no
part accounts for, so the bar always adds up to the whole. Time between two sessions counts nothing.
"""

import math

from jaxlm.report.markup import Html, count, duration, el, finite, join, percent
from jaxlm.report.read import Folder
from jaxlm.report.tables import key, stack, table

PARTS = {  # part -> (colour class, kinds of events)
    "training steps": ("soft", ("train_step", "step")),
    "data": ("s4", ("data", "data_wait", "prepare", "tokenizer")),
    "compiling": ("s3", ("compile",)),
    "evaluation": ("s2", ("evaluate", "eval", "sample", "compressors")),
    "checkpoints": ("s5", ("checkpoint", "restore")),
}
NO_TIME = ("warning", "interrupt")
SESSION = ("start", "resume")  # one of them opens each session


def by_kind(folder: Folder) -> dict[str, float]:
    """Seconds of each kind of event."""
    sums: dict[str, float] = {}
    for event in folder.events:
        seconds, kind = finite(event.get("seconds")), str(event.get("kind"))
        if seconds is not None and seconds >= 0 and kind not in NO_TIME:
            sums[kind] = sums.get(kind, 0.0) + seconds
    return sums


def wall(folder: Folder) -> float | None:
    """Seconds the run took: the sessions from their start to their last event, added up."""
    sessions, first, latest = 0.0, math.nan, math.nan
    for event in folder.events:
        time = finite(event.get("time"))
        if time is None:
            continue
        if event.get("kind") in SESSION:
            sessions += 0.0 if math.isnan(first) else max(latest - first, 0.0)
            first = time - max(finite(event.get("seconds")) or 0.0, 0.0)
        latest = time
    sessions += 0.0 if math.isnan(first) else max(latest - first, 0.0)
    total = max(
        sessions, finite(folder.results.get("seconds")) or 0.0, sum(by_kind(folder).values())
    )
    return total or None


def wall_time(folder: Folder) -> Html:
    """A stacked bar and a table of the parts, with the kinds of events each is made of."""
    kinds, total = by_kind(folder), wall(folder)
    if not kinds or not total:
        return Html("")
    rest = dict(kinds)
    rows, shares = [], []
    for part, (hue, names) in PARTS.items():
        made_of = {name: rest.pop(name) for name in names if name in rest}
        if made_of:
            _add(rows, shares, hue, part, made_of, total)
    rest["not timed"] = max(total - sum(kinds.values()), 0.0)
    _add(rows, shares, "plain", "other", rest, total)
    rows.append([el("strong", "all"), duration(total), percent(1.0, 1), ""])
    head = ["part", "time", "share", "made of"]
    starts = sum(event.get("kind") in SESSION for event in folder.events)
    note = f"{count(starts)} sessions; the time between them is not counted." if starts > 1 else ""
    return join(
        [
            stack(shares, "Wall time"),
            table(head, rows, caption="Wall time by part", words=(3,)),
            el("p", note, class_="note") if note else None,
        ]
    )


def _add(rows, shares, hue, part, made_of, total) -> None:
    seconds = sum(made_of.values())
    detail = [
        f"{kind.replace('_', ' ')} {duration(s)}" for kind, s in made_of.items() if s >= 0.005
    ]
    many = ", ".join(detail) if len(detail) > 1 or part == "other" else ""
    rows.append([key(hue, part), duration(seconds), percent(seconds / total, 1), many])
    shares.append((hue, part, seconds / total))
