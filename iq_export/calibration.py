"""What a traced graph is calibrated on: windows of a text, of pictures or of recordings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from iq_export.decide.job import Calibration
from iq_export.graph.interface import Interface
from iq_export.graph.proto import read
from iq_export.observe.samples import (
    Sample,
    Whole,
    Window,
    check_windows,
    held_out_windows,
    windows,
)
from iq_export.observe.signals import load_signals, sentences, whole_windows
from iq_export.observe.text_check import token_warnings
from iq_export.options import CompileOptions
from iq_export.precheck import Checked
from iq_export.progress import Progress
from iq_export.run.generate import Tokenizer
from iq_export.run.ort import PROVIDERS

# Short windows add first tokens at little cost: most sinks stand at position 0.
PROBES, PROBE_LENGTH = 64, 32
# Windows of the same text that nothing is made from: they tell how well sinks are matched.
HELD_OUT, HELD_OUT_LENGTH = 48, 64


def calibration_of(
    options: CompileOptions, checked: Checked, traced: Any, progress: Progress
) -> tuple[Calibration, list[str]]:
    """What the traced graph is calibrated on, and warnings about it. Raises DataError if that does
    not suffice."""
    common: dict[str, Any] = {
        "max_relative_deviation": options.max_relative_deviation,
        "seed": options.seed,
        "providers": PROVIDERS[options.device],
        "insertion": options.insertion,
        "budget": math.inf if options.budget is None else options.budget,
    }
    if _is_causal(traced):
        return _of_text(options, checked, traced, common)
    every = _wholes(options, checked, traced)
    few, rest = every[: options.samples], every[options.samples :]
    if len(few) < options.samples:
        progress.note(f"calibrated on {len(few)} windows, not {options.samples}: there are no more")
    return Calibration(windows=few, probes=[], heldout=rest, **common), []


def long_windows(options: CompileOptions, checked: Checked, traced: Any) -> Sequence[Sample]:
    """Those of `calibration_of` that measure ranges. Raises as that does."""
    if not _is_causal(traced):
        return _wholes(options, checked, traced)[: options.samples]
    tokenizer = Tokenizer(traced.assets)
    cut = _cut(tokenizer, checked.calibration, options.length, options.samples, options.seed)
    check_windows(cut, tokenizer, traced.model, f"text {options.calibration}")
    return cut


def _is_causal(traced: Any) -> bool:
    return Interface.of_proto(read(traced.model).graph).is_causal


def _wholes(options: CompileOptions, checked: Checked, traced: Any) -> list[Whole]:
    """Windows to calibrate on, and behind them those held out."""
    count = options.samples + HELD_OUT
    if checked.source.reads_text:
        tokenizer = Tokenizer(traced.assets)
        arrays = sentences(tokenizer, checked.calibration, options.length, count, options.seed)
        cut = [Window(array.tolist(), False) for array in arrays]
        check_windows(cut, tokenizer, traced.model, f"text {options.calibration}")
    else:
        place = options.preprocessor or traced.assets
        arrays = load_signals(Path(options.calibration), place, count, options.seed)
    return whole_windows(traced.model, arrays)


def _of_text(
    options: CompileOptions, checked: Checked, traced: Any, common: dict[str, Any]
) -> tuple[Calibration, list[str]]:
    text, tokenizer = checked.calibration, Tokenizer(traced.assets)
    long = _cut(tokenizer, text, options.length, options.samples, options.seed)
    short = min(PROBE_LENGTH, options.length)
    probes = _cut(tokenizer, text, short, PROBES, options.seed + 1)
    every = [*long, *probes]
    heldout = held_out_windows(
        tokenizer, text, every, length=min(HELD_OUT_LENGTH, options.length), count=HELD_OUT
    )
    check_windows([*every, *heldout], tokenizer, traced.model, f"text {options.calibration}")
    data = Calibration(windows=long, probes=probes, heldout=heldout, **common)
    return data, token_warnings(long, tokenizer)


def _cut(tokenizer: Tokenizer, text: str, length: int, count: int, seed: int) -> list[Window]:
    return windows(tokenizer, text, length=length, count=count, seed=seed, bos="mixed")
