from __future__ import annotations

import errno
import hashlib
import json
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from iq_export.engine import build as build_module
from iq_export.engine import trt
from iq_export.engine.build import BuildRequest, EngineReport, Profile, Range, build_engine
from iq_export.engine.targets import Target, resolve_target
from iq_export.engine.worker import prove_form
from iq_export.errors import EngineError, UsageError
from iq_export.graph import io
from iq_export.passes.to_half import to_half
from tests import planted

AMPERE = resolve_target("rtx-ampere")
SMALL = Profile(Range(1, 1, 2), Range(1, 4, 8), Range(0, 4, 8))


@pytest.mark.usefixtures("rtx")
class TestRealBuilder:
    @pytest.mark.parametrize("name", ["rtx-ampere", "rtx-all"])
    def test_body_form(self, sink_model, tmp_path: Path, name: str) -> None:  # type: ignore[no-untyped-def]
        plan = tmp_path / "engines" / f"{name}.plan"
        report = build_engine(sink_model(), plan, resolve_target(name), SMALL, sink_nodes=3)
        assert (report.form, report.plugin_layers, report.sink_nodes) == ("body", 0, 3)
        assert report.bytes == plan.stat().st_size > 0
        assert report.sha256 == hashlib.sha256(plan.read_bytes()).hexdigest()
        assert report.compute_capabilities == resolve_target(name).compute_capabilities
        assert report.opset == 23
        assert report.plan == plan.name
        assert EngineReport.from_json(json.loads(json.dumps(report.to_json()))) == report
        assert [path.name for path in plan.parent.iterdir()] == [plan.name]

    def test_two_sites_of_detection(self, tmp_path: Path) -> None:
        """The frozen union is made of standard ops, which TensorRT takes as they are."""
        decoder = replace(planted.TWO_BIRTHS, head_dim=64, heads=2, kv_heads=1, hidden=128)
        model = planted.observe(decoder, tmp_path).load_inserted()
        to_half(model)
        io.save(model, tmp_path / "half.onnx")
        report = build_engine(tmp_path / "half.onnx", tmp_path / "a.plan", AMPERE, SMALL)
        assert (report.form, report.plugin_layers, report.sink_nodes) == ("body", 0, 12)

    def test_timing_cache_is_kept(self, sink_model, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
        cache = tmp_path / "timing.cache"
        for _ in range(2):
            report = build_engine(
                sink_model(),
                tmp_path / "a.plan",
                AMPERE,
                SMALL,
                timing_cache=cache,
                profiling_verbosity="none",
            )
        assert report.sink_nodes == 3
        assert cache.stat().st_size > 0

    def test_four_bit_weights_build_on_ampere_and_not_on_turing(
        self, int4_model: Path, tmp_path: Path
    ) -> None:
        report = build_engine(int4_model, tmp_path / "a.plan", AMPERE, SMALL)
        assert report.form == "none"
        plan = tmp_path / "t.plan"
        with pytest.raises(EngineError, match=r"TensorRT.*'rtx-turing'.*") as caught:
            build_engine(int4_model, plan, resolve_target("rtx-turing"), SMALL)
        assert "INT4" in str(caught.value).upper()
        assert not plan.exists()

    def test_refused_node_is_named(self, tmp_path: Path) -> None:
        onnx = pytest.importorskip("onnx")
        info = onnx.helper.make_tensor_value_info
        graph = onnx.helper.make_graph(
            [onnx.helper.make_node("Mystery", ["x"], ["y"], domain="other", name="layers.0/odd")],
            "g",
            [info("x", 1, ["batch"])],
            [info("y", 1, ["batch"])],
        )
        imports = [onnx.helper.make_opsetid("", 21), onnx.helper.make_opsetid("other", 1)]
        path = tmp_path / "odd.onnx"
        onnx.save(onnx.helper.make_model(graph, opset_imports=imports, ir_version=10), path)
        with pytest.raises(EngineError, match=r"cannot parse.*node 'layers\.0/odd' \(Mystery\)"):
            build_engine(path, tmp_path / "odd.plan", AMPERE, SMALL)

    def test_unknown_axis_is_named(self, sink_model, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
        with pytest.raises(EngineError, match="dynamic axis 'tokens'"):
            build_engine(sink_model(seq_axis="tokens"), tmp_path / "a.plan", AMPERE, SMALL)

    def test_a_library_that_is_no_plugin(self, sink_model, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
        library = tmp_path / "libnone.so"
        library.write_bytes(b"not a library")
        with pytest.raises(EngineError, match=r"load the plugin.*libnone\.so"):
            build_engine(
                sink_model(), tmp_path / "a.plan", AMPERE, SMALL, plugin=library, sink_nodes=3
            )

    def test_unsupported_capability(self, sink_model, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
        odd = Target("rtx-odd", "tensorrt_rtx", (87,), "none")
        with pytest.raises(EngineError, match="cannot build for sm_87"):
            build_engine(sink_model(), tmp_path / "a.plan", odd, SMALL, sink_nodes=3)


@pytest.mark.parametrize(
    ("sinks", "layers", "nodes", "form"),
    [(3, 3, 3, "plugin"), (3, 5, 5, "plugin"), (3, 0, 0, "body"), (0, 0, 0, "none")],
)
def test_form_is_proven(sinks: int, layers: int, nodes: int, form: str) -> None:
    assert prove_form(sinks, layers, nodes) == form


@pytest.mark.parametrize(("layers", "nodes"), [(0, 3), (2, 3), (3, 0)])
def test_the_other_form_is_an_error(layers: int, nodes: int) -> None:
    with pytest.raises(EngineError, match=f"{layers} plugin layers, but {nodes} sink and fused"):
        prove_form(3, layers, nodes)


def test_early_refusals(sink_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    plan = tmp_path / "a.plan"
    with pytest.raises(UsageError, match="profiling verbosity 'loud'"):
        build_engine(sink_model(), plan, AMPERE, SMALL, profiling_verbosity="loud")
    with pytest.raises(EngineError, match="JetPack 6"):
        build_engine(sink_model(), plan, resolve_target("orin-jetpack6"), SMALL)
    with pytest.raises(UsageError, match="no lean runtime"):
        build_engine(sink_model(), plan, AMPERE, SMALL, version_compatible=True)
    monkeypatch.setattr(trt, "device_compute_capability", lambda: None)
    with pytest.raises(UsageError, match="strips weights only on a machine with an NVIDIA GPU"):
        build_engine(sink_model(), plan, AMPERE, SMALL, strip_weights=True)
    monkeypatch.setattr(build_module, "why_not_here", lambda target: "not here.")
    with pytest.raises(EngineError, match="not here"):
        build_engine(sink_model(), plan, AMPERE, SMALL)


def _child(monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Put `script` in the place of the worker: it has the request on stdin."""
    real = build_module.subprocess.Popen
    monkeypatch.setattr(build_module, "why_not_here", lambda target: None)
    monkeypatch.setattr(
        build_module.subprocess,
        "Popen",
        lambda command, **options: real([sys.executable, "-c", script], **options),
    )


_SAY = "import json, os, sys; r = json.loads(sys.stdin.read()); p = open(r['plan'], 'wb'); "


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("print('{\"event\": \"phase\", \"text\": \"building\"}', flush=True); os.abort()",
         "died of SIGABRT while building the engine for 'rtx-ampere'"),
        ("os.kill(os.getpid(), 9)", "SIGKILL while starting .* for want of memory"),
        ("sys.stderr.write('last words'); sys.exit(3)", "ended with code 3 .*last words"),
        ("print('{\"event\": \"error\", \"text\": \"no kernel.\"}'); sys.exit(1)", "no kernel"),
    ],
)  # fmt: skip
def test_a_dead_child_is_explained_and_leaves_nothing(
    sink_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, message: str
) -> None:  # type: ignore[no-untyped-def]
    model = sink_model()
    _child(monkeypatch, _SAY + script)
    with pytest.raises(EngineError, match=message):
        build_engine(model, tmp_path / "e" / "a.plan", AMPERE, SMALL)
    assert list((tmp_path / "e").iterdir()) == []


def test_a_full_disk_keeps_its_number(
    sink_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # type: ignore[no-untyped-def]
    model = sink_model()
    event = json.dumps({"event": "error", "text": "No space left", "errno": errno.ENOSPC})
    _child(monkeypatch, f"print({event!r})")
    with pytest.raises(OSError, match="No space left") as caught:
        build_engine(model, tmp_path / "a.plan", AMPERE, SMALL)
    assert caught.value.errno == errno.ENOSPC


def test_interrupt_ends_the_child(
    sink_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # type: ignore[no-untyped-def]
    model = sink_model()
    started: list[build_module.subprocess.Popen[str]] = []
    real = build_module.subprocess.Popen
    script = _SAY + 'print(\'{"event": "phase", "text": "x"}\', flush=True)\nwhile 1: pass'
    monkeypatch.setattr(build_module, "why_not_here", lambda target: None)

    def start(command: list[str], **options: object) -> object:
        started.append(real([sys.executable, "-c", script], **options))
        return started[0]

    def interrupt(lines: object) -> object:
        next(iter(lines))  # type: ignore[call-overload]
        raise KeyboardInterrupt

    monkeypatch.setattr(build_module.subprocess, "Popen", start)
    monkeypatch.setattr(build_module, "_events", interrupt)
    with pytest.raises(KeyboardInterrupt):
        build_engine(model, tmp_path / "e" / "a.plan", AMPERE, SMALL)
    assert started[0].returncode == -signal.SIGKILL
    assert list((tmp_path / "e").iterdir()) == []


def test_request_round_trip() -> None:
    request = BuildRequest(
        "s", "m", "p", "t", "trt", (86,), SMALL.to_json(), 23, 0, 0, None, None, False, False,
        "none",
    )  # fmt: skip
    assert BuildRequest.from_json(request.to_json()) == request
