"""What of a run is saved, and the state that it goes on from."""

from jaxlm.build import Built
from jaxlm.checkpoint import Checkpoints
from jaxlm.contract import TrainState
from jaxlm.data.prepare import Prepared
from jaxlm.fingerprint import fingerprint
from jaxlm.host import cluster
from jaxlm.step import written_extras


def save(
    built: Built,
    prepared: Prepared,
    checkpoints: Checkpoints,
    state: TrainState,
    figures,
    unseen: bool = False,
):
    """Saves what changes during a run; returns as soon as the arrays may be donated.

    `unseen`: the evaluation of this step was cut short, and is for who goes on from here.
    """
    step = int(state.step)
    about = {
        "position": step * built.run.rows,
        "data": prepared.hash,
        "config": built.run.config,
        "vocabulary": prepared.tokenizer.vocabulary_size,
    } | ({"unseen": True} if unseen else {})
    if adapter := built.run.method.adapter:
        about["adapter"] = dict(adapter.about)
    checkpoints.save(step, _items(built, state), about, figures)


def restore_or_start(built: Built, prepared: Prepared, checkpoints: Checkpoints):
    """The state to go on from and its step: of the newest good checkpoint, else a first state.

    Extras that no `between` writes are saved once, at the start, and restored from there: made
    anew from restored params they would silently move a frozen reference. Models that lie in
    folders of their own are opened again, and must hold what they held.
    """
    latest = checkpoints.latest()
    frozen = set(built.run.method.extras) - written_extras(built.run.method)
    frozen -= built.stored.keys()  # these lie on disk already
    if latest is None and (lost := cluster.broadcast(checkpoints.completed())):
        raise ValueError(
            f"none of the checkpoints in {checkpoints.directory} can be used (steps {lost}; the "
            "reasons are above); put back a copy of one, or delete the work folder to train anew"
        )
    if latest is None:
        state = built.first_state()
        for name in sorted(frozen):
            checkpoints.save_once(name, state.extras[name])
        prints = {name: fingerprint(state.extras[name]) for name in _models(built)}
        checkpoints.note_once({"fingerprints": prints})
        return state, 0
    about = checkpoints.about(latest)
    if about["data"] != prepared.hash:
        raise ValueError(
            f"the prepared data is not what {built.run.workdir} was trained on (records "
            f"{prepared.hash[:12]}, there {about['data'][:12]}); put the old data back, or choose "
            "another --config.workdir"
        )
    items = checkpoints.restore(latest, _items(built, built.abstract))
    extras = items.get("extras", {}) | {
        name: checkpoints.restore_once(name, built.abstract.extras[name]) for name in frozen
    }
    extras |= _opened_again(built, checkpoints.noted_once().get("fingerprints", {}))
    loop = items["loop"]
    state = TrainState(loop["step"], items["params"], items["opt_state"], extras, loop["guard"])
    return state, latest


def _models(built):
    """Extras that are models of their own, with where they lie."""
    return {k: v for k, v in built.stored.items() if k in built.run.method.extras}


def _opened_again(built, known):
    """The models on disk that a run reads; refused if one has changed since the run started."""
    opened = {}
    for name, found in _models(built).items():
        opened[name] = built.load_other(name)
        if fingerprint(opened[name]) != known.get(name):
            raise ValueError(
                f"the {name} {found.folder} is not the model that this run started with: its "
                "params have changed since (a run that was trained on?); put the old ones back, or "
                "start again in another --config.workdir"
            )
    return opened


def _items(built, state):
    """The trees of a checkpoint, of arrays or of shapes alike."""
    written = {k: state.extras[k] for k in sorted(written_extras(built.run.method))}
    return {
        "params": state.params,
        "opt_state": state.opt_state,
        "loop": {"step": state.step, "guard": state.guard},
    } | ({"extras": written} if written else {})
