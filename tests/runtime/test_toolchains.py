"""libiq_runtime for aarch64: it compiles with its sessions, and checks a bundle under QEMU."""

from __future__ import annotations

from pathlib import Path

import pytest

from iq_export.engine.plugin import HEADERS_VARIABLE, find_headers
from tests import toolchains
from tests.runtime.conftest import SOURCES, compile_


@pytest.mark.heavy
def test_aarch64(tools: None, bundle: Path, tmp_path: Path) -> None:
    headers = find_headers()
    if headers is None:
        pytest.skip("TensorRT's headers are missing: run tools/fetch_trt_headers.py")
    openssl, libraries = toolchains.aarch64_openssl(tmp_path)
    definitions = {**toolchains.aarch64(tmp_path), **openssl, HEADERS_VARIABLE: str(headers),
                   "IQ_SESSION": "ON"}  # fmt: skip
    folder = compile_(SOURCES, tmp_path / "build", definitions)
    assert toolchains.machine(folder / "libiq_runtime.so") == "AArch64"
    said = toolchains.run_aarch64([folder / "iq_run", bundle, "--check"], [folder, libraries])
    assert "as recorded" in said
