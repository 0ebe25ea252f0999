"""SIGINT, SIGTERM and SIGHUP at moments spread over a compile with real torch, and over a build.

A moment is a share of the processor time that the command takes undisturbed.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.faults import judge
from tests.faults.run import SMALL, Case, Done, World, ended, run, start, wait

MOMENTS = 60
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PR_SET_CHILD_SUBREAPER = 36
_PYTHON_STARTS = 0.2  # processor seconds
# What ends with 0 may be finished in this share of what was done before the signal.
_SWALLOWED = 0.25
_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Command:
    """What is interrupted. A `process` is one of its own, imports and all, and no fork."""

    name: str
    process: bool = False
    engines: bool = False  # real ones, by the child process of a build

    def argv(self, world: World, box: Path) -> list[str]:
        out = str(box / "place" / "b")
        if self.name == "onnx":
            return world.compile(Path(out))
        if self.engines:
            return ["build", out, "--target", "rtx-ada", "--plugin", "off", "--quiet"]
        return ["compile", str(world.hugging_face()), out, "--recipe", "fp16", *SMALL, "--target",
                "h100", "--calibration", str(world.base / "text.txt"), "--quiet"]  # fmt: skip

    def prepare(self, world: World) -> Path:
        """A box in which it can start."""
        box = world.box(f"signals-{self.name}")
        if self.engines:
            source = world.compiled("a")
            subprocess.run(["cp", "-a", f"{source}/.", str(box / "place")], check=True)
        return box

    def start(self, world: World, box: Path) -> int:
        argv = self.argv(world, box)
        if not self.process:
            return start(box, argv, engines=not self.engines)
        environment = {
            **os.environ, "HOME": str(box / "home"), "TMPDIR": str(box / "tmp"),
            "PYTHONPATH": str(Path(__file__).parents[2]), "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        environment.pop("LD_PRELOAD", None)
        with (box / "run.out").open("wb") as out, (box / "run.err").open("wb") as err:
            started = subprocess.Popen(
                [sys.executable, "-m", "iq_export.cli", *argv], cwd=box / "cwd", stdout=out,
                stderr=err, stdin=subprocess.DEVNULL, env=environment, start_new_session=True,
                preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
            )  # fmt: skip
        started.returncode = 0  # `wait` waits for it
        return started.pid


COMPILE = Command("compile")
PROCESS = Command("process", process=True)
BUILD = Command("build", engines=True)
ONNX = Command("onnx")


def cases(world: World, chosen: str | None = None) -> list[Case]:
    """Cases `signals/COMMAND-MOMENT-SIGNAL`: four of six in a compile, one in one with its imports,
    one in a build with a child process."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    if chosen is not None and chosen.startswith(ONNX.name):  # without torch, for the sample
        return [
            Case(f"signals/onnx-{n}-{what.name}", partial(_case, world, ONNX, n / 10, what))
            for n, what in ((3, signal.SIGHUP), (5, signal.SIGTERM), (7, signal.SIGINT))
        ]
    _import_torch()
    kinds = (COMPILE, BUILD, COMPILE, COMPILE, PROCESS, COMPILE)
    rng = world.rng("signals")
    moments = [(n + rng.random()) / MOMENTS for n in range(MOMENTS)]
    # Neighbours in time are far apart in the list, and no kind or signal belongs to a third of it.
    order = sorted(range(MOMENTS), key=lambda n: (n * 37) % MOMENTS)
    made = []
    for number, place in enumerate(order):
        command, what = kinds[number % 6], _SIGNALS[(number + number // 6) % 3]
        name = f"signals/{command.name}-{place}-{what.name}"
        made.append(Case(name, partial(_case, world, command, moments[place], what)))
    return made


def _import_torch() -> None:
    """What a trace imports."""
    for name in ("onnxscript", "torch.export", "torch.onnx._internal.exporter._core",
                 "torch.onnx._internal.exporter._fx_passes"):  # fmt: skip
        importlib.import_module(name)


def _case(world: World, command: Command, moment: float, what: signal.Signals) -> list[str]:
    seconds = _alone(world, command)
    for _ in range(4):
        box = command.prepare(world)
        before, argv = judge.names(box / "place"), command.argv(world, box)
        temporary, spent = judge.names(box / "tmp"), _spent()
        child = command.start(world, box)
        # Before the command's first line it is Python, or this harness, that a signal meets.
        begin = 0.0 if command.process else _cpu_seconds(child)
        until = begin + max(moment * seconds, _PYTHON_STARTS if command.process else 0.02)
        while _cpu_seconds(child) < until and _state(child) != "Z":
            time.sleep(0.005)
        late, at = _state(child) == "Z", _cpu_seconds(child)
        os.kill(child, what)
        done = _end(box, argv, child)
        if not late:
            break
        moment *= 0.6  # it was faster than when it ran alone
    goes_on = _spent() - spent - at
    why = [] if done.code in (0, 130) else [f"{what.name} ends it with {done.code}"]
    why += done.complaints()
    why += _orphans()
    finished = done.code == 0
    if finished and goes_on > max(0.3, _SWALLOWED * at):
        why.append(f"{what.name} is swallowed: it goes on for {goes_on:.1f} s and ends with 0")
    allowed = world.solo[command] if finished else before
    left = judge.names(box / "place") - allowed | judge.names(box / "tmp") - temporary
    if finished:
        accepted, more = judge.whole(box, box / "place" / "b")
        why += more if accepted else [*more, "ends with 0, and verify rejects what it made"]
    if left:
        why += _after_next_run(world, command, box)
    elif not finished and (box / "place" / "b").exists():
        accepted, more = judge.whole(box, box / "place" / "b")
        why += more if accepted else [*more, "the bundle is damaged"]
    return why


def _alone(world: World, command: Command) -> float:
    """Processor seconds of the command undisturbed; what lies there then is kept."""
    if command not in world.solo:
        box = command.prepare(world)
        child = command.start(world, box)
        spent = [0.0]
        while _state(child) != "Z":
            spent.append(_cpu_seconds(child))
            time.sleep(0.02)
        done = wait(box, command.argv(world, box), child)
        if done.code != 0:
            raise RuntimeError(f"undisturbed, {command.name} fails: {done}")
        world.solo[command] = judge.names(box / "place")
        world.solo[command, "seconds"] = max(spent)
    seconds: float = world.solo[command, "seconds"]
    return seconds


def _end(box: Path, argv: list[str], child: int) -> Done:
    """As `wait`, but what the command started is left alone."""
    code = ended(child, box / "run.err")
    out, err = ((box / f"run.{kind}").read_text(errors="replace") for kind in ("out", "err"))
    return Done(argv, code, out, err)


def _orphans() -> list[str]:
    """Processes that outlive the command by a second: they have become children of this one."""
    end = time.monotonic() + 1
    while (found := _children()) and time.monotonic() < end:
        time.sleep(0.02)
    for child in found:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child, 0)
    return [f"{len(found)} of its processes live on"] if found else []


def _children() -> list[int]:
    """Living children of this process; the dead ones are taken away."""
    found = []
    for entry in Path("/proc").iterdir():
        if (
            entry.name.isdigit()
            and (stat := _stat(int(entry.name)))
            and int(stat[1]) == os.getpid()
        ):
            if stat[0] == "Z":
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(int(entry.name), os.WNOHANG)
            else:
                found.append(int(entry.name))
    return found


def _after_next_run(world: World, command: Command, box: Path) -> list[str]:
    argv = command.argv(world, box)
    if (box / "place" / "b").exists() and argv[0] == "compile":
        argv.append("--force")
    # A build's next run takes the fake builder: what it leaves is the same.
    done = run(box, argv, engines=not command.process)
    if done.code != 0:
        return [f"the next run ends with {done.code}{done.sentence()}"]
    left = sorted(judge.names(box / "place") - world.solo[command])
    return [f"after the next run there is still {', '.join(left[:4])}"] if left else []


def _spent() -> float:
    """Processor seconds of all processes that this one has waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _stat(process: int) -> list[str]:
    """The fields of /proc/PID/stat from the state on; empty when it is gone."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _state(process: int) -> str:
    return (_stat(process) or ["Z"])[0]


def _cpu_seconds(session: int) -> float:
    """What all processes of a session have computed, in seconds."""
    ticks = 0
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and (stat := _stat(int(entry.name))) and stat[3] == str(session):
            ticks += int(stat[11]) + int(stat[12]) + int(stat[13]) + int(stat[14])
    return ticks / _TICKS
