"""Breaks every registered rule on purpose and counts what ``check_rule`` catches.

Each line of the table is one kind of slip; a mutant is *equivalent* if it behaves exactly like its rule on every sample
(there is no bias to drop, an offset is zero, a batch has one example). *By error* means that no check saw a wrong value,
because the mutant raised an exception: shapes did not fit. Survivors are listed; there should be none.

    python benchmarks/mutants.py [--seed 0] [RULE ...]
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections import Counter

import torch

from dual_layers import registered_rules
from dual_layers._mutants import Outcome, survey


def table(outcomes: list[Outcome]) -> str:
    """Format the counts per kind of mutant."""
    kinds = sorted({outcome.mutant.kind for outcome in outcomes})
    named = [(outcome.mutant.kind, "by error" if outcome.crashed else outcome.verdict) for outcome in outcomes]
    counts, totals = Counter(named), Counter(verdict for _, verdict in named)
    width = max(map(len, kinds))
    verdicts = ("caught", "by error", "equivalent", "survived")
    lines = [f"{'kind':<{width}}" + "".join(f"{verdict:>12}" for verdict in verdicts)]
    lines += [f"{kind:<{width}}" + "".join(f"{counts[kind, verdict]:>12}" for verdict in verdicts) for kind in kinds]
    return "\n".join([*lines, f"{'total':<{width}}" + "".join(f"{totals[verdict]:>12}" for verdict in verdicts)])


def main() -> int:
    """Print the table; the exit status is the number of survivors, at most 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rules", nargs="*", metavar="RULE", help="names of rules; default: all")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rules = [rule for rule in registered_rules() if not options.rules or rule.__name__ in options.rules]
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outcomes = list(survey(rules, options.seed))
    print(table(outcomes))
    checks = Counter(outcome.check for outcome in outcomes if outcome.verdict == "caught")
    print("caught by: " + ", ".join(f"{check} {count}" for check, count in sorted(checks.items())))
    survivors = [outcome for outcome in outcomes if outcome.verdict == "survived"]
    for outcome in survivors:
        print(f"survived: {outcome.rule}, {outcome.mutant.kind}, {outcome.mutant.method}")
    seconds = time.perf_counter() - start
    print(f"{len(rules)} rules, {len(outcomes)} mutants, seed {options.seed}, torch {torch.__version__}, {seconds:.0f} s")
    return int(bool(survivors))


if __name__ == "__main__":
    raise SystemExit(main())
