"""`iq-export run OUT --prompt "..."`: generate text with the bundle's graph and its KV cache."""

from __future__ import annotations

import argparse
import io
import math
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iq_export.bundle.package import Bundle, read_whole
from iq_export.cli import options
from iq_export.errors import DataError, UsageError
from iq_export.lengths import bundle_limit, generated
from iq_export.memory import memory_bytes
from iq_export.options import add, positive
from iq_export.terminal import printable

if TYPE_CHECKING:
    from iq_export.run.generate import Tokenizer


# Of the unpacked weights, in half and in float32, while they are made.
_COPIES = 2
_LONGEST_PROMPT = 16 << 20  # characters; no model has that many positions


def add_parser(subparsers: Any) -> None:
    """Define the subcommand and its options."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "run", help="generate text with a compiled bundle in ONNX Runtime"
    )
    parser.add_argument("bundle", metavar="OUT", type=Path, help="a compiled bundle")
    parser.add_argument("--prompt", required=True, help="what the user says; '-' reads stdin")
    parser.add_argument("--system", default=None, help="a system message before the prompt")
    parser.add_argument(
        "--raw", action="store_true", help="continue the prompt as it is, without chat template"
    )
    parser.add_argument(
        "--max-new-tokens", type=positive, default=128, metavar="N", help="(default 128)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)"
    )
    parser.add_argument("--top-p", type=float, default=1.0, help="nucleus sampling (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default 0)")
    add(parser, "device")


def run(args: argparse.Namespace) -> int:
    """Stream the answer to stdout; with `--json` one document at the end instead."""
    from iq_export.graph.vocabulary import Vocabulary
    from iq_export.run.generate import Tokenizer, generate
    from iq_export.run.ort import CausalLM

    _check(args)
    prompts: list[str] = []  # standard input can be read once

    def load(bundle: Bundle) -> tuple[Tokenizer, list[int], int, list[str], CausalLM]:
        options.require_text(bundle, "run continues a prompt")
        tokenizer = Tokenizer(bundle.folder)
        if not prompts:
            prompts.append(_stdin() if args.prompt == "-" else _utf8(args.prompt, "prompt"))
        ids = _prompt_ids(args, prompts[0], tokenizer)
        room, remarks = generated(
            len(ids), args.max_new_tokens, bundle_limit(bundle.folder, bundle.model)
        )
        model = CausalLM(
            bundle.model, providers=options.providers(args.device),
            unpack=_unpack(bundle.model, args),
        )  # fmt: skip
        return tokenizer, ids, room, remarks, model

    tokenizer, ids, room, remarks, model = read_whole(args.bundle, load)
    for remark in remarks:
        options.progress(args).note(remark)
    Vocabulary(model.embedding_rows).check(ids, tokenizer, "the prompt")
    tokens = generate(
        model,
        ids,
        max_new_tokens=room,
        eos_ids=tokenizer.eos_ids,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
    )
    new_ids: list[int] = []
    pieces: list[str] = []
    begin = time.perf_counter()
    for piece in tokenizer.stream(_noting(tokens, new_ids)):
        pieces.append(piece)
        if not args.json:
            options.write_stdout(printable(piece) if sys.stdout.isatty() else piece)
    seconds = time.perf_counter() - begin
    if args.json:
        options.print_json(
            {
                "text": "".join(pieces),
                "prompt_tokens": len(ids),
                "new_tokens": len(new_ids),
                "ids": new_ids,
                "seconds": seconds,
                "finished": len(new_ids) < room,
            }
        )
    else:
        options.write_stdout("\n")
        if not args.quiet:
            rate = len(new_ids) / max(seconds, 1e-9)
            print(f"{len(new_ids)} tokens, {rate:.1f} tokens/s", file=sys.stderr)
    return 0


def _check(args: argparse.Namespace) -> None:
    if not 0 <= args.temperature < math.inf:
        raise UsageError(
            f"--temperature must be a finite number of at least 0, and {args.temperature} is not."
        )
    if args.seed < 0:
        raise UsageError(f"--seed must not be negative, and {args.seed} is.")
    if not 0 < args.top_p <= 1:
        raise UsageError(f"--top-p must be above 0 and at most 1, and {args.top_p} is not.")
    if args.raw and args.system is not None:
        raise UsageError("--system needs the chat template, which --raw leaves out.")


def _prompt_ids(args: argparse.Namespace, prompt: str, tokenizer: Tokenizer) -> list[int]:
    if args.raw:
        return tokenizer.encode(prompt, add_bos=None)
    messages = [{"role": "user", "content": prompt}]
    if args.system is not None:
        messages.insert(0, {"role": "system", "content": _utf8(args.system, "system message")})
    return tokenizer.encode(tokenizer.apply_chat_template(messages), add_bos=False)


def _utf8(argument: str, name: str) -> str:
    """An argument as its bytes in UTF-8 say, whatever the locale's encoding made of them."""
    try:
        argument.encode("utf-8")
        return argument
    except UnicodeEncodeError:  # bytes that the locale does not know came as half characters
        pass
    try:
        return os.fsencode(argument).decode("utf-8")
    except UnicodeError as error:
        raise DataError(f"The {name} is not UTF-8 text.") from error


def _unpack(model: Path, args: argparse.Namespace) -> bool:
    """Whether int8 weights are unpacked once; what is done, or why it is slow, is said."""
    from iq_export.run.ort import unpacked_bytes

    size = _COPIES * unpacked_bytes(model) if args.device == "cpu" else 0
    if size == 0:
        return False
    fits = size < (memory_bytes() or math.inf)
    options.progress(args).note(
        "note: ONNX Runtime on a CPU unpacks int8 weights in every step; "
        + (
            f"they are unpacked once instead, which takes {options.size(size)} of memory"
            if fits
            else f"hence it is slow; unpacking them once would take {options.size(size)} of memory"
        )
    )
    return fits


def _stdin() -> str:
    """What stands on stdin. Raises DataError if it is closed, unreadable or not UTF-8."""
    if sys.stdin is None:
        raise DataError("--prompt - reads stdin, and stdin is closed: give the prompt itself.")
    try:
        if isinstance(sys.stdin, io.TextIOWrapper):  # whatever the locale says
            sys.stdin.reconfigure(encoding="utf-8", errors="strict")
        prompt = sys.stdin.read(_LONGEST_PROMPT + 1)
    except UnicodeDecodeError as error:
        raise DataError(f"The prompt on stdin is not UTF-8 (byte {error.start}).") from error
    except (OSError, ValueError) as error:
        raise DataError(f"The prompt cannot be read from stdin: {error}.") from error
    if len(prompt) > _LONGEST_PROMPT:
        raise DataError(f"The prompt on stdin has more than {_LONGEST_PROMPT} characters.")
    return prompt


def _noting(tokens: Any, into: list[int]) -> Any:
    """Pass tokens on and keep a copy."""
    for token in tokens:
        into.append(token)
        yield token
