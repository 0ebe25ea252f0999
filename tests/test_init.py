"""The package's names: light to import, and `compile` stays a function."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import iq_export
from iq_export.bundle.package import Bundle


def test_names() -> None:
    assert iq_export.Bundle is Bundle
    assert iq_export.__version__
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = iq_export.nonsense


def test_compile_is_the_function_whoever_imported_the_module_first() -> None:
    module = importlib.import_module("iq_export.compile")
    assert iq_export.compile is module.compile
    assert iq_export.CompileOptions is module.CompileOptions


def test_import_brings_nothing_heavy() -> None:
    program = (
        "import iq_export, sys\n"
        "assert not {'torch', 'numpy', 'onnx', 'onnxruntime'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
