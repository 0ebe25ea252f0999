"""Does the traced graph compute what the original model computes?

Checked after every trace; it is what allows the trace to take short cuts. The graph's logits are
compared, token by token, with the model's in float64, and the measure is the model's own float32
noise: how far equally right float32 evaluations of it (transformers' own, and four that round
otherwise) are from float64 at that token. Some tokens stand on a cliff, where rounding alone moves
logits by a thousandth of their range, and any fixed bound is too narrow there and too wide at all
others.

The rows: text with BOS and without, and random tokens, as one left-padded batch in two chunks and
single steps; a row whose positions jump to the end of what the rotation or table was made for; and
steps on a cache that is longer than the sliding window, or over the edge of a chunk. That cache is
filled from the model's own keys and values, so that a window of thousands of tokens costs no pass
over thousands of tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iq_export.errors import ModelError
from iq_export.model.experts import unmark_experts
from iq_export.model.limits import position_limit
from iq_export.model.part import text_config
from iq_export.model.positions import Positions, positions_of
from iq_export.model.replicate import layers_of
from iq_export.model.weights import Weights

# How many times the noise an equal graph may be off; ten times is a defect (docs/parity.md).
TOLERANCE = 6.0

_LENGTHS = (40, 36, 29, 17)
_JUMP, _STEPS = 24, 8  # tokens of the row whose positions jump, and of the steps on a long cache
_REFERENCE_BYTES = 256 << 20
_SEED = 20
_JITTERS, _JITTER_SEED = 4, 21
# Two units in the last place of the largest logit: differences below are none.
_FLOOR = 2.0**-22
_TEXTS = (
    "In 1905, a clerk of the patent office wrote four papers. The first, on light, began: "
    '"It is well known that..." - and by 2:30 p.m. nobody in Bern had read it.\n\nNobody, that is, '
    "but a friend. He asked for 15 copies, at 0.25 each, and sent them on by train.",
    "def mean(values):\n    # the middle of things\n    return sum(values) / len(values)\n\n"
    "print(mean([3, 1, 4, 1, 5]))  \u2192 2.8; na\u00efve, \u4f60\u597d, \U0001f642!\n",
)

Logits = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Row:
    """Tokens and positions `[seq]`, and the cache before them: key and value of every layer,
    float32 `[1, kv_heads, past, head_dim]` (empty: none)."""

    name: str
    ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    past: tuple[NDArray[np.float32], ...] = ()


@dataclass(frozen=True)
class Reference:
    """What the model says to each row: `exact` logits `[seq, vocab]`, computed in float64, and
    `noise` `[seq]`, the largest error of its float32 logits at each token."""

    rows: tuple[Row, ...]
    exact: tuple[Logits, ...]
    noise: tuple[Logits, ...]

    @property
    def logit_range(self) -> float:
        """Largest less smallest logit."""
        top = max(float(logits.max()) for logits in self.exact)
        return max(top - min(float(logits.min()) for logits in self.exact), 1e-30)


@dataclass(frozen=True)
class Parity:
    """How far a graph is from the model, at the token where it is furthest for its noise.

    `error` and `noise` are those of the graph and of the model's own float32 at that token,
    `largest` is the graph's largest error at any; each against the model in float64 and as a
    fraction of the logit range. Infinite if something is not finite.
    """

    error: float
    noise: float
    largest: float
    where: str = ""

    @property
    def ratio(self) -> float:
        """The error in multiples of the noise."""
        return self.error / self.noise

    @property
    def holds(self) -> bool:
        """Whether the graph counts as equal to the model."""
        return bool(np.isfinite(self.largest)) and self.ratio <= TOLERANCE

    def __str__(self) -> str:
        if not np.isfinite(self.largest):
            return "its logits are not finite where the model's are"
        return (
            f"at {self.where} its logits are {self.error:.2g} of their range from the model's in "
            f"float64, where the model's own float32 is {self.noise:.2g} from them "
            f"(allowed is {TOLERANCE:g} times that)"
        )


def refer(model: Any, tokenizer: Any = None, weights: Weights | None = None) -> Reference:
    """Compute what a transformers causal LM says to the rows, in float64 and in float32.

    `tokenizer` is a `run.generate.Tokenizer`; without one rows of text are random tokens. Takes
    three short passes: in the last one arithmetic varies, and each row stands in it several times.
    No more than one weight is in float64 at a time, and of those that `weights` has in files no
    more than a layer's are in memory, besides those outside of all layers. Raises ModelError if the
    model's own logits are not finite.
    """
    import torch

    from iq_export.model.arithmetic import float64, jittered

    model.set_attn_implementation("eager")
    unmark_experts(model)
    held = nullcontext() if weights is None else weights.streamed(model, layers_of(model))
    with torch.no_grad(), held:
        places = positions_of(model)
        rows = tuple(_rows(model, tokenizer, places))
        ((exact,), floats, varied) = (
            _all_logits(model, rows, places, float64()),
            _all_logits(model, rows, places, nullcontext()),
            _all_logits(model, rows, places, jittered(_JITTER_SEED), _JITTERS),
        )
    noise = [np.zeros(len(row.ids)) for row in rows]
    for logits in (*floats, *varied):
        for worst, right, found in zip(noise, exact, logits, strict=True):
            if not np.isfinite(right).all() or not np.isfinite(found).all():
                raise ModelError(
                    f"The model's own logits are not finite in float32 (architecture "
                    f"'{model.config.model_type}'): its weights are damaged or overflow."
                )
            np.maximum(worst, np.abs(found - right).max(-1), out=worst)
    # One sample of noise can be small by chance: no token has less than its row's median.
    floors = [
        np.maximum(np.median(worst), _FLOOR * np.abs(right).max(-1) + 1e-30)
        for worst, right in zip(noise, exact, strict=True)
    ]
    noise = [np.maximum(worst, floor) for worst, floor in zip(noise, floors, strict=True)]
    return Reference(rows, exact, tuple(noise))


def compare(path: Path, reference: Reference) -> Parity:
    """Run the rows through the graph, as it is written and with few weights in memory at a time.

    Raises GraphError if it cannot be loaded or run.
    """
    spread, worst, largest = reference.logit_range, Parity(0.0, 1.0, 0.0), 0.0
    found = _graph_logits(path, reference.rows)
    for row, right, noise, logits in zip(
        reference.rows, reference.exact, reference.noise, found, strict=True
    ):
        errors = np.abs(logits - right).max(-1)
        if not np.isfinite(errors).all():
            return Parity(float("inf"), 1.0, float("inf"), row.name)
        largest = max(largest, float(errors.max()) / spread)
        token = int(np.argmax(errors / noise))
        place = f"token {token} of {row.name}"
        here = Parity(float(errors[token]) / spread, float(noise[token]) / spread, 0.0, place)
        worst = max(worst, here, key=lambda parity: parity.ratio)
    return Parity(worst.error, worst.noise, largest, worst.where)


def _rows(model: Any, tokenizer: Any, places: Positions) -> Iterator[Row]:
    """The rows for a model; the first ones have no past and positions from 0 on, which the model
    counts by itself: pads among their tokens it might not count."""
    from iq_export.model.capture import mask_plan

    config, random = text_config(model), np.random.default_rng(_SEED)
    limit = position_limit(config.to_dict())
    limits = [limit.positions if limit is not None and limit.hard else None, places.rows]
    most = min((number for number in limits if number is not None), default=None)
    share = _REFERENCE_BYTES / (8 * config.vocab_size * (sum(_LENGTHS) + _JUMP + _STEPS))
    lengths = [max(8, int(length * min(1.0, share))) for length in _LENGTHS]
    lengths = [min(length, most or length) for length in lengths]
    names = ("a text after BOS", "a text", "random tokens", "random tokens after BOS")
    # Ids that can be looked up: a table may be narrower than the logits.
    known = min(config.vocab_size, model.get_input_embeddings().weight.shape[0])
    texts = [_encode(tokenizer, text, known) for text in _TEXTS]
    bos = _bos(config, known)
    starts: tuple[list[int], ...] = ([*bos, *texts[0]], texts[1], [], bos)
    for name, start, length in zip(names, starts, lengths, strict=True):
        ids = random.integers(0, known, length)
        ids[: len(start)] = start[:length]
        if not places.as_counted:
            ids[ids == getattr(config, "pad_token_id", None)] = names.index(name)
        row = Row(name, ids, np.arange(length))
        yield row
    trained = most or _reach(config)
    if trained is not None and trained > 2 * _JUMP:
        ids = random.integers(0, known, _JUMP)
        half = _JUMP // 2
        positions = np.concatenate([np.arange(half), np.arange(trained - half, trained)])
        yield Row(f"random tokens, their positions up to {trained - 1}", ids, positions)
    plan = mask_plan(model)
    for edge, beyond, where in (
        (plan.window, _STEPS // 2, "past the sliding window"),
        (plan.chunk, -_STEPS // 2, "over the edge of a chunk"),
    ):
        if edge is None or edge <= min(lengths) - _STEPS:
            continue
        past = edge + beyond
        ids = random.integers(0, known, _STEPS)
        name = f"tokens behind {past} others, {where}"
        positions = np.arange(_STEPS) + (min(past, most - _STEPS) if most else past)
        yield Row(name, ids, positions, _long_cache(model, row, places, past, random))


def _reach(config: Any) -> int | None:
    """Positions to check up to: beyond the original length of a scaled rotation."""
    values = config.to_dict()
    rope = values.get("rope_parameters") or {}
    nested = [value for value in rope.values() if isinstance(value, dict)] or [rope]
    scaled = [value.get("original_max_position_embeddings") for value in nested]
    limit = position_limit(values)
    if limit is None:
        return None
    longest = max((size for size in scaled if size), default=0)
    return min(limit.positions, longest + 2 * _JUMP) if longest else limit.positions


def _encode(tokenizer: Any, text: str, known: int) -> list[int]:
    if tokenizer is None:
        return []
    ids = tokenizer.encode(text, add_bos=False)
    return [token for token in ids if token < known]


def _bos(config: Any, known: int) -> list[int]:
    token = getattr(config, "bos_token_id", None)
    return [token] if isinstance(token, int) and 0 <= token < known else []


def _long_cache(
    model: Any, row: Row, places: Positions, length: int, random: np.random.Generator
) -> tuple[NDArray[np.float32], ...]:
    """Keys and values that the model gave to `row`, drawn again and again; the first stays first,
    since it is the one that attention sinks to."""
    cache = _torch_cache(())
    _forward(model, row, places, cache)
    drawn = random.integers(0, len(row.ids), length)
    drawn[0] = 0
    tensors = [t for layer in cache.layers for t in (layer.keys, layer.values)]
    return tuple(np.ascontiguousarray(t.float().numpy()[:, :, drawn]) for t in tensors)


def _torch_cache(past: Sequence[NDArray[np.float32]], copies: int = 1) -> Any:
    import torch
    from transformers import DynamicCache

    cache = DynamicCache()
    for layer in range(len(past) // 2):
        pair = past[2 * layer : 2 * layer + 2]
        key, value = (torch.from_numpy(array).expand(copies, -1, -1, -1) for array in pair)
        cache.update(key, value, layer)
    return cache


def _forward(
    model: Any, row: Row, places: Positions, cache: Any = None, copies: int = 1
) -> list[Logits]:
    """Logits `[seq, vocab]` of one row by transformers, of each of its `copies`."""
    import torch

    past = row.past[0].shape[2] if row.past else 0
    with places.given(torch.from_numpy(row.positions).expand(copies, -1)) as told:
        out = model(
            input_ids=torch.from_numpy(row.ids).expand(copies, -1),
            attention_mask=torch.ones(copies, past + len(row.ids), dtype=torch.long),
            past_key_values=cache,
            use_cache=cache is not None,
            **told,
        )
    return [logits.numpy() for logits in out.logits]


def _all_logits(
    model: Any,
    rows: Sequence[Row],
    places: Positions,
    context: AbstractContextManager[Any],
    copies: int = 1,
) -> list[tuple[Logits, ...]]:
    """Logits of all rows, `copies` times; those that start at 0 in one pass, filled up on the
    right, where a causal model does not look."""
    import torch

    plain = [row for row in rows if _is_plain(row)]
    longest = max(len(row.ids) for row in plain)
    batch = np.stack([np.resize(row.ids, longest) for row in plain] * copies)
    with context:
        out = model(input_ids=torch.from_numpy(batch), use_cache=False).logits
        first = [
            [out[k * len(plain) + i, : len(row.ids)].numpy() for k in range(copies)]
            for i, row in enumerate(plain)
        ]
        rest = [
            _forward(
                model, row, places, _torch_cache(row.past, copies) if row.past else None, copies
            )
            for row in rows[len(plain) :]
        ]
    return list(zip(*first, *rest, strict=True))


def _is_plain(row: Row) -> bool:
    return not row.past and bool((row.positions == np.arange(len(row.ids))).all())


def _graph_logits(path: Path, rows: Sequence[Row]) -> list[NDArray[np.float32]]:
    """Logits of all rows; the plain ones as a left-padded batch: two chunks, then single steps."""
    from iq_export.run.ort import left_pad
    from iq_export.run.parts import Call, logits_in_parts

    plain = [row for row in rows if _is_plain(row)]
    ids, mask, positions = left_pad([row.ids.tolist() for row in plain], 0)
    longest = ids.shape[1]
    bounds = sorted({0, longest // 2, *(max(longest - tail, 0) for tail in (2, 1, 0))})
    calls = [
        Call(
            tuple(
                (ids[:, start:end], mask[:, :end], positions[:, start:end])
                for start, end in itertools.pairwise(bounds)
            )
        )
    ]
    for row in rows[len(plain) :]:
        total = len(row.ids) + (row.past[0].shape[2] if row.past else 0)
        chunk = (row.ids[None], np.ones((1, total), np.int64), row.positions[None])
        calls.append(Call((chunk,), row.past))
    batch, *rest = logits_in_parts(path, calls)
    padded = np.concatenate(batch, axis=1)
    found = [padded[i, -len(row.ids) :] for i, row in enumerate(plain)]
    return [*found, *(logits[0] for (logits,) in rest)]
