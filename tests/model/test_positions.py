"""How models are told positions: by a number that is added, or in the place of what they count."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from iq_export.errors import ModelError
from iq_export.graph.vocabulary import position_rows
from iq_export.model.positions import Positions, positions_of
from iq_export.model.verify import compare, refer
from tests.model import families, parity


def test_a_model_without_a_table_is_not_called(monkeypatch: pytest.MonkeyPatch) -> None:
    model = families.model("llama")
    monkeypatch.setattr(type(model), "__call__", None)
    assert positions_of(model) == Positions()


@pytest.mark.parametrize(("name", "rows"), [("gpt2", 256), ("opt", 256), ("bert", 256)])
def test_what_models_count_themselves_is_what_they_take(name: str, rows: int) -> None:
    found = positions_of(families.model(name))
    assert (found, found.as_counted) == (Positions(rows=rows), True)


def test_what_is_counted_behind_the_pad_is_handed_over_so() -> None:
    """Its pad is token 3, so the first position is 4."""
    assert positions_of(families.model("roberta")) == Positions(shift=4, rows=252)


def test_a_table_is_found_and_told_the_positions() -> None:
    model = families.model("bart")
    found = positions_of(model)
    (table, first), ids = found.tables[0], torch.tensor([[5, 6, 7]])
    assert (len(found.tables), first, found.rows) == (1, 2, 256)
    assert table is model.model.decoder.embed_positions
    with torch.no_grad():
        counted = model(ids).logits
        with found.given(torch.arange(3)[None]) as told:
            same = model(ids, **told).logits
        with found.given(torch.tensor([[0, 7, 9]])) as told:
            other = model(ids, **told).logits
        after = model(ids).logits
    assert torch.equal(counted, same) and torch.equal(counted, after)
    assert torch.allclose(counted[:, 0], other[:, 0]) and not torch.allclose(counted, other)


def test_a_model_without_positions_is_refused() -> None:
    with pytest.raises(ModelError, match="'bloom' takes no 'position_ids' and looks none up"):
        positions_of(families.model("bloom"))


@pytest.mark.parametrize("name", ["bart", "roberta"])
def test_a_padded_row_is_what_the_model_says_to_it_alone(name: str, tmp_path: Path) -> None:
    model = families.model(name)
    path = parity.export(model, tmp_path)
    assert compare(path, refer(model)).holds
    assert position_rows(path) == positions_of(model).rows
