"""Exit codes, messages and what the command imports."""

from __future__ import annotations

import argparse
import errno
import os
import subprocess
import sys

import pytest

from iq_export import cli
from iq_export.errors import BundleError, DataError, EngineError, GraphError, IqError, ModelError

COMMANDS = ("compile", "inspect", "eval", "run", "build", "verify", "package", "doctor")
# What `pip install iq-export` does not bring; the parser must not even need ONNX Runtime.
EXTRAS = (
    "torch",
    "transformers",
    "onnxscript",
    "safetensors",
    "ml_dtypes",
    "gguf",
    "yaml",
    "tensorrt",
    "tensorrt_rtx",
)


def outcome(monkeypatch: pytest.MonkeyPatch, error: BaseException, *flags: str) -> int:
    """The exit code of a command that raises `error`."""

    def fail(args: argparse.Namespace) -> int:
        raise error

    monkeypatch.setattr("iq_export.cli.doctor.run", fail)
    return cli.main(["doctor", *flags])


@pytest.mark.parametrize(
    ("kind", "code"),
    [(IqError, 1), (ModelError, 3), (DataError, 4), (GraphError, 5), (EngineError, 6),
     (BundleError, 7)],
)  # fmt: skip
def test_errors_are_one_line_and_an_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], kind: type, code: int
) -> None:
    assert outcome(monkeypatch, kind("what and where")) == code
    assert capsys.readouterr().err == "iq-export: error: what and where\n"


def test_verbose_shows_where_an_error_comes_from(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    outcome(monkeypatch, GraphError("x"), "-v")
    assert "Traceback" in capsys.readouterr().err


def test_a_light_install_says_which_extra_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert outcome(monkeypatch, ModuleNotFoundError("no", name="torch.nn")) == 1
    assert "torch" in (error := capsys.readouterr().err) and "iq-export[compile]" in error
    with pytest.raises(ModuleNotFoundError):
        outcome(monkeypatch, ModuleNotFoundError("no", name="iq_export.misspelt"))


def test_interrupt_and_full_disk(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert outcome(monkeypatch, KeyboardInterrupt()) == 130
    assert outcome(monkeypatch, OSError(errno.ENOSPC, "No space left")) == 7
    assert "disk is full" in capsys.readouterr().err


def test_bugs_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ZeroDivisionError):
        outcome(monkeypatch, ZeroDivisionError())


@pytest.mark.parametrize(
    "argv",
    [[], ["nonsense"], ["compile"], ["compile", "m", "o", "--length", "1"],
     ["compile", "m", "o", "--samples", "0"], ["eval", "x", "--windows", "0"]],
)  # fmt: skip
def test_wrong_usage_is_exit_code_2(argv: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_json(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--json" in text and "--verbose" in text and "--quiet" in text


def run_without(missing: tuple[str, ...], program: str) -> None:
    """Run `program` in a Python where importing any of `missing` fails."""
    head = f"import sys\nsys.modules.update(dict.fromkeys({missing!r}))\n"
    command = [sys.executable, "-c", head + program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_parser_needs_no_heavy_package() -> None:
    program = "from iq_export.cli import main, parser; parser(); sys.exit(main(['doctor']))"
    run_without((*EXTRAS, "onnxruntime", "tokenizers", "jinja2"), program)


def test_a_device_needs_no_extra_to_import_what_runs_evaluates_and_builds() -> None:
    modules = ("bundle.package", "run.ort", "run.generate", "evaluate.compare", "report.html",
               "calibrate.data", "engine.build", "engine.plugin")  # fmt: skip
    program = f"import importlib\nfor m in {modules!r}: importlib.import_module('iq_export.' + m)"
    run_without(EXTRAS, program)


def test_a_reader_that_stops_is_no_error() -> None:
    command = [sys.executable, "-m", "iq_export.cli", "doctor"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


@pytest.mark.parametrize("closing", ["1", "2", "0"])
def test_a_closed_stream_is_no_traceback(closing: str) -> None:
    """`iq-export ... 2>&-`, as a daemon may start it."""
    command = f"{sys.executable} -m iq_export.cli doctor {closing}>&-"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert ("Python" in done.stdout) == (closing != "1")


def test_what_the_terminal_cannot_write_is_escaped() -> None:
    program = "from iq_export import cli; cli._settle_streams(); print('é')"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert (done.stdout, done.returncode) == ("\\xe9\n", 0)
