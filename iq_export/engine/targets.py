"""Devices an engine can be built for, and what each of them can run.

The facts come from TensorRT's support matrix and from builds tried here; see the sources named at
each constant. A target that is not in the table is a usage error, never a guess.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from iq_export.errors import EngineError, UsageError

if TYPE_CHECKING:
    from iq_export.formats.base import Format

RTX = "tensorrt_rtx"
ENTERPRISE = "tensorrt"

# First enterprise line whose ONNX parser takes RMSNormalization and RotaryEmbedding (Attention came
# with 10.14), read in its changelog. TensorRT RTX 1.7 takes all three.
SINGLE_OPS_OPSET = 23
SINGLE_OPS_TENSORRT = (10, 15)


# What the Attention kernels of TensorRT RTX take, tried with this release for sm_75 to sm_120; a
# later one may take more, and is tried instead of refused.
TRIED_RTX = (1, 7)
_RTX_HEAD_SIZES = range(16, 257, 8)


@dataclass(frozen=True)
class Target:
    """One build target.

    `compute_capabilities` are written as in `sm_86`: 86. `tensorrt` is the oldest TensorRT the
    target's users run, as a version tuple; it is empty for TensorRT RTX, which ships with the
    application instead of with the device.
    """

    name: str
    flavour: str
    compute_capabilities: tuple[int, ...]
    device: str
    tensorrt: tuple[int, ...] = ()

    @property
    def portable(self) -> bool:
        """True if the plan is built anywhere, with no GPU; else only on the device itself."""
        return self.flavour == RTX

    def runs(self, found: Format) -> bool:
        """Whether TensorRT has kernels of that format for every GPU of this target."""
        return min(self.compute_capabilities) >= found.compute_capability


@dataclass(frozen=True)
class AttentionForm:
    """What a graph's Attention ops ask of a builder.

    `dtype` is the graph's, "fp16" or "fp32"; `head_dim` None where it is not known.
    """

    dtype: str
    head_dim: int | None = None
    softcap: bool = False


_TABLE = (
    Target("rtx-turing", RTX, (75,), "GeForce RTX 20, T4"),
    Target("rtx-ampere", RTX, (86,), "GeForce RTX 30, RTX A-series, A10"),
    Target("rtx-ada", RTX, (89,), "GeForce RTX 40, L4, L40"),
    Target("rtx-blackwell", RTX, (120,), "GeForce RTX 50, RTX PRO Blackwell"),
    Target("rtx-all", RTX, (80, 86, 89, 120), "every RTX GPU from Ampere on, one plan"),
    Target("a100", RTX, (80,), "A100, A30"),
    Target("dgx-spark", RTX, (121,), "GB10"),
    Target("h100", ENTERPRISE, (90,), "H100, H200, GH200", (10, 15)),
    Target("b200", ENTERPRISE, (100,), "B200, GB200", (10, 15)),
    Target("orin", ENTERPRISE, (87,), "Jetson Orin, JetPack 7.2 and later", (10, 16)),
    Target("orin-jetpack6", ENTERPRISE, (87,), "Jetson Orin, JetPack 6", (10, 3)),
    Target("thor", ENTERPRISE, (110,), "Jetson Thor, JetPack 7.2 and later", (10, 16)),
    Target("thor-jetpack7.0", ENTERPRISE, (110,), "Jetson Thor, JetPack 7.0 and 7.1", (10, 13)),
)
TARGETS: dict[str, Target] = {target.name: target for target in _TABLE}


def resolve_target(name: str) -> Target:
    """The target called `name`; UsageError with the nearest names if there is none."""
    found = TARGETS.get(name.lower())
    if found is not None:
        return found
    near = difflib.get_close_matches(name.lower(), TARGETS, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known targets: {', '.join(TARGETS)}."
    raise UsageError(f"unknown target '{name}': {hint}")


def engine_note(name: str) -> str:
    """How every sentence begins that says why a target has no engine."""
    return f"no engine for '{name}'"


def check_formats(target: Target, formats: Sequence[Format]) -> None:
    """UsageError if `target` has no kernels for one of `formats`."""
    for found in formats:
        if target.runs(found):
            continue
        first = found.compute_capability
        lacking = ", ".join(f"sm_{sm}" for sm in target.compute_capabilities if sm < first)
        raise UsageError(
            f"target '{target.name}' ({lacking}) cannot run {found.dtype.bitwidth}-bit "
            f"{found.role}: TensorRT has {found.type_name} from sm_{first} on. Use another recipe "
            "such as w8a8, or another target."
        )


def check_opset(target: Target, opset: int) -> None:
    """EngineError if the TensorRT line that `target` runs cannot parse a graph of `opset`."""
    if target.tensorrt:
        check_tensorrt_opset(target.tensorrt, opset, f"target '{target.name}' ({target.device})")


def check_tensorrt_opset(version: tuple[int, ...], opset: int, subject: str) -> None:
    """EngineError if enterprise TensorRT `version` cannot parse `opset`; `subject` names the user.

    Opset 23 brings RMSNormalization, RotaryEmbedding and Attention as single ops, which older
    parsers do not know.
    """
    if opset >= SINGLE_OPS_OPSET and version[:2] < SINGLE_OPS_TENSORRT:
        have = ".".join(map(str, version[:2]))
        need = ".".join(map(str, SINGLE_OPS_TENSORRT))
        raise EngineError(
            f"{subject} runs TensorRT {have}, which cannot parse the opset-{opset} ops "
            f"RMSNormalization and RotaryEmbedding: they need TensorRT {need} or later (on Jetson: "
            f"JetPack 7.2). Lowering the graph to opset 21 is not available yet."
        )


def attention_gap(target: Target, form: AttentionForm) -> str | None:
    """What the builder of `target` lacks for such an Attention, as "has no ..."; None if nothing
    is known to be lacking."""
    if form.softcap:  # of enterprise TensorRT read in the checks of its ONNX parser
        return "takes no softcap in Attention"
    if target.flavour != RTX:
        return None
    if form.dtype == "fp32":
        return "has no Attention kernel in float32, only in half (--dtype fp16)"
    if form.head_dim is not None and form.head_dim not in _RTX_HEAD_SIZES:
        sizes = _RTX_HEAD_SIZES
        return (
            f"has no Attention kernel for heads of {form.head_dim}, only for multiples of "
            f"{sizes.step} from {sizes.start} to {sizes[-1]}"
        )
    return None
