"""`iq-export eval OUT`: perplexity of this bundle's model.onnx beside fp32 and its baselines."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iq_export.bundle.package import Bundle
from iq_export.cli import options
from iq_export.disk import is_read_only
from iq_export.errors import BundleError, GraphError, IqError, UsageError
from iq_export.evaluate.compare import (
    REFERENCE,
    Comparison,
    Speed,
    compare,
    speed_line,
    table,
    time_prefill,
)
from iq_export.lengths import bundle_limit, window_length
from iq_export.observe.samples import BUILTIN, BUILTIN_HELDOUT, load_text, text_sha256
from iq_export.options import PERMISSIONS, add, positive, seed, window_tokens
from iq_export.progress import Progress
from iq_export.report.html import check_report, update_with_report
from iq_export.terminal import in_a_line, printable

if TYPE_CHECKING:
    from iq_export.observe.walk import Graph


def add_parser(subparsers: Any) -> None:
    """Define the subcommand and its options."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "eval",
        help="measure perplexity in ONNX Runtime, with and without BOS, and time a prefill",
    )
    parser.add_argument("bundle", metavar="OUT", type=Path, help="a compiled bundle")
    parser.add_argument(
        "--text", default=BUILTIN_HELDOUT, metavar="FILE|builtin",
        help="UTF-8 text that was not used for calibration (default: builtin's held-out part)",
    )  # fmt: skip
    parser.add_argument(
        "--data", type=Path, metavar="DIR",
        help="pictures or recordings that were not used for calibration, for a model that takes "
        "these",
    )  # fmt: skip
    parser.add_argument("--windows", type=positive, default=16, help="default 16")
    parser.add_argument(
        "--length", type=window_tokens, default=0,
        help="tokens (default 512, or as many as the model has positions)",
    )  # fmt: skip
    parser.add_argument("--seed", type=seed, default=0, help="of the places of the windows")
    parser.add_argument(
        "--work", type=Path, metavar="DIR",
        help="folder with the traced graph (compile --keep-work); traced again if absent",
    )  # fmt: skip
    parser.add_argument(
        "--bundle-only", action="store_true", help="only this bundle: no other graph is rebuilt"
    )
    add(parser, *PERMISSIONS)
    parser.add_argument("--no-speed", action="store_true", help="do not time the prefill")
    add(parser, "device")


def run(args: argparse.Namespace) -> int:
    """Measure, print the table and store it in the manifest, if the bundle may be written."""
    with ExitStack() as hold:  # the graphs compared with stay as they are
        return _run(args, hold)


def _run(args: argparse.Namespace, hold: ExitStack) -> int:
    from iq_export.run.generate import Tokenizer

    bundle = Bundle.open(args.bundle)
    if not options.generates_text(bundle):
        return _run_encoder(bundle, args, hold)
    check_report(bundle)
    name = BUILTIN_HELDOUT if args.text == BUILTIN else args.text
    text = load_text(name)
    if text_sha256(text) == bundle.manifest.options.get("calibration_sha256"):
        raise UsageError(f"{name} was used for calibration: give another text with --text")
    limit = bundle_limit(bundle.folder, bundle.model)
    length, remarks = window_length(args.length, limit)
    providers = options.providers(args.device)
    tokenizer = Tokenizer(bundle.folder)  # before graphs are made, which takes minutes
    graphs = _graphs(bundle, args, hold)
    progress = options.progress(args, len(graphs) + (REFERENCE in graphs and not args.no_speed))
    for remark in remarks:
        progress.note(remark)
    speed = None
    with _one_bundle(bundle):
        comparison = compare(
            graphs,
            tokenizer,
            text,
            count=args.windows,
            length=length,
            seed=args.seed,
            # A manifest travels: it names the file, not a folder of this machine.
            text_name=Path(name).name,
            providers=providers,
            progress=progress,
        )
        reference = graphs.get(REFERENCE)
        if isinstance(reference, Path) and not args.no_speed:
            with progress.step("Time a prefill, bundle against fp32"):
                speed = time_prefill(
                    bundle.model, reference, length=window_length(0, limit)[0],
                    providers=providers,
                )  # fmt: skip
    _print(comparison, speed, as_json=args.json)
    try:
        _store(bundle, comparison, speed, progress)
    except (OSError, BundleError) as error:
        if not is_read_only(error):
            raise
        where = printable(str(bundle.folder))
        note = f"note: the figures could not be kept: {where} may not be written"
        print(f"iq-export: {note}", file=sys.stderr)
    _fail_if_broken(comparison, bundle_label(bundle))
    return 0


def _run_encoder(bundle: Bundle, args: argparse.Namespace, hold: ExitStack) -> int:
    """Compare every output with fp32's, on pictures, recordings or text; nothing is stored."""
    from iq_export.evaluate.outputs import compare_outputs, output_table
    from iq_export.observe.samples import Whole
    from iq_export.observe.signals import load_signals, sentences
    from iq_export.run.generate import Tokenizer

    if (bundle.folder / "tokenizer.json").is_file():
        data = BUILTIN_HELDOUT if args.text == BUILTIN else args.text
        length, _ = window_length(args.length, bundle_limit(bundle.folder, bundle.model))
        arrays = sentences(
            Tokenizer(bundle.folder), load_text(data), length, args.windows, args.seed
        )
    elif args.data is None:
        raise UsageError(
            f"{bundle.folder} takes pictures or recordings: give a folder of such that were not "
            "used for calibration with --data DIR"
        )
    else:
        data = str(args.data)
        arrays = load_signals(args.data, bundle.folder, args.windows, args.seed)
    graphs = _graphs(bundle, args, hold)
    windows = [Whole(array, 1) for array in arrays]  # no row of the stream is looked at
    comparison = compare_outputs(
        graphs, windows, data=data, providers=options.providers(args.device),
        progress=options.progress(args, len(graphs)),
    )  # fmt: skip
    if args.json:
        options.print_json(comparison.to_dict())
    else:
        options.say(output_table(comparison))
    return 0


@contextmanager
def _one_bundle(bundle: Bundle) -> Iterator[None]:
    """Raises BundleError if another compile replaced the bundle while the block measured it."""
    try:
        yield
    except (IqError, OSError):
        if _is_there(bundle):
            raise
    if not _is_there(bundle):
        raise BundleError(f"{bundle.folder} was replaced while it was measured: run eval again")


def _is_there(bundle: Bundle) -> bool:
    return Bundle.open(bundle.folder, verify=False).same_model(bundle)


def bundle_label(bundle: Bundle) -> str:
    """The row's name of the bundle's own model.onnx."""
    return f"bundle ({bundle.manifest.recipe})"


def _graphs(bundle: Bundle, args: argparse.Namespace, hold: ExitStack) -> dict[str, Graph]:
    """Label -> graph: the references, then the file that ships."""
    graphs: dict[str, Graph] = {}
    if not args.bundle_only:
        progress = options.progress(args, 1)
        with progress.step("Prepare the graphs to compare with"):
            permitted = {name: getattr(args, name) for name in PERMISSIONS}
            graphs.update(build_references(bundle, args.work, progress, hold, **permitted))
    graphs[bundle_label(bundle)] = bundle.model
    return graphs


def build_references(
    bundle: Bundle,
    work: Path | None,
    progress: Progress,
    hold: ExitStack | None = None,
    **permitted: bool,
) -> dict[str, Graph]:
    """The graphs to compare with: the traced one, from the work folder or made again, which stays
    until `hold` is closed, and others in memory.

    `permitted` is what this run permits (`options.PERMISSIONS`), whatever the manifest records.

    Raises UsageError in a light install, which cannot make them.
    """
    if importlib.util.find_spec("torch") is None:
        raise UsageError(
            "making the graphs to compare with needs pip install 'iq-export[compile]'; "
            "--bundle-only measures this bundle alone"
        )
    from iq_export.references import reference_graphs

    return reference_graphs(bundle, work, progress, hold, **permitted)


def _store(bundle: Bundle, comparison: Comparison, speed: Speed | None, progress: Progress) -> None:
    """Put the measured numbers into the manifest and the report."""
    changes: dict[str, Any] = {"accuracy": comparison.to_dict()}
    if speed is not None:
        changes["speed"] = asdict(speed)
    update_with_report(bundle, say=progress.waits, **changes)


def _print(comparison: Comparison, speed: Speed | None, *, as_json: bool) -> None:
    if as_json:
        options.print_json({**comparison.to_dict(), "speed": speed and asdict(speed)})
        return
    options.say(table(in_a_line(comparison.to_dict())))
    if speed is not None:
        options.say(speed_line(asdict(speed)))


def _fail_if_broken(comparison: Comparison, label: str) -> None:
    for row in comparison.rows:
        if row.graph == label and row.error is not None:
            raise GraphError(f"{label}: {row.error}")
