"""The form is chosen by measured loss, and the reason is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from iq_export.decide.forms import TIE_NATS, choose_forms
from iq_export.errors import GraphError
from iq_export.observe.divergence import Divergence
from iq_export.sinks.form import calibrated_form
from iq_export.sinks.templates import KV, NORM, NORM_AND_KV, SinkTemplates
from tests.planted import Planted


def losses(**kl: float) -> dict[str, float]:
    return {name.replace("_", "+"): value for name, value in kl.items()}


class Measured:
    """A loss that is the sum of the forms' own, and how often it was asked for."""

    def __init__(self, *each: dict[str, float]) -> None:
        self.each, self.asked = each, 0

    def __call__(self, sinks: Sequence[SinkTemplates]) -> Divergence:
        self.asked += 1
        kl = sum(loss[s.form] for loss, s in zip(self.each, sinks, strict=True))
        return Divergence(kl, kl, 3.0)


@pytest.fixture
def sinks(spiky: Planted) -> SinkTemplates:
    return spiky.sinks[0]


@pytest.mark.parametrize(
    ("loss", "form"),
    [
        (losses(norm=0.1, norm_kv=0.2, kv=0.3), NORM),
        (losses(norm=0.3, norm_kv=0.1, kv=0.2), NORM_AND_KV),
        (losses(norm=0.3, norm_kv=0.2, kv=0.1), KV),
        (losses(norm=0.1 + 0.9 * TIE_NATS, norm_kv=0.1, kv=0.1), NORM),
        (losses(norm=0.1 + 1.1 * TIE_NATS, norm_kv=0.1, kv=0.1), NORM_AND_KV),
    ],
)
def test_the_least_loss_wins_and_ties_change_least(
    sinks: SinkTemplates, loss: dict[str, float], form: str
) -> None:
    chosen, (insertion,) = choose_forms([sinks], "auto", Measured(loss))
    assert chosen[0].form == insertion.form == form
    assert {name: found.kl for name, found in insertion.loss.items()} == loss
    assert f"{loss[form]:.3g} nats" in insertion.reason
    assert ("changes least" in insertion.reason) == (loss[form] > min(loss.values()))


def test_each_lifecycle_chooses_for_itself(sinks: SinkTemplates) -> None:
    measured = Measured(
        losses(norm=0.1, norm_kv=0.2, kv=0.3), losses(norm=0.3, norm_kv=0.2, kv=0.1)
    )
    chosen, insertions = choose_forms([sinks, sinks], "auto", measured)
    assert [s.form for s in chosen] == [i.form for i in insertions] == [NORM, KV]
    assert measured.asked == 5  # what is known is not measured again


@pytest.mark.parametrize(
    ("wanted", "int8_cache", "form"),
    [("norm", False, NORM), ("kv", False, KV), ("norm", True, NORM_AND_KV), ("kv", True, KV)],
)
def test_what_is_asked_for_is_not_measured(
    sinks: SinkTemplates, wanted: str, int8_cache: bool, form: str
) -> None:
    measured = Measured()
    chosen, (insertion,) = choose_forms([sinks], wanted, measured, int8_cache=int8_cache)
    assert (chosen[0].form, insertion.reason, measured.asked) == (form, "asked for", 0)


def test_an_int8_cache_needs_keys_and_values(sinks: SinkTemplates) -> None:
    loss = losses(norm_kv=0.2, kv=0.1)
    (chosen,), _ = choose_forms([sinks], "auto", Measured(loss), int8_cache=True)
    assert chosen.form == KV


def test_decomposed_attention_leaves_the_norm_form(sinks: SinkTemplates) -> None:
    bare = replace(sinks, key_values=None)
    (chosen,), (insertion,) = choose_forms([bare], "auto", Measured())
    assert chosen.form == NORM
    assert "no single Attention op" in insertion.reason
    with pytest.raises(GraphError, match=r"--insertion kv .* blocks 2 to 3"):
        choose_forms([bare], "kv", Measured())
    with pytest.raises(GraphError, match="an int8 KV cache"):
        choose_forms([bare], "norm", Measured(), int8_cache=True)


def test_no_sinks_nothing_to_choose() -> None:
    assert choose_forms([], "auto", Measured()) == ([], [])


def test_blocks_are_calibrated_on_exact_keys_where_they_are_possible(sinks: SinkTemplates) -> None:
    assert calibrated_form(sinks, "auto") == NORM_AND_KV
    assert calibrated_form(sinks, "norm") == NORM
    assert calibrated_form(sinks, "kv") == KV
    assert calibrated_form(replace(sinks, key_values=None), "auto") == NORM
