"""The rows of the comparison as data: what each method is, and which recipes it has."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, fields
from typing import Any

from iq_export.compile import CompileOptions
from iq_export.errors import UsageError
from iq_export.recipe import load_recipe, recipe_folder
from tools.compare.plain import Plain

_RECIPE = re.compile(r"w(\d+)a(\d+)")
# Strengths that a searched smoothing tries per site.
_STRENGTHS = (0.0, 0.25, 0.5, 0.75)
_BUDGET = 1.005
# What nobody quantizes here, so that all rows are alike in the rest.
ALWAYS_FLOAT = "embedding, norms, attention products, LM head"


@dataclass(frozen=True)
class Method:
    """`kind` says who makes the graph (worker.py), `options` what it is told; `label` is the row's
    name in the table, `about` one line for people. `seeded`: whether it is calibrated;
    `simulates`: whether it has narrower recipes; `environment`: what it runs in; `brief`: one
    seed is enough, since the row only puts another one into context."""

    name: str
    label: str
    kind: str
    options: dict[str, Any]
    about: str
    seeded: bool = True
    simulates: bool = False
    environment: str | None = None
    brief: bool = False


@dataclass(frozen=True)
class Job:
    """One row: a method at a recipe (None for the float graphs) and a calibration seed."""

    method: Method
    recipe: str | None
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method.name}/{self.recipe or 'float'}/seed{self.seed}"


def _plain(name: str, label: str, about: str, plain: Plain, *, brief: bool = False) -> Method:
    return Method(name, label, "plain", asdict(plain), about, simulates=True, brief=brief)


def _peer(name: str, label: str, about: str, tool: str, env: str | None, **options: Any) -> Method:
    return Method(name, label, "peer", {"tool": tool, **options}, about, environment=env)


METHODS = (
    Method("fp32", "fp32, traced", "float", {"half": False}, "the reference", seeded=False),
    Method("fp16", "fp16", "float", {"half": True}, "half precision throughout", seeded=False),
    _plain("rtn", "RTN absmax", "round to nearest, range = largest magnitude", Plain()),
    _plain("mse", "RTN + MSE", "range by the products' squared output error", Plain("mse")),
    _plain(
        "smoothquant", "SmoothQuant", "alpha 0.5 in norms and from up to down, absmax",
        Plain(smoothing=(0.5,)),
    ),
    _plain(
        "smoothquant-mse", "SmoothQuant + MSE", "the same with ranges by squared error",
        Plain("mse", smoothing=(0.5,)), brief=True,
    ),
    _plain(
        "qfem", "spiking linears in float", "QFeM's rule, max / median token > 64; RTN + MSE",
        Plain("mse", leave_above=64.0),
    ),
    _plain(
        "prefix", "prefix in the KV cache", "PrefixQuant's outlier tokens; RTN + MSE behind them",
        Plain("mse", prefix=True),
    ),
    _plain(
        "prefix-rotated", "prefix, smoothed and rotated",
        "the same with smoothing searched per site and Hadamard blocks of 64 on down's input",
        Plain("mse", smoothing=_STRENGTHS, rotation=64, prefix=True),
    ),
    _plain(
        "rotated", "smoothed and rotated, no prefix",
        "what insertion or a prefix adds to: smoothing searched, Hadamard blocks of 64, MSE",
        Plain("mse", smoothing=_STRENGTHS, rotation=64), brief=True,
    ),
    _peer(
        "ort-minmax", "onnxruntime MinMax", "quantize_static, QDQ, symmetric, per channel",
        "onnxruntime", None, method="MinMax",
    ),
    _peer(
        "ort-entropy", "onnxruntime Entropy", "the same, ranges by entropy",
        "onnxruntime", None, method="Entropy",
    ),
    _peer(
        "ort-smoothquant", "onnxruntime SmoothQuant",
        "the same with SmoothQuant=True (neural-compressor), alpha 0.5, MinMax",
        "onnxruntime", "neural-compressor", method="MinMax", smooth=True,
    ),
    _peer(
        "modelopt-max", "ModelOpt max", "modelopt.onnx.quantization int8", "modelopt", "modelopt",
        method="max",
    ),
    _peer(
        "modelopt-entropy", "ModelOpt entropy", "the same, ranges by entropy", "modelopt",
        "modelopt", method="entropy",
    ),
)  # fmt: skip


def ours() -> list[Method]:
    """One method per recipe of this project; W8A8 also in each form of insertion, and with a budget
    if the compiler knows budgets."""
    found = []
    for path in sorted(recipe_folder().glob("*.yaml")):
        options = {"recipe": path.stem, "file": path.read_text(encoding="utf-8")}
        # A recipe without bits in its name is half precision itself; all others have float32
        # around their integers, like the peers.
        options["dtype"] = "fp32" if _RECIPE.match(path.stem) else "fp16"
        name, label = f"ours:{path.stem}", f"iq-export {path.stem}"
        brief = load_recipe(path.stem).cache is not None  # no peer has that
        found.append(Method(name, label, "ours", options, "iq-export compile", brief=brief))
        for option, value in _variants() if path.stem == "w8a8" else ():
            shown = f"--{option} {value}"
            found.append(
                Method(
                    f"{name}+{option}-{value}", f"{label} {shown}", "ours",
                    options | {option: value}, f"iq-export compile {shown}",
                    brief=option == "insertion",
                )
            )  # fmt: skip
    return found


def _variants() -> list[tuple[str, Any]]:
    """Options of the compiler that a recipe does not hold and that make another graph."""
    known = {field.name for field in fields(CompileOptions)}
    wanted = [("insertion", "norm"), ("insertion", "kv"), ("budget", _BUDGET)]
    return [(name, value) for name, value in wanted if name in known]


def bits(recipe: str) -> tuple[int, int]:
    """Weight and activation bits of a recipe's name, `w4a8` -> (4, 8)."""
    match = _RECIPE.match(recipe)
    if match is None:
        raise UsageError(f"'{recipe}' is no recipe: write weight and activation bits, as in w8a8.")
    return int(match[1]), int(match[2])


def is_simulation(recipe: str | None) -> bool:
    """Whether no kernel computes it: everything but W8A8 and int4 weights alone."""
    return recipe is not None and bits(recipe) not in ((8, 8), (4, 16))


def float_jobs(names: list[str] | None, seed: int) -> list[Job]:
    """The graphs that are not quantized; fp32 always, because all others are compared with it."""
    return [
        Job(method, None, seed)
        for method in chosen(names)
        if method.kind == "float" or (method.kind == "ours" and not _has_bits(method))
    ]


def recipe_jobs(recipe: str, names: list[str] | None, seeds: list[int]) -> list[Job]:
    """All rows of a recipe, method by method, so that a row's seeds come together.

    Methods that are named have all seeds; otherwise brief ones have the first.
    """
    return [
        Job(method, recipe, seed)
        for method in chosen(names)
        if offers(method, recipe)
        for seed in (seeds[:1] if method.brief and names is None else seeds)
    ]


def chosen(names: list[str] | None) -> list[Method]:
    """The methods called `names` ("ours": every recipe of this project) and fp32; None for all."""
    known = [*METHODS, *ours()]
    wanted = {method.name for method in known}
    unknown = sorted(set(names or ()) - wanted - {"ours"})
    if unknown:
        raise UsageError(
            f"Unknown method {unknown[0]!r}: methods are {', '.join(sorted(wanted))}, or 'ours' "
            "for every recipe of this project."
        )
    if names is None:
        return known
    own = "ours" in names
    return [m for m in known if m.name in {"fp32", *names} or (own and m.kind == "ours")]


def offers(method: Method, recipe: str) -> bool:
    """Whether a method has a recipe: peers' packages have W8A8 only, ours what the files say."""
    if method.kind == "float":
        return False
    if method.kind == "ours":
        return _has_bits(method) and bits(method.options["recipe"]) == bits(recipe)
    return bits(recipe) == (8, 8) or method.simulates


def _has_bits(method: Method) -> bool:
    return _RECIPE.match(method.options["recipe"]) is not None
