"""What all benchmarks share: a table with ratios, and a result file that says where it came from."""

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

from rich.console import Console
from rich.table import Table

from twostroke.engine.scheduler import Chunk
from twostroke.engine.scheduler import Sequence as Sequence_
from twostroke.kv.keys import root_key
from twostroke.kv.pool import Lease, Pool
from twostroke.messages import Request, Sampling

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One measure against one reference of the same run. ``ratio`` is measured / reference, of the medians."""

    what: str
    unit: str
    measured: float
    spread: str  # lowest – highest
    reference: float
    against: str
    goal: str

    @property
    def ratio(self) -> float:
        """Measured / reference."""
        return self.measured / self.reference


def row(what: str, unit: str, ours: Sequence[float], theirs: Sequence[float], against: str, goal: str) -> Row:
    """Compare medians of repeats that were taken in turn."""
    spread = f"{min(ours):.3g} – {max(ours):.3g}"
    return Row(what, unit, statistics.median(ours), spread, statistics.median(theirs), against, goal)


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def report(name: str, rows: Sequence[Row], section: str = "", /, **settings: object) -> None:
    """Print the table and write ``results/<name>.json``, or one ``section`` of it: what others say there stays."""
    table = Table(
        "measure",
        "unit",
        "median",
        "lowest – highest",
        "reference",
        "against",
        "ratio",
        "goal",
        title=f"{name} {section}",
    )
    for one in rows:
        table.add_row(
            one.what, one.unit, f"{one.measured:.4g}", one.spread, f"{one.reference:.4g}", one.against,
            f"{one.ratio:.3f}", one.goal,
        )  # fmt: skip
    Console(width=170).print(table)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    found = {"machine": machine(), "settings": settings, "rows": [asdict(one) for one in rows]}
    if section:
        known = json.loads(path.read_text()).get("sections", {}) if path.exists() else {}
        found = {"sections": {**known, section: found}}
    path.write_text(json.dumps({"benchmark": name, **found}, indent=1, ensure_ascii=False) + "\n")


def filling(slots: Sequence[int], block: int) -> Chunk:
    """The last token of a sequence that fills these slots, to compute a step of."""
    one = Sequence_(Request("r/0/0", [0] * (len(slots) * block), Sampling(1, 0)), root_key("", ""))
    one.lease = Lease(Pool(1))
    one.lease.slots = list(slots)
    return Chunk(one, len(slots) * block - 1, 1, samples=True)


def machine() -> dict[str, str]:
    """Where and with what this was measured."""
    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    flags = next((line for line in _lines("/proc/cpuinfo") if line.startswith("flags")), "")
    return {
        "cpu": cpu,
        "cores": str(sum(line.startswith("processor") for line in _lines("/proc/cpuinfo"))),
        "bf16": " ".join(flag for flag in ("avx512_bf16", "amx_bf16") if f" {flag}" in flags) or "none",
        "python": platform.python_version(),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "commit": commit.stdout.strip(),
        "command": " ".join(["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines()
