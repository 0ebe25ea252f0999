"""The command `iq-export`: one file per subcommand, one place that turns errors into exit codes.

Exit codes: 0 done, 1 other, 2 usage, 3 model, 4 text, 5 graph, 6 engine, 7 bundle (errors.py),
130 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import importlib
import io
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from typing import NoReturn

from iq_export import __version__
from iq_export.bundle.package import disk_full_is_bundle_error
from iq_export.cli.options import add_common
from iq_export.errors import INTERRUPTED_EXIT_CODE, BundleError, IqError, UsageError
from iq_export.terminal import is_utf8, printable, sentence

# What the extra `compile` brings, by the names of its modules.
_COMPILE_PACKAGES = frozenset(
    ("accelerate", "gguf", "ml_dtypes", "onnxscript", "safetensors", "sentencepiece", "torch",
     "transformers", "yaml")
)  # fmt: skip

# In the order of a user's first day.
_COMMANDS = ("compile", "inspect", "eval", "run", "build", "verify", "sign", "package",
             "doctor")  # fmt: skip

# Arguments that are text; `run` checks them.
_TEXTS = ("prompt", "system")

# What a name that was given can be wrong about; any other failure is the disk's.
_BAD_NAMES = (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL)


class _Parser(argparse.ArgumentParser):
    """Repeats an argument in its message only as far as a terminal takes it."""

    def error(self, message: str) -> NoReturn:
        super().error(sentence(message))


def parser() -> argparse.ArgumentParser:
    """The argument parser of all subcommands."""
    top = _Parser(
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
        _check_names(args)
        with disk_full_is_bundle_error("the output"):
            code = int(args.handler(args))
        with stdout_is_bundle_error():
            sys.stdout.flush()
        return code
    except IqError as error:
        return _say(args, error, error.exit_code)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _COMPILE_PACKAGES:
            raise
        lack = f"'{args.command}' needs the package {package}, which a light install does not have"
        return _say(args, f"{lack}: pip install 'iq-export[compile]'", IqError.exit_code)
    except KeyboardInterrupt:
        print("\niq-export: interrupted", file=sys.stderr)
        return INTERRUPTED_EXIT_CODE
    except BrokenPipeError:
        # `iq-export inspect OUT | head`: nobody reads on. Python flushes stdout once more at exit.
        _drop_stdout()
        return 0
    except OSError as error:
        place = f"cannot use {error.filename}: " if error.filename is not None else ""
        text = f"{place}{error.strerror or error}"
        if error.errno in _BAD_NAMES:
            return _say(args, f"{text}: give another name", UsageError.exit_code)
        return _say(args, text, BundleError.exit_code)
    except MemoryError:
        return _say(args, "out of memory: this model or text needs more", IqError.exit_code)


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
    """The console script. A fault of ours is one sentence as well, and -v shows where."""
    # A container that is stopped sends SIGTERM: clean up as after Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    _settle_streams()
    try:
        code = main()
    except Exception as error:
        args = parser().parse_args()
        what = f"unexpected {type(error).__name__}: {error}"
        hint = "" if args.verbose else "; please report it with what -v shows"
        code = _say(args, sentence(what) + hint, IqError.exit_code)
    sys.exit(code)


def _say(args: argparse.Namespace, error: object, code: int) -> int:
    """Print the sentence of an error, under its traceback with -v, and return `code`."""
    try:
        sys.stdout.flush()  # what was said before it
    except (OSError, ValueError):
        _drop_stdout()
    if args.verbose:
        print(printable(traceback.format_exc()), file=sys.stderr, end="")
    print(f"iq-export: error: {sentence(error)}", file=sys.stderr)
    return code


@contextlib.contextmanager
def stdout_is_bundle_error() -> Iterator[None]:
    """What was made is there; only the words about it are lost."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise BundleError(f"cannot write to standard output: {error.strerror}") from error


def _drop_stdout() -> None:
    """Python flushes stdout once more at exit, and would complain where that fails."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _check_names(args: argparse.Namespace) -> None:
    """Refuse names that are not UTF-8: no file format, tokenizer or ONNX Runtime takes them."""
    for name, value in vars(args).items():
        for one in value if isinstance(value, list) else [value]:
            named = isinstance(one, (str, os.PathLike)) and name not in _TEXTS
            if named and not is_utf8(str(one)):
                raise UsageError(f"{name} {str(one)!a} is not UTF-8: give it another name")
