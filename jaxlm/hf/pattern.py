"""Which layers have a window: `layer_types` in a config.json, `layer_pattern` in our options."""

import itertools
from collections.abc import Callable
from typing import Any

from jaxlm.hf.common import number
from jaxlm.hf.keys import shown
from jaxlm.models.options import DecoderConfig

Json = dict[str, Any]

SLIDING, FULL = "sliding_attention", "full_attention"


def options(window: int | None, local: list[bool], *, always: bool = False) -> Json:
    """Our options, from the window and which layers have it.

    `always`: which layers are local is said even where none has a window; they differ otherwise.
    """
    if not always and not (window and any(local)):
        return {"window": 0}
    window = window or 0
    if all(local):
        return {"window": window}
    again = lambda period: all(one == local[i % period] for i, one in enumerate(local))
    cycle = local[: next(period for period in range(1, len(local) + 1) if again(period))]
    runs = [(one, len(list(run))) for one, run in itertools.groupby(cycle)]
    texts = [("local" if one else "global") + (f"*{n}" if n > 1 else "") for one, n in runs]
    return {"window": window, "layer_pattern": " ".join(texts)}


def local(hf: Json, otherwise: Callable[[int], bool]) -> list[bool]:
    """Which layers have the window: as `layer_types` says, `otherwise` (of a layer's number) where
    there are none. Raises `ValueError` if they are not one known kind for each layer."""
    layers, kinds = number(hf, "num_hidden_layers"), hf.get("layer_types")
    if kinds is None:
        return [otherwise(i) for i in range(layers)]
    if strange := sorted({*kinds} - {SLIDING, FULL}):
        i = kinds.index(strange[0])
        raise ValueError(
            f"config.json says layer_types[{i}]={shown(strange[0])}, which is not known here; "
            f"known are {SLIDING} and {FULL}"
        )
    if len(kinds) != layers:
        raise ValueError(
            f"config.json says layer_types={shown(kinds)}, of {len(kinds)} layers, and "
            f"num_hidden_layers={layers}: each layer has to have one; take layer_types out if they "
            "are those of another model"
        )
    return [kind == SLIDING for kind in kinds]


def types(c: DecoderConfig) -> list[str]:
    """`layer_types`."""
    return [SLIDING if kind.window else FULL for kind in c.kinds]
