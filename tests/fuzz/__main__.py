"""`make fuzz`: damaged files of every format by the ten thousand, and a table of what came of them."""

import argparse
import faulthandler
import multiprocessing
import os
import sys
from collections import Counter
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from fuzz.campaign import Failure, timed_run
from fuzz.formats import FORMATS

from longrope_jax.report.tables import markdown_table

_STEP = 2500  # inputs that a process reads in one go


def main() -> None:
    """Exit status 1 if any input was neither read nor refused in words that name its file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=20_000, help="of every format")
    parser.add_argument("--first", type=int, default=0, help="number of the first one, to see a failure again")
    parser.add_argument("--formats", nargs="*", default=list(FORMATS), choices=list(FORMATS), metavar="FORMAT")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="at the same time; one a core")
    options = parser.parse_args()
    last = options.first + options.inputs
    parts = [range(first, min(first + _STEP, last)) for first in range(options.first, last, _STEP)]
    spawning = multiprocessing.get_context("spawn")  # JAX has threads, which a fork would lose
    rows, is_sound = [], True
    with ProcessPoolExecutor(options.processes, spawning, initializer=faulthandler.enable) as pool:
        begun = {name: [pool.submit(timed_run, name, part) for part in parts] for name in options.formats}
        for name, results in begun.items():
            try:
                counts, failures, seconds = _together(name, parts, results)
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)  # or it would be told when all the others have ended
                raise
            cells = [options.inputs, counts["read"], counts["refused"], len(failures), f"{seconds:.0f}"]
            rows.append([name, *map(str, cells)])
            print(f"{name}: {dict(counts)}, {len(failures)} failures, {seconds:.0f} s", flush=True)
            for failure in failures[:20]:
                print(f"  {failure.number}: {failure.why}", flush=True)
            is_sound = is_sound and not failures
    print(markdown_table(["format", "inputs", "read", "refused", "failures", "seconds of a core"], rows))
    sys.exit(0 if is_sound else 1)


def _together(name: str, parts: list[range], results: list[Future]) -> tuple[Counter, list[Failure], float]:
    counts, failures, seconds = Counter(), [], 0.0
    for part, result in zip(parts, results, strict=True):
        try:
            found, wrong, spent = result.result()
        except BrokenProcessPool:
            sys.exit(
                f"a process died at {name} {part.start} to {part.stop - 1}, or at what the others were reading; see "
                f"with --formats '{name}' --first={part.start} --inputs={len(part)} --processes=1"
            )
        counts, failures, seconds = counts + found, failures + wrong, seconds + spent
    return counts, failures, seconds


if __name__ == "__main__":
    main()
