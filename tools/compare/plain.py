"""Well-known post-training quantization, as plainly as it is published, with bits as a parameter.

Round-to-nearest, clipping by squared error, SmoothQuant (arXiv 2211.10438), leaving the linears
whose input spikes in full precision (QFeM's rule, arXiv 2405.14428), a prefix of outlier tokens
(PrefixQuant, arXiv 2410.05265), each on the traced graph. Weights: int8 per output channel, or
int4 in blocks of 64. Activations: static per-tensor, symmetric; fewer than 8 bits are simulated by
a Clip in front of an int8 quantizer.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from iq_export.decisions import Smoothing, SmoothingChoice
from iq_export.formats.base import HALF, ActivationFormat, WeightFormat, find_format
from iq_export.formats.rounding import Rounding
from iq_export.graph import io
from iq_export.graph.sites import Linear, Sites, find_sites
from iq_export.observe.ranges import sampled_rows
from iq_export.observe.samples import Window
from iq_export.observe.walk import CPU, cut
from iq_export.passes.fold_smoothing import fold_smoothing
from iq_export.passes.quantize import QuantizePlan, quantize
from iq_export.passes.rotate import rotate, rotate_columns, rotate_rows
from iq_export.run.ort import CausalLM, model_session
from tools.compare.prefix import Prefix, choose_tokens, make_prefix

# Weights and activations by bits; other activations are `int` and their bits.
_WEIGHTS = {8: "int8", 4: "int4-64"}
# Kept shares of the absmax that clipping tries; the search for a smoothing strength tries fewer.
_CLIPS = np.geomspace(1.0, 0.02, 25)
_COARSE_CLIPS = _CLIPS[::4]
_ROWS = 384
_TAP_BYTES = 1 << 29


@dataclass(frozen=True)
class Plain:
    """What to do. `clip`: "absmax", or "mse" for the least squared error of the products' outputs.

    `smoothing`: strengths to try per site, () for none; SmoothQuant's is (0.5,). `rotation`:
    Hadamard block of the down-projection input. `leave_above`: linears whose input's largest token
    exceeds so many times the median token's stay in full precision. `prefix`: outlier tokens in
    the KV cache.
    """

    clip: str = "absmax"
    smoothing: tuple[float, ...] = ()
    rotation: int | None = None
    leave_above: float | None = None
    prefix: bool = False


@dataclass
class Seen:
    """One activation over the calibration tokens: `channel_absmax` `[features]`, `peaks` the
    largest magnitude of every token, `rows` a sample `[sampled, features]`."""

    channel_absmax: np.ndarray
    peaks: np.ndarray
    rows: np.ndarray

    @property
    def absmax(self) -> float:
        return float(self.channel_absmax.max())


@dataclass(frozen=True)
class Built:
    """Node names of the products that were left in full precision, and the prefix, if any."""

    left: list[str]
    prefix: Prefix | None
    notes: list[str]


def build(
    traced: Path,
    out: Path,
    windows: Sequence[Window],
    bits: tuple[int, int],
    plain: Plain,
    *,
    bos: int | None,
    seed: int = 0,
) -> Built:
    """Write the quantized graph to `out` (a folder of its own). `bits`: weights, activations.

    Float parts stay float32. Activation bits of 16 leave activations as they are.
    """
    weight_bits, activation_bits = bits
    model = io.load(traced)
    sites = find_sites(model)
    notes: list[str] = []
    prefix = None
    if plain.prefix:
        prefix = find_prefix(traced, sites, windows, bos)
        notes.append(f"prefix of tokens {prefix.ids}" if prefix else "no token spikes: no prefix")
    if plain.smoothing or plain.rotation:
        seen = observe(traced, sites, windows, prefix, seed=seed)
        if plain.smoothing:
            fold_smoothing(model, sites, _smoothing(model, sites, seen, plain, bits))
        if plain.rotation:
            downs = [block.mlp.output for block in sites.blocks]
            fitting = [down for down in downs if down.in_features % plain.rotation == 0]
            rotate(model, {down.node: (down, plain.rotation) for down in fitting})
    prepared = out.with_name("prepared.onnx")
    io.save(model, prepared)
    model = io.load(prepared)
    inputs = {node.name: str(node.inputs[0].name) for node in model.graph if node.inputs}
    linears = sites.linears
    left: list[str] = []
    scales: dict[str, float] = {}
    if activation_bits < 16 or plain.leave_above is not None:
        found = observe(prepared, sites, windows, prefix, seed=seed)
        if plain.leave_above is not None:
            left = [x.node for x in linears if _spikes(found[inputs[x.node]], plain.leave_above)]
        if activation_bits < 16:
            scales = _scales(model, linears, inputs, found, plain, bits)
    kept = tuple(linear for linear in linears if linear.node not in set(left))
    activations = find_format(
        ActivationFormat,  # type: ignore[type-abstract]
        HALF if activation_bits == 16 else f"int{activation_bits}",
    )
    rounding = Rounding(_weights(weight_bits), activations)
    quantize(model, QuantizePlan(_renamed(model, kept), rounding, scales))
    io.save(model, out)
    for file in (prepared, prepared.with_name(prepared.name + ".data")):
        file.unlink(missing_ok=True)
    return Built(left, prefix, notes)


def find_prefix(
    traced: Path, sites: Sites, windows: Sequence[Window], bos: int | None
) -> Prefix | None:
    """Choose the outlier tokens and compute their KV; None if nothing spikes."""
    downs = [block.mlp.output.input for block in sites.blocks]
    names = dict.fromkeys(downs, sites.blocks[0].mlp.output.in_features)
    maxima: dict[str, list[np.ndarray]] = {name: [] for name in downs}
    for _, name, value in _tapped(traced, names, windows, None):
        maxima[name].append(np.abs(value).max(axis=1))
    lengths = [len(window.ids) for window in windows]
    ids = choose_tokens(
        np.stack([np.concatenate(maxima[name]) for name in downs]),
        np.repeat(np.arange(len(windows)), lengths),
        np.concatenate([np.arange(length) for length in lengths]),
        np.concatenate([np.asarray(window.ids) for window in windows]),
        bos,
    )
    return make_prefix(CausalLM(traced), ids, bos) if ids else None


def observe(
    path: Path,
    sites: Sites,
    windows: Sequence[Window],
    prefix: Prefix | None,
    *,
    seed: int,
) -> dict[str, Seen]:
    """Statistics of every product's input, by value name; behind the prefix, if there is one."""
    nodes = {node.name: node for node in io.load(path).graph}
    widths = {str(nodes[x.node].inputs[0].name): x.in_features for x in sites.linears}
    per_window = max(2, _ROWS // len(windows))
    found: dict[str, list[list[np.ndarray]]] = {name: [[], [], []] for name in widths}
    for number, name, value in _tapped(path, widths, windows, prefix):
        magnitude = np.abs(value)
        channels, peaks, rows = found[name]
        channels.append(magnitude.max(axis=0))
        peaks.append(magnitude.max(axis=1))
        rows.append(value[sampled_rows(len(value), per_window, seed, number)])
    return {
        name: Seen(np.max(channels, axis=0), np.concatenate(peaks), np.concatenate(rows))
        for name, (channels, peaks, rows) in found.items()
    }


def _tapped(
    path: Path, widths: dict[str, int], windows: Sequence[Window], prefix: Prefix | None
) -> Iterator[tuple[int, str, np.ndarray]]:
    """Yield `(window, name, value [seq, features])`; few values of one window at a time."""
    longest, model = max(len(window.ids) for window in windows), io.load(path)
    for group in _groups(widths, _TAP_BYTES // (4 * longest)):
        session = model_session(cut(model, (), group), CPU, path.name)
        shapes = {value.name: value.shape for value in session.get_inputs()}
        for number, window in enumerate(windows):
            values = session.run(group, _feed(shapes, window, prefix))
            for name, value in zip(group, values, strict=True):
                yield number, name, value[0]


def _groups(widths: dict[str, int], most: int) -> list[list[str]]:
    """Split value names (name -> features per token) into groups of at most `most` features."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, width in widths.items():
        if groups[-1] and size + width > most:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += width
    return groups


def _feed(shapes: dict[str, Any], window: Window, prefix: Prefix | None) -> dict[str, np.ndarray]:
    ids = list(window.ids)
    if prefix is not None and prefix.bos is not None and ids[0] == prefix.bos:
        ids = ids[1:]
    count = len(prefix.ids) if prefix else 0
    row = np.asarray([ids], np.int64)
    known = {
        "input_ids": row,
        "attention_mask": np.ones((1, count + len(ids)), np.int64),
        "position_ids": count + np.arange(len(ids), dtype=np.int64)[None],
    }
    past = iter(prefix.past) if prefix else None
    feed = {}
    for name, shape in shapes.items():
        if name in known:
            feed[name] = known[name]
        elif past is not None:
            feed[name] = next(past)
        else:
            feed[name] = np.zeros([1, shape[1], 0, shape[3]], np.float32)
    return feed


def _spikes(seen: Seen, limit: float) -> bool:
    """QFeM's measure: the largest token over the median token."""
    return bool(seen.peaks.max() > limit * max(float(np.median(seen.peaks)), 1e-12))


def _smoothing(
    model: ir.Model, sites: Sites, seen: dict[str, Seen], plain: Plain, bits: tuple[int, int]
) -> Smoothing:
    """SmoothQuant's factors `max|X|^a / max|W|^(1 - a)` for every norm that only products read,
    and for every up-projection behind the down-projection; the strength with the least error."""
    readers = {
        value.name: {node.name for node in value.consumers()}
        for node in model.graph
        for value in node.outputs
    }

    def weight(linear: Linear) -> np.ndarray:
        return np.asarray(model.graph.initializers[linear.weight].const_value.numpy())

    norms, paths = {}, {}
    for norm in sites.norms:
        if readers[norm.output] == {linear.node for linear in norm.linears}:
            weights = np.concatenate([weight(linear) for linear in norm.linears], axis=1)
            norms[norm.output] = smooth(seen[norm.output], weights, plain, bits)
    for block in sites.blocks:
        down = block.mlp.output
        if block.mlp.linear_path is not None:
            turned = plain.rotation if not down.in_features % (plain.rotation or 1) else None
            paths[down.input] = smooth(seen[down.input], weight(down), plain, bits, turned)
    return Smoothing(norms, paths)


def smooth(
    seen: Seen,
    weight: np.ndarray,
    plain: Plain,
    bits: tuple[int, int],
    rotation: int | None = None,
) -> SmoothingChoice:
    """The best of `plain.smoothing` for one site; `weight` `[in, out]` of all its products."""
    tops = np.maximum(seen.channel_absmax, 1e-5)
    weight_tops = np.maximum(np.abs(weight).max(axis=1), 1e-5)
    exact = seen.rows @ weight
    best: SmoothingChoice | None = None
    for strength in plain.smoothing:
        factors = (tops**strength / weight_tops ** (1 - strength)).astype(np.float32)
        if strength == 0:
            factors = np.ones_like(factors)
        error = 0.0
        if len(plain.smoothing) > 1:
            rows, scaled = seen.rows / factors, weight * factors[:, None]
            if rotation:
                rows, scaled = rotate_columns(rows, rotation), rotate_rows(scaled, rotation)
            absmax = float(np.abs(rows).max())
            _, error = clip_by_error(rows, absmax, scaled, bits, exact=exact, clips=_COARSE_CLIPS)
        choice = SmoothingChoice(f"absmax {strength:g}", factors, error, error)
        if best is None or choice.error < best.error:
            best = choice
    assert best is not None
    return best


def clip_by_error(
    rows: np.ndarray,
    absmax: float,
    weight: np.ndarray,
    bits: tuple[int, int],
    *,
    exact: np.ndarray | None = None,
    clips: np.ndarray = _CLIPS,
) -> tuple[float, float]:
    """`(range, squared error)`: the range whose rounding changes the products' outputs least."""
    exact = rows @ weight if exact is None else exact
    rounded = rounded_weight(weight, bits[0])
    top = _top(bits[1])
    best = (absmax, np.inf)
    for clip in clips:
        scale = np.float32(absmax * clip / top)
        codes = np.clip(np.round(rows / scale), -top - 1, top) * scale
        error = float(((codes @ rounded - exact) ** 2).sum())
        if error < best[1]:
            best = (absmax * float(clip), error)
    return best


def _top(bits: int) -> int:
    """The largest code of a signed integer."""
    return int(2 ** (bits - 1) - 1)


def rounded_weight(weight: np.ndarray, bits: int) -> np.ndarray:
    """`weight` `[in, out]` after rounding and back."""
    return _weights(bits).rounded(weight)


def _weights(bits: int) -> WeightFormat:
    found = find_format(WeightFormat, _WEIGHTS[bits])  # type: ignore[type-abstract]
    assert found is not None
    return found


def _scales(
    model: ir.Model,
    linears: Sequence[Linear],
    inputs: dict[str, str],
    found: dict[str, Seen],
    plain: Plain,
    bits: tuple[int, int],
) -> dict[str, float]:
    nodes = {node.name: node for node in model.graph}
    readers: dict[str, list[str]] = {}
    for linear in linears:
        readers.setdefault(inputs[linear.node], []).append(linear.node)
    scales = {}
    for name, products in readers.items():
        limit = found[name].absmax
        if plain.clip == "mse":
            weights = [np.asarray(nodes[x].inputs[1].const_value.numpy()) for x in products]
            weight = np.concatenate(weights, axis=1)
            limit, _ = clip_by_error(found[name].rows, limit, weight, bits)
        scales[name] = max(limit, 1e-8) / _top(bits[1])
    return scales


def _renamed(model: ir.Model, linears: Sequence[Linear]) -> tuple[Linear, ...]:
    """Folding may have given a product a weight of its own: the names as the graph has them now."""
    nodes = {node.name: node for node in model.graph}
    return tuple(replace(x, weight=str(nodes[x.node].inputs[1].name)) for x in linears)
