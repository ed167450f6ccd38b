"""A model on its devices as evaluation uses it: what scores, what generates, what lm-eval sees.

Everything runs under the model's mesh, on all of its devices; with several processes, each calls
the same functions with the same arguments.
"""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import jax

from jaxlm import sharding
from jaxlm.contract import LM, Params
from jaxlm.evals import texts
from jaxlm.evals.score import Request, Score, Scorer
from jaxlm.generate.engine import Generator
from jaxlm.generate.engine import Request as Ask
from jaxlm.generate.sampling import Sampling

PROMPTS = 256  # generated from before the next word about how far it has come


class Prompt(NamedTuple):
    """Up to `tokens` ids that follow `ids`, or fewer if one of `stops` appears in their text."""

    ids: list[int]
    tokens: int
    stops: tuple[str, ...]
    sampling: dict[str, float]  # fields of `generate.sampling.Sampling`


class Model:
    """`params` may be exchanged between evaluations; the compiled programs stay.

    `folder`: of the tokenizer. `length`: tokens of context. `ends`: tokens that end a text.
    `tokens`: of a batch on one device, 0 = some that fit. `add_bos`: as in `texts`.
    `tick(done, total)` hears how far a call has come. `same(requests)`, before any is computed,
    raises where another process is asked something else.
    """

    def __init__(
        self,
        lm: LM,
        params: Params,
        folder: Path,
        mesh: jax.sharding.Mesh,
        length: int,
        ends: Collection[int],
        *,
        tokens: int = 0,
        add_bos: bool | None = None,
        tick: Callable[[int, int], None] = lambda done, total: None,
        same: Callable[[list], None] = lambda requests: None,
    ):
        self.lm, self.params, self.mesh, self.length = lm, params, mesh, length
        self.texts = texts.load(folder, add_bos)
        self._tick, self._same = tick, same
        put = lambda batch: sharding.put_rows(mesh, batch)
        with jax.set_mesh(mesh):
            self.scorer = Scorer(lm, length, tokens=tokens, put=put)
            decode = lambda ids: self.texts.tokenizer.decode(ids, skip_special_tokens=True)
            self.generator = Generator(lm, length, decode, ends)

    def score(self, requests: list[Request]) -> list[Score]:
        """The scores of all requests, in their order."""
        self._same(requests)
        with jax.set_mesh(self.mesh):
            return self.scorer(self.params, requests, self._tick)

    def generate(self, prompts: list[Prompt]) -> list[list[int]]:
        """The new ids of all prompts, in their order."""
        self._same(prompts)
        alike: dict[Sampling, list[int]] = {}
        for i, prompt in enumerate(prompts):
            numbers: dict[str, Any] = {
                k: int(v) if k == "top_k" else v for k, v in prompt.sampling.items()
            }
            alike.setdefault(Sampling(**numbers), []).append(i)
        found: list[list[int]] = [[] for _ in prompts]
        done = 0
        for sampling, members in alike.items():
            # A seed each: a task may ask several times with one prompt.
            requests = [
                Ask(prompts[i].ids, prompts[i].tokens, i, prompts[i].stops) for i in members
            ]
            for some in _parts(list(zip(members, requests, strict=True)), PROMPTS):
                with jax.set_mesh(self.mesh):
                    results = self.generator(self.params, [ask for _, ask in some], sampling)
                for (i, _), result in zip(some, results, strict=True):
                    found[i] = result.ids
                self._tick(done := done + len(some), len(prompts))
        return found

    def for_lm_eval(self, about: dict[str, Any] | None = None):
        """The model as lm-eval's `LM`."""
        from jaxlm.evals.harness import Jaxlm

        return Jaxlm(self.texts, self.length, self.score, self.generate, about=about)


def _parts(values, size):
    return [values[i : i + size] for i in range(0, len(values), size)]
