"""doctor reports and never fails: a missing part is an answer."""

from __future__ import annotations

import json

import pytest

from iq_export.cli import main


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "Python" in text and "TensorRT for RTX" in text and "nvcc" in text
    assert main(["doctor", "--json"]) == 0
    checks = json.loads(capsys.readouterr().out)
    assert {check["state"] for check in checks} <= {"ok", "missing"}
