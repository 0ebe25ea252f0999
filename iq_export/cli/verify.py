"""`iq-export verify OUT`: every file as recorded, and the graph computes, before quantizers too."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np

from iq_export.bundle.package import Bundle, read_whole
from iq_export.cli import options
from iq_export.errors import DataError, GraphError

_TOKENS = 4
# Of the text on which values are looked at: what overflows does so within the first tokens.
_TEXT_TOKENS = 64


def add_parser(subparsers: Any) -> None:
    """Define the subcommand and its options."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "verify",
        help="check every file's checksum, run the graph in ONNX Runtime and look for NaN in front "
        "of its quantizers",
    )
    parser.add_argument("bundle", metavar="OUT", type=Path, help="a compiled bundle")
    parser.add_argument(
        "--key", type=Path, metavar="FILE",
        help="refuse a bundle that the owner of this Ed25519 public key (PEM) did not sign",
    )  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Check the files, then prefill and one decode step."""
    from iq_export.run.ort import CausalLM

    begin = time.perf_counter()
    progress = options.progress(args, 1)

    def examine(bundle: Bundle) -> tuple[Bundle, int, int, int]:
        if not options.generates_text(bundle):
            return bundle, 0, 0, check_whole(bundle)
        model = CausalLM(bundle.model)
        check_steps(model)
        layers, vocab_size, rows = model.num_layers, model.vocab_size, model.embedding_rows
        del model
        tensors = check_values(bundle, rows)
        return bundle, layers, vocab_size, tensors

    with progress.step("Check the files, run the graph, look for NaN"):
        bundle, layers, vocab_size, tensors = read_whole(args.bundle, examine, key=args.key)
    files = bundle.manifest.files
    size = sum(record.bytes for record in files.values())
    report = {
        "bundle": bundle.folder,
        "signed": args.key is not None,
        "files": len(files),
        "bytes": size,
        "layers": layers,
        "vocab_size": vocab_size,
        "finite_tensors": tensors,
        "seconds": time.perf_counter() - begin,
    }
    rounded = "" if bundle.manifest.dtype == "fp32" else ", rounded to half as hardware does"
    if args.json:
        options.print_json(report)
    else:
        signed = "" if args.key is None else f"signed by the owner of {args.key}; "
        ran = (
            f"prefill and decode give finite logits; on {_TEXT_TOKENS} tokens of text {tensors} "
            "tensors are finite too"
        )
        if not layers:
            ran = f"on a random input {tensors} tensors are finite"
        options.say(
            f"{bundle.folder}: {signed}{len(files)} files ({options.size(size)}) as recorded; "
            f"model.onnx loads in ONNX Runtime, {ran}, in front of quantizers, in attention and in "
            f"the residual stream{rounded}"
        )
    return 0


def check_values(bundle: Bundle, rows: int) -> int:
    """How many tensors were looked at on the beginning of a text; GraphError names a broken one.

    Logits alone prove nothing: int8 codes of NaN are finite.
    """
    from iq_export.evaluate.final_check import finite_values

    return finite_values(bundle.model, _ids(bundle.folder, rows))


def check_whole(bundle: Bundle) -> int:
    """As `check_values`, of a model without a cache, on a random input."""
    from iq_export.evaluate.final_check import finite_on
    from iq_export.graph.interface import Interface, random_windows
    from iq_export.graph.vocabulary import read_vocabulary
    from iq_export.observe.samples import Whole

    graph = bundle.manifest.graph
    interface = Interface.of_tensors(graph.inputs, graph.outputs)
    rows = read_vocabulary(bundle.model).rows or 1
    (window,) = random_windows(interface, rows, count=1)
    return finite_on(bundle.model, Whole(window, 1))


def _ids(folder: Path, rows: int) -> list[int]:
    """Tokens of the built-in text behind a BOS; of a Python without that text, any."""
    from iq_export.observe.samples import load_text
    from iq_export.run.generate import Tokenizer

    try:
        text = load_text("builtin")[: 16 * _TEXT_TOKENS]
    except DataError:
        return (np.arange(_TEXT_TOKENS) % rows).tolist()
    tokenizer = Tokenizer(folder)
    return tokenizer.encode(text, add_bos=tokenizer.bos_id is not None)[:_TEXT_TOKENS]


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
