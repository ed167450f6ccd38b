"""A trace of a few training steps, for TensorBoard or xprof: --config.profile=10-14.

Steps are counted from 1, as in metrics.jsonl, and both ends are traced. Process 0 alone writes
`<workdir>/profile/plugins/profile/<time>/<host>.xplane.pb`: all processes run the same program. A
run that continues inside the range traces what is left of it. Look for the named scopes attention,
mlp, loss and optimizer; their backward passes carry the same names inside `transpose(jvp(...))`.
(A CPU's timeline names bare operations: there the scopes are in the program, in the graph viewer.)
"""

from collections.abc import Callable
from pathlib import Path

import jax

OPEN = 'pip install xprof && xprof --port 8791 --logdir="{}"'


class Profile:
    """Traces the steps of a range; as a context manager it ends a trace that was cut short."""

    def __init__(self, steps: range, folder: Path, say: Callable[[str], None]):
        self.steps = steps if jax.process_index() == 0 else range(0)
        self.folder, self.say = folder, say
        self.first = 0  # the step that the running trace began with; 0 = none is running

    def __enter__(self):
        return self

    def __exit__(self, kind, value, traceback):
        if self.first:
            jax.profiler.stop_trace()
        self.first = 0

    def begins(self, step: int) -> bool:
        """Whether a trace is to begin before this step."""
        return step in self.steps and not self.first

    def begin(self, step: int) -> None:
        options = jax.profiler.ProfileOptions()
        options.python_tracer_level = 0  # Python calls would bury the steps
        jax.profiler.start_trace(self.folder, profiler_options=options)
        self.first = step

    def ends(self, step: int) -> bool:
        """Whether the trace is to end after this step, once it has been computed."""
        return bool(self.first) and step + 1 not in self.steps

    def end(self, step: int) -> None:
        first, self.first = self.first, 0
        jax.profiler.stop_trace()
        self.say(f"  traced steps {first:,} to {step:,} into {self.folder}; to look at it:")
        self.say(f"    {OPEN.format(self.folder)}")
