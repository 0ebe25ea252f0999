"""What a graph takes and gives, read once: inputs and outputs by role, their axes by meaning.

Only this module knows how the tensors are called; the others ask for a role. What a model of
another kind takes becomes a row of `_FORMS` (and an axis).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Any, Protocol

from iq_export.errors import GraphError

if TYPE_CHECKING:  # the command line reads the axes' names before anything that takes long to load
    import numpy as np
    import onnx
    import onnx_ir as ir
    from numpy.typing import NDArray

# Axes that a caller chooses, by the names that a traced graph and a bundle's manifest give them.
BATCH, SEQ, PAST, TOTAL = "batch", "seq", "past", "total"  # TOTAL = PAST + SEQ
# Axes whose sizes are the model's.
HEADS, FEATURES, VOCABULARY = "heads", "features", "vocabulary"
CHANNELS, HEIGHT, WIDTH, BANDS, FRAMES = "channels", "height", "width", "bands", "frames"
KINDS = ("key", "value")


class Role(Enum):
    """What an input or output is for."""

    IDS = "token ids"
    MASK = "1 where a column of past and sequence is a token, 0 where it is padding"
    POSITIONS = "of each token in its sequence"
    SEGMENTS = "which of two texts each token is of"
    PIXELS = "a picture"
    SOUND = "a spectrogram"
    PAST = "keys or values of one layer before this step"
    PAST_SINKS = "which rows of the past are sinks of one lifecycle, int32"
    LOGITS = "of the token after each one, or of the classes of a picture"
    ROWS = "features of each token, patch or frame"
    POOLED = "features of the whole"
    PRESENT = "keys or values of one layer after this step"
    PRESENT_SINKS = "which rows after this step are sinks of one lifecycle, int32"


# Role -> how its tensors are called, and their axes.
_FORMS = {
    Role.IDS: ("input_ids", (BATCH, SEQ)),
    Role.MASK: ("attention_mask", (BATCH, TOTAL)),
    Role.POSITIONS: ("position_ids", (BATCH, SEQ)),
    Role.SEGMENTS: ("token_type_ids", (BATCH, SEQ)),
    Role.PIXELS: ("pixel_values", (BATCH, CHANNELS, HEIGHT, WIDTH)),
    Role.SOUND: ("input_features", (BATCH, BANDS, FRAMES)),
    Role.PAST: ("past_key_values.{layer}.{kind}", (BATCH, HEADS, PAST, FEATURES)),
    Role.PAST_SINKS: ("past_sinks.{layer}", (BATCH, PAST)),
    Role.LOGITS: ("logits", (BATCH, SEQ, VOCABULARY)),
    Role.ROWS: ("last_hidden_state", (BATCH, SEQ, FEATURES)),
    Role.POOLED: ("pooler_output", (BATCH, FEATURES)),
    Role.PRESENT: ("present.{layer}.{kind}", (BATCH, HEADS, TOTAL, FEATURES)),
    Role.PRESENT_SINKS: ("present_sinks.{layer}", (BATCH, TOTAL)),
}
_OUTPUTS = (Role.LOGITS, Role.ROWS, Role.POOLED, Role.PRESENT, Role.PRESENT_SINKS)
_INPUTS = tuple(role for role in _FORMS if role not in _OUTPUTS)
_AFTER = {Role.PAST: Role.PRESENT, Role.PAST_SINKS: Role.PRESENT_SINKS}
# What a window of calibration is fed to, and what a graph is compared by: the first that it has.
PRIMARY = (Role.IDS, Role.PIXELS, Role.SOUND)
_RESULTS = (Role.LOGITS, Role.ROWS, Role.POOLED)
# What an input of floats is where nothing is known by its name: by its axes.
_BY_RANK = {len(_FORMS[role][1]): role for role in (Role.PIXELS, Role.SOUND)}
_FLOATS = ("float", "float16")
# One spelling per number, and none that takes long to read.
_LAYER = r"(?P<layer>0|[1-9][0-9]{0,5})"
_PATTERNS = {
    role: re.compile(
        re.escape(name)
        .replace(re.escape("{layer}"), _LAYER)
        .replace(re.escape("{kind}"), f"(?P<kind>{'|'.join(KINDS)})")
    )
    for role, (name, _) in _FORMS.items()
}
# ONNX's names of the types, in lower case -> numpy's of what a run is fed.
_NUMPY_TYPES = {
    "float": "float32",
    "float16": "float16",
    "int8": "int8",
    "int32": "int32",
    "int64": "int64",
}
_SHOWN = 4  # names in a message


def name_of(role: Role, layer: int = 0, kind: str = KINDS[0]) -> str:
    """How the tensor of this role is called; `layer` and `kind` count where the role has them."""
    return _FORMS[role][0].format(layer=layer, kind=kind)


def axes_of(role: Role) -> tuple[str, ...]:
    """What each axis of the tensors of this role counts."""
    return _FORMS[role][1]


def input_names(layers: int) -> list[str]:
    """Inputs of a traced causal LM of `layers` layers, in their order."""
    first = [name_of(role) for role in (Role.IDS, Role.MASK, Role.POSITIONS)]
    return first + [name_of(Role.PAST, layer, kind) for layer in range(layers) for kind in KINDS]


def output_names(layers: int) -> list[str]:
    """Outputs of a traced causal LM of `layers` layers, in their order."""
    present = [name_of(Role.PRESENT, layer, kind) for layer in range(layers) for kind in KINDS]
    return [name_of(Role.LOGITS), *present]


class Described(Protocol):
    """A tensor as a manifest lists it."""

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> list[int | str]: ...


@dataclass(frozen=True)
class Tensor:
    """One input or output.

    role: None if it is none of a known graph. layer: of a sink index the number of its lifecycle,
    None where the role has one tensor. kind: "key" or "value" of a cache. dtype: ONNX's name in
    lower case. shape: sizes, names of dynamic axes, None where nothing is known of one. axes: what
    each axis counts; () without a role.
    """

    name: str
    dtype: str
    shape: tuple[int | str | None, ...]
    role: Role | None = None
    layer: int | None = None
    kind: str | None = None
    axes: tuple[str, ...] = ()

    @property
    def numpy_type(self) -> np.dtype[Any]:
        """GraphError for a type that nothing here feeds."""
        import numpy as np

        try:
            return np.dtype(_NUMPY_TYPES[self.dtype])
        except KeyError:
            raise GraphError(f"'{self.name}' has type {self.dtype}, which is not fed.") from None

    def fixed(self, axis: str) -> int:
        """The size of an axis that must not be dynamic, else GraphError."""
        place = self.axes.index(axis)
        size = self.shape[place] if place < len(self.shape) else None
        if not isinstance(size, int):
            raise GraphError(
                f"Axis {place} of '{self.name}' must have a fixed size; its shape is "
                f"{list(self.shape)}."
            )
        return size

    def empty(self, batch: int) -> NDArray[Any]:
        """A cache of no tokens for `batch` sequences: zero rows along the axis of the past."""
        import numpy as np

        if len(self.shape) != len(self.axes):
            raise GraphError(
                f"cache input '{self.name}' must have {len(self.axes)} axes; its shape is "
                f"{list(self.shape)}."
            )
        sizes = {BATCH: batch, PAST: 0}
        shape = [sizes[axis] if axis in sizes else self.fixed(axis) for axis in self.axes]
        return np.zeros(shape, self.numpy_type)


@dataclass(frozen=True)
class Interface:
    """The inputs and outputs of one graph, in its own order."""

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]

    @classmethod
    def of_graph(cls, graph: ir.Graph) -> Interface:
        """Of a graph that passes edit."""
        return cls._read(*(tuple(_of_value(value, roles) for value in values) for values, roles in (
            (graph.inputs, _INPUTS), (graph.outputs, _OUTPUTS))))  # fmt: skip

    @classmethod
    def of_proto(cls, graph: onnx.GraphProto) -> Interface:
        """Of a graph as it stands in its file."""
        return cls._read(*(tuple(_of_info(info, roles) for info in infos) for infos, roles in (
            (graph.input, _INPUTS), (graph.output, _OUTPUTS))))  # fmt: skip

    @classmethod
    def of_session(cls, session: Any) -> Interface:
        """Of an ONNX Runtime session."""
        return cls._read(*(
            tuple(_tensor(n.name, n.type[len("tensor(") : -1], n.shape, roles) for n in nodes)
            for nodes, roles in (
                (session.get_inputs(), _INPUTS), (session.get_outputs(), _OUTPUTS))
        ))  # fmt: skip

    @classmethod
    def of_tensors(cls, inputs: Iterable[Described], outputs: Iterable[Described]) -> Interface:
        """Of what a bundle's manifest lists."""
        return cls._read(*(
            tuple(_tensor(t.name, t.dtype, t.shape, roles) for t in tensors)
            for tensors, roles in ((inputs, _INPUTS), (outputs, _OUTPUTS))
        ))  # fmt: skip

    @classmethod
    def _read(cls, inputs: tuple[Tensor, ...], outputs: tuple[Tensor, ...]) -> Interface:
        """With a role for the only input, where no name tells one: by its type and axes."""
        if len(inputs) == 1 and inputs[0].role is None and inputs[0].dtype in _FLOATS:
            role = _BY_RANK.get(len(inputs[0].shape))
            if role is not None:
                inputs = (replace(inputs[0], role=role, axes=_FORMS[role][1]),)
        return cls(inputs, outputs)

    @property
    def primary(self) -> Tensor | None:
        """What a window goes into; None in a part of a graph that lacks it."""
        found = (self.find(role) for role in PRIMARY)
        return next((tensor for tensor in found if tensor is not None), None)

    @property
    def result(self) -> Tensor:
        """What the graph is compared by. Raises GraphError if it gives nothing but a cache."""
        found = [self.find(role) for role in _RESULTS]
        known = [tensor for tensor in (*found, *self.outputs) if tensor is not None]
        left = [tensor for tensor in known if tensor.role not in _AFTER.values()]
        if not left:
            raise GraphError("The graph gives nothing that it could be compared by.")
        return left[0]

    @property
    def is_causal(self) -> bool:
        """Whether no row needs later ones: the graph takes a cache, which only such a model has."""
        return bool(self.past)

    def find(self, role: Role) -> Tensor | None:
        """The one tensor of `role`, or the first."""
        return next((t for t in (*self.inputs, *self.outputs) if t.role is role), None)

    @property
    def past(self) -> tuple[Tensor, ...]:
        """What a decode step takes of the step before: key and value of every layer, then the sink
        index of every lifecycle."""
        return tuple(sorted((t for t in self.inputs if t.role in _AFTER), key=_cache_order))

    @property
    def present(self) -> tuple[Tensor, ...]:
        """What a step leaves for the next one: in the order of `past`, one for each."""
        left = {(t.role, t.layer, t.kind): t for t in self.outputs}
        after = ((_AFTER[t.role], t.layer, t.kind) for t in self.past if t.role)
        return tuple(left[key] for key in after if key in left)

    @property
    def layers(self) -> int:
        """How many layers have a cache."""
        return _count(self.inputs, Role.PAST)

    def check_causal_lm(self, where: str, roles: Sequence[Role] = (Role.IDS,)) -> None:
        """Raise GraphError with the first input or output that a causal LM with KV cache has and
        this lacks; `roles` are the inputs that it must have besides its cache."""
        inputs, outputs = ({t.name for t in side} for side in (self.inputs, self.outputs))
        layers = range(max(self.layers, _count(self.outputs, Role.PRESENT), 1))
        past = [name_of(Role.PAST, layer, kind) for layer in layers for kind in KINDS]
        sinks = [t.layer or 0 for t in self.past if t.role is Role.PAST_SINKS]
        needed_in = [*(name_of(role) for role in roles), *past]
        needed_out = [
            *output_names(len(layers)), *(name_of(Role.PRESENT_SINKS, number) for number in sinks)
        ]  # fmt: skip
        for kind, needed, found in (("input", needed_in, inputs), ("output", needed_out, outputs)):
            lacking = [name for name in needed if name not in found]
            if lacking:
                raise GraphError(
                    f"{where} is no causal LM with KV cache: it has no {kind} '{lacking[0]}' "
                    f"(has: {', '.join(sorted(found)[:_SHOWN])}, ...)."
                )

    def feeds(
        self, window: Any, given: Mapping[str, NDArray[Any]] | None = None
    ) -> dict[str, NDArray[Any]]:
        """A value for every input: unpadded sequences with an empty cache, or pictures, or sounds.

        window: ids `[seq]`, pixels `[channels, height, width]` or a spectrogram `[bands, frames]`,
        or several of one size with a batch axis in front; given: by name what is none of that, of
        which a graph takes what it has. Raises GraphError for an input that is neither known nor
        given.
        """
        known, batch = _known(window)
        more, feeds = given or {}, {}
        for tensor in self.inputs:
            if tensor.name in more:
                feeds[tensor.name] = more[tensor.name]
            elif tensor.role in known:
                feeds[tensor.name] = known[tensor.role].astype(tensor.numpy_type, copy=False)
            elif tensor.role in _AFTER:
                feeds[tensor.name] = tensor.empty(batch)
            else:
                raise GraphError(f"The graph has an input that is not understood: '{tensor.name}'.")
        return feeds


def random_windows(interface: Interface, ids: int, count: int) -> list[NDArray[Any]]:
    """Windows for a graph without a cache, to compare it with another: random numbers, or token ids
    below `ids`; an axis without a size gets one."""
    import numpy as np

    random, primary = np.random.default_rng(0), interface.primary
    assert primary is not None
    sizes = {SEQ: 24, CHANNELS: 3, HEIGHT: 224, WIDTH: 224, BANDS: 80, FRAMES: 3000}
    axes = list(zip(primary.shape, primary.axes, strict=True))[1:]
    shape = [size if isinstance(size, int) else sizes[axis] for size, axis in axes]
    if primary.role is Role.IDS:
        return [random.integers(0, ids, shape) for _ in range(count)]
    return [random.normal(size=shape).astype(np.float32) for _ in range(count)]


def _known(window: Any) -> tuple[dict[Role, NDArray[Any]], int]:
    """What follows from a window, by role, and the size of its batch."""
    import numpy as np

    array = np.asarray(window)
    if array.dtype.kind == "f" and array.ndim > 1:
        # A batch of spectrograms has as many axes as a picture: the graph has one of both roles.
        one = {len(_FORMS[role][1]) - 1: role for role in (Role.PIXELS, Role.SOUND)}
        alone = one.get(array.ndim)
        values = {role: array[None] if role is alone else array for role in one.values()}
        return values, 1
    tokens = np.atleast_2d(array.astype(np.int64))
    known = {
        Role.IDS: tokens,
        Role.MASK: np.ones_like(tokens),
        Role.POSITIONS: np.tile(np.arange(tokens.shape[1], dtype=np.int64), (len(tokens), 1)),
        Role.SEGMENTS: np.zeros_like(tokens),
    }
    return known, len(tokens)


def _tensor(
    name: str, dtype: str, shape: Iterable[int | str | None], roles: Iterable[Role]
) -> Tensor:
    sizes = tuple(shape)
    for role in roles:
        match = _PATTERNS[role].fullmatch(name)
        if match is None:
            continue
        parts = match.groupdict()
        layer = parts.get("layer")
        number = None if layer is None else int(layer)
        return Tensor(name, dtype, sizes, role, number, parts.get("kind"), _FORMS[role][1])
    return Tensor(name, dtype, sizes)


def _of_value(value: ir.Value, roles: Iterable[Role]) -> Tensor:
    dims = value.shape or ()
    sizes = (dim if isinstance(dim, int) else dim.value for dim in dims)
    dtype = "" if value.dtype is None else value.dtype.name.lower()
    return _tensor(value.name or "", dtype, sizes, roles)


def _of_info(info: onnx.ValueInfoProto, roles: Iterable[Role]) -> Tensor:
    import onnx

    kind = info.type.tensor_type
    sizes = (
        d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in kind.shape.dim
    )
    known = kind.elem_type in onnx.TensorProto.DataType.values()
    dtype = onnx.TensorProto.DataType.Name(kind.elem_type).lower() if known else ""
    return _tensor(info.name, dtype, sizes, roles)


def _count(tensors: Iterable[Tensor], role: Role) -> int:
    return len({tensor.layer for tensor in tensors if tensor.role is role})


def _cache_order(tensor: Tensor) -> tuple[bool, int, str]:
    return tensor.kind is None, tensor.layer or 0, tensor.kind or ""
