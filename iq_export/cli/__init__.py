"""The command `iq-export`: one file per subcommand, one place that turns errors into exit codes.

Exit codes: 0 done, 1 other, 2 usage, 3 model, 4 text, 5 graph, 6 engine, 7 bundle (errors.py),
130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import io
import os
import signal
import sys
import traceback
from collections.abc import Sequence

from iq_export import __version__
from iq_export.bundle.package import disk_full_is_bundle_error
from iq_export.cli.options import add_common
from iq_export.errors import INTERRUPTED_EXIT_CODE, IqError

# What the extra `compile` brings, by the names of its modules.
_COMPILE_PACKAGES = frozenset(
    ("accelerate", "gguf", "ml_dtypes", "onnxscript", "safetensors", "sentencepiece", "torch",
     "transformers", "yaml")
)  # fmt: skip

# In the order of a user's first day.
_COMMANDS = ("compile", "inspect", "eval", "run", "build", "verify", "package", "doctor")


def parser() -> argparse.ArgumentParser:
    """The argument parser of all subcommands."""
    top = argparse.ArgumentParser(
        prog="iq-export",
        description="Compile LLMs with activation spikes to static W8A8 / W4A16 ONNX and "
        "TensorRT engines.",
    )
    top.add_argument("--version", action="version", version=f"iq-export {__version__}")
    subparsers = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in _COMMANDS:
        command = importlib.import_module(f"iq_export.cli.{name}")
        command.add_parser(subparsers)
        add_common(subparsers.choices[name])
        subparsers.choices[name].set_defaults(handler=command.run)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. Everything a user can cause is one sentence."""
    top = parser()
    for argument in sys.argv[1:] if argv is None else argv:
        if argument.startswith("--") and argument.endswith("=--"):
            # argparse takes the value for the end of the options, and gives an empty list.
            top.error(f"argument {argument[:-3]}: '--' is no value")
    args = top.parse_args(argv)
    try:
        with disk_full_is_bundle_error("the output"):
            code = int(args.handler(args))
            sys.stdout.flush()
            return code
    except IqError as error:
        if args.verbose:
            traceback.print_exc()
        print(f"iq-export: error: {error}", file=sys.stderr)
        return error.exit_code
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _COMPILE_PACKAGES:
            raise
        print(
            f"iq-export: error: '{args.command}' needs the package {package}, which a light "
            "install does not have: pip install 'iq-export[compile]'",
            file=sys.stderr,
        )
        return IqError.exit_code
    except KeyboardInterrupt:
        print("\niq-export: interrupted", file=sys.stderr)
        return INTERRUPTED_EXIT_CODE
    except BrokenPipeError:
        # `iq-export inspect OUT | head`: nobody reads on. Python flushes stdout once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _settle_streams() -> None:
    """A closed stream swallows, and a character that the terminal's encoding lacks is escaped."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            nowhere = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (for good)
            setattr(sys, name, nowhere)
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def entry() -> None:
    """The console script."""
    # A container that is stopped sends SIGTERM: clean up as after Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    _settle_streams()
    sys.exit(main())
