"""What several subcommands share: arguments that all have, progress, and output."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
from typing import Any

from iq_export.bundle.manifest import json_safe
from iq_export.bundle.package import Bundle
from iq_export.errors import BundleError, UsageError
from iq_export.graph.interface import Interface
from iq_export.progress import Progress
from iq_export.run.ort import PROVIDERS
from iq_export.terminal import drop_stdout, printable


def add_common(parser: argparse.ArgumentParser) -> None:
    """`--json`, `-v` and `-q`, where the subcommand has not defined its own."""
    for flags, text in (
        (("--json",), "print one JSON document on stdout"),
        (("-v", "--verbose"), "show where an error comes from"),
        (("-q", "--quiet"), "no progress on stderr, only what is waited for"),
    ):
        with contextlib.suppress(argparse.ArgumentError):
            parser.add_argument(*flags, action="store_true", help=text)


def providers(device: str) -> tuple[str, ...]:
    """The ONNX Runtime providers for `device`; `run.ort` refuses what is not installed."""
    return PROVIDERS[device]


def progress(args: argparse.Namespace, total: int | None = None) -> Progress:
    """Progress on stderr, unless `--quiet`."""
    return Progress(total, quiet=args.quiet)


def generates_text(bundle: Bundle) -> bool:
    """Whether a bundle's model predicts one token after the other, as far as is known."""
    graph = bundle.manifest.graph
    interface = Interface.of_tensors(graph.inputs, graph.outputs)
    return interface.is_causal or interface.primary is None


def require_text(bundle: Bundle, what: str) -> None:
    """UsageError if a bundle's model generates no text, which `what` is about."""
    if not generates_text(bundle):
        raise UsageError(
            f"{bundle.folder} generates no text, and {what}: run its model.onnx in ONNX Runtime, "
            "or its engine"
        )


def say(text: str) -> None:
    """Lines for people on stdout: what files say in them cannot command the terminal."""
    _write(printable(text))


def print_json(document: Any) -> None:
    """One JSON document on stdout."""
    text = json.dumps(json_safe(document), indent=2, ensure_ascii=False)
    # JSON writes out the control characters of ASCII itself.
    rest = r"[\x7f-\x9f\u2028-\u202e\u2066-\u2069]"
    _write(re.sub(rest, lambda match: f"\\u{ord(match[0]):04x}", text))


def write_stdout(text: str) -> None:
    """Print now. Raises BrokenPipeError where nobody reads on, BundleError if it cannot be written.

    What was made is there; only the words about it are lost.
    """
    try:
        print(text, end="", flush=True)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise BundleError(f"cannot write to standard output: {error.strerror}") from error


def _write(text: str) -> None:
    """Where nobody reads on (`| head`), what a command found out still decides its exit code."""
    try:
        write_stdout(f"{text}\n")
    except BrokenPipeError:
        drop_stdout()


def size(count: float) -> str:
    """Bytes for people: 1.4 GB, 3.2 MB, 512 B (powers of ten, as disks and file managers count)."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.1f} {unit}"
    return f"{count:.0f} B"
