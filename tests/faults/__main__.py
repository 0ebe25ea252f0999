"""The bars on what a fault may leave: `python -m tests.faults --minutes 30`.

Kills and a full disk at every file operation, processes at once, mutated bundles and inputs,
signals. Each bar has its share of the time, and what it does in it is spread over all that there
is; each failure is printed with the name that `--repeat` takes.
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
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.faults import kills, mutations, processes, run, signals
from tests.faults.run import Case, World, make_base, warm_up

SHIM = Path(__file__).with_name("shim.c")
_SHOWN = 8
_LONGEST = 300


@dataclass(frozen=True)
class Bar:
    """How its cases are made, its share of the time, and how many of them a sample has."""

    cases: Callable[[World, str | None], list[Case]]
    share: float
    sample: int


BARS = {
    "kills": Bar(kills.kills, 0.3, 16),
    "space": Bar(kills.space, 0.2, 8),
    "processes": Bar(processes.cases, 0.2, 3),
    "mutations": Bar(mutations.cases, 0.2, 16),
    "signals": Bar(signals.cases, 0.1, 1),
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

    @property
    def broken(self) -> bool:
        return self.held < self.tried


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; 1 if a bar is broken."""
    line = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    line.add_argument("--minutes", type=float, default=30, help="for all of it (default 30)")
    line.add_argument("--seed", type=int, default=0)
    line.add_argument("--only", choices=BARS, help="this bar, which gets all the time")
    line.add_argument("--sample", action="store_true", help="a few cases of each, as in CI")
    line.add_argument("--repeat", metavar="CASE", help="this one, as a failure names it")
    args = line.parse_args(argv)
    names = [args.repeat.partition("/")[0]] if args.repeat else [args.only] if args.only else BARS
    with tempfile.TemporaryDirectory(prefix="iq-faults-") as scratch:
        shim = _preloaded(Path(scratch), names)
        end = time.monotonic() + 60 * args.minutes
        warm_up()
        world = World(Path(scratch) / "base", Path(scratch), args.seed, shim)
        _in_a_fork(lambda: make_base(world.base))
        if "mutations" in names and not args.sample:
            world.reader = _reader(Path(scratch) / "reader")
        tallies = {}
        for number, name in enumerate(names):
            shares = [BARS[other].share for other in list(names)[number:]]
            left = end - time.monotonic()
            until = time.monotonic() + left * shares[0] / sum(shares)
            tallies[name] = _try(name, world, until, args)
    print(_table(tallies))
    return int(any(tally.broken for tally in tallies.values()))


def _try(name: str, world: World, until: float, args: argparse.Namespace) -> Tally:
    """All cases of a bar, or what there is time for."""
    if name in _NEED_SHIM and world.shim is None:
        return Tally(skipped="no C compiler")
    chosen = args.repeat.split("/")[1] if args.repeat else None
    cases = BARS[name].cases(world, chosen)
    tally = Tally(sum(case.weight for case in cases))
    if args.repeat:
        run.verbose = True
        cases = [case for case in cases if case.name == args.repeat]
    elif args.sample:
        cases = cases[: BARS[name].sample]
    for case in cases:
        if time.monotonic() > until and not args.sample:
            break
        why = [what.replace(f"{world.scratch}{os.sep}", "") for what in case.check()]
        tally.tried += case.weight
        if why:
            tally.failures.append((case.name, why))
            print(f"{case.name}: {_short(why[0])}", file=sys.stderr, flush=True)
        else:
            tally.held += case.weight
    return tally


def _table(tallies: dict[str, Tally]) -> str:
    rows = [f"{'bar':<10} {'tried':>6} {'of':>6} {'held':>6}  first failures"]
    repeat = f"{Path(sys.executable).name} -m tests.faults --repeat"
    for name, tally in tallies.items():
        head = f"{name:<10} {tally.tried:>6} {tally.of:>6} {tally.held:>6}"
        rows.append(f"{head}  {tally.skipped or ('' if tally.broken else 'none')}".rstrip())
        kinds: dict[str, list[str]] = {}
        for case, why in tally.failures:
            kinds.setdefault(_kind(case, why), []).append(f"{case}: {_short('; '.join(why))}")
        # Of each kind the first, so that a common one does not hide the others.
        for members in list(kinds.values())[:_SHOWN]:
            more = f" (and {len(members) - 1} like it)" if len(members) > 1 else ""
            rows.append(f"    {members[0]}{more}")
        if len(kinds) > _SHOWN:
            rows.append(f"    and {len(kinds) - _SHOWN} kinds more")
    if any(tally.broken for tally in tallies.values()):
        rows.append(f"repeat one: {repeat} CASE")
    return "\n".join(rows)


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


def _in_a_fork(work: Callable[[], object]) -> None:
    """What starts threads: this process must have none, its children are forks."""
    child = os.fork()
    if child == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    if os.waitpid(child, 0)[1]:
        raise RuntimeError("the inputs cannot be made")


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
