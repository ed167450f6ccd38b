"""Where the wall time went, over the whole life of a run (`jaxlm.goodput`).

What no event accounts for is shown as not timed, and so is the time between two starts, so the bar
always adds up to the whole.
"""

from jaxlm.goodput import AGAIN, DOWN, NO_TIME, OTHER, PARTS, STEPS, goodput
from jaxlm.report.markup import Html, count, duration, el, finite, join, percent
from jaxlm.report.read import Folder
from jaxlm.report.tables import key, stack, table

HUES = {  # part -> colour class
    **dict.fromkeys(PARTS, "plain"),
    STEPS: "soft",
    AGAIN: "s1",
    "waiting for data": "s4",
    "compiling": "s3",
    "evaluation": "s2",
    "checkpoints": "s5",
    "start-up": "s6",
    DOWN: "s7",
}


def by_kind(folder: Folder) -> dict[str, float]:
    """Seconds of each kind of event."""
    sums: dict[str, float] = {}
    for event in folder.events:
        seconds, kind = finite(event.get("seconds")), str(event.get("kind"))
        if seconds is not None and seconds >= 0 and kind not in NO_TIME:
            sums[kind] = sums.get(kind, 0.0) + seconds
    return sums


def wall(folder: Folder) -> float | None:
    """Seconds the run took, without the time it was down."""
    found = goodput(folder.events)
    ran = found.seconds * (1 - found.share(DOWN)) if found else 0.0
    results = finite(folder.results.get("seconds")) or 0.0
    return max(ran, results, sum(by_kind(folder).values())) or None


def wall_time(folder: Folder) -> Html:
    """Goodput in words, a stacked bar and a table of the parts with what each is made of."""
    found = goodput(folder.events)
    if not found or not found.seconds:
        return Html("")
    rows, shares = [], []
    for part, kinds in found.parts.items():
        if not kinds:
            continue
        detail = [
            f"{kind.replace('_', ' ')} {duration(s)}" for kind, s in kinds.items() if s >= 0.005
        ]
        many = ", ".join(detail) if len(detail) > 1 or part == OTHER else ""
        many = f"{count(found.again)} steps" if part == AGAIN else many
        time, share = duration(sum(kinds.values())), found.share(part)
        rows.append([key(HUES[part], part), time, percent(share, 1), many])
        shares.append((HUES[part], part, share))
    rows.append([el("strong", "all"), duration(found.seconds), percent(1.0, 1), ""])
    said = f"Goodput {percent(found.share(), 1)}: the share of the time since the first start that "
    said += "went into training steps that count."
    starts = f" {count(found.starts)} starts; the run was down between them."
    return join(
        [
            el("p", said + (starts if found.starts > 1 else ""), class_="note"),
            stack(shares, "Wall time"),
            table(["part", "time", "share", "made of"], rows, caption="Goodput", words=(3,)),
        ]
    )
