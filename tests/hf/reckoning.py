"""Logits and gradients of our model on the same documents in several layouts, for comparisons.

Letters: B rows, L positions, V vocabulary.
"""

import dataclasses
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
from cases import draw

from jaxlm.checkpoint.digest import named
from jaxlm.hf import folder as hf
from jaxlm.hf import peft
from jaxlm.hf.load import load
from jaxlm.models.transformer import decoder
from jaxlm.params import of_layers
from jaxlm.sharding import param_shardings

LIMIT = 1e-4
FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures" / "parity"


class Ours:
    """The model of a Hugging Face folder, in jax, float32."""

    def __init__(self, path, mesh=None, adapter=None):
        source = hf.open_folder(path)
        source = source._replace(adapter=adapter and peft.read(adapter, source.inside))
        self.options = dataclasses.replace(source.options, dtype="float32", param_dtype="float32")
        self.lm = decoder(self.options, "cpu")
        abstract = jax.eval_shape(self.lm.init, jax.random.key(0))
        if mesh:
            where = param_shardings(self.lm.axes, abstract, mesh)
            place = lambda x, layout: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=layout)
            abstract = jax.tree.map(place, abstract, where)
        self.params = load(source, abstract, self.options)
        self.links = hf.matched(source, of_layers(named(abstract)), self.options)
        self.forward = jax.jit(lambda p, b: self.lm.unembed(p, self.lm.hidden(p, b)[0]))
        self.grad = jax.jit(jax.grad(self._loss, has_aux=True))

    def difference(self, documents, expected, layout=None):
        """The largest difference of a logit, in that layout (None: each document alone)."""
        batches = [layout(documents)] if layout else [packed([text]) for text in documents]
        found = [x for batch in batches for x in self.of_documents(batch)]
        return float(np.max([np.abs(a - b).max() for a, b in zip(found, expected, strict=True)]))

    def of_documents(self, batch):
        """Yields the logits of each document of each row."""
        yield from split(batch, self.forward(self.params, batch))

    def gradients(self, documents):
        """Of the summed loss of all documents, packed, by the names of the folder's tensors."""
        return self.at_once(documents)[1]

    def at_once(self, documents):
        """Logits of each document packed and padded, and gradients, by one program."""
        one = packed(documents)
        more = padded(documents, one["tokens"].shape[1])
        batch = {key: np.concatenate([one[key], more[key]]) for key in one}
        batch["weights"] = np.arange(len(batch["tokens"])) == 0
        grads, logits = self.grad(self.params, batch)
        return list(split(batch, logits)), self.by_tensor(grads)

    def by_tensor(self, tree):
        """A tree like the params by the names of the folder's tensors."""
        ours, found = named(tree), {}
        for link in self.links:
            parts = link.form.theirs(*(ours[path] for path in link.ours))
            found |= dict(zip(link.theirs, map(np.asarray, parts), strict=True))
        return found

    def _loss(self, params, batch):
        hidden, _, _ = self.lm.hidden(params, batch)
        logits = self.lm.unembed(params, hidden)
        logprobs = jax.nn.log_softmax(logits)
        chosen = jnp.take_along_axis(logprobs, batch["targets"][:, :, None], axis=2)[:, :, 0]
        counts = (batch["segments"] > 0) & batch["weights"][:, None]
        return -jnp.sum(jnp.where(counts, chosen, 0.0)), logits


def split(batch, logits_BLV):
    """Yields the logits of each document of each row."""
    segments, logits_BLV = np.asarray(batch["segments"]), np.asarray(logits_BLV)
    for row in range(len(segments)):
        for segment in range(1, segments[row].max() + 1):
            yield logits_BLV[row, segments[row] == segment]


def apart(found, expected) -> dict[str, float]:
    """Name of each tensor -> largest difference of its gradient, relative to its largest one."""
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    size = {name: max(np.abs(x).max(), 1e-3) for name, x in expected.items()}
    return {name: float(np.abs(found[name] - x).max() / size[name]) for name, x in expected.items()}


def fixture(name: str) -> pathlib.Path:
    """The file of a case."""
    return FIXTURES / f"{re.sub(r'[^a-z0-9]+', '_', name)}.npz"


def save_fixture(path: pathlib.Path, logits, gradients) -> None:
    """Logits of each document; of each gradient its size and its sum with drawn weights."""
    path.parent.mkdir(exist_ok=True)
    sums = {name: np.array(summed(name, x)) for name, x in gradients.items()}
    np.savez_compressed(path, *logits, **sums)


def load_fixture(path: pathlib.Path):
    """What `save_fixture` was given, of gradients the two numbers."""
    with np.load(path) as found:
        logits = [found[name] for name in found.files if name.startswith("arr_")]
        return logits, {name: found[name] for name in found.files if not name.startswith("arr_")}


def summed(name: str, gradient) -> tuple[float, float]:
    """A gradient in two numbers: its norm, and its sum with weights that its name draws."""
    wide = np.asarray(gradient, np.float64)
    drawn = 5 * draw(f"gradient of {name}", wide.shape)
    return float(np.linalg.norm(wide)), float(np.sum(wide * drawn))


def packed(documents):
    """One row of all documents, one after another, and some padding."""
    return _batch([documents], sum(map(len, documents)) + 5, left=False)


def padded(documents, length=43):
    """A row for each document, padded on the left in every second one."""
    rows = [_batch([[text]], length, left=i % 2 == 1) for i, text in enumerate(documents)]
    return {key: np.concatenate([row[key] for row in rows]) for key in rows[0]}


def _batch(rows, length, left):
    keys = ("tokens", "targets", "segments", "positions")
    batch = {key: np.zeros((len(rows), length), np.int32) for key in keys}
    for b, documents in enumerate(rows):
        at = length - sum(map(len, documents)) if left else 0
        for segment, text in enumerate(documents, 1):
            here = b, slice(at, at := at + len(text))
            batch["tokens"][here] = text
            batch["targets"][here] = np.roll(text, -1)
            batch["segments"][here] = segment
            batch["positions"][here] = np.arange(len(text))
    return batch


def greedy(ours: Ours, text, tokens):
    """The likeliest tokens after a text, one at a time, from the decoder's memory."""
    batch = {k: v for k, v in packed([text]).items() if k != "targets"}
    batch = {key: x[:, : len(text)] for key, x in batch.items()}
    begin = jax.jit(ours.lm.begin, static_argnums=2)
    extend = jax.jit(ours.lm.extend)
    hidden, cache = begin(ours.params, batch, len(text) + tokens)
    found = []
    for place in range(len(text), len(text) + tokens):
        logits = ours.lm.unembed(ours.params, hidden[:, -1])
        found.append(int(jnp.argmax(logits[0])))
        one = {"tokens": found[-1], "segments": 1, "positions": place}
        batch = {key: np.full((1, 1), value, np.int32) for key, value in one.items()}
        hidden, cache = extend(ours.params, batch, cache)
    return np.array(found)
