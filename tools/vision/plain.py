"""Static int8 without anything else: ranges of a calibration, round to nearest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from tools.vision.plant import each

Array = NDArray[np.float32]

_CODES = 127


def products(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The products of activations with stored weights."""
    stored = {tensor.name for tensor in graph.initializer}
    return [node for node in graph.node if node.op_type == "MatMul" and node.input[1] in stored]


def round_to_nearest(path: Path, out: Path, pictures: Array) -> float:
    """Write the model with every product in W8A8: one scale per tensor of activations, of its
    largest magnitude on `pictures`, and one per output channel of a weight.

    Returns the mean over the products of the largest magnitude over the root mean square.
    """
    model = onnx.load(path)
    graph = model.graph
    inputs = list(dict.fromkeys(node.input[0] for node in products(graph)))
    largest, square = _magnitudes(model, inputs, pictures)
    weights = {tensor.name: tensor for tensor in graph.initializer}
    for node in products(graph):
        tensor = weights[node.input[1]]
        values = numpy_helper.to_array(tensor)
        scale = np.maximum(np.abs(values).max(axis=0), np.finfo(np.float32).tiny) / _CODES
        rounded = np.float32(np.clip(np.round(values / scale), -_CODES, _CODES) * scale)
        tensor.CopyFrom(numpy_helper.from_array(rounded, tensor.name))
    zero = numpy_helper.from_array(np.int8(0), "rtn.zero")
    graph.initializer.append(zero)
    for number, name in enumerate(inputs):
        scale_name = f"rtn.{number}.scale"
        graph.initializer.append(
            numpy_helper.from_array(np.float32(largest[number] / _CODES), scale_name)
        )
        rounded_name = f"rtn.{number}.out"
        readers = [node for node in products(graph) if node.input[0] == name]
        at = min(list(graph.node).index(node) for node in readers)
        for node in readers:
            node.input[0] = rounded_name
        for offset, made in enumerate((
            helper.make_node("QuantizeLinear", [name, scale_name, "rtn.zero"], [f"rtn.{number}"]),
            helper.make_node(
                "DequantizeLinear", [f"rtn.{number}", scale_name, "rtn.zero"], [rounded_name]
            ),
        )):  # fmt: skip
            graph.node.insert(at + offset, made)
    onnx.save(model, out)
    return float(np.mean(largest / np.sqrt(square)))


def _magnitudes(model: onnx.ModelProto, names: list[str], pictures: Array) -> tuple[Array, Array]:
    """Largest magnitude and mean square of each tensor, `[len(names)]`."""
    largest, square = np.zeros(len(names)), np.zeros(len(names))
    for values in each(model, names, pictures):
        largest = np.maximum(largest, [np.abs(value).max() for value in values])
        square += [np.square(value).mean() / len(pictures) for value in values]
    return np.float32(largest), np.float32(square)
