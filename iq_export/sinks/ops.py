"""The three sink ops of domain `iq`, written once as ONNX functions of standard ops.

These bodies are the meaning of the ops: ONNX Runtime and TensorRT run them as they are, and the
TensorRT plugin's kernels are tested against them. The constants of an op (templates) are node
attributes, so a plugin receives them as fields and a body through `Constant(value_floats=@attr)`.

`index` is int32 `[batch, seq]`: 0 for a semantic token, k + 1 for a sink matched to template k.
The frozen sink set of a lifecycle is this one tensor, shared by all its later blocks.
"""

from __future__ import annotations

import onnx
from onnx import parser

DOMAIN = "iq"
VERSION = 1
OPS = ("SinkDetect", "SinkClampInsert", "SinkRestore")

# TensorRT prefers its plugin over a function of the same name only if the node carries these.
PLUGIN_ATTRIBUTES = {"plugin_namespace": DOMAIN, "plugin_version": str(VERSION)}

_DETECT = """
<opset_import: ["" : {opset}], domain: "iq">
SinkDetect <templates, template_shape, threshold, plugin_namespace, plugin_version>
(x, first, valid) => (index)
{{
   x32 = Cast <to = 1> (x)
   # An overflowed half value must still match a template: inf - inf would be NaN.
   low = Constant <value_float = -65504.0> ()
   high = Constant <value_float = 65504.0> ()
   bounded = Clip (x32, low, high)
   last = Constant <value_ints = [-1]> ()
   magnitude = Abs (bounded)
   peak = ReduceMax <keepdims = 0> (magnitude, last)
   tau = Constant <value_float: float = @threshold> ()
   spiking = Greater (peak, tau)
   member = Or (spiking, first)
   sink = And (member, valid)
   flat = Constant <value_floats: floats = @templates> ()
   shape = Constant <value_ints: ints = @template_shape> ()
   table = Reshape (flat, shape)
   # argmin_k |x - T_k|^2, elementwise: TensorRT has no float32 product on SM75.
   axis = Constant <value_ints = [-2]> ()
   column = Unsqueeze (bounded, axis)
   difference = Sub (column, table)
   square = Mul (difference, difference)
   distance = ReduceSum <keepdims = 0> (square, last)
   nearest64 = ArgMin <axis = -1, keepdims = 0> (distance)
   nearest = Cast <to = 6> (nearest64)
   one = Constant <value_int = 1> ()
   one32 = Cast <to = 6> (one)
   matched = Add (nearest, one32)
   none = Sub (one32, one32)
   index = Where (sink, matched, none)
}}
"""

_TABLE_ROWS = """
   flat = Constant <value_floats: floats = @templates> ()
   shape = Constant <value_ints: ints = @template_shape> ()
   table32 = Reshape (flat, shape)
   table = CastLike (table32, x)
   one = Constant <value_int = 1> ()
   zero = Constant <value_int = 0> ()
   one32 = Cast <to = 6> (one)
   zero32 = Cast <to = 6> (zero)
   shifted = Sub (index, one32)
   # Semantic tokens gather row 0 and drop it: an index of -1 would be legal but is not portable.
   row = Max (shifted, zero32)
   rows = Gather <axis = 0> (table, row)
   sink2 = Greater (index, zero32)
   last = Constant <value_ints = [-1]> ()
   sink = Unsqueeze (sink2, last)
"""

_CLAMP_INSERT = (
    """
<opset_import: ["" : {opset}], domain: "iq">
SinkClampInsert <templates, template_shape, plugin_namespace, plugin_version> (x, index) => (y)
{{"""
    + _TABLE_ROWS
    + """   y = Where (sink, rows, x)
}}
"""
)

_RESTORE = (
    """
<opset_import: ["" : {opset}], domain: "iq">
SinkRestore <templates, template_shape, plugin_namespace, plugin_version> (x, index) => (y)
{{"""
    + _TABLE_ROWS
    + """   restored = Add (x, rows)
   y = Where (sink, restored, x)
}}
"""
)


def functions(opset: int = 23) -> list[onnx.FunctionProto]:
    """The function protos of all sink ops, importing standard opset `opset` (>= 18)."""
    texts = (_DETECT, _CLAMP_INSERT, _RESTORE)
    return [parser.parse_function(_strip_comments(text.format(opset=opset))) for text in texts]


def _strip_comments(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
