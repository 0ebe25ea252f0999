"""Fuzz the command line: `python -m tests.cli.fuzz --calls 2000` finds what is no sentence.

A call is a number: from it follow the command, its arguments and its damaged files. Each runs in a
fork of a process that has imported everything, in a folder of its own. A call fails the test if it

- ends with a code that is not in the README's table, by a signal, or is silent for a minute;
- prints a traceback, or the sentence of an unexpected error, or says nothing, or says too much;
- prints control characters, which a terminal obeys;
- changes its input, writes elsewhere, or leaves something half-written.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from iq_export.cli import _settle_streams, parser
from iq_export.cli import main as iq_export
from tests.cli import fuzz_inputs as inputs

CODES = frozenset((0, 1, 2, 3, 4, 5, 6, 7, 130))
TIMEOUT_SECONDS = 60.0
_MEMORY_BYTES = 8 << 30  # on top of what the imports have mapped
_MOST_CHARACTERS, _MOST_LINES = 1000, 16
_ERROR = re.compile(r"^iq-export(?: [a-z]+)?: error: ", re.MULTILINE)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_LEFT = re.compile(r"\.partial$|\.old$|^\.build-|^tmp|\.work$|^\.[^.].*\.[a-z0-9_]{8}$")
# What `eval` and `build` write into a bundle.
_REWRITTEN = ("manifest.json", "manifest.json.sha256", "report.html", "engines", "plugins")
_COMMANDS = {"compile": 40, "analyze": 8, "inspect": 11, "eval": 10, "run": 11, "build": 7,
             "verify": 8, "package": 8, "doctor": 2, "": 3}  # fmt: skip
_TARGETS = ("h100", "orin", "rtx-ampere", "rtx-turing", "a100", "thor-jetpack7.0", "rtx-all", "x")
_RECIPES = ("fp16",) * 12 + ("w8a8", "w4a16", "w8a8kv8", "w4a4", "w8a8-h512", "../fp16")


@dataclass(frozen=True)
class Base:
    """Whole inputs that calls copy: a model as folder, GGUF and ONNX file, a tokenizer, bundles."""

    folder: Path
    light: bool = False

    @property
    def bundles(self) -> list[Path]:
        """The compiled ones."""
        return sorted(path for path in self.folder.glob("bundle*") if path.is_dir())

    @classmethod
    def make(cls, folder: Path, *, engine: bool) -> Base:
        """Make what `folder` lacks: the second bundle, of int8 with an engine, takes 20 s."""
        from tests import planted

        if not (folder / "done").exists():
            inputs.hugging_face(folder / "hf")
            inputs.tokenizer(folder / "tokenizer")
            inputs.gguf_file(folder / "m.gguf")
            (folder / "onnx").mkdir(exist_ok=True)
            planted.save(planted.Decoder(vocab=264), folder / "onnx")
            inputs.hugging_face(folder / "sharded", shard="60KB")
            cls._compile(folder, "bundle", "fp16", "h100", "norm")
            (folder / "done").touch()
        if engine and not (folder / "bundle8").exists():
            cls._compile(folder, "bundle8", "w8a8", "rtx-ampere", "auto")
        return cls(folder)

    @staticmethod
    def _compile(folder: Path, name: str, recipe: str, target: str, insertion: str) -> None:
        argv = [str(folder / "onnx/model.onnx"), str(folder / name), "--tokenizer",
                str(folder / "tokenizer"), "--recipe", recipe, "--target", target, "--insertion",
                insertion, "--samples", "2", "--length", "32", "--quiet"]  # fmt: skip
        command = [sys.executable, "-m", "iq_export.cli", "compile", *argv]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


@dataclass
class Result:
    """What one call did; `why` lists what is wrong with it."""

    number: int
    argv: list[str]
    code: int
    seconds: float
    stderr: str
    why: list[str] = field(default_factory=list)

    def kind(self) -> str:
        """Failures with the same cause, as far as the last frame of ours and the type tell."""
        frames = re.findall(r'iq_export/([\w/]+\.py)", line (\d+), in (\w+)', self.stderr)
        types = re.findall(r"^([A-Za-z_][\w.]*(?:Error|Exception|Fail|Interrupt)\w*)(?::|$)",
                           self.stderr, re.MULTILINE)  # fmt: skip
        where = "{}:{} {}".format(*frames[-1]) if frames else ""
        return " ".join(filter(None, (self.why[0], types[-1] if types else "", where)))


class Box:
    """The folder of one call: `in` is read, `cwd` and `out` may be written, `tmp`, `home` not."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("in", "cwd", "out", "tmp", "home", "outside"):
            (folder / name).mkdir(parents=True)
        (folder / "outside" / "canary").write_text("alive")

    def state(self) -> dict[str, str]:
        """Relative name -> what is there, links not followed."""
        found = {}
        for root, folders, files in os.walk(os.fsencode(self.folder)):
            for name in (*folders, *files):
                path = os.path.join(root, name)
                mode = os.lstat(path).st_mode
                text = stat.filemode(mode)[0]
                if stat.S_ISREG(mode):
                    with open(path, "rb") as stream:
                        text += hashlib.sha256(stream.read()).hexdigest()
                found[os.fsdecode(os.path.relpath(path, os.fsencode(self.folder)))] = text
        return found


class Maker:
    """Arguments and files of one call, by its random numbers."""

    def __init__(self, rng: random.Random, base: Base, box: Box) -> None:
        self.rng, self.base, self.box = rng, base, box
        self.made = 0

    def argv(self) -> list[str]:
        """The arguments; what they name lies in the box."""
        rng = self.rng
        (command,) = rng.choices(list(_COMMANDS), list(_COMMANDS.values()))
        if not command:
            return [rng.choice(inputs.WORDS) for _ in range(rng.randrange(3))]
        argv = [command, *getattr(self, command)()]
        for _ in range(rng.choice((0, 0, 0, 0, 1, 1, 1, 2))):
            argv = self._disturbed(command, argv)
        return argv

    def compile(self) -> list[str]:
        """Mostly a dry run, or of a damaged model: a whole compile takes many seconds."""
        rng = self.rng
        kind = rng.choice(("hf", "hf", "sharded", "m.gguf", "m.gguf", "onnx", "odd"))
        damaged = rng.random() < 0.75
        argv = ["--samples", "1", "--length", "32", "--insertion", "norm"]
        argv += ["--recipe", rng.choice(_RECIPES)]
        argv += ["--target", rng.choice((*_TARGETS, *["h100"] * 12))]
        if kind == "odd":
            model = inputs.odd_path(rng, self.box.folder / "in")
        else:
            copied = inputs.copy(self.base.folder / kind, self.box.folder / "in" / kind)
            if kind == "onnx":
                model = str(copied / "model.onnx")
                argv += ["--tokenizer", str(self._tokenizer())]
                if damaged:
                    inputs.damage_file(
                        rng, rng.choice([*sorted(copied.iterdir()), copied / "model.onnx"])
                    )
            else:
                model = str(copied)
                if damaged and copied.is_dir():
                    inputs.damage_model(rng, copied)
                elif damaged:
                    inputs.damage_file(rng, copied)
        if rng.random() < 0.3:
            argv += ["--calibration", str(self._text())]
        # A damaged model may still be whole enough for a trace.
        whole = damaged and kind != "odd" and rng.random() < (0.5 if kind == "onnx" else 0.15)
        if self.base.light or not whole:
            argv.append("--dry-run")
        return [model, str(self._out()), *argv]

    def analyze(self) -> list[str]:
        """An ONNX file, mostly damaged: a trace takes seconds."""
        rng, folder = self.rng, inputs.copy(self.base.folder / "onnx", self.box.folder / "in/onnx")
        if rng.random() < 0.8:
            inputs.damage_file(rng, rng.choice([*sorted(folder.iterdir()), folder / "model.onnx"]))
        out = self._out() if rng.random() < 0.2 else f"{self.box.folder / 'out' / 'page'}.html"
        argv = ["--samples", "1", "--length", "32", "-o", out]
        argv += ["--tokenizer", str(self._tokenizer())]
        if rng.random() < 0.3:
            argv += ["--calibration", str(self._text())]
        return [str(folder / "model.onnx"), *argv]

    def inspect(self) -> list[str]:
        """A bundle."""
        return [str(self._bundle())]

    def verify(self) -> list[str]:
        """A bundle."""
        return [str(self._bundle())]

    def eval(self) -> list[str]:
        """One short window of this bundle only."""
        argv = [str(self._bundle()), "--windows", "1", "--length", "16", "--no-speed"]
        if self.rng.random() < 0.5:
            argv += ["--text", str(self._text())]
        if self.rng.random() < 0.95:
            argv.append("--bundle-only")
        return argv

    def run(self) -> list[str]:
        """Two tokens."""
        rng = self.rng
        argv = [str(self._bundle()), "--prompt", rng.choice(("hello", "ü 漢字", *inputs.WORDS))]
        argv += ["--max-new-tokens", "2"]
        if rng.random() < 0.3:
            argv.append("--raw")
        if rng.random() < 0.15:
            argv += ["--temperature", rng.choice(("0.7", *inputs.WORDS))]
        return argv

    def build(self) -> list[str]:
        """Mostly for a device that is not here: an engine takes seconds."""
        (target,) = self.rng.choices(_TARGETS, (8, 8, 1, 1, 8, 4, 1, 2))
        return [str(self._bundle()), "--target", target, "--plugin", "off"]

    def package(self) -> list[str]:
        """Into an empty or an odd folder."""
        rng = self.rng
        place = self._out() if rng.random() < 0.7 else inputs.odd_path(rng, self.box.folder / "in")
        return ["--triton", str(self._bundle()), str(place), "--backend",
                rng.choice(("onnxruntime", "onnxruntime", "tensorrt"))]  # fmt: skip

    def doctor(self) -> list[str]:
        """Nothing to say."""
        return []

    def _bundle(self) -> Path | str:
        rng, place = self.rng, self.box.folder / "in" / "bundle"
        if rng.random() < 0.08:
            return inputs.odd_path(rng, self.box.folder / "in")
        inputs.copy(rng.choice(self.base.bundles), place)
        if rng.random() < 0.85:
            inputs.damage_bundle(rng, place)
        return place

    def _tokenizer(self) -> Path:
        folder = inputs.copy(self.base.folder / "tokenizer", self.box.folder / "in" / "tokenizer")
        if self.rng.random() < 0.2:
            inputs.damage_model(self.rng, folder)
        return folder

    def _text(self) -> Path | str:
        if self.rng.random() < 0.2:
            return inputs.odd_path(self.rng, self.box.folder / "in")
        path = self.box.folder / "in" / "text.txt"
        path.write_bytes(self.rng.choice(inputs.TEXTS))
        return path

    def _out(self) -> str:
        if self.rng.random() < 0.15:
            return inputs.odd_path(self.rng, self.box.folder / "in")
        return str(
            self.box.folder / "out" / self.rng.choice((*["new", "a/b/c", "ünï"] * 5, "\udcff"))
        )

    def _disturbed(self, command: str, argv: list[str]) -> list[str]:
        """One thing about the arguments is odd."""
        rng = self.rng
        options = _options(command)
        chosen = rng.choice(options)
        flag = rng.choice(chosen.option_strings)
        value = [] if chosen.nargs == 0 else [self._value(chosen)]
        what = rng.randrange(12)
        if what < 6:
            return [*argv, flag, *value]
        if what == 6:
            return [*argv, flag[: max(3, len(flag) - rng.randrange(4))], *value]
        if what == 7:
            return [*argv, f"{flag}={rng.choice(inputs.WORDS)}"]
        if what == 8:
            return [*argv, flag]
        if what == 9 and len(argv) > 1:
            at = rng.randrange(1, len(argv))
            return [*argv[:at], *argv[at + 1 :]]
        if what == 10:
            at = rng.randrange(1, len(argv) + 1)
            return [*argv[:at], rng.choice(inputs.WORDS), *argv[at:]]
        at = rng.randrange(len(argv))
        return [*argv[:at], rng.choice(inputs.WORDS), *argv[at + 1 :]]

    def _value(self, option: argparse.Action) -> str:
        rng = self.rng
        if option.choices and rng.random() < 0.7:
            return str(rng.choice(list(option.choices)))
        if option.type is Path or option.dest in ("calibration", "text"):
            return inputs.odd_path(rng, self.box.folder / "in")
        return rng.choice(inputs.WORDS)


def _options(command: str) -> list[argparse.Action]:
    """The options of a subcommand, `--help` aside."""
    for action in parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            found = action.choices[command]._actions
            return [a for a in found if a.option_strings and a.dest != "help"]
    raise AssertionError


def call(number: int, seed: int, base: Base, folder: Path, *extra: str) -> Result:
    """Make and run call `number` in `folder`, which is removed. `extra` arguments are appended."""
    rng = random.Random(f"{seed}/{number}")
    box = Box(folder)
    argv = [*Maker(rng, base, box).argv(), *extra]
    full = rng.random() < 0.02  # a stdout that cannot be written
    before = box.state()
    begin = time.monotonic()
    code = _run(argv, box, full)
    seconds = time.monotonic() - begin
    output, error = ((folder / name).read_bytes() for name in ("stdout", "stderr"))
    text = error.decode("utf-8", "backslashreplace")
    result = Result(number, argv, code, seconds, text)
    (folder / "stdout").unlink()
    (folder / "stderr").unlink()
    result.why += _about_output(argv, code, output.decode("utf-8", "backslashreplace"), text, full)
    # A bundle without an engine that TensorRT refused is whole.
    kept = (code == 6 and "is complete but for" in text) or (code == 7 and full)
    result.why += _about_files(argv, code, before, box.state(), kept)
    shutil.rmtree(os.fsencode(folder))
    return result


def _run(argv: list[str], box: Box, full: bool) -> int:
    """The exit code of the command in a fork; -signal if one ended it, -99 if it hangs."""
    (box.folder / "stderr").touch()
    child = os.fork()
    if child == 0:
        _become(argv, box, full)
    # On a machine that others use as well a minute of its own takes longer.
    silence = TIMEOUT_SECONDS * max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
    said, end, pause = 0, time.monotonic() + silence, 0.001
    try:
        while time.monotonic() < end:
            if (size := (box.folder / "stderr").stat().st_size) != said:  # it moves on
                said, end = size, time.monotonic() + silence
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(pause)
            pause = min(pause * 1.5, 0.05)
        return -99
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(child, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child, 0)


def _become(argv: list[str], box: Box, full: bool) -> None:
    """In the child: run the command as a process of its own would, and exit."""
    code = 99
    try:
        os.setpgid(0, 0)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(
                os.open(box.folder / name, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600), number
            )
        if full:
            os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
        sys.stdout = io.TextIOWrapper(io.FileIO(1, "w"), "utf-8", "strict")
        sys.stderr = io.TextIOWrapper(
            io.FileIO(2, "w"), "utf-8", "backslashreplace", write_through=True
        )
        os.chdir(box.folder / "cwd")
        os.environ.update(
            HOME=str(box.folder / "home"), TMPDIR=str(box.folder / "tmp"), PIP_NO_INDEX="1",
            HF_HUB_OFFLINE="1", IQ_EXPORT_CACHE=str(box.folder / "home" / "cache"),
        )  # fmt: skip
        tempfile.tempdir = None
        limit = resource.getpagesize() * int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (limit + _MEMORY_BYTES,) * 2)
        _settle_streams()
        try:
            code = iq_export(argv)
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        if not full:
            sys.stdout.flush()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _about_output(argv: list[str], code: int, output: str, error: str, full: bool) -> list[str]:
    why = []
    if code == -99:
        why.append("hangs")
    elif code < 0:
        why.append(f"dies of signal {-code}")
    elif code not in CODES:
        why.append(f"code {code}")
    if "Traceback (most recent call last)" in error and not _verbose(argv):
        why.append("traceback")
    if "error: unexpected " in error or "error: out of memory" in error:
        why.append("unexpected")
    found = list(_ERROR.finditer(error))
    if code in CODES - {0, 130} and not found:
        why.append("says nothing")
    if code in (0,) and found:
        why.append("error, and code 0")
    if found:
        sentence = error[found[-1].start() :].strip()
        if len(sentence) > _MOST_CHARACTERS or len(sentence.splitlines()) > _MOST_LINES:
            why.append(f"says too much ({len(sentence)} characters)")
        if not _verbose(argv) and len(error) > 8 * _MOST_CHARACTERS:
            why.append("noise before the sentence")
    if _CONTROL.search(error) or (argv[:1] != ["run"] and _CONTROL.search(output)):
        why.append("control characters")
    if code == 0 and not full and "--json" in argv and "--help" not in argv:
        try:
            json.loads(output)
        except ValueError:
            why.append("stdout is no JSON")
    return why


def _verbose(argv: Sequence[str]) -> bool:
    """-v, alone, in a bundle of short flags, or abbreviated."""
    return any(re.match(r"-[qv]*v|--v", word) for word in argv)


def _about_files(
    argv: list[str], code: int, before: dict[str, str], after: dict[str, str], kept: bool
) -> list[str]:
    command = argv[0] if argv else ""
    changed = sorted(n for n in before.keys() | after.keys() if before.get(n) != after.get(n))
    why = []
    for name in changed:
        parts = Path(name).parts
        if parts[0] in ("tmp", "home", "outside"):
            why.append(f"writes {parts[0]}")
        elif command == "eval" and ".bundle.work" in parts:
            continue  # the graphs to compare with, which the next eval finds
        elif any(_LEFT.search(p) for p in parts) and name not in before and not _keeps(argv):
            why.append("leaves a temporary file")
        elif parts[0] == "in" and name in before:
            rewritten = command in ("eval", "build") and len(parts) > 2 and parts[2] in _REWRITTEN
            forced = any(word.startswith("--f") for word in argv)
            if not rewritten and not forced:
                why.append("changes its input")
        elif code not in (0, 130) and not (_keeps(argv) or kept):
            why.append("leaves output after a failure")
    return list(dict.fromkeys(why))


def _keeps(argv: Sequence[str]) -> bool:
    return any(word.startswith(("--w", "--k")) for word in argv)


def warm_up() -> None:
    """Import what commands import, but start no thread: the children are forks."""
    import onnxruntime  # noqa: F401
    import torch
    import transformers  # noqa: F401
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401

    import iq_export.compile
    import iq_export.model.load
    import iq_export.model.trace
    import iq_export.pipeline
    import iq_export.run.generate  # noqa: F401

    torch.set_num_threads(1)


def fuzz(numbers: Sequence[int], seed: int, base: Base, jobs: int, stream: Any) -> list[Result]:
    """Run calls in `jobs` processes, after `warm_up`. Failing ones run again with -v, to know
    where they fail."""
    sys.stdout.flush()
    with tempfile.TemporaryDirectory(prefix="iq-fuzz-") as scratch:
        workers = []
        for job in range(jobs):
            worker = os.fork()
            if worker == 0:
                try:
                    _work(numbers[job::jobs], seed, base, Path(scratch), job, stream)
                    os._exit(0)
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(1)
            workers.append(worker)
        codes = [os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) for worker in workers]
        lines = [
            line
            for job in range(jobs)
            for line in (Path(scratch) / f"{job}.jsonl").read_text().splitlines()
        ]
    if any(codes):
        raise RuntimeError("a worker of the fuzzer failed")
    return sorted((Result(**json.loads(line)) for line in lines), key=lambda r: r.number)


def _work(
    numbers: Sequence[int], seed: int, base: Base, scratch: Path, job: int, stream: Any
) -> None:
    with (scratch / f"{job}.jsonl").open("w") as file:
        for number in numbers:
            folder = scratch / f"{job}-{number}"
            result = call(number, seed, base, folder)
            if result.why:
                if result.code not in (-99, 99):
                    again = call(number, seed, base, folder, "-v")
                    result.stderr += "\n--- with -v ---\n" + again.stderr
                stream.write(f"{number}: {result.kind()}\n")
                stream.flush()
            file.write(json.dumps(asdict(result)) + "\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Print the failures by kind; 1 if there is one."""
    line = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    line.add_argument("--calls", type=int, default=2000)
    line.add_argument("--first", type=int, default=0, help="number of the first call")
    line.add_argument("--only", type=int, nargs="*", help="these calls, and all they print")
    line.add_argument("--seed", type=int, default=0)
    line.add_argument("--jobs", type=int, default=2)
    line.add_argument("--base", type=Path, help="folder that keeps the base inputs")
    line.add_argument(
        "--light", action="store_true", help="dry runs for compiles, no bundle with an engine"
    )
    line.add_argument("--results", type=Path, help="write every call there, as JSON lines")
    args = line.parse_args(argv)
    numbers = args.only or list(range(args.first, args.first + args.calls))
    warm_up()  # for the maker as well
    with contextlib.ExitStack() as stack:
        folder = args.base or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(exist_ok=True, parents=True)
        # In a process of its own: it starts threads, and what forks must have none.
        maker = os.fork()
        if maker == 0:
            try:
                Base.make(folder, engine=not args.light)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            os._exit(1)
        if os.waitpid(maker, 0)[1]:
            return 1
        begin = time.monotonic()
        results = fuzz(numbers, args.seed, Base(folder, args.light), args.jobs, sys.stderr)
    if args.results:
        args.results.write_text("".join(json.dumps(asdict(r)) + "\n" for r in results))
    bad = [result for result in results if result.why]
    for result in bad if args.only else ():
        print(f"{result.number}: {_shown(result.argv)}\n{result.stderr}\n{result.why}")
    print(f"codes: {dict(sorted(Counter(r.code for r in results).items()))}")
    print(f"{len(results)} calls, {len(bad)} failures, {time.monotonic() - begin:.0f} s")
    kinds: dict[str, list[Result]] = {}
    for result in bad:
        kinds.setdefault(result.kind(), []).append(result)
    for kind, members in sorted(kinds.items(), key=lambda item: -len(item[1])):
        shown = [str(member.number) for member in members[:6]]
        print(f"{len(members):4}  {kind}  (calls {', '.join(shown)})")
    return 1 if bad else 0


def _shown(argv: Sequence[str]) -> str:
    return " ".join(ascii(word if len(word) < 200 else word[:80] + "...") for word in argv)


if __name__ == "__main__":
    sys.exit(main())
