from __future__ import annotations

import pytest

from iq_export.engine.targets import (
    ENTERPRISE,
    RTX,
    TARGETS,
    check_opset,
    check_recipe,
    check_tensorrt_opset,
    resolve_target,
)
from iq_export.errors import EngineError, UsageError


def test_rtx_all_is_one_plan_for_ampere_and_later() -> None:
    target = resolve_target("rtx-all")
    assert target.compute_capabilities == (80, 86, 89, 120)
    assert target.flavour == RTX
    assert target.portable


def test_names_are_not_case_sensitive() -> None:
    assert resolve_target("RTX-Ampere") is TARGETS["rtx-ampere"]


@pytest.mark.parametrize(
    ("typo", "meant"), [("rtx-amper", "rtx-ampere"), ("orin-nano", "orin"), ("h10", "h100")]
)
def test_unknown_target_suggests_the_nearest(typo: str, meant: str) -> None:
    with pytest.raises(UsageError, match=f"unknown target '{typo}': did you mean .*{meant}"):
        resolve_target(typo)


def test_unknown_target_without_a_near_one_lists_all() -> None:
    with pytest.raises(UsageError, match="known targets: rtx-turing, rtx-ampere"):
        resolve_target("zzzzzzzz")


def test_four_bit_weights_are_refused_on_turing_only() -> None:
    refused = []
    for target in TARGETS.values():
        check_recipe(target, 8)
        try:
            check_recipe(target, 4)
        except UsageError as error:
            refused.append(target.name)
            assert "sm_75" in str(error)
            assert "w8a8" in str(error)
    assert refused == ["rtx-turing"]


@pytest.mark.parametrize(
    ("name", "int4"),
    [("rtx-turing", False), ("a100", True), ("orin", True), ("thor", True), ("rtx-all", True)],
)
def test_capabilities_follow_the_support_matrix(name: str, int4: bool) -> None:
    assert resolve_target(name).int4_weights == int4


def test_jetpack_6_is_refused_at_opset_23_with_the_reason() -> None:
    with pytest.raises(EngineError, match=r"JetPack 6.*TensorRT 10\.3.*RMSNormalization.*10\.15"):
        check_opset(resolve_target("orin-jetpack6"), 23)
    check_opset(resolve_target("orin-jetpack6"), 21)


def test_current_lines_take_opset_23() -> None:
    for name in ("orin", "thor", "h100", "b200", "rtx-ampere"):
        check_opset(resolve_target(name), 23)
    with pytest.raises(EngineError, match=r"this machine runs TensorRT 10\.14"):
        check_tensorrt_opset((10, 14, 1), 23, "this machine")
    check_tensorrt_opset((11, 1, 0), 23, "this machine")


def test_table_is_consistent() -> None:
    for target in TARGETS.values():
        assert target.flavour in (RTX, ENTERPRISE)
        assert bool(target.tensorrt) == (target.flavour == ENTERPRISE)
        assert target.portable or len(target.compute_capabilities) == 1
