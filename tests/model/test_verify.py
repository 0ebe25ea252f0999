"""A right graph is taken whatever float32 makes of the model, and a wrong one is not.

All families and all mutations: test_verify_heavy.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from iq_export.errors import ModelError
from iq_export.model.arithmetic import float64, jittered
from iq_export.model.verify import TOLERANCE, Parity, Reference, compare, refer
from tests.model import families, parity
from tests.model.mutations import mutations

# Each kind of defect once: those of one size, far above and just above what must be caught.
CAUGHT = (
    "weight x (1 + 0.001)", "norm x (1 + 1e-05)", "attention scale x (1 + 0.0001)",
    "frequencies x (1 + 0.1)", "frequencies by half", "final norm dropped", "one row x 1.1",
    "one embedding x 1.1", "heads swapped", "epsilon x 10", "rotation interleaved",
    "positions of later chunks off by one", "keys of the past rolled by one",
    "values of the past rolled by one", "next token seen", "window + 1", "window - 1",
    "window dropped",
)  # fmt: skip


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Reference]:
    """The graph of a model whose sliding window is longer than any row, and its reference."""
    model = families.model("mistral-wide")
    return parity.export(model, tmp_path_factory.mktemp("wide")), refer(model)


def mutated(path: Path, name: str, window: int | None) -> Path:
    graph = ir.load(path)
    assert dict(mutations(window))[name](graph.graph), name
    other = path.with_name("mutated.onnx")
    ir.save(graph, other)
    return other


def test_ids_that_can_be_looked_up() -> None:
    """A table may be narrower than the logits."""
    model = families.model("mistral-wide")
    table = model.get_input_embeddings()
    table.weight.data = table.weight.data[:5]
    reference = refer(model)
    assert max(row.ids.max() for row in reference.rows) < 5
    assert reference.exact[0].shape[1] == families.VOCAB


def test_a_right_graph_is_within_the_noise(wide: tuple[Path, Reference]) -> None:
    found = compare(*wide)
    assert found.holds and found.ratio < 3
    assert found.largest < 1e-5


@pytest.mark.parametrize("name", CAUGHT)
def test_a_wrong_graph_is_caught(name: str, wide: tuple[Path, Reference]) -> None:
    path, reference = wide
    assert not compare(mutated(path, name, 200), reference).holds


def test_what_the_rows_reach(wide: tuple[Path, Reference]) -> None:
    """Text with BOS and without, positions to the end of the table, and past the window."""
    rows = wide[1].rows
    assert any(row.ids[0] == 1 for row in rows)
    assert max(int(row.positions.max()) for row in rows) == 255
    assert max(row.past[0].shape[2] for row in rows if row.past) > 200


def test_positions_beyond_the_original_length_of_a_rotation() -> None:
    model = families.model("llama+llama3")
    tops = {int(row.positions.max()) for row in refer(model).rows}
    assert max(tops) > families.ORIGINAL


@pytest.mark.parametrize("name", ("phi3+longrope", "llama+dynamic"))
def test_a_rotation_that_changes_is_right_up_to_its_limit(name: str, tmp_path: Path) -> None:
    """And is what transformers takes for any length up to there."""
    model = families.model(name)
    found = compare(parity.export(model, tmp_path), refer(model))
    assert found.holds
    kinds = {module.rope_type for module in model.modules() if hasattr(module, "rope_type")}
    assert kinds == {name.partition("+")[2]}  # as it was before the trace


def test_float64_is_float64_everywhere() -> None:
    """`model.double()` still rounds in norms, softmax and rotations."""
    model = families.model("llama")
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        with float64():
            exact = model(input_ids=ids, use_cache=False).logits
        with float64():
            again = model(input_ids=ids, use_cache=False).logits
        single = model(input_ids=ids, use_cache=False).logits
        half_way = model.double()(input_ids=ids, use_cache=False).logits
    assert exact.dtype == torch.float64 and torch.equal(exact, again)
    assert 0 < (half_way - exact).abs().max() < 1e-4
    assert 0 < (single - exact).abs().max() < 1e-4
    assert model.lm_head.weight.dtype == torch.float64  # of .double(); float64() left it alone


def test_jitter_is_rounding_and_no_more() -> None:
    model = families.model("opt")  # counts positions in float32
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        plain = model(input_ids=ids, use_cache=False).logits
        with jittered(1):
            moved = model(input_ids=ids, use_cache=False).logits
        with jittered(1):
            same = model(input_ids=ids, use_cache=False).logits
    assert torch.equal(moved, same)
    assert 0 < (moved - plain).abs().max() < 1e-5 * (plain.max() - plain.min())


def test_logits_that_are_not_finite_are_the_models_fault() -> None:
    model = families.model("llama")
    model.model.layers[1].mlp.up_proj.weight[3, 3] = float("nan")
    with pytest.raises(ModelError, match=r"own logits are not finite.*'llama'"):
        refer(model)


@pytest.mark.parametrize(
    ("found", "holds"),
    (
        (Parity(1e-3, 1e-3, 1e-3, "here"), True),
        (Parity(TOLERANCE * 1.01e-6, 1e-6, 1e-5, "here"), False),
        (Parity(np.inf, 1.0, np.inf, "here"), False),
    ),
)
def test_the_measure_is_the_models_own_noise(found: Parity, holds: bool) -> None:
    assert found.holds is holds


def test_what_cannot_be_traced_is_one_sentence(capfd: pytest.CaptureFixture[str]) -> None:
    model = families.model("llama")
    forward = model.forward

    def branching(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs) if int(kwargs["input_ids"].sum()) >= 0 else None

    model.forward = branching
    with pytest.raises(ModelError) as caught:
        parity.export(model, Path("unused"))
    said = str(caught.value)
    assert "'llama' cannot be traced: its code branches on the values of its inputs" in said
    assert "\n" not in said and said.endswith(".")
    assert capfd.readouterr().err == ""  # nothing of torch's log
