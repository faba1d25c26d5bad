"""`make fuzz`: damaged files of every format by the ten thousand, and a table of what came of them."""

import argparse
import faulthandler
import sys
import time

from fuzz.campaign import run
from fuzz.readers import FORMATS

from longrope_jax.markdown import table

_STEP = 1000


def main() -> None:
    """Exit status 1 if any input was neither read nor refused in words that name its file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=20_000, help="of every format")
    parser.add_argument("--first", type=int, default=0, help="number of the first one, to see a failure again")
    parser.add_argument("--formats", nargs="*", default=list(FORMATS), choices=list(FORMATS), metavar="FORMAT")
    options = parser.parse_args()
    rows, all_failures = [], []
    for name in options.formats:
        began, counts, failures = time.monotonic(), {"read": 0, "refused": 0}, []
        for first in range(options.first, options.first + options.inputs, _STEP):
            faulthandler.dump_traceback_later(3600, exit=True)  # a hang outside of Python
            found, wrong = run(name, range(first, min(first + _STEP, options.first + options.inputs)))
            counts = {kind: counts[kind] + found[kind] for kind in counts}
            failures += wrong
        faulthandler.cancel_dump_traceback_later()
        seconds = f"{time.monotonic() - began:.0f}"
        rows.append(
            [name, str(options.inputs), str(counts["read"]), str(counts["refused"]), str(len(failures)), seconds]
        )
        print(f"{name}: {counts}, {len(failures)} failures, {seconds} s", flush=True)
        for failure in failures[:20]:
            print(f"  {failure.number}: {failure.why}", flush=True)
        all_failures += failures
    print(table(["format", "inputs", "read", "refused", "failures", "seconds"], rows))
    sys.exit(1 if all_failures else 0)


if __name__ == "__main__":
    main()
