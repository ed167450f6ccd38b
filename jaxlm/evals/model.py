"""A model on its devices as evaluation uses it: what scores, what generates, what lm-eval sees.

Everything runs under the model's mesh, on all of its devices; with several processes, each calls
the same functions with the same arguments.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jaxlm import sharding
from jaxlm.contract import LM, Params
from jaxlm.evals import texts
from jaxlm.evals.score import Request, Score, Scorer


class Model:
    """`params` may be exchanged between evaluations; the compiled programs stay.

    `folder`: of the tokenizer. `length`: tokens of context. `tokens`: of a batch on one device, 0 =
    some that fit. `add_bos`: as in `texts`. `tick(done, total)` hears how far a call has come.
    """

    def __init__(
        self,
        lm: LM,
        params: Params,
        folder: Path,
        mesh: jax.sharding.Mesh,
        length: int,
        *,
        tokens: int = 0,
        add_bos: bool | None = None,
        tick: Callable[[int, int], None] = lambda done, total: None,
    ):
        self.lm, self.params, self.mesh, self.length = lm, params, mesh, length
        self.texts = texts.load(folder, add_bos)
        self._tick = tick
        put = lambda batch: sharding.put_rows(mesh, batch)
        with jax.set_mesh(mesh):
            self.scorer = Scorer(lm, length, tokens=tokens, put=put)

    def score(self, requests: list[Request]) -> list[Score]:
        """The scores of all requests, in their order."""
        with jax.set_mesh(self.mesh):
            return self.scorer(self.params, requests, self._tick)

    def for_lm_eval(self, about: dict[str, Any] | None = None):
        """The model as lm-eval's `LM`."""
        from jaxlm.evals.harness import Jaxlm

        return Jaxlm(self.texts, self.length, self.score, about=about)
