"""Trace a few layers, write the rest: the cost of a trace no longer grows with the depth.

torch.export spends seconds on every decoder layer although most are the same code with other
weights. So the model is traced with layer 0 and one representative of every distinct kind of
layer; in the ONNX graph the representative's nodes are then copied for each other layer of its
kind, with that layer's parameters and cache. Whenever the layers or the graph do not look exactly
as this needs, the answer is None and the caller traces all layers; the traced graph is compared
with the original model in any case (`verify`).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
from onnx_ir.passes import common

from iq_export.graph.interface import KINDS, Interface, Role, name_of
from iq_export.model.part import text_config
from iq_export.model.scopes import SCOPES, all_scopes

if TYPE_CHECKING:
    import torch

_PLAIN = (bool, int, float, str, tuple, type(None))


@dataclass(frozen=True)
class LayerPlan:
    """Which layers are traced, and which traced layer stands for each layer of the model.

    `prefix` is the qualified name of the list of layers; `traced` holds indices of layers in the
    model, layer 0 first; `template[j]` is the position in `traced` that layer j is copied from.
    """

    prefix: str
    traced: tuple[int, ...]
    template: tuple[int, ...]


def plan_layers(model: Any) -> LayerPlan | None:
    """Group a transformers model's decoder layers by kind; None if tracing all is as cheap."""
    found = _layer_list(model)
    if found is None:
        return None
    prefix, layers = found
    types = getattr(text_config(model), "layer_types", None) or [None] * len(layers)
    kinds = [(_signature(layer), kind) for layer, kind in zip(layers, types, strict=True)]
    traced, position = [0], {}
    for index, kind in enumerate(kinds[1:], start=1):
        if kind not in position:
            position[kind] = len(traced)
            traced.append(index)
    if len(traced) >= len(layers):
        return None
    return LayerPlan(prefix, tuple(traced), (0, *(position[kind] for kind in kinds[1:])))


def layers_of(model: Any) -> list[Any]:
    """The decoder layers of a transformers model; none if which they are is not plain."""
    found = _layer_list(model)
    return [] if found is None else list(found[1])


@contextlib.contextmanager
def shortened(model: Any, plan: LayerPlan) -> Iterator[None]:
    """Give `model` only the traced layers for the time of the block, numbered from 0."""
    import torch

    parent_name, _, attribute = plan.prefix.rpartition(".")
    parent = model.get_submodule(parent_name)
    layers, config = getattr(parent, attribute), text_config(model)
    types, indices = getattr(config, "layer_types", None), {}
    try:
        setattr(parent, attribute, torch.nn.ModuleList(layers[i] for i in plan.traced))
        config.num_hidden_layers = len(plan.traced)
        if types is not None:
            config.layer_types = [types[i] for i in plan.traced]
        for position, index in enumerate(plan.traced):
            for module in layers[index].modules():
                if isinstance(getattr(module, "layer_idx", None), int):
                    indices[module] = module.layer_idx
                    module.layer_idx = position
        yield
    finally:
        setattr(parent, attribute, layers)
        config.num_hidden_layers = len(layers)
        if types is not None:
            config.layer_types = types
        for module, index in indices.items():
            module.layer_idx = index


def replicate(model: ir.Model, plan: LayerPlan, module: torch.nn.Module) -> bool:
    """Copy the traced layers' nodes until `model` has all layers of `module`, in place.

    `module` is the flat module with all its layers. Returns False, with `model` unchanged but for
    its constants, if the graph is not a plain chain of layers.
    """
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    prefix = f"model.{plan.prefix}"
    chain = _find_chain(model.graph, prefix, len(plan.traced))
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    if chain is None or not _has_parameters(chain, prefix, plan, tensors):
        return False
    _Writer(model.graph, plan, chain, prefix, tensors).write()
    return True


@dataclass
class _Chain:
    """The traced layers as they lie in the graph: layer p reads `entry[p]`, writes `exit[p]`."""

    blocks: list[list[ir.Node]]
    entry: list[ir.Value | None]
    exit: list[ir.Value]
    after: list[ir.Node]


def _layer_list(model: Any) -> tuple[str, Any] | None:
    import torch

    depth = getattr(text_config(model), "num_hidden_layers", 0)
    lists = [
        (name, child)
        for name, child in model.named_modules()
        if isinstance(child, torch.nn.ModuleList) and len(child) == depth
    ]
    return lists[0] if len(lists) == 1 and depth > 1 else None


def _signature(layer: torch.nn.Module) -> tuple[Any, ...]:
    """Everything that can make two layers compute differently, short of their weights' values."""
    parts: list[Any] = []
    for name, module in layer.named_modules():
        plain = sorted(
            (key, repr(value))
            for key, value in vars(module).items()
            if not key.startswith("_") and key != "layer_idx" and isinstance(value, _PLAIN)
        )
        tensors = [
            (key, tuple(tensor.shape), str(tensor.dtype))
            for key, tensor in (
                *module.named_parameters(recurse=False),
                *module.named_buffers(recurse=False),
            )
        ]
        parts.append((name, type(module).__qualname__, tuple(plain), tuple(tensors)))
    return tuple(parts)


def _find_chain(graph: ir.Graph, prefix: str, count: int) -> _Chain | None:
    """Split the graph into what is before, the layers, and what is after; None if it is not so."""
    owner = {node: _layer_of(node, prefix) for node in graph}
    blocks: list[list[ir.Node]] = [[] for _ in range(count)]
    after: list[ir.Node] = []
    downstream: set[ir.Node] = set()
    for node in graph:
        layer = owner[node]
        fed = any(v is not None and v.producer() in downstream for v in node.inputs)
        if layer is not None:
            blocks[layer].append(node)
            downstream.add(node)
        elif fed:
            after.append(node)
            downstream.add(node)
    entry: list[ir.Value | None] = []
    leaving: list[set[ir.Value]] = [set() for _ in range(count)]
    for layer, block in enumerate([*blocks, after]):
        inside, arriving = set(block), set()
        for node in block:
            for value in node.inputs:
                source = value.producer() if value is not None else None
                if source is None or source in inside or source not in downstream:
                    continue
                if owner[source] != layer - 1:
                    return None
                arriving.add(value)
        if len(arriving) != (1 if layer else 0):
            return None
        entry.append(next(iter(arriving), None))
        if layer:
            leaving[layer - 1] = arriving
    for tensor, value in zip(Interface.of_graph(graph).inputs, graph.inputs, strict=True):
        layer = tensor.layer
        if layer is None:
            continue
        # Sizes are read from the first cache, outside of all layers.
        allowed = {layer, None} if layer == 0 else {layer}
        if not {owner[use.node] for use in value.uses()} <= allowed:
            return None
    return _Chain(blocks, entry[:count], [next(iter(values)) for values in leaving], after)


def _layer_of(node: ir.Node, prefix: str) -> int | None:
    for scope in reversed(all_scopes(node)):
        match = re.match(rf"{re.escape(prefix)}\.(\d+)(\.|$)", scope)
        if match:
            return int(match[1])
    return None


def _has_parameters(
    chain: _Chain, prefix: str, plan: LayerPlan, tensors: dict[str, torch.Tensor]
) -> bool:
    """Whether every layer owns a parameter for each one that its template's nodes read."""
    for position, block in enumerate(chain.blocks):
        own = f"{prefix}.{position}."
        names = {v.name or "" for n in block for v in n.inputs if v is not None}
        names = {name for name in names if name.startswith(f"{prefix}.")}
        if any(not name.startswith(own) for name in names):
            return False
        layers = [j for j, template in enumerate(plan.template) if template == position]
        suffixes = [name[len(own) :] for name in names]
        if any(f"{prefix}.{j}.{suffix}" not in tensors for j in layers for suffix in suffixes):
            return False
    return True


class _Writer:
    """Replaces the traced layers after the first by one copy per layer of the model."""

    def __init__(
        self,
        graph: ir.Graph,
        plan: LayerPlan,
        chain: _Chain,
        prefix: str,
        tensors: dict[str, torch.Tensor],
    ) -> None:
        self.graph, self.plan, self.chain = graph, plan, chain
        self.prefix, self.tensors = prefix, tensors

    def write(self) -> None:
        inputs, outputs = self._inputs(), [self.graph.outputs[0]]
        first = {name_of(Role.PRESENT, 0, kind) for kind in KINDS}
        outputs += [v for v in self.graph.outputs if v.name in first]
        current, copies = self.chain.exit[0], []
        fresh: list[ir.Value] = []
        for layer in range(1, len(self.plan.template)):
            position = self.plan.template[layer]
            values = self._parameters(layer, position, fresh)
            values[self.chain.entry[position]] = current
            for kind in KINDS:
                name = name_of(Role.PAST, position, kind)
                values[inputs[name]] = inputs[name_of(Role.PAST, layer, kind)]
            copies += self._copy(layer, position, values)
            current = values[self.chain.exit[position]]
            outputs += self._outputs(layer, position, values)
        self._replace(copies, current, outputs, fresh)

    def _inputs(self) -> dict[str, ir.Value]:
        """All graph inputs by name, with the caches of the layers that were not traced added; each
        of the shape that its layer's template has."""
        known = {value.name: value for value in self.graph.inputs}
        shapes = {name: value.shape for name, value in known.items()}
        for layer, position in enumerate(self.plan.template):
            for kind in KINDS:
                name, model = (name_of(Role.PAST, at, kind) for at in (layer, position))
                if name not in known:
                    known[name] = ir.Value(name=name, type=known[model].type)
                    self.graph.inputs.append(known[name])
                known[name].shape = shapes[model].copy()
        return known

    def _parameters(
        self, layer: int, position: int, fresh: list[ir.Value]
    ) -> dict[ir.Value | None, ir.Value]:
        from onnx_ir.tensor_adapters import TorchTensor

        own, values = f"{self.prefix}.{position}.", {}
        for node in self.chain.blocks[position]:
            for value in node.inputs:
                if value is None or value in values or not (value.name or "").startswith(own):
                    continue
                name = f"{self.prefix}.{layer}.{value.name[len(own) :]}"
                tensor = TorchTensor(self.tensors[name].detach(), name=name)
                values[value] = ir.Value(
                    name=name, shape=value.shape, type=value.type, const_value=tensor
                )
                fresh.append(values[value])
        return values

    def _copy(
        self, layer: int, position: int, values: dict[ir.Value | None, ir.Value]
    ) -> list[ir.Node]:
        copies = []
        for node in self.chain.blocks[position]:
            copy = ir.Node(
                node.domain,
                node.op_type,
                [values.get(value, value) for value in node.inputs],
                list(node.attributes.values()),
                num_outputs=len(node.outputs),
                version=node.version,
                name=f"{node.name}_{layer}",
                metadata_props={SCOPES: self._scopes(node, layer, position)},
            )
            for old, new in zip(node.outputs, copy.outputs, strict=True):
                values[old] = new
                new.name, new.type = f"{old.name}_{layer}", old.type
                new.shape = old.shape.copy() if old.shape is not None else None
            copies.append(copy)
        return copies

    def _scopes(self, node: ir.Node, layer: int, position: int) -> str:
        text = node.metadata_props.get(SCOPES, "")
        return re.sub(
            rf"{re.escape(self.prefix)}\.{position}(?=[.'\"])", f"{self.prefix}.{layer}", text
        )

    def _outputs(
        self, layer: int, position: int, values: dict[ir.Value | None, ir.Value]
    ) -> list[ir.Value]:
        """This layer's cache outputs; their final names are given in `_replace`."""
        names = [name_of(Role.PRESENT, position, kind) for kind in KINDS]
        by_name = {value.name: value for value in self.graph.outputs}
        return [values[by_name[name]] for name in names]

    def _replace(
        self,
        copies: list[ir.Node],
        last: ir.Value,
        outputs: list[ir.Value],
        fresh: list[ir.Value],
    ) -> None:
        for node in self.chain.after:
            for index, value in enumerate(node.inputs):
                if value is self.chain.exit[-1]:
                    node.replace_input_with(index, last)
        self.graph.outputs.clear()
        self.graph.outputs.extend(outputs)
        self.graph.insert_before(self.chain.after[0], copies)
        dropped = [node for block in self.chain.blocks[1:] for node in block]
        stale = {v for n in dropped for v in n.inputs if v is not None and v.is_initializer()}
        self.graph.remove(dropped, safe=True)
        for value in stale:
            if not value.uses():
                del self.graph.initializers[value.name]
        for value in fresh:
            self.graph.initializers.add(value)
        for index, value in enumerate(outputs[1:]):
            value.name = name_of(Role.PRESENT, index // len(KINDS), KINDS[index % len(KINDS)])
