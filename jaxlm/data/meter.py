"""Tells a callback how far the work is, often enough that nobody wonders."""

import concurrent.futures
import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

from jaxlm.data.documents import Progress

T = TypeVar("T")


def throttled(progress: Progress | None, seconds: float = 0.1) -> Progress:
    """Lets a call through that says something new, or when the last one is `seconds` ago."""
    last, said = 0.0, ""

    def report(done: int, total: int, note: str) -> None:
        nonlocal last, said
        now = time.monotonic()
        if progress and (note != said or now - last >= seconds or 0 < total <= done):
            last, said = now, note
            progress(done, total, note)

    return report


class Meter:
    """A count that is reported as it grows; total 0 = unknown."""

    def __init__(self, report: Progress, note: str, total: int = 0):
        self._report, self._note, self._total, self._done = report, note, total, 0

    def add(self, amount: int) -> None:
        self._done += amount
        if self._total:  # an estimate: never past the end, never at the end before it is
            self._report(min(self._done, self._total - 1), self._total, self._note)
        else:
            self._report(0, 0, self._note)

    def wait(self, future: "concurrent.futures.Future[T]") -> T:
        """The future's result; meanwhile reports twice a second."""
        self.add(0)
        while True:
            try:
                return future.result(timeout=0.5)
            except TimeoutError:
                if future.done():
                    raise
                self.add(0)

    def end(self, note: str) -> None:
        total = max(self._total, self._done, 1)
        self._report(total, total, note)


@contextlib.contextmanager
def one_thread() -> Iterator[concurrent.futures.Executor]:
    """A pool of one thread; who leaves by an exception (Ctrl-C, say) does not wait for it."""
    pool = concurrent.futures.ThreadPoolExecutor(1)
    try:
        yield pool
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()


def while_reporting(work: Callable[[], T], report: Progress, note: str) -> T:
    """Runs `work` in a thread, so that this one can say that it goes on."""
    with one_thread() as pool:
        return Meter(report, note).wait(pool.submit(work))
