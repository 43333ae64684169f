"""The quick preset over every scheme, and what the README says of it.

    python -m benchmarks.bench_quick [--repeat 2] [--schemes a,b] [--publish-only]

Measures into ``build/bench_quick`` (interrupted, it goes on there; a finished one is only published again, so remove
the folder to measure anew), copies what is worth keeping to ``benchmarks/results/bench_quick``, and rewrites the
README's part between the comments that name this script. Two repeats take some 15 minutes on two idle cores.
"""

import argparse
import gzip
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common import RESULTS
from twostroke.bench import analysis, results, sources
from twostroke.bench.analysis import Group
from twostroke.bench.charts import limits, ratios
from twostroke.bench.folder import Metadata, read_metadata
from twostroke.bench.watch import Watched

ROOT = Path(__file__).parents[1]
MEASURED, KEPT = ROOT / "build" / "bench_quick", RESULTS / "bench_quick"
CHARTS = ("pd-waterfall",)  # shown in the README
BASE = "colocated"
MOST_BYTES = 2 << 20
_PART = re.compile(r"(<!-- written by benchmarks/bench_quick\.py -->\n).*(<!-- until here -->\n)", re.DOTALL)


def measure(repeats: int, schemes: str | None, up: str) -> None:
    """Run the benchmark. What is there already is not measured again."""
    command = [sys.executable, "-m", "twostroke", "bench", "run", "--output", str(MEASURED), "--repeat", str(repeats)]
    command += ["--up", up, *(["--schemes", schemes] if schemes else [])]
    done = subprocess.run(command, check=False)
    if done.returncode:
        sys.exit(f"not everything was measured ({done.returncode}); the same command goes on from there")


def keep(measured: Path, kept: Path, charts: Sequence[str]) -> None:
    """Copy metadata, report, some charts and runs (compressed) into the results. Of repeats, only the first keeps what
    its workers said, which is what a report shows.
    """
    shutil.rmtree(kept, ignore_errors=True)
    (kept / "runs").mkdir(parents=True)
    (kept / "charts").mkdir()
    for file in sorted((measured / "runs").glob("*.json")):
        run = results.from_json(file.read_bytes(), file.name)
        if run.point.repeat:
            run.timelines, run.watched = {}, Watched()
        packed = gzip.compress(results.to_json(run), 9, mtime=0)
        (kept / "runs" / f"{file.name}.gz").write_bytes(packed)
    for name in ("metadata.json", "report.html", *(f"charts/{chart}.png" for chart in charts)):
        shutil.copy(measured / name, kept / name)
    size = sum(file.stat().st_size for file in kept.rglob("*") if file.is_file())
    print(f"{kept.relative_to(ROOT)}: {size / 2**20:.2f} MiB")
    if size > MOST_BYTES:
        print(f"that is more than {MOST_BYTES / 2**20:.0f} MiB: commit fewer repeats")


def text(found: Sequence[Group], metadata: Metadata) -> str:
    """What the README says: a table, a chart, and what limits each scheme."""
    settings, machine = metadata.settings, metadata.machine
    grid, repeats = settings.grid, max(len(group.runs) for group in found)
    failed = sum(group.failed for group in found)
    lengths = " / ".join(f"{length:,}" for length in grid.input_lens)
    longest = f"{max(grid.input_lens):,}"
    against = {group.key.scheme: ratio for group, ratio in ratios(found, BASE) if _is_longest(group, grid.input_lens)}
    rows = [
        f"| `{name}`: {scheme.about} | {_of(found, name, 'ttft', 1e-3)} | {_of(found, name, 'tpot', 1)} "
        f"| {_of(found, name, 'total_token_throughput', 1)} | {_ratios(against.get(name, {}))} |"
        for name, scheme in metadata.schemes.items()
    ]
    chart = f"![where the time went]({(KEPT / 'charts' / 'pd-waterfall.png').relative_to(ROOT)})"
    said = [f"- `{what.partition(' ')[0]}`: {why}." for what, why in limits(found)]
    report = (KEPT / "report.html").relative_to(ROOT)
    lines = [
        f"The quick preset ([report]({report}), to be opened from a checkout): {grid.num_prompts} prompts at "
        f"{grid.request_rate:g} a second, {grid.output_len} tokens each, `{settings.up.strip() or 'default options'}`, "
        f"{machine['cores']} cores of {machine['cpu']}, {str(machine['date'])[:10]}. Medians of {repeats} repeats, the "
        f"schemes in turn; {failed} requests failed. Load on the machine before: {machine['load']:.1f}.",
        "",
        f"| | TTFT, {lengths} tokens, s | TPOT, ms | tokens / s | at {longest}, over those of `{BASE}` |",
        "|---|---|---|---|---|",
        *rows,
        "",
        chart,
        "",
        f"What limits each scheme at {longest} tokens, from the measured shares:",
        "",
        *said,
        "",
    ]
    return "\n".join(lines)


def _is_longest(group: Group, lengths: Sequence[int]) -> bool:
    return group.key.workload == str(max(lengths))


def _of(found: Sequence[Group], scheme: str, figure: str, scale: float) -> str:
    values = [group.median(figure) for group in found if group.key.scheme == scheme]
    return " / ".join("-" if value is None else f"{value * scale:,.3g}" for value in values)


def _ratios(ratio: dict[str, float | None]) -> str:
    values = (ratio.get(figure) for figure in ("ttft", "tpot", "total_token_throughput"))
    return " / ".join("-" if value is None else f"{value:.2f}" for value in values)


def publish() -> None:
    """Keep the results and rewrite the README's part."""
    keep(MEASURED, KEPT, CHARTS)
    found = [group for group in analysis.groups(sources.read(KEPT)) if group.key.mode == "pd"]
    metadata = read_metadata(KEPT)
    order = list(metadata.schemes)
    found.sort(key=lambda group: order.index(group.key.scheme))
    found.sort(key=lambda group: group.place)
    readme = ROOT / "README.md"
    written, parts = _PART.subn(lambda match: match[1] + text(found, metadata) + match[2], readme.read_text())
    assert parts == 1, "the README has the two comments once"
    readme.write_text(written)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=2)
    parser.add_argument("--schemes")
    parser.add_argument("--up", default="--dtype float32", help="more arguments of `twostroke up`")
    parser.add_argument("--publish-only", action="store_true")
    asked = parser.parse_args()
    if not asked.publish_only:
        measure(asked.repeat, asked.schemes, asked.up)
    publish()
