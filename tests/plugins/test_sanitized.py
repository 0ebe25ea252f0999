"""The plugin on a CPU under ASan and UBSan, with a TensorRT and a CUDA that are fakes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# What libiq_host_test.so is called with, in a process where it finds its sanitizer: every size of
# rest, every path, memory of exactly the tensors' size.
_CALLS = """
import ctypes, sys
import numpy as np
from tests.plugins.calls import DTYPES, Rows
library = ctypes.CDLL(sys.argv[1])
rng = np.random.default_rng(0)
for dtype in DTYPES.values():
    for hidden in (1, 7, 8, 24, 64, 100, 512, 1024):
        for shift in (0, 1):
            rows = Rows(library, 3, shift)
            x, y = (rng.standard_normal((2, 5, hidden)).astype(dtype) for _ in range(2))
            table = rng.standard_normal((2, hidden)).astype(np.float32)
            index = np.array([0, 2, 1, 0, 7], np.int32)
            no = np.zeros(5, bool)
            rows.detect(x[0], no, ~no, table, 1.0)
            for restore in (False, True):
                rows.change(x[0], index, table, restore)
            for bias in (None, y[0, 1]):
                rows.add_norm(x[0], x[1], y[0, 0], bias, index, table, 1e-6, 0.1)
                rows.add_norm(x[0], x[1], y[0, 0], bias, None, None, 1e-6, 0.1)
            block = next(b for b in (512, 64, 8, 4, 1) if hidden % b == 0)
            channels = np.array([hidden - 1], np.int32)
            x[0, 0, 0], x[0, 0, -1] = np.inf, np.nan
            rows.silu_mul(x[0], x[1], index, channels, block, 0.5, 0.1)
            rows.silu_mul(x[0], x[1], None, None, block, 0.5, 0.1)
print("done")
"""


def _run(command: list[str], **environment: str) -> str:
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return done.stdout


def test_refusals_resources_and_threads(sanitized: Path) -> None:
    assert _run([str(sanitized / "iq_plugin_test")]).splitlines()[-1] == "0 failures"


@pytest.mark.parametrize("seed", [1, 2])
def test_creators_survive_malformed_fields(sanitized: Path, seed: int) -> None:
    words = _run([str(sanitized / "iq_fuzz_creators"), "20000", str(seed)])
    found = re.fullmatch(r"20000 runs, (\d+) plugins\n", words)
    assert found is not None
    assert int(found[1]) > 100, "next to no fields were good: the fuzzer tests too little"


def test_rows_stay_in_their_memory(sanitized: Path) -> None:
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("g++ is missing: its sanitizer's library is not found")
    runtime = _run([compiler, "-print-file-name=libasan.so"]).strip()
    command = [sys.executable, "-c", _CALLS, str(sanitized / "libiq_host_test.so")]
    # Python itself leaks at its end; what the library leaks is seen by iq_plugin_test.
    environment = {"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0"}
    root = Path(__file__).resolve().parents[2]
    paths = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    assert _run(command, PYTHONPATH=paths, **environment) == "done\n"
