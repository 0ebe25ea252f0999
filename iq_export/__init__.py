"""Compile LLMs with activation spikes to static W8A8 / W4A16 ONNX and TensorRT engines.

    import iq_export
    bundle = iq_export.compile(iq_export.CompileOptions("smollm2-135m", Path("out")))

Names are loaded on first use: `import iq_export` alone needs neither torch nor TensorRT.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from iq_export.bundle.package import Bundle
    from iq_export.compile import EnginesFailed, compile
    from iq_export.options import CompileOptions

__version__ = "0.1.0"
__all__ = ["Bundle", "CompileOptions", "EnginesFailed", "__version__", "compile"]

_HOMES = {
    "Bundle": "iq_export.bundle.package",
    "CompileOptions": "iq_export.options",
    "EnginesFailed": "iq_export.compile",
    "compile": "iq_export.compile",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'iq_export' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


class _Package(ModuleType):
    """`iq_export.compile` is a function, whoever imported the module of that name before."""

    def __setattr__(self, name: str, value: Any) -> None:
        # The import system binds a submodule to its package by setattr.
        if name == "compile" and isinstance(value, ModuleType):
            value = value.compile
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
