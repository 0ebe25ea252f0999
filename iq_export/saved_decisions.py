"""Decisions in a bundle: `plan.json` holds names and numbers, `sinks.safetensors` the arrays, and
rounded weights stay where they ship, in `model.onnx`.

Read back, they give the same graph to the bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from iq_export.bundle.package import PLAN_NAME, Bundle
from iq_export.bundle.recipe import recipe_of
from iq_export.decisions import Decisions, Smoothing, SmoothingChoice
from iq_export.errors import BundleError, IqError
from iq_export.formats.base import StoredCodes
from iq_export.graph import io
from iq_export.graph.sites import Sites
from iq_export.passes.order import begin
from iq_export.recipe import Recipe
from iq_export.ship import Made
from iq_export.sinks.lifecycle import EarlySite, Lifecycle
from iq_export.sinks.templates import (
    KV,
    NORM,
    NORM_AND_KV,
    EarlyTemplates,
    KeyValueTemplates,
    SinkTemplates,
)

TEMPLATES_NAME = "sinks.safetensors"
# Half's largest number is below 2^16, and no stream is beyond float32's.
_MOST_EXPONENT, _MOST_THRESHOLD = 112, 1e30
_NOBODY = np.zeros(0, np.int64)  # calibration tokens are not kept
_BROKEN = (
    OverflowError, AssertionError, KeyError, TypeError, ValueError, AttributeError, IndexError,
    OSError,
)  # fmt: skip


def record(chosen: Decisions) -> dict[str, Any]:
    """The names and numbers of `chosen`: JSON values only, each float as it is."""
    smoothing = {"norms": chosen.smoothing.norms, "paths": chosen.smoothing.paths}
    return {
        "recipe": chosen.recipe.record(),
        "dtype": chosen.dtype,
        "exponent": chosen.exponent,
        "scaled_queries": list(chosen.scaled_queries),
        "smoothing": {
            kind: {
                name: [choice.name, choice.error, choice.error_without]
                for name, choice in choices.items()
            }
            for kind, choices in smoothing.items()
        },
        "side_channels": {node: loud.tolist() for node, loud in chosen.side.items()},
        "sinks": [_sink_record(sinks) for sinks in chosen.sinks],
        "activations": {name: float(scale) for name, scale in chosen.activations.items()},
        "cache": {name: float(scale) for name, scale in chosen.cache.items()},
        "left": sorted(chosen.left),
    }


def save_arrays(chosen: Decisions, path: Path) -> None:
    """Write the arrays of `chosen`, float32.

    By lifecycle number, `[K, features]` each: `detection`; `insert.<norm output>` and `restore`,
    which is added, in the norm forms; `attend.<key or value>` in the kv forms, `set`, the residual,
    in the kv form. `smoothing.<value>`, `[features]`: what that value is divided by.
    """
    from safetensors.numpy import save_file

    tensors: dict[str, np.ndarray] = {}
    for number, sinks in enumerate(chosen.sinks):
        for name, rows in _inserted(sinks).items():
            tensors[f"{number}.{name}"] = rows
    for choices in (chosen.smoothing.norms, chosen.smoothing.paths):
        tensors |= {f"smoothing.{name}": choice.factors for name, choice in choices.items()}
    save_file({name: np.ascontiguousarray(rows) for name, rows in tensors.items()}, path)
    path.chmod(0o644)  # safetensors makes it private; a bundle is shared like any other output


def recorded(bundle: Bundle) -> dict[str, Any]:
    """The names and numbers in a bundle, not checked yet. Raises BundleError if it is of an older
    version, which recorded less."""
    found = bundle.plan().get("decisions")
    if not isinstance(found, dict):
        raise BundleError(
            f"{bundle.folder} is of an older version, whose {PLAN_NAME} does not hold all that was "
            "decided: compile it again without --decisions"
        )
    return found


def load_decisions(bundle: Bundle, sites: Sites) -> Decisions:
    """The decisions that a bundle was made from, for a traced graph with these `sites`.

    Raises BundleError if it is of an older version, which recorded less, or they are damaged.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    found = recorded(bundle)
    try:
        arrays = load_file(bundle.path(TEMPLATES_NAME))
        decisions = Decisions(
            recipe=Recipe.from_record(found["recipe"]),
            dtype=found["dtype"],
            exponent=int(found["exponent"]),
            scaled_queries=tuple(found["scaled_queries"]),
            smoothing=Smoothing(
                _choices(found["smoothing"]["norms"], arrays),
                _choices(found["smoothing"]["paths"], arrays),
            ),
            side={n: np.asarray(loud, np.int64) for n, loud in found["side_channels"].items()},
            sinks=tuple(
                _sinks(each, number, arrays, sites) for number, each in enumerate(found["sinks"])
            ),
            activations=dict(found["activations"]),
            codes=_ShippedCodes(bundle.model, sites),
            cache=dict(found["cache"]),
            left=frozenset(found["left"]),
        )
        _check(decisions, bundle, sites)
        return decisions
    except (*_BROKEN, SafetensorError, IqError) as error:
        raise BundleError(
            f"the decisions in {bundle.folder} cannot be read ({error}): compile it again without "
            "--decisions"
        ) from error


def _check(chosen: Decisions, bundle: Bundle, sites: Sites) -> None:
    """Raise ValueError with what no compile of this version writes: a lowered graph is not measured
    against what it was decided on, so nothing wrong may pass here."""
    recipe, linears = recipe_of(bundle.manifest), {x.node: x for x in sites.linears}
    if recipe is not None and recipe != chosen.recipe:
        raise ValueError("its recipe is not the manifest's")
    if chosen.dtype not in ("fp16", "fp32") or chosen.dtype != bundle.manifest.dtype:
        raise ValueError("its dtype is not the manifest's")
    if not 0 <= chosen.exponent <= _MOST_EXPONENT:
        raise ValueError(f"the stream cannot be divided by 2^{chosen.exponent}")
    attention = {b.attention.attention.node for b in sites.blocks if b.attention.attention}
    norms = {n.output: n.linears[0].in_features for n in (*sites.norms, *sites.latent_norms)}
    downs = {output.input: output for b in sites.blocks for output in b.mlp.outputs}
    for named, known in (
        (chosen.scaled_queries, attention), (chosen.left, linears), (chosen.side, linears),
        (chosen.smoothing.norms, norms), (chosen.smoothing.paths, downs),
    ):  # fmt: skip
        if unknown := sorted(set(named) - set(known)):
            raise ValueError(f"the graph has no {unknown[0]!r}")
    for node, loud in chosen.side.items():
        inside = loud.ndim == 1 and loud.size and 0 <= loud.min() <= loud.max()
        if not inside or loud.max() >= linears[node].in_features or len(set(loud)) < loud.size:
            raise ValueError(f"the side channels of {node!r} are none")
    widths = {**norms, **{n: x.in_features for n, x in downs.items()}}
    for name, choice in (*chosen.smoothing.norms.items(), *chosen.smoothing.paths.items()):
        if choice.factors.shape != (widths[name],) or not _positive(choice.factors):
            raise ValueError(f"the factors of {name!r} are none")
    for name, scale in (*chosen.activations.items(), *chosen.cache.items()):
        if not isinstance(scale, float) or not _positive(scale):
            raise ValueError(f"the scale of {name!r} is none")
    for number, sinks in enumerate(chosen.sinks):
        _check_sinks(sinks, number, sites)
    if chosen.recipe.weights is not None:
        for linear in sites.linears:
            if linear.node not in chosen.left and linear.weight not in chosen.codes:
                raise ValueError(f"{bundle.model.name} has no rounded weight of {linear.node!r}")


def _check_sinks(sinks: SinkTemplates, number: int, sites: Sites) -> None:
    life, blocks = sinks.lifecycle, len(sites.blocks)
    places = [life.birth, life.end, *life.clamp_blocks, *(s.site.block for s in sinks.early)]
    if any(type(block) is not int or not 0 <= block < blocks for block in places):
        raise ValueError(f"lifecycle {number} names a block that is none")
    forced = [life.force_first, *(early.site.force_first for early in sinks.early)]
    if sinks.form not in (NORM, KV, NORM_AND_KV) or any(type(x) is not bool for x in forced):
        raise ValueError(f"the form of lifecycle {number} is none")
    if (sinks.form != NORM) != (sinks.key_values is not None) or life.birth > life.end:
        raise ValueError(f"lifecycle {number} is not whole")
    thresholds = [sinks.threshold, *(early.threshold for early in sinks.early)]
    if any(not isinstance(x, float) or not 0 < x <= _MOST_THRESHOLD for x in thresholds):
        raise ValueError(f"a threshold of lifecycle {number} is none")
    features = sites.blocks[life.birth].mlp.inner_features
    tables = [(sinks.detection, features), (sinks.restore, sites.hidden)]
    tables += [(rows, sites.hidden) for rows in sinks.norms.values()]
    for early in sinks.early:
        tables.append((early.detection, sites.blocks[early.site.block].mlp.inner_features))
        tables += [(rows, sites.hidden) for rows in early.norms.values()]
    if sinks.key_values is not None:
        tables.append((sinks.key_values.residual, sites.hidden))
    for rows, width in tables:
        empty = rows is sinks.restore and not rows.size
        if not empty and (rows.shape != (sinks.count, width) or not np.isfinite(rows).all()):
            raise ValueError(f"a template of lifecycle {number} is none")


def _positive(value: Any) -> bool:
    return bool((np.isfinite(value) & (np.asarray(value) > 0)).all())


def _check_there(tensor: ir.TensorProtocol) -> None:
    """ValueError if its file ends before it does: it is read later."""
    if isinstance(tensor, ir.ExternalTensor):
        there, end = Path(tensor.path).stat().st_size, (tensor.offset or 0) + tensor.nbytes
        if end > there:
            raise ValueError(f"{Path(tensor.path).name} ends before {tensor.name!r} does")


class _ShippedCodes(Mapping[str, StoredCodes]):
    """By weight name, in the graph that ships."""

    def __init__(self, model: Path, sites: Sites) -> None:
        nodes = {node.name: node for node in io.load(model).graph}
        self._found: dict[str, tuple[ir.TensorProtocol, ir.TensorProtocol]] = {}
        for linear in sites.linears:
            node = nodes.get(linear.node)
            value = node.inputs[1] if node is not None and len(node.inputs) > 1 else None
            producer = None if value is None else value.producer()
            if producer is not None and producer.op_type == "DequantizeLinear":
                codes, scales = (v.const_value for v in producer.inputs[:2] if v is not None)
                size = (linear.in_features, linear.out_features)
                if codes is not None and scales is not None and codes.shape == size:
                    _check_there(codes)
                    self._found[linear.weight] = codes, scales

    def __getitem__(self, name: str) -> StoredCodes:
        codes, scales = self._found[name]
        return StoredCodes(codes.numpy, scales.numpy().astype(np.float32))

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)


def _inserted(sinks: SinkTemplates) -> dict[str, np.ndarray]:
    found = {"detection": sinks.detection}
    for site in sinks.early:
        found[f"detection.{site.site.block}"] = site.detection
        found |= {f"insert.{name}": rows for name, rows in site.norms.items()}
    if sinks.form != KV:
        found["restore"] = sinks.restore
        found |= {f"insert.{name}": rows for name, rows in sinks.norms.items()}
    if sinks.form != NORM:
        assert sinks.key_values is not None
        found |= {f"attend.{name}": rows for name, rows in sinks.key_values.rows.items()}
    if sinks.form == KV:
        assert sinks.key_values is not None
        found["set"] = sinks.key_values.residual
    return found


def _sink_record(sinks: SinkTemplates) -> dict[str, Any]:
    life, attends = sinks.lifecycle, sinks.form != NORM
    return {
        "birth": life.birth,
        "death": life.death,
        "end": life.end,
        "channel": int(life.channel),
        "clamp_blocks": list(life.clamp_blocks),
        "position_0_forced": bool(life.force_first),
        "threshold": float(sinks.threshold),
        "form": sinks.form,
        "norms": list(sinks.norms),
        "key_values": list(sinks.key_values.rows) if attends and sinks.key_values else [],
        "early": [
            {
                "block": early.site.block,
                "position_0_forced": bool(early.site.force_first),
                "threshold": float(early.threshold),
                "norms": list(early.norms),
            }
            for early in sinks.early
        ],
    }


def _sinks(
    found: dict[str, Any], number: int, arrays: Mapping[str, np.ndarray], sites: Sites
) -> SinkTemplates:
    def rows(name: str) -> np.ndarray:
        return arrays[f"{number}.{name}"]

    early = tuple(
        EarlyTemplates(
            EarlySite(each["block"], each["threshold"], each["position_0_forced"], _NOBODY),
            each["threshold"],
            rows(f"detection.{each['block']}"),
            {name: rows(f"insert.{name}") for name in each["norms"]},
        )
        for each in found["early"]
    )
    life = Lifecycle(
        birth=found["birth"], death=found["death"], end=found["end"], channel=found["channel"],
        threshold=found["threshold"], force_first=found["position_0_forced"],
        clamp_blocks=tuple(found["clamp_blocks"]), members=_NOBODY,
        down_peak=0.0, down_median=0.0, residual_peak=0.0, first_rate=0.0,
        early=tuple(each.site for each in early),
    )  # fmt: skip
    detection, is_kv = rows("detection"), found["form"] == KV
    nothing = np.zeros((len(detection), sites.hidden), np.float32)  # the kv form writes zeros there
    attended = {name: rows(f"attend.{name}") for name in found["key_values"]}
    after = rows("set") if is_kv else nothing
    found_again = SinkTemplates(
        lifecycle=life,
        threshold=found["threshold"],
        detection=detection,
        norms={name: nothing if is_kv else rows(f"insert.{name}") for name in found["norms"]},
        deviation={},
        deviation_max={},
        template_spread=[],
        assignment=_NOBODY,
        restore=np.zeros((0, 0), np.float32) if is_kv else rows("restore"),
        early=early,
        form=found["form"],
    )
    if attended:
        found_again.key_values = KeyValueTemplates(attended, after, {}, {})
    return found_again


def _choices(
    found: dict[str, list[Any]], arrays: Mapping[str, np.ndarray]
) -> dict[str, SmoothingChoice]:
    return {
        name: SmoothingChoice(choice, arrays[f"smoothing.{name}"], error, without)
        for name, (choice, error, without) in found.items()
    }


@dataclass(frozen=True)
class Recalled(Made):
    """What an earlier compile decided, of which graphs are made again; `absmax` as in Rewrite."""

    chosen: Decisions
    sites: Sites
    traced: Path
    absmax: Mapping[str, float]


def recall(bundle: Bundle, traced: Path, absmax: Mapping[str, Any]) -> Recalled:
    """The decisions of `bundle` for its own model, whose graph is `traced`; `absmax` is that of its
    plan. Nothing is lowered from them yet.

    Raises BundleError as `load_decisions` does.
    """
    if not all(isinstance(value, (int, float)) for value in absmax.values()):
        raise BundleError(f"{bundle.path(PLAN_NAME)} is damaged: compile the bundle again")
    base, _ = begin(io.load(traced))
    return Recalled(load_decisions(bundle, base.sites), base.sites, traced, absmax)
