"""The tensors of a Hugging Face folder onto a mesh, one after another.

Each device gets the part of a tensor that it will hold, read from the mapped file, and turns it
into the form it has here: what the host holds at one time is about one tensor.
"""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from jaxlm.checkpoint.digest import named
from jaxlm.checkpoint.stacks import layout_of, of_layers, places
from jaxlm.hf import peft, tensors
from jaxlm.hf.folder import Source, matched
from jaxlm.hf.links import Link
from jaxlm.models.options import DecoderConfig
from jaxlm.params import Kept, assembled


def load(source: Source, abstract: Any, options: DecoderConfig, kept: Kept | None = None) -> Any:
    """A tree of params like `abstract`: its shapes, dtypes and shardings; layers stacked or not. Or
    as they are `kept`.

    Raises `ValueError` if the folder's tensors are not those of the model (`folder.matched`).
    """
    return assembled(abstract, stream(source, abstract, options), kept)


def stream(
    source: Source, abstract: Any, options: DecoderConfig
) -> Iterator[tuple[str, jax.Array]]:
    """Yields (path with "blocks/<layer>/", array) of each array of `abstract`, read one by one."""
    wanted = named(abstract)
    where = places(wanted)
    for link in matched(source, of_layers(wanted), options):
        leaves = [wanted[where[path][0]] for path in link.ours]
        stacked = [where[path][1] is not None for path in link.ours]
        yield from zip(link.ours, _read(source, link, leaves, stacked), strict=True)


def _read(source: Source, link: Link, leaves, stacked):
    """Our arrays of a link, of one layer each, where their parts will lie."""
    layouts = tuple(
        layout_of(leaf, leaf.ndim - one) for leaf, one in zip(leaves, stacked, strict=True)
    )
    theirs = []
    for name in link.theirs:
        view = tensors.view(source.tensors[name])
        layout = _their_layout(layouts[0], leaves[0].ndim - stacked[0], link.form)
        read = functools.partial(lambda view, index: view[index], view)
        x = jax.make_array_from_callback(view.shape, layout, read)
        theirs.append(peft.merged(source.adapter, name, x, link.form))
    return _converted(link.form, tuple(leaf.dtype for leaf in leaves), layouts)(*theirs)


def _their_layout(layout, ndim, form):
    """How the devices split a tensor of theirs, so that each reads what it will hold."""
    if not isinstance(layout, NamedSharding):
        return layout
    spec = tuple(layout.spec) + (None,) * (ndim - len(layout.spec))
    return NamedSharding(layout.mesh, PartitionSpec(*form.axes(spec)))


@functools.cache
def _converted(form, dtypes, layouts):
    """Their tensors -> ours, as one program for all tensors of this form, dtypes and layouts."""

    def convert(*theirs):
        # Copied: what passes through a program unchanged would still be the mapped file.
        return tuple(
            jnp.copy(x).astype(dtype) for x, dtype in zip(form.ours(*theirs), dtypes, strict=True)
        )

    return jax.jit(convert, out_shardings=layouts)
