"""Run a graph over calibration windows and hand out intermediate values, window by window.

Memory is bounded: one window at a time, and the taps of one run together stay under a byte budget;
a larger model is run several times over the same windows. Nothing is kept here: callers reduce.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from iq_export.calibrate.data import Window
from iq_export.errors import GraphError
from iq_export.graph import io
from iq_export.graph.interface import Interface
from iq_export.graph.model_files import PASSING_PREFIX
from iq_export.progress import Progress
from iq_export.run.ort import open_session, ort_errors

GROUP_BYTES = 1 << 30

# name -> value of one window, [seq, features] or [seq]; keys and values with their heads joined
Values = dict[str, np.ndarray]


def tapped_runs(
    model_path: Path,
    groups: Sequence[Sequence[str]],
    windows: Sequence[Window],
    *,
    always: Sequence[str] = (),
    providers: Sequence[str] = ("CPUExecutionProvider",),
    progress: Progress,
) -> Iterator[tuple[int, Values]]:
    """Yield `(window number, values)` for every window, once per group of value names.

    `always` names values that every group needs (the sink index). Float values come as fp32.

    Raises GraphError naming the tensor, its window and position if a value is NaN or Inf.
    """
    done, total = 0, len(groups) * len(windows)
    for group in groups:
        names = list(dict.fromkeys([*always, *group]))
        session = tapped_session(io.load(model_path), model_path.parent, names, providers)
        for number, window in enumerate(windows):
            yield number, run_window(session, names, window, number, model_path.name)
            done += 1
            progress.update(done, total)


def group_by_bytes(
    widths: dict[str, int], length: int, limit: int = GROUP_BYTES
) -> list[list[str]]:
    """Split value names (name -> features per token) into runs of at most `limit` bytes of fp32."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, width in widths.items():
        cost = width * length * 4
        if groups[-1] and size + cost > limit:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += cost
    return groups


def tapped_session(
    model: ir.Model,
    folder: Path,
    names: Sequence[str],
    providers: Sequence[str],
    *,
    round_half: bool = False,
) -> Any:
    """A session of `model`, whose weights lie in `folder`, that gives the values `names` only;
    `round_half` as at `open_session`."""
    values = {value.name: value for node in model.graph for value in node.outputs}
    model.graph.outputs[:] = [values[name] for name in names]
    RemoveUnusedNodesPass()(model)
    model.graph.inputs[:] = [value for value in model.graph.inputs if value.uses()]
    # Beside the weights, because external data may only be referenced from its own folder, but
    # where the graph is rounded: a finished bundle may lie in a folder that cannot be written.
    beside = None if round_half and providers[0] == "CPUExecutionProvider" else folder
    with NamedTemporaryFile(dir=beside, prefix=PASSING_PREFIX, suffix=".onnx") as file:
        path = Path(file.name)
        io.save_skeleton(model, path)
        return open_session(path, providers, round_half=round_half, weights=folder)


def window_feeds(
    session: Any, window: Window, given: Mapping[str, np.ndarray] | None = None
) -> dict[str, np.ndarray]:
    """Inputs of one window with an empty cache; `given` are inputs that only this graph has."""
    return Interface.of_session(session).feeds(window.ids, given)


def run_window(
    session: Any,
    names: Sequence[str],
    window: Window,
    number: int,
    file: str,
    given: Mapping[str, np.ndarray] | None = None,
) -> Values:
    """The outputs `names` of one window, `given` as in window_feeds; raises as tapped_runs does."""
    try:
        found = session.run(list(names), window_feeds(session, window, given))
    except ort_errors() as error:
        reason = str(error).splitlines()[0]
        raise GraphError(f"{file} fails in ONNX Runtime: {reason}") from error
    return {name: _checked(name, v, number) for name, v in zip(names, found, strict=True)}


def _checked(name: str, value: np.ndarray, window: int) -> np.ndarray:
    value = value[0]
    if value.ndim == 3:  # [heads, seq, head_dim]
        value = value.transpose(1, 0, 2).reshape(value.shape[1], -1)
    if value.dtype == np.float16:
        value = value.astype(np.float32)
    if value.dtype == np.float32 and not np.isfinite(value).all():
        row = int(np.argwhere(~np.isfinite(value))[0][0])
        raise GraphError(
            f"Tensor {name!r} holds NaN or Inf in calibration window {window}, position {row}. "
            "The model is not computable on this text in its own precision; check its weights."
        )
    return value
