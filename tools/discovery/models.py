"""Random decoders with planted lifecycles, as ONNX graphs without torch.

What a spike is made of stands in the weights: a few tokens carry a modest *marker* (about twice
what other channels have), one MLP neuron of the birth block reads it behind the norm and writes the
spike; a neuron of the death block reads the spike and takes it out. Sizes are measured while
planting, block by block, so that a ratio that is asked for is the ratio that the graph has.

With `post_norms` the branch passes a norm of its own and that norm's weight is what writes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import erf
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from iq_export.observe.samples import Window

FIRST = -1  # as the token of a Group: position 0, whatever stands there
# The smallest ratio of what is planted as a spike.
LEAST_RATIO = 20.0
_MARKER = 6.0
# How far the written channel exceeds the rest of a product's output in front of a post-norm.
_OVER_REST = 100.0
# Sizes are measured on as many windows of this length.
_SAMPLE, _SAMPLE_LENGTH = 4, 40


@dataclass(frozen=True)
class Group:
    """Tokens that spike alike. `births`: (block, share of the size written there), in order."""

    token: int
    births: tuple[tuple[int, float], ...]
    factor: float = 1.0  # of the lifecycle's ratio


@dataclass(frozen=True)
class Life:
    """A lifecycle.

    `ratio`: carried value over the median token's largest one, where the latter is largest (below
    LEAST_RATIO: smallest) in the blocks of the life. `down_ratio`: the neuron's value at the birth
    over the median token's largest down-projection input. `drift`: what every block after adds, as
    a share.
    """

    groups: tuple[Group, ...]
    death: int | None
    ratio: float
    channel: int
    down_ratio: float
    sign: int = 1
    drift: float = 0.0


@dataclass(frozen=True)
class Model:
    """`noise`, `level`: what its ordinary tokens are like; see `_noise`. `rates`: share of tokens
    of each delimiter. `scale` and `inner` multiply the residual and the down-projection inputs."""

    kind: str
    seed: int
    lives: tuple[Life, ...] = ()
    blocks: int = 8
    hidden: int = 64
    heads: int = 4
    kv_heads: int = 2
    features: int = 128
    vocab: int = 120
    layer_norm: bool = False
    gated: bool = True
    post_norms: bool = False
    gain: float = 0.3
    scale: float = 1.0
    inner: float = 1.0
    count: int = 16
    length: int = 128
    rates: tuple[tuple[int, float], ...] = ()
    noise: str = "plain"
    level: float = 0.0

    @property
    def tokens(self) -> list[int]:
        """All tokens that spike, FIRST among them."""
        return sorted({group.token for life in self.lives for group in life.groups})

    def marker(self, token: int) -> int:
        return self.tokens.index(token)

    @property
    def markers(self) -> list[int]:
        return list(range(len(self.tokens)))


HEAD = 16


def windows(model: Model) -> list[Window]:
    """Random tokens; a delimiter stands anywhere but at position 0, as often as its rate says."""
    rng = np.random.default_rng([model.seed, 1])
    special = [token for token, _ in model.rates]
    ordinary = np.setdiff1d(np.arange(model.vocab), special)
    ids = rng.choice(ordinary, size=(model.count, model.length))
    places = [(w, p) for w in range(model.count) for p in range(1, model.length)]
    order = rng.permutation(len(places))
    start = 0
    for token, rate in model.rates:
        number = max(4, round(rate * ids.size))
        for place in order[start : start + number]:
            ids[places[place]] = token
        start += number
    return [Window(row.tolist(), False) for row in ids]


def _sample(model: Model) -> list[Window]:
    """Short windows in which every delimiter stands several times."""
    few = tuple((token, 0.05) for token, _ in model.rates)
    length = min(_SAMPLE_LENGTH, model.length)
    return windows(replace(model, count=_SAMPLE, length=length, rates=few))


def members(model: Model, token: int, data: list[Window]) -> np.ndarray:
    """Columns of TokenStats at which `token` stands."""
    ids = np.array([window.ids for window in data])
    if token == FIRST:
        found = np.zeros(ids.shape, bool)
        found[:, 0] = True
    else:
        found = ids == token
    return np.flatnonzero(found.ravel())


class _Builder:
    """The weights of one model, and its graph with any of its values as outputs."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.values = _weights(model)
        self.neuron = [0] * model.blocks

    def proto(self, blocks: int | None = None) -> onnx.ModelProto:
        """The graph, shapes inferred; or that of the first `blocks` blocks only."""
        m, nodes = self.model, []

        def node(op: str, name: str, *inputs: str, **attributes: Any) -> str:
            output = attributes.pop("output", f"{name}/out")
            nodes.append(helper.make_node(op, list(inputs), [output], name=name, **attributes))
            return output

        def norm(name: str, value: str) -> str:
            inputs = [value, f"{name}.weight"]
            if m.layer_norm:
                inputs.append(f"{name}.bias")
            op = "LayerNormalization" if m.layer_norm else "RMSNormalization"
            return node(op, name, *inputs, axis=-1, epsilon=1e-6)

        def linear(name: str, value: str) -> str:
            found = node("MatMul", name, value, f"{name}.weight")
            if f"{name}.bias" in self.values:
                found = node("Add", f"{name}/bias", found, f"{name}.bias")
            return found

        stream = node("Gather", "embed", "embed.weight", "input_ids")
        placed = node("Gather", "position", "position.weight", "position_ids")
        stream = node("Add", "embed_add", stream, placed)
        for i in range(m.blocks if blocks is None else blocks):
            at = f"layers.{i}"
            normed = norm(f"{at}.attn_norm", stream)
            parts = []
            for kind, heads in (("q", m.heads), ("k", m.kv_heads), ("v", m.kv_heads)):
                flat = linear(f"{at}.{kind}", normed)
                split = node("Reshape", f"{at}.{kind}_split", flat, f"heads{heads}")
                parts.append(node("Transpose", f"{at}.{kind}_t", split, perm=[0, 2, 1, 3]))
            attended = node("Attention", f"{at}.attention", *parts, is_causal=1, scale=HEAD**-0.5)
            joined = node("Transpose", f"{at}.join_t", attended, perm=[0, 2, 1, 3])
            branch = linear(f"{at}.o", node("Reshape", f"{at}.join", joined, "join"))
            if m.post_norms:
                branch = norm(f"{at}.attn_post", branch)
            stream = node("Add", f"{at}.add", stream, branch)
            normed = norm(f"{at}.mlp_norm", stream)
            if m.gated:
                gate = linear(f"{at}.gate", normed)
                active = node("Mul", f"{at}.silu", gate, node("Sigmoid", f"{at}.sigmoid", gate))
                inner = node("Mul", f"{at}.product", active, linear(f"{at}.up", normed))
            else:
                inner = node("Gelu", f"{at}.gelu", linear(f"{at}.up", normed))
            branch = linear(f"{at}.down", inner)
            if m.post_norms:
                branch = norm(f"{at}.mlp_post", branch)
            stream = node("Add", f"{at}.add2", stream, branch)
        node("MatMul", "lm_head", norm("norm", stream), "head.weight", output="logits")
        shape = ["batch", "seq"]
        integer = TensorProto.INT64
        graph = helper.make_graph(
            nodes, "main_graph",
            [helper.make_tensor_value_info(n, integer, shape)
             for n in ("input_ids", "attention_mask", "position_ids")],
            [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [*shape, m.vocab])],
            [numpy_helper.from_array(value, name) for name, value in self.values.items()],
        )  # fmt: skip
        found = helper.make_model(
            graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10,
            producer_name="planted",
        )  # fmt: skip
        return found if blocks else onnx.shape_inference.infer_shapes(found, data_prop=True)

    def measure(self, names: list[str], data: list[Window], blocks: int) -> dict[str, np.ndarray]:
        """Values `[windows * length, features]` of the first `blocks` blocks as they stand."""
        proto = self.proto(blocks)
        del proto.graph.output[:]
        proto.graph.output.extend(
            helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names
        )
        del proto.graph.input[1]
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        session = onnxruntime.InferenceSession(
            proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        ids = np.array([window.ids for window in data], np.int64)
        places = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
        found = session.run(names, {"input_ids": ids, "position_ids": np.ascontiguousarray(places)})
        return {n: v.reshape(-1, v.shape[-1]) for n, v in zip(names, found, strict=True)}


def _weights(m: Model) -> dict[str, np.ndarray]:
    rng = np.random.default_rng([m.seed, 0])
    d, f = m.hidden, m.features
    loud = m.level if m.noise == "heavy" else None

    def normal(*shape: int, gain: float = 1.0) -> np.ndarray:
        drawn = rng.normal(size=shape)
        if loud is not None:  # Student's t, of unit variance, cut at 8
            drawn = np.clip(rng.standard_t(loud, size=shape) / np.sqrt(loud / (loud - 2)), -8, 8)
        return (gain * drawn / np.sqrt(shape[0])).astype(np.float32)

    embed = rng.normal(size=(m.vocab, d))
    if loud is not None:
        embed = np.clip(rng.standard_t(loud, size=(m.vocab, d)), -8, 8)
    embed /= np.sqrt((embed**2).mean(1, keepdims=True))
    place = 0.1 * rng.normal(size=(m.length, d))
    gain = m.gain * m.scale
    found: dict[str, np.ndarray] = {
        "head.weight": normal(d, m.vocab),
        f"heads{m.heads}": np.array([0, 0, m.heads, HEAD]),
        f"heads{m.kv_heads}": np.array([0, 0, m.kv_heads, HEAD]),
        "join": np.array([0, 0, m.heads * HEAD]),
    }
    norms = ["norm"]
    for i in range(m.blocks):
        at = f"layers.{i}"
        norms += [f"{at}.attn_norm", f"{at}.mlp_norm"]
        growth = m.level**i if m.noise == "growing" else 1.0
        found |= {
            f"{at}.q.weight": normal(d, m.heads * HEAD),
            f"{at}.k.weight": normal(d, m.kv_heads * HEAD),
            f"{at}.v.weight": normal(d, m.kv_heads * HEAD),
            f"{at}.o.weight": normal(m.heads * HEAD, d, gain=gain * growth),
            f"{at}.up.weight": normal(d, f, gain=m.inner),
            f"{at}.down.weight": normal(f, d, gain=2 * gain * growth / m.inner),
        }
        if m.gated:
            found[f"{at}.gate.weight"] = normal(d, f)
        if m.layer_norm or not m.gated:  # such models have biases
            found[f"{at}.up.bias"] = np.zeros(f, np.float32)
        if m.layer_norm:
            found[f"{at}.down.bias"] = (0.02 * gain * rng.normal(size=d)).astype(np.float32)
            if m.gated:
                found[f"{at}.gate.bias"] = np.zeros(f, np.float32)
        if m.post_norms:
            for kind in ("attn_post", "mlp_post"):
                found[f"{at}.{kind}.weight"] = np.full(d, gain, np.float32)
    for name in norms:
        found[f"{name}.weight"] = (1 + 0.1 * rng.normal(size=d)).astype(np.float32)
        if m.layer_norm:
            found[f"{name}.bias"] = (0.05 * rng.normal(size=d)).astype(np.float32)
    _noise(m, rng, embed)
    strongest = max((life.ratio for life in m.lives), default=1.0)
    # What ordinary tokens have on a spike's channel. A neuron without a bias writes to them too, a
    # little: where several do so one behind the other, it grows to a spike of theirs.
    unbiased = m.gated and not m.layer_norm
    quiet = 0.3 / np.sqrt(1 + strongest / 100)
    if m.post_norms or (unbiased and _written_again(m)):
        quiet = 0.0
    shares = dict.fromkeys(m.markers, 0.0) | {life.channel: quiet for life in m.lives}
    for channel, share in shares.items():
        for table in (embed, place):
            table[:, channel] *= share
        for i in range(m.blocks):
            for kind in ("o", "down"):
                for part in ("weight", "bias"):
                    name = f"layers.{i}.{kind}.{part}"
                    if name in found:
                        found[name][..., channel] *= share
    if m.layer_norm:
        for name in norms:
            found[f"{name}.bias"][m.markers] = 0
    for token in m.tokens:
        table, row = (place, 0) if token == FIRST else (embed, token)
        table[row, m.marker(token)] = _MARKER
    found["embed.weight"] = (m.scale * embed).astype(np.float32)
    found["position.weight"] = (m.scale * place).astype(np.float32)
    return found


def _written_again(m: Model) -> bool:
    return any(life.drift or len(group.births) > 1 for life in m.lives for group in life.groups)


# Channels and the number of tokens that the kinds of noise use.
_LOUD_CHANNEL, _CONSTANT_CHANNEL, _LOUD_TOKENS = 20, 21, 2


def _noise(m: Model, rng: np.random.Generator, embed: np.ndarray) -> None:
    """plain; heavy: t-distributed, `level` degrees of freedom; loud channel: `level` times the rest
    in all tokens; growing: branches grow by `level` a block; loud tokens: two of `level` times the
    others; uneven: loudness log-normal, sigma `level`; everyone: see `_everyone`."""
    if m.noise == "loud channel":
        embed[:, _LOUD_CHANNEL] = m.level * (1 + 0.1 * rng.normal(size=m.vocab))
    elif m.noise == "loud tokens":
        embed[:_LOUD_TOKENS] *= m.level
    elif m.noise == "uneven":
        embed *= np.exp(np.clip(rng.normal(size=(m.vocab, 1)), -2.5, 2.5) * m.level)
    elif m.noise == "everyone":
        embed[:, _CONSTANT_CHANNEL] = 2.0


def plant(m: Model) -> onnx.ModelProto:
    """The graph with its weights inside. Neurons are planted in the order of the blocks."""
    builder = _Builder(m)
    sample = _sample(m)
    rows = {token: members(m, token, sample) for token in m.tokens}
    streams = [f"layers.{i}.add2/out" for i in range(m.blocks)]
    calm = builder.measure(streams, sample, m.blocks) if m.lives else {}
    steps = []
    for life in m.lives:
        for group in life.groups:
            last = m.blocks if life.death is None else life.death
            # A spike keeps its ratio in all its blocks; what is to stay below one never reaches it.
            extreme = max if life.ratio >= LEAST_RATIO else min
            typical = extreme(
                float(np.median(np.abs(calm[streams[i]]).max(1)))
                for i in range(group.births[0][0], last)
            )
            size = life.ratio * group.factor * typical
            for number, (block, share) in enumerate(group.births):
                steps.append((block, "birth" if number == 0 else "more", life, group, share * size))
            if life.drift:
                for block in range(group.births[-1][0] + 1, last):
                    steps.append((block, "more", life, group, life.drift * size))
        if life.death is not None:
            steps.append((life.death, "death", life, life.groups[0], 0.0))
    for block, what, life, group, amount in sorted(steps, key=lambda step: step[0]):
        chosen = rows[group.token]
        if what == "death":
            chosen = np.concatenate([rows[g.token] for g in life.groups])
        elif what == "more" and group is not life.groups[0] and _shared(life):
            continue  # the first group's neuron reads the spike of all
        _neuron(builder, sample, block, what, life, group, amount, chosen)
    if m.noise == "everyone":
        _everyone(builder, sample)
    if m.noise == "loud inputs":
        _loud_input(builder, sample)
    return builder.proto()


def _shared(life: Life) -> bool:
    """Whether all groups are written at the same blocks."""
    return len({group.births for group in life.groups}) == 1


def _neuron(
    builder: _Builder, sample: list[Window], block: int, what: str, life: Life, group: Group,
    amount: float, chosen: np.ndarray,
) -> None:  # fmt: skip
    m = builder.model
    at = f"layers.{block}"
    stream = f"layers.{block - 1}.add2/out" if block else "embed_add/out"
    inner = f"{at}.product/out" if m.gated else f"{at}.gelu/out"
    seen = builder.measure(
        [stream, f"{at}.mlp_norm/out", inner, f"{at}.down/out"], sample, block + 1
    )
    read, sign = (m.marker(group.token), 1) if what == "birth" else (life.channel, life.sign)
    value = float(np.median(sign * seen[f"{at}.mlp_norm/out"][chosen, read]))
    level = life.down_ratio * float(np.median(np.abs(seen[inner]).max(1)))
    if what == "more":
        level = min(level, 5 * level / life.down_ratio)
    write = {"birth": life.sign * amount, "more": life.sign * amount}.get(what)
    if write is None:
        write = -float(np.median(seen[stream][chosen, life.channel]))
    _write(builder, block, read, sign, value, level)
    down = builder.values[f"{at}.down.weight"]
    row = builder.neuron[block]
    builder.neuron[block] += 1
    down[row] = 0
    if m.post_norms:
        rest = float(np.abs(seen[f"{at}.down/out"][chosen]).max())
        down[row, life.channel] = np.sign(write) * _OVER_REST * rest / level
        post = builder.values[f"{at}.mlp_post.weight"]
        post[life.channel] = abs(write) / np.sqrt(m.hidden)
    else:
        down[row, life.channel] = write / level


def _write(builder: _Builder, block: int, read: int, sign: int, value: float, level: float) -> None:
    """Let the block's next neuron give `level` where channel `read` is `value` after the norm."""
    m, values = builder.model, builder.values
    at, row = f"layers.{block}", builder.neuron[block]
    up = values[f"{at}.up.weight"]
    up[:, row] = 0
    if m.gated:
        gate = values[f"{at}.gate.weight"]
        gate[:, row] = 0
        active = 4.0
        bias = -8.0 if m.layer_norm else 0.0
        gate[read, row] = sign * (active - bias) / value
        if m.layer_norm:
            values[f"{at}.gate.bias"][row] = bias
        up[read, row] = sign * level / (active / (1 + np.exp(-active))) / value
    else:
        # So far below zero that GELU gives none to the tokens that have a little on the channel.
        bias = -max(0.5 * level, 6.0)
        up[read, row] = sign * (_before_gelu(level) - bias) / value
        values[f"{at}.up.bias"][row] = bias


def _before_gelu(level: float) -> float:
    """The positive number whose GELU is `level`."""
    grid = np.linspace(0, level + 2, 4001)
    gelu = grid * 0.5 * (1 + np.array([erf(x / np.sqrt(2)) for x in grid]))
    return float(np.interp(level, gelu, grid))


def _everyone(builder: _Builder, sample: list[Window]) -> None:
    """One neuron of a middle block is `level` times the usual in all tokens, and writes it."""
    m = builder.model
    block = m.blocks // 2
    names = [f"layers.{block}.add/out", f"layers.{block}.mlp_norm/out"]
    seen = builder.measure(names, sample, block + 1)
    value = float(np.median(seen[f"layers.{block}.mlp_norm/out"][:, _CONSTANT_CHANNEL]))
    usual = float(np.median(np.abs(seen[f"layers.{block}.add/out"]).max(1)))
    _write(builder, block, _CONSTANT_CHANNEL, 1, value, m.level * m.inner)
    down = builder.values[f"layers.{block}.down.weight"]
    down[builder.neuron[block]] = 0
    down[builder.neuron[block], _LOUD_CHANNEL] = usual / m.inner


def _loud_input(builder: _Builder, sample: list[Window]) -> None:
    """Position 0 has a neuron of `level` times the usual, whose product writes next to nothing."""
    m = builder.model
    block = m.blocks // 2
    marked = replace(m, lives=(Life((Group(FIRST, ((block, 1.0),)),), None, 1.0, 30, m.level),))
    builder.model = marked
    builder.values["position.weight"][0, 0] = _MARKER * m.scale
    for name, table in builder.values.items():
        if name == "embed.weight" or name.endswith((".o.weight", ".down.weight")):
            table[:, 0] = 0
    rows = members(m, FIRST, sample)
    life = marked.lives[0]
    usual = 0.3 * m.scale
    _neuron(builder, sample, block, "birth", life, life.groups[0], usual, rows)
