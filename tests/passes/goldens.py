"""The passes as they are shown under graphs/: run each on its `before` text.

`python -m tests.passes.goldens` (from the root of the checkout) writes the `after` texts anew, and
the `before` texts, which are edited by hand, in the same layout. Look at the difference before
committing it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from iq_export.decisions import Smoothing, SmoothingChoice
from iq_export.formats.int4_weights import INT4_WEIGHTS
from iq_export.formats.rounding import W8A8, Rounding
from iq_export.graph.sites import find_sites
from iq_export.passes.fold_smoothing import fold_smoothing
from iq_export.passes.insert_sinks import insert_sinks
from iq_export.passes.quantize import QuantizePlan, quantize
from iq_export.passes.quantize_cache import quantize_cache
from iq_export.passes.rotate import rotate
from iq_export.passes.to_half import to_half
from iq_export.sinks.lifecycle import EarlySite, Lifecycle
from iq_export.sinks.ops import functions
from iq_export.sinks.templates import (
    KV,
    EarlyTemplates,
    KeyValueTemplates,
    SinkTemplates,
)

FOLDER = Path(__file__).resolve().parents[2] / "graphs"
FUNCTIONS = "sink_ops.onnxtxt"
# Where a list of typed values (constants, types of values) may be broken into lines.
_NEXT_VALUE = re.compile(r', (?=(?:float|float16|int8|int4|int32|int64|bool)(?:\[[^]]*\])? [\w"])')


def _choice(*factors: float) -> SmoothingChoice:
    return SmoothingChoice("shown", np.float32(factors), 0.0, 0.0)


def _fold_smoothing(model: ir.Model) -> None:
    norms = {"a": _choice(2, 1, 1, 0.5), "m": _choice(1, 4, 1, 1)}
    fold_smoothing(model, find_sites(model), Smoothing(norms, {"h": _choice(1, 1, 0.5, 2)}))


def _rotate(model: ir.Model) -> None:
    down = find_sites(model).blocks[0].mlp.output
    rotate(model, {down.node: (down, 4)})


def _shown_sinks() -> SinkTemplates:
    """One lifecycle from block 0 to block 1, two templates."""
    life = Lifecycle(
        birth=0, death=1, end=1, channel=2, threshold=8.0, force_first=True, clamp_blocks=(0, 1),
        members=np.arange(2), down_peak=64.0, down_median=1.0, residual_peak=100.0,
        first_rate=1.0,
    )  # fmt: skip
    return SinkTemplates(
        lifecycle=life,
        threshold=8.0,
        detection=np.float32([[64, 0, 0, 1], [0, 64, 0, 1]]),
        norms={"a1": np.float32([[0, 0, 2, 0], [0, 0, -2, 0]]),
               "m1": np.float32([[0, 0, 4, 0], [0, 0, -4, 0]])},
        deviation={},
        deviation_max={},
        template_spread=[],
        assignment=np.arange(2),
        restore=np.float32([[0, 0, 0.5, 0], [0, 0, -0.5, 0]]),
    )  # fmt: skip


def _insert_sinks(model: ir.Model) -> None:
    insert_sinks(model, find_sites(model), [_shown_sinks()])


def _insert_key_values(model: ir.Model) -> None:
    """The same lifecycle in the kv form: two heads of two channels in block 1."""
    key_values = KeyValueTemplates(
        rows={"key": np.float32([[1, 2, 3, 4], [-1, -2, -3, -4]]),
              "value": np.float32([[0, 0.1, 0, 0], [0, 0, 0.1, 0]])},
        residual=np.float32([[1, 0, 0.5, 0], [0, 1, -0.5, 0]]),
        deviation={},
        deviation_max={},
    )  # fmt: skip
    sinks = replace(_shown_sinks(), form=KV, key_values=key_values)
    insert_sinks(model, find_sites(model), [sinks])


def _insert_sinks_two_sites(model: ir.Model) -> None:
    """One template is born at block 0, the other one at block 1."""
    members, table = np.arange(2), np.float32([[64, 0, 0, 1], [0, 64, 0, 1]])
    early = EarlySite(block=0, threshold=4.0, force_first=False, members=members[:1])
    life = Lifecycle(
        birth=1, death=None, end=1, channel=2, threshold=8.0, force_first=True,
        clamp_blocks=(0, 1), members=members, down_peak=64.0, down_median=1.0,
        residual_peak=100.0, first_rate=1.0, early=(early,),
    )  # fmt: skip
    norms = {"a1": np.float32([[0, 0, 2, 0], [1, 0, 0, 0]]),
             "m1": np.float32([[0, 0, 4, 0], [0, 1, 0, 0]])}  # fmt: skip
    sinks = SinkTemplates(
        lifecycle=life,
        threshold=8.0,
        detection=table,
        norms={},
        deviation={},
        deviation_max={},
        template_spread=[],
        assignment=members,
        restore=np.float32([[0, 0, 0.5, 0], [0, 0, -0.5, 0]]),
        early=(EarlyTemplates(early, 4.0, table, norms),),
    )
    insert_sinks(model, find_sites(model), [sinks])


def _quantize_cache(model: ir.Model) -> None:
    """Block 1 has a cache; its sites are those of the graph before the sink ops."""
    traced = ir.from_proto(onnx.shape_inference.infer_shapes(before("insert_key_values")))
    sites = find_sites(traced)
    cached = replace(sites, blocks=sites.blocks[1:])
    quantize_cache(model, cached, {"key": 0.03125, "value": 0.015625})


def _quantize_int8(model: ir.Model) -> None:
    scales = {"a": 0.0625, "mixed": 0.125, "m": 0.0625, "h_clamped": 0.25}
    quantize(model, QuantizePlan(tuple(find_sites(model).linears), W8A8, scales))


def _quantize_int4(model: ir.Model) -> None:
    """Blocks of 4 to be short; TensorRT takes 64 and 128."""
    linears = tuple(find_sites(model).linears)
    quantize(model, QuantizePlan(linears, Rounding(replace(INT4_WEIGHTS, blocks=(4,)), None)))


PASSES: dict[str, Callable[[ir.Model], object]] = {
    "fold_smoothing": _fold_smoothing,
    "rotate": _rotate,
    "insert_sinks": _insert_sinks,
    "insert_sinks_two_sites": _insert_sinks_two_sites,
    "insert_key_values": _insert_key_values,
    "quantize_int8": _quantize_int8,
    "quantize_int4": _quantize_int4,
    "quantize_cache": _quantize_cache,
    "to_half": to_half,
}


def before(name: str) -> onnx.ModelProto:
    """The `before` text of a pass as a model, with the functions of the sink ops if it has any."""
    model = onnx.parser.parse_model((FOLDER / f"{name}.before.onnxtxt").read_text("utf-8"))
    if any(node.domain == "iq" for node in model.graph.node):
        model.functions.extend(functions())
    return model


def after(name: str) -> onnx.ModelProto:
    """What the pass makes of it."""
    model = ir.from_proto(onnx.shape_inference.infer_shapes(before(name)))
    PASSES[name](model)
    return ir.to_proto(model)


def text(model: onnx.ModelProto) -> str:
    """The graph to be read: a line per constant, no types of inner values, no function bodies."""
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    shown.ClearField("functions")
    shown.graph.ClearField("value_info")
    lines = (
        _constants(line, shown) if line.startswith("   <") else line.rstrip()
        for line in onnx.printer.to_text(shown).splitlines()
    )
    return "\n".join(lines).strip() + "\n"


def _constants(line: str, model: onnx.ModelProto) -> str:
    """A line per constant; float16 and int4 as numbers, which the printer shows as bits or not."""
    printed = _NEXT_VALUE.sub(",\n    ", line)
    for tensor in model.graph.initializer:
        if tensor.data_type in (onnx.TensorProto.FLOAT16, onnx.TensorProto.INT4):
            array = onnx.numpy_helper.to_array(tensor).astype(np.float32).ravel()
            numbers = ",".join(f"{number:.6g}" for number in array)
            start = rf'( "?{re.escape(tensor.name)}"? = )(?: {{[^}}]*}}|\.\.\.)'
            printed = re.sub(start, rf"\g<1> {{{numbers}}}", printed)
    return printed


def functions_text() -> str:
    """The bodies of the sink ops."""
    texts = (onnx.printer.to_text(function) for function in functions())
    return "\n".join("\n".join(x.rstrip() for x in t.splitlines()).strip() + "\n" for t in texts)


def files() -> dict[str, str]:
    """File name under graphs/ -> what it should hold."""
    found = {FUNCTIONS: functions_text()}
    for name in PASSES:
        found[f"{name}.before.onnxtxt"] = text(before(name))
        found[f"{name}.after.onnxtxt"] = text(after(name))
    return found


if __name__ == "__main__":
    for file, content in files().items():
        (FOLDER / file).write_text(content, encoding="utf-8")
        print(FOLDER / file)
