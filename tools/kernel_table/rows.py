"""The rows of the table: which kernel, launched how, on what.

A kernel that is written anew needs its new pattern here, and another block size or shape its
numbers; what the compiler made of it is read from its code.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

HIDDEN = 4096

# Ordinary values: between 1/4 and 2 in magnitude, of either sign, and every float16 and bfloat16.
ORDINARY = [(-1) ** (i * i % 7) * (1 + 71 * i % 128 / 128) * 2.0 ** (i % 3 - 2) for i in range(127)]

# C++ names of the elements, how many fit into 16 bytes, and the bytes of the ordinary values.
_ELEMENTS = {
    "half": ("__half", 8, b"".join(struct.pack("<e", v) for v in ORDINARY)),
    "bfloat16": ("__nv_bfloat16", 8, b"".join(struct.pack("<f", v)[2:] for v in ORDINARY)),
    "float": ("float", 4, b"".join(struct.pack("<f", v) for v in ORDINARY)),
}


@dataclass(frozen=True)
class Row:
    """One launch: `pattern` matches the demangled name of one kernel, `threads` are a block's,
    `elements` are those that the block works on; `values` are the arguments (launch.py)."""

    label: str
    kernel: str
    pattern: str
    threads: int
    elements: int
    values: Mapping[str, float | bytes | None] = field(repr=False)


def rows() -> list[Row]:
    return [row for element in _ELEMENTS for row in _rows_of(element)]


def _rows_of(element: str) -> list[Row]:
    name, width, ordinary = _ELEMENTS[element]
    semantic, sink = struct.pack("<i", 0), struct.pack("<i", 1)
    shared: dict[str, float | bytes | None] = {
        "rows": 1, "hidden": HIDDEN, "templates": 4, "sides": 2, "block": 1,
        "epsilon": 1e-5, "scale": 0.03, "factor": 0.5, "threshold": 100.0, "bias": None,
        "table": struct.pack("<f", 1.25), "inserted": b"\7", "index": semantic,
        "slots": b"\0", "first": b"\0", "valid": b"\1",
        **dict.fromkeys(("x", "branch", "weight", "gate", "up"), ordinary),
        **dict.fromkeys(("sum", "codes", "y", "side"), b"\0"),
    }  # fmt: skip
    # 256 threads; of the packed row of a float each has four packs, of the others two.
    chunks = HIDDEN // width // 256
    norm = rf"addNormKernel<{name}, {width}, {chunks}>"
    made = [
        Row(
            "add + norm",
            "addNormKernel",
            norm,
            256,
            HIDDEN,
            {"index": None, "table": None, "inserted": None},
        ),
        Row("add + norm, insertion, other row", "addNormKernel", norm, 256, HIDDEN, {}),
        Row("add + norm, insertion, sink", "addNormKernel", norm, 256, HIDDEN, {"index": sink}),
    ]
    for block in (1, 64, 512):
        # What one of a row's blocks takes of it: of each thread as many elements as `per`.
        per = 8 if block <= 256 else 16
        features = 128 * per
        made.append(
            Row(
                f"SiLU x up, block {block}", "siluMulKernel",
                rf"siluMulKernel<{name}, {width}, {per}>", 128, features,
                {"block": block, "features": features, "slotCount": features},
            )
        )  # fmt: skip
    made.append(
        Row(
            "detect, other row",
            "detectKernel",
            rf"detectKernel<{name}, {width}(, 256)?>",
            256,
            HIDDEN,
            {},
        )
    )
    for number, change in enumerate(("insert", "restore")):
        pattern = rf"changeKernel<\(iq::Change\){number}, {name}, {width}>"
        made += [
            Row(f"{change}, other row", "changeKernel", pattern, 256, HIDDEN, {}),
            Row(f"{change}, sink", "changeKernel", pattern, 256, HIDDEN, {"index": sink}),
        ]
    return [
        Row(f"{row.label}, {element}", row.kernel, row.pattern, row.threads, row.elements,
            {**shared, **row.values})
        for row in made
    ]  # fmt: skip
