"""Runs every benchmark in a few minutes as ratios in one table; compares two such tables.

make bench                                          runs them, and writes runs/bench/COMMIT.json
make bench BEFORE=runs/bench/COMMIT.json            and compares with another commit
python experiments/benchmarks/bench.py --compare BEFORE.json AFTER.json

Competitors take turns within one process, and a ratio compares medians. So ratios are stable on a busy machine where
seconds are not. Every benchmark runs in its own process: `ratios()` of a file here. The file's command prints more.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

from longrope_jax.report.tables import markdown_table

FOLDER = Path(__file__).parent
ROOT = FOLDER.parent.parent
PARITY = ROOT / ".venv-parity" / "bin" / "python"
BENCHMARKS = ("attention", "rotation", "gradient", "decode", "ring", "loading", "versus_pytorch")
PACKAGES = ("jax", "jaxlib", "flax", "numpy", "orbax-checkpoint")
WORTH_A_LOOK = 1.25  # by how much a ratio has to change to be marked: less is noise where others use the machine too


def measure(name: str) -> list[dict]:
    """The ratios of one benchmark; in place of them a reason why there are none."""
    python = Path(sys.executable)
    if name == "versus_pytorch":
        if not PARITY.exists():
            return [{"case": name, "missing": "not installed: make parity"}]
        python = PARITY
    program = f"import json, {name}; print(json.dumps([ratio._asdict() for ratio in {name}.ratios()]))"
    done = subprocess.run([python, "-c", program], cwd=FOLDER, capture_output=True, text=True)
    if done.returncode:
        return [{"case": name, "failed": (done.stderr.strip().splitlines() or ["no output"])[-1]}]
    return [{**ratio, "case": f"{name}: {ratio['case']}"} for ratio in json.loads(done.stdout.splitlines()[-1])]


def machine() -> dict:
    """Where and with what this was measured."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    models = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "commit": commit.stdout.strip() or "unknown",
        "when": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "processor": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def describe(entry: dict) -> str:
    """A ratio, or why there is none."""
    return entry.get("missing") or entry.get("failed") or f"{entry['ratio']:.3g}"


def summary(results: list[dict]) -> str:
    """The table of one run."""
    rows = [[entry["case"], describe(entry), entry.get("against", ""), entry.get("better", "")] for entry in results]
    return markdown_table(["benchmark", "ratio", "of what", "better"], rows)


def changes(before: dict, after: dict) -> str:
    """The table of two runs; what has changed by more than noise usually does is marked."""
    old = {entry["case"]: entry for entry in before["ratios"]}
    rows = []
    for entry in after["ratios"]:
        case, mark = entry["case"], ""
        if "ratio" in entry and "ratio" in old.get(case, {}):
            factor = entry["ratio"] / old[case]["ratio"]
            factor = factor if entry["better"] == "higher" else 1 / factor
            mark = f"{factor:.2f}" + (
                " better" if factor > WORTH_A_LOOK else " worse" if factor < 1 / WORTH_A_LOOK else ""
            )
        rows.append([case, describe(old[case]) if case in old else "new", describe(entry), mark])
    rows += [
        [case, describe(old[case]), "gone", ""]
        for case in old
        if case not in {entry["case"] for entry in after["ratios"]}
    ]
    differing = [
        f"{key}: {before['machine'].get(key)} before, {value} after"
        for key, value in after["machine"].items()
        if before["machine"].get(key) != value and key not in ("when", "load")
    ]
    header = ["benchmark", before["machine"]["commit"], after["machine"]["commit"], "times as good"]
    return markdown_table(header, rows) + "".join(f"{line}\n" for line in differing)


def read(path: Path) -> dict:
    """What an earlier run wrote; ends the program with one line where it is no such file."""
    try:
        content = json.loads(path.read_text())
        assert content["machine"]["commit"] and isinstance(content["ratios"], list)
        return content
    except (OSError, ValueError, LookupError, TypeError, AssertionError) as error:
        sys.exit(f"error: {path} is not what `make bench` writes: {error!r}")


def main() -> None:
    """Runs and writes, or compares."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("BEFORE", "AFTER"), help="files of two runs")
    parser.add_argument("--before", type=Path, help="the file of an earlier run, to compare this one with")
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=BENCHMARKS, help="not all benchmarks")
    options = parser.parse_args()
    if options.compare:
        print(changes(*map(read, options.compare)))
        return
    before = read(options.before) if options.before else None
    content = {"machine": machine(), "ratios": []}
    for name in options.only:
        began = time.monotonic()
        content["ratios"] += measure(name)
        print(f"{name}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
    path = ROOT / "runs" / "bench" / f"{content['machine']['commit']}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(summary(content["ratios"]) + f"written to {path.relative_to(ROOT)}")
    if before:
        print("\n" + changes(before, content))
    sys.exit(any("failed" in entry for entry in content["ratios"]))


if __name__ == "__main__":
    main()
