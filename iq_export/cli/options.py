"""Argument groups that several subcommands share, and what their values mean."""

from __future__ import annotations

import argparse
import contextlib
import json
from typing import Any

from iq_export.bundle.manifest import json_safe
from iq_export.progress import Progress
from iq_export.run.ort import PROVIDERS


def add_common(parser: argparse.ArgumentParser) -> None:
    """`--json`, `-v` and `-q`, where the subcommand has not defined its own."""
    for flags, text in (
        (("--json",), "print one JSON document on stdout"),
        (("-v", "--verbose"), "show where an error comes from"),
        (("-q", "--quiet"), "no progress on stderr"),
    ):
        with contextlib.suppress(argparse.ArgumentError):
            parser.add_argument(*flags, action="store_true", help=text)


def add_shapes(parser: argparse.ArgumentParser) -> None:
    """trtexec's shape options, for the three axes of a causal LM."""
    group = parser.add_argument_group("engine shapes (tokens), e.g. batch:1,seq:128,past:0")
    for name in ("min", "opt", "max"):
        group.add_argument(
            f"--{name}Shapes", default="", metavar="SHAPES", dest=f"{name}_shapes",
            help=f"{name}imum sizes of batch, seq and past; axes left out keep their default",
        )  # fmt: skip


def add_device(parser: argparse._ActionsContainer) -> None:
    """`--device`: where ONNX Runtime runs."""
    parser.add_argument(
        "--device", choices=tuple(PROVIDERS), default="cpu",
        help="where ONNX Runtime runs (cuda needs the extra 'gpu'; default cpu)",
    )  # fmt: skip


def providers(device: str) -> tuple[str, ...]:
    """The ONNX Runtime providers for `device`; `run.ort` refuses what is not installed."""
    return PROVIDERS[device]


def progress(args: argparse.Namespace, total: int | None = None) -> Progress:
    """Progress on stderr, unless `--quiet`."""
    return Progress(total, quiet=args.quiet)


def positive(text: str) -> int:
    """argparse type: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def window_length(text: str) -> int:
    """argparse type: tokens of a window, at least 2, since the first is never predicted."""
    value = int(text)
    if value < 2:
        raise argparse.ArgumentTypeError(f"{value} is not at least 2 tokens")
    return value


def print_json(document: Any) -> None:
    """One JSON document on stdout."""
    print(json.dumps(json_safe(document), indent=2, ensure_ascii=False))


def size(count: float) -> str:
    """Bytes for people: 1.4 GB, 3.2 MB, 512 B (powers of ten, as disks and file managers count)."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count:.0f} B"
