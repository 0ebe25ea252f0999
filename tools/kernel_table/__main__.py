"""`python -m tools.kernel_table`: compile the plugin's kernels, count, and write what was found.

Writes docs/measured/kernels-sass.json and the tables of docs/kernels.md. It needs nvcc and
nvdisasm, and no GPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from iq_export.engine.plugin import find_nvcc
from iq_export.errors import EngineError, IqError, UsageError
from tools.kernel_table.build import command, compiled, find_nvdisasm, version_of
from tools.kernel_table.count import measured
from tools.kernel_table.table import write_tables

RECORD = Path("docs/measured/kernels-sass.json")
PAGE = Path("docs/kernels.md")
PLUGINS = Path("plugins")
ARCHITECTURES = (80, 86, 87, 90)


def tools() -> tuple[Path, Path]:
    """nvcc and nvdisasm. Raises EngineError where one is missing."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise EngineError("nvcc was not found, set CUDACXX or CUDA_HOME or put it on PATH.")
    nvdisasm = find_nvdisasm(nvcc)
    if nvdisasm is None:
        raise EngineError("nvdisasm was not found: pip install nvidia-cuda-nvdisasm.")
    return nvcc, nvdisasm


def figures_of(plugins: Path, architecture: int) -> tuple[dict[str, Any], dict[str, int]]:
    """The rows' figures by label, and the bytes that each spilling kernel spills."""
    kernels = compiled(plugins, architecture, *tools())
    spilled = {
        name: kernel.spilled or kernel.stack
        for name, kernel in sorted(kernels.items())
        if kernel.spilled or kernel.stack
    }
    return measured(kernels, plugins, architecture), spilled


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.kernel_table", description=__doc__)
    parser.add_argument("--before", metavar="COMMIT", help="write the figures before, of COMMIT")
    args = parser.parse_args(argv)
    try:
        if args.before is None:
            _write("after", PLUGINS, {})
        else:
            with tempfile.TemporaryDirectory(prefix="iq-before-") as folder:
                _unpack(args.before, Path(folder))
                _write("before", Path(folder) / PLUGINS, {"commit": args.before})
    except IqError as error:
        print(f"kernel_table: error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _unpack(commit: str, folder: Path) -> None:
    """The plugin's sources of a commit."""
    archive = folder / "plugins.tar"
    done = subprocess.run(
        ["git", "archive", "-o", str(archive), commit, "--", str(PLUGINS)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise UsageError(f"git has no plugins of '{commit}': {done.stderr.strip()}")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")


def _write(when: str, plugins: Path, about: dict[str, Any]) -> None:
    nvcc, nvdisasm = tools()
    made = {"nvcc": version_of(nvcc), "nvdisasm": version_of(nvdisasm), **about}
    made |= {"figures": {}, "spilled": {}}
    for architecture in ARCHITECTURES:
        print(f"sm_{architecture}", file=sys.stderr)
        figures, spilled = figures_of(plugins, architecture)
        made["figures"][str(architecture)] = figures
        made["spilled"][str(architecture)] = spilled
    record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.is_file() else {}
    record["command"] = " ".join(command("nvcc", "plugins", "sm_XX", "kernels.cubin"))
    record[when] = made
    RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    if {"before", "after"} <= record.keys():
        write_tables(record, PAGE)


if __name__ == "__main__":
    sys.exit(main())
