"""A tiny random encoder of pictures with planted spikes, of the parts of `planted`: patches in the
place of tokens, and neither order nor cache.

The third colour is 0 but in marked patches, wherever they stand: it is their marker, which the MLP
of the birth block makes a spike of.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from iq_export.observe.samples import Whole
from tests.planted import MARKER_VALUE, Decoder, Spike, _attention, _Graph, _mlp, _norm, weights

PATCH, SIDE = 4, 6  # pixels of a patch, patches of a picture's side
SPIKY = Decoder(cache=False, rotary=False, positions=0, spikes=(Spike(1, 3, token=0),))
CALM = Decoder(cache=False, rotary=False, positions=0, spikes=())


def proto(model: Decoder, name: str = "pixel_values") -> onnx.ModelProto:
    """The encoder as a float32 model with its weights inside; `name`: of its input."""
    found = weights(model)
    rng = np.random.default_rng(model.seed)
    seen = rng.normal(size=(model.hidden, 3, PATCH, PATCH)) / PATCH
    seen[:, 2] = 0
    seen[model.special] *= model.quiet
    for spike in model.spikes:
        seen[spike.marker, 2] = MARKER_VALUE / PATCH**2
    found["patch.weight"] = seen.astype(np.float32)
    del found["embed_tokens.weight"]
    g = _Graph(constants=found)
    patches = g.node(
        "Conv", "patch", name, "patch.weight", kernel_shape=[PATCH] * 2, strides=[PATCH] * 2
    )
    shape = g.constant("const.rows", [0, model.hidden, SIDE**2])
    rows = g.node("Reshape", "rows", patches, shape)
    stream = g.node("Transpose", "embed", rows, perm=[0, 2, 1])
    for i in range(model.blocks):
        after = g.node(
            "Add", f"layers.{i}/Add", stream, _attention(g, model, i, stream, None, None)
        )
        stream = g.node("Add", f"layers.{i}/Add_2", after, _mlp(g, model, i, after))
    _norm(g, "norm", stream)
    g.node("Identity", "out", "norm/out", output="last_hidden_state")
    for node in g.nodes:
        kept = [each for each in node.attribute if each.name != "is_causal"]
        del node.attribute[:]
        node.attribute.extend(kept)
    real, side = TensorProto.FLOAT, PATCH * SIDE
    made = helper.make_model(
        helper.make_graph(
            g.nodes, "main_graph",
            [helper.make_tensor_value_info(name, real, ["batch", 3, side, side])],
            [helper.make_tensor_value_info(
                "last_hidden_state", real, ["batch", SIDE**2, model.hidden])],
            [numpy_helper.from_array(value, key) for key, value in g.constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", 23)], ir_version=10, producer_name="planted",
    )  # fmt: skip
    onnx.checker.check_model(made)
    return onnx.shape_inference.infer_shapes(made, data_prop=True)


def save(model: Decoder, folder: Path, name: str = "pixel_values") -> Path:
    """Write the model; `name`: of its input."""
    path = folder / "model.onnx"
    onnx.save(
        proto(model, name), path, save_as_external_data=True, location="model.onnx.data",
        size_threshold=256,
    )  # fmt: skip
    return path


def pictures(count: int = 16, marked: int = 2, seed: int = 1) -> list[np.ndarray]:
    """Pixels `[3, height, width]`, in each `marked` patches at random."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        pixels = rng.normal(size=(3, SIDE * PATCH, SIDE * PATCH)).astype(np.float32)
        pixels[2] = 0
        for place in rng.choice(SIDE**2, marked, replace=False):
            row, column = PATCH * (place // SIDE), PATCH * (place % SIDE)
            pixels[2, row : row + PATCH, column : column + PATCH] = 1
        found.append(pixels)
    return found


def marked_rows(pixels: np.ndarray) -> np.ndarray:
    """Bool `[rows]`: which patches are marked."""
    return pixels[2, ::PATCH, ::PATCH].ravel() > 0


def windows(count: int = 16, marked: int = 2, seed: int = 1) -> list[Whole]:
    """`pictures` as windows."""
    return [Whole(pixels, SIDE**2) for pixels in pictures(count, marked, seed)]
