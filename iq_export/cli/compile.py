"""`iq-export compile MODEL OUT`: the main job."""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from iq_export.cli import options
from iq_export.options import add_all, from_arguments
from iq_export.terminal import in_a_line

if TYPE_CHECKING:
    from iq_export.bundle.package import Bundle

_EPILOG = """examples:
  iq-export compile smollm2-135m OUT --recipe w8a8 --target rtx-ampere
  iq-export compile org/name OUT --recipe w4a16 --target rtx-ada --target rtx-blackwell
  iq-export compile ./model.gguf OUT --calibration my.txt --maxShapes batch:8,seq:1024,past:4096
"""


def add_parser(subparsers: Any) -> None:
    """Define the subcommand and its options."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "compile",
        help="trace, find spikes, insert, quantize, build engines, package",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_all(parser)


def run(args: argparse.Namespace) -> int:
    """Compile, or print what a compile would do.

    A bundle that lacks an engine is described like any other before the error is.
    """
    from iq_export.compile import EnginesFailed, compile, dry_run

    chosen = from_arguments(args)
    if args.dry_run:
        _print_plan(dry_run(chosen), as_json=args.json)
        return 0
    begin = time.perf_counter()
    try:
        bundle = compile(chosen, options.progress(args))
    except EnginesFailed as error:
        _report(error.bundle, time.perf_counter() - begin, as_json=args.json)
        raise
    _report(bundle, time.perf_counter() - begin, as_json=args.json)
    return 0


def _report(bundle: Bundle, seconds: float, *, as_json: bool) -> None:
    if as_json:
        document = {"out": bundle.folder, "seconds": seconds, **asdict(bundle.manifest)}
        options.print_json(document)
    else:
        options.say(_closing(bundle, seconds))


def _print_plan(plan: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        options.print_json(plan)
        return
    for key, value in plan.items():
        if isinstance(value, (list, tuple)):
            options.say("\n".join([f"{key}:", *(f"  {item}" for item in value)]))
        else:
            options.say(f"{key}: {value}")


def _closing(bundle: Bundle, seconds: float) -> str:
    """What a person wants to know at the end: where, how large, how long, what next."""
    manifest = in_a_line(bundle.manifest)
    model = sum(r.bytes for name, r in manifest.files.items() if name.startswith("model.onnx"))
    lines = [f"{bundle.folder}: {manifest.recipe}, model.onnx {options.size(model)}"]
    check = manifest.check
    if check is not None and "cosine" in check:
        lines.append(
            f"  against fp32 on {check['tokens']} rows of features: cosine {check['cosine']:.4f}, "
            f"squared error {check['squared_error']:.2g}"
        )
    elif check is not None:
        lines.append(
            f"  against fp32 on {check['tokens']} calibration tokens: top-1 "
            f"{check['top1']:.1%}, KL {check['kl']:.4f}"
        )
    if manifest.mixed is not None:
        left = sum(len(site["products"]) for site in manifest.mixed["in_half"])
        ratio = manifest.mixed["ratio"]
        lines.append(f"  {left} products in half precision, calibration perplexity {ratio:.4f} x")
    for target, engine in manifest.graph.engines.items():
        form, reason = engine.get("form", "none"), engine.get("form_reason", "")
        size = options.size(engine.get("bytes", 0))
        lines.append(f"  engine {target}: {size}, sinks: {form}{reason and f' ({reason})'}")
    lines += [f"  note: {note}" for note in manifest.notes]
    rss = manifest.peak_rss_bytes
    peak = "" if rss is None else f", peak memory {options.size(rss)}"
    lines.append(f"  {seconds:.0f} s{peak}")
    lines.append(f"next: iq-export eval {bundle.folder}; iq-export inspect {bundle.folder}")
    return "\n".join(lines)
