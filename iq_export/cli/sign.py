"""`iq-export sign OUT --key FILE`: say with a signature who made a bundle."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from iq_export.bundle.package import Bundle, read_manifest
from iq_export.bundle.signature import write_signature
from iq_export.bundle.update import bundle_lock
from iq_export.cli import options


def add_parser(subparsers: Any) -> None:
    """Define the subcommand and its options."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "sign", help="sign a bundle, so that `verify --key` tells who made it"
    )
    parser.add_argument("bundle", metavar="OUT", type=Path, help="a compiled bundle")
    parser.add_argument(
        "--key", type=Path, required=True, metavar="FILE",
        help="your Ed25519 private key in PEM (openssl genpkey -algorithm ed25519)",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Check every file, then sign the manifest, which has their checksums."""
    progress = options.progress(args, 1)
    Bundle.open(args.bundle, verify=False)
    with bundle_lock(args.bundle, progress.waits), progress.step("Check the files and sign"):
        Bundle.open(args.bundle)
        path = write_signature(args.bundle, read_manifest(args.bundle), args.key)
    if args.json:
        options.print_json({"bundle": args.bundle, "signature": path})
    else:
        options.say(f"{path}: written; sign again after `iq-export build` or `eval`")
    return 0
