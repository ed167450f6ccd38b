"""From what the steps return to what is written down and said.

The loop hands over each step's metrics as they are, still on the device; every so often they are
fetched together, so that the loop never waits for one number.
"""

import math
import time
from typing import Any

import jax

from jaxlm.host.console import Console
from jaxlm.metrics import Clock, Writer

FETCH_SECONDS = 1.0  # between fetches, at most
PATIENCE_STEPS = 50  # after so many steps a slow machine is told how long it will take


class Journal:
    """Buffers metrics, writes `metrics.jsonl`, moves the progress bar, guards the run."""

    def __init__(
        self,
        console: Console,
        writer: Writer,
        clock: Clock,
        *,
        start: int,
        steps: int,
        every: int,
        tokens_per_step: int,
        chars_per_token,
        flops_per_step: float,
        peak_flops_of_all: float,  # devices
        learning_rates,
        minutes: float,
        weights,
    ):
        self.console, self.writer, self.clock = console, writer, clock
        self.start, self.steps, self.every, self.minutes = start, steps, every, minutes
        self.tokens_per_step, self.chars_per_token = tokens_per_step, chars_per_token
        self.flops_per_step, self.peak_flops_of_all = flops_per_step, peak_flops_of_all
        self.learning_rates, self.weights = learning_rates, weights
        # What the run decides by changes at steps that no clock chooses: the same in all processes.
        self.skipped_in_row, self._worst = 0, 0  # updates, at most, in the last `every` steps
        self.skipping = False  # whether the last update that was fetched was skipped
        self._pending: list[tuple[int, dict[str, Any]]] = []
        self._since = time.monotonic()
        self._fastest = float("inf")  # seconds a step
        self._patient = True

    def step(self, step: int, metrics: dict[str, Any]) -> None:
        """Takes the metrics of the step that was just dispatched."""
        self._pending.append((step, metrics))
        due = time.monotonic() - self._since >= FETCH_SECONDS
        judge = step % self.every == 0
        if due or judge or step == self.start + 1:
            self.fetch()
        if judge:
            self.skipped_in_row, self._worst = self._worst, 0

    def fetch(self) -> None:
        """Waits for all steps handed over, and writes their lines."""
        if not self._pending:
            return
        with self.clock("train_step"):
            fetched = jax.device_get([metrics for _, metrics in self._pending])
        numbers = [step for step, _ in self._pending]
        self._pending = []
        now = time.monotonic()
        seconds = max((now - self._since) / len(numbers), 1e-9)
        self._since = now
        self._fastest = min(self._fastest, seconds)
        speed = self.tokens_per_step / seconds
        lines = [
            self._line(step, metrics, speed, seconds)
            for step, metrics in zip(numbers, fetched, strict=True)
        ]
        with self.clock("log"):
            self.writer.steps(lines)
            self.tell_times(numbers[-1])
        self._worst = max(self._worst, *(int(metrics["skipped_in_row"]) for metrics in fetched))
        self.skipping = int(fetched[-1]["skipped_in_row"]) > 0
        self._say(lines[-1])

    def tell_times(self, step: int) -> None:
        """Writes down where the time has gone since the last call."""
        for kind, spent in self.clock.drain().items():
            self.writer.event(kind, spent, step)

    def pause(self):
        """Call when the loop turns to something else than training; returns `resume`."""
        begin = time.monotonic()

        def resume():
            gone = time.monotonic() - begin
            self._since += gone

        return resume

    def _line(self, step, metrics, speed, seconds):
        plain = {
            k: v.tolist() if v.ndim else float(v)  # which rows were selected; figures
            for k, v in metrics.items()
            if k != "skipped_in_row"
        }
        return {
            "step": step,
            "loss": plain.pop("loss"),
            **self._bits(step, float(metrics["loss"])),
            "tokens": step * self.tokens_per_step,
            "learning_rate": float(self.learning_rates[step - 1]),
            "tokens_per_second": speed,
            "peak_fraction": self.flops_per_step / seconds / self.peak_flops_of_all,
            "skipped": int(plain.pop("skipped")),
            **plain,
            **self.weights(step),
        }

    def _bits(self, step, loss):
        """Where the loss is that of text."""
        if not self.chars_per_token:
            return {}
        return {"bits_per_char": loss / math.log(2) / self.chars_per_token(step)}

    def _say(self, line):
        shown = ("loss", "bits_per_char", "tokens_per_second", "peak_fraction")
        fields = {k: line[k] for k in shown if k in line}
        fields |= {k.rpartition("/")[2]: v for k, v in line.items() if k.endswith("/accuracy")}
        if line["skipped"]:
            fields["skipped"] = line["skipped"]
        self.console.progress(line["step"], self.steps, **fields)
        done = line["step"] - self.start
        if self._patient and done >= PATIENCE_STEPS:
            self._patient = False
            self._warn_of_time()

    def _warn_of_time(self):
        # The fastest steps so far: the first ones share the processor with the compressors.
        total = self._fastest * (self.steps - self.start) / 60
        if self.minutes and total > 1.1 * self.minutes:
            fits = max(int(self.minutes / total * (self.steps - self.start) / 50) * 50, 50)
            self.console.warn(
                f"at this machine's speed the training takes about {total:.0f} minutes, not "
                f"{self.minutes:.0f}; to fit, stop with Ctrl-C and start with "
                f"--config.steps={fits} --config.workdir=SOME/OTHER/FOLDER (a little worse)"
            )
