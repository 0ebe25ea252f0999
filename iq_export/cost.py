"""What a compile needs of memory, disk and time, from the shapes of a model alone.

Whole numbers throughout, since a slip in a config.json makes them larger than floats hold. The
factors are fitted to measured runs (docs/measured.md): right to half and to twice.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from iq_export.errors import ModelError
from iq_export.memory import memory_and_swap_bytes
from iq_export.recipe import Recipe

_FLOAT32, _HALF = 4, 2
# Python with torch, transformers and ONNX Runtime, and a trace of some layers.
_BASE_BYTES = 650 << 20
# Of every layer: nodes of the graphs, and histograms of 4,096 counts of what its products read.
_LAYER_BYTES = 4 << 20
# Weights that are walked together (`observe.segments`), with the half block that exceeds them.
_PIECE_BYTES = 96 << 20
# Copies of a piece while the finished file is compared with fp32: both graphs' weights, widened,
# rounded to half and packed.
_PIECE_COPIES = 5
# Rows of logits in that comparison (`evaluate.final_check`), and how many copies.
_LOGIT_ROWS, _LOGIT_COPIES = 512, 2
# Matrices [in, in] of the widest product besides its Hessian: two more, and one in float64.
_CURVATURES = 5
# Sampled rows to choose ranges by, of the tensors of a block (`calibrate.ranges`).
_SAMPLE_ROWS = 512
# Measured runs took no less than this share of what is said here.
_LEAST_TENTHS = 6

# Short windows that every compile adds (`compile.py`).
_PROBE_TOKENS = 2048

_DISK_BASE_BYTES = 200 << 20
_STORED_LOGITS = 4 * 512  # tokens (`rewrite._FORM_WINDOWS`)
_SECONDS_BASE = 40
_WALKS, _CHECK_TOKENS = 7, 1024
_FLOPS = 150 * 10**9  # per second, of two cores
# Nanoseconds a weight: read, folded and packed by the trace and the final check, and by all walks.
_READ, _CALIBRATED = 40, 100


@dataclass(frozen=True)
class Shape:
    """A decoder's sizes: `tables` are the embedding and, if it is not tied to it, the LM head, each
    of `vocabulary` rows; `block` counts the weights of a block's products, and `widths` are the
    numbers of input features of their inputs. `whole`: the model is held in memory as it is traced.
    """

    hidden: int
    layers: int
    vocabulary: int
    tables: int
    block: int
    widths: tuple[int, ...]
    whole: bool = False

    @property
    def table(self) -> int:
        """Weights of one table."""
        return self.vocabulary * self.hidden

    @property
    def weights(self) -> int:
        """All of them, but for vectors."""
        return self.tables * self.table + self.layers * self.block

    @classmethod
    def of_matrices(cls, matrices: Iterable[tuple[int, ...]], layers: int) -> Shape | None:
        """From the shapes of all weights, in any order of their axes; None if there are none.

        The longest axis is the vocabulary's, and what has it is a table.
        """
        found = [shape for shape in matrices if len(shape) == 2 and min(shape) > 1]
        if not found or layers < 1:
            return None
        vocabulary = max(max(shape) for shape in found)
        tables = [shape for shape in found if vocabulary in shape]
        others = [shape for shape in found if vocabulary not in shape]
        hidden = min(tables[0])
        widest = max((max(shape) for shape in others), default=hidden)
        block = sum(a * b for a, b in others) // layers
        return cls(
            hidden, layers, vocabulary, min(len(tables), 2), block, (hidden, hidden, hidden, widest)
        )


def memory_need(shape: Shape, recipe: Recipe, *, tokens: int = 0, calibrates: bool = True) -> int:
    """Bytes at the peak of a compile, with `tokens` tokens of calibration text; mapped files, which
    the system takes back, are not counted."""
    table, block = _FLOAT32 * shape.table, _FLOAT32 * shape.block
    everything = _FLOAT32 * shape.weights
    # The head, of both graphs that are compared, and what it gives.
    logits = _FLOAT32 * _LOGIT_ROWS * shape.vocabulary
    head = 9 * table // 2 + _LOGIT_COPIES * logits
    piece = _PIECE_COPIES * min(everything, max(_PIECE_BYTES, 2 * block // 3))
    largest = max(head, piece)
    kept = 0
    if calibrates:
        # A block of which all products are observed at once: its weights, packed, and what is
        # summed up of its inputs.
        rounding = 5 * block // 2
        if recipe.gptq:
            squares = [_FLOAT32 * width**2 for width in shape.widths]
            rounding += sum(squares) + _CURVATURES * max(squares)
        largest = max(largest, rounding)
        tokens += _PROBE_TOKENS
        rows = min(_SAMPLE_ROWS, tokens)
        kept = _FLOAT32 * (rows * sum(shape.widths) + tokens * shape.hidden)
    if shape.whole:
        largest = max(largest, everything)
    return _BASE_BYTES + _LAYER_BYTES * shape.layers + largest + kept


def require_memory(need: int, name: str) -> None:
    """ModelError if this machine's memory and swap are plainly less than `need`, in bytes."""
    there = memory_and_swap_bytes()
    if there is not None and 10 * there < _LEAST_TENTHS * need:
        raise ModelError(
            f"{name} needs about {gigabytes(need)} of memory to be compiled, and this machine has "
            f"{gigabytes(there)} with its swap: compile on a larger one (the bundle can be moved), "
            "or add swap."
        )


def memory_note(need: int) -> str | None:
    """What to say where memory and swap may not suffice; None if they do."""
    there = memory_and_swap_bytes()
    if there is None or there >= need:
        return None
    return (
        f"this machine has {gigabytes(there)} of memory with its swap, and about "
        f"{gigabytes(need)} are needed: the compile may be stopped by the system"
    )


def disk_need(
    shape: Shape,
    recipe: Recipe,
    dtype: str,
    *,
    copied: bool = False,
    calibrates: bool = True,
    engines: int = 0,
    keep: bool = False,
) -> int:
    """Bytes on disk at the peak of a compile, beside the source: the weights in float32 (`copied`),
    where they lie in no safetensors files; rounded weights until the graph is finished, and with
    `keep`, for a run that goes on, until the bundle is; logits of the traced graph while forms of
    insertion are compared; the finished graph, then `engines`, each of its size."""
    inside, tables = shape.layers * shape.block, shape.tables * shape.table
    wide = _HALF if dtype == "fp16" else _FLOAT32
    rounds = recipe.weights is not None
    bits = 8 * wide if recipe.weights is None else recipe.weights.dtype.bitwidth
    graph = bits * inside // 8 + wide * tables
    codes = inside if rounds and calibrates else 0
    built = graph * engines
    logits = _FLOAT32 * _STORED_LOGITS * shape.vocabulary if calibrates else 0
    finished = graph + (codes + built if keep else max(codes, built))
    total = _DISK_BASE_BYTES + max(codes + logits, finished)
    return total + (_FLOAT32 * shape.weights if copied else 0)


def minutes_need(shape: Shape, recipe: Recipe, *, tokens: int, calibrates: bool = True) -> int:
    """Minutes on two cores, without download and engines."""
    flops, read = 4 * shape.weights * _CHECK_TOKENS, _READ * shape.weights
    if calibrates:
        read += _CALIBRATED * shape.weights
        flops += 2 * shape.weights * (tokens + _PROBE_TOKENS) * _WALKS
        if recipe.gptq:
            cubes = sum(width**3 for width in shape.widths)
            flops += shape.layers * (cubes + max(shape.widths) * shape.block)
    return -(-(_SECONDS_BASE + flops // _FLOPS + read // 10**9) // 60)


def gigabytes(size: int) -> str:
    """In GB; of what a typing error says, too."""
    tenths = min(-(-size // 10**8), 10**13)
    return f"{tenths // 10:,}.{tenths % 10} GB" if tenths < 1000 else f"{tenths // 10:,} GB"
