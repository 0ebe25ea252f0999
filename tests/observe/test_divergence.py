"""The calibration loss: KL to the traced graph, with and without the sinks' own predictions."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from iq_export.observe.divergence import divergence
from iq_export.observe.loss import log_softmax
from iq_export.observe.tail import Tail
from iq_export.passes.insert_sinks import index_name, insert_sinks
from iq_export.progress import Progress
from iq_export.run.ort import CausalLM
from iq_export.sinks.templates import KV
from tests.planted import CPU, Planted, logits

OPTIONS = {"providers": CPU, "progress": Progress(quiet=True)}


def exact(data: Planted, windows: int) -> Iterator[np.ndarray]:
    return Tail.of_graph(data.path, data.windows[:4], **OPTIONS).results(data.windows[:windows])


def test_a_graph_is_no_distance_from_itself(spiky: Planted) -> None:
    found = divergence(exact(spiky, 2), spiky.path, spiky.windows[:2], [], **OPTIONS)
    assert found.kl == found.kl_semantic == 0


def test_values(spiky: Planted) -> None:
    """Against float64, on the kv form, which gives a sink's own prediction away."""
    model = spiky.load()
    insert_sinks(model, spiky.sites, [replace(s, form=KV) for s in spiky.sinks])
    path = spiky.save_beside(model, "kv.divergence.onnx")
    windows = spiky.windows[:3]
    found = divergence(exact(spiky, 3), path, windows, [index_name(0)], **OPTIONS)
    kl, nll = [], []
    for window in windows:
        rows = (logits(CausalLM(x), [window.ids])[0, :-1] for x in (spiky.path, path))
        p, q = (log_softmax(found, np.float64) for found in rows)
        kl.append((np.exp(p) * (p - q)).sum(-1))
        nll.append(-q[np.arange(len(window.ids) - 1), window.ids[1:]])
    assert found.kl == pytest.approx(np.mean(kl), rel=1e-3)
    assert found.kl_semantic == pytest.approx(np.mean([row[1:] for row in kl]), abs=1e-5)
    assert found.nll == pytest.approx(np.mean(nll), rel=1e-5)
    assert found.kl > 100 * abs(found.kl_semantic)
