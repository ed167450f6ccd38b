"""Prompts and responses as lists of ids: into batches, and drawn from a model.

S seeds, B rows, L positions of a batch, P positions of prompts, T tokens of a response at most.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxlm.contract import LM
from jaxlm.generate.programs import STEPS, Rows, programs
from jaxlm.generate.sampling import Sampling
from jaxlm.methods.likelihood import token_logprobs

Ids = Sequence[int]


def batch(prompts: Sequence[Ids], responses: Sequence[Ids], length: int) -> dict[str, np.ndarray]:
    """Rows of one prompt and its response, weights on the response; [B, length] each."""
    rows = len(prompts)
    names = ("tokens", "targets", "segments", "positions")
    out: dict[str, np.ndarray] = {name: np.zeros((rows, length), np.int32) for name in names}
    out["weights"] = np.zeros((rows, length), np.float32)
    out["positions"][:] = np.arange(length)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        ids = [*prompt, *response]
        if len(ids) > length + 1:
            raise ValueError(f"{len(ids)} tokens of prompt and response do not fit {length} + 1")
        end = len(ids) - 1
        out["tokens"][row, :end] = ids[:-1]
        out["targets"][row, :end] = ids[1:]
        out["segments"][row, :end] = 1
        out["weights"][row, len(prompt) - 1 : end] = 1
    return out


def stacked(batches: Sequence[dict[str, np.ndarray]], axis: int = 0) -> dict[str, np.ndarray]:
    """Batches along a new axis: of seeds (0), or of the two members of pairs (1)."""
    return {name: np.stack([b[name] for b in batches], axis) for name in batches[0]}


class Voice:
    """Draws responses from the models of all seeds, and scores them; at temperature 1."""

    def __init__(self, lm: LM, prompt: int, tokens: int, end: int):
        """`prompt`: tokens of the longest prompt. `tokens`: of a response, its end included."""
        if not 1 < tokens <= STEPS:
            raise ValueError(f"a response of {tokens} tokens; up to {STEPS} are drawn in one call")
        self.length = prompt + tokens - 1
        self.prompt, self.tokens = prompt, tokens
        run, how = programs(lm), {"kind": Sampling().kind, "scored": False}
        fixed = Sampling().numbers, jnp.array([end])

        def draw(params, rows):
            state, first = run.read(params, rows, *fixed, length=self.length + 1, **how)
            done_B = jnp.zeros(len(rows.lengths_B), bool)
            _, rest = run.write(params, state, *fixed, done_B, tokens - 1, **how)
            return jnp.concatenate([first.tokens_TB, rest.tokens_TB]).T

        def score(params, batch):
            return (token_logprobs(lm, params, batch)[0] * batch["weights"]).sum(-1)

        self._draw, self._score = jax.jit(jax.vmap(draw)), jax.jit(jax.vmap(score))

    def draw(self, params_S, prompts: Sequence[Ids], seed: int) -> list[list[list[int]]]:
        """One response to each prompt from the model of each seed, ends included."""
        tokens_BP = np.zeros((len(prompts), self.prompt), np.int32)
        for row, ids in zip(tokens_BP, prompts, strict=True):
            row[: len(ids)] = ids
        seeds, rows = len(jax.tree.leaves(params_S)[0]), len(prompts)
        every = lambda x: np.broadcast_to(x, (seeds, *x.shape))
        seed_SB = np.random.default_rng(seed).integers(2**32, size=(seeds, rows), dtype=np.uint32)
        asked = Rows(
            every(tokens_BP),
            every(np.array([len(ids) for ids in prompts], np.int32)),
            seed_SB,
            np.zeros((seeds, rows), np.int32),
            np.full((seeds, rows), self.tokens, np.int32),
        )
        drawn_SBT = np.asarray(self._draw(params_S, asked))
        return [[row[row >= 0].tolist() for row in rows] for rows in drawn_SBT]

    def score(self, params_S, prompts: Sequence[Ids], drawn: list[list[list[int]]]) -> np.ndarray:
        """log p of each response given its prompt, in nats, [S, B]."""
        rows = stacked([batch(prompts, responses, self.length) for responses in drawn])
        return np.asarray(self._score(params_S, rows), np.float64)
