"""Goodput: the share of a run's whole life, over all its starts, that went into steps that count.

`goodput` reads events as `events.jsonl` holds them. A `start` or `resume` event opens a start, its
`time` being when that process began and its `step` where it went on; every other one says how many
seconds a kind of work took, up to which step. A step counts where it was done for the last time:
after a kill, those beyond the checkpoint are done again, and what they took before is lost.

From the last event of a start to the next start the run is down. A killed process leaves no last
word, so what it did after its last event (up to a second of steps, or an evaluation that it did not
finish) is counted as down too. Waiting for data is the host's: part of it overlaps with the device.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

STEPS, AGAIN, DOWN, OTHER = "training steps", "steps done again", "down", "other"
PARTS = {  # part -> kinds of events
    STEPS: ("train_step",),
    AGAIN: (),
    "waiting for data": ("data_wait",),
    "compiling": ("compile",),
    "evaluation": ("evaluate", "sample", "compressors"),
    "checkpoints": ("checkpoint", "restore"),
    "start-up": ("setup", "data", "columns"),
    OTHER: (),  # what has no part, and what no event accounts for
    DOWN: (),
}
SESSION = ("start", "resume")
SANE = 1e12  # seconds or steps
NO_TIME = ("warning", "interrupt", *SESSION)


class Goodput(NamedTuple):
    parts: dict[str, dict[str, float]]  # part -> kind of event -> seconds
    seconds: float  # from the first start to the last event
    starts: int
    again: int  # steps done more than once, counted each time

    def share(self, part: str = STEPS) -> float:
        """Of the whole, 0 to 1."""
        return sum(self.parts[part].values()) / self.seconds if self.seconds else 0.0


def goodput(events: Iterable[Mapping[str, Any]]) -> Goodput | None:
    """Where the time of a run went; None if no start is known."""
    starts = _starts(events)
    parts: dict[str, dict[str, float]] = {part: {} for part in PARTS}
    again = 0.0
    for i, (opening, rest) in enumerate(starts):
        keeps = min((_number(later, "step") for later, _ in starts[i + 1 :]), default=math.inf)
        begin, step = _number(opening, "time"), _number(opening, "step")
        end, timed = begin, 0.0
        for event in rest:
            end = max(end, _number(event, "time"))
            kind, seconds = str(event.get("kind")), max(_number(event, "seconds"), 0.0)
            if kind in NO_TIME:
                continue
            timed += seconds
            if kind == "train_step":
                reached = max(_number(event, "step"), step)
                lost = max(reached - max(step, keeps), 0.0)
                share = lost / (reached - step) if reached > step else float(reached > keeps)
                _add(parts[AGAIN], kind, seconds * share)
                seconds, again, step = seconds * (1 - share), again + lost, reached
            _add(parts[_part(kind)], kind, seconds)
        _add(parts[OTHER], "not timed", max(end - begin - timed, 0.0))
        if i + 1 < len(starts):
            gap = max(_number(starts[i + 1][0], "time") - end, 0.0)
            _add(parts[DOWN], "after the last event of a start", gap)
    total = sum(sum(kinds.values()) for kinds in parts.values())
    return Goodput(parts, total, len(starts), round(again)) if starts else None


def sentence(found: Goodput) -> str:
    """In one line, for the log."""
    shares = [
        f"{part} {found.share(part):.1%}" + (f" ({found.again:,} steps)" if part == AGAIN else "")
        for part in PARTS
        if part != STEPS and found.share(part) >= 0.0005
    ]
    starts = "1 start" if found.starts == 1 else f"{found.starts:,} starts"
    rest = f"; {', '.join(shares)}" if shares else ""
    return (
        f"Goodput: {found.share():.1%} of {found.seconds / 60:,.1f} minutes, {starts}, in steps "
        f"that count{rest}."
    )


def _starts(events):
    """[(the event that opens a start, those that follow it)]."""
    starts: list[tuple[Mapping[str, Any], list[Mapping[str, Any]]]] = []
    for event in events:
        if event.get("kind") in SESSION:
            starts.append((event, []))
        elif starts:
            starts[-1][1].append(event)
    return starts


def _part(kind):
    return next((part for part, kinds in PARTS.items() if kind in kinds), OTHER)


def _add(kinds, kind, seconds):
    if seconds > 0:
        kinds[kind] = kinds.get(kind, 0.0) + seconds


def _number(event, name):
    """A number of an event; 0 where there is none that makes sense."""
    value = event.get(name)
    return float(value) if isinstance(value, (int, float)) and abs(value) < SANE else 0.0
