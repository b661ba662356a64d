"""What a sweep does when something breaks: one line for each fault of tests/dist/faults.py, run as often as asked.

    python benchmarks/fault_matrix.py --times 20

Prints how often a line passed, its exit code, the cells on disk, processes and locks that were left, and seconds. What went wrong is printed
below its line, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the cases are shared with the tests

from tests.dist.faults import FAULTS, run_fault


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=1)
    parser.add_argument("--only", default="", help="lines whose name contains this")
    options = parser.parse_args()
    lines = [fault for fault in FAULTS if options.only in fault.name]
    print(f"{'fault':27}{'passed':>9}  exit  {'cells on disk':37}processes  locks  median s", flush=True)
    failed = False
    for fault in lines:
        outcomes = []
        for _ in range(options.times):
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
                outcomes.append(run_fault(fault, Path(folder)))
        wrong = [outcome for outcome in outcomes if outcome.problems]
        shown, passed = (wrong or outcomes)[0], f"{len(outcomes) - len(wrong)}/{len(outcomes)}"
        left = f"{max(outcome.processes for outcome in outcomes):9}{max(outcome.locks for outcome in outcomes):7}"
        seconds = statistics.median(outcome.seconds for outcome in outcomes)
        print(f"{fault.name:27}{passed:>9}{shown.exit_code:6}  {shown.statuses or 'none':37}{left}{seconds:10.1f}", flush=True)
        for outcome in wrong:
            print(f"    {'; '.join(outcome.problems)}", flush=True)
        failed = failed or bool(wrong) or not outcomes
    return int(failed or not lines)


if __name__ == "__main__":
    sys.exit(main())
