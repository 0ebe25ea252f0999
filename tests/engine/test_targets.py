from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest

from iq_export.engine.build import build_engine
from iq_export.engine.profile import Profile
from iq_export.engine.targets import (
    ENTERPRISE,
    RTX,
    TARGETS,
    AttentionForm,
    attention_gap,
    check_formats,
    check_opset,
    check_tensorrt_opset,
    resolve_target,
)
from iq_export.engine.trt import installed_version, later_than_tried
from iq_export.errors import EngineError, UsageError
from iq_export.formats.int4_weights import INT4_WEIGHTS
from iq_export.recipe import load_recipe


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
        check_formats(target, load_recipe("w8a8kv8").formats)
        try:
            check_formats(target, [INT4_WEIGHTS])
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
    assert resolve_target(name).runs(INT4_WEIGHTS) == int4


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


@pytest.mark.parametrize(
    ("form", "lacks"),
    [
        (AttentionForm("fp16", 64), None),
        (AttentionForm("fp16", 16), None),
        (AttentionForm("fp16", 256), None),
        (AttentionForm("fp16"), None),
        (AttentionForm("fp16", 8), "heads of 8"),
        (AttentionForm("fp16", 28), "heads of 28"),
        (AttentionForm("fp16", 264), "heads of 264, only for multiples of 8 from 16 to 256"),
        (AttentionForm("fp32", 64), "in float32"),
        (AttentionForm("fp16", 64, softcap=True), "softcap"),
    ],
)
def test_attention_of_tensorrt_rtx(form: AttentionForm, lacks: str | None) -> None:
    for target in TARGETS.values():
        gap = attention_gap(target, form)
        if lacks is None or (target.flavour == ENTERPRISE and not form.softcap):
            assert gap is None
        else:
            assert gap is not None and lacks in gap


@pytest.mark.slow
@pytest.mark.parametrize(("head_dim", "dtype", "softcap"), [
    (16, "fp16", 0.0), (24, "fp16", 0.0), (256, "fp16", 0.0), (8, "fp16", 0.0), (28, "fp16", 0.0),
    (264, "fp16", 0.0), (64, "fp32", 0.0), (64, "fp16", 50.0),
])  # fmt: skip
def test_the_builder_agrees(head_dim: int, dtype: str, softcap: float, tmp_path: Path) -> None:
    """What stands in the table, on one Attention with a mask and a cache, as we trace it."""
    pytest.importorskip("tensorrt_rtx")
    if later_than_tried(str(installed_version(RTX))):
        pytest.skip("the table is of an earlier TensorRT for RTX")
    import onnx
    from onnx import helper

    kind = onnx.TensorProto.FLOAT16 if dtype == "fp16" else onnx.TensorProto.FLOAT
    info, node = helper.make_tensor_value_info, helper.make_node
    new, past = (["batch", 2, axis, head_dim] for axis in ("seq", "past"))
    graph = helper.make_graph(
        [
            node("Concat", ["past_k", "k"], ["keys"], axis=2),
            node("Concat", ["past_v", "v"], ["values"], axis=2),
            node("Attention", ["q", "keys", "values", "mask"], ["y"], softcap=softcap),
        ],
        "g",
        [
            *(info(name, kind, new) for name in ("q", "k", "v")),
            *(info(name, kind, past) for name in ("past_k", "past_v")),
            info("mask", onnx.TensorProto.BOOL, ["batch", 1, "seq", "total"]),
        ],
        [info("y", kind, new)],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    onnx.save(model, tmp_path / "m.onnx")
    target = TARGETS["rtx-ampere"]
    lacks = attention_gap(target, AttentionForm(dtype, head_dim, softcap > 0)) is not None
    profile = Profile.parse("", "", "seq:16,past:16")
    with pytest.raises(EngineError) if lacks else nullcontext():
        build_engine(tmp_path / "m.onnx", tmp_path / "m.plan", target, profile)
