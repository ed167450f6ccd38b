"""Params into the files of a Hugging Face folder, some layers at a time."""

import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.checkpoint.stacks import Shapes, of_layers, places
from jaxlm.hf.families import FAMILIES
from jaxlm.hf.family import Family, differences
from jaxlm.hf.folder import their_shapes
from jaxlm.hf.links import Link
from jaxlm.hf.tensors import Writer, names_of
from jaxlm.models.options import DecoderConfig

AT_ONCE = 2**30  # bytes of arrays in memory, unless one of them is larger


def family_of(options: DecoderConfig) -> Family:
    """The first family whose config.json can say all options. Raises `ValueError` if none can."""
    tried = {family.model_type: differences(family, options) for family in FAMILIES.values()}
    for name, lines in tried.items():
        if not lines:
            return FAMILIES[name]
    nearest = min(tried, key=lambda name: len(tried[name]))
    raise ValueError(
        "no family of Hugging Face models that is known here has all options of this model; the "
        f"nearest, {nearest}, cannot be {' nor '.join(tried[nearest])}"
    )


def write(
    out: Path,
    family: Family,
    options: DecoderConfig,
    shapes: Shapes,
    load: Callable[[list[str]], Mapping[str, jax.Array]],
    *,
    dtype: str = "",
    shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes the safetensors of a model.

    `shapes`: of our arrays, layers stacked or not; `load` brings those of some names into memory.
    `dtype`: of all tensors; "" = as they are.
    """
    where = places(shapes)
    links, nameless = family.links(list(where), options, ())
    if nameless:
        raise ValueError(f"a {family.model_type} has no tensors for {names_of(nameless)}")
    theirs = their_shapes(links, of_layers(shapes))
    kind = lambda link: jnp.dtype(dtype or shapes[where[link.ours[0]][0]].dtype)
    layout = {name: (theirs[name], kind(link)) for link in links for name in link.theirs}
    with Writer(out, layout, shard_bytes) as writer:
        for names, group in _batches(links, where, shapes):
            arrays = load(names)
            for link in group:
                ours = [_layer(arrays[where[path][0]], where[path][1]) for path in link.ours]
                parts = _converted(link.form, kind(link))(*ours)
                for name, part in zip(link.theirs, parts, strict=True):
                    writer.put(name, np.asarray(part))


def _batches(links, where, shapes: Shapes) -> Iterator[tuple[list[str], list[Link]]]:
    """Arrays to load at one time, and the links that can be written then."""
    units: dict[tuple[str, ...], list[Link]] = {}
    for link in links:
        units.setdefault(tuple(where[path][0] for path in link.ours), []).append(link)
    names: list[str] = []
    group: list[Link] = []
    size = 0
    for unit, members in units.items():
        more = sum(shapes[name].size * shapes[name].dtype.itemsize for name in unit)
        if names and size + more > AT_ONCE:
            yield names, group
            names, group, size = [], [], 0
        names, group, size = [*names, *unit], group + members, size + more
    if names:
        yield names, group


def _layer(array, i):
    return array if i is None else array[i]


@functools.cache
def _converted(form, dtype):
    return jax.jit(lambda *ours: tuple(x.astype(dtype) for x in form.theirs(*ours)))
