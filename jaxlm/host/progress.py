"""Where a phase of a run stands, and the line that says so: rate, time left, fields, bar."""

import collections
import math
import time

from jaxlm.host.terminal import SPINNER, clock, count, duration

RATE_WINDOW = 60.0  # seconds of progress that the time left is estimated from
FIELDS = {
    "loss": "loss {:.3f}",
    "bits_per_char": "{:.3f} bits/char",
    "tokens_per_second": "{} tok/s",
    "peak_fraction": "{:.0%} of peak",
}


class Progress:
    """Where one phase of a run stands. Times are monotonic seconds."""

    def __init__(self, doing):
        self.title = self.doing = doing  # a note changes what it is doing
        self.start = self.since = time.monotonic()  # of the phase, of what it is doing
        self.moved, self.news, self.frame = False, False, 0  # was reported on; since the last line
        self.done, self.total, self.unit, self.fields = 0, 0, "", {}
        self.history = collections.deque()  # (time, done), at most one a second

    def move(self, done, total, note, unit, fields):
        now = time.monotonic()
        if note and note != self.doing:
            self.doing, self.since = note, now
        if total != self.total or done < self.done or unit != self.unit:
            self.history.clear()
        state = (done, total, unit, fields)
        self.news |= state != (self.done, self.total, self.unit, self.fields)
        self.done, self.total, self.unit, self.fields = state
        self.moved = True
        if not self.history or now - self.history[-1][0] >= 1:
            self.history.append((now, done))
        while now - self.history[0][0] > RATE_WINDOW and len(self.history) > 2:
            self.history.popleft()

    def seconds_left(self):
        """None while nothing can be said."""
        (then, before), (now, done) = self.history[0], self.history[-1]
        if done <= before or not self.total or self.done > self.total:
            return None
        return (self.total - self.done) * (now - then) / (done - before)

    def parts(self, unit):
        """The pieces of a progress line, the dearest first."""
        of = f"/{self.total:,}" if self.total else ""
        left = self.seconds_left()
        parts = [f"{unit} {self.done:,}{of}".strip()] if self.done or of else []
        if left is not None and self.done < self.total:
            parts.append(f"{clock(left)} left")
        return parts + [field(k, v) for k, v in self.fields.items() if v is not None]

    def line(self):
        """The plain progress line."""
        percent = [f"{self.done / self.total:.0%}"] if self.total else []
        return "  " + " · ".join([*self.note(), *percent, *self.parts(self.unit)])

    def note(self):
        """What the phase is doing, where that is not its title, as a list of 0 or 1."""
        return [self.doing] * (self.doing != self.title)

    def still(self, now):
        """The heartbeat of a phase without news."""
        if now - self.since < 3 and self.doing != self.title:
            return f"  … {self.doing}"
        return f"  … still {self.doing}, {duration(now - self.since)}"

    def live_line(self, width, now):
        """Spinner, bar and as many fields as fit into `width` columns."""
        self.frame += 1
        spinner = SPINNER[self.frame % len(SPINNER)]
        if not self.moved or not self.done + self.total:
            return f"{spinner} {self.doing} … {duration(now - self.since)}"[: max(width, 1)]
        parts = self.parts(self.unit) + self.note()
        for size in (24, 12, 6, 0) if self.total else (0,):
            head = spinner + (f" {bar(self.done / self.total, size)}" if size else "")
            if len(line := f"{head} {' · '.join(parts)}") <= width:
                return line
        parts = self.parts("") + self.note()  # all that a run says fits into 79 columns this way
        while len(line := f"{spinner} {'  '.join(parts)}") > width and len(parts) > 1:
            parts.pop()
        return line[: max(width, 1)]


def field(name, value):
    """A field of the progress line, with its unit where that is known."""
    if isinstance(value, str):
        return value
    if not math.isfinite(value):
        return f"{name} {value}"
    text = count(value) if name == "tokens_per_second" else value
    return FIELDS.get(name, name + " {:.4g}").format(text)


def bar(fraction, width):
    """A bar of `width` cells, and the percentage."""
    full = max(0, min(width, int(fraction * width)))
    return f"{'█' * full}{'░' * (width - full)} {min(max(fraction, 0), 1):.0%}"
