"""What attention does with sinks, against ONNX Runtime's own weights of attention."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper

from iq_export.graph import io
from iq_export.graph.sites import find_sites
from iq_export.observe.attention import AttentionObserver, Mechanism, _by_pair
from iq_export.observe.token_stats import observe_tokens
from iq_export.observe.walk import observe, window_feeds
from iq_export.progress import Progress
from iq_export.sinks.lifecycle import discover
from tests import planted

BLOCK = 2
_AT = f"layers.{BLOCK}/self_attn"


def looked_at(path: Path, data: list[planted.Window]) -> tuple[Mechanism, list[np.ndarray]]:
    """What is found of the only lifecycle in BLOCK, and who its sinks are in each window."""
    model = io.load(path)
    sites, options = find_sites(model), {"providers": planted.CPU, "progress": Progress(quiet=True)}
    stats = observe_tokens(model, sites, data, **options)
    (life,) = discover(stats)
    sinks = [np.isin(np.flatnonzero(stats.window == n), life.members) for n in range(len(data))]
    observer = AttentionObserver(
        model, sites, [life.insert_blocks], data, [mask[None] for mask in sinks]
    )
    observe(model, [observer], data, **options)
    (found,) = observer.mechanisms()
    return next(each for each in found if each.block == BLOCK), sinks


def reference(path: Path, data: list[planted.Window]) -> list[dict[str, np.ndarray]]:
    """Of each window, as ONNX Runtime computes them: the weights of attention `[heads, seq, seq]`,
    keys before the rotary embedding and values `[heads, seq, size]`, and rows after the norm."""
    proto = onnx.load(path)
    node = next(node for node in proto.graph.node if node.name == f"{_AT}/Attention")
    node.output.extend(["", "", "weights"])
    node.attribute.append(helper.make_attribute("qk_matmul_output_mode", 3))
    names = {"weights": "weights", "query": f"{_AT}/q_rotary/out", "key": f"{_AT}/k_heads/out",
             "rotated": f"{_AT}/k_rotary/out", "value": f"{_AT}/v_heads/out",
             "rows": f"layers.{BLOCK}/input_layernorm/out"}  # fmt: skip
    known = {value.name for value in proto.graph.output}
    for name in {*names.values()} - known:
        proto.graph.output.append(helper.make_empty_tensor_value_info(name))
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=planted.CPU)
    found = []
    for window in data:
        values = session.run(list(names.values()), window_feeds(session, window))
        found.append({kind: value[0] for kind, value in zip(names, values, strict=True)})
    return found


def changed(path: Path, **attributes: float) -> Path:
    """The same model with these attributes of every Attention."""
    proto = onnx.load(path)
    for node in proto.graph.node:
        if node.op_type == "Attention":
            node.attribute.extend(helper.make_attribute(k, v) for k, v in attributes.items())
    onnx.save(proto, path.with_name("changed.onnx"))
    return path.with_name("changed.onnx")


@pytest.mark.parametrize("kind", ["mask", "causal", "softcap"])
def test_numbers_are_those_of_onnx_runtime(kind: str, tmp_path: Path) -> None:
    spikes = planted.WITH_DELIMITER.spikes
    decoder = planted.Decoder(spikes=spikes, cache=kind != "causal")
    path, data = planted.save(decoder, tmp_path), planted.windows(decoder, count=6)
    if kind == "softcap":
        path = changed(path, softcap=2.0)
    found, sinks = looked_at(path, data)
    mass, pairs, positive, cosines = np.zeros(4), 0, np.zeros(4), np.zeros(4)
    tokens, lengths = 0, {True: [], False: []}
    terms = np.zeros((4, 16))
    for run, mask in zip(reference(path, data), sinks, strict=True):
        for token in np.flatnonzero(~mask):
            behind = [s for s in np.flatnonzero(mask) if s <= token]
            if not behind:
                continue
            tokens += 1
            for head in range(4):
                mass[head] += run["weights"][head, token, behind].sum()
                query = run["query"][head, token]
                for sink in behind:
                    key = run["rotated"][head // 2, sink]
                    positive[head] += query @ key > 0
                    cosines[head] += query @ key / np.linalg.norm(query) / np.linalg.norm(key)
                    terms[head] += query * key
            pairs += len(behind)
        for sink in (True, False):
            lengths[sink].append(np.linalg.norm(run["value"][:, mask == sink], axis=2))
    assert np.allclose(found.mass, mass / tokens, rtol=1e-4)
    assert np.allclose(found.aligned, positive / pairs)
    assert np.allclose(found.query_cosine, cosines / pairs, atol=1e-5)
    sink, other = (np.concatenate(lengths[which], axis=1).mean(1) for which in (True, False))
    assert np.allclose(found.value_ratio, sink / other, rtol=1e-4)
    gains = np.maximum(terms[:, :8] + terms[:, 8:], 0)  # pair i: features i and i + 8
    assert found.pair == gains.argmax(1).tolist()
    zones = gains.reshape(4, 4, 2).sum(2) / gains.sum(1, keepdims=True)
    assert np.allclose(found.zones, zones, rtol=1e-3, atol=1e-5)
    assert found.pair_share is not None
    assert np.allclose(found.pair_share, gains.max(1) / gains.sum(1), rtol=1e-3)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_pairs_and_what_is_not_rotated(interleaved: bool) -> None:
    terms = np.array([[1.0, 2.0, -5.0, 0.0, 3.0, 1.0, -4.0, 2.0, 8.0, -9.0]])
    found = _by_pair(terms, (8, interleaved))
    # side by side: 3, -5, 4, -2; a half apart: 4, 3, -9, 2; not rotated: 8
    shares = np.array([3, 0, 4, 0]) / 15 if interleaved else np.array([4, 3, 0, 2]) / 17
    assert np.allclose(found["zones"], [shares])
    assert found["pair"] == [int(shares.argmax())]
    assert np.allclose(found["pair_share"], shares.max())
    assert _by_pair(terms, None) == {}


def test_sinks_are_alike_where_others_are_not(tmp_path: Path) -> None:
    decoder = planted.Decoder()
    path, data = planted.save(decoder, tmp_path), planted.windows(decoder, count=8)
    found, sinks = looked_at(path, data)
    assert all(mask.sum() == 1 for mask in sinks)
    assert found.rows_alike is not None and found.rows_alike > 0.99
    assert found.rows_alike_others is not None and abs(found.rows_alike_others) < 0.5
    assert found.keys_alike is not None and found.keys_alike_others is not None
    assert min(found.keys_alike) > 0.99 and max(found.keys_alike_others) < 0.5


def test_the_same_first_token_is_one_row(tmp_path: Path) -> None:
    """Windows with a BOS would make any sink look constant."""
    decoder = planted.Decoder()
    path = planted.save(decoder, tmp_path)
    data = [planted.Window([3, *w.ids[1:]], False) for w in planted.windows(decoder, count=8)]
    found, _ = looked_at(path, data)
    assert found.rows_alike is None and found.keys_alike is None


def test_energy_of_a_row_on_the_value_weight(tmp_path: Path) -> None:
    """A weight that reads one channel only passes what a sink, which is all on another, lacks."""
    decoder = planted.Decoder()
    values = planted.weights(decoder)
    channel = decoder.spikes[0].channel
    values[f"layers.{BLOCK}.self_attn.v_proj.weight"][channel] = 0
    path, data = planted.save(decoder, tmp_path, values), planted.windows(decoder, count=4)
    found, _ = looked_at(path, data)
    assert found.spectrum is not None
    sums = {
        name: np.add(spectrum["upper"], spectrum["lower"])
        for name, spectrum in found.spectrum.items()
    }
    # A head reads 16 of 64 directions.
    assert sums["sinks"].max() < 0.01 and 0.1 < sums["others"].min() < sums["others"].max() < 0.5
    assert np.greater(found.spectrum["others"]["upper"], 0.02).all()
