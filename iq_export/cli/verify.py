"""`iq-export verify OUT`: every file as recorded, and the graph runs in a plain session."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

from iq_export.bundle.package import Bundle
from iq_export.cli import options
from iq_export.errors import GraphError

_TOKENS = 4


def add_parser(subparsers: Any) -> None:
    """Define the subcommand and its options."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "verify", help="check every file's checksum and run the graph once in ONNX Runtime"
    )
    parser.add_argument("bundle", metavar="OUT", type=Path, help="a compiled bundle")


def run(args: argparse.Namespace) -> int:
    """Check the files, then prefill and one decode step."""
    from iq_export.run.ort import CausalLM

    begin = time.perf_counter()
    progress = options.progress(args, 2)
    with progress.step("Check the files"):
        bundle = Bundle.open(args.bundle)
    with progress.step("Run the graph"):
        model = CausalLM(bundle.model)
        check_steps(model)
    files = bundle.manifest.files
    size = sum(record.bytes for record in files.values())
    report = {
        "bundle": bundle.folder,
        "files": len(files),
        "bytes": size,
        "layers": model.num_layers,
        "vocab_size": model.vocab_size,
        "seconds": time.perf_counter() - begin,
    }
    if args.json:
        options.print_json(report)
    else:
        print(
            f"{bundle.folder}: {len(files)} files ({options.size(size)}) as recorded; "
            "model.onnx loads in ONNX Runtime, prefill and decode give finite logits"
        )
    return 0


def check_steps(model: Any) -> None:
    """A prefill of a few tokens and one decode step. Raises GraphError if a logit is not finite."""
    ids = (np.arange(_TOKENS, dtype=np.int64) % model.embedding_rows)[None]
    positions = np.arange(_TOKENS, dtype=np.int64)[None]
    prefill = model.forward(ids, np.ones_like(ids), positions)
    mask = np.ones((1, _TOKENS + 1), np.int64)
    decode = model.forward(
        ids[:, -1:], mask, np.full((1, 1), _TOKENS, np.int64), past=prefill.present
    )
    for name, step in (("prefill", prefill), ("decode step", decode)):
        if not np.isfinite(step.logits).all():
            raise GraphError(f"the {name} gives NaN or infinite logits")
