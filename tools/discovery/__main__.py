"""`python -m tools.discovery`: plant the sweep, discover, and write what was found.

Writes docs/measured/discovery.json and the tables of docs/discovery.md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from iq_export.observe.token_stats import TokenStats
from iq_export.sinks.lifecycle import discover
from tools.discovery.models import Model
from tools.discovery.score import Outcome, check_planted, judge, observed, summary
from tools.discovery.sweep import sweep
from tools.discovery.table import write_tables

RECORD = Path("docs/measured/discovery.json")
PAGE = Path("docs/discovery.md")


def outcome_of(model: Model, keep: Path | None = None) -> Outcome:
    """As `judged`; with `keep`, what was observed is kept there and read again."""
    file = keep / f"{model.seed}.npz" if keep else None
    if file and file.is_file():
        with np.load(file) as arrays:
            stats = TokenStats(**dict(arrays))
    else:
        stats = observed(model)
        if file:
            np.savez(file, **vars(stats))
    check_planted(model, stats)
    return judge(model, discover(stats))


def _pin(workers: Any) -> None:
    """One processor for each worker: several threads do nothing for graphs this small."""
    mine = sorted(os.sched_getaffinity(0))
    with workers.get_lock():
        number, workers.value = workers.value, workers.value + 1
    os.sched_setaffinity(0, {mine[number % len(mine)]})


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.discovery", description=__doc__)
    parser.add_argument("--stats", type=Path, help="keep what was observed here, and reuse it")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--dry-run", action="store_true", help="print, write nothing")
    args = parser.parse_args(argv)
    if args.stats:
        args.stats.mkdir(parents=True, exist_ok=True)
    models, outcomes = sweep(), []
    workers = multiprocessing.Value("i", 0)
    with ProcessPoolExecutor(args.jobs, initializer=_pin, initargs=(workers,)) as pool:
        judging = pool.map(partial(outcome_of, keep=args.stats), models, chunksize=4)
        for number, outcome in enumerate(judging, 1):
            outcomes.append(outcome)
            if number % 50 == 0:
                print(f"{number} of {len(models)} models", file=sys.stderr)
    found = summary(outcomes)
    print(json.dumps(found, indent=1))
    if not args.dry_run:
        RECORD.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        write_tables(found, PAGE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
