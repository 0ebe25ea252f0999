"""Several graphs of one model on the same windows: perplexity, agreement with fp32, paired timing.

One piece of one graph is in memory at a time, and of the reference only its top-1 tokens and a
sample of its log-probabilities are kept: memory grows neither with the number of graphs nor with
their depth.
"""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from iq_export.errors import GraphError, UsageError
from iq_export.evaluate.perplexity import Scored, exp_or_inf, score, window_logits
from iq_export.graph.vocabulary import read_vocabulary
from iq_export.observe.loss import kl
from iq_export.observe.samples import Bos, Window, check_windows, windows
from iq_export.progress import Progress

if TYPE_CHECKING:
    from iq_export.observe.walk import Graph, Piece
    from iq_export.run.generate import Tokenizer

REFERENCE = "fp32"
# Positions per window whose full distributions are compared: 8 x 49152 x 4 bytes = 1.6 MB each.
_SAMPLE_ROWS = 8
_WARM_UP = 1


@dataclass(frozen=True)
class Row:
    """One graph on windows with or without BOS.

    `ratio` is perplexity over the reference's; `top1_agreement` the share of positions with the
    reference's likeliest token; `kl` the mean KL(reference || graph) in nats over sampled
    positions. All three are None without a reference. `seconds` is its share of the graph's walk.
    `error` says why a row has no numbers.
    """

    graph: str
    bos: bool
    perplexity: float | None
    ratio: float | None
    top1_agreement: float | None
    kl: float | None
    tokens: int
    seconds: float
    error: str | None = None


@dataclass(frozen=True)
class Comparison:
    """The rows and what they were measured on: the text by name and checksum."""

    rows: list[Row]
    reference: str
    text: str
    text_sha256: str
    windows: int
    length: int
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, as `manifest.accuracy` holds them."""
        return asdict(self)


@dataclass(frozen=True)
class Speed:
    """Prefill of `length` tokens in ONNX Runtime, two graphs in alternation in one process.

    `seconds` maps a graph's label to its median; `ratio` is the median over rounds of
    `graph` / `reference`, so that a slow moment of the machine hits both.
    """

    graph: str
    reference: str
    length: int
    rounds: int
    seconds: dict[str, float]
    ratio: float
    providers: list[str]


def compare(
    graphs: Mapping[str, Graph],
    tokenizer: Tokenizer,
    text: str,
    *,
    count: int,
    length: int,
    seed: int = 0,
    text_name: str,
    providers: Sequence[str] = ("CPUExecutionProvider",),
    progress: Progress | None = None,
) -> Comparison:
    """Measure `graphs` by label on `count` windows with and without BOS; one of them is a file.

    The graph labelled `fp32` is the reference, if it is there. Half values are rounded op by op, as
    hardware that computes in half does (see `open_session`). A graph whose logits are not finite
    gets a row with `error`; the reference raises GraphError. Raises DataError as `windows` does.
    """
    progress = progress or Progress(quiet=True)
    variants = {bos: _cut(tokenizer, text, length, count, seed, bos) for bos in _bos(tokenizer)}
    labels = sorted(graphs, key=lambda label: label != REFERENCE)
    file = [graph for graph in graphs.values() if isinstance(graph, Path)][-1]
    for windows_cut in variants.values():
        check_windows(windows_cut, tokenizer, file, f"text {text_name}")
    references: dict[bool, list[Scored]] = {}
    rows = []
    for label in labels:
        with progress.step(f"Evaluate {label}"):
            measured = _measure(label, graphs[label], variants, references, providers, progress)
            rows.extend(measured)
    counted = len(next(iter(variants.values())))
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Comparison(rows, REFERENCE, text_name, digest, counted, length, seed)


def _bos(tokenizer: Tokenizer) -> tuple[bool, ...]:
    return (True, False) if tokenizer.bos_id is not None else (False,)


def _cut(
    tokenizer: Tokenizer, text: str, length: int, count: int, seed: int, with_bos: bool
) -> list[Window]:
    bos: Bos = "with" if with_bos else "without"
    return windows(tokenizer, text, length=length, count=count, seed=seed, bos=bos)


def _measure(
    label: str,
    graph: Graph,
    variants: Mapping[bool, list[Window]],
    references: dict[bool, list[Scored]],
    providers: Sequence[str],
    progress: Progress,
) -> list[Row]:
    """The rows of one graph, all of one walk; fills `references` if it is the reference."""
    begin = time.perf_counter()
    places = [(bos, number) for bos, those in variants.items() for number in range(len(those))]
    every = [window for those in variants.values() for window in those]
    scores: dict[bool, list[Scored]] = {bos: [] for bos in variants}
    errors: dict[bool, str] = {}
    try:
        found = window_logits(graph, every, providers=providers, progress=progress)
        for place, logits in found:
            bos, number = places[place]
            window = variants[bos][number]
            sample = np.linspace(0, len(window.ids) - 2, _SAMPLE_ROWS, dtype=int).tolist()
            try:
                if bos not in errors:
                    scores[bos].append(score(logits, window, number, sample))
            except GraphError as error:
                errors[bos] = str(error)
            if len(errors) == len(variants):
                break
    except GraphError as error:
        errors = dict.fromkeys(variants, str(error)) | errors
    if label == REFERENCE and errors:
        raise GraphError(f"{label}: {next(iter(errors.values()))}")
    if label == REFERENCE:
        references |= scores
    seconds = (time.perf_counter() - begin) / len(every)
    return [
        Row(label, bos, None, None, None, None, 0, 0.0, errors[bos])
        if bos in errors
        else _row(label, bos, scores[bos], references.get(bos), seconds * len(those))
        for bos, those in variants.items()
    ]


def _row(
    label: str,
    bos: bool,
    scores: Sequence[Scored],
    reference: Sequence[Scored] | None,
    seconds: float,
) -> Row:
    mean = _mean_nll(scores)
    tokens = sum(s.nll.size for s in scores)
    value = exp_or_inf(mean)
    if reference is None:
        return Row(label, bos, value, None, None, None, tokens, seconds)
    pairs = list(zip(scores, reference, strict=True))
    agreement = float(np.mean([np.mean(s.top1 == r.top1) for s, r in pairs]))
    divergence = float(np.mean([kl(r.sample, s.sample) for s, r in pairs]))
    ratio = exp_or_inf(mean - _mean_nll(reference))
    return Row(label, bos, value, ratio, agreement, divergence, tokens, seconds)


def _mean_nll(scores: Sequence[Scored]) -> float:
    return float(np.concatenate([s.nll for s in scores]).mean())


def time_prefill(
    graph: Path,
    reference: Path,
    *,
    length: int = 512,
    rounds: int = 5,
    labels: tuple[str, str] = ("bundle", REFERENCE),
    providers: Sequence[str] = ("CPUExecutionProvider",),
) -> Speed:
    """Time a prefill of `length` tokens of two graphs, in alternation after one warm-up each.

    A round's seconds are the sum over the graph's pieces, of which one is in memory at a time.
    """
    if length < 1 or rounds < 1:
        raise UsageError(f"timing needs a length and rounds of at least 1, not {length}, {rounds}")
    known = read_vocabulary(graph)
    ids = (np.arange(length) % (known.rows or known.logits or 1)).tolist()
    seconds = np.zeros((2, _WARM_UP + rounds))
    both = (_prefill_pieces(each, Window(ids, False), providers) for each in (graph, reference))
    for pair in zip_longest(*both):
        for number in range(_WARM_UP + rounds):
            for times, run in zip(seconds, pair, strict=True):
                times[number] += 0.0 if run is None else run()
    kept = seconds[:, _WARM_UP:].tolist()
    ratio = statistics.median(ours / theirs for ours, theirs in zip(*kept, strict=True))
    medians = {label: statistics.median(times) for label, times in zip(labels, kept, strict=True)}
    return Speed(labels[0], labels[1], length, rounds, medians, ratio, list(providers))


def _prefill_pieces(
    graph: Path, window: Window, providers: Sequence[str]
) -> Iterator[Callable[[], float]]:
    """For each piece of a graph in turn, what runs it once and says how many seconds that took."""
    from iq_export.observe.segments import segments
    from iq_export.observe.walk import Piece, cut, loaded, named

    model, label = loaded(graph), named(graph)
    given = {str(value.name) for value in model.graph.outputs}
    carried: dict[str, np.ndarray] = {}
    for piece in segments(model.graph):
        outputs = [n for n in dict.fromkeys([*piece.kept, *sorted(given)]) if n in piece.made]
        left: dict[str, np.ndarray] = {}
        part = cut(model, piece.carried, outputs)
        with Piece(part, outputs, providers, label) as runner:

            def run(
                runner: Piece = runner,
                before: dict[str, np.ndarray] = carried,
                kept: Sequence[str] = piece.kept,
                after: dict[str, np.ndarray] = left,
            ) -> float:
                begin = time.perf_counter()
                found = runner.run(window, before)
                seconds = time.perf_counter() - begin
                now = {**before, **found}
                after |= {name: now[name] for name in kept}
                return seconds

            yield run
        carried = left


def table(comparison: Mapping[str, Any]) -> str:
    """The rows of `Comparison.to_dict()` (or of a manifest) as text for people."""
    lines = [
        f"{comparison['windows']} windows x {comparison['length']} tokens of {comparison['text']}",
        f"{'graph':<32} {'BOS':<8} {'perplexity':>12} {'x fp32':>9} {'top-1':>8} {'KL':>9}",
    ]
    for row in comparison["rows"]:
        head = f"{row['graph']:<32} {'with' if row['bos'] else 'without':<8}"
        if row["error"] is not None:
            lines.append(f"{head} {row['error']}")
            continue
        lines.append(
            f"{head} {_number(row['perplexity'], '.4f'):>12} {_number(row['ratio'], '.4f'):>9} "
            f"{_number(row['top1_agreement'], '.1%'):>8} {_number(row['kl'], '.5f'):>9}"
        )
    return "\n".join(lines)


def speed_line(speed: Mapping[str, Any]) -> str:
    """One sentence for people of `Speed` as a dict."""
    parts = ", ".join(f"{label} {value:.3f} s" for label, value in speed["seconds"].items())
    return (
        f"prefill of {speed['length']} tokens in ONNX Runtime ({speed['providers'][0]}): {parts}; "
        f"{speed['graph']} takes {speed['ratio']:.2f} x the time of {speed['reference']}"
    )


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)
