"""Compare every way of quantizing one model on the same data, in one resumable command.

    python -m tools.compare --model smollm2-135m --work build/compare [--quick]

See docs/compare.md for what each row means. Progress goes to stderr; the table to stdout and, with
a JSON of everything, into the work folder.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from iq_export.bundle.manifest import write_atomically
from iq_export.checksum import sha256_file
from iq_export.errors import INTERRUPTED_EXIT_CODE, DataError, IqError, UsageError
from tools.compare import data, table
from tools.compare.environments import REQUIREMENTS, Environments, default_folder
from tools.compare.methods import Job, bits, float_jobs, is_simulation, recipe_jobs
from tools.compare.worker import versions

_ROOT = Path(__file__).resolve().parents[2]
# Peers beside ours at the simulated recipes.
_BEST = 2
# Code that decides a row's graph, by kind; and what decides every row's figures.
_SOURCES = {
    "float": ("iq_export/passes/to_half.py",),
    "plain": (
        "tools/compare/plain.py", "tools/compare/prefix.py", "iq_export/passes/quantize.py",
        "iq_export/passes/rotate.py", "iq_export/passes/fold_smoothing.py",
        "iq_export/formats/*.py", "iq_export/graph/sites.py",
    ),
    "peer": ("tools/compare/peer.py",),
    "ours": ("iq_export/**/*.py",),
}  # fmt: skip
_MEASURED_BY = ("tools/compare/measure.py", "iq_export/evaluate/perplexity.py")
# Forward passes over the calibration windows that a build is worth, from runs on SmolLM2.
_BUILD_PASSES = {"float": 1, "plain": 4, "peer": 5, "ours": 18}
_FLOPS = 100e9  # of two cores, ONNX Runtime
_TOKENS_PER_ITEM = 104  # padding included


@dataclass(frozen=True)
class Settings:
    """What all rows share."""

    model: str
    work: Path
    tokenizer: Path | None
    calibration: str
    samples: int
    calibration_length: int
    windows: int
    length: int
    items: int
    seeds: tuple[int, ...]
    tasks_at_all_seeds: bool
    environments: Environments
    keep_graphs: bool
    accept_terms: bool


@dataclass(frozen=True)
class Ground:
    """The traced model and the texts, with their checksums."""

    traced: Path
    assets: Path
    calibration: Path
    texts: dict[str, Path]
    tasks: tuple[str, ...]
    checksums: dict[str, str]
    notes: list[str]


def main(arguments: list[str] | None = None) -> int:
    """Run, print, and return an exit code as `iq-export` does."""
    options = _parser().parse_args(arguments)
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        return _run(options)
    except IqError as error:
        print(f"compare: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:  # before the first row
        return INTERRUPTED_EXIT_CODE


def _interrupt(_: int, __: FrameType | None) -> None:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.compare", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--model", default="smollm2-135m", help="what `iq-export compile` takes as MODEL")
    add("--tokenizer", type=Path, help="folder with tokenizer.json, for an .onnx MODEL")
    add("--accept-terms", action="store_true", help="of a gated model, as in `iq-export compile`")
    add("--work", type=Path, default=Path("build/compare"), help="results and graphs; resumes")
    add("--recipes", default="w8a8,w8a6,w4a8,w4a4", help="the first in full, the others in brief")
    add("--methods", help="only these, by name (--list); 'ours' is every recipe of this project")
    add("--seeds", default="0,1,2", help="of the calibration windows")
    add("--calibration", default=data.CALIBRATION_DEFAULT,
        help="boolq-calibration, builtin, or a UTF-8 file")  # fmt: skip
    add("--samples", type=int, default=16, help="calibration windows")
    add("--calibration-length", type=int, default=512, help="their tokens")
    add("--windows", type=int, default=32, help="evaluation windows per text")
    add("--length", type=int, default=512, help="their tokens")
    add("--items", type=int, default=300, help="questions per task; 0 for none")
    add("--tasks-at-all-seeds", action="store_true", help="and of all rows")
    add("--quick", action="store_true", help="4 windows, seed 0, no questions, w8a8 only")
    add("--text", action="append", type=Path, metavar="FILE",
        help="evaluate on this file instead of BoolQ and Austen; repeatable")  # fmt: skip
    add("--peer-env", type=Path, default=None, help="folder of the peers' environments")
    add("--no-install", action="store_true", help="use only environments that are there")
    add("--keep-graphs", action="store_true", help="leave every row's graph in the work folder")
    add("--list", action="store_true", help="print the methods and stop")
    return parser


def _run(options: argparse.Namespace) -> int:
    if options.quick:
        options.windows, options.seeds, options.items = 4, "0", 0
        options.recipes = options.recipes.split(",")[0]
    names = options.methods.split(",") if options.methods else None
    recipes = options.recipes.split(",")
    for recipe in recipes:
        bits(recipe)
    try:
        seeds = [int(seed) for seed in options.seeds.split(",")]
    except ValueError as error:
        raise UsageError(f"--seeds are numbers with commas, not '{options.seeds}'.") from error
    if options.list:
        for job in [
            *float_jobs(names, 0),
            *(j for r in recipes for j in recipe_jobs(r, names, [0])),
        ]:
            print(f"{job.method.name:<24} {job.recipe or '-':<6} {job.method.about}")
        return 0
    folder = options.peer_env or default_folder()
    settings = Settings(
        model=options.model, work=options.work.absolute(), tokenizer=options.tokenizer,
        calibration=options.calibration, samples=options.samples,
        calibration_length=options.calibration_length, windows=options.windows,
        length=options.length, items=options.items,
        seeds=tuple(seeds), tasks_at_all_seeds=options.tasks_at_all_seeds,
        environments=Environments(folder.absolute(), build=not options.no_install),
        keep_graphs=options.keep_graphs,
        accept_terms=options.accept_terms,
    )  # fmt: skip
    ground = _prepare(settings, options.text)
    first = [*float_jobs(names, seeds[0]), *recipe_jobs(recipes[0], names, seeds)]
    # How many rows the other recipes have is known, which peers is not yet.
    rest = [j.method.kind for r in recipes[1:] for j in _brief(r, names, seeds, [])]
    rest += [] if names else ["plain"] * _BEST * (len(recipes) - 1)
    _print_needs(settings, ground, first, rest)
    records: list[dict[str, Any]] = []
    interrupted = False
    begin = time.perf_counter()
    try:
        _work_off(first, settings, ground, records)
        for recipe in recipes[1:]:
            _work_off(_brief(recipe, names, seeds, best_peers(records)), settings, ground, records)
    except KeyboardInterrupt:
        interrupted = True
        print("interrupted: the same command goes on from here", file=sys.stderr)
    _finish(settings, ground, seeds, records, time.perf_counter() - begin, interrupted)
    return INTERRUPTED_EXIT_CODE if interrupted else 0


def _brief(recipe: str, names: list[str] | None, seeds: list[int], best: list[str]) -> list[Job]:
    """A later recipe: one seed, ours and the best peers; all methods that were named."""
    jobs = recipe_jobs(recipe, names, seeds[:1])
    return [j for j in jobs if names or j.method.kind == "ours" or j.method.name in best]


def best_peers(records: Iterable[dict[str, Any]], count: int = _BEST) -> list[str]:
    """The methods with narrower forms that came nearest to fp32 on BoolQ (the first text), with
    every block linear quantized: the median of their seeds decides."""
    rows = table.summarize(list(records))
    found = []
    for row in rows:
        whole = row["share"] is not None and row["share"]["median"] == 1
        ratio = row[table.text_names(row)[0]]["ratio"]
        if row["kind"] == "plain" and whole and ratio:
            found.append((ratio["median"], row["method"]))
    return [name for _, name in sorted(found)[:count]]


def _prepare(settings: Settings, texts: list[Path] | None) -> Ground:
    """Trace the model and fetch the texts, or find both."""
    work = settings.work
    work.mkdir(parents=True, exist_ok=True)
    compiled = work / "compile"
    compiled.mkdir(exist_ok=True)
    tokenizer = str(settings.tokenizer.absolute()) if settings.tokenizer else None
    task = {
        "model": settings.model, "tokenizer": tokenizer, "work": str(compiled),
        "accept_terms": settings.accept_terms,
    }  # fmt: skip
    traced = _child("trace", task, work)
    if "error" in traced:
        raise DataError(traced["error"])
    notes: list[str] = []
    found: dict[str, Path] = {}
    calibration = data.calibration_file(settings.calibration, work)
    if texts:
        found = {path.stem: path.absolute() for path in texts}
    else:
        boolq = work / "boolq.txt"
        write_atomically(boolq, data.boolq_texts()[1])
        found["boolq"] = boolq
        try:
            austen = work / "austen.txt"
            write_atomically(austen, data.austen_text(settings.environments))
            found["austen"] = austen
        except DataError as error:
            notes.append(f"no Austen: {error}")
    model = Path(traced["traced"])
    files = {"calibration": calibration, "graph": model, **found}
    weights = model.with_name(model.name + ".data")
    if weights.is_file():
        files["weights"] = weights
    checksums = {name: sha256_file(path) for name, path in files.items()}
    if checksums["calibration"] in [checksums[name] for name in found]:
        raise DataError("the calibration text is an evaluation text: give another one")
    tasks = data.TASKS if settings.items else ()
    return Ground(model, Path(traced["assets"]), calibration, found, tasks, checksums, notes)


def _print_needs(settings: Settings, ground: Ground, jobs: list[Job], rest: list[str]) -> None:
    """Memory, disk and time, before anything is spent. `rest`: kinds of the rows after `jobs`."""
    size = sum(file.stat().st_size for file in ground.traced.parent.glob("model.onnx*"))
    per_token = size / 4 * 2 / _FLOPS
    calibrated = settings.samples * settings.calibration_length
    todo = [job for job in jobs if not _result_path(job, settings, ground).is_file()]
    evaluated = len(ground.texts) * settings.windows * settings.length
    seconds = 0.0
    for kind, tasks in [
        *((job.method.kind, _tasks(job, settings, ground)) for job in todo),
        *((kind, ground.tasks) for kind in rest),
    ]:
        asked = len(tasks) * settings.items * _TOKENS_PER_ITEM
        seconds += (evaluated + asked + _BUILD_PASSES[kind] * calibrated) * per_token + 15
    peers = any(job.method.kind == "peer" for job in todo)
    memory = 1.2e9 + size * (13 if peers else 4)
    print(
        f"{len(jobs) + len(rest)} rows, {len(jobs) - len(todo)} of them known; about "
        f"{seconds / 3600:.1f} h on 2 cores, {memory / 1e9:.0f} GB of memory"
        f"{' (the peers take most of it)' if peers else ''}, {4 * size / 1e9:.0f} GB of disk. "
        "Graphs are evaluated with float32 float parts: half is emulated, and slow, on a CPU.",
        file=sys.stderr,
    )


def _work_off(
    jobs: list[Job], settings: Settings, ground: Ground, records: list[dict[str, Any]]
) -> None:
    for number, job in enumerate(jobs, start=1):
        head = f"({number}/{len(jobs)}) {job.name}"
        path = _result_path(job, settings, ground)
        if _is_known(path, job, settings, ground):
            print(f"{head}: known", file=sys.stderr)
            records.append(json.loads(path.read_text(encoding="utf-8")))
            continue
        print(head, file=sys.stderr)
        record = _row(job, settings, ground)
        records.append(record)
        if record["error"]:
            print(f"{head}: {record['error']}", file=sys.stderr)  # tried again by the next run
        else:
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, json.dumps(record, indent=1) + "\n")


def _row(job: Job, settings: Settings, ground: Ground) -> dict[str, Any]:
    """Build and evaluate one row; what fails is an `error`, and the others go on."""
    determined = _determined_by(job, settings, ground)
    record: dict[str, Any] = {
        "method": job.method.name, "label": job.method.label, "about": job.method.about,
        "kind": job.method.kind, "recipe": job.recipe, "seed": job.seed,
        "simulation": is_simulation(job.recipe), "determined_by": determined, "error": None,
    }  # fmt: skip
    folder = settings.work / "graphs" / _key(determined)
    try:
        python = sys.executable
        if job.method.environment:
            python = str(settings.environments.python(job.method.environment))
        task = _task(job, settings, ground, folder, python)
        made = folder / "build.json"
        if made.is_file():
            record["build"] = json.loads(made.read_text(encoding="utf-8"))
        else:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            record["build"] = _child("build", task, folder)
            _raise_error(record["build"])
            write_atomically(made, json.dumps(record["build"]))
        record["results"] = _child("evaluate", task, folder)
        _raise_error(record["results"])
    except DataError as error:
        record["error"] = str(error)
    if not settings.keep_graphs:
        shutil.rmtree(folder, ignore_errors=True)
    return record


def _raise_error(result: dict[str, Any]) -> None:
    if "error" in result:
        raise DataError(result["error"])


def _task(
    job: Job, settings: Settings, ground: Ground, folder: Path, python: str
) -> dict[str, Any]:
    tokenizer = str(settings.tokenizer.absolute()) if settings.tokenizer else None
    return {
        "kind": job.method.kind, "options": job.method.options, "python": python,
        "bits": bits(job.recipe) if job.recipe else None, "seed": job.seed,
        "folder": str(folder), "work": str(settings.work / "compile"),
        "model": settings.model, "tokenizer": tokenizer, "accept_terms": settings.accept_terms,
        "traced": str(ground.traced), "assets": str(ground.assets),
        "calibration": str(ground.calibration), "samples": settings.samples,
        "calibration_length": settings.calibration_length,
        "texts": {name: str(path) for name, path in ground.texts.items()},
        "tasks": list(_tasks(job, settings, ground)), "items": settings.items,
        "windows": settings.windows, "length": settings.length,
        "references": str(_references(settings, ground)),
        "is_reference": job.method.name == "fp32",
    }  # fmt: skip


def _tasks(job: Job, settings: Settings, ground: Ground) -> tuple[str, ...]:
    """Questions take twice as long as texts, and their error is that of 300 items, not of a seed:
    they are asked at the first seed, and not for context's sake, unless all are wanted."""
    asked = job.seed == settings.seeds[0] and not job.method.brief
    return ground.tasks if settings.tasks_at_all_seeds or asked else ()


def _evaluation(settings: Settings, ground: Ground, tasks: tuple[str, ...]) -> dict[str, Any]:
    return {
        "model": [ground.checksums.get("graph"), ground.checksums.get("weights")],
        "texts": {name: ground.checksums[name] for name in ground.texts},
        "windows": settings.windows,
        "length": settings.length,
        "tasks": list(tasks),
        "items": settings.items,
        "code": _code_digest(_MEASURED_BY),
    }


def _references(settings: Settings, ground: Ground) -> Path:
    """Where fp32's predictions lie that the other rows are compared with."""
    folder = settings.work / "reference" / _key(_evaluation(settings, ground, ()))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _determined_by(job: Job, settings: Settings, ground: Ground) -> dict[str, Any]:
    """Everything that decides a row's figures: two rows with the same are the same row."""
    found: dict[str, Any] = {
        "kind": job.method.kind,
        "options": job.method.options,
        "recipe": job.recipe,
        "evaluation": _evaluation(settings, ground, _tasks(job, settings, ground)),
        "versions": versions(),
        "code": _code_digest(_SOURCES[job.method.kind]),
    }
    if job.method.seeded:
        found |= {
            "seed": job.seed,
            "calibration": ground.checksums["calibration"],
            "samples": settings.samples,
            "calibration_length": settings.calibration_length,
        }
    if job.method.environment:
        found["requirements"] = REQUIREMENTS[job.method.environment]
    return found


def _code_digest(patterns: Iterable[str]) -> str:
    digest = hashlib.sha256()
    for pattern in patterns:
        for file in sorted(_ROOT.glob(pattern)):
            digest.update(f"{file.relative_to(_ROOT)}\0{sha256_file(file)}\n".encode())
    return digest.hexdigest()


def _key(determined: dict[str, Any]) -> str:
    text = json.dumps(determined, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _result_path(job: Job, settings: Settings, ground: Ground) -> Path:
    name = re.sub(r"[^\w.+-]", "-", job.name)
    key = _key(_determined_by(job, settings, ground))
    return settings.work / "results" / f"{name}-{key}.json"


def _is_known(path: Path, job: Job, settings: Settings, ground: Ground) -> bool:
    if job.method.name == "fp32":
        references = _references(settings, ground)
        if not all((references / f"{name}.npz").is_file() for name in ground.texts):
            return False
    return path.is_file()


def _child(step: str, task: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run a step of worker.py; its last line of stdout. Ended with us, grandchildren included."""
    path = folder / f"{step}.task.json"
    path.write_text(json.dumps(task), encoding="utf-8")
    environment = dict(os.environ)
    environment["PYTHONPATH"] = str(_ROOT)
    child = subprocess.Popen(
        [sys.executable, "-m", "tools.compare.worker", step, str(path)],
        stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = child.communicate()
    except BaseException:
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
        raise
    lines = output.strip().splitlines()
    if child.returncode or not lines:
        return {"error": f"{step} ended with {child.returncode}; its message is on stderr above"}
    result = json.loads(lines[-1])
    assert isinstance(result, dict)
    return result


def _finish(
    settings: Settings,
    ground: Ground,
    seeds: list[int],
    records: list[dict[str, Any]],
    seconds: float,
    interrupted: bool,
) -> None:
    rows = table.summarize(records)
    text = table.markdown(rows)
    for note in ground.notes:
        text += f"\n\n{note}"
    report = {
        "command": shlex.join([Path(sys.executable).name, "-m", "tools.compare", *sys.argv[1:]]),
        "device": "CPU, ONNX Runtime",
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "platform": platform.platform(),
        "versions": {"python": platform.python_version(), **versions()},
        "model": settings.model,
        "seeds": seeds,
        "windows": settings.windows,
        "length": settings.length,
        "items": settings.items,
        "calibration": {"text": settings.calibration, "samples": settings.samples,
                        "length": settings.calibration_length},
        "checksums": ground.checksums,
        "seconds": seconds,
        "complete": not interrupted and all(not record["error"] for record in records),
        "notes": ground.notes,
        "rows": rows,
        "records": records,
    }  # fmt: skip
    write_atomically(settings.work / "comparison.json", json.dumps(report, indent=1) + "\n")
    write_atomically(settings.work / "table.md", text + "\n")
    print(text)
    print(f"written: {settings.work}/table.md and comparison.json", file=sys.stderr)


def _cpu() -> str:
    """The processor's name, where the system tells."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    sys.exit(main())
