"""A tiny random decoder with planted spikes: the whole life of a sink in seconds, without torch.

The graph has what a traced model has (opset 23: RMSNormalization, RotaryEmbedding, Attention, gated
MLP, KV cache, tied embedding) and one thing more: a table of positions whose row 0 carries a
*marker* channel. At the birth block one MLP neuron reads the marker and writes a huge value into
one residual channel; at the death block one neuron reads that channel and takes the value away
again. Ordinary tokens are quiet on the marker and on the spiking channel.

`Spike(token=t)` marks a token wherever it stands instead (a delimiter), and `sign=-1` spikes
downwards, which makes a second template. `death=None` leaves the spike in the stream to the end.

With `post_norms`, queries and keys are normalised too, and what a branch adds to the stream has
passed a norm of its own: as in the real models of that kind, the spike is written by that norm's
weight, which is large on the spiking channel. With `bare` that is the only norm of a branch: its
products read the stream itself. With `within` the norms stand in the stream, behind its additions,
and nowhere else: what a spike leaves there is a row of the usual size. With `parallel` attention
and MLP read the same value: "sum" is `x + (attention + MLP)` behind one norm, "chain"
`(x + attention) + MLP` behind two. With `latent` queries are made of a normed latent, and keys and
values of another one. With `after` a third branch stands behind the MLP: it reads the stream
itself, is gated by a row of a table for the token, and a norm stands behind it. `factor` multiplies
the whole stream behind each block.

With `experts` each MLP is a mixture of so many, of which a token chooses two, and never one of the
last `silent`; spikes are those of expert 0, which the tokens that carry them choose. With `shared`
another MLP, as wide, stands beside.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from iq_export.decide.restore import with_restore
from iq_export.decide.sinks import Decision, fit_sinks
from iq_export.graph import io
from iq_export.graph.sites import Sites
from iq_export.model import experts
from iq_export.model.scopes import SCOPES, module_scope
from iq_export.observe.samples import Window
from iq_export.observe.token_stats import TokenStats, observe_tokens
from iq_export.passes.insert_sinks import insert_sinks
from iq_export.passes.order import begin
from iq_export.progress import Progress
from iq_export.run.ort import CausalLM, left_pad
from iq_export.sinks.lifecycle import Lifecycle, discover
from iq_export.sinks.templates import SinkTemplates

CPU = ("CPUExecutionProvider",)
MARKER_VALUE = 200.0
_GAIN = 3.0
# What a spike is in front of a post-norm, which it must dominate.
_BEFORE_NORM = 600.0


@dataclass(frozen=True)
class Spike:
    """One planted lifecycle, blocks from 0. `token` None: position 0; else that token anywhere."""

    birth: int
    death: int | None
    size: float = 1000.0
    channel: int = 5
    marker: int = 1
    sign: int = 1
    token: int | None = None


@dataclass(frozen=True)
class Decoder:
    """Sizes of the model. `positions` is the length of the position table, 0 for none."""

    blocks: int = 4
    hidden: int = 64
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    features: int = 128
    vocab: int = 50
    positions: int = 128
    cache: bool = True
    rotary: bool = True
    post_norms: bool = False
    bare: bool = False  # goes with `post_norms` or `within`
    within: bool = False  # goes with `bare`
    heard: float = 1.0  # share of a spike that products which read the stream make something of
    parallel: str = ""
    latent: int = 0  # features
    after: int = 0  # features
    factor: float = 1.0
    experts: int = 0
    shared: bool = False  # goes with `experts`, as does the next
    silent: int = 0
    spikes: tuple[Spike, ...] = (Spike(birth=1, death=3),)
    seed: int = 0

    @property
    def special(self) -> list[int]:
        """Residual channels on which only spiking tokens are loud."""
        return sorted({c for spike in self.spikes for c in (spike.channel, spike.marker)})

    @property
    def quiet(self) -> float:
        """Ordinary tokens' share of their usual size on these channels. Where a post-norm makes a
        spike of whatever stands there, none."""
        return 0.0 if self.post_norms else 0.1


DELIMITER = 7
# Two kinds of sinks, position 0 and a delimiter token, with opposite spikes on one channel.
WITH_DELIMITER = Decoder(
    spikes=(Spike(1, 3), Spike(1, 3, marker=2, sign=-1, token=DELIMITER)),
)
# The delimiter is born a block after position 0, on the same channel, and dies with it.
TWO_BIRTHS = Decoder(
    blocks=5,
    spikes=(Spike(1, 4), Spike(2, 4, marker=2, sign=-1, token=DELIMITER)),
)
NO_SPIKES = Decoder(spikes=())


def weights(decoder: Decoder) -> dict[str, np.ndarray]:
    """Random weights with the spikes planted: name -> float32 array, products as `[in, out]`."""
    rng = np.random.default_rng(decoder.seed)
    d, f = decoder.hidden, decoder.features
    query, cached = decoder.heads * decoder.head_dim, decoder.kv_heads * decoder.head_dim

    def normal(*shape: int, gain: float = 1.0) -> np.ndarray:
        return (gain * rng.normal(size=shape) / np.sqrt(shape[0])).astype(np.float32)

    found = {"embed_tokens.weight": rng.normal(size=(decoder.vocab, d)).astype(np.float32)}
    for i in range(decoder.blocks):
        at = f"layers.{i}."
        found |= {
            f"{at}input_layernorm.weight": (1 + 0.1 * rng.normal(size=d)).astype(np.float32),
            f"{at}self_attn.q_proj.weight": normal(decoder.latent or d, query),
            f"{at}self_attn.k_proj.weight": normal(decoder.latent or d, cached),
            f"{at}self_attn.v_proj.weight": normal(decoder.latent or d, cached),
            f"{at}self_attn.o_proj.weight": normal(query, d, gain=0.5),
            f"{at}post_attention_layernorm.weight": (1 + 0.1 * rng.normal(size=d)).astype("f4"),
            f"{at}mlp.gate_proj.weight": normal(d, f),
            f"{at}mlp.up_proj.weight": normal(d, f),
            f"{at}mlp.down_proj.weight": normal(f, d, gain=0.5),
        }
        for kind in ("q", "kv") if decoder.latent else ():
            found[f"{at}self_attn.{kind}_a_proj.weight"] = normal(d, decoder.latent)
            gain = 1 + 0.5 * rng.normal(size=decoder.latent)
            found[f"{at}self_attn.{kind}_a_norm.weight"] = gain.astype(np.float32)
        if decoder.post_norms:
            found |= {
                f"{at}self_attn.q_norm.weight": np.full(decoder.head_dim, 1.1, np.float32),
                f"{at}self_attn.k_norm.weight": np.full(decoder.head_dim, 0.9, np.float32),
                f"{at}self_attn.post_norm.weight": np.full(d, 0.5, np.float32),
                f"{at}mlp.post_norm.weight": np.full(d, 0.5, np.float32),
            }
        if decoder.after:
            # The first one rounds the marker with the rest: it counts little.
            gain = np.full(d, 0.5 if i else 0.01, np.float32)
            gain[decoder.special] = 0
            found |= {
                f"{at}after.gate_proj.weight": normal(d, decoder.after),
                f"{at}after.out_proj.weight": normal(decoder.after, d),
                f"{at}after.post_norm.weight": gain,
            }
        for name in ("self_attn.q", "self_attn.k", "self_attn.v", "mlp.gate", "mlp.up"):
            if decoder.bare:  # no norm holds them down
                rows = found[f"{at}{name}_proj.weight"]
                rows[decoder.special] *= 0.01
                rows[[spike.channel for spike in decoder.spikes]] *= 100 * decoder.heard
        found[f"{at}self_attn.o_proj.weight"][:, decoder.special] *= decoder.quiet
        found[f"{at}mlp.down_proj.weight"][:, decoder.special] *= decoder.quiet
    if decoder.after:
        found["tokens.weight"] = normal(decoder.vocab, decoder.after, gain=7.0)
    found["norm.weight"] = np.ones(d, np.float32)
    found["embed_tokens.weight"][:, decoder.special] *= decoder.quiet
    if decoder.positions:
        table = 0.1 * rng.normal(size=(decoder.positions, d))
        table[:, decoder.special] *= decoder.quiet
        found["position.weight"] = table.astype(np.float32)
    for neuron, spike in enumerate(decoder.spikes):
        _plant(found, decoder, neuron, spike)
    for i in range(decoder.blocks):
        if decoder.bare and not decoder.within:
            del found[f"layers.{i}.input_layernorm.weight"]
        if (decoder.bare and not decoder.within) or decoder.parallel == "sum":
            del found[f"layers.{i}.post_attention_layernorm.weight"]
        if decoder.experts:
            _share_out(found, decoder, f"layers.{i}.mlp.", rng)
    return found


def _share_out(
    found: dict[str, np.ndarray], decoder: Decoder, at: str, rng: np.random.Generator
) -> None:
    """Make the MLP at `at` the first expert of a mixture."""
    first = [found.pop(f"{at}{name}_proj.weight") for name in ("gate", "up", "down")]
    experts = [[w.T.copy() for w in first]]
    for _ in range(decoder.experts - 1 + decoder.shared):
        own = [rng.permutation(w.ravel()).reshape(w.T.shape) for w in first]
        for each in own:  # no planted weights
            np.clip(each, -0.5, 0.5, out=each)
        own[2][decoder.special] *= decoder.quiet
        experts.append(own)
    router = (2 * rng.normal(size=(decoder.hidden, decoder.experts))).astype(np.float32)
    router /= np.sqrt(decoder.hidden)
    for spike in decoder.spikes:
        for channel, sign in ((spike.marker, 1), (spike.channel, spike.sign)):
            router[channel] = 0
            router[channel, 0] = 3 * sign
    found[f"{at}gate.weight"] = router
    if decoder.shared:
        for name, weight in zip(("gate", "up", "down"), experts.pop(), strict=True):
            found[f"{at}shared.{name}_proj.weight"] = weight.T.copy()
    merged = [np.concatenate([gate, up]) for gate, up, _ in experts]
    found[f"{at}experts.gate_up_proj"] = np.stack(merged)
    found[f"{at}experts.down_proj"] = np.stack([down for *_, down in experts])


def _plant(found: dict[str, np.ndarray], decoder: Decoder, neuron: int, spike: Spike) -> None:
    # Products that read the stream itself round it as it is: there the marker is no spike.
    marked = 8.0 if decoder.bare else MARKER_VALUE
    if spike.token is None:
        found["position.weight"][0, spike.marker] = marked
    else:
        found["embed_tokens.weight"][spike.token, spike.marker] = marked
    # A channel that dominates its row is sqrt(hidden) after the norm, whatever its size.
    product = _GAIN**2 * decoder.hidden
    written = spike.sign * (_BEFORE_NORM if decoder.post_norms else spike.size)
    # All neurons are loud where they read the spike itself.
    taken = spike.sign * 2e6 if decoder.bare else written
    taken *= decoder.factor ** ((spike.death or spike.birth) - spike.birth)
    left = marked * decoder.factor**spike.birth
    erased = {} if decoder.post_norms else {spike.marker: -left}
    shared = decoder.parallel == "sum"
    for block, read, sign, writes, size in (
        (spike.birth, spike.marker, 1, {spike.channel: written, **erased}, marked),
        (
            spike.death,
            spike.channel,
            spike.sign,
            {spike.channel: -spike.sign * abs(taken)},
            spike.size,
        ),
    ):
        if block is None:
            continue
        at = f"layers.{block}."
        norm = found[f"{at}{'input' if shared else 'post_attention'}_layernorm.weight"][read]
        if decoder.bare:  # as large as behind a norm
            norm = size / np.sqrt(decoder.hidden)
        for name in ("gate", "up"):
            column = found[f"{at}mlp.{name}_proj.weight"]
            column[:, neuron] = 0
            column[read, neuron] = sign * _GAIN / norm
        down = found[f"{at}mlp.down_proj.weight"]
        down[neuron] = 0
        for channel, value in writes.items():
            down[neuron, channel] = value / product
        if decoder.post_norms:  # its row is sqrt(hidden) on the spike's channel after the norm
            post = found[f"{at}mlp.post_norm.weight"]
            post[spike.channel] = spike.size / np.sqrt(decoder.hidden)


@dataclass
class _Graph:
    """Nodes and constants in the making; `node` returns the name of the node's only output."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: dict[str, np.ndarray] = field(default_factory=dict)

    def node(self, op: str, name: str, *inputs: str, output: str = "", **attributes: object) -> str:
        output = output or f"{name}/out"
        self.nodes.append(helper.make_node(op, list(inputs), [output], name=name, **attributes))
        return output

    def constant(self, name: str, value: object, dtype: type = np.int64) -> str:
        self.constants.setdefault(name, np.asarray(value, dtype))
        return name


def proto(decoder: Decoder, values: dict[str, np.ndarray] | None = None) -> onnx.ModelProto:
    """The decoder as a float32 model with its weights inside, types and shapes inferred."""
    g = _Graph(constants=dict(values or weights(decoder)))
    mask = _mask(g, decoder)
    stream = g.node("Gather", "embed_tokens", "embed_tokens.weight", "input_ids")
    if decoder.positions:
        marked = g.node("Gather", "position", "position.weight", "position_ids")
        stream = g.node("Add", "embed", stream, marked)
    angles = _angles(g, decoder) if decoder.rotary else None
    for i in range(decoder.blocks):
        attended = _attention(g, decoder, i, stream, mask, angles)
        if decoder.parallel == "sum":
            both = g.node("Add", f"layers.{i}/Add", attended, _mlp(g, decoder, i, stream))
            stream = g.node("Add", f"layers.{i}/Add_2", stream, both)
        else:
            after = g.node("Add", f"layers.{i}/Add", stream, attended)
            if decoder.within:
                after = _norm(g, f"layers.{i}/input_layernorm", after)
            read = stream if decoder.parallel else after
            stream = g.node("Add", f"layers.{i}/Add_2", after, _mlp(g, decoder, i, read))
            if decoder.within and i < decoder.blocks - 1:
                stream = _norm(g, f"layers.{i}/post_attention_layernorm", stream)
        if decoder.after:
            stream = g.node("Add", f"layers.{i}/Add_3", stream, _behind(g, i, stream))
        if decoder.factor != 1:
            factor = g.constant("const.factor", [decoder.factor], np.float32)
            stream = g.node("Mul", f"layers.{i}/factor", stream, factor)
    normed = _norm(g, "norm", stream)
    head = g.node("Transpose", "lm_head/Transpose", "embed_tokens.weight", perm=[1, 0])
    g.node("MatMul", "lm_head", normed, head, output="logits")
    model = helper.make_model(
        helper.make_graph(
            g.nodes, "main_graph", *_interface(decoder),
            [numpy_helper.from_array(value, name) for name, value in g.constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", 23)], ir_version=10, producer_name="planted",
    )  # fmt: skip
    if decoder.experts:
        model = _with_experts(model, decoder)
    onnx.checker.check_model(model)
    return onnx.shape_inference.infer_shapes(model, data_prop=True)


def save(decoder: Decoder, folder: Path, values: dict[str, np.ndarray] | None = None) -> Path:
    """Write the model as a trace would: `model.onnx` with its weights in `model.onnx.data`."""
    path = folder / "model.onnx"
    onnx.save(
        proto(decoder, values), path, save_as_external_data=True, location="model.onnx.data",
        size_threshold=256,
    )  # fmt: skip
    return path


def windows(decoder: Decoder, *, count: int = 24, length: int = 40, seed: int = 1) -> list[Window]:
    """Random token windows with varied first tokens; delimiters stand in the middle only."""
    rng = np.random.default_rng(seed)
    marked = [spike.token for spike in decoder.spikes if spike.token is not None]
    ordinary = [token for token in range(decoder.vocab) if token not in marked]
    found = []
    for _ in range(count):
        ids = rng.choice(ordinary, size=length)
        for token in marked:
            ids[rng.integers(length // 4, length, size=2)] = token
        found.append(Window(ids.tolist(), False))
    return found


def _interface(
    decoder: Decoder,
) -> tuple[list[onnx.ValueInfoProto], list[onnx.ValueInfoProto]]:
    def value(name: str, kind: int, *shape: str | int) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, list(shape))

    integer, real = TensorProto.INT64, TensorProto.FLOAT
    inputs = [
        value("input_ids", integer, "batch", "seq"),
        value("attention_mask", integer, "batch", "total"),
        value("position_ids", integer, "batch", "seq"),
    ]
    outputs = [value("logits", real, "batch", "seq", decoder.vocab)]
    for i in range(decoder.blocks if decoder.cache else 0):
        for kind in ("key", "value"):
            sizes = (decoder.kv_heads, decoder.head_dim)
            inputs.append(
                value(f"past_key_values.{i}.{kind}", real, "batch", sizes[0], "past", sizes[1])
            )
            outputs.append(value(f"present.{i}.{kind}", real, "batch", sizes[0], "total", sizes[1]))
    return inputs, outputs


def _mask(g: _Graph, decoder: Decoder) -> str | None:
    """Bool `[batch, 1, seq, total]`: causal, not a pad, and always the token itself."""
    if not decoder.cache:
        return None
    zero, one = g.constant("const.zero", 0), g.constant("const.one", 1)
    axes = {n: g.constant(f"const.axes{n}", list(map(int, n))) for n in ("0", "1", "12", "01")}
    seq = g.node("Squeeze", "mask/seq", g.node("Shape", "mask/Shape", "input_ids", start=1, end=2))
    past = g.node(
        "Squeeze", "mask/past",
        g.node("Shape", "mask/Shape_2", "past_key_values.0.key", start=2, end=3),
    )  # fmt: skip
    total = g.node("Add", "mask/total", past, seq)
    column = g.node("Range", "mask/Range", zero, total, one)
    columns = g.node("Unsqueeze", "mask/columns", column, axes["0"])
    row = g.node("Add", "mask/Add", g.node("Range", "mask/Range_2", zero, seq, one), past)
    rows = g.node("Unsqueeze", "mask/rows", row, axes["1"])
    there = g.node("Not", "mask/Not", g.node("Equal", "mask/Equal", "attention_mask", zero))
    there = g.node("Unsqueeze", "mask/there", there, axes["12"])
    self = g.node("Equal", "mask/Equal_2", columns, rows)
    self = g.node("Unsqueeze", "mask/self", self, axes["01"])
    causal = g.node("LessOrEqual", "mask/LessOrEqual", columns, rows)
    causal = g.node("Unsqueeze", "mask/causal", causal, axes["01"])
    allowed = g.node("Or", "mask/Or", there, self)
    return g.node("And", "mask/And", causal, allowed)


def _angles(g: _Graph, decoder: Decoder) -> tuple[str, str]:
    half = decoder.head_dim // 2
    frequency = 10000.0 ** (-np.arange(half) / half)
    constant = g.constant("rotary_emb.inv_freq", frequency, np.float32)
    axis = g.constant("const.axes_last", [2])
    position = g.node("Unsqueeze", "rotary_emb/Unsqueeze", "position_ids", axis)
    position = g.node("Cast", "rotary_emb/Cast", position, to=TensorProto.FLOAT)
    angle = g.node("Mul", "rotary_emb/Mul", position, constant)
    return g.node("Cos", "rotary_emb/Cos", angle), g.node("Sin", "rotary_emb/Sin", angle)


def _norm(g: _Graph, name: str, value: str) -> str:
    weight = f"{name.replace('/', '.')}.weight"
    return g.node("RMSNormalization", name, value, weight, axis=-1, epsilon=1e-6)


def _linear(g: _Graph, name: str, value: str) -> str:
    return g.node("MatMul", name, value, f"{name.replace('/', '.')}.weight")


def _attention(
    g: _Graph,
    decoder: Decoder,
    i: int,
    stream: str,
    mask: str | None,
    angles: tuple[str, str] | None,
) -> str:
    """What the branch adds to the stream."""
    at = f"layers.{i}/self_attn"
    normed = stream if decoder.bare else _norm(g, f"layers.{i}/input_layernorm", stream)

    def latent(kind: str) -> str:
        if not decoder.latent:
            return normed
        return _norm(g, f"{at}/{kind}_a_norm", _linear(g, f"{at}/{kind}_a_proj", normed))

    read = dict.fromkeys("kv", latent("kv")) | {"q": latent("q")}

    def heads(kind: str, count: int) -> str:
        shape = g.constant(f"const.heads{count}", [0, 0, count, decoder.head_dim])
        flat = _linear(g, f"{at}/{kind}_proj", read[kind])
        split = g.node("Reshape", f"{at}/{kind}_split", flat, shape)
        turned = g.node("Transpose", f"{at}/{kind}_heads", split, perm=[0, 2, 1, 3])
        if decoder.post_norms and kind != "v":
            turned = _norm(g, f"{at}/{kind}_norm", turned)
        if angles is None or kind == "v":
            return turned
        return g.node("RotaryEmbedding", f"{at}/{kind}_rotary", turned, *angles)

    query = heads("q", decoder.heads)
    cached = {"key": heads("k", decoder.kv_heads), "value": heads("v", decoder.kv_heads)}
    options: dict[str, object] = {"scale": float(decoder.head_dim**-0.5)}
    if decoder.cache:
        for kind, value in cached.items():
            past, present = f"past_key_values.{i}.{kind}", f"present.{i}.{kind}"
            cached[kind] = g.node("Concat", f"{at}/{kind}", past, value, output=present, axis=-2)
    else:
        options["is_causal"] = 1
    masks = [mask] if mask else []
    attended = g.node("Attention", f"{at}/Attention", query, *cached.values(), *masks, **options)
    together = g.node("Transpose", f"{at}/together", attended, perm=[0, 2, 1, 3])
    shape = g.constant("const.join", [0, 0, decoder.heads * decoder.head_dim])
    joined = g.node("Reshape", f"{at}/join", together, shape)
    tail = _linear(g, f"{at}/o_proj", joined)
    return _norm(g, f"{at}/post_norm", tail) if decoder.post_norms else tail


def _behind(g: _Graph, i: int, stream: str) -> str:
    """What the branch behind the MLP adds to the stream."""
    at = f"layers.{i}/after"
    gate = g.node("Tanh", f"{at}/act", _linear(g, f"{at}/gate_proj", stream))
    rows = g.node("Gather", f"{at}/tokens", "tokens.weight", "input_ids")
    product = g.node("Mul", f"{at}/Mul", gate, rows)
    return _norm(g, f"{at}/post_norm", _linear(g, f"{at}/out_proj", product))


def _mlp(g: _Graph, decoder: Decoder, i: int, stream: str) -> str:
    """What the branch adds to the stream."""
    at = f"layers.{i}/mlp"
    if decoder.parallel == "sum":
        normed = f"layers.{i}/input_layernorm/out"
    else:
        normed = (
            stream if decoder.bare else _norm(g, f"layers.{i}/post_attention_layernorm", stream)
        )
    tail = _mixture(g, decoder, at, normed) if decoder.experts else _gated(g, at, normed)
    return _norm(g, f"{at}/post_norm", tail) if decoder.post_norms else tail


def _gated(g: _Graph, at: str, normed: str) -> str:
    gate = _linear(g, f"{at}/gate_proj", normed)
    up = _linear(g, f"{at}/up_proj", normed)
    return _linear(g, f"{at}/down_proj", _product(g, at, gate, up))


def _product(g: _Graph, at: str, gate: str, up: str) -> str:
    sigmoid = g.node("Sigmoid", f"{at}/act/Sigmoid", gate)
    active = g.node("Mul", f"{at}/act/Mul", gate, sigmoid)
    return g.node("Mul", f"{at}/Mul", active, up)


def _mixture(g: _Graph, decoder: Decoder, at: str, normed: str) -> str:
    """As it is traced: with marks, that `write_experts` writes out."""
    marks = {"domain": experts.DOMAIN}
    flat = g.node("Reshape", f"{at}/flat", normed, g.constant("const.rows", [-1, decoder.hidden]))
    scores = g.node("MatMul", f"{at}/gate", normed, f"{at.replace('/', '.')}.gate.weight")
    scores = g.node(
        "Reshape", f"{at}/scores", scores, g.constant("const.scores", [-1, decoder.experts])
    )
    if decoder.silent:
        bias = np.zeros(decoder.experts, np.float32)
        bias[-decoder.silent :] = -1e4
        scores = g.node("Add", f"{at}/bias", scores, g.constant("const.bias", bias, np.float32))
    shares = g.node("Softmax", f"{at}/Softmax", scores, axis=-1)
    two = g.constant("const.two", [2])
    best, chosen = f"{at}/TopK/out", f"{at}/TopK/out1"
    g.nodes.append(helper.make_node("TopK", [shares, two], [best, chosen], name=f"{at}/TopK"))
    inner = f"{at.replace('/', '.')}.experts"
    value = g.node("ToExperts", f"{at}/to", flat, chosen, **marks)
    value = g.node(
        "ExpertMatMul", f"{at}/gate_up", value, f"{inner}.gate_up_proj", transposed=0, **marks
    )
    gate, up = f"{at}/Split/out", f"{at}/Split/out1"
    split = helper.make_node(
        "Split", [value], [gate, up], name=f"{at}/Split", axis=-1, num_outputs=2
    )
    g.nodes.append(split)
    value = _product(g, at, gate, up)
    value = g.node("ExpertMatMul", f"{at}/down", value, f"{inner}.down_proj", transposed=0, **marks)
    ends = {"experts": decoder.experts, **marks}
    value = g.node("FromExperts", f"{at}/from", value, chosen, best, **ends)
    like = g.node("Shape", f"{at}/Shape", normed)
    tail = g.node("Reshape", f"{at}/Reshape", value, like)
    if not decoder.shared:
        return tail
    return g.node("Add", f"{at}/Add", tail, _gated(g, f"{at}/shared", normed))


def _with_experts(model: onnx.ModelProto, decoder: Decoder) -> onnx.ModelProto:
    """The model with its marks written out, and the names that a trace gives."""
    written = ir.from_proto(model)
    for node in written.graph:
        if node.op_type == "ToExperts":
            flat, chosen = node.inputs
            flat.shape, flat.dtype = ir.Shape([None, decoder.hidden]), ir.DataType.FLOAT
            chosen.shape, chosen.dtype = ir.Shape([None, 2]), ir.DataType.INT64
        elif node.op_type == "FromExperts":
            node.inputs[2].dtype = ir.DataType.FLOAT
        elif node.op_type == "Split":
            for out in node.outputs:
                out.shape = ir.Shape([1, None, decoder.features])
        scope = str(node.name).rpartition("/")[0].replace("/", ".") + ".experts"
        node.metadata_props[SCOPES] = repr([scope, node.op_type])
    before = set(written.graph)
    experts.write_experts(written.graph)
    written.opset_imports.pop(experts.DOMAIN, None)
    for number, node in enumerate(written.graph):
        if node not in before:
            scope = module_scope(node)
            node.name = scope if node.op_type == "MatMul" else f"{scope}/{node.op_type}.{number}"
            for out in node.outputs:
                out.name = f"{node.name}/out"
        node.metadata_props.clear()
    return ir.to_proto(written)


@dataclass(frozen=True)
class Planted:
    """A saved model, what was observed on it, and the same model with sink ops beside it."""

    decoder: Decoder
    path: Path
    sites: Sites
    windows: list[Window]
    stats: TokenStats
    lifecycles: list[Lifecycle]
    decisions: list[Decision]
    sinks: list[SinkTemplates]
    inserted: Path

    def load(self) -> ir.Model:
        return io.load(self.path)

    def load_inserted(self) -> ir.Model:
        return io.load(self.inserted)

    def save_beside(self, model: ir.Model, name: str) -> Path:
        """Save a rewritten graph where its external weights are."""
        path = self.path.with_name(name)
        io.save_skeleton(model, path)
        return path


def changed(data: Planted, model: ir.Model, name: str) -> float:
    """The largest difference of the logits of `model`, saved as `name`, from those of the planted
    one, as a fraction of their range."""
    rows = [window.ids for window in data.windows[:3]]
    expected = logits(CausalLM(data.path), rows)
    found = logits(CausalLM(data.save_beside(model, name)), rows)
    return float(np.abs(found - expected).max() / (expected.max() - expected.min()))


def observe(
    decoder: Decoder,
    folder: Path,
    *,
    limit: float = 0.1,
    values: dict[str, np.ndarray] | None = None,
) -> Planted:
    """Everything from the file to inserted sinks, as `rewrite` does it without smoothing."""
    path, progress = save(decoder, folder, values), Progress(quiet=True)
    options = {"providers": CPU, "progress": progress}
    begun, _ = begin(io.load(path))
    sites, data = begun.sites, windows(decoder)
    if decoder.experts:  # with what detection reads
        path = path.with_name("begun.onnx")
        io.save_skeleton(begun.model, path)
    stats = observe_tokens(path, sites, data, **options)
    lifecycles = discover(stats)
    decisions = fit_sinks(path, sites, lifecycles, stats, data, limit=limit, seed=0, **options)
    sinks = [d.templates for d in decisions if d.templates and d.replaced]
    inserted = path.with_name("inserted.onnx")
    for restored in (False, True):
        if restored and sinks:
            sinks = with_restore(path, inserted, sites, sinks, stats, data, **options)
        model = io.load(path)
        insert_sinks(model, sites, sinks)
        io.save_skeleton(model, inserted)
    return Planted(decoder, path, sites, data, stats, lifecycles, decisions, sinks, inserted)


def logits(model: CausalLM, rows: list[list[int]], *, chunk: int | None = None) -> np.ndarray:
    """`[batch, longest, vocab]` of left-padded `rows`, `chunk` tokens at a time through the cache.

    All at once if `chunk` is None.
    """
    ids, mask, positions = left_pad(rows, pad_id=0)
    length, past, found = ids.shape[1], None, []
    for start in range(0, length, chunk or length):
        end = min(start + (chunk or length), length)
        step = model.forward(ids[:, start:end], mask[:, :end], positions[:, start:end], past)
        past = step.present
        found.append(step.logits)
    return np.concatenate(found, axis=1)
