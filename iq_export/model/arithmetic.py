"""A torch model computed in other arithmetic than its own, without a second copy of its weights.

Models round where nobody asked: norms, softmax and rotations cast to float32 whatever the type of
their input, so `model.double()` is no float64. Here every function that the model calls is met
on its way: in `float64`, float32 tensors are widened as they are read, one at a time, and every
cast to float32 becomes one to float64. In `jittered`, results of float32 arithmetic are moved by
at most half a unit in the last place: another implementation, equally right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# Elements of a weight that are widened at once; a larger one (an LM head) is read in slices.
_SLICE = 1 << 24
_HALF_ULP = 2.0**-24
# What rounds its result. Moves, lookups and comparisons do not.
_ROUNDS = frozenset({
    "add", "addmm", "baddbmm", "bmm", "cos", "div", "einsum", "exp", "gelu", "layer_norm", "linear",
    "log", "matmul", "mean", "mul", "norm", "pow", "reciprocal", "rms_norm", "rsqrt", "sigmoid",
    "silu", "sin", "softmax", "softplus", "sqrt", "square", "sub", "sum", "tanh", "truediv", "var",
})  # fmt: skip


@contextmanager
def float64() -> Iterator[None]:
    """Whatever torch computes in the block is computed in float64, from the same weights."""
    import torch
    from torch.overrides import TorchFunctionMode

    functional = torch.nn.functional

    def wide(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.double() if value.dtype == torch.float32 else value
        if value is torch.float32:
            return torch.float64
        return value

    class Wide(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            kwargs, name = kwargs or {}, getattr(func, "__name__", "")
            if name == "__get__":
                return _dtype(func(*args, **kwargs))
            if func is torch.Tensor.float:
                return args[0].double()
            if func in (functional.embedding, torch.Tensor.__getitem__):  # a few rows of a table
                return _mapped(func(*args, **kwargs), wide)
            if func is torch.full and "dtype" not in kwargs and isinstance(args[1], float):
                kwargs = {**kwargs, "dtype": torch.float64}
            if func is functional.linear and args[1].numel() > _SLICE:
                return _sliced_linear(*args, **kwargs)
            # What is written to keeps its own type.
            kept = 1 if _writes(name) else 0
            args = (*args[:kept], *_mapped(args[kept:], wide))
            out = func(*args, **{key: _mapped(value, wide) for key, value in kwargs.items()})
            return out if kept else _mapped(out, wide)

    def _dtype(value: Any) -> Any:
        return torch.float64 if value is torch.float32 else value

    def _sliced_linear(x: Any, weight: Any, bias: Any = None) -> Any:
        rows = max(1, _SLICE // weight.shape[1])
        parts = [functional.linear(wide(x), wide(part)) for part in weight.split(rows)]
        out = torch.cat(parts, dim=-1)
        return out if bias is None else out + wide(bias)

    with Wide():
        yield


@contextmanager
def jittered(seed: int) -> Iterator[None]:
    """Float32 arithmetic in the block rounds otherwise: each result is moved at random."""
    import torch
    from torch.overrides import TorchFunctionMode

    generator = torch.Generator().manual_seed(seed)

    def moved(value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
            return value
        noise = torch.rand(value.shape, generator=generator).sub_(0.5).mul_(2 * _HALF_ULP)
        # Whole numbers are exact: counts, masks and positions among them.
        return torch.where(value == value.round(), value, torch.addcmul(value, value, noise))

    class Jitter(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out, name = func(*args, **(kwargs or {})), getattr(func, "__name__", "")
            if _writes(name):
                return out
            return _mapped(out, moved) if _plain(name) in _ROUNDS else out

    with Jitter():
        yield


def _writes(name: str) -> bool:
    """Whether torch's function of this name changes its first argument."""
    if name.startswith("__"):
        return name == "__setitem__" or (name.startswith("__i") and name not in ("__invert__",))
    return name.endswith("_")


def _plain(name: str) -> str:
    """`__rmul__` -> mul."""
    if not name.startswith("__"):
        return name
    name = name.strip("_")
    return name[1:] if name[1:] in _ROUNDS and name[0] == "r" else name


def _mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, (list, tuple)) and not all(isinstance(item, int) for item in value):
        items = [_mapped(item, change) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return change(value)
