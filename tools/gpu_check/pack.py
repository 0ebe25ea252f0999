"""Collect everything that `run` needs into one folder, on a machine that has a network but no GPU.

    FOLDER/pack.json            what is in it: engines, versions, sha256 of every file
           iq_export/ tools/ tests/plugins/ plugins/ headers/    code and sources
           wheels/ site/        TensorRT for RTX for another Python, and what is plain Python of it
           graphs/NAME/         the bundle's graph, and copies of it that share its weights
           plans/ENGINE.plan    built here, with no GPU
           reference/NAME.npz   token ids and ONNX Runtime's logits

Weights lie there once: the graphs without sink ops and with fused ops are skeletons beside them.
`run` builds from them.
"""

from __future__ import annotations

import importlib.util
import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

import iq_export
from iq_export.bundle.manifest import write_atomically
from iq_export.bundle.package import Bundle, atomic_folder
from iq_export.checksum import sha256_file
from iq_export.child import environment
from iq_export.engine.build import Profile, Range, build_engine
from iq_export.engine.onnx_header import read_header
from iq_export.engine.plugin import build_plugin, find_headers
from iq_export.engine.targets import RTX, resolve_target
from iq_export.errors import EngineError, UsageError
from iq_export.graph import io
from iq_export.passes.fuse import fuse
from iq_export.run.generate import Tokenizer
from iq_export.run.ort import CausalLM
from iq_export.sinks.ops import DOMAIN

INDEX = "pack.json"
MODEL = "smollm2-135m"
FLOAT = "fp16"
# A graph's copies: as it is or fused for the plugin, and the same without sink ops.
BODY, FUSED, BARE, BARE_FUSED = "model", "fused", "bare", "bare-fused"
# No one profile takes 32 rows as well as 2,048 tokens: logits have at most 2^31 elements.
PROFILES = {
    "serve": Profile(Range(1, 1, 32), Range(1, 128, 512), Range(0, 512, 1024)),
    "long": Profile(Range(1, 1, 1), Range(1, 2048, 2048), Range(0, 0, 1)),
}
# Tokens of a prompt; the last ones are decoded one by one.
LENGTH, DECODED = 64, 8
_PROMPTS = (
    "The lighthouse stood at the end of a long stone pier, and every evening the keeper walked out "
    "to light the lamp. He carried a small can of oil and a notebook in which he wrote down the "
    "weather, the ships that passed, and whatever else seemed worth remembering. In winter the "
    "spray froze on the railings, and he had to hold on with both hands.",
    "To sort a list, compare neighbouring items and swap those that stand in the wrong order. Go "
    "through the list again and again until nothing is swapped any more. This is easy to write "
    "down and slow to run: for ten thousand items it takes about fifty million comparisons, where "
    "a better method needs little more than a hundred thousand.",
    "def mean(values):\n    if not values:\n        raise ValueError('no values')\n"
    "    return sum(values) / len(values)\n\n\n"
    "def variance(values):\n    middle = mean(values)\n"
    "    return mean([(value - middle) ** 2 for value in values])\n\n\n"
    "for values in ([1, 2, 3], [4], [0.5, 0.25]):\n    print(mean(values), variance(values))\n",
    "Rain is water that has risen as vapour from seas, lakes and leaves, has cooled, and falls "
    "again. Most of it falls back into the sea. What falls on land runs off in rivers or sinks "
    "into the ground, where it may stay for days or for thousands of years before a spring or a "
    "well brings it to light.",
)


@dataclass(frozen=True)
class Engine:
    """One engine: `graph` in the folder, `plan` if it was built here, `linears` the names of its
    int8 products, `plugin_nodes` what the plugin has to take (0: function bodies, or no sinks)."""

    name: str
    model: str
    graph: str
    plan: str | None
    plugin_nodes: int
    sink_nodes: int
    opset: int
    linears: list[str]


@dataclass(frozen=True)
class Options:
    """`bundles` are compiled if there are none; `plans` False leaves out the plans, `engines` False
    all that engines need: what is left are the kernels, 3 MB."""

    out: Path
    bundles: Sequence[Path] = ()
    target: str = "rtx-all"
    python: str = "3.12"
    plans: bool = True
    engines: bool = True


def pack(options: Options) -> Path:
    """Make `options.out`, whole or not at all.

    Raises UsageError if the bundles are not one fp16 and one quantized, BundleError if the folder
    exists; and what compiling, building and downloading raise.
    """
    target = resolve_target(options.target)
    if target.flavour != RTX:
        raise UsageError(f"--target {target.name} builds on the device only: take an rtx one.")
    bundles = _bundles(options.bundles or _compile(options.out)) if options.engines else {}
    with atomic_folder(options.out) as work:
        _copy_code(work)
        _wheels(work, options.python, tensorrt=options.engines)
        engines: list[Engine] = []
        for name, bundle in bundles.items():
            engines += copy_graphs(bundle, name, work)
            save_reference(bundle, name, work)
        if options.plans and options.engines:
            engines = _build_plans(work, engines, options.target)
        write_index(
            work,
            {
                "iq_export": iq_export.__version__,
                "tensorrt": metadata.version("tensorrt-rtx-cu13"),
                "python": options.python,
                "target": target.name,
                "compute_capabilities": list(target.compute_capabilities),
                "profiles": {name: profile.to_json() for name, profile in PROFILES.items()},
                "decoded": DECODED,
                "engines": [asdict(engine) for engine in engines],
            },
        )
    return options.out


def write_index(folder: Path, index: dict[str, Any]) -> None:
    """`pack.json`: `index` and the sha256 of every other file of `folder`."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != INDEX)
    files = {path.relative_to(folder).as_posix(): sha256_file(path) for path in paths}
    write_atomically(folder / INDEX, json.dumps({**index, "files": files}, indent=1) + "\n")


def _compile(out: Path) -> list[Path]:
    """Bundles of SmolLM2, beside `out`; those that are there are taken."""
    found = []
    for recipe in (FLOAT, "w8a8"):
        bundle = out.with_name(f"{out.name}.{recipe}")
        if not bundle.exists():
            command = [sys.executable, "-m", "iq_export.cli", "compile", MODEL, str(bundle)]
            done = subprocess.run(
                [*command, "--recipe", recipe], check=False, env=environment(package=True)
            )
            if done.returncode:
                raise EngineError(f"compiling {MODEL} to {recipe} failed, see above.")
        found.append(bundle)
    return found


def _bundles(folders: Sequence[Path]) -> dict[str, Path]:
    """Recipe -> bundle, the one in half precision first."""
    found = {Bundle.open(folder).manifest.recipe: folder for folder in folders}
    if len(found) != 2 or FLOAT not in found:
        raise UsageError(
            f"give two bundles, one of recipe {FLOAT} and one quantized; these are: "
            f"{', '.join(found) or 'none'}."
        )
    return {name: found[name] for name in sorted(found, key=lambda name: name != FLOAT)}


def _copy_code(work: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc", "build")
    for part in ("iq_export", "tools/gpu_check", "plugins"):
        shutil.copytree(root / part, work / part, ignore=ignored)
    (work / "tests" / "plugins").mkdir(parents=True)
    shutil.copy2(root / "tests" / "plugins" / "calls.py", work / "tests" / "plugins")
    headers = find_headers()
    if headers is None:
        raise EngineError(
            "TensorRT's headers were not found: run tools/fetch_trt_headers.py, or set "
            "TENSORRT_INCLUDE_DIR."
        )
    shutil.copytree(headers, work / "headers", ignore=shutil.ignore_patterns("*.py"))


def _wheels(work: Path, python: str, *, tensorrt: bool) -> None:
    """TensorRT for RTX of the version that is installed here, for Python `python`.

    Its top package is plain Python and has no wheel: it is copied. ml_dtypes gives NumPy bfloat16.
    """
    names = [f"ml-dtypes=={metadata.version('ml-dtypes')}"]
    if tensorrt:
        spec = importlib.util.find_spec(RTX)
        if spec is None or spec.origin is None:
            raise EngineError("TensorRT for RTX is not installed: pip install 'iq-export[rtx]'.")
        shutil.copytree(
            Path(spec.origin).parent, work / "site" / RTX,
            ignore=shutil.ignore_patterns("__pycache__"),
        )  # fmt: skip
        version = metadata.version("tensorrt-rtx-cu13")
        names += [f"tensorrt-rtx-cu13-{part}=={version}" for part in ("bindings", "libs")]
    machine = platform.machine()
    # pip matches the number of glibc's version exactly.
    tags = [f"manylinux_2_{number}_{machine}" for number in (17, 24, 26, 27, 28, 31, 34, 35, 39)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--only-binary=:all:", "--implementation", "cp", "--python-version", python]
    command += [word for tag in tags for word in ("--platform", tag)]
    done = subprocess.run(
        [*command, "--dest", str(work / "wheels"), *names],
        capture_output=True, text=True, check=False, env=environment(),
    )  # fmt: skip
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "ERROR" in line]
        reason = errors[0] if errors else f"pip ended with {done.returncode}"
        raise EngineError(f"the wheels for Python {python} cannot be downloaded: {reason}")


def copy_graphs(bundle: Path, name: str, work: Path) -> list[Engine]:
    """The bundle's graph in all forms that engines are built from; no plans yet."""
    folder = work / "graphs" / name
    folder.mkdir(parents=True)
    for path in bundle.glob("model.onnx*"):
        shutil.copy2(path, folder)
    original = folder / f"{BODY}.onnx"
    linears = quantized_products(io.load(original))

    def engine(form: str, suffix: str) -> Engine:
        path = folder / f"{form}.onnx"
        header = read_header(path)
        return Engine(
            name=f"{name}{suffix}",
            model=name,
            graph=path.relative_to(work).as_posix(),
            plan=None,
            plugin_nodes=header.sink_nodes if form in (FUSED, BARE_FUSED) else 0,
            sink_nodes=header.sink_nodes,
            opset=header.opset,
            linears=linears,
        )

    if name == FLOAT:
        return [engine(BODY, "")]
    model = io.load(original)
    remove_sinks(model)
    io.save_skeleton(model, folder / f"{BARE}.onnx")
    for source, form in ((BODY, FUSED), (BARE, BARE_FUSED)):
        model = io.load(folder / f"{source}.onnx")
        fuse(model)
        model.functions.clear()  # so that TensorRT cannot take a body
        io.save_skeleton(model, folder / f"{form}.onnx")
    return [
        engine(BODY, "-body"), engine(FUSED, "-plugin"),
        engine(BARE, "-body-bare"), engine(BARE_FUSED, "-plugin-bare"),
    ]  # fmt: skip


def quantized_products(model: ir.Model) -> list[str]:
    """Names of the products whose activations and weights are int8 codes."""

    def is_dequantized(value: ir.Value) -> bool:
        producer = value.producer()
        return producer is not None and producer.op_type == "DequantizeLinear"

    products = (node for node in model.graph if node.op_type == "MatMul")
    return [str(node.name) for node in products if all(map(is_dequantized, node.inputs))]


def remove_sinks(model: ir.Model) -> None:
    """Take the sink ops out, in place: rows pass through. For their price; the result is wrong."""
    for node in model.graph:
        if node.domain == DOMAIN and node.op_type != "SinkDetect":
            node.outputs[0].replace_all_uses_with(node.inputs[0], replace_graph_outputs=True)
    # And what only they read: detection, and what joins the indices of two of them.
    common.RemoveUnusedNodesPass()(model)


def save_reference(bundle: Path, name: str, work: Path) -> None:
    """Prompts and ONNX Runtime's logits of their last tokens: what engines are compared with."""
    tokenizer = Tokenizer(bundle)
    rows = [tokenizer.encode(text, add_bos=bool(i % 2)) for i, text in enumerate(_PROMPTS)]
    short = min(map(len, rows))
    if short < LENGTH:
        raise EngineError(f"a prompt has only {short} tokens of {LENGTH} with this tokenizer.")
    ids = np.array([row[:LENGTH] for row in rows], np.int64)
    path = work / "reference" / f"{name}.npz"
    path.parent.mkdir(exist_ok=True)
    np.savez_compressed(path, ids=ids, logits=reference(bundle / f"{BODY}.onnx", ids, DECODED))


def reference(model: Path, ids: np.ndarray, decoded: int) -> np.ndarray:
    """Logits of the last `decoded` + 1 tokens of each row, half rounded as a GPU does it."""
    length = ids.shape[1]
    mask = np.ones_like(ids)
    positions = np.broadcast_to(np.arange(length), ids.shape)
    step = CausalLM(model, round_half=True).forward(ids, mask, positions, need_present=False)
    return np.asarray(step.logits[:, length - decoded - 1 :])


def _build_plans(work: Path, engines: Sequence[Engine], target_name: str) -> list[Engine]:
    """Plans of the three that ship, each from its bundle's graph as `iq-export build` does it."""
    target = resolve_target(target_name)
    plugin = build_plugin(work / "plans", sorted(target.compute_capabilities))
    if plugin.path is None:
        raise EngineError(plugin.reason)
    done = []
    for engine in engines:
        if Path(engine.graph).stem in (BODY, FUSED):
            path = work / "plans" / f"{engine.name}.plan"
            build_engine(
                (work / engine.graph).with_name(f"{BODY}.onnx"), path, target, PROFILES["serve"],
                plugin=plugin.path if engine.plugin_nodes else None,
            )  # fmt: skip
            done.append(replace(engine, plan=path.relative_to(work).as_posix()))
        else:
            done.append(engine)
    plugin.path.unlink()  # the plan carries it
    return done
