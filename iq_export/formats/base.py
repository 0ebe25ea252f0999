"""What a number format is: one class for each role in which a recipe names it, and their table.

A format is one file of this package that registers an instance. Shared code asks it how values are
rounded, how they stand in the graph and who can run it, and knows no bits.
"""

from __future__ import annotations

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, TypeVar

import numpy as np
import onnx_ir as ir

from iq_export.errors import UsageError
from iq_export.formats import qdq
from iq_export.formats.gptq import Curvature

# How recipes call what is not quantized; its format is None.
HALF = "half"
# Codes `[in, out]` of a weight, and its scales as DequantizeLinear takes them, float32, the last
# axis that of the outputs: products of one input are rounded side by side.
Codes = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class StoredCodes:
    """Of a weight that is rounded already: what reads its codes `[in, out]`, kept by nobody, and
    its `scales`."""

    read: Callable[[], np.ndarray]
    scales: np.ndarray


@dataclass(frozen=True)
class Format(ABC):
    """`name`: as recipes write it. `dtype`: of its codes in the graph. `opset`: the first whose
    DequantizeLinear takes that type. `compute_capability`: the first GPU for which TensorRT has
    kernels, 0 if every GPU that it supports is one."""

    name: str
    dtype: ir.DataType
    opset: int
    compute_capability: int

    role: ClassVar[str]

    @property
    def type_name(self) -> str:
        """As TensorRT writes the type, `INT4`."""
        return self.dtype.name


class WeightFormat(Format):
    """Rounds weights `[in, out]`, which stand behind a DequantizeLinear. `per_channel`: whether an
    output channel has one scale."""

    role: ClassVar[str] = "weights"
    per_channel: ClassVar[bool] = False

    @abstractmethod
    def round(self, weight: np.ndarray, importance: np.ndarray | None = None) -> Codes:
        """To the nearest. `importance` `[in]`: the mean squared activation of each channel, for
        formats whose scales depend on it; 1 if None."""

    @abstractmethod
    def compensate(self, weight: np.ndarray, curvature: Curvature) -> Codes:
        """Round so that later channels make up for the error (GPTQ), on a grid like `round`'s."""

    @abstractmethod
    def values(self, codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
        """float32 `[in, out]`."""

    @abstractmethod
    def attributes(self, in_features: int) -> dict[str, int]:
        """Of the DequantizeLinear: the axis of the scales, and the size of a block."""

    def block(self, in_features: int) -> int | None:
        """How many channels share a scale; None if all do, or if there is a `misfit`."""
        return None

    def misfit(self, in_features: int) -> str | None:
        """Why it takes no weights of that width, None if it does."""
        return None

    def check(self, name: str, in_features: int) -> None:
        """UsageError naming the weight `name` if there is a `misfit`."""
        if (reason := self.misfit(in_features)) is not None:
            raise UsageError(f"Weight {name!r} has {in_features} input features, {reason}.")

    def rounded(self, weight: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
        """`weight` after rounding and back, float32 `[in, out]`."""
        return self.values(*self.round(weight, importance))

    def constant(
        self, source: ir.TensorProtocol, name: str, importance: np.ndarray | None
    ) -> tuple[ir.TensorProtocol, np.ndarray]:
        """The codes as a tensor called `name`, rounded now or when it is read, and the scales."""
        codes, scales = self.round(source.numpy(), importance)
        return ir.Tensor(codes, dtype=self.dtype, name=name), scales

    def write_channels(
        self, graph: ir.Graph, weight: ir.Value, node: ir.Node, axis: int
    ) -> ir.Value:
        """`weight`, of a convolution, dequantized for `node`, one scale for each index of `axis`:
        for formats that are `per_channel`. Codes are computed when they are read."""
        source = weight.const_value
        assert source is not None and self.per_channel
        name, shape = f"{weight.name}.{self.dtype.name.lower()}", source.shape.numpy()

        def matrix() -> np.ndarray:
            moved = np.moveaxis(source.numpy(), axis, -1)
            return moved.reshape(-1, moved.shape[-1])

        def codes() -> ir.Tensor:
            found, _ = self.round(matrix())
            outside = [size for place, size in enumerate(shape) if place != axis]
            back = np.moveaxis(found.reshape(*outside, shape[axis]), -1, axis)
            return ir.Tensor(np.ascontiguousarray(back), dtype=self.dtype, name=name)

        tensor = ir.LazyTensor(codes, dtype=self.dtype, shape=ir.Shape(shape), name=name)
        scales = self.round(matrix())[1]
        return qdq.dequantized_weight(graph, weight, node, tensor, scales, {"axis": axis})

    def write(
        self,
        graph: ir.Graph,
        weight: ir.Value,
        node: ir.Node,
        *,
        importance: np.ndarray | None = None,
        stored: StoredCodes | None = None,
    ) -> ir.Value:
        """`weight` dequantized, for the product `node`; from `stored` where it is rounded already.

        Raises UsageError for a width that the format does not take.
        """
        source = weight.const_value
        assert source is not None
        in_features, _ = source.shape.numpy()
        self.check(str(weight.name), in_features)
        name = f"{weight.name}.{self.dtype.name.lower()}"
        if stored is None:
            tensor, scales = self.constant(source, name, importance)
        else:
            tensor = ir.LazyTensor(
                lambda: ir.Tensor(stored.read(), dtype=self.dtype, name=name),
                dtype=self.dtype, shape=ir.Shape(source.shape.numpy()), name=name,
            )  # fmt: skip
            scales = stored.scales
        attributes = self.attributes(in_features)
        return qdq.dequantized_weight(graph, weight, node, tensor, scales, attributes)


@dataclass(frozen=True)
class ActivationFormat(Format):
    """Rounds tensors, each with one scale that is known at compile time.

    `largest`: what the largest value of a range becomes. `multiplied_with`: the weight formats with
    which an engine multiplies these codes; any other product is computed in half precision, and
    only the accuracy is what it would be. `mlp_clip`: how far to go, as a power of factors, from
    the full range to that of least error in front of an MLP's products (docs/design.md): the fewer
    codes, the more the squared error of what is not clipped counts.
    """

    largest: float
    multiplied_with: frozenset[str]
    mlp_clip: float

    role: ClassVar[str] = "activations"

    def scale(self, most: float) -> float:
        """That of a tensor whose range ends at `most`."""
        return most / self.largest

    @abstractmethod
    def rounded(self, rows: np.ndarray, scale: float) -> np.ndarray:
        """`rows` after rounding and back, float32, a new array."""

    @abstractmethod
    def write(self, graph: ir.Graph, value: ir.Value, scale: float) -> ir.Value:
        """The same in the graph, right behind `value`."""


@dataclass(frozen=True)
class CacheScale:
    """Scale of one layer's keys or values; `clip` the kept share of the semantic absmax, `error`
    the relative squared rounding error of the sampled rows."""

    scale: float
    clip: float
    error: float
    absmax: float


class CacheFormat(Format):
    """Holds keys and values, one scale per tensor, dequantized in front of the attention."""

    role: ClassVar[str] = "cache"

    @abstractmethod
    def scale(self, rows: np.ndarray, absmax: float) -> CacheScale:
        """For semantic `rows` `[tokens, features]`; `absmax`: of all semantic tokens."""


_F = TypeVar("_F", bound=Format)
_REGISTERED: list[Format] = []


def register(*formats: Format) -> None:
    """Let recipes name `formats`. Raises ValueError for a name that its role has already."""
    for new in formats:
        if any((old.role, old.name) == (new.role, new.name) for old in _REGISTERED):
            raise ValueError(f"two formats for {new.role} are called {new.name!r}")
        _REGISTERED.append(new)


def known_formats(kind: type[_F]) -> dict[str, _F]:
    """All of one role by their names, from every file of this package."""
    package = importlib.import_module(__package__)
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{__package__}.{module.name}")
    return {found.name: found for found in _REGISTERED if isinstance(found, kind)}


def find_format(kind: type[_F], name: object) -> _F | None:
    """The format called `name`, None for HALF. Raises UsageError for an unknown one."""
    if name == HALF:
        return None
    known = known_formats(kind)
    if not isinstance(name, str) or name not in known:
        names = ", ".join([HALF, *sorted(known)])
        raise UsageError(f"{kind.role} cannot be {name!r}: known formats are {names}.")
    return known[name]
