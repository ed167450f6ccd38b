"""How fast text becomes records, and records become batches.

    python tools/bench_data.py --lengths=128,512,2048 --seconds=2

Prepares the two built-in corpora in a temporary folder, the tokenizer first, then reads them mixed
half and half, rows in shuffled order, the way a run does. Cores is processor time over wall time.
Target: 5M packed tokens/s per process from prepared records. Run it on an idle machine.
"""

import argparse
import pathlib
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from jaxlm.data.batches import batches
from jaxlm.data.prepare import Prepared, prepare
from jaxlm.data.sources import SourceSpec
from jaxlm.data.spec import DataSpec

SOURCES = (SourceSpec("code", "stdlib-code"), SourceSpec("prose", "stdlib-prose"))
TARGET = 5e6


def timed(work):
    """(result, seconds, cores used)."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = work()
    seconds = time.perf_counter() - wall
    return result, seconds, (time.process_time() - cpu) / seconds


def bench_prepare(lengths: list[int], folder: str) -> dict[int, Prepared]:
    """Cold for each length; the first also trains the tokenizer and reads the library."""
    prepared, spec = {}, DataSpec(SOURCES)
    print(f"\n{'preparing, length':26}{'seconds':>9}{'tokens/s':>12}{'MB text/s':>11}{'cores':>7}")
    for length in lengths:
        spec = DataSpec(SOURCES, length=length)
        found, seconds, cores = timed(lambda spec=spec: prepare(spec, folder))
        tokens = sum(source.tokens for source in found.sources)
        megabytes = sum(source.characters for source in found.sources) / 1e6
        what = f"{length}, with tokenizer" if not prepared else f"{length}"
        rate = f"{tokens / seconds:12,.0f}{megabytes / seconds:11.2f}"
        print(f"{what:26}{seconds:9.2f}{rate}{cores:7.2f}")
        prepared[length] = found
    found, seconds, _ = timed(lambda: prepare(spec, folder))
    print(f"{'found in the cache':26}{seconds:9.2f}")
    return prepared


def bench_batches(prepared: Prepared, rows: int, threads: int, seconds: float):
    """(tokens/s, microseconds a row, cores)."""
    iterator = batches(prepared, rows=rows, position=0, seed=0, threads=threads)
    for _ in range(3):
        next(iterator)

    def work() -> int:
        count, end = 0, time.perf_counter() + seconds
        while time.perf_counter() < end:
            next(iterator)
            count += 1
        return count

    count, taken, cores = timed(work)
    read = count * rows / taken
    return read * prepared.sources[0].length, 1e6 / read, cores


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--lengths", default="128,512,2048")
    parser.add_argument("--rows", default="16,64", help="rows of a batch")
    parser.add_argument("--threads", default="0,1", help="threads that read ahead")
    parser.add_argument("--seconds", type=float, default=2.0, help="per measurement")
    flags = parser.parse_args()
    numbers = {key: list(map(int, getattr(flags, key).split(","))) for key in ("rows", "threads")}
    with tempfile.TemporaryDirectory() as folder:
        prepared = bench_prepare(list(map(int, flags.lengths.split(","))), folder)
        heads = f"{'rows':>6}{'threads':>9}{'tokens/s':>14}{'µs/row':>9}{'cores':>7}"
        print(f"\n{'reading, length':16}{heads}")
        for length, found in prepared.items():
            for rows in numbers["rows"]:
                for threads in numbers["threads"]:
                    speed, each, cores = bench_batches(found, rows, threads, flags.seconds)
                    mark = "" if speed >= TARGET else "  below the target of 5M"
                    print(
                        f"{length:<16}{rows:6}{threads:9}{speed:14,.0f}{each:9.1f}{cores:7.2f}{mark}"
                    )


if __name__ == "__main__":
    main()
