"""One step of one row in a process of its own: `python -m tools.compare.worker STEP TASK.json`.

`build` makes the graph, `evaluate` measures it. Each prints one JSON line, with the seconds and the
peak memory of the process that did the work, so that rows do not share either.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from iq_export.bundle.lock import claim
from iq_export.bundle.manifest import write_atomically
from iq_export.errors import DataError, IqError
from iq_export.graph import io
from iq_export.graph.sites import find_sites
from iq_export.observe.samples import Window, windows
from iq_export.progress import Progress
from iq_export.run.generate import Tokenizer
from iq_export.run.ort import CausalLM
from tools.compare.data import items, requests
from tools.compare.measure import Reference, measure_task, measure_text
from tools.compare.peer import peak_bytes
from tools.compare.prefix import Prefix, PrefixedLM

MODEL, PREFIX = "model.onnx", "prefix.npz"


def trace(task: dict[str, Any]) -> dict[str, Any]:
    """The traced model of `task`, found again if it is there."""
    from iq_export.model.load import resolve
    from iq_export.model.trace import trace as trace_model

    tokenizer = Path(task["tokenizer"]) if task["tokenizer"] else None
    source = resolve(task["model"], tokenizer=tokenizer, accept_terms=task["accept_terms"])
    progress = Progress()
    work = Path(task["work"])
    # `_ours` compiles in the same folder.
    with claim(work, keep=True, say=progress.note), progress.step("Trace"):
        traced = trace_model(source, work / "traced", opset=23, progress=progress)
        whole = io.whole(traced.model, work / "whole.onnx")
    return {"traced": str(whole), "assets": str(traced.assets)}


def build(task: dict[str, Any]) -> dict[str, Any]:
    """Make `task["folder"]/model.onnx` with the method's tool; what it took and what it left."""
    kinds = {"float": _float, "plain": _plain, "peer": _peer, "ours": _ours}
    begin = time.perf_counter()
    found = kinds[task["kind"]](task)
    found.setdefault("seconds", time.perf_counter() - begin)
    found.setdefault("peak_bytes", peak_bytes())
    traced = Path(task["traced"])
    names = [linear.node for linear in find_sites(io.load(traced)).linears]
    quantized = quantized_products(graph_of(task), names)
    left = [name for name in names if name not in quantized]
    return found | {"linears": len(names), "quantized": len(quantized), "left": left}


def graph_of(task: dict[str, Any]) -> Path:
    """The row's graph; the traced file itself for fp32."""
    made = Path(task["folder"]) / MODEL
    return made if made.is_file() else Path(task["traced"])


def quantized_products(path: Path, names: list[str]) -> set[str]:
    """Which products read a dequantized weight, counted in the finished file.

    A weight counts through layout changes and casts, whoever wrote the graph.
    """
    graph = onnx.load(path, load_external_data=False).graph
    producers = {output: node for node in graph.node for output in node.output}
    wanted, found = set(names), set()
    for node in graph.node:
        if node.name not in wanted or node.op_type not in ("MatMul", "Gemm", "MatMulNBits"):
            continue
        source = producers.get(node.input[1])
        while source is not None and source.op_type in ("Transpose", "Cast", "Reshape"):
            source = producers.get(source.input[0])
        is_weight = source is not None and source.op_type == "DequantizeLinear"
        if is_weight or node.op_type == "MatMulNBits":
            found.add(node.name)
    return found


def calibration_windows(task: dict[str, Any]) -> tuple[list[Window], Tokenizer]:
    """The very windows that `iq-export compile` cuts from the same file."""
    tokenizer = Tokenizer(Path(task["assets"]))
    text = Path(task["calibration"]).read_text(encoding="utf-8")
    cut = windows(
        tokenizer, text, length=task["calibration_length"], count=task["samples"],
        seed=task["seed"], bos="mixed",
    )  # fmt: skip
    return cut, tokenizer


def _float(task: dict[str, Any]) -> dict[str, Any]:
    if task["options"]["half"]:
        from iq_export.passes.to_half import to_half

        model = io.load(Path(task["traced"]))
        to_half(model)
        io.save(model, Path(task["folder"]) / MODEL)
    return {"notes": [], "versions": {}}


def _plain(task: dict[str, Any]) -> dict[str, Any]:
    from tools.compare import plain

    cut, tokenizer = calibration_windows(task)
    options = dict(task["options"])
    options["smoothing"] = tuple(options["smoothing"])
    out = Path(task["folder"]) / MODEL
    weight_bits, activation_bits = task["bits"]
    built = plain.build(
        Path(task["traced"]), out, cut, (weight_bits, activation_bits), plain.Plain(**options),
        bos=tokenizer.bos_id, seed=task["seed"],
    )  # fmt: skip
    notes = list(built.notes)
    if built.prefix is not None:
        built.prefix.save(Path(task["folder"]) / PREFIX)
        notes.append(repr(tokenizer.decode(built.prefix.ids)))
    return {"notes": notes, "versions": {}}


def _peer(task: dict[str, Any]) -> dict[str, Any]:
    """In the peer's environment, on a copy of the traced model: a peer writes beside its input."""
    folder = Path(task["folder"])
    cut, _ = calibration_windows(task)
    np.save(folder / "windows.npy", np.array([window.ids for window in cut], np.int64))
    source = folder / "source"
    source.mkdir(exist_ok=True)
    traced = Path(task["traced"])
    for file in (traced, traced.with_name(traced.name + ".data")):
        shutil.copyfile(file, source / file.name)
    job = {
        "tool": task["options"]["tool"],
        "model": str(source / traced.name),
        "output": str(folder / MODEL),
        "windows": str(folder / "windows.npy"),
        "nodes": [linear.node for linear in find_sites(io.load(traced)).linears],
        "options": task["options"],
    }
    (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
    script = Path(__file__).with_name("peer.py")
    command = [task["python"], str(script), str(folder / "job.json")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    shutil.rmtree(source)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        raise DataError(f"{job['tool']} failed: {lines[-1] if lines else done.returncode}")
    return {"notes": [], **json.loads(done.stdout.splitlines()[-1])}


def _ours(task: dict[str, Any]) -> dict[str, Any]:
    """`iq-export compile`, as the method's options say, and no engine."""
    from iq_export.compile import CompileOptions, compile

    folder = Path(task["folder"])
    work = Path(task["work"])
    extra = {k: v for k, v in task["options"].items() if k not in ("recipe", "file")}
    options = CompileOptions(
        model=task["model"], out=folder / "bundle", recipe=task["options"]["recipe"], targets=(),
        calibration=task["calibration"], samples=task["samples"],
        length=task["calibration_length"], seed=task["seed"], force=True, work=work,
        accept_terms=task["accept_terms"],
        tokenizer=Path(task["tokenizer"]) if task["tokenizer"] else None, **extra,
    )  # fmt: skip
    bundle = compile(options, Progress())
    for name in (MODEL, f"{MODEL}.data"):
        (folder / "bundle" / name).rename(folder / name)
    lifecycles = bundle.manifest.graph.lifecycles
    replaced = sum(life["replaced"] for life in lifecycles)
    notes = [f"{replaced} of {len(lifecycles)} lifecycles replaced"]
    shutil.rmtree(folder / "bundle")
    _clear(work, task)
    return {"notes": notes, "versions": {}}


def _clear(work: Path, task: dict[str, Any]) -> None:
    """Remove gigabytes that nothing reads again; the traced model and its assets are kept."""
    kept = [Path(task[name]).parent for name in ("traced", "assets")]
    for stage in work.iterdir():
        if stage.is_dir() and stage not in kept:
            shutil.rmtree(stage)


def evaluate(task: dict[str, Any]) -> dict[str, Any]:
    """Every text and task of `task`, against the reference on disk (which fp32 writes)."""
    folder = Path(task["folder"])
    tokenizer = Tokenizer(Path(task["assets"]))
    begin = time.perf_counter()
    model: Any = CausalLM(graph_of(task), round_half=True)
    if (folder / PREFIX).is_file():
        model = PrefixedLM(model, Prefix.load(folder / PREFIX))
    progress = Progress()
    results: dict[str, Any] = {"texts": {}, "tasks": {}}
    references = Path(task["references"])
    for name, text in task["texts"].items():
        path = references / f"{name}.npz"
        cut = _evaluation_windows(task, name, Path(text), tokenizer)
        known = None if task["is_reference"] else Reference.load(path)
        with progress.step(f"Evaluate {name}"):
            results["texts"][name], kept = measure_text(model, cut, known, progress)
        if task["is_reference"]:
            if kept is None:
                raise DataError(f"fp32 itself: {results['texts'][name]['error']}")
            kept.save(path)
    for name in task["tasks"]:
        questions = items(name, task["items"])
        wanted = requests(questions, tokenizer)
        with progress.step(f"Evaluate {name}"):
            results["tasks"][name] = measure_task(model, questions, wanted, progress)
    results["seconds"] = time.perf_counter() - begin
    return results


def _evaluation_windows(
    task: dict[str, Any], name: str, text: Path, tokenizer: Tokenizer
) -> list[Window]:
    """Cut once and kept: tokenizing a million tokens takes longer than a window."""
    path = Path(task["references"]) / f"{name}.windows.json"
    if not path.is_file():
        cut = windows(
            tokenizer, text.read_text(encoding="utf-8"), length=task["length"],
            count=task["windows"], seed=0, bos="mixed",
        )  # fmt: skip
        write_atomically(path, json.dumps([[window.ids, window.bos] for window in cut]))
    return [Window(*found) for found in json.loads(path.read_text(encoding="utf-8"))]


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """What a method cannot do is a row of the table, not a traceback."""
    try:
        yield
    except IqError as error:
        print(json.dumps({"error": str(error)}), file=sys.__stdout__)
        sys.exit(0)


def versions() -> dict[str, str]:
    """Of what makes and measures the graphs here."""
    found = {}
    for name in ("iq-export", "onnxruntime", "onnx", "onnx-ir", "numpy", "transformers", "torch"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def main() -> None:
    step, path = sys.argv[1:]
    task = json.loads(Path(path).read_text(encoding="utf-8"))
    # Peers and their libraries print what they like; the last line of stdout is ours.
    with _one_line_errors(), contextlib.redirect_stdout(sys.stderr):
        result = {"trace": trace, "build": build, "evaluate": evaluate}[step](task)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
