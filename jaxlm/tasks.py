"""lm-eval's tasks on a run that is going: at a cadence, and in the end.

Their names and data are looked up before anything is compiled; the programs that score are compiled
when the first requests meet them.
"""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from jaxlm.build import Built
from jaxlm.evals import tasks
from jaxlm.evals.model import Model
from jaxlm.host import cluster
from jaxlm.specs import EvalSpec


def loaded(spec: EvalSpec):
    """The tasks with their data, read once; None for none. Raises `ValueError` for people."""
    names = tasks.parse(spec.tasks)
    return tasks.load(names) if names else None


class RunningTasks:
    """Evaluates params on the tasks of a run; `folder`: of its tokenizer, `ends`: tokens that end a
    text, as where the finished model generates."""

    def __init__(
        self,
        built: Built,
        folder: Path,
        ends: Collection[int],
        tick: Callable[[int, int], None],
    ):
        run = built.run
        self._loaded, self._limit = loaded(run.eval), run.eval.tasks_limit or None
        # As training does, each text begins with a bos.
        lm, mesh, length = built.scorer, built.mesh, run.data.length
        same = lambda requests: cluster.agree("what the model is asked", requests)
        self._model = Model(
            lm, None, folder, mesh, length, ends, add_bos=True, tick=tick, same=same
        )

    def results(self, params, *, writer: bool) -> dict[str, Any]:
        """lm-eval's results, without the samples; standard errors only for who writes them."""
        self._model.params = params
        try:
            lm = self._model.for_lm_eval()
            found = tasks.evaluate(lm, self._loaded, writer=writer, limit=self._limit)
        finally:
            self._model.params = None  # the step donates them
        return {k: v for k, v in found.items() if k != "samples"}
