from __future__ import annotations

from pathlib import Path

import pytest

from iq_export.engine.onnx_header import OnnxHeader, read_header
from iq_export.errors import EngineError


@pytest.mark.parametrize("opset", [18, 21, 23])
def test_reads_opset_and_counts_sink_nodes(sink_model, opset: int) -> None:  # type: ignore[no-untyped-def]
    assert read_header(sink_model(opset=opset)) == OnnxHeader(opset, 3)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x07", b"\xff" * 40])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.onnx"
    path.write_bytes(content)
    with pytest.raises(EngineError, match=r"bad\.onnx"):
        read_header(path)


def test_a_file_cut_short_or_missing_is_refused(tmp_path: Path, sink_model) -> None:  # type: ignore[no-untyped-def]
    path = sink_model()
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(EngineError, match="cannot be read as an ONNX model"):
        read_header(path)
    with pytest.raises(EngineError, match="No such file"):
        read_header(tmp_path / "absent.onnx")
