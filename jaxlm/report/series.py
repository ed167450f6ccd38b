"""Curves of any length in a few hundred points, without hiding anything.

Long curves are drawn twice: an envelope between the smallest and the largest value of each bucket,
so that a single spike stays visible, and over it a moving average whose width the legend states.
Positions are whole numbers on a square of SIDE units, which the browser stretches to any width.
"""

import dataclasses
import math

import numpy as np

SIDE = 10_000
EXACT = 400  # curves of up to so many points are drawn point by point
BUCKETS = 400


@dataclasses.dataclass(frozen=True)
class Scale:
    """Values low..high on one axis of the square, linearly or by their logarithm."""

    low: float
    high: float
    log: bool = False

    def __call__(self, values: np.ndarray | float) -> np.ndarray:
        """Positions 0..SIDE of the values; NaN stays NaN, and so does a log of nothing."""
        low, high = self.low, self.high
        values = np.asarray(values, float)
        if self.log:
            low, high = math.log10(low), math.log10(high)
            values = np.log10(np.where(values > 0, values, np.nan))
        return (values - low) / (high - low) * SIDE

    def share(self, value: float) -> float:
        """Where on the axis a value lies, in percent."""
        return float(self(value)) * 100 / SIDE

    def ticks(self, most: int = 5) -> list[float]:
        """Round values inside the axis, at most about `most` of them."""
        if self.log:
            return _log_ticks(self.low, self.high, most)
        step = _nice(abs(self.high - self.low) / most)
        first, final = math.ceil(self.low / step - 1e-9), math.floor(self.high / step + 1e-9)
        return [i * step for i in range(first, final + 1)]


def span(
    values: list[np.ndarray],
    *,
    log: bool = False,
    floor: float | None = None,
    ceiling: float | None = None,
) -> Scale:
    """An axis for all these values, of which `ceiling` is the highest one worth room.

    Above it only a few extremes may lie (the first steps of a run, one spike), and it holds only
    where it halves the axis. `above` then tells how many are cut.
    """
    joined = np.concatenate([np.ravel(v) for v in values] or [np.zeros(0)])
    joined = joined[np.isfinite(joined) & ((joined > 0) | (not log))]
    if not len(joined):
        return Scale(0.1, 1.0, log) if log else Scale(0.0, 1.0)
    low, high = float(joined.min()), float(joined.max())
    if log:
        low = max(low, high * 1e-8)
        return Scale(low / 1.15, high * 1.15, True)
    low = low if floor is None else min(low, floor)
    if ceiling is not None and ceiling > low and high - low > 2 * (ceiling - low):
        high = ceiling
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return Scale(low if floor is not None and low == floor else low - room, high + room)


def usual(x: np.ndarray, y: np.ndarray) -> float:
    """The highest value of a curve, leaving out its first 2 % and what few points rise above."""
    settled = y[np.isfinite(y) & (x >= x[0] + 0.02 * (x[-1] - x[0]))]
    if not len(settled):
        return -math.inf
    return float(np.quantile(settled, 0.985 if len(settled) > 200 else 1.0))


def above(scale: Scale, values: np.ndarray) -> tuple[int, float]:
    """How many values the axis cuts off at the top, and the largest of them."""
    values = values[np.isfinite(values)]
    cut = values[values > scale.high]
    return len(cut), float(cut.max()) if len(cut) else math.nan


def smooth(values: np.ndarray, width: int, at: np.ndarray) -> np.ndarray:
    """At each index the mean over `width` neighbours, fewer at the ends; only finite values count.

    At the start the window stays symmetric and so narrows: a steep start is not flattened.
    """
    means = np.full(len(at), np.nan)
    for k, i in enumerate(at):  # a running sum would be cheaper, and lost after one huge value
        half = min(i, width // 2)
        near = values[i - half : i + half + 1]
        if np.isfinite(values[i]):
            means[k] = near[np.isfinite(near)].mean()
    return means


def thin(count: int, most: int = EXACT) -> np.ndarray:
    """Indices of all of `count` points, or of `most` of them, always with the last."""
    if count <= most:
        return np.arange(count)
    return np.unique(np.linspace(0, count - 1, most).round().astype(int))


def envelope(x: np.ndarray, y: np.ndarray, buckets: int = BUCKETS) -> list[np.ndarray]:
    """Per bucket the middle x, smallest and largest y; values that are not finite are left out."""
    good = np.isfinite(y)
    x, y = x[good], y[good]
    if len(x) <= buckets:
        return [x, y, y]
    edges = np.unique(np.linspace(0, len(x), buckets, endpoint=False).astype(int))
    last = np.append(edges[1:], len(x)) - 1
    return [(x[edges] + x[last]) / 2, np.minimum.reduceat(y, edges), np.maximum.reduceat(y, edges)]


def path(x: np.ndarray, y: np.ndarray) -> str:
    """A line through positions as SVG path data, broken where a position is missing."""
    parts, drawing = [], False
    for a, b in zip(x.tolist(), y.tolist(), strict=True):
        if not (math.isfinite(a) and math.isfinite(b)):
            drawing = False
            continue
        b = min(max(b, -1000 * SIDE), 1000 * SIDE)
        parts.append(f"{'L' if drawing else 'M'}{a:.0f} {SIDE - b:.0f}")
        drawing = True
    return "".join(parts)


def area(x: np.ndarray, low: np.ndarray, high: np.ndarray) -> str:
    """The area between two lines as SVG path data."""
    if not len(x):
        return ""
    around = path(np.concatenate([x, x[::-1]]), np.concatenate([high, low[::-1]]))
    return around + "Z" if around else ""


def _nice(step: float) -> float:
    """The smallest of 1, 2, 5 × a power of ten that is at least `step`."""
    power = 10.0 ** math.floor(math.log10(step)) if step > 0 else 1.0
    return next(m * power for m in (1, 2, 5, 10) if m * power >= step * (1 - 1e-9))


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 2, 5), (1, 3), (1,)):
        ticks = [d * 10.0**p for p in powers for d in digits if low <= d * 10.0**p <= high]
        if len(ticks) <= most + 1:
            return ticks
    return ticks[:: math.ceil(len(ticks) / most)]
