"""What attention does with sinks, block by block and head by head: the mechanism that keeps them.

A sink's row after the norm is the same vector every time. The key's product maps it to one
direction, queries point that way, so much of the attention goes there; the value's product makes
little of it. Each of these is a number here. Grouped heads are looked at one by one: a query's head
beside the key's head that it shares.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import onnx_ir as ir

from iq_export.graph.attention import Attended, attentions
from iq_export.graph.sites import LAYOUT_OPS, NORM_OPS, Branch, Sites
from iq_export.observe.samples import Window
from iq_export.observe.walk import CPU, Observer, Piece, Values, cut, named

# Attention of longer windows would cost the square of their length.
_MOST_TOKENS = 512
# Rows that are compared with each other.
_ROWS = 48
# Rotary pairs, by how fast they turn.
_ZONES = 4


@dataclass(frozen=True)
class Heads:
    """An `Attention` node of a block, its values by name. `read` is what the products in front of
    it read, `plain_key` the key before its rotary embedding, `value_weight` the weight `[hidden,
    heads * size]` that makes the values, None where that is no product of its own. `rotary`: how
    many features of a key are rotated, and whether pairs stand side by side; None without."""

    block: int
    attended: Attended
    read: str
    plain_key: str
    value: str
    mask: str | None
    causal: bool
    softcap: float
    value_weight: str | None
    rotary: tuple[int, bool] | None


@dataclass
class Mechanism:
    """One lifecycle in one block. Lists have a number per head of the queries (`mass`, `aligned`,
    `query_cosine`) or of the keys and values (the rest).

    `mass`: how much of their attention the other tokens behind a sink give to sinks. `aligned`:
    share of pairs of such a token's query and a sink's key, in its sight, with a positive product;
    `query_cosine` their mean cosine. `rows_alike`: mean cosine of two sinks' rows after the norm
    and `keys_alike` of their keys before the rotary embedding, beside those of other tokens; None
    with less than two sinks that differ. `value_ratio`: mean length of sinks' values over that of
    other tokens. `spectrum`: what share of a row's energy lies on the half of the value weight's
    directions that it amplifies most (`upper`) and least (`lower`); it erases the rest. None
    where the weight is shared with queries and keys. `zones`: of the products of the same queries
    and keys, what share of the positive part comes from each quarter of the rotary pairs, the
    fastest first, per head `[4]` (features that are not rotated have the rest); `pair` the one that
    gives most and `pair_share` how much. The slow ones hardly know a distance. None without a
    rotary embedding.
    """

    block: int
    mass: list[float]
    aligned: list[float]
    query_cosine: list[float]
    value_ratio: list[float]
    rows_alike: float | None
    rows_alike_others: float | None
    keys_alike: list[float] | None
    keys_alike_others: list[float] | None
    spectrum: dict[str, dict[str, list[float]]] | None
    zones: list[list[float]] | None = None
    pair: list[int] | None = None
    pair_share: list[float] | None = None


@dataclass
class _Sums:
    """What is added up of one lifecycle and block; arrays are `[heads]`."""

    tokens: int = 0
    pairs: int = 0
    mass: np.ndarray | float = 0.0
    aligned: np.ndarray | float = 0.0
    cosine: np.ndarray | float = 0.0
    terms: np.ndarray | float = 0.0  # of these products, by feature: [heads, head_dim]
    lengths: dict[bool, list[np.ndarray]] = field(default_factory=lambda: {True: [], False: []})
    # Rows after the norm, and their keys `[heads, head_dim]`, of sinks and of others.
    rows: dict[bool, list[np.ndarray]] = field(default_factory=lambda: {True: [], False: []})
    keys: dict[bool, list[np.ndarray]] = field(default_factory=lambda: {True: [], False: []})


def heads_of(model: ir.Model, sites: Sites) -> list[Heads]:
    """The attention of every block that is a single op with fixed sizes."""
    known = {each.node: each for each in attentions(model)}
    nodes = {str(node.name): node for node in model.graph if node.op_type == "Attention"}
    made = {value.name: value for node in model.graph for value in node.outputs}
    found = []
    for block in sites.blocks:
        site = block.attention.attention
        if site is None or site.node not in known:
            continue
        node = nodes[site.node]
        mask = node.inputs[3] if len(node.inputs) > 3 else None
        found.append(
            Heads(
                block.index, known[site.node], block.attention.inputs[0].input,
                _unrotated(made[site.key]), site.value, None if mask is None else str(mask.name),
                _attribute(node, "is_causal") > 0, _attribute(node, "softcap"),
                _weight_of(made[site.value], block.attention, site.value_features),
                _rotary(made[site.key], known[site.node].head_dim),
            )
        )  # fmt: skip
    return found


class AttentionObserver(Observer):
    """`mechanisms()` of every lifecycle on `windows`, in the blocks `passed` whose norms read its
    spike; `sinks[i]` is bool `[lifecycles, seq]`, who of window i belongs to each."""

    def __init__(
        self,
        model: ir.Model,
        sites: Sites,
        passed: Sequence[range],
        windows: Sequence[Window],
        sinks: Sequence[np.ndarray],
    ) -> None:
        self._model, self._windows, self._sinks = model, windows, sinks
        blocks = {block for its in passed for block in its}
        self.heads = [heads for heads in heads_of(model, sites) if heads.block in blocks]
        self.names = list(
            dict.fromkeys(
                name
                for heads in self.heads
                for name in (heads.attended.query, heads.attended.key, heads.plain_key,
                             heads.value, heads.read)
            )
        )  # fmt: skip
        self.of = range(len(windows))
        self._count = len(passed)
        self._sums = {
            (number, heads.block): _Sums()
            for number, its in enumerate(passed)
            for heads in self.heads
            if heads.block in its
        }
        self._first: set[tuple[int, int, int]] = set()  # sinks at position 0 that were kept
        self._masks = lru_cache(maxsize=4)(self._masks_of)

    def reach(self, number: int) -> int:
        return min(len(self._windows[number].ids), _MOST_TOKENS)

    def add(self, number: int, values: Values) -> None:
        for heads in self.heads:
            if heads.attended.query not in values:
                continue
            length = values[heads.attended.query].shape[0]
            sinks = self._sinks[number][:, :length]
            lives = [n for n, block in self._sums if block == heads.block and sinks[n].any()]
            if lives:
                seen = _Looked(heads, values, self._masks(length).get(heads.mask or ""))
                for life in lives:
                    self._add(
                        life, number, heads, seen, sinks[life], np.logical_not(sinks.any(axis=0))
                    )

    def _add(
        self,
        life: int,
        number: int,
        heads: Heads,
        seen: _Looked,
        sinks: np.ndarray,
        others: np.ndarray,
    ) -> None:
        sums = self._sums[life, heads.block]
        mass, dots, cosines, terms, pairs = seen.of(sinks, others)
        if pairs:
            sums.tokens += mass.shape[1]
            sums.pairs += pairs
            sums.mass = sums.mass + mass.sum(1)
            sums.aligned = sums.aligned + dots
            sums.cosine = sums.cosine + cosines
            sums.terms = sums.terms + terms
        lengths = np.linalg.norm(seen.values, axis=2)  # [heads, seq]
        ids = self._windows[number].ids
        for sink in (True, False):
            chosen = np.flatnonzero(sinks if sink else others)
            sums.lengths[sink].append(lengths[:, chosen])
            if not sink:  # a few of each window
                chosen = chosen[:: max(1, len(chosen) // 4)]
            for row in chosen:
                at_start = (life, heads.block, int(ids[row]))
                if len(sums.rows[sink]) >= _ROWS or (sink and row == 0 and at_start in self._first):
                    continue  # the same token with nothing before it is the same row
                if sink and row == 0:
                    self._first.add(at_start)
                sums.rows[sink].append(seen.rows[row])
                sums.keys[sink].append(seen.plain_keys[:, row])

    def mechanisms(self) -> list[list[Mechanism]]:
        """Per lifecycle, by block; blocks in which none of its tokens was seen are left out."""
        found: list[list[Mechanism]] = [[] for _ in range(self._count)]
        by_block = {heads.block: heads for heads in self.heads}
        for (number, block), sums in self._sums.items():
            if sums.tokens:
                found[number].append(self._mechanism(by_block[block], sums))
        return found

    def _mechanism(self, heads: Heads, sums: _Sums) -> Mechanism:
        sink, other = (np.concatenate(sums.lengths[kind], axis=1) for kind in (True, False))
        ratio = sink.mean(1) / np.maximum(other.mean(1), 1e-12)
        return Mechanism(
            block=heads.block,
            mass=_list(np.asarray(sums.mass) / sums.tokens),
            aligned=_list(np.asarray(sums.aligned) / sums.pairs),
            query_cosine=_list(np.asarray(sums.cosine) / sums.pairs),
            value_ratio=_list(ratio),
            rows_alike=_row_cosine(sums.rows[True]),
            rows_alike_others=_row_cosine(sums.rows[False]),
            keys_alike=_key_cosines(sums.keys[True]),
            keys_alike_others=_key_cosines(sums.keys[False]),
            spectrum=self._spectrum(heads, sums, sink.shape[0]),
            **_by_pair(np.asarray(sums.terms), heads.rotary),
        )

    def _spectrum(
        self, heads: Heads, sums: _Sums, count: int
    ) -> dict[str, dict[str, list[float]]] | None:
        if heads.value_weight is None:
            return None
        tensor = self._model.graph.initializers[heads.value_weight].const_value
        assert tensor is not None
        weight = tensor.numpy().astype(np.float32, copy=False)
        found: dict[str, dict[str, list[float]]] = {}
        bases = [np.linalg.svd(part, full_matrices=False)[0]
                 for part in np.split(weight, count, axis=1)]  # fmt: skip
        for kind, name in ((True, "sinks"), (False, "others")):
            rows = np.stack(sums.rows[kind])
            rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
            energy = [((rows @ basis) ** 2).mean(0) for basis in bases]
            half = energy[0].size // 2
            found[name] = {
                "upper": _list([each[:half].sum() for each in energy]),
                "lower": _list([each[half:].sum() for each in energy]),
            }
        return found

    def _masks_of(self, length: int) -> dict[str, np.ndarray]:
        """The masks of attention for one window of so many tokens, which depend on that alone."""
        names = sorted({heads.mask for heads in self.heads if heads.mask is not None})
        if not names:
            return {}
        window = next(w for w in self._windows if len(w.ids) >= length)
        window = Window(window.ids[:length], window.bos, window.start)
        with Piece(cut(self._model, (), names), names, CPU, named(self._model)) as piece:
            return piece.run(window, {})


class _Looked:
    """One block and window: `values` and `plain_keys` are `[heads, seq, size]`, `rows` `[seq,
    hidden]`, after the norm."""

    def __init__(self, heads: Heads, values: Values, mask: np.ndarray | None) -> None:
        attended = heads.attended
        size = attended.head_dim
        query, key = (_by_head(values[n], size) for n in (attended.query, attended.key))
        self.plain_keys = _by_head(values[heads.plain_key], size)
        self.values = _by_head(values[heads.value], values[heads.value].shape[1] // key.shape[0])
        self.rows = values[heads.read]
        self._heads, self._query = heads, query
        self._key = np.repeat(key, query.shape[0] // key.shape[0], axis=0)
        length = query.shape[1]
        self._sight = np.ones((length, length), bool)
        if heads.causal:
            self._sight = np.tri(length, dtype=bool)
        self._bias: np.ndarray | None = None
        if mask is not None and mask.dtype == np.bool_:
            mask = np.broadcast_to(mask, (1, attended.heads, length, length))[0]
            self._sight = self._sight & mask
        elif mask is not None:
            self._bias = np.broadcast_to(mask, (1, attended.heads, length, length))[0]
            self._sight = self._sight & (self._bias > np.finfo(np.float16).min)
        self._sight = np.broadcast_to(self._sight, (attended.heads, length, length))

    def of(
        self, sinks: np.ndarray, others: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int]:
        """Of the `others` that have one of the `sinks` in sight: their attention to sinks `[heads,
        tokens]`; summed over pairs of such a token and a sink in its sight, how many products are
        positive and the cosine, `[heads]`, and the products by feature, `[heads, head_dim]`; and
        the number of pairs of one head."""
        places = np.flatnonzero(sinks)
        sight = self._sight[:, :, places]
        queries = np.flatnonzero(others & sight[0].any(1))
        count = self._heads.attended.heads
        mass = np.zeros((count, queries.size), np.float32)
        positive, cosines = np.zeros(count), np.zeros(count)
        terms = np.zeros((count, self._key.shape[2]))
        for head in range(count):  # one at a time: their scores are the square of the length
            query, key = self._query[head, queries], self._key[head]
            products = query @ key.T
            scores = products * self._heads.attended.scale
            if self._heads.softcap:
                scores = self._heads.softcap * np.tanh(scores / self._heads.softcap)
            if self._bias is not None:
                scores = scores + self._bias[head, queries]
            scores = np.where(self._sight[head, queries], scores, -np.inf)
            weights = np.exp(scores - scores.max(1, keepdims=True))
            mass[head] = weights[:, places].sum(1) / weights.sum(1)
            seen = sight[head, queries]
            lengths = np.outer(np.linalg.norm(query, axis=1), np.linalg.norm(key[places], axis=1))
            among = products[:, places]
            positive[head] = (among[seen] > 0).sum()
            cosines[head] = (among[seen] / np.maximum(lengths[seen], 1e-12)).sum()
            terms[head] = ((seen.T @ query) * key[places]).sum(0)
        return mass, positive, cosines, terms, int(sight[0, queries].sum())


def _rotation(key: ir.Value) -> ir.Node | None:
    node = key.producer()
    while node is not None and node.op_type in LAYOUT_OPS and node.inputs[0] is not None:
        node = node.inputs[0].producer()
    return node if node is not None and node.op_type == "RotaryEmbedding" else None


def _unrotated(key: ir.Value) -> str:
    node = _rotation(key)
    if node is not None and node.inputs[0] is not None:
        key = node.inputs[0]
    return str(key.name)


def _rotary(key: ir.Value, size: int) -> tuple[int, bool] | None:
    node = _rotation(key)
    if node is None:
        return None
    rotated = int(_attribute(node, "rotary_embedding_dim")) or size
    return rotated, bool(_attribute(node, "interleaved"))


def _by_pair(terms: np.ndarray, rotary: tuple[int, bool] | None) -> dict[str, Any]:
    """`zones`, `pair` and `pair_share` of products by feature, `[heads, head_dim]`."""
    if rotary is None:
        return {}
    rotated, interleaved = rotary
    turning, rest = terms[:, :rotated], terms[:, rotated:]
    if interleaved:
        pairs = turning[:, 0::2] + turning[:, 1::2]
    else:
        pairs = turning[:, : rotated // 2] + turning[:, rotated // 2 :]
    gains = np.maximum(pairs, 0)
    every = np.maximum(gains.sum(1) + np.maximum(rest, 0).sum(1), 1e-30)
    zones = [part.sum(1) / every for part in np.array_split(gains, _ZONES, axis=1)]
    return {
        "zones": np.stack(zones, axis=1).tolist(),
        "pair": gains.argmax(1).tolist(),
        "pair_share": _list(gains.max(1) / every),
    }


def _weight_of(value: ir.Value, branch: Branch, features: int) -> str | None:
    """The weight of the branch's product that makes `value`, through a bias, norm or layout."""
    made = {linear.node: linear for linear in branch.inputs if linear.out_features == features}
    node = value.producer()
    while node is not None and str(node.name) not in made:
        computed = [v for v in node.inputs if v is not None and not v.is_initializer()]
        if node.op_type not in LAYOUT_OPS | NORM_OPS | {"Add"} or not computed:
            return None
        node = computed[0].producer()
    return None if node is None else made[str(node.name)].weight


def _attribute(node: ir.Node, name: str) -> float:
    found = node.attributes.get(name)
    return float(found.value) if found is not None else 0.0


def _by_head(rows: np.ndarray, size: int) -> np.ndarray:
    """`[seq, heads * size]` as float32 `[heads, seq, size]`."""
    split = rows.reshape(rows.shape[0], -1, size)
    return split.transpose(1, 0, 2).astype(np.float32, copy=False)


def _row_cosine(rows: Sequence[np.ndarray]) -> float | None:
    return _cosine(np.stack(rows)) if len(rows) > 1 else None


def _key_cosines(keys: Sequence[np.ndarray]) -> list[float] | None:
    if len(keys) < 2:
        return None
    return [_cosine(head) for head in np.stack(keys, axis=1)]


def _cosine(rows: np.ndarray) -> float:
    """The mean cosine of two different rows of `[rows, features]`."""
    unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    count = len(unit)
    return float((np.square(unit.sum(0)).sum() - count) / (count * (count - 1)))


def _list(values: Sequence[float] | np.ndarray) -> list[float]:
    return [float(value) for value in values]
