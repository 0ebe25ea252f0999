"""Two to four commands at once, on the same and on different outputs, work folders and models.

What ends with 0 has made what it makes alone; whatever ends otherwise says why.
"""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from tests.cli import fuzz
from tests.faults import judge
from tests.faults.run import Case, Done, World, start, wait

WANTED = 200
_LATEST = 0.7  # seconds by which one starts after another: most of a compile


@dataclass
class Crowd:
    """One case: commands that start at times of theirs, and what is asked of them together."""

    world: World
    box: Path
    rng: random.Random
    commands: list[list[str]] = field(default_factory=list)
    made: list[tuple[str, str, str]] = field(
        default_factory=list
    )  # of compiles: OUT, model, recipe
    done: list[Done] = field(default_factory=list)

    @property
    def place(self) -> Path:
        return self.box / "place"

    @property
    def out(self) -> Path:
        return self.place / "b"

    def compile(self, out: str, model: str, recipe: str = "fp16", *more: str) -> None:
        """One more compile."""
        self.commands.append(self.world.compile(self.place / out, model, recipe, *more))
        self.made.append((out, model, recipe))

    def bundle(self) -> None:
        """A bundle of model a stands there."""
        source = self.world.compiled("a")
        shutil.copytree(source, self.place, symlinks=True, dirs_exist_ok=True)

    def run(self) -> None:
        """All of them, to their ends."""
        children = []
        for number, argv in enumerate(self.commands):
            children.append(start(self.box, argv, name=f"{number}"))
            time.sleep(self.rng.choice((0, 0.05, _LATEST)) * self.rng.random())
        for number, (argv, child) in enumerate(zip(self.commands, children, strict=True)):
            self.done.append(wait(self.box, argv, child, name=f"{number}"))


def cases(world: World, chosen: str | None = None) -> list[Case]:
    """Cases `processes/KIND-NUMBER`."""
    kinds = list(_KINDS)
    return [
        Case(f"processes/{kinds[n % len(kinds)]}-{n}", partial(_case, world, kinds, n))
        for n in range(WANTED)
    ]


def _case(world: World, kinds: list[str], number: int) -> list[str]:
    kind = kinds[number % len(kinds)]
    crowd = Crowd(world, world.box("processes"), world.rng(f"processes/{number}"))
    count = crowd.rng.choice((2, 2, 2, 3, 4))
    check = _KINDS[kind](crowd, count)
    crowd.run()
    why = [what for done in crowd.done for what in done.complaints()]
    if all(done.code != 0 for done in crowd.done):
        why.append("nobody finished: " + " | ".join(done.sentence() for done in crowd.done))
    why += check(crowd)
    left = [n for n in judge.names(crowd.place) if fuzz._LEFT.search(Path(n).name)]
    if left := [name for name in sorted(left) if not name.endswith("kept.work")]:
        why.append(f"they leave {', '.join(left[:4])}")
    return why


def _bundles(crowd: Crowd) -> list[str]:
    """Each output is what one of the compiles that ended with 0 makes alone, all of one run."""
    why = []
    ends = list(zip(crowd.made, crowd.done, strict=False))  # compiles come first
    for out in sorted({out for out, _, _ in crowd.made}):
        good = {made for made, done in ends if made[0] == out and done.code == 0}
        path = crowd.place / out
        if not good:
            continue
        accepted, more = judge.whole(crowd.box, path)
        why += [f"{out}: {what}" for what in more]
        if not accepted:
            why.append(f"{out} was made by a command that ended with 0, and verify rejects it")
            continue
        found = judge.signature(path)
        wrong = []
        for _, model, recipe in sorted(good):
            expected = judge.solo(crowd.world, model, recipe)
            wrong.append(judge.differences({**expected, "source": 0}, {**found, "source": 0}))
        if all(wrong):
            why.append(f"{out} differs from what a compile alone makes: {' or '.join(wrong)}")
    return why


def _all_finish(crowd: Crowd) -> list[str]:
    """They have nothing in common: none has a reason to fail."""
    failed = [done for done in crowd.done if done.code != 0]
    return [f"ends with {done.code}{done.sentence()}" for done in failed] + _bundles(crowd)


def _records(crowd: Crowd) -> list[str]:
    """The bundle is whole, and has what each command that ended with 0 adds to it."""
    accepted, why = judge.whole(crowd.box, crowd.out)
    if not accepted:
        return [*why, "the bundle is damaged"]
    manifest = json.loads((crowd.out / "manifest.json").read_text())
    for done in crowd.done:
        if done.code == 0 and done.argv[0] == "build":
            target = done.argv[done.argv.index("--target") + 1]
            if target not in manifest["graphs"][0]["engines"]:
                why.append(f"the engine of {target} was built and is not recorded")
        if done.code == 0 and done.argv[0] == "eval" and not manifest["accuracy"]:
            why.append("eval ended with 0 and its table is not recorded")
    return why


Check = Callable[[Crowd], list[str]]


def _same_out(crowd: Crowd, count: int) -> Check:
    for _ in range(count):
        crowd.compile("b", "a")
    return _bundles


def _same_out_two_models(crowd: Crowd, count: int) -> Check:
    for number in range(count):
        crowd.compile("b", "ab"[number % 2])
    return _bundles


def _replacing(crowd: Crowd, count: int) -> Check:
    crowd.bundle()
    for number in range(count):
        crowd.compile("b", "ba"[number % 2], "fp16", "--force")
    return _bundles


def _same_work(crowd: Crowd, count: int) -> Check:
    for number in range(count):
        crowd.compile(f"b{number}", "ab"[number % 2], "fp16", "--work", str(crowd.place / "kept"))
    return _bundles


def _same_work_two_recipes(crowd: Crowd, count: int) -> Check:
    for number in range(count):
        work = str(crowd.place / "kept")
        crowd.compile(f"b{number}", "a", ("fp16", "w8a8")[number % 2], "--work", work)
    return _bundles


def _apart(crowd: Crowd, count: int) -> Check:
    for number in range(count):
        crowd.compile(f"b{number}", crowd.rng.choice("ab"))
    return _all_finish


def _build(crowd: Crowd, target: str) -> list[str]:
    return ["build", str(crowd.out), "--target", target, "--quiet"]


def _eval(crowd: Crowd) -> list[str]:
    return ["eval", str(crowd.out), "--bundle-only", "--windows", "1", "--length", "16",
            "--no-speed", "--text", str(crowd.world.base / "other.txt"), "--quiet"]  # fmt: skip


def _builds(crowd: Crowd, count: int) -> Check:
    crowd.bundle()
    targets = ("rtx-ada", "rtx-turing", "rtx-blackwell", "rtx-ampere")
    crowd.commands += [_build(crowd, target) for target in targets[:count]]
    return _records


def _build_and_eval(crowd: Crowd, count: int) -> Check:
    crowd.bundle()
    crowd.commands += [_build(crowd, "rtx-ada"), _eval(crowd), _eval(crowd),
                       _build(crowd, "rtx-ampere")][:count]  # fmt: skip
    crowd.rng.shuffle(crowd.commands)
    return _records


def _replaced_while_built(crowd: Crowd, count: int) -> Check:
    crowd.bundle()
    crowd.compile("b", "b", "fp16", "--force")
    crowd.commands += [_build(crowd, "rtx-ada"), _eval(crowd), _build(crowd, "rtx-ampere")][
        : count - 1
    ]

    def check(crowd: Crowd) -> list[str]:
        accepted, why = judge.whole(crowd.box, crowd.out)
        return why if accepted else [*why, "the bundle is damaged"]

    return check


def _readers(crowd: Crowd, count: int) -> Check:
    """A bundle is replaced, built for and evaluated, and is whole for who reads it meanwhile."""
    crowd.bundle()
    crowd.commands = [
        crowd.rng.choice((
            crowd.world.compile(crowd.out, "b", "fp16", "--force"),
            _build(crowd, "rtx-ampere"),
            _eval(crowd),
        ))
    ]  # fmt: skip
    crowd.commands += [["verify", str(crowd.out), "-q"] for _ in range(count - 1)]

    def check(crowd: Crowd) -> list[str]:
        failed = [done for done in crowd.done if done.code != 0]
        return [f"{done.argv[0]} ends with {done.code}{done.sentence()}" for done in failed]

    return check


def _packages(crowd: Crowd, count: int) -> Check:
    crowd.bundle()
    repo = crowd.place / "repo"
    crowd.commands += [
        ["package", "--triton", str(crowd.out), str(repo), "--backend", "onnxruntime", "--name",
         "m", "--force", "--quiet"] for _ in range(count)
    ]  # fmt: skip

    def check(crowd: Crowd) -> list[str]:
        found = judge.content(repo)
        crowd.commands, crowd.done = crowd.commands[:1], []
        shutil.rmtree(repo, ignore_errors=True)
        crowd.run()
        same = found == judge.content(repo)
        return [] if same else ["the packed model is not what one command makes"]

    return check


_KINDS: dict[str, Callable[[Crowd, int], Check]] = {
    "same-out": _same_out,
    "same-work": _same_work,
    "builds": _builds,
    "two-models": _same_out_two_models,
    "replacing": _replacing,
    "two-recipes": _same_work_two_recipes,
    "build-and-eval": _build_and_eval,
    "apart": _apart,
    "replaced-while-built": _replaced_while_built,
    "readers": _readers,
    "packages": _packages,
}
