"""Ends a run that its launcher starts again and again without its getting any further.

A launcher says in JAXLM_RESTARTS how often it has started the command again. Starts that end
without being asked to, by a crash or a kill, are counted in the work folder with the newest
checkpoint that they began from; after `MOST` from the same one the next start ends at once, with a
sentence and code 1, behind which no launcher starts another. Who starts the command by hand, or
launches it anew, begins to count anew.
"""

import contextlib
import os

from jaxlm import folder
from jaxlm.checkpoint import Checkpoints
from jaxlm.host import cluster
from jaxlm.specs import Run

MOST = 3
STOPPED = {129, 130, 143}  # exit codes of SIGHUP, Ctrl-C and SIGTERM
VARIABLE = "JAXLM_RESTARTS"


@contextlib.contextmanager
def counted(run: Run):
    """Around the work of a start, in all processes. Raises `ValueError`, the same on all, if the
    ones before it came to nothing."""
    path = run.workdir / "starts.json"
    first = cluster.process() == 0
    if words := cluster.broadcast(_begin(run, path) if first else None):
        raise ValueError(words)

    def forget():
        if first:
            path.unlink(missing_ok=True)

    cluster.on_end(lambda words, code: forget() if code in STOPPED else None)
    try:
        yield
    except Exception:
        raise  # this start has come to nothing, and stays counted
    except BaseException:  # asked to stop
        forget()
        raise
    forget()


def _begin(run, path):
    """Counts this start; why it may not begin, or ""."""
    step = max(Checkpoints(run.workdir / "checkpoints").completed(), default=0)
    text = os.environ.get(VARIABLE, "")
    again, before = text.isdecimal() and int(text) > 0, folder.read(path)
    count = before.get("starts", 0) if again and before.get("step") == step else 0
    if count < MOST:
        folder.write(path, {"step": step, "starts": count + 1})
        return ""
    where = f"the checkpoint of step {step:,}" if step else "the beginning"
    return (
        f"{count} starts in a row have ended without getting any further than {where}, so this one "
        f"does not try again: what they said is in {run.workdir / 'train.log'} and in crash-*.log "
        "beside it. Mend that, and launch it anew; where the hosts were taken away, a smaller "
        "--config.checkpoint.every saves in time"
    )
