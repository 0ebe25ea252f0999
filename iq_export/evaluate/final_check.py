"""Does the finished file compute, as hardware will, and does it still say what fp32 says?

A quantizer makes finite codes of NaN and of infinity, so finite logits prove nothing: the values in
front of every quantizer are looked at, and with them those of the residual stream, the attention
and the cache, each rounded to half as it is made (`round_half` of `run/ort.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from iq_export.errors import GraphError
from iq_export.graph.attention import attentions
from iq_export.graph.half import HALF_MAX
from iq_export.graph.sites import NORM_OPS, Sites
from iq_export.observe.outputs import Output, cosines
from iq_export.observe.peaks import product_peak
from iq_export.observe.samples import Sample, Window
from iq_export.observe.tail import Tail
from iq_export.observe.walk import CPU, Graph, loaded, walk
from iq_export.progress import Progress
from iq_export.sinks.ops import DOMAIN

# A CPU dequantizes all half weights in every run, however short: few windows.
WINDOWS, LENGTH = 4, 128
# Shares of what the model knows from context (see FinalCheck.lost) that a file may lose.
MOST_LOST, MUCH_LOST = 1.0, 0.25
# Of features that hardly differ from their mean on calibration data, the squared error that counts
# as all that there is.
_LEAST_CONTEXT = 0.01
_FLOATS = (ir.DataType.FLOAT16, ir.DataType.FLOAT)


@dataclass(frozen=True)
class FinalCheck:
    """The finished file against fp32, means over `tokens` tokens of `windows` calibration windows.

    `top1`: share of tokens with fp32's likeliest next token. `kl`: KL(fp32 || file) in nats.
    `kl_no_context`: KL(fp32 || the mean of its own predictions), what guessing without context
    would cost. `tensors`: how many were looked at for NaN and infinity.

    Of a graph that gives features, `tokens` counts their rows, `cosine` is the mean one between
    both, and in place of KL stands the squared error (`Output.errors`); `top1` is the share of rows
    whose largest feature is the same.
    """

    windows: int
    tokens: int
    top1: float
    kl: float
    kl_no_context: float
    tensors: int
    cosine: float | None = None

    @property
    def lost(self) -> float:
        """The share of what fp32 knows from context that the file does not: 0 is all there, at 1
        it says no more than token frequencies do, or than the mean of all features. It has no unit:
        a model whose predictions are nearly uniform is judged as one that is sure."""
        least = _LEAST_CONTEXT if self.cosine is not None else 1e-12
        return self.kl / max(self.kl_no_context, least)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, as `manifest.check` holds them."""
        found = {**asdict(self), "lost": self.lost}
        if self.cosine is None:
            del found["cosine"]
            return found
        renamed = {"kl": "squared_error", "kl_no_context": "squared_error_of_mean"}
        return {renamed.get(key, key): value for key, value in found.items() if key != "top1"}

    def figures(self) -> str:
        """How far it is from fp32, for people."""
        if self.cosine is not None:
            return f"squared error {self.kl:.3g}, cosine {self.cosine:.4f}"
        return f"KL {self.kl:.3g} nats, top-1 {self.top1:.0%}"

    def sentence(self) -> str:
        """For people."""
        if self.cosine is not None:
            return (
                f"the finished file against fp32 on {self.tokens} rows of features: cosine "
                f"{self.cosine:.4f}, squared error {self.kl:.2g} (of their mean: "
                f"{self.kl_no_context:.2g}), {self.tensors} tensors finite"
            )
        return (
            f"the finished file against fp32 on {self.tokens} tokens: top-1 {self.top1:.1%}, "
            f"KL {self.kl:.4f} (guessing without context: {self.kl_no_context:.2f}), "
            f"{self.tensors} tensors finite"
        )

    def warning(self) -> str | None:
        """What to say of a file that ships but has lost much."""
        if self.lost < MUCH_LOST:
            return None
        return (
            f"the finished file has lost {self.lost:.0%} of what fp32 knows from context "
            f"({self.figures()}, of {self.kl_no_context:.3g}): measure it with iq-export eval "
            "before it is used"
        )


def final_check(
    reference: Tail,
    shipped: Graph,
    windows: Sequence[Sample],
    parts: Mapping[str, str] | None = None,
    *,
    providers: Sequence[str],
    progress: Progress,
) -> FinalCheck:
    """Run `shipped` over the beginnings of the first of `windows`, its half values rounded, beside
    the traced graph's logits there, of which `reference` is the tail on those windows.

    Raises GraphError as `finite_results` does. Whether what is left is enough, the caller decides.
    """
    short, output = short_windows(windows), reference.output
    tensors = len(watched(loaded(shipped)))
    exact = list(reference.results(short))
    found_runs = finite_results(shipped, short, parts, providers=providers, progress=progress)
    same, angles, errors = [], [], []
    for right, found in zip(exact, found_runs, strict=True):
        same.append(right.argmax(axis=-1) == found.argmax(axis=-1))
        angles.append(cosines(right, found))
        errors.append(output.errors(right, found))
    agree = np.concatenate(same)
    return FinalCheck(
        windows=len(short),
        tokens=agree.size,
        top1=float(agree.mean()),
        kl=max(0.0, float(np.concatenate(errors).mean())),  # float32 may round below zero
        kl_no_context=output.error_of_mean(exact),
        tensors=tensors,
        cosine=None if output.predicts else float(np.concatenate(angles).mean()),
    )


def finite_values(graph: Graph, ids: list[int]) -> int:
    """How many tensors of `graph` are finite on the tokens `ids`; raises as
    `finite_results` does if one is not."""
    return finite_on(graph, Window(ids, False))


def finite_on(graph: Graph, window: Sample) -> int:
    """As `finite_values`, on any window."""
    quiet = Progress(quiet=True)
    for _ in finite_results(graph, [window], providers=CPU, progress=quiet):
        pass
    return len(watched(loaded(graph)))


def short_windows(windows: Sequence[Sample]) -> list[Sample]:
    """The beginnings of the first windows."""
    return [window.beginning(LENGTH) for window in windows[:WINDOWS]]


def watched(model: ir.Model) -> dict[str, str]:
    """The values in which NaN or infinity would pass unseen, in graph order: name -> what it is.

    What enters a quantizer (in front of its Clip, which makes a number of NaN too), what attention
    reads and gives, every sum that a norm or sink op reads (the residual stream), and the outputs.
    """
    found: dict[str, str] = {}
    for node in model.graph:
        if node.op_type == "Attention":
            for value, kind in zip(node.inputs[:3], ("query", "key", "value"), strict=True):
                _watch(found, value, f"the {kind} of {node.name}")
            _watch(found, node.outputs[0], f"the result of {node.name}")
        elif node.op_type == "QuantizeLinear":
            _watch(found, _before_clip(node.inputs[0]), f"the input of {_readers(node)}")
        elif node.op_type == "Add" and any(
            reader.op_type in NORM_OPS or reader.domain == DOMAIN
            for reader in node.outputs[0].consumers()
        ):
            _watch(found, node.outputs[0], f"the sum {node.name}")
    for output in model.graph.outputs:
        _watch(found, output, "an output")
    order = [str(value.name) for node in model.graph for value in node.outputs]
    return {name: found[name] for name in order if name in found}


def _watch(found: dict[str, str], value: ir.Value | None, what: str) -> None:
    if value is not None and value.producer() is not None and value.dtype in _FLOATS:
        found.setdefault(str(value.name), what)


def _before_clip(value: ir.Value | None) -> ir.Value | None:
    node = None if value is None else value.producer()
    return node.inputs[0] if node is not None and node.op_type == "Clip" else value


def _readers(quantizer: ir.Node) -> str:
    """The nodes that read what `quantizer` rounds, behind DequantizeLinear."""
    names = [
        str(reader.name)
        for node in quantizer.outputs[0].consumers()
        for reader in (node.outputs[0].consumers() if node.op_type == "DequantizeLinear" else [])
    ]
    return ", ".join(names) or f"the quantizer {quantizer.name}"


def finite_results(
    graph: Graph,
    windows: Sequence[Sample],
    parts: Mapping[str, str] | None = None,
    *,
    providers: Sequence[str],
    progress: Progress,
) -> Iterator[np.ndarray]:
    """What `Output.rows` gives of every window, once all that is `watched` is finite.

    `parts`: node name -> the part of the model that it belongs to, for messages. In a half graph
    the products of queries and keys, which are inside an op, must fit half as well.

    Raises GraphError naming the first tensor with NaN or infinity and its place.
    """
    model = loaded(graph)
    known, sites, output = watched(model), attentions(model), Output.of(model.graph)
    half = any(value.dtype == ir.DataType.FLOAT16 for value in model.graph.outputs)
    runs = walk(
        graph,
        list(known),
        windows,
        providers=providers,
        progress=progress,
        round_half=True,
        raw=True,
    )
    for number, values in runs:
        # First where attention overflows: what follows from it is told less well by a tensor.
        for site in sites if half else []:
            rows = {name: _rows(values[name]) for name in (site.query, site.key) if name in values}
            if len(rows) == 2 and all(np.isfinite(x).all() for x in rows.values()):
                peak = product_peak(site, rows, HALF_MAX / max(site.scale, 1.0))
                if peak * max(site.scale, 1.0) > HALF_MAX:
                    raise GraphError(scores_overflow(site.node, peak, site.scale, parts))
        for name, value in values.items():
            if not np.isfinite(value).all():
                where = _part(known[name], parts)
                raise GraphError(_not_finite(name, where, value, number, half=half))
        if output.name in values:
            yield output.rows(values[output.name])


def _rows(value: np.ndarray) -> np.ndarray:
    """One window's `[seq, features]` of `[1, heads, seq, head_dim]` or `[1, seq, features]`."""
    value = value[0]
    return value.transpose(1, 0, 2).reshape(value.shape[1], -1) if value.ndim == 3 else value


def scores_overflow(
    node: str, product: float, scale: float, parts: Mapping[str, str] | None = None
) -> str:
    """The sentence for an attention whose scores half precision cannot hold."""
    return (
        f"Half precision cannot hold the scores of {_part(node, parts)}: q.k reaches "
        f"{product:.4g}, {product * scale:.4g} with its scale, of at most {HALF_MAX:g}; their "
        "softmax would be NaN. Use --dtype fp32."
    )


def _part(what: str, parts: Mapping[str, str] | None) -> str:
    """`what`, with the part of the model that its node belongs to."""
    node = what.rsplit(" ", 1)[-1]
    part = (parts or {}).get(node)
    return what if part is None else f"{what} ({part})"


def _not_finite(name: str, where: str, value: np.ndarray, window: int, *, half: bool) -> str:
    rows = np.isfinite(value[0])
    axis = 1 if rows.ndim == 3 else 0  # [heads, seq, head_dim] or [seq, features]
    other = tuple(a for a in range(rows.ndim) if a != axis)
    position = int((~rows.all(axis=other)).argmax())
    share = 1 - float(np.isfinite(value).mean())
    cause = (
        "with half values rounded as hardware does. Use --dtype fp32."
        if half
        else "in float32; check the model's weights."
    )
    return (
        f"Tensor {name!r}, {where}, is NaN or infinite in {share:.2g} of its values in window "
        f"{window}, from position {position} on, {cause}"
    )


def block_parts(sites: Sites) -> dict[str, str]:
    """Node name -> "the attention of block 3", for what a message may name."""
    found: dict[str, str] = {}
    for block in sites.blocks:
        for branch in block.branches:
            part = f"the {branch.kind} of block {block.index}".replace("the mlp", "the MLP")
            found |= {linear.node: part for linear in branch.linears}
            if branch.attention is not None:
                found[branch.attention.node] = part
    return found


def broken(
    check: FinalCheck,
    inserted: Graph,
    shipped: Graph,
    sites: Sites,
    windows: Sequence[Sample],
    *,
    providers: Sequence[str],
    progress: Progress,
) -> str:
    """The sentence for a file that has lost everything: figures, and where its error enters.

    That is the first place of the stream where it is half as far from the float32 graph before
    rounding, `inserted`, as it ever is: median over tokens of the relative error.
    """
    ends = {
        branch.residual: f"the {branch.kind} of block {block.index}".replace("the mlp", "the MLP")
        for block in sites.blocks
        for branch in block.branches
    }
    short = short_windows(windows)[:2]
    exact, found = (
        {
            (name, number): value
            for number, values in walk(
                graph, list(ends), short, providers=providers, progress=progress
            )
            for name, value in values.items()
        }
        for graph in (inserted, shipped)
    )
    errors: dict[str, list[np.ndarray]] = {name: [] for name in ends}
    for (name, number), right in exact.items():
        size = np.linalg.norm(right, axis=1)
        away = np.linalg.norm(found[name, number] - right, axis=1)
        errors[name].append(away / np.maximum(size, 1e-12))
    middle = {name: float(np.median(np.concatenate(each))) for name, each in errors.items()}
    top = max(middle.values())
    first = next(name for name, error in middle.items() if error >= top / 2)
    return (
        f"The finished file is broken: on {check.tokens} calibration tokens it is as far from fp32 "
        f"({check.figures()}) as guessing without context is "
        f"({check.kl_no_context:.3g}). Its error enters at {ends[first]} (relative "
        f"{middle[first]:.2g} there): use a recipe with more bits, or --dtype fp32."
    )
