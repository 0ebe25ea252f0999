"""What a compile costs: seconds and peak memory, by the number of blocks of one shape.

    python -m tools.cost --hidden 1024 --blocks 4 8 16 --json cost.json
    python -m tools.cost --shape llama-2-7b --blocks 8 --recipe w8a8 --json cost.json

Writes a Llama-shaped model of random bfloat16 weights in sharded safetensors, a block in memory per
core, with one spike planted (the first token's, born in block 1), and compiles it up to and with
`model.onnx`. Memory is that of the whole process tree, sampled ten times a second from /proc;
disk is what lies beyond the source, sampled every two seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

SAMPLES, LENGTH = 4, 128
_LOOKS_PER_SIZE = 20
_CHANNEL, _MARK, _NEURON = 5, 3, 11  # of the spike, of the first token, of the MLP that writes it


@dataclass(frozen=True)
class Shape:
    """Of a Llama: sizes per block, and the vocabulary."""

    hidden: int
    features: int
    heads: int
    kv_heads: int
    vocabulary: int


SHAPES = {"llama-2-7b": Shape(4096, 11008, 32, 32, 32000)}


def write_model(folder: Path, shape: Shape, blocks: int, seed: int = 0) -> int:
    """Write the model; returns the bytes of its weights."""
    folder.mkdir(parents=True)
    _write_tokenizer(folder)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16",
        "hidden_size": shape.hidden, "intermediate_size": shape.features, "rms_norm_eps": 1e-5,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads,
        "num_hidden_layers": blocks, "vocab_size": shape.vocabulary, "hidden_act": "silu",
        "max_position_embeddings": 4096, "rope_theta": 10000.0, "bos_token_id": 0,
        "eos_token_id": 1, "tie_word_embeddings": False,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    where: dict[str, str] = {}
    total = 0
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        jobs = [
            pool.submit(_write_shard, folder, f"model-{number + 1:05d}-of-{blocks + 1:05d}", shape,
                        number, seed)
            for number in range(blocks + 1)
        ]  # fmt: skip
        for job in jobs:
            name, names, size = job.result()
            where |= dict.fromkeys(names, name)
            total += size
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return total


def _write_shard(
    folder: Path, stem: str, shape: Shape, number: int, seed: int
) -> tuple[str, list[str], int]:
    """Write what is outside of the blocks (number 0) or a block; its file, tensors and bytes."""
    from safetensors.numpy import save_file

    rng = np.random.default_rng([seed, number])
    found = _block(shape, number - 1, rng) if number else _outside(shape, rng)
    stored = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in found.items()}
    save_file(stored, folder / f"{stem}.safetensors")
    return f"{stem}.safetensors", list(stored), sum(tensor.nbytes for tensor in stored.values())


def _weight(rng: np.random.Generator, out: int, into: int) -> np.ndarray:
    return rng.standard_normal((out, into), np.float32) * np.float32(into**-0.5)


def _outside(shape: Shape, rng: np.random.Generator) -> dict[str, np.ndarray]:
    table = rng.standard_normal((shape.vocabulary, shape.hidden), np.float32)
    table[:, _MARK] = 0
    table[0, _MARK] = 30  # only the first token has it
    return {
        "model.embed_tokens.weight": table,
        "lm_head.weight": _weight(rng, shape.vocabulary, shape.hidden),
        "model.norm.weight": np.ones(shape.hidden, np.float32),
    }


def _block(shape: Shape, block: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
    width, ones = shape.hidden, np.ones(shape.hidden, np.float32)
    narrow, at = width * shape.kv_heads // shape.heads, f"model.layers.{block}"
    gate, up = _weight(rng, shape.features, width), _weight(rng, shape.features, width)
    down = _weight(rng, width, shape.features) / 4
    if block == 1:
        gate[_NEURON], up[_NEURON] = 0, 0
        gate[_NEURON, _MARK], up[_NEURON, _MARK] = 2, 2
        down[:, _NEURON] = 0
        down[_CHANNEL, _NEURON] = 4
    return {
        f"{at}.input_layernorm.weight": ones,
        f"{at}.post_attention_layernorm.weight": ones,
        f"{at}.self_attn.q_proj.weight": _weight(rng, width, width),
        f"{at}.self_attn.k_proj.weight": _weight(rng, narrow, width),
        f"{at}.self_attn.v_proj.weight": _weight(rng, narrow, width),
        f"{at}.self_attn.o_proj.weight": _weight(rng, width, width) / 4,
        f"{at}.mlp.gate_proj.weight": gate,
        f"{at}.mlp.up_proj.weight": up,
        f"{at}.mlp.down_proj.weight": down,
    }


def small_tokenizer() -> Any:
    """A byte-level BPE of 512 tokens, trained on the built-in text: 0 begins a text, 1 ends it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from iq_export.observe.samples import load_text

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([load_text("builtin")], trainer)
    return core


def _write_tokenizer(folder: Path) -> None:
    small_tokenizer().save(str(folder / "tokenizer.json"))
    names = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(names), encoding="utf-8")


def measured(command: list[str], *folders: Path) -> dict[str, Any]:
    """Run `command`; its seconds, those of the processors, the peak memory of its process tree and
    the most that it had in `folders`, in bytes."""
    begin, memory, disk, looks = time.perf_counter(), 0, 0, 0
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with subprocess.Popen(command) as process:
        while process.poll() is None:
            memory = max(memory, sum(_resident(pid) for pid in _tree(process.pid)))
            if looks % _LOOKS_PER_SIZE == 0:
                disk = max(disk, sum(_size(folder) for folder in folders))
            looks += 1
            time.sleep(0.1)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "exit_code": process.returncode,
        "seconds": round(time.perf_counter() - begin, 1),
        "cpu_seconds": round(
            after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime, 1
        ),
        "peak_rss_bytes": memory,
        "peak_disk_bytes": disk,
    }


def _size(folder: Path) -> int:
    """What the files below `folder` take, in bytes."""
    total = 0
    for here, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):  # one that goes meanwhile
                total += os.lstat(os.path.join(here, name)).st_blocks * 512
    return total


def _tree(pid: int) -> Iterator[int]:
    yield pid
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return
    for child in children:
        yield from _tree(int(child))


def _resident(pid: int) -> int:
    try:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    except (OSError, IndexError):
        return 0
    return pages * resource.getpagesize()


def _row(folder: Path, shape: Shape, blocks: int, args: argparse.Namespace) -> dict[str, Any]:
    size = write_model(folder / "model", shape, blocks)
    bundle, work = folder / "out" / "bundle", folder / "work"
    command = [
        sys.executable, "-m", "iq_export.cli", "compile", str(folder / "model"), str(bundle),
        "--recipe", args.recipe, "--target", "orin", "--insertion", "norm",
        "--samples", str(SAMPLES), "--length", str(LENGTH), "--work", str(work),
    ]  # fmt: skip
    row = {
        "blocks": blocks, "weight_bytes": size, **measured(command, bundle.parent, work),
    }  # fmt: skip
    if row["exit_code"] == 0:
        manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
        row["steps"] = manifest["timings"]
        (graph,) = manifest["graphs"]
        row["lifecycles"] = [
            [life["birth"], life["end"], life["replaced"]] for life in graph["lifecycles"]
        ]
        row["check"] = manifest["check"]
    shutil.rmtree(folder)
    return row


def main() -> int:
    """Measure every number of blocks and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--recipe", default="w8a8")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--json", type=Path, required=True)
    args = parser.parse_args()
    width = args.hidden
    shape = SHAPES.get(args.shape) or Shape(width, width * 11 // 4, width // 64, width // 128, 4096)
    rows = []
    for blocks in args.blocks:
        folder = Path(tempfile.mkdtemp(dir=args.work))
        rows.append(_row(folder, shape, blocks, args))
        found = {
            "command": ["python", "-m", "tools.cost", *sys.argv[1:]],
            "cores": len(os.sched_getaffinity(0)),
            "python": platform.python_version(),
            "shape": shape.__dict__,
            "samples": SAMPLES,
            "length": LENGTH,
            "rows": rows,
        }
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
