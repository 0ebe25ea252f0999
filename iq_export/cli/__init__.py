"""The command `iq-export`: one file per subcommand, one place that turns errors into exit codes.

Exit codes: 0 done, 1 other, 2 usage, 3 model, 4 text, 5 graph, 6 engine, 7 bundle (errors.py),
130 interrupted. What imports take long stands in functions, so that a signal at the start finds
its handler there.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import io
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import NoReturn

from iq_export import __version__, interrupt
from iq_export.disk import trouble
from iq_export.errors import INTERRUPTED_EXIT_CODE, BundleError, IqError, UsageError
from iq_export.terminal import Unfailing, drop_stdout, is_utf8, printable, sentence

# What the extra `compile` brings, by the names of its modules.
_COMPILE_PACKAGES = frozenset(
    ("accelerate", "gguf", "ml_dtypes", "onnxscript", "safetensors", "sentencepiece", "torch",
     "transformers", "yaml")
)  # fmt: skip

# In the order of a user's first day.
_COMMANDS = ("analyze", "compile", "inspect", "eval", "run", "build", "verify", "sign", "package",
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
    from iq_export.cli.options import add_common

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
        with interrupt.never_swallowed(), warnings.catch_warnings():
            if not args.verbose:  # what libraries say to programmers is no sentence of ours
                warnings.simplefilter("ignore")
            return _outcome(args)
    except KeyboardInterrupt:
        return _interrupted()


def _outcome(args: argparse.Namespace) -> int:
    """The exit code of a command, its error said. Raises KeyboardInterrupt, and faults of ours."""
    try:
        _check_names(args)
        return int(args.handler(args))
    except BrokenPipeError:  # `iq-export run ... | head`: nobody reads on
        drop_stdout()
        return 0
    except Exception as error:
        interrupt.check()  # what a library made of it is no error
        full = trouble(error, str(vars(args).get("out") or vars(args).get("repo") or "the output"))
        if full is not None and not isinstance(error, BundleError):
            return _say(args, full, BundleError.exit_code)
        if isinstance(error, IqError):
            return _say(args, error, error.exit_code)
        if isinstance(error, ModuleNotFoundError):
            package = (error.name or "").partition(".")[0]
            if package not in _COMPILE_PACKAGES:
                raise
            lack = f"'{args.command}' needs the package {package}, which a light install lacks"
            return _say(args, f"{lack}: pip install 'iq-export[compile]'", IqError.exit_code)
        if isinstance(error, OSError):
            place = f"cannot use {error.filename}: " if error.filename is not None else ""
            text = f"{place}{error.strerror or error}"
            if error.errno in _BAD_NAMES:
                return _say(args, f"{text}: give another name", UsageError.exit_code)
            return _say(args, text, BundleError.exit_code)
        if isinstance(error, RuntimeError) and "home directory" in str(error):  # pathlib's
            lack = "there is no home folder for downloads: set HOME, or IQ_EXPORT_CACHE and HF_HOME"
            return _say(args, lack, BundleError.exit_code)
        if isinstance(error, MemoryError):
            return _say(args, "out of memory: this model or text needs more", IqError.exit_code)
        raise


def _settle_streams() -> None:
    """Nobody need listen: what cannot be written to stderr is lost, and a closed stream swallows.

    A character that a stream's encoding lacks is escaped.
    """
    # A file that is opened must not get the number of a closed stream: libraries write there.
    while (nowhere := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(nowhere, True)
    os.close(nowhere)
    for name, number in (("stdout", 1), ("stderr", 2)):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(number, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 (for good)
        if isinstance(stream, io.TextIOWrapper):
            if name == "stderr":
                stream = Unfailing.like(stream)
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, stream)


def entry() -> None:
    """The console script."""
    try:
        code = _process()
        interrupt.ignore()
    except KeyboardInterrupt:
        interrupt.ignore()
        code = _interrupted()
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        drop_stdout()
    except OSError as error:
        drop_stdout()
        print(f"iq-export: error: cannot write to standard output: {error}", file=sys.stderr)
        code = BundleError.exit_code
    sys.exit(code)


def _process() -> int:
    """`main` for a process of its own. A fault of ours is one sentence, and -v shows where."""
    interrupt.install()
    _settle_streams()
    # Read when NumPy is imported: its threads would spin for a while after each product, and hold
    # up those of ONNX Runtime.
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")
    try:
        return main()
    except Exception as error:
        args = parser().parse_args()
        what = f"unexpected {type(error).__name__}: {error}"
        hint = "" if args.verbose else "; please report it with what -v shows"
        return _say(args, sentence(what) + hint, IqError.exit_code)
    except SystemExit as stop:  # argparse: --help, or wrong usage
        return stop.code if isinstance(stop.code, int) else 0


def _interrupted() -> int:
    print("\niq-export: interrupted", file=sys.stderr)
    return INTERRUPTED_EXIT_CODE


def _say(args: argparse.Namespace, error: object, code: int) -> int:
    """Print the sentence of an error, under its traceback with -v, and return `code`."""
    try:
        sys.stdout.flush()  # what was said before it
    except (OSError, ValueError):
        drop_stdout()
    if args.verbose:
        print(printable(traceback.format_exc()), file=sys.stderr, end="")
    print(f"iq-export: error: {sentence(error)}", file=sys.stderr)
    return code


def _check_names(args: argparse.Namespace) -> None:
    """Refuse names that are not UTF-8: no file format, tokenizer or ONNX Runtime takes them."""
    for name, value in vars(args).items():
        for one in value if isinstance(value, list) else [value]:
            named = isinstance(one, (str, os.PathLike)) and name not in _TEXTS
            if named and not is_utf8(str(one)):
                raise UsageError(f"{name} {str(one)!a} is not UTF-8: give it another name")
