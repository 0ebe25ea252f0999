"""A kill at every file operation of compile, build, eval and package, and a full disk at each.

One run of a command, stopped before each operation below the folder, shows all states that a kill
can leave: they are put back one after the other and judged. One is compared with what a real kill
leaves. A full disk is a run of its own for each operation.
"""

from __future__ import annotations

import functools
import hashlib
import os
import re
import resource
import shutil
import signal
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

from tests.faults import judge
from tests.faults.run import HANGS, Case, Done, Faults, World, run, start

T = TypeVar("T")
_COMPLETE = "is complete, but the graphs to compare it with were not kept"
# Bytes that a file may have, `ulimit -f`; what a command says must fit.
LIMITS = (2_000, 9_000, 20_000)
# A process id, and what tempfile makes up after a dot, a dash or its own `tmp`.
_RANDOM = re.compile("[0-9]+[.]|([.-]|(?<![^/])tmp)[a-z0-9_]{8}(?=[/.]|$)")


@dataclass(frozen=True)
class State:
    """A folder's files: relative name -> mode, modification time, and SHA-256 or where it links."""

    entries: dict[str, tuple[int, int, str]]

    def key(self) -> str:
        """The same for equal states."""
        parts = sorted((n, mode, what) for n, (mode, _, what) in self.entries.items())
        return hashlib.sha256(repr(parts).encode("utf-8", "surrogateescape")).hexdigest()


class Store:
    """Contents of files, each once."""

    def __init__(self) -> None:
        self.blobs: dict[str, bytes] = {}

    def take(self, folder: Path) -> State:
        """The state of a folder."""
        entries = {}
        for name in sorted(judge.names(folder)):
            path = folder / name
            found = path.lstat()
            what = ""
            if stat.S_ISLNK(found.st_mode):
                what = os.readlink(path)
            elif stat.S_ISREG(found.st_mode):
                what = self._blob(path)
            entries[name] = (found.st_mode, found.st_mtime_ns, what)
        return State(entries)

    def _blob(self, path: Path) -> str:
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        self.blobs.setdefault(digest, content)
        return digest

    def put(self, state: State, folder: Path) -> None:
        """Make `folder` what it was."""
        clear(folder)
        for name, (mode, _, what) in state.entries.items():
            path = folder / name
            if stat.S_ISDIR(mode):
                path.mkdir()
            elif stat.S_ISLNK(mode):
                path.symlink_to(what)
            elif stat.S_ISREG(mode):
                path.write_bytes(self.blobs[what])
                path.chmod(stat.S_IMODE(mode))
            elif stat.S_ISFIFO(mode):
                os.mkfifo(path)
        for name in sorted(state.entries, reverse=True):  # a folder after what is in it
            when = state.entries[name][1]
            os.utime(folder / name, ns=(when, when), follow_symlinks=False)


def clear(folder: Path) -> None:
    """Empty a folder, which stays."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


@dataclass(eq=False)
class Scenario:
    """A command in a box of its own; `before` is what lies in `place` when it starts."""

    world: World
    name: str
    box: Path
    argv: list[str]
    before: State
    store: Store
    same: str  # where what it makes is compared: a bundle `b` or a folder
    expected: object = None
    allowed: set[str] = field(default_factory=set)

    @property
    def place(self) -> Path:
        return self.box / "place"

    @property
    def bundle(self) -> Path:
        return self.place / "b"

    def reset(self, state: State) -> None:
        """The box as it was, `place` as `state`."""
        self.store.put(state, self.place)
        for name in ("cwd", "tmp", "home"):
            clear(self.box / name)

    def again(self, *, replaces: bool) -> list[str]:
        """The next run: `--force` where the bundle is whole already."""
        force = replaces and self.argv[0] == "compile" and "--force" not in self.argv
        return [*self.argv, "--force"] if force else self.argv

    def made(self) -> object:
        """What a whole run makes, without what changes from run to run."""
        if self.same == "b":
            return judge.signature(self.bundle)
        found = judge.content(self.place / self.same)
        return {
            name: digest for name, digest in found.items() if f"{self.same}/{name}" in self.allowed
        }

    def learn(self) -> None:
        """Run it undisturbed, twice: what it makes, and what may lie there afterwards."""
        self.reset(self.before)
        for argv in (self.argv, self.again(replaces=True)):
            done = run(self.box, argv)
            if done.code != 0:
                raise RuntimeError(f"undisturbed, {self.name} fails: {done}")
            self.allowed |= judge.names(self.place)
        self.expected = self.made()

    def next_run(self) -> list[str]:
        """What is wrong with this state: its bundle, the next run, what is left behind."""
        state = self.store.take(self.place)
        accepted, why = judge.whole(self.box, self.bundle)
        self.reset(state)  # the next run may be the first to see it
        argv = self.again(replaces=accepted)
        done = run(self.box, argv)
        why += done.complaints()
        if done.code != 0:
            return [*why, f"the next run ends with {done.code}{done.sentence()}"]
        accepted, more = judge.whole(self.box, self.bundle)
        why += [f"after the next run: {what}" for what in more]
        if accepted and self.made() != self.expected:
            why.append("the next run makes something else than a run alone")
        left = sorted(judge.names(self.place) - self.allowed)
        if left:
            why.append(f"after the next run there is still {', '.join(left[:4])}")
        return why


def scenarios(world: World, chosen: str | None = None) -> list[Scenario]:
    """The commands; with `chosen` only that one."""
    plans: dict[str, tuple[tuple[str, ...], list[str], str]] = {
        "compile": ((), ["COMPILE", "a"], "b"),
        "compile-kept": ((), ["COMPILE", "a", "--keep-work"], "b"),
        "replace": (("a-kept", "a", "--keep-work"),
                    ["COMPILE", "b", "--force", "--keep-work"], "b"),
        "build": (("a",), ["build", "OUT", "--target", "rtx-ampere"], "b"),
        "build-new": (("a",), ["build", "OUT", "--target", "rtx-ada"], "b"),
        "eval": (("a",),
                 ["eval", "OUT", "--bundle-only", "--windows", "1", "--length", "16", "--no-speed",
                  "--text", str(world.base / "other.txt")], "b"),
        "package": (("a",),
                    ["package", "--triton", "OUT", "REPO", "--backend", "onnxruntime"], "repo"),
        "package-force": ((), ["package", "--triton", "OUT", "REPO", "--backend", "onnxruntime",
                                 "--name", "m", "--force"], "repo"),
    }  # fmt: skip
    made = []
    for name, (start_from, argv, same) in plans.items():
        if chosen not in (None, name):
            continue
        if ("files", name) in world.solo:
            made.append(world.solo["files", name])
            continue
        box, store = world.box(f"files-{name}"), Store()
        place = box / "place"
        if start_from:
            source = world.compiled(*start_from)
            shutil.copytree(source, place, symlinks=True, dirs_exist_ok=True)
        if name == "package-force":  # another model of that name stands in the repository
            shutil.copytree(world.compiled("b", "b"), place, dirs_exist_ok=True)
            words = _words(world, argv, place)
            if (done := run(box, words)).code != 0:
                raise RuntimeError(f"undisturbed, {name} fails: {done}")
            shutil.rmtree(place / "b")
            shutil.copytree(world.compiled("a") / "b", place / "b")
        words = _words(world, argv, place)
        found = Scenario(world, name, box, words, store.take(place), store, same)
        found.learn()
        world.solo["files", name] = found
        made.append(found)
    return made


def _words(world: World, argv: Sequence[str], place: Path) -> list[str]:
    out = str(place / "b")
    if argv[0] == "COMPILE":
        return world.compile(Path(out), argv[1], "fp16", *argv[2:])
    known = {"OUT": out, "REPO": str(place / "repo")}
    return [known.get(word, word) for word in [*argv, "--quiet"]]


@dataclass
class Trail:
    """The states before the operations of a run: `operations[i]` is what came after `states[i]`."""

    states: list[State] = field(default_factory=list)
    operations: list[tuple[str, str, bool]] = field(default_factory=list)

    def beside_rename(self, numbers: Sequence[int]) -> bool:
        """Whether one of these states comes just before or after something is put in place."""
        near = [self.operations[max(n - 1, 0) : n + 1] for n in numbers]
        return any(name == "rename" for some in near for name, _, _ in some)

    @property
    def takers(self) -> int:
        """How many operations take space."""
        return sum(space for _, _, space in self.operations)


@functools.cache
def record(scenario: Scenario) -> Trail:
    """Run the command, and look at the folder before each of its operations and after the last."""
    scenario.reset(scenario.before)
    faults, trail = Faults.make(Faults.STOP), Trail()
    child = start(scenario.box, scenario.argv, first=partial(faults.arm, scenario.place))
    while True:
        _, status = os.waitpid(child, os.WUNTRACED)
        if not os.WIFSTOPPED(status):
            break
        trail.states.append(scenario.store.take(scenario.place))
        name = os.path.relpath(os.fsdecode(faults.path), scenario.place)
        trail.operations.append((faults.name.decode(), name, bool(faults.space)))
        os.kill(child, signal.SIGCONT)
    if code := os.waitstatus_to_exitcode(status):
        raise RuntimeError(f"{scenario.name}, stopped at times, ends with {code}")
    trail.states.append(scenario.store.take(scenario.place))
    return trail


def kills(world: World, chosen: str | None = None) -> list[Case]:
    """Cases `kills/SCENARIO/OPERATION`; operations that find the same state are one."""
    lists = []
    for scenario in scenarios(world, chosen):
        trail = record(scenario)
        positions: dict[str, list[int]] = {}
        for number, state in enumerate(trail.states):
            positions.setdefault(state.key(), []).append(number)
        cases, decisive = [], []
        for found in positions.values():
            check = partial(_killed, scenario, trail, found[0])
            case = Case(f"kills/{scenario.name}/{found[0]}", check, len(found))
            (decisive if trail.beside_rename(found) else cases).append(case)
        real = Case(f"kills/{scenario.name}/real", partial(_for_real, scenario, trail))
        lists.append([real, *spread(decisive), *spread(cases)])
    return list(interleaved(lists))


def _killed(scenario: Scenario, trail: Trail, number: int) -> list[str]:
    scenario.reset(trail.states[number])
    why = scenario.next_run()
    if why and number < len(trail.operations):
        name, path, _ = trail.operations[number]
        why.append(f"killed before {name} {path}")
    return why


def _for_real(scenario: Scenario, trail: Trail) -> list[str]:
    """A kill half-way leaves what the trail has there, but for names made at random."""
    number = len(trail.operations) // 2
    scenario.reset(scenario.before)
    faults = Faults.make(Faults.KILL, number + 1)
    done = run(scenario.box, scenario.argv, first=partial(faults.arm, scenario.place))
    if done.code != -signal.SIGKILL:
        return [f"this harness: a killed command ends with {done.code}"]
    left, known = _outline(scenario.store.take(scenario.place)), _outline(trail.states[number])
    if left == known:
        return []
    return [
        "this harness: a kill leaves something else than its trail says: "
        f"also {sorted(left - known)}, not {sorted(known - left)}"
    ]


def _outline(state: State) -> set[str]:
    """Kinds and names without what is random in them."""
    return {
        f"{stat.S_IFMT(mode):o} {_RANDOM.sub('#', name)}"
        for name, (mode, _, _) in state.entries.items()
    }


def space(world: World, chosen: str | None = None) -> list[Case]:
    """Cases `space/SCENARIO/OPERATION` of those that take space, and `space/SCENARIO/size-N`."""
    lists = []
    for scenario in scenarios(world, chosen):
        takers = record(scenario).takers
        prefix = f"space/{scenario.name}"
        cases = [Case(f"{prefix}/{n}", partial(_full, scenario, n)) for n in range(1, takers + 1)]
        sizes = [Case(f"{prefix}/size-{n}", partial(_limited, scenario, n)) for n in LIMITS]
        lists.append([*sizes[:1], *spread(cases), *sizes[1:]])
    return list(interleaved(lists))


def _full(scenario: Scenario, at: int) -> list[str]:
    scenario.reset(scenario.before)
    faults = Faults.make(Faults.FULL, at)
    done = run(scenario.box, scenario.argv, first=partial(faults.arm, scenario.place))
    operation = faults.name.decode()
    path = os.path.relpath(os.fsdecode(faults.path), scenario.place)
    why = _refused(scenario, done)
    return why and [*why, f"full at {operation} {path}"]


def _limited(scenario: Scenario, size: int) -> list[str]:
    """As `ulimit -f`: no file may have more than `size` bytes."""
    scenario.reset(scenario.before)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return _refused(scenario, run(scenario.box, scenario.argv, first=limit))


def _refused(scenario: Scenario, done: Done) -> list[str]:
    """What is wrong with an end for want of space: 7, a sentence, and all as before; or done; or
    7 and a bundle that is done, of which it says so."""
    why = done.complaints()
    if done.code not in (0, 7, HANGS):
        why.append(f"exit {done.code} for a full disk{done.sentence()}")
    complete = done.code == 7 and _COMPLETE in done.sentence()
    if complete:
        accepted, more = judge.whole(scenario.box, scenario.bundle)
        why += more
        if not accepted or scenario.made() != scenario.expected:
            why.append("the bundle that it calls complete is not what a run alone makes")
    if done.code != 0:
        after = scenario.store.take(scenario.place)
        keeps = "--keep-work" in scenario.argv
        why += _not_as_before(scenario.before, after, scenario.allowed, complete, keeps)
    return [*why, *scenario.next_run()]


def _not_as_before(
    before: State, after: State, allowed: set[str], complete: bool, keeps: bool
) -> list[str]:
    """What a command that found no space changed although it failed.

    A work folder that was asked for may stay, and a lock; of an output, nothing that was not there,
    unless it is `complete`.
    """

    def may_stay(name: str) -> bool:
        if keeps and Path(name).parts[0] == ".b.work":  # the next run goes on from there
            return True
        return name in allowed and (complete or not _is_output(name) or name.endswith("lock"))

    def same(name: str) -> bool:
        (mode, _, what), (mode_now, _, what_now) = before.entries[name], after.entries[name]
        return (mode, what) == (mode_now, what_now)

    left = sorted(name for name in after.entries.keys() - before.entries if not may_stay(name))
    why = [f"it leaves {', '.join(left[:4])}"] if left else []
    if not complete:
        outputs = sorted(filter(_is_output, before.entries))
        changed = [name for name in outputs if name not in after.entries or not same(name)]
        why += [f"it fails and has changed {', '.join(changed[:4])}"] if changed else []
    return why


def _is_output(name: str) -> bool:
    return Path(name).parts[0] in ("b", "repo")


def spread(items: Sequence[T]) -> Iterator[T]:
    """All of them, in an order whose beginnings are spread over the whole: halves, quarters, ..."""
    count = len(items)
    bits = max(1, (count - 1).bit_length())
    for number in range(1 << bits):
        place = int(f"{number:0{bits}b}"[::-1], 2)
        if place < count:
            yield items[place]


def interleaved(lists: Sequence[Sequence[T]]) -> Iterator[T]:
    """The first of each, the second of each, ..."""
    for number in range(max(map(len, lists), default=0)):
        for items in lists:
            if number < len(items):
                yield items[number]
