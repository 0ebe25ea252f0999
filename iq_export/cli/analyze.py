"""`iq-export analyze MODEL`: where a model spikes and what that costs, before it is compiled."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from iq_export.cli import options
from iq_export.options import PERMISSIONS, CompileOptions, add

# Those of `compile` that say what is looked at, and where it runs.
_SHARED = ("calibration", "samples", "length", "seed", "max_relative_deviation", "part",
           "tokenizer", "device", "work", *PERMISSIONS)  # fmt: skip


def add_parser(subparsers: Any) -> None:
    """Define the subcommand and its options."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "analyze", help="say where a model spikes and what that costs: a page, and its JSON"
    )
    add(parser, "model")
    parser.add_argument(
        "-o", "--output", type=Path, default=Path("analysis.html"), metavar="FILE.html",
        help="the page, its JSON goes beside it; neither may exist",
    )  # fmt: skip
    add(parser, *_SHARED)


def run(args: argparse.Namespace) -> int:
    """Write both files, and print the findings."""
    from iq_export.analyze import analyze

    asked = {name: getattr(args, name) for name in _SHARED}
    found = analyze(CompileOptions(args.model, args.output, **asked), options.progress(args))
    if args.json:
        options.print_json({"page": found.page, "data": found.data, **found.record})
        return 0
    for finding in found.record["findings"]:
        options.say(f"- {finding['text']}")
        for key, name in (("int8", "INT8"), ("fp8", "FP8"), ("half", "half")):
            if finding[key]:
                options.say(f"    {name}: {finding[key]}")
    for warning in found.record["warnings"]:
        options.say(f"warning: {warning}")
    options.say(f"{found.page} and {found.data.name}: {found.record['seconds']['total']:.0f} s")
    return 0
