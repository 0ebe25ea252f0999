"""A walk gives the graph's own values, piece by piece, whatever the pieces are."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from iq_export.errors import EngineError, GraphError
from iq_export.observe import walk as walking
from iq_export.observe.samples import Window
from iq_export.observe.segments import segments
from iq_export.observe.walk import Graph, walk
from iq_export.passes.to_half import to_half
from iq_export.progress import Progress
from iq_export.run import ort
from iq_export.run.ort import CausalLM
from tests import planted
from tests.planted import Planted

RESIDUAL, DOWN = "layers.2/Add_2/out", "layers.2/mlp/Mul/out"
INDEX = "iq.sinks.0.index"


def run(graph: Graph, names: Sequence[str], windows: list[Window], **options: Any) -> Any:
    options.setdefault("progress", Progress(quiet=True))
    return list(walk(graph, names, windows, **options))


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut wherever a graph can be cut."""
    monkeypatch.setitem(segments.__kwdefaults__, "budget", 1)


def test_values_are_those_of_the_graph(spiky: Planted) -> None:
    """The graph is cut behind the last value; all are as in a full run."""
    windows = spiky.windows[:3]
    model = spiky.load()
    model.graph.outputs.extend(
        value for node in model.graph for value in node.outputs if value.name in (RESIDUAL, DOWN)
    )
    whole = CausalLM(spiky.save_beside(model, "whole.onnx"), extra_outputs=[RESIDUAL, DOWN])
    found = run(spiky.path, [RESIDUAL, DOWN], windows)
    assert [number for number, _ in found] == [0, 1, 2]
    for number, values in found:
        ids = np.array([windows[number].ids])
        step = whole.forward(ids, np.ones_like(ids), np.arange(ids.shape[1])[None])
        for name in (RESIDUAL, DOWN):
            assert values[name].shape == (ids.shape[1], 64 if name == RESIDUAL else 128)
            np.testing.assert_allclose(values[name], step.extras[name][0], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("half", [False, True])
def test_pieces_give_what_the_whole_gives(
    spiky: Planted, monkeypatch: pytest.MonkeyPatch, half: bool
) -> None:
    """The index of sinks too, which is made in one piece and read in later ones."""
    model = spiky.load_inserted()
    if half:
        to_half(model)
    names = [*(block.mlp.residual for block in spiky.sites.blocks), "logits"]

    def found() -> dict[tuple[int, str], np.ndarray]:
        runs = run(model, names, spiky.windows[:3], always=[INDEX], round_half=half)
        return {(number, name): v for number, values in runs for name, v in values.items()}

    whole = found()
    assert len(segments(model.graph)) == 1
    monkeypatch.setitem(segments.__kwdefaults__, "budget", 1)
    assert len(segments(model.graph)) > 2 * len(spiky.sites.blocks)
    pieces = found()
    assert pieces.keys() == whole.keys() and (0, INDEX) in whole
    for key, value in whole.items():
        np.testing.assert_allclose(pieces[key], value, rtol=1e-4, atol=2e-2 if half else 1e-4)


def test_between_pieces_is_one_activation(spiky: Planted) -> None:
    """The residual stream, and the index where it is still to be read."""
    graph = spiky.load_inserted().graph
    pieces = segments(graph, budget=1)
    for before, after in pairwise(pieces):
        assert before.kept == after.carried
        assert len([name for name in after.carried if name != INDEX]) == 1
    assert any(INDEX in piece.carried for piece in pieces)
    made = [name for piece in pieces for name in piece.made]
    assert sorted(made) == sorted(v.name for node in graph for v in node.outputs)


def test_one_piece_has_its_weights_in_memory(
    spiky: Planted, small_pieces: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no piece has those of another."""
    model = spiky.load()
    alive: list[weakref.ref[np.ndarray]] = []
    most = 0
    real = ort.model_session

    def counted(part: ir.Model, *args: Any, **options: Any) -> Any:
        nonlocal most
        session = real(part, *args, **options)
        arrays, _ = ort._HELD[session]
        alive.extend(weakref.ref(array) for array in arrays.values())
        gc.collect()
        most = max(most, sum(ref() is not None for ref in alive))
        return session

    for name, value in model.graph.initializers.items():
        tensor = value.const_value
        value.const_value = ir.LazyTensor(
            lambda tensor=tensor: ir.Tensor(tensor.numpy().copy()),
            dtype=tensor.dtype, shape=ir.Shape(tensor.shape.numpy()), name=name,
        )  # fmt: skip
    monkeypatch.setattr(walking, "model_session", counted)
    run(model, ["logits"], spiky.windows[:1])
    assert len(alive) > 20
    assert most <= 5


def test_weights_of_a_piece_go_with_it(spiky: Planted) -> None:
    """Not with the next collection of garbage, which may come a hundred pieces later."""
    model, weight = spiky.load(), spiky.sites.blocks[0].mlp.output.weight
    value = model.graph.initializers[weight]
    stored, array = value.const_value, value.const_value.numpy().copy()
    alive = weakref.ref(array)
    gc.disable()
    try:
        value.const_value = ir.Tensor(array, name=weight)
        part = walking.cut(model, [], ["logits"])
        value.const_value = stored
        del array
        assert alive() is not None
        with walking.Piece(part, ["logits"], walking.CPU, "the graph") as piece:
            assert alive() is not None
            piece.run(spiky.windows[0], {})
        del part
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="needs Linux' /proc")
def test_a_value_that_is_kept_holds_no_more_than_itself() -> None:
    """The index of a sink is carried to the end of the graph: not with it all that its piece
    computed in."""
    rows, width = 512, 1 << 15  # 64 MiB
    table = np.ones((8, 1), np.float32)
    nodes = [
        onnx.helper.make_node("Gather", ["table", "input_ids"], ["narrow"]),
        onnx.helper.make_node("Mul", ["narrow", "ones"], ["wide"]),
        onnx.helper.make_node("Relu", ["wide"], ["wider"]),
        onnx.helper.make_node("ReduceSum", ["wider", "axis"], ["kept"], keepdims=0),
    ]
    constants = {"table": table, "ones": np.ones(width, np.float32), "axis": np.array([2])}
    graph = onnx.helper.make_graph(
        nodes, "g",
        [onnx.helper.make_tensor_value_info("input_ids", onnx.TensorProto.INT64, [1, "seq"])],
        [onnx.helper.make_tensor_value_info("kept", onnx.TensorProto.FLOAT, [1, "seq"])],
        [onnx.numpy_helper.from_array(array, name) for name, array in constants.items()],
    )  # fmt: skip
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10
    )
    window = Window([0] * rows, False)

    def anonymous() -> int:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return 1024 * int(next(line for line in lines if line.startswith("RssAnon")).split()[1])

    def kept() -> np.ndarray:
        with walking.Piece(ir.from_proto(model), ["kept"], walking.CPU, "the graph") as piece:
            return piece.run(window, {})["kept"]

    kept()  # what ONNX Runtime keeps for the process
    before = anonymous()
    value = kept()
    assert value.shape == (1, rows)
    assert anonymous() - before < 4 * rows * width / 4


def test_heads_of_keys_and_values_are_joined(spiky: Planted) -> None:
    """`[batch, heads, seq, head_dim]` comes as its product wrote it, `[seq, features]`."""
    flat, heads = "layers.2/self_attn/v_proj/out", "layers.2/self_attn/v_heads/out"
    for _, values in run(spiky.path, [flat, heads], spiky.windows[:2]):
        np.testing.assert_array_equal(values[heads], values[flat])


def test_windows_may_differ_in_length(spiky: Planted, small_pieces: None) -> None:
    windows = [Window(spiky.windows[0].ids[:length], False) for length in (1, 17, 40)]
    found = run(spiky.path, [RESIDUAL], windows)
    assert [values[RESIDUAL].shape[0] for _, values in found] == [1, 17, 40]


def test_nothing_is_kept_between_windows(spiky: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    """One window's values are handed out before the next window runs."""
    ran: list[int] = []
    feeds = walking.window_feeds
    monkeypatch.setattr(walking, "window_feeds", lambda *a: ran.append(1) or feeds(*a))
    runs = walk(spiky.path, [RESIDUAL], spiky.windows[:5], progress=Progress(quiet=True))
    for expected in (1, 2, 3):
        next(runs)
        assert len(ran) == expected


def test_half_graph_is_seen_in_float32(spiky: Planted) -> None:
    model = spiky.load()
    to_half(model)
    ((_, values),) = run(model, [RESIDUAL], spiky.windows[:1])
    assert values[RESIDUAL].dtype == np.float32


def test_integer_values_stay_integers(spiky: Planted) -> None:
    ((_, values),) = run(spiky.inserted, [INDEX], spiky.windows[:1])
    assert values[INDEX].dtype == np.int32
    assert values[INDEX].tolist() == [1] + [0] * 39


def test_a_model_in_memory_is_not_changed(spiky: Planted) -> None:
    model = spiky.load_inserted()
    before = ir.to_proto(model).SerializeToString()
    run(model, [RESIDUAL], spiky.windows[:1], round_half=True)
    assert ir.to_proto(model).SerializeToString() == before


def test_no_file_is_written(spiky: Planted) -> None:
    before = set(spiky.path.parent.iterdir())
    run(spiky.path, [RESIDUAL], spiky.windows[:1])
    assert set(spiky.path.parent.iterdir()) == before


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_name_the_tensor(tmp_path: Path, bad: float) -> None:
    """Where they first appear among the values asked for: window and position too."""
    decoder = planted.Decoder(blocks=2, spikes=())
    model = planted.proto(decoder)
    tensor = next(t for t in model.graph.initializer if t.name == "embed_tokens.weight")
    table = onnx.numpy_helper.to_array(tensor).copy()
    table[11, 3] = bad
    tensor.CopyFrom(onnx.numpy_helper.from_array(table, tensor.name))
    onnx.save(model, tmp_path / "model.onnx")
    windows = [Window([1, 2, 3], False), Window([4, 5, 11, 6], False)]
    with pytest.raises(GraphError, match=r"'embed/out'.*NaN or Inf.*window 1, position 2"):
        run(tmp_path / "model.onnx", ["embed/out"], windows)


def test_progress_counts_runs(spiky: Planted) -> None:
    class Counting(Progress):
        seen: list[tuple[int, int]] = []  # noqa: RUF012

        def update(self, done: int, total: int) -> None:
            self.seen.append((done, total))

    progress = Counting(quiet=True)
    run(spiky.path, [RESIDUAL, DOWN], spiky.windows[:2], progress=progress)
    assert progress.seen == [(1, 2), (2, 2)]


def test_provider_that_is_missing_is_no_silent_fallback(calm: Planted) -> None:
    runs = walk(
        calm.path, ["logits"], calm.windows[:1],
        providers=("NoSuchExecutionProvider",), progress=Progress(quiet=True),
    )  # fmt: skip
    with pytest.raises(EngineError, match="NoSuchExecutionProvider"):
        next(iter(runs))


def test_only_the_beginning_that_is_wanted_runs(
    spiky: Planted, small_pieces: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind the last value that is wanted of all tokens, those that nobody wants are left out."""
    windows = spiky.windows[:2]
    first = "layers.0/Add_2/out"
    whole = run(spiky.path, [first, RESIDUAL], windows)
    lengths: list[int] = []
    running = walking.Piece.run

    def noted(self: Any, window: Window, *rest: Any) -> Any:
        lengths.append(len(window.ids))
        return running(self, window, *rest)

    monkeypatch.setattr(walking.Piece, "run", noted)

    def reach(name: str, number: int) -> int:
        return walking.WHOLE if name == first else 3 * number

    found = run(spiky.path, [first, RESIDUAL], windows, reach=reach)
    assert lengths[-1] == 3
    assert len(windows[1].ids) in lengths
    ends = {number: values[RESIDUAL] for number, values in found if RESIDUAL in values}
    assert list(ends) == [1]
    (right,) = [values[RESIDUAL] for number, values in whole if number and RESIDUAL in values]
    np.testing.assert_allclose(ends[1][:3], right[:3], rtol=1e-4, atol=1e-3)
    assert len(ends[1]) == 3


def test_equal_beginnings_run_once_and_come_for_each_window(
    spiky: Planted, small_pieces: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = [spiky.windows[0], spiky.windows[1], spiky.windows[0]]
    runs = 0
    running = walking.Piece.run

    def counted(*args: Any) -> Any:
        nonlocal runs
        runs += 1
        return running(*args)

    monkeypatch.setattr(walking.Piece, "run", counted)
    assert len(run(spiky.path, [DOWN], windows)) == 3
    whole, runs = runs, 0
    found = run(spiky.path, [DOWN], windows, reach=lambda *_: 5)
    assert [number for number, _ in found] == [0, 1, 2]
    assert runs == whole // 3 * 2
    np.testing.assert_array_equal(found[0][1][DOWN], found[2][1][DOWN])
    assert not np.array_equal(found[0][1][DOWN], found[1][1][DOWN])
