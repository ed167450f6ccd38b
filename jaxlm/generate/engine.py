"""Generation: many prompts of any lengths in, their continuations out.

    generator = Generator(opened.lm, opened.length, opened.tokenizer.decode, {opened.tokenizer.eos})
    with jax.set_mesh(opened.mesh):
        results = generator(opened.params, [Request(ids, 64, seed=0, stops=("\\n",))], Sampling())

Requests of similar lengths are read together, `rows` at a time, padded to one of few shapes; there
is one compilation for each (`bucket`). Where the context of the model is full, the later half of
it is read again, in a cache of its own, and the row goes on.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from jaxlm import sharding
from jaxlm.contract import LM, Params
from jaxlm.generate.programs import STEPS, Rows, programs
from jaxlm.generate.sampling import Sampling
from jaxlm.generate.text import Text

LEAST = 16  # tokens of the shortest bucket


class Request(NamedTuple):
    """A prompt to continue."""

    ids: Sequence[int]  # at least one token, bos for a new document
    tokens: int  # new ones, at most
    seed: int = 0
    stops: tuple[str, ...] = ()


class Result(NamedTuple):
    """What became of a request."""

    ids: list[int]  # new tokens: with the one that completes a stop string, without an end token
    text: str  # without the stop string
    logprobs: list[float]  # of each id under the model as it is, in nats; empty unless asked for
    finish: str  # "stop": an end token or a stop string; "length": as many as asked for


def bucket(size: int, least: int = LEAST) -> int:
    """The next of 16, 24, 32, 48, 64, 96, ..., or from `least` on: little padding, few shapes."""
    power = max(least, 1 << (size - 1).bit_length())
    return 3 * power // 4 if 3 * power // 4 >= max(size, least) else power


class Generator:
    """Generates with one language model, whose params come with each call.

    `context`: tokens it can see at once. `decode`: ids -> text. `ends`: tokens that end a text.
    Call under the mesh that the params lie on; with several processes, in all of them alike.
    """

    def __init__(
        self,
        lm: LM,
        context: int,
        decode: Callable[[Sequence[int]], str],
        ends: Collection[int],
        *,
        rows: int = 32,
    ):
        self.context, self.decode, self.ends, self.rows = context, decode, frozenset(ends), rows
        self.programs = programs(lm)

    def __call__(
        self,
        params: Params,
        requests: Sequence[Request],
        sampling: Sampling,
        *,
        logprobs: bool = False,
        on_text: Callable[[int, str], None] | None = None,
        steps: int = STEPS,
    ) -> list[Result]:
        """One result for each request, in their order.

        `on_text(number of the request, more of its text)` is called as text comes, every `steps`
        tokens. Raises `ValueError` for a prompt that is empty or longer than the context.
        """
        self.refuse(requests)
        texts = [_Row(number, r, self.decode) for number, r in enumerate(requests)]
        waiting = sorted(texts, key=lambda row: len(row.request.ids))
        while waiting:
            batch, waiting = waiting[: self.rows], waiting[self.rows :]
            self._continue(params, batch, sampling, logprobs, on_text, steps)
            waiting = [row for row in batch if not row.finish] + waiting
        return [row.result() for row in texts]

    def compile(self, params: Params, requests: Sequence[Request], sampling: Sampling) -> None:
        """Compiles what the first requests, `rows` of them, need; runs nothing yet."""
        self.refuse(requests)
        batch = [_Row(number, r, self.decode) for number, r in enumerate(requests[: self.rows])]
        rows, slots, _ = self._prompts(batch, sampling)
        fixed, how = self._fixed(sampling), {"kind": sampling.kind, "scored": False}
        read = self.programs.read.lower(params, rows, *fixed, length=slots, **how).compile()
        spread = not jax.sharding.get_mesh().empty
        shape = lambda x, where: x.update(sharding=where) if spread else x
        state, _ = jax.tree.map(
            shape,
            jax.eval_shape(self.programs.read, params, rows, *fixed, length=slots, **how),
            read.output_shardings,
        )
        done_B = np.zeros(state.done_B.shape, bool)
        self.programs.write.lower(params, state, *fixed, done_B, np.int32(1), **how).compile()

    def _fixed(self, sampling):
        return sampling.numbers, np.array(sorted(self.ends) or [-1], np.int32)

    def _prompts(self, batch, sampling):
        """The batch on the mesh, the slots of its cache, and the tokens it has room for."""
        prompts = [row.context(self.context) for row in batch]
        longest = max(map(len, prompts))
        left = max(row.left for row in batch)
        room = self.context - longest + 1  # the last token that is written is not read
        length = min(bucket(longest), self.context)
        slots = bucket(length + min(left, room) - 1)
        earlier = [row.earlier() if sampling.kind.penalty else [] for row in batch]
        return self._rows(batch, prompts, length, earlier), slots, room

    def _continue(self, params, batch, sampling, scored, on_text, steps):
        """Reads a batch of rows and writes until all are finished or one meets its context."""
        fixed, how = self._fixed(sampling), {"kind": sampling.kind, "scored": scored}
        rows, slots, room = self._prompts(batch, sampling)
        state, written = self.programs.read(params, rows, *fixed, length=slots, **how)
        rows = len(state.done_B)
        count = 1
        while True:
            for row, ids, scores in zip(batch, *_columns(written, len(batch)), strict=True):
                row.add(ids, scores if scored else [], self.ends)
                if on_text and (new := row.text.news(last=bool(row.finish))):
                    on_text(row.number, new)
            room -= count
            if room < 1 or all(row.finish for row in batch):
                return
            done_B = np.array([bool(row.finish) for row in batch] + [True] * (rows - len(batch)))
            count = min(steps, STEPS, room, max(row.left for row in batch if not row.finish))
            state, written = self.programs.write(
                params, state, *fixed, done_B, np.int32(count), **how
            )

    def _rows(self, batch, prompts, length, earlier=()):
        """The batch on the mesh, filled up with rows that are none."""
        mesh = jax.sharding.get_mesh()
        ways = 1 if mesh.empty else sharding.rows_divide_by(mesh)
        more = -(-bucket(len(batch), least=1) // ways) * ways - len(batch)
        fill = lambda values: np.array([*values, *[0] * more])
        tokens_BL = np.zeros((len(batch) + more, length), np.int32)
        for row_L, ids in zip(tokens_BL, prompts, strict=False):
            row_L[: len(ids)] = ids
        earlier_BN = None
        if most := max(map(len, earlier), default=0):
            earlier_BN = np.full((len(tokens_BL), bucket(most)), -1, np.int32)
            for row_N, ids in zip(earlier_BN, earlier, strict=False):
                row_N[: len(ids)] = ids
        rows = Rows(
            tokens_BL,
            fill(map(len, prompts)).astype(np.int32),
            fill(row.request.seed % 2**32 for row in batch).astype(np.uint32),
            fill(row.drawn for row in batch).astype(np.int32),
            fill(row.left for row in batch).astype(np.int32),
            earlier_BN,
        )
        if mesh.empty:
            return rows
        where = sharding.batch_sharding(mesh)
        put = lambda x: jax.make_array_from_callback(x.shape, where, lambda part: x[part])
        return jax.tree.map(put, rows)

    def refuse(self, requests: Sequence[Request]) -> None:
        """Raises `ValueError` for a request that cannot be continued."""
        for number, request in enumerate(requests, 1):
            if not len(request.ids):
                raise ValueError(f"prompt {number} is empty: begin it with the bos token")
            if len(request.ids) > self.context:
                raise ValueError(
                    f"prompt {number} has {len(request.ids):,} tokens, more than the model's "
                    f"context of {self.context:,}: shorten it, or keep its end only (--keep_end)"
                )
            if not 1 <= request.tokens < 2**31:
                raise ValueError(
                    f"prompt {number} asks for {request.tokens:,} tokens, and not for 1 or more, "
                    "below 2 billion"
                )


class _Row:
    """A request on its way."""

    def __init__(self, number: int, request: Request, decode):
        self.number, self.request = number, request
        self.text = Text(decode, request.ids, request.stops)
        self.logprobs: list[float] = []
        self.start = 0  # of what it reads
        self.finish = ""

    @property
    def drawn(self) -> int:
        return len(self.text.ids)

    @property
    def left(self) -> int:
        return self.request.tokens - self.drawn

    def context(self, most: int) -> list[int]:
        """The tokens to read; once they are more than `most`, only the last half as many."""
        ids = [*self.request.ids, *self.text.ids]
        if len(ids) - self.start > most:
            self.start = len(ids) - max(most // 2, 1)
        return ids[self.start :]

    def earlier(self) -> list[int]:
        """The different tokens that stand before those to read."""
        return sorted({*[*self.request.ids, *self.text.ids][: self.start]})

    def add(self, ids: list[int], logprobs: list[float], ends) -> None:
        if self.finish:
            return
        end = next((at for at, token in enumerate(ids) if token in ends), None)
        stopped = self.text.add(ids[:end])
        self.logprobs = [*self.logprobs, *logprobs][: len(self.text.ids)]
        if stopped or end is not None:
            self.finish = "stop"
        elif self.left < 1:
            self.finish = "length"

    def result(self) -> Result:
        return Result(self.text.ids, self.text.text, self.logprobs, self.finish)


def _columns(written, rows) -> Iterator[list[list]]:
    """What each row was given: its ids, then their scores."""
    tokens_TB, logprobs_TB = jax.device_get(written)
    real_BT = tokens_TB.T >= 0
    for x_TB in (tokens_TB, logprobs_TB):
        yield [x_T[real_T].tolist() for x_T, real_T in zip(x_TB.T[:rows], real_BT, strict=False)]
