"""Errors that reach the user: one sentence (what, where, what to do) and a stable exit code."""

from __future__ import annotations


class IqError(Exception):
    """Base of all errors raised on purpose. `exit_code` is part of the CLI contract."""

    exit_code = 1


class UsageError(IqError):
    """An option or argument is wrong: unknown recipe or target, profile min > max."""

    exit_code = 2


class ModelError(IqError):
    """The model cannot be found, read, trusted or traced."""

    exit_code = 3


class DataError(IqError):
    """Calibration or evaluation data are missing, empty, unreadable or too few."""

    exit_code = 4


class GraphError(IqError):
    """The ONNX graph is not understood or not computable: names the node or tensor."""

    exit_code = 5


class EngineError(IqError):
    """TensorRT is missing, too old, or refuses the graph or the target."""

    exit_code = 6


class BundleError(IqError):
    """The output folder exists, is damaged, does not match its manifest, or cannot be written."""

    exit_code = 7


def root_cause(error: BaseException) -> BaseException:
    """The innermost of the causes of `error`, which may be among its own."""
    seen: set[int] = set()
    while error.__cause__ is not None and id(error) not in seen:
        seen.add(id(error))
        error = error.__cause__
    return error


INTERRUPTED_EXIT_CODE = 130
