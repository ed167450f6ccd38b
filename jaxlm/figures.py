"""The figures of evaluations by name: which there are, and whether one asked for is among them."""

import difflib
import math
from collections.abc import Iterable, Mapping

from jaxlm.contract import Method
from jaxlm.data.prepare import DataSpec
from jaxlm.specs import CheckpointSpec, ExpectSpec


def check_best(c, spec: CheckpointSpec, data: DataSpec, method: Method):
    """That evaluations may give the figure by which the best checkpoint is kept, and which end of
    it is the better. `start.require_figure` knows what the method measures."""
    if not (best := c.checkpoint.keep_best):
        return
    figure, side = spec.best()
    check_figure(f"config.checkpoint.keep_best={best!r}", figure, data, method)
    if figure not in losses(data, method) and not side:
        raise ValueError(
            f"config.checkpoint.keep_best={best!r} does not say whether the highest or the lowest "
            f"is best: set it to 'max:{figure}' or 'min:{figure}'"
        )
    if not (c.eval.every and c.eval.every % c.checkpoint.every == 0):
        raise ValueError(
            "config.checkpoint.keep_best compares checkpoints that were evaluated at their step: "
            f"set config.eval.every to a multiple of config.checkpoint.every={c.checkpoint.every}"
        )


def best_so_far(records: Iterable[Mapping], spec: CheckpointSpec) -> str:
    """Which of these evaluations is the best by `keep_best`, in words; "" where none tells. Of
    equals the first, as checkpoints are kept."""
    figure, side = spec.best()
    found = [(r[figure], r["step"]) for r in records if math.isfinite(r.get(figure, math.nan))]
    if not found:
        return ""
    sign = -1 if side == "max" else 1
    value, step = min(found, key=lambda each: (sign * each[0], each[1]))
    return f"best so far by {figure}: step {step:,} ({value:.3f})"


def wanted_figures(spec: ExpectSpec, fields: Iterable[str]) -> list[tuple[str, str]]:
    """(key with its value, figure) of what these fields of `expect` promise."""
    named = {
        "others": [name for name, _, _ in spec.bounds()],
        "bits_per_char": [f"bits_per_char/{name}" for name in spec.figures()],
    }
    return [
        (f"expect.{field}={getattr(spec, field)!r}", figure)
        for field in fields
        for figure in named.get(field, [])
    ]


def check_figure(key: str, figure: str, data: DataSpec, method: Method):
    """That evaluations may give this figure; `key`: which asks for it, with its value."""
    known = losses(data, method)
    ends = tuple(f"/{source.name}" for source in data.sources if source.structured)
    of_method = figure.endswith(ends) and not figure.startswith(("loss/", "bits_per_char/"))
    if figure not in known and not of_method:
        within = [name for name in known if figure in name.split("/")]
        near = within or difflib.get_close_matches(figure, known, 1)
        meant = f"; did you mean {near[0]}?" if near else ""
        or_else = (
            f", and no metric of the method with {' or '.join(ends)} behind it" if ends else ""
        )
        raise ValueError(f"{key}: {figure!r} is none of {', '.join(known)}{or_else}{meant}")


def losses(data: DataSpec, method: Method) -> list[str]:
    """The figures that every evaluation gives, lower being better: of the params, and of extras
    that are evaluated too."""
    known = [f"loss/{source.name}" for source in data.sources]
    known += [f"bits_per_char/{source.name}" for source in data.sources if not source.structured]
    others = [name for name, extra in method.extras.items() if extra.evaluate]
    return known + [f"{name}/{figure}" for name in others for figure in known]
