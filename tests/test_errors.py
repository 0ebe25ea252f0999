"""The innermost cause of an error, which may be among its own causes."""

from __future__ import annotations

from iq_export.errors import ModelError, root_cause


def test_the_root_cause() -> None:
    inner, outer = ModelError("inner"), ValueError("outer")
    assert root_cause(outer) is outer
    outer.__cause__ = inner
    assert root_cause(outer) is inner
    inner.__cause__ = outer  # what raises an error's own cause from it makes a ring
    assert root_cause(outer) in (inner, outer)
