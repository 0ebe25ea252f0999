"""The ops of domain `iq`, written once as ONNX functions of standard ops.

These bodies are the meaning of the ops: ONNX Runtime and TensorRT run them as they are, and the
TensorRT plugin's kernels are tested against them. The constants of an op (templates) are node
attributes, so a plugin receives them as fields and a body through `Constant(value_floats=@attr)`.

`index` is int32 `[batch, seq]`: 0 for a semantic token, k + 1 for a sink matched to template k.
The frozen sink set of a lifecycle is this one tensor, shared by all its later blocks.

The three sink ops are in the graph that ships. The fused ops are not: `passes/fuse.py` puts them
into the copy that an engine with the plugin is built from, and their bodies say what its kernels
compute. A body cannot switch on an attribute, hence one op per mode. Precision of all fused ops:

- `sum` is added and rounded in the type of `x`, like the Add that it replaces, and the norm reads
  the rounded sum. All else is float32 up to the outputs, with no rounding between.
- Templates are rounded to the type of `x`, so an inserted row has the codes of the unfused graph.
- Codes are value / scale in float32, rounded half to even, saturated; NaN becomes 0 (int8 has none,
  and the residual stream, `sum`, carries it on).
- SiLU of a gate below -80 is 0: that is what it is in float32, and -inf has a value so.
"""

from __future__ import annotations

import onnx
from onnx import parser

from iq_export.graph.half import HALF_MAX

DOMAIN = "iq"
VERSION = 1
OPS = ("SinkDetect", "SinkClampInsert", "SinkRestore")
FUSED_OPS = (
    "AddRmsNormQuantize",
    "AddRmsNormInsertQuantize",
    "AddLayerNormQuantize",
    "AddLayerNormInsertQuantize",
    "SiluMulQuantize",
    "SiluMulClampQuantize",
    "SiluMulSideQuantize",
    "SiluMulClampSideQuantize",
)

# TensorRT prefers its plugin over a function of the same name only if the node carries these.
PLUGIN_ATTRIBUTES = {"plugin_namespace": DOMAIN, "plugin_version": str(VERSION)}

_DETECT = """
<opset_import: ["" : {opset}], domain: "iq">
SinkDetect <templates, template_shape, threshold, plugin_namespace, plugin_version>
(x, first, valid) => (index)
{{
   x32 = Cast <to = 1> (x)
   # An overflowed half value must still match a template: inf - inf would be NaN.
   low = Constant <value_float = -{half_max}> ()
   high = Constant <value_float = {half_max}> ()
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


# From `wide`, the sum in float32, to `normed`.
_RMS_NORM = """
   square = Mul (wide, wide)
   power = ReduceMean <keepdims = 1> (square, last)
   eps = Constant <value_float: float = @epsilon> ()
   padded = Add (power, eps)
   size = Sqrt (padded)
   unit = Div (wide, size)
   normed = Mul (unit, gain)
"""

_LAYER_NORM = """
   middle = ReduceMean <keepdims = 1> (wide, last)
   centred = Sub (wide, middle)
   square = Mul (centred, centred)
   power = ReduceMean <keepdims = 1> (square, last)
   eps = Constant <value_float: float = @epsilon> ()
   padded = Add (power, eps)
   size = Sqrt (padded)
   unit = Div (centred, size)
   scaled = Mul (unit, gain)
   bias32 = Cast <to = 1> (bias)
   normed = Add (scaled, bias32)
"""

# From `value` (float32) to `codes`.
_QUANTIZE = """
   nan = IsNaN (value)
   nothing = Constant <value_float = 0.0> ()
   number = Where (nan, nothing, value)
   step = Constant <value_float: float = @scale> ()
   zero_point64 = Constant <value_int = 0> ()
   zero_point = Cast <to = 3> (zero_point64)
   codes = QuantizeLinear (number, step, zero_point)
"""

_SILU_MUL = """
   gate32 = Cast <to = 1> (gate)
   up32 = Cast <to = 1> (up)
   unity = Constant <value_float = 1.0> ()
   still = Constant <value_float = 0.0> ()
   opposite = Neg (gate32)
   grown = Exp (opposite)
   denominator = Add (grown, unity)
   active = Div (gate32, denominator)
   least = Constant <value_float = -80.0> ()
   closed = Less (gate32, least)
   silu = Where (closed, still, active)
   product = Mul (silu, up32)
"""

_CLAMP = """
   no_sink64 = Constant <value_int = 0> ()
   no_sink = Cast <to = 6> (no_sink64)
   sink2 = Greater (index, no_sink)
   last = Constant <value_ints = [-1]> ()
   sink = Unsqueeze (sink2, last)
   kept = Where (sink, still, product)
"""

# The side channels of `kept`, in the type of the gate, and `quiet`, which is without them.
_SIDE = """
   at = Constant <value_ints: ints = @channels> ()
   picked = Gather <axis = -1> (kept, at)
   side = CastLike (picked, gate)
   width = Shape <start = -1> (kept)
   ones = ConstantOfShape <value = float[1] {{1}}> (width)
   count = Shape (at)
   zeros = ConstantOfShape <value = float[1] {{0}}> (count)
   mask = ScatterElements <axis = 0> (ones, at, zeros)
   stays = Greater (mask, still)
   quiet = Where (stays, kept, still)
"""

# `value` = `quiet` times a Hadamard matrix of Sylvester's form and entries +-factor, in blocks;
# entry (i, j) is negative if i & j has an odd number of bits. A block of 1 changes nothing.
_ROTATE = """
   size = Constant <value_int: int = @block> ()
   begin = Constant <value_int = 0> ()
   stride = Constant <value_int = 1> ()
   columns64 = Range (begin, size, stride)
   columns = Cast <to = 13> (columns64)
   aside = Constant <value_ints = [1]> ()
   lines = Unsqueeze (columns, aside)
   bits = BitwiseAnd (lines, columns)
   eight = Constant <value = uint64 {{8}}> ()
   four = Constant <value = uint64 {{4}}> ()
   two = Constant <value = uint64 {{2}}> ()
   one = Constant <value = uint64 {{1}}> ()
   bits8 = BitShift <direction = "RIGHT"> (bits, eight)
   folded8 = BitwiseXor (bits, bits8)
   bits4 = BitShift <direction = "RIGHT"> (folded8, four)
   folded4 = BitwiseXor (folded8, bits4)
   bits2 = BitShift <direction = "RIGHT"> (folded4, two)
   folded2 = BitwiseXor (folded4, bits2)
   bits1 = BitShift <direction = "RIGHT"> (folded2, one)
   folded1 = BitwiseXor (folded2, bits1)
   odd = BitwiseAnd (folded1, one)
   negative = Cast <to = 9> (odd)
   entry = Constant <value_float: float = @factor> ()
   opposite_entry = Neg (entry)
   hadamard = Where (negative, opposite_entry, entry)
   full_shape = Shape (quiet)
   rows_shape = Shape <start = 0, end = -1> (quiet)
   features = Shape <start = -1> (quiet)
   axis0 = Constant <value_ints = [0]> ()
   size1 = Unsqueeze (size, axis0)
   groups = Div (features, size1)
   split_shape = Concat <axis = 0> (rows_shape, groups, size1)
   split = Reshape (quiet, split_shape)
   turned = MatMul (split, hadamard)
   value = Reshape (turned, full_shape)
"""


def functions(opset: int = 23) -> list[onnx.FunctionProto]:
    """The function protos of the sink ops, importing standard opset `opset` (>= 18)."""
    return [_parse(text, opset) for text in (_DETECT, _CLAMP_INSERT, _RESTORE)]


def fused_functions(opset: int = 23) -> list[onnx.FunctionProto]:
    """The function protos of the fused ops, importing standard opset `opset` (>= 18)."""
    norms = [_add_norm(kind, insert) for kind in ("Rms", "Layer") for insert in (False, True)]
    products = [_silu_mul(clamp, side) for side in (False, True) for clamp in (False, True)]
    return [_parse(text, opset) for text in (*norms, *products)]


def _add_norm(kind: str, insert: bool) -> str:
    name = f"Add{kind}Norm{'Insert' if insert else ''}Quantize"
    inputs = ["x", "branch", "weight", *(["bias"] if kind == "Layer" else [])]
    attributes = ["epsilon", "scale"]
    body = """
   sum = Add (x, branch)
   wide = Cast <to = 1> (sum)
   gain = Cast <to = 1> (weight)
"""
    norm = _RMS_NORM if kind == "Rms" else _LAYER_NORM
    if insert:
        inputs.append("index")
        attributes += ["templates", "template_shape"]
        choose = "   rows32 = Cast <to = 1> (rows)\n   value = Where (sink, rows32, normed)\n"
        body += _TABLE_ROWS + norm + choose
    else:
        body += "   last = Constant <value_ints = [-1]> ()" + norm
        body += "   value = Identity (normed)\n"
    return _function(name, attributes, inputs, ["sum", "codes"], body + _QUANTIZE)


def _silu_mul(clamp: bool, side: bool) -> str:
    name = f"SiluMul{'Clamp' if clamp else ''}{'Side' if side else ''}Quantize"
    inputs = ["gate", "up", *(["index"] if clamp else [])]
    attributes = ["block", "factor", "scale", *(["channels"] if side else [])]
    body = _SILU_MUL + (_CLAMP if clamp else "   kept = Identity (product)\n")
    body += _SIDE if side else "   quiet = Identity (kept)\n"
    outputs = ["codes", *(["side"] if side else [])]
    return _function(name, attributes, inputs, outputs, body + _ROTATE + _QUANTIZE)


def _function(
    name: str, attributes: list[str], inputs: list[str], outputs: list[str], body: str
) -> str:
    declared = ", ".join([*attributes, *PLUGIN_ATTRIBUTES])
    header = f'<opset_import: ["" : {{opset}}], domain: "{DOMAIN}">\n{name} <{declared}>'
    return f"{header} ({', '.join(inputs)}) => ({', '.join(outputs)})\n{{{{{body}}}}}\n"


def _parse(text: str, opset: int) -> onnx.FunctionProto:
    return parser.parse_function(_strip_comments(text.format(opset=opset, half_max=HALF_MAX)))


def _strip_comments(text: str) -> str:
    return "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
