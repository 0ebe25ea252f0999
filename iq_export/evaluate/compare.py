"""Several graphs of one model on the same windows: perplexity, agreement with fp32, paired timing.

One graph is loaded at a time and only the reference's top-1 tokens and a sample of its
log-probabilities are kept, so memory does not grow with the number of graphs.
"""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from iq_export.calibrate.data import Bos, Window, check_windows, windows
from iq_export.errors import GraphError, UsageError
from iq_export.evaluate.perplexity import Scored, exp_or_inf, score
from iq_export.observe.loss import kl
from iq_export.progress import Progress

if TYPE_CHECKING:
    from iq_export.run.generate import Tokenizer
    from iq_export.run.ort import CausalLM

REFERENCE = "fp32"
# Positions per window whose full distributions are compared: 8 x 49152 x 4 bytes = 1.6 MB each.
_SAMPLE_ROWS = 8
_WARM_UP = 1


@dataclass(frozen=True)
class Row:
    """One graph on windows with or without BOS.

    `ratio` is perplexity over the reference's; `top1_agreement` the share of positions with the
    reference's likeliest token; `kl` the mean KL(reference || graph) in nats over sampled
    positions. All three are None without a reference. `error` says why a row has no numbers.
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
    graphs: Mapping[str, Path],
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
    """Measure `graphs` (label -> model.onnx) on `count` windows with and without BOS.

    The graph labelled `fp32` is the reference, if it is there. Half values are rounded op by op, as
    hardware that computes in half does (see `open_session`). A graph whose logits are not finite
    gets a row with `error`; the reference raises GraphError. Raises DataError as `windows` does.
    """
    progress = progress or Progress(quiet=True)
    variants = {bos: _cut(tokenizer, text, length, count, seed, bos) for bos in _bos(tokenizer)}
    labels = sorted(graphs, key=lambda label: label != REFERENCE)
    for cut in variants.values():
        check_windows(cut, tokenizer, graphs[labels[-1]], f"text {text_name}")
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
    path: Path,
    variants: Mapping[bool, list[Window]],
    references: dict[bool, list[Scored]],
    providers: Sequence[str],
    progress: Progress,
) -> list[Row]:
    """The rows of one graph; fills `references` if it is the reference."""
    from iq_export.run.ort import CausalLM

    model = CausalLM(path, providers=providers, round_half=True)
    rows = []
    done, total = 0, sum(map(len, variants.values()))
    for bos, cut in variants.items():
        sample = np.linspace(0, len(cut[0].ids) - 2, _SAMPLE_ROWS, dtype=int).tolist()
        begin = time.perf_counter()
        scores: list[Scored] = []
        try:
            for scored in score(model, cut, sample):
                scores.append(scored)
                done += 1
                progress.update(done, total)
        except GraphError as error:
            if label == REFERENCE:
                raise GraphError(f"{label}: {error}") from error
            rows.append(Row(label, bos, None, None, None, None, 0, 0.0, str(error)))
            continue
        if label == REFERENCE:
            references[bos] = scores
        seconds = time.perf_counter() - begin
        rows.append(_row(label, bos, scores, references.get(bos), seconds))
    return rows


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
    """Time a prefill of `length` tokens of two graphs, in alternation after one warm-up each."""
    from iq_export.run.ort import CausalLM

    if length < 1 or rounds < 1:
        raise UsageError(f"timing needs a length and rounds of at least 1, not {length}, {rounds}")
    models = [CausalLM(path, providers=providers) for path in (graph, reference)]
    seconds: list[list[float]] = [[], []]
    for _ in range(_WARM_UP + rounds):
        for model, times in zip(models, seconds, strict=True):
            times.append(_prefill_seconds(model, length))
    kept = [times[_WARM_UP:] for times in seconds]
    ratio = statistics.median(ours / theirs for ours, theirs in zip(*kept, strict=True))
    medians = {label: statistics.median(times) for label, times in zip(labels, kept, strict=True)}
    return Speed(labels[0], labels[1], length, rounds, medians, ratio, list(providers))


def _prefill_seconds(model: CausalLM, length: int) -> float:
    ids = (np.arange(length, dtype=np.int64) % model.embedding_rows)[None]
    positions = np.arange(length, dtype=np.int64)[None]
    begin = time.perf_counter()
    model.forward(ids, np.ones_like(ids), positions)
    return time.perf_counter() - begin


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
