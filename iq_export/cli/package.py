"""`iq-export package --triton OUT REPO`: a bundle in the form that a server takes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from iq_export.bundle.package import Bundle, read_whole
from iq_export.bundle.triton import BACKENDS, README_NAME, Model, write_repository
from iq_export.cli import options

_EPILOG = """examples:
  iq-export package --triton OUT models --target h100
  iq-export package --triton OUT models --backend onnxruntime
"""


def add_parser(subparsers: Any) -> None:
    """Define the subcommand and its options."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "package",
        help="make a model repository for Triton Inference Server",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--triton", action="store_true", required=True,
        help="the form: a model repository of Triton Inference Server",
    )  # fmt: skip
    parser.add_argument("bundle", metavar="OUT", type=Path, help="a compiled bundle")
    parser.add_argument(
        "repository", metavar="REPO", type=Path,
        help="the repository; the model becomes a folder in it, others stay",
    )  # fmt: skip
    parser.add_argument("--target", metavar="NAME", help="whose engine (default: the only one)")
    parser.add_argument(
        "--backend", choices=BACKENDS, default=BACKENDS[0],
        help="serve the engine (default), or model.onnx in ONNX Runtime",
    )  # fmt: skip
    parser.add_argument("--name", help="of the model in Triton (default: the bundle's)")
    parser.add_argument(
        "--force", action="store_true", help="replace another model that this command wrote"
    )


def run(args: argparse.Namespace) -> int:
    """Check the files, then write the model's folder."""
    progress = options.progress(args, 1)

    def write(bundle: Bundle) -> Model:
        return write_repository(
            bundle,
            args.repository,
            target=args.target,
            backend=args.backend,
            name=args.name,
            force=args.force,
            say=progress.waits,
        )

    with progress.step("Check the files, write the model"):
        model = read_whole(args.bundle, write)
    if args.json:
        options.print_json(
            {
                "model": model.name,
                "backend": model.backend,
                "folder": model.folder,
                "files": sorted([*model.texts, *model.copies]),
                "options": model.options,
                "written": model.written,
            }
        )
    else:
        options.say(_line(model))
    return 0


def _line(model: Model) -> str:
    done = "written" if model.written else "there already, the same"
    return f"{model.folder}: {done}, backend {model.backend}; {README_NAME} in it says how to start"
