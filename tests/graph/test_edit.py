"""Constants that passes share are not those that a file happens to call so."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from iq_export.graph.edit import constant, shared_constant


def test_a_constant_of_the_same_name_is_not_another_one() -> None:
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 23})
    theirs = constant(graph, "two", np.array(3.0, np.float32))
    ours = shared_constant(graph, "two", np.array(2.0, np.float32))
    assert ours is not theirs and ours.name == "two_"
    assert shared_constant(graph, "two", np.array(2.0, np.float32)) is ours
    assert shared_constant(graph, "two", np.array(3.0, np.float32)) is theirs
