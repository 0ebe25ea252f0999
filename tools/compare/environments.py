"""Environments of the peers: one virtual environment each, built when it is first needed.

Their requirements clash (NumPy 1 and 2, three releases of onnx); the project needs none of them.
"""

from __future__ import annotations

import subprocess
import sys
import venv
from dataclasses import dataclass
from pathlib import Path

from iq_export.child import environment
from iq_export.errors import DataError
from iq_export.model.fetch import cache_dir

# name -> exact requirements. A CPU build of torch serves (see constraints.txt).
REQUIREMENTS = {
    "modelopt": ("nvidia-modelopt[onnx]==0.47.0", "torch==2.13.0"),
    "neural-compressor": (
        "neural-compressor==2.6", "six==1.17.0", "onnxruntime==1.31.0", "onnx==1.21.0",
    ),
    "text": ("rdata==1.1.0",),
}  # fmt: skip
_STAMP = "requirements.txt"


@dataclass(frozen=True)
class Environments:
    """`folder` holds one environment per name; `build` False uses only what is there."""

    folder: Path
    build: bool = True

    def python(self, name: str) -> Path:
        """The interpreter of an environment, built first if need be.

        Raises DataError if it is not there, or pip cannot install it.
        """
        root = self.folder / name
        python = root / "bin" / "python"
        wanted = "\n".join(REQUIREMENTS[name]) + "\n"
        stamp = root / _STAMP
        if stamp.is_file() and stamp.read_text(encoding="utf-8") == wanted:
            return python
        if not self.build:
            raise DataError(f"no environment {root} with {', '.join(REQUIREMENTS[name])}")
        print(f"installing {', '.join(REQUIREMENTS[name])} into {root}", file=sys.stderr)
        venv.create(root, with_pip=True, clear=True)
        command = [str(python), "-m", "pip", "install", "--quiet", *REQUIREMENTS[name]]
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, env=environment()
        )
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if "ERROR" in line]
            reason = errors[0] if errors else f"pip exited with {done.returncode}"
            raise DataError(f"cannot install {REQUIREMENTS[name][0]}: {reason}")
        stamp.write_text(wanted, encoding="utf-8")
        return python


def default_folder() -> Path:
    return cache_dir() / "peers"
