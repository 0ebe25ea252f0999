"""Exit codes, messages and what the command imports."""

from __future__ import annotations

import argparse
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from iq_export import cli
from iq_export.errors import BundleError, DataError, EngineError, GraphError, IqError, ModelError

COMMANDS = ("analyze", "compile", "inspect", "eval", "run", "build", "verify", "package", "doctor")
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
    modules = ("bundle.package", "bundle.recipe", "run.ort", "run.generate", "evaluate.compare",
               "report.html", "observe.samples", "engine.build", "engine.plugin")  # fmt: skip
    program = f"import importlib\nfor m in {modules!r}: importlib.import_module('iq_export.' + m)"
    run_without(EXTRAS, program)


def test_a_reader_that_stops_is_no_error() -> None:
    command = [sys.executable, "-m", "iq_export.cli", "doctor"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_an_error_that_nobody_reads_keeps_its_code(tmp_path: Path) -> None:
    """`iq-export inspect OUT 2>&1 | true`."""
    command = [sys.executable, "-m", "iq_export.cli", "inspect", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        process.stdout.close()
    assert process.returncode == 7


_WORK = """
import os, sys
import iq_export.cli.doctor
from iq_export import cli
from iq_export.cli import options
from iq_export.progress import Progress

def work(args):
    with Progress(1).step("Work"):
        print("a library says so", file=sys.stderr)
        open(path, "w").write("done")
    options.say("words " * 5000)
    options.print_json({})
    return 5

path = sys.argv[1]
sys.argv = ["iq-export", "doctor"]
iq_export.cli.doctor.run = work
cli.entry()
"""


@pytest.mark.parametrize("where", ["2>&1 | true", "2>&1 >/dev/full | true", ">&- 2>&- <&-"])
def test_the_work_is_done_though_nobody_reads_of_it(tmp_path: Path, where: str) -> None:
    """A progress line, a library's warning and the result meet a closed pipe: exit code and output
    are those of the work."""
    command = f'"$0" -c "$1" "$2" {where}; echo ${{PIPESTATUS[0]}} >"$2.code"'
    subprocess.run(
        ["bash", "-c", command, sys.executable, _WORK, str(tmp_path / "out")], check=True
    )
    assert (tmp_path / "out").read_text() == "done"
    expected = "7" if "full" in where else "5"
    assert (tmp_path / "out.code").read_text().strip() == expected


def test_no_file_gets_the_number_of_a_closed_stream() -> None:
    program = "import os; from iq_export import cli; cli._settle_streams(); "
    program += "os._exit(os.open('/dev/null', os.O_RDONLY) > 2)"
    command = f'{sys.executable} -c "{program}" >&- 2>&- <&-'
    assert subprocess.run(["sh", "-c", command], check=False).returncode == 1


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


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/x/y"), 7, "/x/y: Permission denied"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "xx"), 2, "give another name"),
        (OSError(errno.ELOOP, "Too many levels of symbolic links", "x"), 2, "Too many levels"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "x"), 7, "x: Is a directory"),
        (MemoryError(), 1, "out of memory"),
        (OSError("1048576 requested and 4096 written"), 7, "the disk is full, or a file"),
        (RuntimeError("Could not determine home directory."), 7, "set HOME, or IQ_EXPORT_CACHE"),
        (BundleError("\x1b[2Jname " + "x" * 9000), 7, "\\x1b[2Jname"),
    ],
)
def test_what_no_command_expected_is_a_sentence(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    code: int,
    says: str,
) -> None:
    assert outcome(monkeypatch, error) == code
    printed = capsys.readouterr().err
    assert printed.startswith("iq-export: error: ") and says in printed
    assert len(printed) < 1000 and "\x1b" not in printed


@pytest.mark.parametrize(("flags", "traces"), [((), False), (("-v",), True)])
def test_the_script_says_a_bug_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: tuple[str, ...],
    traces: bool,
) -> None:
    monkeypatch.setattr("iq_export.cli._settle_streams", lambda: None)
    monkeypatch.setattr(sys, "argv", ["iq-export", "doctor", *flags])
    monkeypatch.setattr("iq_export.cli.doctor.run", lambda args: {}["x"])
    monkeypatch.setattr("iq_export.interrupt.install", lambda: None)
    monkeypatch.setattr("iq_export.interrupt.ignore", lambda: None)
    with pytest.raises(SystemExit) as stop:
        cli.entry()
    assert stop.value.code == 1
    printed = capsys.readouterr().err
    assert "iq-export: error: unexpected KeyError: 'x'" in printed
    assert ("Traceback" in printed) is traces and ("-v" in printed) is not traces


@pytest.mark.parametrize(
    "argv",
    [["inspect", "caf\udce9"], ["compile", "\udcff", "out"],
     ["compile", "m", "o", "--work", "\udcff"], ["compile", "m", "o", "--target", "\udcff"]],
)  # fmt: skip
def test_names_that_are_not_utf8(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 2
    assert "is not UTF-8" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["x" * 70_000, "9" * 5000, "\x1b[31m"])
def test_usage_repeats_an_argument_only_in_part(
    word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for argv in ([word], ["doctor", word], ["compile", "m", "o", "--samples", word]):
        with pytest.raises(SystemExit):
            cli.main(argv)
        printed = capsys.readouterr().err
        assert "\x1b" not in printed
        assert len(printed[printed.index(": error: ") :]) < 1000


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_stdout_that_is_full() -> None:
    command = [sys.executable, "-m", "iq_export.cli", "doctor"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=False, text=True)
    assert done.returncode == 7
    (line,) = done.stderr.splitlines()
    assert line.startswith("iq-export: error: ")
