"""The same seed and inputs give the same bytes, in other folders and other processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

# Everything that ships but the engine, from a planted model with two births.
SCRIPT = """
import json, sys
from pathlib import Path
from iq_export.bundle.manifest import json_safe
from iq_export.plan import plan_record
from iq_export.progress import Progress
from iq_export.recipe import load_recipe
from iq_export.pipeline import Calibration, rewrite
from iq_export.saved_decisions import save_arrays
from tests import planted

class Words:
    def decode(self, ids):
        return " ".join(map(str, ids))

folder = Path(sys.argv[1])
decoder = planted.TWO_BIRTHS
traced = planted.save(decoder, folder)
(folder / "work").mkdir()
data = planted.windows(decoder, count=12)
calibration = Calibration(data[:4], data[4:8], 0.1, 0, planted.CPU, heldout=data[8:])
done = rewrite(
    traced, folder / "work", load_recipe(sys.argv[2]), "fp16", calibration, Progress(quiet=True)
)
save_arrays(done.chosen, folder / "sinks.safetensors")
(folder / "plan.json").write_text(json.dumps(json_safe(plan_record(done, Words())), indent=1))
"""


@pytest.mark.parametrize("recipe", ["w8a8", "w4a16"])
def test_same_bytes_in_another_process_and_folder(tmp_path: Path, recipe: str) -> None:
    """Sets are ordered by the hash seed of a process, folders by their names."""
    made = []
    for seed in ("1", "2"):
        folder = tmp_path / f"run{seed}" / ("deeper" * int(seed))
        folder.mkdir(parents=True)
        root = Path(__file__).resolve().parents[1]
        paths = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": paths}
        command = [sys.executable, "-c", SCRIPT, str(folder), recipe]
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        made.append(folder)
    files = ("plan.json", "sinks.safetensors", "work/model.onnx", "work/model.onnx.data")
    for name in files:
        first, second = ((folder / name).read_bytes() for folder in made)
        assert first == second, f"{name} differs"
    assert str(tmp_path) not in (made[0] / "plan.json").read_text()
