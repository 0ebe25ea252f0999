"""`python -m tools.families`: compile a tiny model of every causal-LM type of transformers.

Writes docs/measured/families.json, a row as soon as it is known; what stands there is not made
again unless it is asked for by `--only`. Writes docs/families.md from it.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import sys
from functools import partial
from pathlib import Path

from tools.families.judge import apart, judge
from tools.families.record import Record
from tools.families.table import write_page
from tools.families.tiny import causal_lms

RECORD = Path("docs/measured/families.json")
PAGE = Path("docs/families.md")
# What a compile imports in its functions: seconds in each fork, if it is not here already.
_IMPORTED = (
    "torch.onnx", "torch.export", "transformers.models.auto.modeling_auto",
    "transformers.modeling_utils", "onnxscript.rewriter.onnx_fusions", "onnxscript.optimizer",
    "onnxruntime", "iq_export.model.trace", "iq_export.model.export", "iq_export.model.replicate",
    "iq_export.pipeline", "iq_export.model.support",
)  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.families", description=__doc__)
    parser.add_argument("--only", nargs="+", metavar="TYPE", help="these types, made anew")
    parser.add_argument("--json", type=Path, default=RECORD)
    parser.add_argument("--table", type=Path, default=PAGE)
    parser.add_argument("--seconds", type=float, default=600, help="for one type")
    parser.add_argument("--gigabytes", type=float, default=10, help="for one type")
    args = parser.parse_args(argv)
    record, known = Record.read(args.json), causal_lms()
    unknown = sorted(set(args.only or ()) - set(known))
    if unknown:
        parser.error(f"no causal-LM type of transformers: {', '.join(unknown)}")
    waiting = args.only or [kind for kind in known if kind not in record.rows]
    for name in _IMPORTED:
        importlib.import_module(name)
    gc.freeze()  # else the first collection in each fork copies all that is imported
    for kind in waiting:
        row = apart(partial(judge, kind), seconds=args.seconds, memory=int(args.gigabytes * 2**30))
        record.rows[kind] = row
        record.write(args.json)
        print(f"{kind}: {row['outcome']} ({row.get('reason', '')})", file=sys.stderr, flush=True)
    write_page(record, args.table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
