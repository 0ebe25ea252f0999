"""All steps on the machine with the GPU; nothing but the folder is read, nothing is fetched."""

from __future__ import annotations

import json
import os
import shutil
import sys
import zipfile
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

from iq_export.checksum import sha256_file
from iq_export.engine.plugin import HEADERS_VARIABLE, LIBRARY, cmake_build, find_cmake, find_nvcc
from iq_export.engine.trt import device_compute_capability
from iq_export.errors import BundleError
from tools.gpu_check.report import markdown, verdict
from tools.gpu_check.steps import Failed, Record, Skipped, child

INDEX = "pack.json"
SKIP_EXIT_CODE = 77  # as automake's
_SEED = 0
_CASES, _WATCHED_CASES = 300, 12
_SANITIZERS = ("memcheck", "racecheck", "initcheck")
_PROBLEMS = 9  # compute-sanitizer's exit code, if it finds any
# Where TensorRT for RTX cannot run: measured on an H100, release 1.7.1.
_NO_ENGINES = {
    90: "TensorRT for RTX deserialises no plan on compute capability 9.0, whatever it is built for",
}
# By the profile that covers them.
CASES = {
    "serve": [
        {"name": "prefill 512", "batch": 1, "seq": 512, "past": 0},
        *({"name": f"decode batch {n}", "batch": n, "seq": 1, "past": 512} for n in (1, 8, 32)),
    ],
    "long": [{"name": "prefill 2048", "batch": 1, "seq": 2048, "past": 0}],
}


def run(folder: Path, out: Path, work: Path) -> int:
    """Every step, recorded in `out`; the table and the verdict on stdout.

    0 if no step failed, 1 if one did, 77 without a GPU. Raises BundleError if the folder is not
    what was packed.
    """
    folder, work = folder.resolve(), work.resolve()
    sm = device_compute_capability()
    if sm is None:
        print("gpu_check: skipped: there is no NVIDIA GPU here, or no driver for it.")
        return SKIP_EXIT_CODE
    index = read_index(folder)
    work.mkdir(parents=True, exist_ok=True)
    record = Record(
        out,
        {
            "command": ["python", "-m", "tools.gpu_check", *sys.argv[1:]],
            "iq_export": index["iq_export"],
            "pack_sha256": sha256_file(folder / INDEX),
            "pack": {key: value for key, value in index.items() if key != "files"},
            "plans": {name: d for name, d in index["files"].items() if name.endswith(".plan")},
        },
    )
    here = _Here(folder, work, index, sm, record)
    here.all_steps()
    record.data["verdict"] = verdict(record.steps)
    record.write()
    print(markdown(record.data))
    print("\n".join(record.data["verdict"]))
    return int(any(step["status"] == "failed" for step in record.steps.values()))


def read_index(folder: Path) -> dict[str, Any]:
    """`pack.json`, with every file that it names as it was packed. Raises BundleError if not."""
    try:
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BundleError(f"'{folder}' is no folder of gpu_check: {error}.") from error
    for name, digest in index["files"].items():
        path = folder / name
        if not path.is_file():
            raise BundleError(f"'{path}' is missing: unpack the parts again.")
        if sha256_file(path) != digest:
            raise BundleError(f"'{path}' is not what was packed: transfer it again.")
    found: dict[str, Any] = index
    return found


class _Here:
    """The steps of one run."""

    def __init__(
        self, folder: Path, work: Path, index: dict[str, Any], sm: int, record: Record
    ) -> None:
        self._folder, self._work, self._index, self._sm = folder, work, index, sm
        self._record = record
        self._built = work / "plugins"
        self._sampler = work / "sampling" / "libiq_step_gpu_test.so"
        self._site = work / "site"
        paths = [folder, self._site, folder / "site", os.environ.get("PYTHONPATH", "")]
        self._environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}

    def all_steps(self) -> None:
        step = self._record.step
        step("unpack", self._unpack)
        step("device", lambda: self._python("device"))
        step("build", self._build)
        step("kernels", lambda: self._kernels(_CASES, []), after="build")
        step("bandwidth", self._bandwidth, after="build")
        step("build sampling", self._build_sampling)
        step("sampling", self._sampling, after="build sampling")
        for tool in _SANITIZERS:  # slow, hence after what is timed
            step(f"kernels under {tool}", partial(self._watched, tool), after="build")
        engines = self._index["engines"]
        if engines and self._sm in _NO_ENGINES:
            step("engines", self._no_engines)
            return
        for engine in engines:
            if engine["plan"]:
                step(
                    f"packed plan {engine['name']}",
                    partial(self._check, engine, self._folder / engine["plan"]),
                    after="unpack",
                )
        for profile in CASES if engines else ():
            for engine in engines:
                self._engine(engine, profile)
            step(f"latency {profile}", partial(self._latency, profile), after="unpack")

    def _unpack(self) -> dict[str, Any]:
        """The wheels; Failed if they are of another Python."""
        shutil.rmtree(self._site, ignore_errors=True)
        for wheel in sorted((self._folder / "wheels").glob("*.whl")):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(self._site)
        own = f"{sys.version_info.major}.{sys.version_info.minor}"
        if own != self._index["python"]:
            raise Failed(f"the wheels are for Python {self._index['python']}, this is {own}")
        return {"wheels": sorted(path.name for path in (self._folder / "wheels").iterdir())}

    def _no_engines(self) -> None:
        raise Skipped(_NO_ENGINES[self._sm])

    def _build(self) -> dict[str, Any]:
        headers = str(self._folder / "headers")
        options = {HEADERS_VARIABLE: headers, "IQ_TESTS": "ON", "IQ_GPU_TESTS": "ON"}
        self._cmake(self._folder / "plugins", self._built, "all", options)
        return {"sha256": sha256_file(self._built / LIBRARY), "sm": self._sm}

    def _build_sampling(self) -> dict[str, Any]:
        sources, options = self._folder / "plugins" / "runtime", {"IQ_GPU_TESTS": "ON"}
        self._cmake(sources, self._sampler.parent, "iq_step_gpu_test", options)
        return {"sm": self._sm}

    def _cmake(self, sources: Path, out: Path, target: str, options: dict[str, str]) -> None:
        nvcc = find_nvcc()
        if nvcc is None or find_cmake() is None:
            missing = "nvcc" if nvcc is None else "cmake"
            raise Skipped(f"{missing} was not found: nothing can be compiled here")
        reason = cmake_build(sources, out, nvcc, [self._sm], target, options)
        if reason:
            raise Failed(reason)

    def _kernels(self, cases: int, watcher: list[str]) -> dict[str, Any]:
        libraries = [str(self._built / f"libiq_{kind}_test.so") for kind in ("gpu", "host")]
        arguments = [*libraries, str(cases), str(_SEED)]
        return _missed(self._python("kernels", *arguments, watcher=watcher))

    def _watched(self, tool: str) -> dict[str, Any]:
        watcher = shutil.which("compute-sanitizer")
        if watcher is None:
            raise Skipped("compute-sanitizer was not found")
        # Its own findings go to stderr, so that the result stays the last line of stdout.
        log = str(self._work / f"{tool}.log")
        command = [watcher, "--tool", tool, "--error-exitcode", str(_PROBLEMS), "--log-file", log]
        try:
            return self._kernels(_WATCHED_CASES, command)
        except Failed as why:
            said = Path(log).read_text(errors="replace") if Path(log).is_file() else ""
            summary = said.strip().splitlines()[-1:]
            raise Failed("; ".join([str(why), *summary]), why.result, why.output + said) from why

    def _bandwidth(self) -> dict[str, Any]:
        library = str(self._built / "libiq_gpu_test.so")
        return _missed(self._python("bandwidth", library))

    def _sampling(self) -> dict[str, Any]:
        return _missed(self._python("sampling", str(self._sampler)))

    def _engine(self, engine: dict[str, Any], profile: str) -> None:
        """Build it here; compare what the profile for serving gives."""
        name = _plan_name(engine, profile)
        plan = self._work / f"{name}.plan"
        plan.unlink(missing_ok=True)  # of an earlier run
        self._record.step(
            f"build {name}", lambda: self._build_engine(engine, profile, plan), after="unpack"
        )
        if profile == "serve":
            self._record.step(
                f"engine {name}", lambda: self._check(engine, plan), after=f"build {name}"
            )

    def _build_engine(self, engine: dict[str, Any], profile: str, plan: Path) -> dict[str, Any]:
        """Aimed at what was packed if the device is of it, else at the device itself."""
        plugin = None
        if engine["plugin_nodes"]:
            if not self._record.ok("build"):
                raise Skipped("there is no plugin: build did not succeed")
            plugin = str(self._built / LIBRARY)
        packed = self._index["compute_capabilities"]
        aims = packed if self._sm in packed else []
        task = {
            **engine, "graph": str(self._folder / engine["graph"]), "plan": str(plan),
            "plugin": plugin, "compute_capabilities": aims, "target": f"sm_{self._sm}",
            "profile": self._index["profiles"][profile],
        }  # fmt: skip
        result = self._task("build", task)
        return {**result, "aimed_at": [f"sm_{aim}" for aim in aims] or ["the device itself"]}

    def _check(self, engine: dict[str, Any], plan: Path) -> dict[str, Any]:
        bare = engine["name"].endswith("-bare")  # computes something else, on purpose
        reference = self._folder / "reference" / f"{engine['model']}.npz"
        task = {
            "plan": str(plan), "reference": None if bare else str(reference),
            "decoded": self._index["decoded"], "linears": engine["linears"],
            "layers": str(self._work / f"{plan.stem}.layers.json"),
        }  # fmt: skip
        return self._task("check", task)

    def _latency(self, profile: str) -> dict[str, Any]:
        """Of all engines that were built; those for serving must have run, too."""
        plans = {}
        for engine in self._index["engines"]:
            name = _plan_name(engine, profile)
            last = f"engine {name}" if profile == "serve" else f"build {name}"
            if self._record.ok(last):
                plans[engine["name"]] = str(self._work / f"{name}.plan")
        if not plans:
            raise Skipped("no engine of this profile runs here")
        return self._task("latency", {"plans": plans, "cases": CASES[profile]})

    def _task(self, step: str, task: dict[str, Any]) -> dict[str, Any]:
        path = self._work / "task.json"
        path.write_text(json.dumps(task), encoding="utf-8")
        return self._python("engines", step, str(path))

    def _python(self, module: str, *arguments: str, watcher: Iterable[str] = ()) -> dict[str, Any]:
        command = [*watcher, sys.executable, "-m", f"tools.gpu_check.{module}", *arguments]
        return child(command, self._environment, self._folder)


def _plan_name(engine: dict[str, Any], profile: str) -> str:
    return f"{engine['name']} {profile}"


def _missed(result: dict[str, Any]) -> dict[str, Any]:
    """Failed, with the numbers, if a bar is missed."""
    if result["missed"]:
        raise Failed("; ".join(result["missed"]), result)
    return result
