"""What a run says: numbered phases, one live line, warnings, tables; and the same in `train.log`.

On a terminal the last line is live (spinner or progress bar, redrawn in place at most ten times a
second). Piped and CI output, and the log, get plain lines instead, one at most every `PLAIN_EVERY`
seconds. One thread draws both, so a phase is never silent for 5 seconds while something compiles,
and `progress` costs the training loop a few microseconds. Standard library only: imported before
JAX, and the bars of tqdm and rich write no plain lines for a log and no heartbeat.

Honoured: NO_COLOR, CLICOLOR_FORCE, TERM=dumb, CI, ASCII locales, closed stdout, resized terminals.
"""

import atexit
import contextlib
import sys
import threading
import time
from pathlib import Path

from jaxlm.host.progress import Progress
from jaxlm.host.terminal import (
    columns,
    duration,
    encodable,
    is_terminal,
    point_at_nothing,
    table_lines,
    visible,
    wants_color,
)

PLAIN_EVERY = 4.0  # seconds between plain lines
PATIENT_AFTER = 900.0  # seconds into a phase after which a plain line every PATIENT_EVERY will do
PATIENT_EVERY = 20.0
REDRAW_EVERY = 0.1

STYLES = {"phase": "1", "dim": "2", "warning": "33", "error": "31"}  # SGR codes


class Console:
    """The only writer to stdout in a run; `quiet`, in processes other than 0, it says nothing."""

    def __init__(self, log_path: Path | str | None = None, stream=None, quiet: bool = False):
        self.stream = sys.stdout if stream is None else stream
        self.quiet = quiet
        self.warnings: dict[str, int] = {}  # text -> how often
        self.live = is_terminal(self.stream) and not quiet
        self.color = wants_color(self.live)
        self._log, self._backlog = None, []  # lines said before the log has a place
        self._lock = threading.RLock()  # re-entrant: a signal handler may talk too
        self._thread, self._stop = None, threading.Event()
        self._phase = Progress("")
        self._said = time.monotonic()  # when the last plain line was written
        self._drawn = False  # a live line is on the screen
        self._tell, self._repeated = None, 0
        if log_path is not None:
            self.log_to(log_path)
        atexit.register(self.close)  # a thread that writes during shutdown would abort Python

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if error is not None and not isinstance(error, GeneratorExit):
            self._write_log(f"stopped by {kind.__name__}: {error}")
        self.close()

    def log_to(self, path: Path | str) -> None:
        """Appends everything said, earlier lines included, to this file."""
        if self.quiet:
            return
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with self._lock:
            self._log = open(path, "a", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
            backlog, self._backlog = self._backlog, []
            for line in backlog:
                self._write_log(line)

    @contextlib.contextmanager
    def phase(self, number: int, of: int, name: str, text: str):
        """Prints `[2/6] data: building the corpora`, keeps a heartbeat, prints the time it took."""
        self._emit(f"[{number}/{of}] {name}: {text}", "phase")
        outer, phase = self._phase, Progress(text or name)
        self._set_phase(phase)
        try:
            yield phase
            if phase.news:
                self._emit(phase.line(), "dim")
            self._emit(
                f"  {name} took {duration(time.monotonic() - phase.start, fine=True)}", "dim"
            )
        finally:
            self._set_phase(outer)

    def note(self, text: str) -> None:
        """What the heartbeat says is going on from now on, for example "compiling"."""
        with self._lock:
            self._phase.doing, self._phase.since = text, time.monotonic()

    def progress(self, done: int, total: int, note: str = "", unit: str = "step", **fields) -> None:
        """Moves the bar of this phase. `total` 0 = unknown; fields are floats or strings.

        Fields known by name are written with their units (`FIELDS`); others as `name value`.
        """
        with self._lock:
            self._phase.move(done, total, note, unit, fields)

    def say(self, text: str = "") -> None:
        """Prints a line or several."""
        self._emit(text)

    def warn(self, text: str) -> None:
        """Prints a warning; `close` repeats each once, and `on_warning` sends it on."""
        first = text not in self.warnings
        self.warnings[text] = self.warnings.get(text, 0) + 1
        if first:
            self._emit(f"warning: {text}", "warning")
            if self._tell:
                self._tell(text)

    def on_warning(self, tell) -> None:
        """Calls `tell(text)` for each warning, those given already included."""
        self._tell = tell
        for text in self.warnings:
            tell(text)

    def error(self, text: str) -> None:
        """Prints an error."""
        self._emit(f"error: {text}", "error")

    def error_in_log(self, text: str) -> None:
        """Writes an error to the log only; from any thread, when the process is about to end."""
        self._write_log(f"error: {text}")

    def table(self, rows, header=()) -> None:
        """Prints rows with aligned columns, numbers to the right."""
        for at, line in enumerate(table_lines(rows, header)):
            self._emit(line, "phase" if header and at == 0 else "")

    def repeat_warnings(self) -> None:
        """Prints the warnings that were given since the last repetition, together."""
        new = list(self.warnings.items())[self._repeated :]
        self._repeated = len(self.warnings)
        if new:
            self._emit(f"{len(new)} warning{'s' * (len(new) > 1)} in this run:", "warning")
            for text, times in new:
                self._emit(f"  - {text}" + f" ({times} times)" * (times > 1), "warning")

    def close(self) -> None:
        """Repeats the warnings and stops the heartbeat. May be called twice."""
        atexit.unregister(self.close)
        self._stop.set()
        if self._thread and self._thread is not threading.current_thread():
            self._thread.join(timeout=1)
        self._thread = None
        self.repeat_warnings()
        with self._lock:
            self._erase()
            if self._log:
                self._log.close()
            self._log = None

    # Drawing. Everything below runs under the lock.

    def _set_phase(self, phase):
        with self._lock:
            self._erase()
            self._phase = phase
            if phase.doing and not self._thread and not self.quiet:
                self._stop.clear()
                self._thread = threading.Thread(target=self._beat, daemon=True, name="console")
                self._thread.start()

    def _beat(self):
        while not self._stop.wait(REDRAW_EVERY):
            with self._lock:
                phase, now = self._phase, time.monotonic()
                if not phase.doing:
                    continue
                every = PLAIN_EVERY if now - phase.start < PATIENT_AFTER else PATIENT_EVERY
                if now - self._said >= every:
                    self._plain(phase.line() if phase.news else phase.still(now))
                    phase.news = False
                if self.live:
                    self._draw(phase.live_line(columns(self.stream) - 1, now))

    def _emit(self, text, style=""):
        if self.quiet:
            return
        with self._lock:
            self._erase()
            for line in visible(text).split("\n"):
                self._write(self._styled(line, style) + "\n")
                self._write_log(line)
            self._said = time.monotonic()

    def _plain(self, line):
        if not self.live:
            self._write(self._styled(line, "dim") + "\n")
        self._write_log(line)
        self._said = time.monotonic()

    def _draw(self, line):
        # Without automatic wrapping a line that is too long stays one line, also after a resize.
        self._write(f"\r\x1b[K\x1b[?7l{visible(line)}\x1b[?7h")
        self._drawn = True

    def _erase(self):
        if self._drawn:
            self._write("\r\x1b[K")
        self._drawn = False

    def _styled(self, line, style):
        return f"\x1b[{STYLES[style]}m{line}\x1b[0m" if self.color and style and line else line

    def _write(self, text):
        if self.stream is None or self.quiet:
            return
        try:
            with contextlib.suppress(RuntimeError):  # a signal handler spoke during a write
                self.stream.write(encodable(text, self.stream))
                self.stream.flush()
        except (OSError, ValueError):  # the reader of the pipe has gone, or stdout is closed
            point_at_nothing(self.stream)
            self.stream, self.live = None, False

    def _write_log(self, line):
        if self._log is None:
            if not self.quiet and len(self._backlog) < 10_000:
                self._backlog.append(line)
            return
        try:
            self._log.write(line + "\n")
            self._log.flush()
        except (OSError, ValueError) as error:
            name, self._log = self._log.name, None
            self._write(f"warning: {name} is not written any more: {error}\n")
