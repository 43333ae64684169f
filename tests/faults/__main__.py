"""``make faults``: plays every row of the matrix many times and prints the table of outcomes.

``python -m tests.faults [--repeat 100] [--only WORD] [--json FILE]``; the exit status is 1 if a promise was broken.
"""

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from tests.faults.fleet import Fleets
from tests.faults.matrix import ROWS
from tests.faults.stage import Outcome, Row


@dataclass
class Tally:
    """All runs of a row."""

    row: Row
    outcomes: list[Outcome] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)  # what was, in each run that broke a promise

    @property
    def runs(self) -> int:
        return len(self.outcomes) + len(self.broken)

    def seconds(self, what: str) -> list[float]:
        return [second for outcome in self.outcomes for second in getattr(outcome, what)]

    def summary(self) -> dict[str, object]:
        """For the results file."""
        return {
            "fault": self.row.fault,
            "promise": self.row.promise,
            "runs": self.runs,
            "kept": len(self.outcomes),
            "exact_answers": sum(outcome.exact for outcome in self.outcomes),
            "explicit_errors": sum(outcome.errors for outcome in self.outcomes),
            "added_seconds": _spread(self.seconds("added")),
            "freed_seconds": _spread(self.seconds("freed")),
            "broken": sorted(set(self.broken)),
        }


def _spread(seconds: list[float]) -> dict[str, float] | None:
    if not seconds:
        return None
    return {"p50": round(statistics.median(seconds), 3), "max": round(max(seconds), 3)}


def _table(tallies: list[Tally]) -> Table:
    table = Table(title="Fault matrix")
    for name in ("fault", "promised", "kept", "exact", "errors", "added s (p50, max)", "freed s (p50, max)"):
        table.add_column(name, justify="left" if name in ("fault", "promised") else "right")
    for tally in tallies:
        spreads = [_spread(tally.seconds(what)) for what in ("added", "freed")]
        table.add_row(
            tally.row.fault,
            tally.row.promise,
            f"{len(tally.outcomes)}/{tally.runs}",
            str(sum(outcome.exact for outcome in tally.outcomes)),
            str(sum(outcome.errors for outcome in tally.outcomes)),
            *(f"{spread['p50']:.2f}, {spread['max']:.2f}" if spread else "-" for spread in spreads),
            style="red" if tally.broken else "",
        )
    return table


async def _play(fleets: Fleets, tally: Tally, repeat: int) -> None:
    try:
        tally.outcomes.append(await tally.row.run(fleets, repeat))
    except (Exception, pytest.fail.Exception) as error:  # noqa: BLE001 - a broken promise is a result
        tally.broken.append(str(error).splitlines()[0] if str(error) else type(error).__name__)
        traceback.print_exc()


def main() -> int:
    """Play, print and write."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults")
    parser.add_argument("--repeat", type=int, default=100)
    parser.add_argument("--only", default="", help="rows whose name contains this")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/faults.json"))
    given = parser.parse_args()
    console, start = Console(), time.monotonic()
    tallies = [Tally(row) for row in ROWS if given.only in row.play.__name__]
    with tempfile.TemporaryDirectory() as tmp:
        fleets = Fleets(Path(tmp))
        try:
            for tally in tallies:
                for repeat in range(given.repeat):
                    asyncio.run(_play(fleets, tally, repeat))
                console.print(f"{len(tally.outcomes)}/{tally.runs}  {tally.row.fault}")
        finally:
            fleets.close()
    console.print(_table(tallies))
    if not given.only:
        seconds = round(time.monotonic() - start)
        result = {"repeat": given.repeat, "seconds": seconds, "rows": [tally.summary() for tally in tallies]}
        given.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return int(any(tally.broken for tally in tallies))


if __name__ == "__main__":
    sys.exit(main())
