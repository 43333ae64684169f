"""``python -m tests.simulation --seed N`` plays one schedule and prints what happened; ``--count M`` plays M."""

import argparse
import sys
import time

from tests.simulation.world import simulate


def main() -> int:
    """Play and print; the exit status is 1 if a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=1)
    given = parser.parse_args()
    sys.unraisablehook = lambda _: None  # nobody reads how dead processes are finalized
    start, broken = time.perf_counter(), 0
    for seed in range(given.seed, given.seed + given.count):
        outcome = simulate(seed, verbose=given.count == 1)
        print(*outcome.trace, sep="\n", end="\n" if outcome.trace else "")
        if outcome.wrong or given.count == 1:
            print(f"seed {seed}: {outcome.exact} exact, {outcome.errors} errors, {outcome.left} left,", *outcome.wrong)
        broken += bool(outcome.wrong)
    print(f"{given.count} schedules, {broken} broken, {time.perf_counter() - start:.1f} s")
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main())
