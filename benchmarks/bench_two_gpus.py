"""Co-located against disaggregated on two GPUs, random weights: the reference workload, and long outputs at rising
rates.

    python -m benchmarks.bench_two_gpus [--shape Qwen2.5-7B] [--load reference|long] [--schemes a,b] [--publish-only]

Measures into ``build/two_gpus``, where it goes on if it was interrupted, keeps report, charts, and how each scheme
compares with two co-located workers in ``benchmarks/results/two_gpus``, and of the reference workload the runs too.
With the defaults some ten minutes for five schemes; the long outputs of two take four.
"""

import argparse
import shutil
import subprocess
import sys
from pathlib import Path

from benchmarks.bench_quick import ROOT, keep
from benchmarks.common import RESULTS, Row, report, row
from benchmarks.shapes import SHAPES, shape
from twostroke.bench import results
from twostroke.bench.folder import read_metadata

SCHEMES = {"reference": "colocated,pd,pd-serial,offload,pd-store", "long": "colocated,pd"}
LOADS = {
    "reference": ["--input-lens", "1000,10000,20000,50000", "--prompt-tokens", "800000"],
    "long": [
        *("--input-lens", "2000", "--output-len", "500", "--request-rate", "8,16,24,32"),
        *("--goodput", "ttft:2000", "tpot:40"),
    ],
}
BASE = "colocated"
FIGURES = (("ttft", "p50"), ("ttft", "p99"), ("tpot", "p50"), ("itl", "p99"))
CHARTS = {"reference": ("pd-waterfall", "pd-itl"), "long": ("pd-goodput", "pd-itl")}


def compared(measured: Path) -> list[Row]:
    """Every run of a scheme beside that of the base."""
    files = sorted((measured / "runs").glob("*.json"))
    runs = [results.from_json(file.read_bytes(), file.name) for file in files]
    bases = {(run.point.workload, run.point.rate): run for run in runs if run.point.scheme == BASE}
    rows = []
    for run in sorted(runs, key=lambda run: (run.point.scheme, run.point.length or 0, run.point.rate)):
        base = bases.get((run.point.workload, run.point.rate))
        if base is None or base is run:
            continue
        what = f"{run.point.scheme}, {run.point.workload} tokens at {run.point.rate:g} a second"
        for figure, which in FIGURES:
            ours, theirs = getattr(run.stats[figure], which), getattr(base.stats[figure], which)
            rows.append(row(f"{what}: {figure} {which}", "ms", [ours], [theirs], BASE, ""))
        both = [run.total_token_throughput], [base.total_token_throughput]
        rows.append(row(f"{what}: throughput", "tokens/s", *both, BASE, ""))
        if run.attained is not None and base.attained is not None:
            rows.append(row(f"{what}: good requests", "share", [run.attained], [base.attained], BASE, ""))
    return rows


def main() -> None:
    """Measure, unless only to publish; publish where there is a report."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", default="Qwen2.5-7B", choices=SHAPES)
    parser.add_argument("--load", default="reference", choices=LOADS)
    parser.add_argument("--schemes")
    parser.add_argument("--publish-only", action="store_true")
    asked = parser.parse_args()
    name = f"{asked.shape}-{asked.load}"
    measured = ROOT / "build" / "two_gpus" / name
    if not asked.publish_only:
        model = shape(asked.shape, ROOT / "build" / "shapes" / asked.shape)
        command = [sys.executable, "-m", "twostroke", "bench", "run", str(model), "--output", str(measured)]
        command += ["--preset", "reference", "--schemes", asked.schemes or SCHEMES[asked.load], *LOADS[asked.load]]
        command += ["--scheme-file", str(Path(__file__).with_name("schemes_cuda.toml")), "--up", "--load-format dummy"]
        done = subprocess.run(command, check=False)
        if done.returncode:
            sys.exit(f"not everything was measured ({done.returncode}); the same command goes on from there")
    subprocess.run([sys.executable, "-m", "twostroke", "bench", "report", str(measured), "--base", BASE], check=True)
    keep(measured, RESULTS / "two_gpus" / name, CHARTS[asked.load])
    if asked.load == "long":
        shutil.rmtree(RESULTS / "two_gpus" / name / "runs")
    report(f"two_gpus_{name}", compared(measured), measured_on=read_metadata(measured).machine)


if __name__ == "__main__":
    main()
