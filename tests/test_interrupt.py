"""Signals end a run with 130 whatever a library makes of the KeyboardInterrupt."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from iq_export import interrupt
from iq_export.errors import ModelError
from iq_export.progress import Progress

# A command whose library swallows the interrupt; `{what}` is what becomes of it.
_SWALLOWING = """
import argparse, os, signal, sys, time
from iq_export import cli
from iq_export.errors import ModelError
from iq_export.progress import Progress

def library(args):
    progress = Progress(3, quiet=True)
    with progress.step("Trace"):
        try:
            # A text, as torch makes functions: an interrupt that passes through it counts for
            # CPython as one that nothing caught.
            exec("os.kill(os.getpid(), signal.{name}); time.sleep(10)")
        except:
            {what}
    print("it went on")
    return 0

import iq_export.cli.doctor
iq_export.cli.doctor.run = library
sys.argv = ["iq-export", "doctor"]
cli.entry()
"""


@pytest.mark.parametrize("name", interrupt.SIGNALS)
@pytest.mark.parametrize(
    "what",
    ["pass", "raise", "raise ModelError('cannot be traced')"],
)
def test_a_swallowed_signal_still_ends_the_run(tmp_path: Path, name: str, what: str) -> None:
    (tmp_path / "swallowing.py").write_text(_SWALLOWING.format(name=name, what=what))
    paths = [str(tmp_path), str(Path(interrupt.__file__).parents[1])]
    done = subprocess.run(
        [sys.executable, "-m", "swallowing"], env={**os.environ, "PYTHONPATH": ":".join(paths)},
        capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr.strip() == "iq-export: interrupted"


def test_steps_and_bars_raise_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    progress = Progress(quiet=True)
    with pytest.raises(KeyboardInterrupt), progress.step("Trace"):
        monkeypatch.setattr(interrupt._Arrival, "at", time.monotonic())
    assert progress.timings == {}
    with pytest.raises(KeyboardInterrupt):
        progress.update(1, 2)
    with pytest.raises(KeyboardInterrupt), interrupt.never_swallowed():
        raise ModelError("what a library made of it")


def test_an_error_without_a_signal_is_passed_on() -> None:
    with pytest.raises(ModelError), interrupt.never_swallowed():
        raise ModelError("x")


_STUBBORN = """
import time
from iq_export import interrupt
interrupt.install()
said = False
while True:
    try:
        if not said:  # only here is a signal caught
            said = True
            print("ready", flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        print("swallowed", flush=True)
"""


def test_a_second_ctrl_c_forces_but_not_one_of_the_same_moment() -> None:
    command = [sys.executable, "-c", _STUBBORN]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGHUP)
        assert process.stdout.readline() == "swallowed\n"
        process.send_signal(signal.SIGTERM)
        time.sleep(1.1)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        assert "stopped at once" in process.stderr.read()


def test_nohup_is_respected() -> None:
    program = "from iq_export import interrupt as i, cli; i.install(); import os, signal; "
    program += "os.kill(os.getpid(), signal.SIGHUP); print('alive')"
    command = f"trap '' HUP; exec {sys.executable} -c \"{program}\""
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "alive\n")


def test_handlers_stand_before_anything_heavy_is_imported() -> None:
    program = "import sys, iq_export.cli; print([m for m in ('numpy', 'onnx') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.stdout == "[]\n"


@pytest.mark.heavy
@pytest.mark.parametrize("name", interrupt.SIGNALS)
@pytest.mark.parametrize("seconds", [0.5, 1.5, 2.5, 3.5, 5.0, 7.0])
def test_a_real_compile_at_any_moment(
    tiny_model: Path, tmp_path: Path, name: str, seconds: float
) -> None:
    command = [sys.executable, "-m", "iq_export.cli", "compile", str(tiny_model),
               str(tmp_path / "out"), "--recipe", "fp16", "--target", "h100", "--insertion", "norm",
               "--samples", "2", "--length", "32"]  # fmt: skip
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        time.sleep(seconds)
        os.kill(process.pid, getattr(signal, name))
        assert process.stderr is not None
        error = process.stderr.read()
    left = [path.name for path in tmp_path.iterdir()]
    assert (process.returncode, left) in ((130, []), (0, ["out"])), error
    assert "Traceback" not in error
