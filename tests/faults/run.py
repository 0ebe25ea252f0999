"""Run commands of iq-export in forks of this process, which has imported everything and computed
nothing: a compile of a tiny model costs about a second.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import importlib.metadata
import io
import mmap
import os
import random
import select
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from tests.cli import fuzz
from tests.cli import fuzz_inputs as inputs

HANGS = -99
verbose = False  # print all commands and what they say
SMALL = ("--samples", "1", "--length", "16", "--insertion", "norm")


@dataclass(frozen=True)
class Case:
    """One try: `check` returns what is wrong. `weight`: how many tries of the bar it stands for."""

    name: str
    check: Callable[[], list[str]]
    weight: int = 1


@dataclass(frozen=True)
class Done:
    """How a command ended: -N by signal N, `HANGS`."""

    argv: list[str]
    code: int
    out: str
    err: str

    def complaints(self) -> list[str]:
        """What is wrong with it as a command that a user called: no sentence, a traceback."""
        found = fuzz._about_output(self.argv, self.code, self.out, self.err, False)
        return [f"{self.argv[0]}: {what}{self.sentence()}" for what in found]

    def sentence(self) -> str:
        """Its last line, in brackets."""
        lines = [line for line in self.err.strip().splitlines() if line.strip()]
        return f" [{lines[-1][:300]}]" if lines else ""


@dataclass
class World:
    """What all cases share: whole inputs in `base`, a folder for what they do, the seed."""

    base: Path
    scratch: Path
    seed: int
    shim: Path | None = None
    reader: Path | None = None  # the C++ reader, iq_run
    solo: dict[Any, Any] = field(default_factory=dict)

    def rng(self, name: str) -> random.Random:
        """The random numbers of a case."""
        return random.Random(f"{self.seed}/{name}")

    def box(self, name: str) -> Path:
        """An empty folder of that name, with what a command is given: see `start`."""
        folder = self.scratch / name
        shutil.rmtree(folder, ignore_errors=True)
        for part in ("place", "cwd", "tmp", "home", "outside"):
            (folder / part).mkdir(parents=True)
        return folder

    def compile(self, out: Path, model: str = "a", recipe: str = "fp16", *more: str) -> list[str]:
        """Arguments that compile one of the models."""
        return ["compile", str(self.base / model / "model.onnx"), str(out), "--recipe", recipe,
                "--tokenizer", str(self.base / "tokenizer"), "--calibration",
                str(self.base / "text.txt"), *SMALL, "--quiet", *more]  # fmt: skip

    def hugging_face(self) -> Path:
        """A model folder with its tokenizer."""
        return self._made("hf", inputs.hugging_face)

    def gguf(self) -> Path:
        """The same kind of model as a GGUF file."""
        return self._made("m.gguf", inputs.gguf_file)

    def _made(self, name: str, make: Callable[[Path], None]) -> Path:
        path = self.base / name
        if not path.exists():
            in_a_fork(lambda: make(path))
        return path

    def compiled(self, name: str, model: str = "a", *more: str) -> Path:
        """A folder that holds the bundle `b` (with an engine) and what was kept beside it."""
        folder = self.base / "compiled" / name
        if not folder.exists():
            box = self.box("compiled")
            done = run(box, self.compile(box / "place" / "b", model, "fp16", *more))
            if done.code != 0:
                raise RuntimeError(f"a plain compile fails: {done}")
            folder.parent.mkdir(exist_ok=True)
            shutil.copytree(box / "place", folder, symlinks=True)
        return folder


def warm_up(*, torch: bool = True) -> None:
    """Import what commands import, and start no thread. For an ONNX file that is no torch."""
    if torch:
        fuzz.warm_up()
    for name in ("html.entities", "numpy.ma", "pydoc_data.topics", "safetensors.numpy",
                 "onnxruntime", "iq_export.cli.build", "iq_export.compile", "iq_export.plan",
                 "iq_export.model.trace", "iq_export.pipeline", "iq_export.run.generate",
                 "iq_export.report.html"):  # fmt: skip
        importlib.import_module(name)

    # Half a second each time, and always the same.
    cached = functools.cache(importlib.metadata.packages_distributions)
    importlib.metadata.packages_distributions = cached


def in_a_fork(work: Callable[[], object]) -> None:
    """What starts threads: this process must have none, its children are forks."""
    child = os.fork()
    if child == 0:
        try:
            os.environ["TQDM_DISABLE"] = "1"
            work()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    if os.waitpid(child, 0)[1]:
        raise RuntimeError("the inputs cannot be made")


def make_base(folder: Path) -> None:
    """Two small models of different weights, tokenizer, text, and what the fuzzer damages."""
    from tests import planted

    tiny = {"blocks": 1, "hidden": 32, "heads": 2, "kv_heads": 1, "features": 32}
    for name, seed in (("a", 0), ("b", 1)):
        decoder = planted.Decoder(vocab=264, spikes=(), positions=64, seed=seed, **tiny)
        (folder / name).mkdir(parents=True)
        planted.save(decoder, folder / name)
    inputs.tokenizer(folder / "tokenizer")
    text = "the cat sat on the mat and looked at one of {} birds. "
    (folder / "text.txt").write_text("".join(text.format(n) for n in range(120)))
    (folder / "other.txt").write_text("".join(text.format(n * n) for n in range(1000, 1060)))


def run(box: Path, argv: Sequence[str], stdin: str = "", **options: Any) -> Done:
    """Run one command in a box to its end."""
    return wait(box, argv, start(box, argv, stdin=stdin, **options))


def start(
    box: Path,
    argv: Sequence[str],
    *,
    name: str = "run",
    stdin: str = "",
    first: Callable[[], object] = lambda: None,
    engines: bool = True,
) -> int:
    """Fork a command whose streams are files `name`.* of the box; its process id.

    Its current, temporary and home folder lie in the box. It calls `first` before all. With
    `engines` those of TensorRT for RTX are built by a fake, in no time.
    """
    (box / f"{name}.in").write_text(stdin)
    for kind in ("out", "err"):
        (box / f"{name}.{kind}").write_bytes(b"")
    ready, in_child = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ready)
        _become(box, list(argv), name, first, engines, in_child)
    os.close(in_child)
    with open(ready, "rb") as stream:
        stream.read()  # to its end, which comes when the command is about to start
    return child


def wait(box: Path, argv: Sequence[str], child: int, *, name: str = "run") -> Done:
    """The end of a started command, and of all that it started; a silent one is killed."""
    code = ended(child, box / f"{name}.err")
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    out, err = (
        (box / f"{name}.{kind}").read_bytes().decode("utf-8", "backslashreplace")
        for kind in ("out", "err")
    )
    if verbose:
        print(f"$ iq-export {fuzz._shown(argv)}\n{out}{err}-> {code}\n", flush=True)
    return Done(list(argv), code, out, err)


def silence() -> float:
    """Seconds after which what says nothing hangs: a minute, times this machine's load."""
    cores = len(os.sched_getaffinity(0))
    return fuzz.TIMEOUT_SECONDS * max(1.0, os.getloadavg()[0] / cores)


def ended(child: int, stream: Path) -> int:
    """Its exit code. What says nothing for a minute (of this machine's load) hangs."""
    handle, said = os.pidfd_open(child), -1
    try:
        while not select.select([handle], [], [], silence())[0]:
            if (size := stream.stat().st_size) == said:
                os.killpg(child, signal.SIGKILL)
                os.waitpid(child, 0)
                return HANGS
            said = size
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    finally:
        os.close(handle)


def _become(
    box: Path, argv: list[str], name: str, first: Callable[[], object], engines: bool, ready: int
) -> NoReturn:
    """In the child: be the console script, and exit."""
    code = 1
    try:
        os.setsid()
        for number, kind, flags in (
            (0, "in", os.O_RDONLY), (1, "out", os.O_WRONLY), (2, "err", os.O_WRONLY)
        ):  # fmt: skip
            os.dup2(os.open(box / f"{name}.{kind}", flags | os.O_APPEND), number)
        sys.stdin = io.TextIOWrapper(io.FileIO(0, "r"), "utf-8")
        sys.stdout = io.TextIOWrapper(io.FileIO(1, "w"), "utf-8", "strict")
        sys.stderr = io.TextIOWrapper(
            io.FileIO(2, "w"), "utf-8", "backslashreplace", write_through=True
        )
        os.chdir(box / "cwd")
        os.environ.update(
            HOME=str(box / "home"), TMPDIR=str(box / "tmp"), PIP_NO_INDEX="1",
            HF_HUB_OFFLINE="1", IQ_EXPORT_CACHE=str(box / "home" / "cache"),
        )  # fmt: skip
        os.environ.pop("LD_PRELOAD", None)
        fuzz.tempfile.tempdir = None
        # What a shell gives a command, whatever this process ignores.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        if engines:
            _fake_engines()
        sys.argv = ["iq-export", *argv]
        from iq_export.cli import entry

        first()
        os.close(ready)
        try:
            entry()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _fake_engines() -> None:
    """Wherever it is imported: `build_engine` writes a plan of its own at each call."""
    from iq_export.engine import build, trt
    from tests.runtime.conftest import engine

    def build_engine(onnx: Path, plan: Path, target: Any, profile: Any, **_: Any) -> Any:
        content = f"{target.name} of {onnx}, {time.time_ns()}".encode() * 20
        plan.parent.mkdir(parents=True, exist_ok=True)
        plan.write_bytes(content)
        return engine(
            target.name, plan=plan.name, bytes=len(content), flavour=target.flavour,
            sha256=fuzz.hashlib.sha256(content).hexdigest(), tensorrt_version="1.7.1.116",
            compute_capabilities=target.compute_capabilities, form="none", sink_nodes=0,
            plugin_layers=0, plugin_version="", profile=profile.to_json(),
        )  # fmt: skip

    def here(target: Any) -> None:
        return None

    for function, fake in ((build.build_engine, build_engine), (trt.why_not_here, here)):
        for module in list(sys.modules.values()):
            if getattr(module, function.__name__, None) is function:
                setattr(module, function.__name__, fake)


class Faults(ctypes.Structure):
    """The record of shim.c, shared with the child that it works in."""

    OFF, STOP, KILL, FULL = range(4)
    _fields_ = (
        ("mode", ctypes.c_int), ("space", ctypes.c_int), ("at", ctypes.c_long),
        ("operations", ctypes.c_long), ("takers", ctypes.c_long), ("name", ctypes.c_char * 16),
        ("path", ctypes.c_char * 4096),
    )  # fmt: skip

    @classmethod
    def make(cls, mode: int, at: int = 0) -> Faults:
        """A record in memory that a child shares."""
        made = cls.from_buffer(mmap.mmap(-1, ctypes.sizeof(cls)))
        made.mode, made.at = mode, at
        return made

    def arm(self, root: Path) -> None:
        """In the child: from now on, below `root`."""
        library = ctypes.CDLL(None)
        library.faults_arm(ctypes.byref(self), os.fsencode(root))
