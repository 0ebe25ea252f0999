"""`iq-export compile MODEL OUT`: the main job."""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iq_export.cli import options
from iq_export.terminal import in_a_line

if TYPE_CHECKING:
    from iq_export.bundle.package import Bundle
    from iq_export.compile import CompileOptions

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
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="hub id, Hugging Face folder, .gguf, .onnx (with --tokenizer), smollm2-135m or "
        "gemma3-270m",
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="output folder; must not exist")
    parser.add_argument(
        "--recipe",
        default="w8a8",
        help="a file of graphs/recipes: w8a8 (default), w8a8-h512, w8a8-norot, w8a8kv8, w4a16, "
        "fp16",
    )
    parser.add_argument(
        "--target", action="append", metavar="NAME", dest="targets",
        help="device to build an engine for, repeatable (default rtx-ampere)",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=("fp16", "fp32"), default="fp16", help="of model.onnx")
    parser.add_argument("--opset", type=int, default=23, help="ONNX opset (default 23)")
    parser.add_argument("--seed", type=int, default=0, help="of the calibration windows")
    parser.add_argument(
        "--plugin", choices=("auto", "on", "off"), default="auto",
        help="sink ops as TensorRT plugin layers: auto if it can be compiled here (default)",
    )  # fmt: skip
    parser.add_argument(
        "--budget", type=float, metavar="X",
        help="leave the fewest products in half precision that keep the calibration perplexity "
        "within X times fp32's, e.g. 1.005",
    )  # fmt: skip
    _add_calibration(parser)
    options.add_shapes(parser)
    _add_source(parser)
    _add_work(parser)


def _add_calibration(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("calibration")
    group.add_argument(
        "--calibration", default="builtin", metavar="FILE|builtin",
        help="UTF-8 text (default: the manual pages that come with Python)",
    )  # fmt: skip
    group.add_argument("--samples", type=options.positive, default=16, help="windows (default 16)")
    group.add_argument(
        "--length", type=options.window_length, default=0,
        help="tokens per window (default 512, or as many as the model has positions)",
    )  # fmt: skip
    group.add_argument(
        "--max-relative-deviation", type=float, default=0.10, metavar="X",
        help="a lifecycle varying more than this is reported, not replaced (default 0.10)",
    )  # fmt: skip
    group.add_argument(
        "--insertion", choices=("norm", "kv", "auto"), default="auto",
        help="what replaces a sink: rows after the norms, or keys and values; auto measures both",
    )  # fmt: skip
    options.add_device(group)


def _add_source(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("source")
    group.add_argument(
        "--tokenizer", type=Path, metavar="DIR",
        help="folder of the tokenizer.json to use, needed for .onnx (default: the model's own)",
    )  # fmt: skip
    options.add_permissions(group)


def _add_work(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("work")
    group.add_argument("--force", action="store_true", help="replace an existing bundle at OUT")
    group.add_argument("--dry-run", action="store_true", help="print the plan and stop")
    group.add_argument("--work", type=Path, metavar="DIR", help="folder for intermediate graphs")
    group.add_argument(
        "--keep-work", action="store_true", help="keep the intermediate graphs (eval reuses them)"
    )


def compile_options(args: argparse.Namespace) -> CompileOptions:
    """The options of `iq_export.compile`. Raises UsageError for bad shapes."""
    from iq_export.compile import CompileOptions
    from iq_export.engine.profile import Profile

    return CompileOptions(
        model=args.model,
        out=args.out,
        recipe=args.recipe,
        targets=tuple(args.targets) if args.targets else None,
        calibration=args.calibration,
        samples=args.samples,
        length=args.length,
        profile=Profile.parse(args.min_shapes, args.opt_shapes, args.max_shapes),
        opset=args.opset,
        dtype=args.dtype,
        seed=args.seed,
        plugin=args.plugin,
        tokenizer=args.tokenizer,
        force=args.force,
        keep_work=args.keep_work,
        work=args.work,
        device=args.device,
        max_relative_deviation=args.max_relative_deviation,
        insertion=args.insertion,
        budget=args.budget,
        trust_remote_code=args.trust_remote_code,
        accept_terms=args.accept_terms,
    )


def run(args: argparse.Namespace) -> int:
    """Compile, or print what a compile would do.

    A bundle that lacks an engine is described like any other before the error is.
    """
    from iq_export.compile import EnginesFailed, compile, dry_run

    chosen = compile_options(args)
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
    if manifest.check is not None:
        lines.append(
            f"  against fp32 on {manifest.check['tokens']} calibration tokens: top-1 "
            f"{manifest.check['top1']:.1%}, KL {manifest.check['kl']:.4f}"
        )
    if manifest.mixed is not None:
        left = sum(len(site["products"]) for site in manifest.mixed["in_half"])
        ratio = manifest.mixed["ratio"]
        lines.append(f"  {left} products in half precision, calibration perplexity {ratio:.4f} x")
    for target, engine in manifest.engines.items():
        form, reason = engine.get("form", "none"), engine.get("form_reason", "")
        size = options.size(engine.get("bytes", 0))
        lines.append(f"  engine {target}: {size}, sinks: {form}{reason and f' ({reason})'}")
    lines += [f"  note: {note}" for note in manifest.notes]
    rss = manifest.peak_rss_bytes
    peak = "" if rss is None else f", peak memory {options.size(rss)}"
    lines.append(f"  {seconds:.0f} s{peak}")
    lines.append(f"next: iq-export eval {bundle.folder}; iq-export inspect {bundle.folder}")
    return "\n".join(lines)
