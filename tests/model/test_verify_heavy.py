"""Every family: its right graph is taken, and every defect that shows in float64 is caught.

One command prints the table of docs/parity.md:

    .venv/bin/python -m pytest tests/model/test_verify_heavy.py -m heavy -s
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from iq_export.errors import GraphError
from iq_export.model.capture import mask_plan
from iq_export.model.verify import Reference, _graph_logits, compare, refer
from tests.model import families, parity
from tests.model.mutations import DoubleGraph, mutations

pytestmark = [pytest.mark.slow, pytest.mark.heavy]

# What a defect must change in float64, in multiples of the model's own float32 noise.
BAR = 10.0
# Weights of these standard deviations: the second makes float32's own error ten times as large.
RIGHT = [(name, 0.1, 7) for name in families.TRACED]
RIGHT += [(name, 0.6, 11) for name in families.TRACED]


def change(path: Path, reference: Reference) -> float:
    """How far a graph is from the model in float64: the most noise-sized steps of any token."""
    found = _graph_logits(DoubleGraph(path), reference.rows)
    rows = zip(found, reference.exact, reference.noise, strict=True)
    return max(float((np.abs(f - exact).max(-1) / noise).max()) for f, exact, noise in rows)


@pytest.mark.parametrize(("name", "noise", "seed"), RIGHT)
def test_a_right_graph_is_taken(name: str, noise: float, seed: int, tmp_path: Path) -> None:
    model = families.model(name, noise=noise, seed=seed)
    reference = refer(model)
    found = compare(parity.export(model, tmp_path), reference)
    own = np.concatenate(reference.noise).max() / reference.logit_range
    print(f"\n{name} {noise}: {found.ratio:.2f} x noise, noise up to {own:.1e} of the range")
    assert found.holds
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("name", families.TRACED)
def test_every_defect_that_shows_is_caught(name: str, tmp_path: Path) -> None:
    model = families.model(name)
    reference, path = refer(model), parity.export(model, tmp_path)
    missed, shown, made = [], 0, 0
    for mutation, mutate in mutations(mask_plan(model).window):
        graph = ir.load(path)
        if not mutate(graph.graph):
            continue
        ir.save(graph, path.with_name("mutated.onnx"))
        made += 1
        size = change(path.with_name("mutated.onnx"), reference)
        try:
            caught = not compare(path.with_name("mutated.onnx"), reference).holds
        except GraphError:
            caught = True
        shown += size > BAR
        if size > BAR and not caught:
            missed.append((mutation, size))
    print(f"\n{name}: {made} defects, {shown} above {BAR:g} x noise, {len(missed)} missed")
    assert not missed and shown > made / 2
