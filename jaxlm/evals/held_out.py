"""Held-out loss and bits per character of each source, and where the bits are.

Exact on the whole held-out set: rows of padding that fill up the last batch weigh nothing, on any
number of devices. B rows, L positions.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxlm.contract import LM
from jaxlm.evals.compression import Rows, compressors, primed_xz, token_bits, windows
from jaxlm.methods.likelihood import token_logprobs

INPUTS = ("tokens", "targets", "weights", "segments", "positions")
PASSAGE_TOKENS = 400  # shown in the report, coloured by their bits
SHOWN = 3  # best and worst documents of each source


class Source(NamedTuple):
    """The held-out documents of one source, cut into windows."""

    names: list[str]
    texts: list[str]
    ids: list[list[int]]  # [bos, tokens..., eos] each
    rows: Rows

    @property
    def characters(self) -> int:
        return sum(map(len, self.texts))


def held_out_source(documents: Sequence, tokenizer, length: int, stride: int, characters: int):
    """The first documents that hold at most `characters` together; at least one."""
    kept, total = [], 0
    for document in documents:
        total += len(document.text)
        if kept and total > characters:
            break
        kept.append(document)
    texts = [document.text for document in kept]
    ids = [[tokenizer.bos, *ids, tokenizer.eos] for ids in tokenizer.encode_batch(texts)]
    return Source([d.name for d in kept], texts, ids, windows(ids, length, stride))


class HeldOut:
    """Scores params on every source's held-out documents; compiles one program, once."""

    def __init__(self, lm: LM, sources: Mapping[str, Source], *, batch: int, put: Callable):
        self.sources, self._batch, self._put = dict(sources), batch, put
        mesh = jax.sharding.get_mesh()
        whole = None if mesh.empty else jax.sharding.NamedSharding(mesh, jax.P())
        score = lambda params, batch: -token_logprobs(lm, params, batch)[0]
        self._nats = jax.jit(score, out_shardings=whole)

    def compile(self, params) -> None:
        """Compiles the program, and runs nothing yet."""
        L = next((source.rows.document_NL.shape[1] for source in self.sources.values()), 1)
        kinds = dict.fromkeys(INPUTS, np.int32) | {"weights": np.float32}
        zeros = {name: np.zeros((self._batch, L), kind) for name, kind in kinds.items()}
        self._nats.lower(params, self._put(zeros)).compile()

    @property
    def rows(self) -> int:
        return sum(len(source.rows) for source in self.sources.values())

    def bits(self, params, tick=lambda done, total: None) -> dict[str, list[np.ndarray]]:
        """Bits of every held-out token: source -> one array a document."""
        nats = lambda batch: self._nats(params, self._put(batch))
        found, before = {}, 0
        for name, source in self.sources.items():
            further = lambda done, _, before=before: tick(before + done, self.rows)
            found[name] = token_bits(source.rows, nats, self._batch, further)
            before += len(source.rows)
        return found

    def figures(self, bits: Mapping[str, list[np.ndarray]]) -> dict[str, float]:
        """`loss/<source>` in nats per token and `bits_per_char/<source>`."""
        out = {}
        for name, source in self.sources.items():
            total = sum(float(b.sum()) for b in bits[name])
            tokens = sum(map(len, bits[name]))
            out[f"loss/{name}"] = total * math.log(2) / max(tokens, 1)
            out[f"bits_per_char/{name}"] = total / max(source.characters, 1)
        return out

    def documents(self, bits) -> dict[str, list[dict]]:
        """The best and the worst documents of each source by bits per character."""
        out = {}
        for name, source in self.sources.items():
            rows = [
                {"name": n, "characters": len(t), "bits_per_char": float(b.sum()) / len(t)}
                for n, t, b in zip(source.names, source.texts, bits[name], strict=True)
                if len(t) >= 200
            ]
            rows.sort(key=lambda row: row["bits_per_char"])
            out[name] = rows if len(rows) <= 2 * SHOWN else rows[:SHOWN] + rows[-SHOWN:]
        return out

    def passages(self, bits, tokenizer) -> list[dict]:
        """The start of one middling document of each source, token by token."""
        out = []
        for name, source in self.sources.items():
            each = [float(b.mean()) for b in bits[name]]
            long = [i for i, ids in enumerate(source.ids) if len(ids) > 100] or range(len(each))
            if not len(long):
                continue
            middle = sorted(long, key=lambda i: each[i])[len(long) // 2]
            pieces = tokenizer.pieces(source.texts[middle])[:PASSAGE_TOKENS]
            tokens = [
                [text, round(float(b), 2)]
                for (_, text), b in zip(pieces, bits[name][middle], strict=False)
            ]
            out.append({"source": name, "name": source.names[middle], "tokens": tokens})
        return out


def compressor_table(sources: Mapping[str, Source], seen: Callable[[str], str]) -> dict:
    """Bits per character of gzip, bz2, xz and primed xz, as one stream and file by file.

    `seen(name)` is the text that the model trained on. Takes some 10 s for 10 million characters.
    """
    stream, files = {}, {}
    for name, source in sources.items():
        stream[name], files[name] = compressors(source.texts)
        if text := seen(name):
            stream[name]["xz primed"] = primed_xz(source.texts, [text])
    return {"compressors": stream, "compressors_per_file": files}
