"""The bars on what a fault may leave: `python -m tests.faults --minutes 60`.

Kills and a full disk at every file operation, processes at once, mutated bundles and inputs,
signals. Each bar has its share of the time, and what it does in it is spread over all that there
is; each failure is printed with the name that `--repeat` takes. (Of processes at once the name
gives the commands and when they start; what they make of it may be another thing the next time.)
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults import kills, mutations, processes, run, signals
from tests.faults.run import Case, World, in_a_fork, make_base

SHIM = Path(__file__).with_name("shim.c")
_SHOWN = 12
_LONGEST = 300


@dataclass(frozen=True)
class Bar:
    """How its cases are made, its share of the time, and how many of which are the sample."""

    cases: Callable[[World, str | None], list[Case]]
    share: float
    sample: dict[str, int]


BARS = {
    "kills": Bar(kills.kills, 0.22, {"build": 3}),
    "space": Bar(kills.space, 0.25, {"build": 2}),
    "processes": Bar(processes.cases, 0.15, {"builds": 1}),
    "mutations": Bar(mutations.cases, 0.2, {"bundle-8": 3, "input-3": 1, "input-4": 1}),
    "signals": Bar(signals.cases, 0.18, {"onnx": 1}),
}
_NEED_SHIM = ("kills", "space")


@dataclass
class Tally:
    """A row of the table."""

    of: int = 0
    tried: int = 0
    held: int = 0
    failures: list[tuple[str, list[str]]] = field(default_factory=list)
    skipped: str = ""
    seconds: float = 0

    @property
    def broken(self) -> bool:
        """A bar that nothing of was tried has not held."""
        return bool(self.failures) or not (self.tried or self.skipped)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 1 if a bar is broken."""
    line = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    line.add_argument("--minutes", type=float, default=60, help="for all of it (default 60)")
    line.add_argument("--seed", type=int, default=0)
    line.add_argument("--only", choices=BARS, help="this bar, which gets all the time")
    line.add_argument("--sample", action="store_true", help="a few cases of each, as in CI")
    line.add_argument("--repeat", metavar="CASE", help="this one, as a failure names it")
    args = line.parse_args(argv)
    names = [args.repeat.partition("/")[0]] if args.repeat else [args.only] if args.only else BARS
    with tempfile.TemporaryDirectory(prefix="iq-faults-") as scratch:
        shim = _preloaded(Path(scratch), names)
        end = time.monotonic() + 60 * args.minutes
        run.warm_up(torch=not args.sample)
        world = World(Path(scratch) / "base", Path(scratch), args.seed, shim)
        in_a_fork(lambda: make_base(world.base))
        if "mutations" in names and not args.sample:
            world.reader = _reader(Path(scratch) / "reader")
        tallies = {}
        for number, name in enumerate(names):
            shares = [BARS[other].share for other in list(names)[number:]]
            left = end - time.monotonic()
            until = time.monotonic() + left * shares[0] / sum(shares)
            begin = time.monotonic()
            tallies[name] = _try(name, world, until, args)
            tallies[name].seconds = time.monotonic() - begin
            print(_rows(name, tallies[name])[0], file=sys.stderr, flush=True)
    print(_table(tallies, args.seed))
    return int(any(tally.broken for tally in tallies.values()))


def _try(name: str, world: World, until: float, args: argparse.Namespace) -> Tally:
    """All cases of a bar, or what there is time for. What breaks in this harness is a failure."""
    if name in _NEED_SHIM and world.shim is None:
        return Tally(skipped="no C compiler")
    try:
        cases = _cases(name, world, args)
    except Exception as error:
        return Tally(failures=[(name, [f"this harness, before the first case: {error!r}"])])
    if args.repeat and not cases:
        return Tally(failures=[(args.repeat, ["there is no case of that name"])])
    tally = Tally(sum(case.weight for case in cases))
    for case in cases:
        # However long it took to come here, one is tried.
        if tally.tried and time.monotonic() > until and not args.sample:
            break
        try:
            why = case.check()
        except Exception as error:
            why = [f"this harness: {error!r}"]
        why = [what.replace(f"{world.scratch}{os.sep}", "") for what in why]
        tally.tried += case.weight
        if why:
            tally.failures.append((case.name, why))
            print(f"{case.name}: {_short(why[0])}", file=sys.stderr, flush=True)
        else:
            tally.held += case.weight
    return tally


def _cases(name: str, world: World, args: argparse.Namespace) -> list[Case]:
    bar = BARS[name]
    if args.repeat:
        run.verbose = True
        _, group, *_ = [*args.repeat.split("/"), ""]
        return [case for case in bar.cases(world, group) if case.name == args.repeat]
    if not args.sample:
        return bar.cases(world, None)
    cases = []
    for chosen, count in bar.sample.items():
        of_it = bar.cases(world, chosen)
        cases += [c for c in of_it if c.name.startswith(f"{name}/{chosen}")][:count]
    return cases


def _table(tallies: dict[str, Tally], seed: int) -> str:
    rows = [f"{'bar':<10} {'tried':>6} {'of':>6} {'held':>6} {'min':>5}  first failures"]
    for name, tally in tallies.items():
        rows += _rows(name, tally)
    if any(tally.broken for tally in tallies.values()):
        seeded = f" --seed {seed}" if seed else ""
        rows.append(
            f"repeat one: {Path(sys.executable).name} -m tests.faults{seeded} --repeat CASE"
        )
    return "\n".join(rows)


def _rows(name: str, tally: Tally) -> list[str]:
    numbers = f"{tally.tried:>6} {tally.of:>6} {tally.held:>6} {tally.seconds / 60:>5.1f}"
    verdict = tally.skipped or ("" if tally.failures else "none" if tally.tried else "none tried")
    rows = [f"{name:<10} {numbers}  {verdict}".rstrip()]
    kinds: dict[str, list[str]] = {}
    for case, why in tally.failures:
        kinds.setdefault(_kind(case, why), []).append(f"{case}: {_short('; '.join(why))}")
    # Of each kind the first, so that a common one does not hide the others.
    for members in list(kinds.values())[:_SHOWN]:
        more = f" (and {len(members) - 1} like it)" if len(members) > 1 else ""
        rows.append(f"    {members[0]}{more}")
    if len(kinds) > _SHOWN:
        rows.append(f"    and {len(kinds) - _SHOWN} kinds more")
    return rows


def _kind(case: str, why: list[str]) -> str:
    """Failures with the same cause, as far as the kind of case and the first words tell."""
    where = re.sub(r"[-/\d]+(SIG\w+)?$", "", case)
    return where + re.sub(r"\d+", "", why[0])[:40]


def _short(text: str) -> str:
    text = text.encode("ascii", "backslashreplace").decode()
    text = " ".join(text.split())
    return text if len(text) <= _LONGEST else text[:_LONGEST] + "..."


def _preloaded(scratch: Path, names: Sequence[str]) -> Path | None:
    """The compiled shim, with which this program has started; it starts itself anew for it."""
    if not any(name in _NEED_SHIM for name in names):
        return None
    if found := os.environ.get("IQ_FAULTS_SHIM"):
        return Path(found)
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        return None
    shim = scratch / "shim.so"
    command = [compiler, "-O1", "-shared", "-fPIC", "-o", str(shim), str(SHIM), "-ldl"]
    subprocess.run(command, check=True)
    code = subprocess.run(
        [sys.executable, "-m", "tests.faults", *sys.argv[1:]], check=False,
        env={**os.environ, "LD_PRELOAD": str(shim), "IQ_FAULTS_SHIM": str(shim)},
    ).returncode  # fmt: skip
    raise SystemExit(code)


def _reader(folder: Path) -> Path | None:
    """The C++ reader, if there is what it is compiled with."""
    from iq_export.engine.plugin import find_cmake
    from tests.runtime.conftest import SOURCES, compile_

    if find_cmake() is None:
        print("no cmake: the C++ reader is not compared with", file=sys.stderr)
        return None
    try:
        compile_(SOURCES, folder, {"IQ_SESSION": "OFF", "CMAKE_BUILD_TYPE": "Debug"}, "iq_run")
    except AssertionError as error:
        print(f"the C++ reader is not compared with: {str(error)[-300:]}", file=sys.stderr)
        return None
    return folder / "iq_run"


if __name__ == "__main__":
    sys.exit(main())
