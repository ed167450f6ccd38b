"""Checks at the start of a run that want it built: of the model whose params it starts from, of
others that it reads, and of the figures that it is judged by."""

import dataclasses
import difflib

import jax

from jaxlm.build import Built
from jaxlm.data.tokenizer import Tokenizer, same_ids
from jaxlm.data.tokenizer import load as load_tokenizer
from jaxlm.figures import losses, wanted_figures
from jaxlm.hf.family import canonical
from jaxlm.specs import Run
from jaxlm.step import make_score
from jaxlm.stored import Stored, behind, is_run, look


def start_of(run: Run) -> Stored | None:
    """The model that a new run's `init.checkpoint` names, if it is known what that is.

    Raises `ValueError` where the run has options that make another model of the same params.
    """
    found = behind(run.init.checkpoint) if run.init.checkpoint else None
    if found is None:
        return None
    ours = dataclasses.replace(run.model, vocabulary=run.model.vocabulary or 2)
    ours, theirs = canonical(ours), canonical(found.options)
    if not run.model.vocabulary:
        ours["vocabulary"] = theirs["vocabulary"]
    if wrong := [f"{k}={ours[k]!r} (there {theirs[k]!r})" for k in ours if ours[k] != theirs[k]]:
        raise ValueError(
            f"config.init.checkpoint={run.init.checkpoint!r} is of another model than config.model "
            f"says: {', '.join(wrong)}; give config.model the options of that run"
        )
    return found


def notes_of_models(built: Built, start: Stored | None) -> list[str]:
    """What somebody may want to know of the models that a run reads; `start`: of `start_of`."""
    found = [*built.stored.values(), *([start] if start else [])]
    if built.run.init.hf and not is_run(built.run.workdir):
        found.append(look(built.run.init.hf))
    return [note for one in found for note in one.notes]


def require_same_tokens(built: Built, tokenizer: Tokenizer, start: Stored | None = None) -> None:
    """Raises `ValueError` if another model that the run reads means other text by the same ids.

    `start`: the one that its params come from, which may have been converted without a tokenizer.
    """
    known = start is not None and start.tokenizer.is_dir()
    models = {**built.stored, **({"start of this run,": start} if known else {})}
    for name, found in models.items():
        theirs = load_tokenizer(found.tokenizer)
        if not same_ids(tokenizer, theirs):
            raise ValueError(
                f"the {name} {found.folder} has another tokenizer than this run: there "
                f"{theirs.vocabulary_size:,} tokens (hash {theirs.hash[:12]}), here "
                f"{tokenizer.vocabulary_size:,} (hash {tokenizer.hash[:12]}), so its ids stand for "
                f"other text; set --config.data.tokenizer={found.tokenizer} to train with that one"
            )


def require_figure(built: Built) -> None:
    """Raises `ValueError` where the best checkpoint is kept by what no evaluation measures, or
    the run is to be judged by it."""
    run, (figure, side) = built.run, built.run.checkpoint.best()
    best = f"checkpoint.keep_best={run.checkpoint.keep_best!r}"
    wanted = [(best, figure, f"{side}:")] if figure else []
    wanted += [(key, name, "") for key, name in wanted_figures(run.expect, run.judged)]
    unsure = [each for each in wanted if each[1] not in losses(run.data, run.method)]
    if not unsure:
        return
    with jax.set_mesh(built.mesh):
        score = make_score(built.lm, run.method)
        state = built.abstract
        found = jax.eval_shape(score, state.params, state.extras, built.abstract_batch())
    structured = [source.name for source in run.data.sources if source.structured]
    known = [f"{metric}/{name}" for metric in found for name in structured]
    evaluated = [name for name, extra in run.method.extras.items() if extra.evaluate]
    known += [f"{name}/{each}" for name in evaluated for each in known]
    known += losses(run.data, run.method)
    for key, figure, side in unsure:
        if figure not in known:
            near = difflib.get_close_matches(figure, known, 1, 0.0)
            raise ValueError(
                f"config.{key}: evaluations measure no {figure!r}; did you mean "
                f"'{side}{near[0]}'? There are {', '.join(known)}"
            )
