"""Evidence from a GPU, in two steps: collect here, run there.

    python -m tools.gpu_check pack --out FOLDER [--bundle FP16 --bundle W8A8] [--part-mib 60]
    cd FOLDER && python -m tools.gpu_check run . --json OUT.json

See docs/gpu-check.md. `run` needs a GPU, torch, nvcc and CMake, and no network; without a GPU it
exits with 77.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from iq_export.errors import IqError, UsageError


def main(arguments: list[str] | None = None) -> int:
    """Do what is asked for and return an exit code."""
    options = _parser().parse_args(arguments)
    try:
        result: int = options.action(options)
        return result
    except IqError as error:
        print(f"gpu_check: error: {error}", file=sys.stderr)
        return error.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_check", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(required=True)
    pack = commands.add_parser("pack", help="collect everything in one folder")
    pack.set_defaults(action=_pack)
    pack.add_argument("--out", type=Path, required=True, help="folder; must not exist")
    pack.add_argument("--bundle", type=Path, action="append", default=[], metavar="BUNDLE",
        help="one of recipe fp16 and one quantized; SmolLM2 is compiled if not given")  # fmt: skip
    pack.add_argument("--target", default="rtx-all", help="of the plans (default rtx-all)")
    pack.add_argument("--python", default="3.12", help="of the other machine (default 3.12)")
    pack.add_argument("--no-plans", action="store_true",
        help="leave out the plans (700 MB of 1.2 GB): they are built there only")  # fmt: skip
    pack.add_argument("--kernels", action="store_true",
        help="the kernels only, 3 MB: no bundle, no engine, no TensorRT")  # fmt: skip
    pack.add_argument(
        "--part-mib", type=int, help="write OUT.parts, in files of that size, as well"
    )
    run = commands.add_parser("run", help="do every step on the machine with the GPU")
    run.set_defaults(action=_run)
    run.add_argument("folder", type=Path, help="what `pack` made")
    run.add_argument("--json", type=Path, required=True, help="results, written after every step")
    run.add_argument("--work", type=Path, help="builds and layer lists (default: JSON.work)")
    note = commands.add_parser("note", help="put a result's verdict into a bundle's manifest")
    note.set_defaults(action=_note)
    note.add_argument("result", type=Path, help="JSON of `run`")
    note.add_argument("bundle", type=Path)
    return parser


def _pack(options: argparse.Namespace) -> int:
    from tools.gpu_check.pack import Options, pack
    from tools.gpu_check.parts import split

    if options.part_mib is not None and options.part_mib < 1:
        raise UsageError("--part-mib must be at least 1.")
    folder = pack(
        Options(options.out.absolute(), options.bundle, options.target, options.python,
                plans=not options.no_plans, engines=not options.kernels)
    )  # fmt: skip
    print(folder)
    if options.part_mib is not None:
        parts = split(folder, folder.with_name(f"{folder.name}.parts"), options.part_mib << 20)
        print(f"{len(parts)} parts in {parts[0].parent}")
    return 0


def _run(options: argparse.Namespace) -> int:
    from tools.gpu_check.run import run

    out = options.json.absolute()
    return run(options.folder, out, options.work or out.with_name(f"{out.name}.work"))


def _note(options: argparse.Namespace) -> int:
    from iq_export.bundle.package import Bundle, update_manifest

    data = json.loads(options.result.read_text(encoding="utf-8"))
    device = data["steps"]["device"]["result"]["name"]
    bundle = Bundle.open(options.bundle)
    said = f"gpu_check on {device}: {data['verdict'][-1]}"
    update_manifest(bundle, notes=[*bundle.manifest.notes, said])
    return 0


if __name__ == "__main__":
    sys.exit(main())
