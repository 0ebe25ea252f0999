"""Frozen models with known lifecycles, and models without any: what accepts spike discovery.

A model is built block by block. The stream of all calibration tokens runs through each block in
numpy; weights that write, carry or cancel a spike are fitted to what the tokens' post-norm vectors
are there: one direction separates the chosen tokens from all others (least squares, with a hinge
for the others), a second gives each of them its amount, and the down-projection gets their outer
product with the spike's channels. No channel or token is reserved for it beforehand.

What a life looks like is taken from the literature on massive activations and attention sinks: one
or two channels, written over one to three blocks, carried and slowly growing or decaying, cancelled
over one or two blocks or never; the tokens are the first, leading, opening or delimiter ones.

Parameters and seeds are frozen: they must not follow any algorithm that is accepted with them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from iq_export.observe.samples import Window

LIVING = 300
CALM = 200
SEED = 20_261_126
TOKENS = 4096  # of all windows of a model: 0.1 % are four

SPIKE = (20.0, 10_000.0)  # residual maximum of a member by the median token's
# A token that stands this far out already may be said to have joined; below, it may not yet.
_STANDS_OUT = 8.0
_DEAD = 4.0  # and after its death it must be below this
_ORDINARY = 8.0  # the loudest token that is none may reach this
_OPSET = 23
_EPSILON = 1e-6
_ATTEMPTS = 20

# Token ids: BOS, openers (first position only), two kinds of delimiters, then ordinary text.
_BOS = 0
_OPENERS = (1, 2, 3)
_DELIMITERS = {"delimiter": (4, 5, 6), "other": (7, 8), "early": (4, 5, 6)}
_FIRST_ORDINARY = 9


@dataclass(frozen=True)
class Shape:
    """Sizes and operators of a decoder. `positions`: "rotary" or "learned" (added to tokens)."""

    blocks: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    features: int
    vocab: int
    length: int  # of a window
    norm: str  # "rms" or "layer"
    mlp: str  # "gated" or "plain"
    activation: str  # "silu", "gelu" or "relu"
    positions: str
    post_norms: bool  # a norm behind each branch, too
    biases: bool


@dataclass(frozen=True)
class Background:
    """What ordinary tokens look like.

    `scale`: rms of the embedding. `tail`: sigma of the log-norm of a token's embedding. `loud`: how
    many channels are `loudness` times the rms in every token. `growth`: factor of the stream's rms
    per block. `attention`: share of the attention branch in what a block adds.
    """

    scale: float
    tail: float
    loud: int
    loudness: float
    growth: tuple[float, ...]
    attention: float


@dataclass(frozen=True)
class Group:
    """Tokens of one kind that get their spike together.

    `shares`: how much of the spike is there after each of `blocks`; the last is 1. `spike`: the
    residual maximum by the median token's, after the last of them. `second`: of the second channel,
    by the first. `variation`: largest deviation of a token's spike. `input`: what is aimed at for
    the down-projection's input by the median token's.
    """

    kind: str
    blocks: tuple[int, ...]
    shares: tuple[float, ...]
    spike: float
    sign: int
    second: float
    variation: float
    input: float


@dataclass(frozen=True)
class Plan:
    """One life. `deaths`: blocks that cancel, with the share of what is there that each takes.
    `drift`: growth per block in between."""

    channels: tuple[int, int]
    groups: tuple[Group, ...]
    deaths: tuple[tuple[int, float], ...]
    drift: float

    @property
    def death(self) -> int | None:
        """The block that takes the largest part."""
        left, parts = 1.0, {}
        for block, share in self.deaths:
            parts[block] = left * share
            left -= parts[block]
        return max(parts, key=parts.__getitem__) if parts else None


@dataclass(frozen=True)
class Quirk:
    """Something that is no life. `kind`:

    "input": the down-projection's input is `size` times the median, the stream hardly moves;
    "blip": the stream is `size` times the median for one block only;
    "alike": all tokens spike `size` times at `block`, cancelled at `until` if that is not None;
    "rise": a channel of all tokens grows by the factor `size` per block from `block` on;
    "first": the BOS token is `size` times louder from the embedding on.
    """

    kind: str
    block: int
    size: float
    until: int | None = None


@dataclass(frozen=True)
class Parameters:
    """All there is to know of a model. `fraction`: of tokens that are delimiters of one kind;
    `bos`: share of windows that begin with BOS; `leading`: how many BOS follow one another."""

    seed: int
    shape: Shape
    background: Background
    lives: tuple[Plan, ...]
    quirks: tuple[Quirk, ...]
    fraction: float
    bos: float
    leading: int


@dataclass(frozen=True)
class Birth:
    """`members`: columns of tokens whose spike of `spike` times the median token's residual maximum
    is written in `blocks`; `standing`: those of `blocks` after which it stands out."""

    blocks: tuple[int, ...]
    standing: tuple[int, ...]
    members: np.ndarray
    spike: float


@dataclass(frozen=True)
class Life:
    """What must be found. `death`: the block that cancels the largest part, None if none does."""

    births: tuple[Birth, ...]
    death: int | None
    channel: int

    @property
    def members(self) -> np.ndarray:
        """Columns of all its tokens, sorted."""
        return np.unique(np.concatenate([birth.members for birth in self.births]))

    @property
    def birth(self) -> frozenset[int]:
        """Blocks that may be called the last birth. It is one block, unless the last group's spike
        is written over several: its tokens join where they first stand out or where it is whole."""
        return frozenset(
            max(joined) for joined in itertools.product(*(b.standing for b in self.births))
        )


@dataclass(frozen=True)
class Case:
    """A model to be written, its calibration tokens and its lives."""

    name: str
    parameters: Parameters

    @cached_property
    def truth(self) -> list[Life]:
        """The lives to be found; none in a calm model."""
        return _truth(self.parameters)

    @cached_property
    def windows(self) -> list[Window]:
        ids = _ids(self.parameters)
        return [Window(row.tolist(), bool(row[0] == _BOS)) for row in ids]

    def write(self, folder: Path) -> Path:
        """`folder`/model.onnx with its weights beside it."""
        return _write(self.parameters, _weights(self.parameters), folder)


def models() -> Iterator[Case]:
    """All cases: LIVING with at least one life each, then CALM without any."""
    for number in range(LIVING + CALM):
        yield case(number)


def case(number: int) -> Case:
    """The case of this number, 0 to LIVING + CALM - 1."""
    living = number < LIVING
    parameters = _living(number) if living else _calm(number)
    label = "+".join(quirk.kind for quirk in parameters.quirks) or "plain"
    name = f"living-{number}" if living else f"calm-{number}-{label}"
    return Case(name, parameters)


# -- Scoring ---------------------------------------------------------------------------------------


class _Site(Protocol):
    @property
    def block(self) -> int: ...


class Found(Protocol):
    """What is read of a `iq_export.sinks.lifecycle.Lifecycle`."""

    @property
    def birth(self) -> int: ...
    @property
    def death(self) -> int | None: ...
    @property
    def members(self) -> np.ndarray: ...
    @property
    def early(self) -> Sequence[_Site]: ...


@dataclass(frozen=True)
class Score:
    """`right` of `expected` lives are as they should be; `extra` were found that are none."""

    expected: int
    right: int
    extra: int
    problems: tuple[str, ...]

    @property
    def perfect(self) -> bool:
        return self.right == self.expected and self.extra == 0


def score(truth: Sequence[Life], found: Sequence[Found]) -> Score:
    """Strict: last birth equal, early births among the true ones, death at most one block off or
    None where nothing cancels, members' Jaccard index at least 0.9. Where a life is found that is
    none, no life of the model counts as right."""
    left, wanted = list(found), []
    for life in truth:
        match = next((other for other in left if not any(_differences(life, other))), None)
        if match is None:
            wanted.append(life)
        else:
            left = [other for other in left if other is not match]
    right, problems = len(truth) - len(wanted), []
    for life in wanted:  # what comes nearest is the same life, found wrongly
        near = max(left, key=lambda other: _jaccard(life.members, other.members), default=None)
        if near is None or _jaccard(life.members, near.members) == 0:
            problems.append(f"the life born at {sorted(life.birth)} was not found")
        else:
            left = [other for other in left if other is not near]
            problems += _differences(life, near)
    problems += [f"a life born at {other.birth} that is none" for other in left]
    return Score(len(truth), 0 if left else right, len(left), tuple(problems))


def _jaccard(one: np.ndarray, other: np.ndarray) -> float:
    union = np.union1d(one, other).size
    return np.intersect1d(one, other).size / union if union else 0.0


def _differences(life: Life, found: Found) -> Iterator[str]:
    if found.birth not in life.birth:
        yield f"born at {found.birth}, not {sorted(life.birth)}"
    written = {block for birth in life.births for block in birth.blocks}
    for site in found.early:
        if site.block not in written:
            yield f"early site at {site.block}, but births are at {sorted(written)}"
    never = life.death is None or found.death is None
    if found.death != life.death and (never or abs(found.death - life.death) > 1):
        yield f"death {found.death}, not {life.death}"
    if (overlap := _jaccard(life.members, found.members)) < 0.9:
        yield f"members overlap by {overlap:.2f} only"


# -- Parameters ------------------------------------------------------------------------------------


def _log_uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def _pick(rng: np.random.Generator, *choices: str) -> str:
    return choices[int(rng.integers(len(choices)))]


def _shape(rng: np.random.Generator, least_blocks: int, post_norms: float) -> Shape:
    hidden = int(rng.choice([32, 48, 64, 96]))
    heads, kv_heads = ((2, 1), (2, 2), (4, 1), (4, 2), (3, 1))[int(rng.integers(5))]
    norm = "rms" if rng.random() < 0.6 else "layer"
    mlp = "gated" if rng.random() < (0.85 if norm == "rms" else 0.25) else "plain"
    activation = _pick(rng, "silu", "gelu") if mlp == "gated" else _pick(rng, "gelu", "relu")
    behind = norm == "rms" and mlp == "gated" and rng.random() < post_norms
    return Shape(
        blocks=int(rng.integers(least_blocks, 13)),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=int(rng.choice([8, 16])),
        features=int(hidden * rng.choice([2, 3, 4])),
        vocab=int(rng.choice([48, 64, 96, 128])),
        length=int(rng.choice([64, 128, 256])),
        norm=norm,
        mlp=mlp,
        activation=activation,
        positions="rotary" if norm == "rms" or rng.random() < 0.3 else "learned",
        post_norms=behind,
        biases=mlp == "plain" and (norm == "layer" or rng.random() < 0.5),
    )


def _background(rng: np.random.Generator, blocks: int) -> Background:
    growth = _log_uniform(rng, 2.0, 30.0) ** (1 / blocks)
    return Background(
        scale=_log_uniform(rng, 0.05, 2.0),
        tail=float(rng.uniform(0.0, 0.35)),
        loud=int(rng.integers(0, 4)),
        loudness=_log_uniform(rng, 2.0, 12.0),
        growth=tuple(float(growth ** rng.uniform(0.6, 1.4)) for _ in range(blocks)),
        attention=float(rng.uniform(0.1, 0.5)),
    )


def _first_kind(rng: np.random.Generator, shape: Shape) -> str:
    kinds = ["bos", "bos", "leading", "opener"]
    if shape.positions == "learned":
        kinds += ["first", "first"]
    return _pick(rng, *kinds)


def _group(
    rng: np.random.Generator, kind: str, blocks: tuple[int, ...], spike: float, second: float,
    sign: int, post_norms: bool,
) -> Group:  # fmt: skip
    shares = {
        1: (1.0,),
        2: (float(rng.uniform(0.15, 0.6)), 1.0),
        3: (float(rng.uniform(0.1, 0.3)), float(rng.uniform(0.4, 0.8)), 1.0),
    }[len(blocks)]
    return Group(
        kind=kind,
        blocks=blocks,
        shares=shares,
        spike=spike,
        sign=sign,
        second=second,
        variation=0.0 if post_norms else float(rng.choice([0.0, 0.01, 0.03, 0.1])),
        input=float(np.clip(spike ** rng.uniform(0.4, 1.1), 6.0, 20_000.0)),
    )


def _life(
    rng: np.random.Generator, shape: Shape, low: int, high: int, spike: float, kinds: Sequence[str]
) -> Plan:
    """A life within blocks `low` to `high` - 1: of `kinds`, each with its own birth or all at one;
    of one kind, its spike may be written over several blocks."""
    room = high - low
    span = min(int(rng.choice([1, 1, 2, 3])), max(1, room // 3))
    first = low + int(rng.integers(0, max(1, room // 2 - span + 1)))
    last = first + span - 1
    two = len(kinds) > 1 or rng.random() < 0.6
    second = float(rng.uniform(0.4, 0.7) * rng.choice([-1, 1])) if two else 0.0
    up = int(rng.choice([-1, 1]))
    groups = []
    for number, kind in enumerate(kinds):
        one_by_one = (min(first + number, last),)
        blocks = tuple(range(first, last + 1)) if len(kinds) == 1 else one_by_one
        # The kinds' directions differ, as those of the templates of real models do; none is the
        # opposite of another.
        sign = (up, -up, -up)[number]
        ratio = (second if len(kinds) < 3 else 0.1 * second, second, -second)[number]
        size = spike if number == 0 or shape.post_norms else spike * rng.uniform(0.4, 1.0)
        size = float(max(size, SPIKE[0]))
        groups.append(_group(rng, kind, blocks, size, ratio, sign, shape.post_norms))
    deaths: tuple[tuple[int, float], ...] = ()
    last = max(group.blocks[-1] for group in groups)
    if rng.random() < 0.65 and last + 2 < high:
        death = int(rng.integers(last + 2, high))
        if rng.random() < 0.4 and death + 1 < high:
            deaths = ((death, float(rng.choice([0.3, 0.65, 0.85]))), (death + 1, 1.0))
        else:
            deaths = ((death, 1.0),)
    drift = float(rng.uniform(-0.05, 0.05)) if rng.random() < 0.6 and not shape.post_norms else 0.0
    channels = rng.choice(shape.hidden, 2, replace=False)
    if shape.mlp == "plain" and deaths:
        # One neuron without a gate cannot cancel each token's own amount exactly: what is left must
        # be small against the median.
        groups = [
            replace(
                group,
                spike=min(group.spike, SPIKE[0] * math.sqrt(group.spike / SPIKE[0])),
                variation=min(group.variation, 0.01),
            )
            for group in groups
            if group.kind not in ("bos", "leading")
        ] + [group for group in groups if group.kind in ("bos", "leading")]
    return Plan((int(channels[0]), int(channels[1])), tuple(groups), deaths, drift)


def _tamed(background: Background, lives: Sequence[Plan], blocks: int) -> Background:
    """The stream grows so slowly while a spike is there that it stays far above the median."""
    growth = list(background.growth)
    for life in lives:
        end = life.deaths[0][0] if life.deaths else blocks
        least = min(group.spike for group in life.groups)
        first = min(group.blocks[0] for group in life.groups)
        carried = range(first, end)
        room = least * min(1.0, 1 + life.drift) ** len(carried) / SPIKE[0]
        limit = max(1.01, room ** (1 / len(carried)))
        for block in carried:
            growth[block] = min(growth[block], limit)
    return replace(background, growth=tuple(growth))


def _living(number: int) -> Parameters:
    rng = np.random.default_rng([SEED, number])
    lives_wanted = _pick(rng, "one", "one", "one", "one", "after", "beside")
    two_lives = lives_wanted != "one"
    shape = _shape(rng, 9 if two_lives else 4, 0.0 if two_lives else 0.25)
    spike = _log_uniform(rng, *SPIKE)
    start = _first_kind(rng, shape)
    if start == "first" and two_lives and shape.hidden < 64:
        # Deep in a narrow model, position 0 can no longer be told from all other tokens.
        shape = replace(shape, hidden=64, features=192)
    apart = shape.positions == "learned" and (shape.mlp == "gated" or shape.hidden >= 64)
    where = "early" if apart and rng.random() < 0.4 else "delimiter"
    sets = ((start,), (start,), (where,), (start, where), (start, where, "other"))
    blocks = shape.blocks
    if lives_wanted == "one":
        if shape.post_norms:  # one strength for all, written at one block
            sets = ((start,), (start,), (where,))
        kinds = sets[int(rng.integers(len(sets)))]
        lives = [_life(rng, shape, 0, blocks, spike, kinds)]
    elif lives_wanted == "after":  # first tokens, most often the same, spike again elsewhere
        half = blocks // 2
        kinds = sets[int(rng.integers(4))]
        early = _life(rng, shape, 0, half, spike, kinds)
        if not early.deaths:
            early = replace(early, deaths=((half - 1, 1.0),))
        late = _life(rng, shape, half, blocks, _log_uniform(rng, *SPIKE), (start,))
        lives = [early, late]
    else:
        lives = [_life(rng, shape, 0, blocks, spike, (start,)),
                 _life(rng, shape, 0, blocks, _log_uniform(rng, *SPIKE), (where,))]  # fmt: skip
    lives = _apart(rng, lives, shape.hidden)
    background = _tamed(_background(rng, blocks), lives, blocks)
    quirks = []
    if rng.random() < 0.25:
        quirks.append(Quirk("input", int(rng.integers(blocks)), _log_uniform(rng, 50, 500)))
    if rng.random() < 0.25 and not shape.post_norms:
        block = int(rng.integers(blocks - 1))
        quirks.append(Quirk("blip", block, float(rng.uniform(3.0, 6.0))))
    return _parameters(rng, number, shape, background, lives, quirks)


def _apart(rng: np.random.Generator, lives: list[Plan], hidden: int) -> list[Plan]:
    """Different lives have different channels."""
    chosen = rng.permutation(hidden)[: 2 * len(lives)].reshape(-1, 2).tolist()
    return [
        replace(life, channels=(one, two)) for life, (one, two) in zip(lives, chosen, strict=True)
    ]


def _calm(number: int) -> Parameters:
    rng = np.random.default_rng([SEED, number])
    kinds = ("plain", "tails", "loud", "blip", "input", "growth", "alike", "rise", "first", "all")
    kind = kinds[number % len(kinds)]
    shape = _shape(rng, 4, 0.0 if kind in ("blip", "alike", "rise", "all") else 0.2)
    blocks = shape.blocks
    background = _background(rng, blocks)
    quirks: list[Quirk] = []
    if kind in ("tails", "all"):
        background = replace(background, tail=float(rng.uniform(0.4, 0.6)))
    if kind in ("loud", "all"):
        loudness = _log_uniform(rng, 10.0, 300.0 if kind == "loud" else 40.0)
        background = replace(background, loud=int(rng.integers(1, 4)), loudness=loudness)
    if kind in ("blip", "all"):
        block = int(rng.integers(blocks - 1))
        quirks.append(Quirk("blip", block, float(rng.uniform(3.0, 6.0))))
    if kind in ("input", "all"):
        for block in rng.choice(blocks, int(rng.integers(1, 4)), replace=False).tolist():
            quirks.append(Quirk("input", block, _log_uniform(rng, 50, 3000)))
    if kind == "growth":
        rate = _log_uniform(rng, 10.0, 100.0) ** (1 / blocks)
        background = replace(background, growth=(float(rate),) * blocks)
    if kind == "alike":
        block = int(rng.integers(0, blocks - 2))
        until = int(rng.integers(block + 2, blocks)) if rng.random() < 0.4 else None
        size = _log_uniform(rng, 20.0, 1000.0 if until is None else 100.0)
        quirks.append(Quirk("alike", block, size, until))
    if kind == "rise":
        block = int(rng.integers(0, blocks - 1))
        quirks.append(Quirk("rise", block, float(rng.uniform(1.2, 2.5))))
    if kind == "first":
        quirks.append(Quirk("first", 0, float(rng.uniform(2.0, 4.0))))
    return _parameters(rng, number, shape, background, [], quirks)


def _parameters(
    rng: np.random.Generator, number: int, shape: Shape, background: Background,
    lives: Sequence[Plan], quirks: Sequence[Quirk],
) -> Parameters:  # fmt: skip
    kinds = {group.kind for life in lives for group in life.groups}
    return Parameters(
        seed=number,
        shape=shape,
        background=background,
        lives=tuple(lives),
        quirks=tuple(quirks),
        fraction=_log_uniform(rng, 0.001, 0.03),
        # Some windows begin in the middle of a text; at least four do not.
        bos=1.0 if "leading" in kinds else float(rng.choice([0.25, 0.5, 1.0])),
        leading=int(rng.integers(2, 5)) if "leading" in kinds and shape.length > 64 else 1,
    )


# -- Tokens ----------------------------------------------------------------------------------------


def _ids(parameters: Parameters) -> np.ndarray:
    """int64 `[windows, length]`. Text is Zipf-distributed, delimiters are strewn in."""
    shape = parameters.shape
    rng = np.random.default_rng([SEED, parameters.seed, 1])
    ordinary = np.arange(_FIRST_ORDINARY, shape.vocab)
    chance = 1.0 / np.arange(3, 3 + ordinary.size)
    count = TOKENS // shape.length
    ids = rng.choice(ordinary, (count, shape.length), p=chance / chance.sum())
    kinds = {group.kind for life in parameters.lives for group in life.groups}
    lead = parameters.leading
    # As many of each kind as asked for. "early" ones stand in the first quarter of a window; as
    # many of the same ids stand behind it and are none.
    wanted = max(4, round(parameters.fraction * TOKENS))
    quarter = shape.length // 4
    places = {"delimiter": [(lead, shape.length)], "other": [(lead, shape.length)]}
    if "early" in kinds:
        places["delimiter"] = [(lead, quarter), (quarter, shape.length)]
    free = np.ones(ids.shape, bool)
    for kind, ranges in places.items():
        for low, high in ranges:
            slots = np.argwhere(free[:, low:high]) + np.array([0, low])
            for row, column in slots[rng.choice(len(slots), wanted, replace=False)]:
                ids[row, column] = rng.choice(_DELIMITERS[kind])
                free[row, column] = False
    if "opener" in kinds:
        ids[:, 0] = rng.choice(_OPENERS, count)
    elif "first" not in kinds:
        ids[: max(4, round(parameters.bos * count)), :lead] = _BOS
    return ids[rng.permutation(count)]


def _masks(parameters: Parameters, ids: np.ndarray) -> dict[str, np.ndarray]:
    """Kind -> bool `[windows * length]`: its tokens."""
    position = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
    masks = {kind: np.isin(ids, known) for kind, known in _DELIMITERS.items()}
    masks["early"] = masks["early"] & (position < ids.shape[1] // 4)
    masks["bos"] = masks["leading"] = ids == _BOS
    masks["opener"] = np.isin(ids, _OPENERS)
    masks["first"] = position == 0
    masks["rare"] = ids == ids.max()
    return {kind: mask.reshape(-1) for kind, mask in masks.items()}


def _truth(parameters: Parameters) -> list[Life]:
    masks = _masks(parameters, _ids(parameters))
    lives = []
    for plan in parameters.lives:
        births = tuple(
            Birth(
                group.blocks,
                tuple(
                    block
                    for block, share in zip(group.blocks, group.shares, strict=True)
                    if share == 1 or share * group.spike >= _STANDS_OUT
                ),
                np.flatnonzero(masks[group.kind]),
                group.spike,
            )
            for group in plan.groups
        )
        lives.append(Life(births, plan.death, plan.channels[0]))
    return lives


# -- Weights ---------------------------------------------------------------------------------------

Weights = dict[str, np.ndarray]


class _NotSeparableError(Exception):
    """The tokens' vectors do not allow what was asked for: try again with calmer attention."""


def _weights(parameters: Parameters) -> Weights:
    """The first try that holds what the parameters promise; each has less context in its tokens."""
    reasons = []
    for attempt in range(_ATTEMPTS):
        builder = _Builder(parameters, attempt)
        try:
            return builder.build()
        except _NotSeparableError as error:
            reasons.append(str(error))
    raise AssertionError(f"model {parameters.seed} cannot be built: {reasons}")


def _activate(kind: str, x: np.ndarray) -> np.ndarray:
    if kind == "relu":
        return np.maximum(x, 0)
    if kind == "silu":
        return x / (1 + np.exp(-np.clip(x, -80, 80)))
    return x * 0.5 * (1 + _erf(x / math.sqrt(2)))


def _erf(x: np.ndarray) -> np.ndarray:
    """Abramowitz and Stegun 7.1.26 is too coarse in the tail; this is Numerical Recipes' erfcc."""
    z = np.abs(x)
    t = 1 / (1 + 0.5 * z)
    poly = np.polyval(
        [0.17087277, -0.82215223, 1.48851587, -1.13520398, 0.27886807, -0.18628806, 0.09678418,
         0.37409196, 1.00002368, -1.26551223], t,
    )  # fmt: skip
    tail = t * np.exp(-z * z + poly)
    return np.where(x >= 0, 1 - tail, tail - 1)


class _Builder:
    """Fits the weights of a model, block by block, to the tokens' vectors as they arrive there."""

    def __init__(self, parameters: Parameters, attempt: int) -> None:
        self.parameters = parameters
        self.shape = parameters.shape
        self.rng = np.random.default_rng([SEED, parameters.seed, 2, attempt])
        # What a token gets from its context, and how its spike differs from others', make it harder
        # to tell tokens apart by one direction.
        self.context = 0.6**attempt
        self.spread = 0.5 ** (attempt // 4)
        # If that was not enough: what it gets from its position.
        self.place = 0.5 ** max(0, attempt - 11)
        kinds = {group.kind for life in parameters.lives for group in life.groups}
        self.first = 1.15**attempt if "first" in kinds else 1.0
        self.ids = _ids(parameters)
        self.masks = _masks(parameters, self.ids)
        self.weights: Weights = {}
        self.members = np.zeros(self.ids.size, bool)
        for life in parameters.lives:
            for group in life.groups:
                self.members |= self.masks[group.kind]
        self.sample = np.flatnonzero(~self.members)[::8]
        self.wobble = self.rng.uniform(-1, 1, self.ids.size)
        self.taken: set[tuple[int, int]] = set()

    def build(self) -> Weights:
        shape = self.shape
        stream = self._embed()
        levels = []
        self._rotation()
        for block in range(shape.blocks):
            stream = stream + self._attention(block, stream)
            stream = stream + self._mlp(block, stream)
            levels.append(np.abs(stream).max(1))
        self._check(np.stack(levels))
        self._norm_weights("final")
        self.weights["head"] = self._random(shape.hidden, shape.vocab)
        return self.weights

    def _random(self, *size: int) -> np.ndarray:
        return (self.rng.standard_normal(size) / math.sqrt(size[0])).astype(np.float32)

    def _embed(self) -> np.ndarray:
        shape, look = self.shape, self.parameters.background
        hidden = shape.hidden
        tokens = self.rng.standard_normal((shape.vocab, hidden))
        size = np.exp(look.tail * self.rng.standard_normal(shape.vocab))
        size[:_FIRST_ORDINARY] = 1.2
        tokens *= np.clip(size, 0.4, 4.0)[:, None]
        for quirk in self.parameters.quirks:
            if quirk.kind == "first":
                tokens[_BOS] *= quirk.size
        common = 1.5 * self.rng.standard_normal(hidden)
        used = {channel for life in self.parameters.lives for channel in life.channels}
        quiet = np.array([c for c in range(hidden) if c not in used])
        self.loud = self.rng.choice(quiet, look.loud, replace=False)
        common[self.loud] = look.loudness * self.rng.choice([-1, 1], look.loud)
        tokens = ((tokens + common) * look.scale).astype(np.float32)
        self.weights["embed"] = tokens
        stream = tokens[self.ids]
        if shape.positions == "learned":
            wave = np.arange(shape.length)[:, None] / shape.length * np.array([[1.0, 2.0, 4.0]])
            waves = np.concatenate([np.sin(np.pi * wave), np.cos(np.pi * wave)], 1)
            places = 0.8 * self.place * waves @ self._random(6, hidden)
            # Where "early" delimiters stand must be seen, as a trained model can see it.
            places[: shape.length // 4] += 0.7 * self.rng.standard_normal(hidden)
            places[0] += 1.5 * self.first * self.rng.standard_normal(hidden)
            self.weights["places"] = (places * look.scale).astype(np.float32)
            stream = stream + self.weights["places"]
        return stream.reshape(-1, hidden)

    def _rotation(self) -> None:
        half = self.shape.head_dim // 2
        angle = np.arange(2 * self.shape.length)[:, None] * 10_000.0 ** (-np.arange(half) / half)
        self.weights["cos"] = np.cos(angle).astype(np.float32)
        self.weights["sin"] = np.sin(angle).astype(np.float32)

    def _norm_weights(self, name: str) -> None:
        weight = self.rng.uniform(0.6, 1.4, self.shape.hidden)
        # Models learn to turn loud channels down.
        weight[self.loud] /= max(1.0, self.parameters.background.loudness / 2)
        self.weights[f"{name}.weight"] = weight.astype(np.float32)
        if self.shape.norm == "layer":
            bias = 0.1 * self.rng.standard_normal(self.shape.hidden)
            self.weights[f"{name}.bias"] = bias.astype(np.float32)

    def _norm(self, name: str, x: np.ndarray) -> np.ndarray:
        if self.shape.norm == "layer":
            x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + _EPSILON)
        x = x * self.weights[f"{name}.weight"]
        return x + self.weights[f"{name}.bias"] if self.shape.norm == "layer" else x

    def _linear(
        self, name: str, x: np.ndarray, columns: list[int] | slice = slice(None)
    ) -> np.ndarray:
        y = x @ self.weights[name][:, columns]
        if self.shape.biases:
            y += self.weights[f"{name}_bias"][columns]
        return y

    def _projection(self, name: str, x: np.ndarray, size: int) -> None:
        """A random projection whose outputs have an rms of 1 on ordinary tokens."""
        weight = self._random(x.shape[1], size)
        weight /= np.sqrt(np.mean((x[self.sample] @ weight) ** 2))
        self.weights[name] = weight
        if self.shape.biases:
            bias = 0.1 * self.rng.standard_normal(size)
            self.weights[f"{name}_bias"] = bias.astype(np.float32)

    def _attention(self, block: int, stream: np.ndarray) -> np.ndarray:
        shape, name = self.shape, f"block{block}"
        self._norm_weights(f"{name}.attn_norm")
        x = self._norm(f"{name}.attn_norm", stream)
        windows, length = self.ids.shape
        heads = {}
        for kind, count in (("q", shape.heads), ("k", shape.kv_heads), ("v", shape.kv_heads)):
            self._projection(f"{name}.{kind}", x, count * shape.head_dim)
            if kind == "v":  # sinks have next to no value
                for life in self.parameters.lives:
                    self.weights[f"{name}.v"][list(life.channels)] *= 0.1
            y = self._linear(f"{name}.{kind}", x)
            y = y.reshape(windows, length, count, shape.head_dim).transpose(0, 2, 1, 3)
            if kind != "v" and shape.positions == "rotary":
                y = self._rotate(y)
            heads[kind] = y
        group = shape.heads // shape.kv_heads
        keys, values = (np.repeat(heads[kind], group, axis=1) for kind in "kv")
        logits = heads["q"] @ keys.swapaxes(2, 3) / np.float32(math.sqrt(shape.head_dim))
        logits += np.triu(np.full((length, length), -np.inf, np.float32), 1)
        logits -= logits.max(-1, keepdims=True)
        np.exp(logits, out=logits)
        mixed = logits @ values / logits.sum(-1, keepdims=True)
        mixed = mixed.transpose(0, 2, 1, 3).reshape(windows * length, -1)
        self._projection(f"{name}.o", mixed, shape.hidden)
        growth = self.parameters.background.growth[block]
        share = self.parameters.background.attention * self.context * math.sqrt(growth**2 - 1)
        return self._scaled(f"{name}.o", mixed, share * _rms(stream[~self.members]))

    def _rotate(self, x: np.ndarray) -> np.ndarray:
        length, half = x.shape[2], x.shape[3] // 2
        cos, sin = self.weights["cos"][:length], self.weights["sin"][:length]
        one, two = x[..., :half], x[..., half:]
        return np.concatenate([one * cos - two * sin, two * cos + one * sin], -1)

    def _scaled(self, name: str, x: np.ndarray, level: float) -> np.ndarray:
        """What the branch adds, its last weight scaled so that ordinary tokens get rms `level`."""
        if self.shape.post_norms:
            self.weights[f"{name}_norm.weight"] = (
                level * self.rng.uniform(0.6, 1.4, self.shape.hidden)
            ).astype(np.float32)
        else:
            factor = np.float32(level / _rms(self._linear(name, x[self.sample])))
            self.weights[name] *= factor
            if self.shape.biases:
                self.weights[f"{name}_bias"] *= factor
        return self._behind(name, self._linear(name, x))

    def _behind(self, name: str, y: np.ndarray) -> np.ndarray:
        return self._norm(f"{name}_norm", y) if self.shape.post_norms else y

    def _mlp(self, block: int, stream: np.ndarray) -> np.ndarray:
        shape, name = self.shape, f"block{block}"
        self._norm_weights(f"{name}.mlp_norm")
        x = self._norm(f"{name}.mlp_norm", stream)
        self._projection(f"{name}.up", x, shape.features)
        if shape.mlp == "gated":
            self._projection(f"{name}.gate", x, shape.features)
        hidden = self._hidden(name, x)
        self._projection(f"{name}.down", hidden, shape.hidden)
        growth = self.parameters.background.growth[block]
        level = math.sqrt(growth**2 - 1) * _rms(stream[~self.members])
        added = self._scaled(f"{name}.down", hidden, level)
        self.input_level = float(np.median(np.abs(hidden).max(1)))
        if self._plant(block, x, stream, stream + added):
            planted = [neuron for where, neuron in self.taken if where == block]
            hidden[:, planted] = self._hidden(name, x, planted)
            added = self._behind(f"{name}.down", self._linear(f"{name}.down", hidden))
        return added

    def _hidden(
        self, name: str, x: np.ndarray, neurons: list[int] | slice = slice(None)
    ) -> np.ndarray:
        """The down-projection's input, of all neurons or some."""
        up = self._linear(f"{name}.up", x, neurons)
        if self.shape.mlp == "plain":
            return _activate(self.shape.activation, up)
        return _activate(self.shape.activation, self._linear(f"{name}.gate", x, neurons)) * up

    # What is planted in a block

    def _plant(self, block: int, x: np.ndarray, before: np.ndarray, after: np.ndarray) -> bool:
        """Change the block's MLP; `x` its input, `before` and `after` the stream around it."""
        median = float(np.median(np.abs(after).max(1)))
        touched = False
        for life in self.parameters.lives:
            one, two = life.channels
            first_death = life.deaths[0][0] if life.deaths else self.shape.blocks
            for group in life.groups:
                mask = self.masks[group.kind]
                now = after[mask]
                shares = dict(zip(group.blocks, group.shares, strict=True))
                direction = np.zeros(self.shape.hidden)
                direction[one] = 1.0
                size = group.input
                if block in shares:
                    wobble = 1 + group.variation * self.spread * self.wobble[mask]
                    target = group.sign * group.spike * median * shares[block] * wobble
                    amount = target - now[:, one]
                    direction[two] = group.second
                elif block in dict(life.deaths):
                    amount = -dict(life.deaths)[block] * now[:, one]
                    direction[two] = now[:, two].mean() / now[:, one].mean()
                elif life.drift and group.blocks[-1] < block < first_death:
                    amount = life.drift * now[:, one]
                    direction[two] = now[:, two].mean() / now[:, one].mean()
                    size = 1.5
                else:
                    continue
                if self.shape.post_norms:
                    self._write_through_norm(block, x, mask, amount, direction, size, median)
                else:
                    self._write(block, x, mask, amount, direction, size, median)
                touched = True
        for quirk in self.parameters.quirks:
            touched |= self._quirk(quirk, block, x, after, median)
        return touched

    def _quirk(
        self, quirk: Quirk, block: int, x: np.ndarray, after: np.ndarray, median: float
    ) -> bool:
        candidates = (self.masks["delimiter"], self.masks["other"], self.masks["rare"])
        mask = next(m & ~self.members for m in candidates if (m & ~self.members).any())
        direction = np.zeros(self.shape.hidden)
        channel = quirk.block * 7 % self.shape.hidden
        size = 30.0
        if quirk.kind == "input" and block == quirk.block:
            direction = self.rng.standard_normal(self.shape.hidden)
            direction /= np.abs(direction).max()
            amount, size = np.full(mask.sum(), 0.2 * median), quirk.size
            direction[[c for life in self.parameters.lives for c in life.channels]] = 0
            if self.shape.post_norms:  # only its own size counts there
                level = _rms(self._linear(f"block{block}.down", self._hidden(f"block{block}", x)))
                amount = np.full(mask.sum(), 0.2 * level)
        elif quirk.kind == "blip" and block in (quirk.block, quirk.block + 1):
            used = {c for life in self.parameters.lives for c in life.channels}
            while channel in used or channel in self.loud:
                channel = (channel + 1) % self.shape.hidden
            direction[channel] = 1.0
            now = after[mask][:, channel]
            amount = -now if block > quirk.block else quirk.size * median - now
        elif quirk.kind == "alike" and block in (quirk.block, quirk.until):
            mask = np.ones_like(mask)
            direction[channel] = 1.0
            now = after[:, channel]
            amount = -now if block == quirk.until else quirk.size * median - now
        elif quirk.kind == "rise" and block >= quirk.block:
            mask = np.ones_like(mask)
            direction[channel] = 1.0
            amount = quirk.size * np.maximum(median, np.abs(after[:, channel]))
            amount -= after[:, channel]
            size = 3.0
        else:
            return False
        self._write(block, x, mask, amount, direction, size, median)
        return True

    def _neuron(self, block: int) -> int:
        """A random feature of the block that nothing was planted in."""
        while True:
            neuron = int(self.rng.integers(self.shape.features))
            if (block, neuron) not in self.taken:
                self.taken.add((block, neuron))
                return neuron

    def _write(
        self, block: int, x: np.ndarray, mask: np.ndarray, amount: np.ndarray,
        direction: np.ndarray, size: float, median: float,
    ) -> None:  # fmt: skip
        """Let the MLP add `amount` times `direction` to the tokens of `mask` and nothing to others.

        `size`: the down-projection's input there, by the median token's.
        """
        mean = float(np.abs(amount).mean())
        level = size * self.input_level
        leak = min(0.2 * median / mean, 0.5 / size)
        values, row = self._feature(x, mask, amount / mean, level, leak)
        # What the float32 weights give is what the down-projection has to stretch.
        scale = float((values @ amount) / (values @ values))
        self._put(block, row, scale * direction)

    def _write_through_norm(
        self, block: int, x: np.ndarray, mask: np.ndarray, amount: np.ndarray,
        direction: np.ndarray, size: float, median: float,
    ) -> None:  # fmt: skip
        """As `_write`, where a norm stands behind the down-projection: its weight makes the spike,
        of tokens whose vector before it lies in the spike's channels."""
        name = f"block{block}.down"
        channels = np.flatnonzero(direction)
        self.weights[name][:, channels] = 0
        others = _rms(self._linear(name, self._hidden(f"block{block}", x)))
        strength = 1000.0 * others * math.sqrt(self.shape.hidden)
        target = float(amount.mean())
        level = size * self.input_level
        leak = 0.2 * median / abs(target) * others / strength
        ones = np.ones(int(mask.sum()))
        values, row = self._feature(x, mask, ones, level, leak)
        unit = np.sign(direction * target)
        self._put(block, row, strength / float(values.mean()) * unit)
        peak = math.sqrt(self.shape.hidden / channels.size)
        norm = np.abs(direction[channels]) * abs(target) / peak
        self.weights[f"{name}_norm.weight"][channels] = norm

    def _put(self, block: int, row: tuple[np.ndarray, ...], down: np.ndarray) -> None:
        name, neuron = f"block{block}", self._neuron(block)
        for kind, (column, bias) in zip(("up", "gate"), _columns(row, self.shape), strict=False):
            self.weights[f"{name}.{kind}"][:, neuron] = column
            if self.shape.biases:
                self.weights[f"{name}.{kind}_bias"][neuron] = bias
        self.weights[f"{name}.down"][neuron] = down

    def _feature(
        self, x: np.ndarray, mask: np.ndarray, pattern: np.ndarray, level: float, leak: float
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
        """A feature that is `level` * `pattern` on `mask` and below `leak` of it elsewhere.

        Returns its values on `mask` and its columns: up, and gate if there is one.
        """
        wide = x.astype(np.float64)
        if self.shape.biases:
            wide = np.concatenate([wide, np.ones((len(x), 1))], 1)
        kind = self.shape.activation
        others = wide[~mask]
        if self.shape.mlp == "plain":
            return self._plain_feature(wide[mask], others, pattern, level, leak)
        for heavy in (1.0, 30.0):
            direction = _fit(wide[mask], others, np.ones(len(pattern)), 0.5, heavy)
            for gain in (4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0):
                gate = (gain * direction).astype(np.float32).astype(np.float64)
                opened = _activate(kind, wide[mask] @ gate)
                if opened.min() < 2.0:
                    continue
                up = _least_squares(wide[mask], level * pattern / opened)
                up = up.astype(np.float32).astype(np.float64)
                leaking = _activate(kind, others @ gate) * (others @ up)
                if np.abs(leaking).max(initial=0.0) <= leak * level:
                    return opened * (wide[mask] @ up), (up, gate)
        raise _NotSeparableError("other tokens take part in a gated feature")

    def _plain_feature(
        self,
        members: np.ndarray,
        others: np.ndarray,
        pattern: np.ndarray,
        level: float,
        leak: float,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
        kind = self.shape.activation
        sign = np.sign(pattern.mean())
        for _ in range(4):
            for heavy in (30.0, 3.0, 0.3, 0.03):
                floor = 0.1 * level if kind == "relu" else max(10.0, 0.05 * level)
                column = _fit(members, others, sign * pattern * level, floor, heavy)
                column = column.astype(np.float32).astype(np.float64)
                leaking = _activate(kind, others @ column)
                if np.abs(leaking).max(initial=0.0) <= leak * level:
                    return _activate(kind, members @ column), (column,)
            level *= 3
        raise _NotSeparableError("other tokens take part in a plain feature")

    # Does it hold?

    def _check(self, levels: np.ndarray) -> None:
        """The promises, on the residual maxima `[blocks, tokens]`."""
        relative = levels / np.median(levels, 1, keepdims=True)
        blocks = self.shape.blocks
        loudest = relative[:, ~self.members].max()
        if loudest > _ORDINARY:
            raise _NotSeparableError(f"an ordinary token reaches {loudest:.1f}")
        spiking = np.zeros(relative.shape, bool)
        for life in self.parameters.lives:
            end = life.deaths[-1][0] if life.deaths else blocks
            for group in life.groups:
                mask = self.masks[group.kind]
                peak = relative[group.blocks[-1], mask] / group.spike
                if np.abs(peak - 1).max() > 0.15:
                    low, high = peak.min(), peak.max()
                    raise _NotSeparableError(f"spike of {low:.2f} to {high:.2f} of what it should")
                spiking[group.blocks[0] : end, mask] = True
        rest = np.where(spiking, 0, relative)[:, self.members]
        if rest.size and rest.max() > _DEAD:
            raise _NotSeparableError(f"a member is at {rest.max():.1f} outside its life")


def _columns(row: tuple[np.ndarray, ...], shape: Shape) -> list[tuple[np.ndarray, float]]:
    kinds = row[:1] if shape.mlp == "plain" else row
    return [(c[: shape.hidden], float(c[-1]) if shape.biases else 0.0) for c in kinds]


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(x * x)))


def _least_squares(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The smallest solution; what float32 could not carry is left out."""
    return np.linalg.lstsq(x, y, rcond=1e-7)[0]


def _fit(
    members: np.ndarray, others: np.ndarray, target: np.ndarray, floor: float, heavy: float
) -> np.ndarray:
    """`w` with `members @ w` near `target` and `others @ w` at most -`floor`, as far as it goes:
    least squares over the members, `heavy` times as important as all others together, and those
    others that are above (Newton's method on the squared hinge)."""
    weight = heavy * max(1.0, len(others)) / len(members)
    ridge = 1e-11 * weight * len(members)
    fixed = weight * members.T @ members + ridge * np.eye(members.shape[1])
    wanted = weight * members.T @ target
    w = np.linalg.solve(fixed, wanted)
    height, on = others @ w, members @ w
    loss = math.inf
    for _ in range(60):
        above = height > -floor
        chosen = others[above]
        step = np.linalg.solve(fixed + chosen.T @ chosen, wanted - floor * chosen.sum(0)) - w
        rise, drift = others @ step, members @ step
        best = loss
        for part in (1.0, 0.7, 0.4, 0.2, 0.1, 0.03, 0.01):
            hinge = np.maximum(height + part * rise + floor, 0)
            miss = on + part * drift - target
            moved = w + part * step
            now = weight * (miss @ miss) + hinge @ hinge + ridge * (moved @ moved)
            if now < best:
                best, length = now, part
        if best >= loss * (1 - 1e-6):
            break
        loss = best
        w, height, on = w + length * step, height + length * rise, on + length * drift
    return w


# -- The graph -------------------------------------------------------------------------------------


def _write(parameters: Parameters, weights: Weights, folder: Path) -> Path:
    """The model as ONNX, with KV cache: names and shapes of inputs and outputs as traced ones."""
    graph = _Graph(parameters.shape, weights)
    proto = graph.build()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "model.onnx"
    (folder / "model.onnx.data").unlink(missing_ok=True)
    onnx.save_model(
        proto, path, save_as_external_data=True, location="model.onnx.data", size_threshold=256
    )
    return path


class _Graph:
    def __init__(self, shape: Shape, weights: Weights) -> None:
        self.shape = shape
        self.nodes: list[onnx.NodeProto] = []
        self.constants = {name: numpy_helper.from_array(w, name) for name, w in weights.items()}
        self.infos: list[onnx.ValueInfoProto] = []

    def add(self, op: str, inputs: Sequence[str], name: str, **attributes: object) -> str:
        self.nodes.append(
            helper.make_node(op, list(inputs), [name], name=f"n/{name}", **attributes)
        )
        return name

    def constant(self, name: str, value: Sequence[int] | int) -> str:
        array = np.asarray(value, np.int64)
        self.constants.setdefault(name, numpy_helper.from_array(array, name))
        return name

    def build(self) -> onnx.ModelProto:
        shape = self.shape
        cache_in, cache_out = [], []
        stream = self.add("Gather", ["embed", "input_ids"], "tokens")
        if shape.positions == "learned":
            places = self.add("Gather", ["places", "position_ids"], "placed")
            stream = self.add("Add", [stream, places], "tokens_placed")
        mask = self._mask()
        size = [shape.kv_heads, shape.head_dim]
        for block in range(shape.blocks):
            stream = self._attention(block, stream, mask)
            stream = self._mlp(block, stream)
            for kind in ("key", "value"):
                for prefix, values, axis in (
                    ("past_key_values", cache_in, "past"), ("present", cache_out, "total"),
                ):  # fmt: skip
                    values.append(
                        helper.make_tensor_value_info(
                            f"{prefix}.{block}.{kind}", TensorProto.FLOAT,
                            ["batch", size[0], axis, size[1]],
                        )
                    )  # fmt: skip
        last = self._norm("final", stream)
        self.add("MatMul", [last, "head"], "logits")
        text = [
            helper.make_tensor_value_info(name, TensorProto.INT64, ["batch", axis])
            for name, axis in (
                ("input_ids", "seq"), ("attention_mask", "total"), ("position_ids", "seq"),
            )
        ]  # fmt: skip
        logits = helper.make_tensor_value_info(
            "logits", TensorProto.FLOAT, ["batch", "seq", shape.vocab]
        )
        graph = helper.make_graph(
            self.nodes, "acceptance", text + cache_in, [logits, *cache_out],
            list(self.constants.values()), value_info=self.infos,
        )  # fmt: skip
        opset = [helper.make_opsetid("", _OPSET)]
        return helper.make_model(graph, opset_imports=opset, ir_version=11)

    def _mask(self) -> str:
        """bool `[batch, 1, seq, total]`: what a row may attend to."""
        zero, one = self.constant("zero", 0), self.constant("one", 1)
        total = self.add("Gather", [self.add("Shape", ["attention_mask"], "mask_shape"), one], "t")
        seq = self.add("Gather", [self.add("Shape", ["input_ids"], "ids_shape"), one], "s")
        past = self.add("Sub", [total, seq], "p")
        rows = self.add("Range", [past, total, one], "row_numbers")
        columns = self.add("Range", [zero, total, one], "column_numbers")
        rows = self.add("Unsqueeze", [rows, self.constant("axis1", [1])], "rows")
        causal = self.add("LessOrEqual", [columns, rows], "causal")
        kept = self.add("Cast", ["attention_mask"], "kept", to=TensorProto.BOOL)
        kept = self.add("Unsqueeze", [kept, self.constant("axes12", [1, 2])], "kept_columns")
        return self.add("And", [causal, kept], "attend")

    def _norm(self, name: str, value: str) -> str:
        if self.shape.norm == "layer":
            inputs = [value, f"{name}.weight", f"{name}.bias"]
            return self.add("LayerNormalization", inputs, f"{name}/y", axis=-1, epsilon=_EPSILON)
        inputs = [value, f"{name}.weight"]
        return self.add("RMSNormalization", inputs, f"{name}/y", axis=-1, epsilon=_EPSILON)

    def _linear(self, name: str, value: str) -> str:
        y = self.add("MatMul", [value, name], f"{name}/y")
        return self.add("Add", [y, f"{name}_bias"], f"{name}/b") if self.shape.biases else y

    def _close(self, name: str, value: str, stream: str) -> str:
        y = self._linear(name, value)
        if self.shape.post_norms:
            y = self._norm(f"{name}_norm", y)
        return self.add("Add", [stream, y], f"{name}/stream")

    def _attention(self, block: int, stream: str, mask: str) -> str:
        shape, name = self.shape, f"block{block}"
        x = self._norm(f"{name}.attn_norm", stream)
        heads = {}
        for kind, count in (("q", shape.heads), ("k", shape.kv_heads), ("v", shape.kv_heads)):
            y = self._linear(f"{name}.{kind}", x)
            split = self.constant(f"heads{count}", [0, 0, count, shape.head_dim])
            y = self.add("Reshape", [y, split], f"{name}.{kind}/split")
            y = self.add("Transpose", [y], f"{name}.{kind}/heads", perm=[0, 2, 1, 3])
            if kind != "v" and shape.positions == "rotary":
                inputs = [y, "cos", "sin", "position_ids"]
                y = self.add("RotaryEmbedding", inputs, f"{name}.{kind}/rotated")
            size = ["batch", count, "seq", shape.head_dim]
            self.infos.append(helper.make_tensor_value_info(y, TensorProto.FLOAT, size))
            if kind != "q":
                word = {"k": "key", "v": "value"}[kind]
                past = f"past_key_values.{block}.{word}"
                y = self.add("Concat", [past, y], f"present.{block}.{word}", axis=2)
            heads[kind] = y
        y = self.add("Attention", [heads["q"], heads["k"], heads["v"], mask], f"{name}.mix/y")
        y = self.add("Transpose", [y], f"{name}.mix/rows", perm=[0, 2, 1, 3])
        joined = self.constant("joined", [0, 0, shape.heads * shape.head_dim])
        y = self.add("Reshape", [y, joined], f"{name}.mix/joined")
        return self._close(f"{name}.o", y, stream)

    def _mlp(self, block: int, stream: str) -> str:
        shape, name = self.shape, f"block{block}"
        x = self._norm(f"{name}.mlp_norm", stream)
        up = self._linear(f"{name}.up", x)
        if shape.mlp == "plain":
            y = self._activation(f"{name}.act", up)
        else:
            gate = self._activation(f"{name}.act", self._linear(f"{name}.gate", x))
            y = self.add("Mul", [gate, up], f"{name}.act/gated")
        return self._close(f"{name}.down", y, stream)

    def _activation(self, name: str, value: str) -> str:
        if self.shape.activation == "silu":
            opened = self.add("Sigmoid", [value], f"{name}/sigmoid")
            return self.add("Mul", [value, opened], f"{name}/y")
        op = {"gelu": "Gelu", "relu": "Relu"}[self.shape.activation]
        return self.add(op, [value], f"{name}/y")
