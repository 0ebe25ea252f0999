"""Several graphs of one encoder on the same windows: each output compared with fp32's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from iq_export.evaluate.agreement import compare_classes, compare_features, compare_maps
from iq_export.evaluate.compare import REFERENCE
from iq_export.graph.interface import Interface, Role, Tensor
from iq_export.observe.samples import Sample
from iq_export.progress import Progress

if TYPE_CHECKING:
    from iq_export.observe.walk import Graph

_MAP_AXES = 4  # [batch, channels, height, width]


@dataclass(frozen=True)
class OutputRow:
    """One output of one graph beside fp32's; `figures` are those of `evaluate.agreement`, by name:
    of classes, maps or features."""

    graph: str
    output: str
    figures: dict[str, float | None]


@dataclass(frozen=True)
class OutputComparison:
    """The rows, and on how many windows of which data they were measured."""

    rows: list[OutputRow]
    windows: int
    data: str

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def compare_outputs(
    graphs: Mapping[str, Graph],
    windows: Sequence[Sample],
    *,
    data: str,
    providers: Sequence[str],
    progress: Progress,
) -> OutputComparison:
    """Measure `graphs` by label against the one labelled `fp32`, or give no rows without it.

    Half values are rounded op by op. Raises GraphError if an output is not finite.
    """
    found: dict[str, dict[str, np.ndarray]] = {}
    tensors: dict[str, Tensor] = {}
    for label in sorted(graphs, key=lambda label: label != REFERENCE):
        with progress.step(f"Evaluate {label}"):
            tensors = _outputs(graphs[label])
            found[label] = _values(graphs[label], list(tensors), windows, providers, progress)
    exact = found.pop(REFERENCE, None)
    rows = [
        OutputRow(label, name, _figures(tensors[name], exact[name], values))
        for label, outputs in found.items()
        for name, values in outputs.items()
        if exact is not None
    ]
    return OutputComparison(rows, len(windows), data)


def _outputs(graph: Graph) -> dict[str, Tensor]:
    from iq_export.observe.walk import loaded

    return {t.name: t for t in Interface.of_graph(loaded(graph).graph).outputs}


def _values(
    graph: Graph,
    names: Sequence[str],
    windows: Sequence[Sample],
    providers: Sequence[str],
    progress: Progress,
) -> dict[str, np.ndarray]:
    """`[windows, ...]` of each output."""
    from iq_export.observe.walk import checked, walk

    parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
    runs = walk(
        graph, names, windows, providers=providers, progress=progress, round_half=True, raw=True
    )
    for number, values in runs:
        for name, value in values.items():
            checked(name, value, number)
            parts[name].append(value[0].astype(np.float32))
    return {name: np.stack(each) for name, each in parts.items()}


def _figures(tensor: Tensor, exact: np.ndarray, found: np.ndarray) -> dict[str, float | None]:
    if tensor.role is Role.LOGITS and exact.ndim == 2:
        return asdict(compare_classes(exact, found))
    if exact.ndim == _MAP_AXES:
        return asdict(compare_maps(exact, found))
    return asdict(compare_features(exact, found))


def output_table(comparison: OutputComparison) -> str:
    """For people."""
    lines = [f"{comparison.windows} windows of {Path(comparison.data).name}, beside fp32"]
    for row in comparison.rows:
        figures = ", ".join(
            f"{name.replace('_', ' ')} {value:.4f}"
            for name, value in row.figures.items()
            if name != "rows" and value is not None
        )
        lines.append(f"{row.graph:<32} {row.output:<20} {figures}")
    return "\n".join(lines)
