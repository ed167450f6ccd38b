"""What a run looks at beside training: held-out figures, continuations, compressors, results."""

import contextlib
import json
import math
import os
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.build import Built
from jaxlm.data import chat, pack
from jaxlm.data.documents import Document
from jaxlm.data.examples import Malformed, messages_before_answer
from jaxlm.data.prepare import Prepared
from jaxlm.data.records import Reader
from jaxlm.evals import tasks
from jaxlm.evals.held_out import HeldOut, compressor_table, held_out_source
from jaxlm.evals.objective import ByObjective
from jaxlm.figures import best_so_far
from jaxlm.generate.engine import Generator, Request
from jaxlm.generate.sampling import Sampling
from jaxlm.hf import kept
from jaxlm.host import cluster
from jaxlm.host.console import Console
from jaxlm.host.process import cache_dir
from jaxlm.host.signals import Stopped
from jaxlm.metrics import EVALS, Clock, Writer, read
from jaxlm.sharding import replicated, rows_divide_by
from jaxlm.step import make_score
from jaxlm.tasks import RunningTasks

PROMPT_TOKENS = 24
SAMPLING = Sampling(temperature=0.8)
TOLD = ("loss", "accuracy", "margin", "divergence")  # on the console; files have all figures
PATIENCE = 10  # seconds at the end of a run for the thread of the compressors
PRIMED_LIMIT = 2**26  # characters of training text that xz is still primed with


class Observer:
    """Evaluates and samples at the steps that the recipe names; knows the last figures."""

    def __init__(
        self,
        built: Built,
        prepared: Prepared,
        console: Console,
        writer: Writer,
        clock: Clock,
        beside: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] | None = None,
    ):
        run = built.run
        self.built, self.prepared = built, prepared
        self.console, self.writer, self.clock = console, writer, clock
        self.figures: dict[str, float] = {}
        self.look_up: Callable[[], None] = lambda: None  # between the parts of an evaluation
        self.evaluated = 0  # the step of these figures
        length = run.data.length
        stride = run.eval.stride or max(length // 2, 1)
        sources = {
            source.name: held_out_source(
                source.held_out, prepared.tokenizer, length, stride, run.eval.characters
            )
            for source in prepared.sources
            if source.held_out and source.format == "text"
        }
        ways = rows_divide_by(built.mesh)
        batch = -(-run.eval.batch // ways) * ways
        self.held = HeldOut(built.scorer, sources, batch=batch, put=built.put_whole)
        self.judged = ByObjective(
            make_score(built.lm, run.method, whole=replicated(built.mesh)),
            prepared.sources if prepared.template else (),
            batch=batch,
            zeros=built.zeros,
            put=built.put_whole,
            characters=run.eval.characters,
            beside=beside or (lambda batch: {}),
        )
        tokenizer = prepared.tokenizer
        ends = {tokenizer.eos, *kept.ends(_generation(run))}
        self.template = None
        if prepared.template:
            folder = prepared.tokenizer_folder
            self.template = chat.Template(prepared.template, tokenizer, folder)
            ends |= self.template.stops
        self.generator = Generator(built.scorer, length, tokenizer.decode, ends)
        self.tasks = None
        if run.eval.tasks:
            folder = prepared.tokenizer_folder
            self.tasks = RunningTasks(built, folder, ends, self._tick_tasks)
        shares = run.eval.shares()
        self.sample_at = {max(1, math.ceil(share * run.steps)): share for share in shares}
        self._compressed: dict[str, Any] = {}
        self._thread = threading.Thread(target=self._compress_beside, daemon=True)
        if cluster.process() == 0 and sources:  # only its results are written down
            self._thread.start()

    @property
    def context(self) -> str:
        """How the context of the figures resets, in words."""
        length = self.built.run.data.length
        stride = self.built.run.eval.stride or max(length // 2, 1)
        return (
            f"Each held-out document is read on its own, in windows of {length} tokens that "
            f"advance by {stride}: beyond the first window every token is predicted from at least "
            f"{length - stride} tokens before it. The end of each document is predicted and "
            "counted too."
        )

    def compile(self, state) -> None:
        """Compiles what evaluation and sampling need, so that nothing does later."""
        params = self.built.whole(state.params, state.extras)
        if self.held.rows:
            self.held.compile(params)
        self.judged.compile(state.params, state.extras)
        if self.sample_at and (asked := list(self._asked().values())):
            self.generator.compile(params, asked, SAMPLING)

    def due(self, step: int) -> bool:
        """Whether there is something to look at after this step; the last one is for `results`."""
        looks = self._held_due(step) or self._tasks_due(step) or step in self.sample_at
        return step < self.built.run.steps and looks

    def _held_due(self, step):
        every = self.built.run.eval.every
        return bool(every and step % every == 0)

    def _tasks_due(self, step):
        every = self.built.run.eval.tasks_every
        return bool(self.tasks and every and step % every == 0)

    def figures_at(self, step: int) -> dict[str, float]:
        """The figures, if that step was evaluated."""
        return self.figures if step == self.evaluated else {}

    def look(self, step: int, state, look_up: Callable[[], None]) -> bool:
        """Whatever is due after this step; returns whether it came to its end.

        `look_up` is called between the parts of an evaluation, and raises `Stopped` where nothing
        of this step has been written down yet.
        """
        self.look_up = look_up
        try:
            self._look(step, state)
            return True
        except Stopped:
            return False
        finally:
            self.look_up = lambda: None

    def _look(self, step, state):
        begin = time.monotonic()
        scored = self.run_tasks(step, state)[0] if self._tasks_due(step) else {}
        if self._held_due(step):
            self.evaluate(step, state, scored)
        elif scored:
            self._write(step, begin, scored)
        if step in self.sample_at:
            self.sample(step, state)
        self.console.note("training")

    def evaluate(self, step: int, state, scored: dict[str, float] | None = None):
        """Scores the params, and each extra that asks for it; returns the bits of the params.

        `scored`: figures of tasks at this step, which are written down with these.
        """
        begin = time.monotonic()
        with self.clock("evaluate"):
            bits, figures = self._scored(state.params, state)
            for name, extra in self.built.run.method.extras.items():
                if extra.evaluate:
                    _, more = self._scored(state.extras[name], state)
                    figures |= {f"{name}/{k}": v for k, v in more.items()}
        self.figures, self.evaluated = figures, step
        self._write(step, begin, figures | (scored or {}))
        for line in self._said(figures):
            self.console.say(f"  step {step:,}: {line}")
        if best := self._best():
            self.console.say(f"  step {step:,}: {best}")
        return bits

    def _best(self) -> str:
        """Which checkpoint of the run's whole life `keep_best` keeps so far, in words; or ""."""
        run = self.built.run
        return best_so_far(read(run.workdir / EVALS), run.checkpoint)

    def _scored(self, params, state):
        """(bits of held-out texts, all figures) of params."""
        bits = self.held.bits(self.built.whole(params, state.extras), self._tick)
        judged = self.judged.figures(params, state.extras, self._tick)
        return bits, self.held.figures(bits) | judged

    def _said(self, figures) -> list[str]:
        """The figures in a line for all texts, and one for each other source."""
        said = [f"{k.split('/', 1)[1]} {v:.3f}" for k, v in figures.items() if k.startswith("bits")]
        lines = [f"held-out bits per character: {', '.join(said)}"] if said else []
        for source in self.prepared.sources:
            if source.held_out_rows:
                found = {
                    key.removesuffix(f"/{source.name}"): value
                    for key, value in figures.items()
                    if key.endswith(f"/{source.name}")
                }
                last = lambda key: key.rpartition("/")[2]
                shown = [key for name in TOLD for key in found if last(key) == name]
                said = [f"{last(k)} {found[k]:.3f}" for k in shown]
                lines.append(f"held-out {source.name}: {', '.join(said)}")
        return lines

    def run_tasks(self, step: int, state) -> tuple[dict[str, float], dict[str, Any]]:
        """Figures of the tasks, and lm-eval's results; none where it cannot be done, with why."""
        assert self.tasks
        try:
            with self.clock("evaluate"):
                params = self.built.whole(state.params, state.extras)
                results = self.tasks.results(params, writer=cluster.process() == 0)
        except ValueError as error:  # of one request among many: no reason to end a run
            self.console.warn(f"step {step:,}: the tasks could not be evaluated: {error}")
            return {}, {}
        figures = tasks.figures(results)
        said = [f"{k.removeprefix('task/')} {v:.3f}" for k, v in figures.items()]
        self.console.say(f"  step {step:,}: tasks: {', '.join(said)}")
        return figures, results

    def _write(self, step, begin, figures):
        run = self.built.run
        self.writer.evaluation(
            {
                "step": step,
                "tokens": step * run.tokens_per_step,
                "seconds": time.monotonic() - begin,
                **figures,
            }
        )

    def sample(self, step: int, state) -> list[dict[str, Any]]:
        """Continues a held-out prompt of each source; the same prompt and seed every time."""
        written = []
        with self.clock("sample"):
            self.console.note("writing continuations")
            asked = self._asked()
            params = self.built.whole(state.params, state.extras)
            found = self.generator(params, list(asked.values()), SAMPLING)
            for (name, request), result in zip(asked.items(), found, strict=True):
                record = {
                    "step": step,
                    "fraction": self.sample_at.get(step, step / self.built.run.steps),
                    "source": name,
                    "prompt": self._shown(name, request),
                    "text": result.text,
                }
                self.writer.sample(record)
                written.append(record)
        return written

    def _asked(self) -> dict[str, Request]:
        """The prompt of each source."""
        run, asked = self.built.run, {}
        for name, source in self.held.sources.items():
            long = [ids for ids in source.ids if len(ids) > 4 * PROMPT_TOKENS] or source.ids
            prompt = list(long[0][: min(PROMPT_TOKENS + 1, run.data.length)])
            asked[name] = Request(prompt, run.eval.sample_tokens, run.seed)
        for source in self.prepared.sources:
            if source.held_out_rows and (prompt := self._question(source)):
                asked[source.name] = Request(prompt, run.eval.sample_tokens, run.seed)
        return asked

    def _question(self, source) -> list[int]:
        """The first held-out prompt that leaves room for an answer, as the template asks it."""
        assert self.template
        length = self.built.run.data.length
        room = min(self.built.run.eval.sample_tokens, length // 2)
        return first_question(source.held_out[:100], self.template, length - room)

    def _shown(self, name, request) -> str:
        first = 1 if request.ids[0] == self.prepared.tokenizer.bos else 0
        return self.prepared.tokenizer.decode(request.ids[first:])

    def results(self, state, began: float) -> dict[str, Any]:
        """The last evaluation and samples, next to the compressors."""
        run = self.built.run
        scored, found = self.run_tasks(run.steps, state) if self.tasks else ({}, {})
        bits = self.evaluate(run.steps, state, scored)
        samples = self.sample(run.steps, state) if run.steps in self.sample_at else []
        self.console.note("waiting for xz")
        with self.clock("compressors"):
            self._wait_for_compressors()
        per_char = {
            k.removeprefix("bits_per_char/"): v
            for k, v in self.figures.items()
            if k.startswith("bits_per_char/")
        }
        return {
            "bits_per_char": per_char,
            "model_per_file": per_char,  # its context resets between documents anyway
            **self._compressed,
            "context": self.context,
            "figures": {k: v for k, v in self.figures.items() if math.isfinite(v)},
            "documents": self.held.documents(bits),
            "passages": self.held.passages(bits, self.prepared.tokenizer),
            "samples": samples,
            "best": self._best(),
            **({"tasks": found} if found else {}),
            "steps": run.steps,
            "tokens": run.steps * run.tokens_per_step,
            "seconds": time.time() - began,
        }

    def _tick_tasks(self, done, total):
        self.look_up()
        self.console.note(f"running tasks, request {done:,} of {total:,}")

    def _tick(self, done, total):
        self.look_up()
        self.console.note(f"scoring held-out text, row {done:,} of {total:,}")

    def _wait_for_compressors(self):
        """Where others keep the thread of lowest priority from running, it is done here instead."""
        if self._thread.ident:
            self._thread.join(PATIENCE)
            if self._thread.is_alive():
                self._compress()

    def _compress_beside(self):
        with contextlib.suppress(OSError, AttributeError):  # Linux: of this thread alone
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
        self._compress()

    def _compress(self):
        """Fills in the compressors' figures, from the cache if they are there."""
        name = f"{self.prepared.hash[:24]}-{self.built.run.eval.characters}-2.json"
        path = cache_dir() / "compressors" / name
        try:
            self._compressed = json.loads(path.read_text())
        except (OSError, ValueError):
            self._compressed = compressor_table(self.held.sources, self._seen)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(self._compressed))

    def _seen(self, name):
        """What the model trained on of this source; "" if that is too much to prime xz with."""
        source = next(s for s in self.prepared.sources if s.name == name)
        return training_text(self.prepared, source) if source.characters <= PRIMED_LIMIT else ""


def _generation(run) -> dict[str, Any]:
    """What the Hugging Face model that a run began with says of the ends of texts; {} for none."""
    began = kept.read(run.workdir)
    if run.init.hf and not began:
        began = kept.of_hf(Path(run.init.hf).expanduser(), run.model)
    return kept.of_generation(began.generation, began.hf) if began else {}


def first_question(documents: Iterable[Document], template: chat.Template, most: int) -> list[int]:
    """The tokens of the first prompt that has at most so many; [] where there is none."""
    for document in documents:
        # What the template refuses was counted when the records were made, and is none of them.
        with contextlib.suppress(Malformed):
            ids = template.prompt(messages_before_answer(json.loads(document.text)))
            if len(ids) <= most:
                return ids
    return []


def training_text(prepared: Prepared, source) -> str:
    """The text of a source's records, put together from their targets again."""
    stored = Reader(source.records).read(range(source.rows))
    rows = pack.from_bytes(stored, source.length, np.dtype(source.dtype))
    # The first token of a row is the last of the one before.
    return prepared.tokenizer.decode(rows.tokens[:, 1:][rows.target[:, 1:]].tolist())
