"""What the fuzzer of the command line feeds it: base inputs, and ways to damage them.

Everything takes a `random.Random`, so that a call can be made again from its number. Files are
written only below the folder that is passed in.
"""

from __future__ import annotations

import copy as copying
import hashlib
import json
import os
import random
import shutil
import struct
from pathlib import Path
from typing import Any

# Bytes of an argument that are not UTF-8 reach Python as lone surrogates.
WORDS = (
    "", "nan", "inf", "-inf", "-1", "0", "1", "2", "1e309", "-0.0", "1e-320", "9" * 20, "9" * 400,
    "9" * 5000, "0x10", "1_000", "٣", " 7 ", "1.5", "true", "--", "-", "word", "ümlaut 漢字 🎲",
    "caf\udce9", "\udcff\udcfe", "a\nb", "\x1b[31mred\x1b[0m", "\x07", "x" * 300,
    "x" * 70_000, "%s%n{0}", "../../..", "batch:1,seq:1,past:0", "seq:99999999999999999999",
    "batch:0", "seq:" + "9" * 5000, "past:-1", "*", "$(id)", "~nobody-here/model", "org/name",
    "a/b/c", "smollm2-135m", "gemma3-270m", "http://localhost/x", "file:///etc/passwd",
)  # fmt: skip

JSON_VALUES: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 3, 2**31, 2**63, 10**30, 10**400, 1e308, float("nan"),
    float("inf"), 0.5, -0.5, "", "x", "x" * 5000, "\x1b[31mred", "a\nb", "../../outside/canary",
    "/etc/passwd", "漢字", "\ud800", [], {}, [None], [[]], [0], {"a": {"b": []}}, ["x", 1, None],
    {"content": None}, [1, 2, [3]], "yarn", "llama",
)  # fmt: skip

TEMPLATES = (
    "", "{{", "{% for %}", "{{ 1 / 0 }}", "{{ messages[5].content }}", "{{ undefined.attribute }}",
    "{% for i in range(10000000000) %}x{% endfor %}", "{{ 'x' * 100 }}", "{{ ''.__class__.mro() }}",
    "{% include 'x' %}", "{{ raise_exception('no ' ~ 1) }}", "{{ messages | tojson(indent='x') }}",
    "{{ messages | map('nothing') | list }}", "{{ strftime_now(5) }}", "{{ messages + 1 }}",
    "{{ messages | first | int }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% generation %}x{% endgeneration %}", "{{ messages[0]['content'] }}", "{{ bos_token + 1 }}",
    "{{ messages.append(1) }}", "{{ '%d' % 'x' }}", "{{ 'x'.encode('ascii').decode('utf-16') }}",
    "{% set x = namespace() %}{{ x.y.z }}", "{{ [1][1] }}", "{{ 'ü'.encode('ascii') }}",
)  # fmt: skip

TEXTS = (
    b"", b" \n\t ", b"\0", b"a", b"\xff\xfe\x00", b"\xef\xbb\xbf", b"\x80abc", b"word " * 2000,
    b"abc\0def" * 100, "漢字".encode() * 3000, b"\x1b[31m" * 3000, bytes(range(1, 256)) * 40,
    "text ".encode("utf-16") * 500, b"x" * 20_000, b"the cat sat on the mat. " * 3000,
)  # fmt: skip


def tokenizer(folder: Path) -> None:
    """Bytes as tokens and four special ones, 260 ids, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(_vocabulary(), []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        pad_token="<pad>",
    )  # fmt: skip
    fast.chat_template = "{% for m in messages %}{{ bos_token }}{{ m.content }}{% endfor %}"
    fast.save_pretrained(folder)


def _vocabulary() -> dict[str, int]:
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    return {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", "<pad>", *alphabet])}


def hugging_face(folder: Path, shard: str = "1GB") -> None:
    """A Llama of one layer with random weights and the tokenizer above."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=264, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32, max_position_embeddings=128,
        bos_token_id=1, eos_token_id=2, pad_token_id=3, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size=shard)
    tokenizer(folder)


def gguf_file(path: Path) -> None:
    """The same shape of model as a GGUF file."""
    import gguf
    import numpy as np

    random = np.random.default_rng(0)
    words = list(_vocabulary())
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_feed_forward_length(128)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_vocab_size(len(words))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(words)
    writer.add_token_types([3] * 4 + [1] * (len(words) - 4))
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    shapes = {
        "token_embd": (len(words), 64), "output_norm": (64,), "blk.0.attn_norm": (64,),
        "blk.0.ffn_norm": (64,), "blk.0.attn_q": (64, 64), "blk.0.attn_k": (32, 64),
        "blk.0.attn_v": (32, 64), "blk.0.attn_output": (64, 64), "blk.0.ffn_gate": (128, 64),
        "blk.0.ffn_up": (128, 64), "blk.0.ffn_down": (64, 128),
    }  # fmt: skip
    for name, shape in shapes.items():
        values = random.normal(0, 0.05, shape).astype(np.float32)
        writer.add_tensor(f"{name}.weight", values + ("norm" in name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def odd_path(rng: random.Random, folder: Path) -> str:
    """A path that is not what any command expects; what must exist for it is made in `folder`."""
    name = f"odd{rng.randrange(10**6)}"
    path = folder / name
    kind = rng.randrange(20)
    if kind == 0:
        path.write_bytes(rng.choice(TEXTS))
    elif kind == 1:
        path.mkdir()
    elif kind == 2:
        path.symlink_to(name)  # a loop
    elif kind == 3:
        path.symlink_to("nowhere")
    elif kind == 4:
        return str(folder / ("n" * 300))
    elif kind == 5:
        return str(folder) + "/d" * 3000
    elif kind == 6:
        path = folder / "not-utf8-\udcff"
        path.mkdir(exist_ok=True)
    elif kind == 7:
        path = folder / "line\nbreak \x1b[31m"
        path.mkdir(exist_ok=True)
    elif kind == 8:
        os.mkfifo(path)
    elif kind == 9:
        path = folder / "file" / "below"
        path.parent.touch()
    elif kind == 10:
        path.mkdir()
        (path / rng.choice(("config.json", "manifest.json", "model.onnx", "x.gguf"))).touch()
    elif kind == 11:
        path.mkdir()
        (path / rng.choice(("config.json", "manifest.json", "tokenizer.json"))).mkdir()
    else:
        return rng.choice(
            # Nothing that exists outside of the box: a fault that writes would damage the machine.
            ("", ".", "/proc/nothing/x", "~nobody-here/x", str(folder / "missing"))
        )  # fmt: skip
    return str(path)


def damage_json(rng: random.Random, text: str) -> bytes:
    """`text`, a JSON document, with one to three values changed, or no JSON any more."""
    if rng.random() < 0.15:
        return rng.choice(
            (b"", b"{", b"[]", b"null", b"5", b'"x"', b"[" * 100_000, b'{"a":' * 50_000, b"\xff",
             text.encode("utf-16", "replace"), b"\xef\xbb\xbf" + text.encode("utf-8", "replace"),
             text.encode("utf-8", "replace")[:-2], text.encode("utf-8", "replace") + b"x",
             b"9" * 5000, b"NaN", b"\0" * 64)
        )  # fmt: skip
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):  # damaged already
        return damage_bytes(rng, text.encode("utf-8", "surrogateescape"))
    for _ in range(rng.randint(1, 3)):
        _change(rng, document)
    return json.dumps(document).encode("utf-8", "surrogatepass")


def _change(rng: random.Random, node: Any) -> None:
    """Change one value of a JSON object or list, at a random depth."""
    if not isinstance(node, (dict, list)) or not node:
        return
    key = rng.choice(list(node)) if isinstance(node, dict) else rng.randrange(len(node))
    child = node[key]
    if isinstance(child, (dict, list)) and child and rng.random() < 0.7:
        _change(rng, child)
        return
    what, value = rng.randrange(10), copying.deepcopy(rng.choice(JSON_VALUES))
    if what == 0:
        del node[key]
    elif what == 1 and isinstance(node, dict):
        node[rng.choice(("unknown", "", "x" * 2000, "\x1b[31m"))] = value
    elif what == 2:
        deep: Any = None
        for _ in range(200):
            deep = [deep]
        node[key] = deep
    else:
        node[key] = value


def damage_bytes(rng: random.Random, content: bytes) -> bytes:
    """Truncated, flipped, overwritten with huge numbers, zeroed or prolonged."""
    if not content:
        return b"x"
    what = rng.randrange(8)
    region = len(content) if rng.random() < 0.4 else min(len(content), 1024)
    changed = bytearray(content)
    if what == 0:
        return content[: rng.randrange(len(content))]
    if what == 1:
        return content[: rng.randrange(min(len(content), 64))]
    if what in (2, 3):
        for _ in range(rng.choice((1, 1, 4, 64))):
            changed[rng.randrange(region)] ^= 1 << rng.randrange(8)
    elif what in (4, 5):
        at = rng.randrange(max(1, region - 8))
        number = rng.choice((0, 1, 2**31, 2**32 - 1, 2**40, 2**60, 2**63, 2**64 - 1))
        changed[at : at + 8] = struct.pack("<Q", number)
    elif what == 6:
        at = rng.randrange(region)
        changed[at : at + 64] = bytes(len(changed[at : at + 64]))
    else:
        changed += rng.randbytes(100)
    return bytes(changed)


def damage_gguf(rng: random.Random, content: bytes) -> bytes:
    """As `damage_bytes`, and often in the header: version, counts, the length of a first key."""
    if rng.random() < 0.5:
        return damage_bytes(rng, content)
    changed = bytearray(content)
    at, form = rng.choice(((4, "<I"), (8, "<Q"), (16, "<Q"), (24, "<Q"), (0, "<I")))
    number = rng.choice((0, 1, 2, 4, 11, 200, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1))
    packed = struct.pack(form, number & (2 ** (8 * struct.calcsize(form)) - 1))
    changed[at : at + len(packed)] = packed
    return bytes(changed)


def damage_safetensors(rng: random.Random, content: bytes) -> bytes:
    """The header changed as JSON, with the right or a wrong length in front; or bytes."""
    if rng.random() < 0.3 or len(content) < 16:
        return damage_bytes(rng, content)
    length = struct.unpack("<Q", content[:8])[0]
    header = damage_json(rng, content[8 : 8 + length].decode("utf-8", "surrogateescape"))
    said = len(header) if rng.random() < 0.8 else rng.choice((0, 1, 2**40, 2**63, 2**64 - 1))
    return struct.pack("<Q", said) + header + content[8 + length :]


def damage_onnx(rng: random.Random, content: bytes) -> bytes:
    """A model that still parses but is wrong, or bytes."""
    import onnx

    if rng.random() < 0.3:
        return damage_bytes(rng, content)
    model = onnx.ModelProto.FromString(content)
    graph = model.graph
    for _ in range(rng.choice((1, 1, 2))):
        what = rng.randrange(14)
        node = rng.choice(graph.node)
        tensor = rng.choice(graph.initializer)
        value = rng.choice([*graph.input, *graph.output])
        if what in (0, 1) and tensor.external_data:
            entry = rng.choice(tensor.external_data)
            entry.value = rng.choice(
                ("../../outside/canary", "/etc/passwd", "", "missing.data", "-1", "0", "x",
                 str(2**40), str(2**64), "\x1b[31m")
            )  # fmt: skip
        elif what == 2:
            node.op_type = rng.choice(("", "NoSuchOp", "Add", "Attention", "If"))
        elif what == 3:
            node.domain = rng.choice(("iq", "nowhere", "ai.onnx.ml"))
        elif what == 4:
            graph.node.remove(node)
        elif what == 5:
            graph.initializer.remove(tensor)
        elif what == 6:
            tensor.dims[:] = rng.choice(([], [-1], [0], [2**40], [2**62, 4], [1, 1, 1, 1, 1]))
        elif what == 7:
            tensor.data_type = rng.choice((0, 1, 2, 7, 8, 10, 22, 99))
        elif what == 8:
            value.name = rng.choice(("", "x", "input_ids", "logits", "past_key_values.7.key"))
        elif what == 9:
            value.type.tensor_type.elem_type = rng.choice((0, 1, 2, 7, 8, 10, 99))
        elif what == 10 and value.type.tensor_type.shape.dim:
            dim = rng.choice(value.type.tensor_type.shape.dim)
            dim.Clear()
            if rng.random() < 0.7:
                dim.dim_value = rng.choice((0, -1, 1, 2**40))
        elif what == 11 and node.input:
            node.input[rng.randrange(len(node.input))] = rng.choice(
                ("", "nowhere", rng.choice(graph.node).output[0], node.output[0])
            )
        elif what == 12 and model.opset_import:
            entry = rng.choice(model.opset_import)
            entry.version = rng.choice((0, -1, 1, 13, 18, 22, 99, 2**62))
        else:
            del rng.choice((graph.output, graph.input))[:]
            break
    return model.SerializeToString()


_DAMAGE = {".json": None, ".gguf": damage_gguf, ".safetensors": damage_safetensors,
           ".onnx": damage_onnx}  # fmt: skip


def damage_file(rng: random.Random, path: Path) -> None:
    """Damage one file in place, by what its name says it is; or put something else there."""
    if rng.random() < 0.06:
        path.unlink()
        what = rng.randrange(5)
        if what == 0:
            path.mkdir()
        elif what == 1:
            path.symlink_to(path.name)
        elif what == 2:
            path.symlink_to("missing")
        elif what == 3:
            os.mkfifo(path)
        return
    content = path.read_bytes()
    if path.name == "chat_template.jinja" or (
        path.name == "tokenizer_config.json" and rng.random() < 0.4
    ):
        template = rng.choice(TEMPLATES)
        if path.name.endswith(".json"):
            (path.parent / "chat_template.jinja").unlink(missing_ok=True)
            template = json.dumps({"bos_token": "<s>", "chat_template": template})
        path.write_text(template, encoding="utf-8")
    elif path.suffix == ".json":
        path.write_bytes(damage_json(rng, content.decode("utf-8", "surrogateescape")))
    else:
        path.write_bytes((_DAMAGE.get(path.suffix) or damage_bytes)(rng, content))


def damage_bundle(rng: random.Random, bundle: Path) -> None:
    """One file of a bundle damaged; its manifest resealed in most cases, so that it is read."""
    manifest = bundle / "manifest.json"
    files = sorted(path for path in bundle.rglob("*") if path.is_file())
    weights = [8 if path.name in _OFTEN else 1 for path in files]
    (chosen,) = rng.choices(files, weights)
    damage_file(rng, chosen)
    if rng.random() < 0.2 or not manifest.is_file() or manifest.is_symlink():
        return
    if chosen != manifest:
        record = json.loads(manifest.read_text())
        name = chosen.relative_to(bundle).as_posix()
        if chosen.is_file() and name in record["files"]:
            content = chosen.read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            record["files"][name] = {"bytes": len(content), "sha256": digest}
        manifest.write_text(json.dumps(record))
    digest = hashlib.sha256(manifest.read_bytes()).hexdigest()
    seal = bundle / "manifest.json.sha256"
    if not seal.is_dir():
        seal.unlink(missing_ok=True)
        seal.write_text(f"{digest}  manifest.json\n")


_OFTEN = ("manifest.json", "plan.json", "model.onnx", "tokenizer.json", "tokenizer_config.json",
          "chat_template.jinja", "config.json")  # fmt: skip


def damage_model(rng: random.Random, folder: Path) -> None:
    """One or two files of a model folder damaged."""
    for _ in range(rng.choice((1, 1, 1, 2))):
        files = sorted(path for path in folder.iterdir() if path.is_file())
        weights = [4 if path.name == "config.json" else 1 for path in files]
        damage_file(rng, rng.choices(files, weights)[0])


def copy(source: Path, target: Path) -> Path:
    """A file or folder copied to where it may be damaged."""
    if source.is_dir():
        shutil.copytree(source, target)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    return target
