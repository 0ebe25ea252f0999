"""`iq-export inspect OUT`: the manifest, for people."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from iq_export.bundle.manifest import MANIFEST_NAME, GraphInfo, Manifest, reading_records
from iq_export.bundle.package import Bundle
from iq_export.cli import options
from iq_export.evaluate.compare import speed_line, table
from iq_export.graph.interface import KINDS, Interface
from iq_export.report.lifecycles import describe_lifecycle
from iq_export.terminal import in_a_line

_HASH_DIGITS = 16


def add_parser(subparsers: Any) -> None:
    """Define the subcommand and its options."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "inspect", help="print what a bundle is and what was measured"
    )
    parser.add_argument("bundle", metavar="OUT", type=Path, help="a compiled bundle")


def run(args: argparse.Namespace) -> int:
    """Print the manifest; checksums are `iq-export verify`'s work."""
    bundle = Bundle.open(args.bundle, verify=False)
    with reading_records(bundle.folder / MANIFEST_NAME):
        shown = asdict(bundle.manifest) if args.json else describe(bundle.manifest)
    if args.json:
        options.print_json(shown)
    else:
        options.say(str(shown))
    return 0


def describe(manifest: Manifest) -> str:
    """The manifest as sections of text."""
    manifest = in_a_line(manifest)
    graphs = manifest.graphs
    of = {g.name: f" of {g.name}" if len(graphs) > 1 else "" for g in graphs}
    sections = [
        _head(manifest),
        *(_section(f"sink lifecycles{of[g.name]}", _lifecycles(g)) for g in graphs),
        _section("mixed plan", _mixed(manifest)),
        _section("accuracy", _accuracy(manifest)),
        *(_section(f"engines{of[g.name]}", _engines(g)) for g in graphs),
        *(_section(f"inputs and outputs{of[g.name]}", _tensors(g)) for g in graphs),
        _section("files", _files(manifest)),
        _section("cost of the compile", _cost(manifest)),
        _section("notes", manifest.notes),
    ]
    return "\n\n".join(section for section in sections if section)


def _section(title: str, lines: Iterable[str]) -> str:
    body = [f"  {line}" for line in lines]
    return "\n".join([f"{title}:", *body]) if body else ""


def _head(manifest: Manifest) -> str:
    targets = ", ".join(manifest.targets) or "none"
    lines = [f"{manifest.name}: {manifest.recipe}, {manifest.dtype}, opset {manifest.opset}"]
    lines.append(f"targets: {targets}")
    lines += [f"{key}: {value}" for key, value in manifest.source.items() if value]
    return "\n".join(lines)


def _lifecycles(graph: GraphInfo) -> list[str]:
    if not graph.lifecycles:
        return ["none found: the model has no spikes that the recipe had to treat"]
    lines = []
    for number, record in enumerate(graph.lifecycles, start=1):
        first, *rest = describe_lifecycle(record)
        lines += [f"{number}. {first}", *(f"   {line}" for line in rest)]
    return lines


def _mixed(manifest: Manifest) -> list[str]:
    record = manifest.mixed
    if record is None:
        return []
    left = record["in_half"]
    products = sum(len(site["products"]) for site in left)
    lines = [
        f"budget {record['budget']:g} x fp32 on the calibration text, "
        f"{'met' if record['met'] else 'NOT met'}: {record['ratio']:.4f} x "
        f"+- {record['ratio_standard_error']:.4f} "
        f"({record['ratio_all_quantized']:.4f} x with every product quantized)",
        f"{products} of {record['products']} products in half precision "
        f"({record['share_in_half']:.1%})" + (":" if left else ""),
    ]
    rows = [("  " + ", ".join(site["products"]), f"KL {site['harm']:.2g} nats") for site in left]
    return [*lines, *columns(rows)]


def _accuracy(manifest: Manifest) -> list[str]:
    if manifest.accuracy is None:
        return ["not measured yet: iq-export eval"]
    lines = table(manifest.accuracy).splitlines()
    if manifest.speed is not None:
        lines.append(speed_line(manifest.speed))
    return lines


def _engines(graph: GraphInfo) -> list[str]:
    failed = [f"{name}: FAILED: {reason}" for name, reason in graph.engine_failures.items()]
    if not graph.engines:
        return [*failed, "none: iq-export build OUT --target NAME"]
    header = ("target", "size", "TensorRT", "sm", "sink ops", "build", "sha256")
    rows = [
        (
            target,
            options.size(engine.get("bytes", 0)),
            f"{engine.get('flavour', '')} {engine.get('tensorrt_version', '')}".strip(),
            " ".join(map(str, engine.get("compute_capabilities", []))),
            f"{engine.get('form', '?')} ({engine.get('plugin_layers', 0)} plugin layers)",
            f"{engine.get('seconds', 0.0):.0f} s",
            str(engine.get("sha256", ""))[:_HASH_DIGITS],
        )
        for target, engine in graph.engines.items()
    ]
    reasons = [
        f"{target}: {engine['form_reason']}"
        for target, engine in graph.engines.items()
        if engine.get("form_reason")
    ]
    return [*columns([header, *rows]), *reasons, *failed]


def _tensors(graph: GraphInfo) -> list[str]:
    interface = Interface.of_tensors(graph.inputs, graph.outputs)
    named = [("in", t) for t in interface.inputs] + [("out", t) for t in interface.outputs]
    caches = [t for _, t in named if t.kind]
    rows = [
        (way, t.name, t.dtype, f"[{', '.join(map(str, t.shape))}]")
        for way, t in named
        if not t.kind or (t.layer, t.kind) == (0, KINDS[0])
    ]
    lines = columns(rows)
    return [*lines, f"({len(caches)} cache tensors in all)"] if caches else lines


def _files(manifest: Manifest) -> list[str]:
    rows = [(n, options.size(r.bytes), r.sha256[:_HASH_DIGITS]) for n, r in manifest.files.items()]
    return columns(rows)


def _cost(manifest: Manifest) -> list[str]:
    lines = columns([(step, f"{seconds:.1f} s") for step, seconds in manifest.timings.items()])
    if manifest.peak_rss_bytes is not None:
        lines.append(f"peak memory {options.size(manifest.peak_rss_bytes)}")
    return lines


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as left-aligned lines."""
    if not rows:
        return []
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
