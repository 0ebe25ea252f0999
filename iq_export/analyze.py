"""Look at a model before anything is compiled: a page that says where it spikes, and its JSON.

The traced graph is walked once for tokens and ranges; who spikes is followed on two short walks:
their rows after the norms, and what attention does with them.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from iq_export.bundle.manifest import json_safe, write_atomically
from iq_export.bundle.package import parents_of
from iq_export.calibration import PROBE_LENGTH, PROBES
from iq_export.compile import trace_model
from iq_export.decide.job import FORM_WINDOWS, Run
from iq_export.decide.sinks import everyone_warning, fit_sinks
from iq_export.disk import trouble_is_bundle_error
from iq_export.engine.profile import Profile, Range
from iq_export.errors import BundleError, UsageError
from iq_export.fill import peak_rss, versions
from iq_export.found import found_record, in_float, token_record
from iq_export.graph.attention import attentions
from iq_export.graph.half import HALF_MAX
from iq_export.graph.sites import Sites
from iq_export.lengths import bundle_limit
from iq_export.observe.attention import AttentionObserver
from iq_export.observe.peaks import PeakObserver
from iq_export.observe.products import ProductObserver, TokenSizes
from iq_export.observe.samples import Window, check_windows, windows
from iq_export.observe.text_check import SurpriseObserver, token_warnings
from iq_export.observe.token_stats import TokenObserver, TokenStats
from iq_export.observe.walk import observe
from iq_export.options import CompileOptions
from iq_export.passes.order import Lowered
from iq_export.precheck import Checked, check, with_limit
from iq_export.progress import Progress
from iq_export.report.analysis import render
from iq_export.report.findings import findings
from iq_export.run.ort import PROVIDERS
from iq_export.ship import started
from iq_export.sinks.lifecycle import Lifecycle, discover
from iq_export.work import check_work, work_folder

FORMAT = 1
_STEPS = ("Trace", "Observe tokens", "Fit sinks", "Look at attention")
# Half precision and no rounding: what a model must be to be looked at, and no more.
_RECIPE = "fp16"
_NO_ENGINE = Profile(Range(1, 1, 1), Range(1, 1, 1), Range(0, 0, 0))
# Attention is looked at in the first windows, in some short ones, whose first tokens differ, and in
# one for each lifecycle that none of these shows.
_LONG, _SHORT = FORM_WINDOWS, 16
_CODES = 127


@dataclass(frozen=True)
class Analysis:
    """What was found: `record` is the content of `data`, the JSON file beside `page`."""

    page: Path
    data: Path
    record: dict[str, Any]


def analyze(options: CompileOptions, progress: Progress | None = None) -> Analysis:
    """Write the page to `options.out`, a name that ends in .html, and its JSON beside it; both
    appear whole or not at all. Of the other options those are read that say which model, which
    text, where it runs and where intermediate graphs go.

    Raises a subclass of IqError for anything the user can mend: BundleError if one of the files is
    there already or cannot be written, else as `compile`.
    """
    progress = progress or Progress(quiet=True)
    begin = time.perf_counter()
    page = Path(os.path.abspath(options.out))
    data = page.with_suffix(".json")
    _check_output(page, data)
    check_work(page, options.work)
    asked = replace(options, recipe=_RECIPE, targets=(), profile=_NO_ENGINE, out=page)
    checked = check(asked)
    if checked.source.is_encoder or not checked.source.reads_text:
        raise UsageError(
            f"{checked.source.name} predicts no text, and analyze looks at models that do"
        )
    for note in checked.notes:
        progress.note(note)
    progress.total = progress.total or len(_STEPS)
    keep = options.work is not None
    with parents_of(page), work_folder(page, options.work, keep=keep, say=progress.waits) as work:
        traced = trace_model(checked.options, work, progress)
        checked = with_limit(checked, bundle_limit(traced.assets, traced.model), progress)
        record = _record(checked, traced, progress)
        record["seconds"] = {**progress.timings, "total": time.perf_counter() - begin}
        record["peak_rss_bytes"] = peak_rss()
        _check_output(page, data)
        with trouble_is_bundle_error(page):
            _write(page, data, json_safe(record))
    return Analysis(page, data, record)


def _check_output(page: Path, data: Path) -> None:
    if page.suffix.lower() != ".html":
        raise UsageError(
            f"{page.name} does not end in .html: name the page so, its JSON goes beside it"
        )
    for path in (page, data):
        if path.exists() or path.is_symlink():
            raise BundleError(f"{path} exists: remove it or give another name with --output")


def _write(page: Path, data: Path, record: dict[str, Any]) -> None:
    """The page last; without it there is no JSON either."""
    text = render(record)
    try:
        write_atomically(data, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        write_atomically(page, text)
    except BaseException:
        with suppress(OSError):
            data.unlink(missing_ok=True)
        raise


def _record(checked: Checked, traced: Any, progress: Progress) -> dict[str, Any]:
    """All that is measured, as JSON values: magnitudes are absolute, shares are fractions, blocks
    and positions count from 0, lifecycles from 1."""
    from iq_export.run.generate import Tokenizer

    options, tokenizer = checked.options, Tokenizer(traced.assets)
    long, short = (
        windows(tokenizer, checked.calibration, length=length, count=count, seed=seed, bos="mixed")
        for length, count, seed in (
            (options.length, options.samples, options.seed),
            (min(PROBE_LENGTH, options.length), PROBES, options.seed + 1),
        )
    )
    every = [*long, *short]
    check_windows(every, tokenizer, traced.model, f"text {options.calibration}")
    run = Run(providers=PROVIDERS[options.device], progress=progress)
    base, notes = started(traced.model, progress)
    with progress.step("Observe tokens"):
        tokens, products = TokenObserver(base.sites, every), ProductObserver(base.sites, every)
        surprise = SurpriseObserver(long)
        peaks = PeakObserver(base.model, min(FORM_WINDOWS, len(long)), HALF_MAX / 2)
        observe(base.model, [tokens, products, surprise, peaks], every, **run)
        stats = tokens.stats
        lives = discover(stats)
    with progress.step("Fit sinks"):
        fits = fit_sinks(
            base.model, base.sites, lives, stats, every,
            limit=options.max_relative_deviation, seed=options.seed, **run,
        )  # fmt: skip
    with progress.step("Look at attention"):
        attention = _attention(base, lives, stats, every, len(long), run)
    warnings = [*token_warnings(long, tokenizer), surprise.warning(), *everyone_warning(stats)]
    record: dict[str, Any] = {
        "format": FORMAT,
        "model": traced.name,
        "source_sha256": traced.source_sha256,
        "versions": versions(),
        "options": {
            # A page travels: it names the file, not a folder of this machine.
            "calibration": Path(options.calibration).name,
            "calibration_sha256": checked.calibration_sha256,
            "samples": options.samples, "length": options.length, "seed": options.seed,
            "max_relative_deviation": options.max_relative_deviation,
        },
        "windows": {"long": len(long), "short": len(short)},
        **token_record(stats, lives, base.sites, tokenizer),
        "lifecycles": [found_record(fit, stats, tokenizer) for fit in fits],
        "products": _products(base.sites, products.sizes, lives),
        "attention": attention,
        "scores": _scores(base, peaks.peaks),
        "in_float": in_float(base.model, base.sites),
        "warnings": [warning for warning in warnings if warning is not None],
        "notes": [*traced.notes, *checked.notes, *notes],
    }  # fmt: skip
    return {**record, "findings": findings(record)}


def _attention(
    base: Lowered,
    lives: Sequence[Lifecycle],
    stats: TokenStats,
    every: Sequence[Window],
    long: int,
    run: Run,
) -> list[dict[str, Any]]:
    """What `AttentionObserver` finds of every lifecycle."""
    chosen = [*range(min(_LONG, long)), *range(long, min(long + _SHORT, len(every)))]
    for life in lives:
        of = np.unique(stats.window[life.members]).tolist()
        if not set(of) & set(chosen):
            chosen.append(of[0])
    sinks = []
    for number in chosen:
        columns = np.flatnonzero(stats.window == number)
        sinks.append(np.array([np.isin(columns, life.members) for life in lives]))
    its = [every[number] for number in chosen]
    observer = AttentionObserver(
        base.model, base.sites, [life.insert_blocks for life in lives], its, sinks
    )
    if observer.names:
        observe(base.model, [observer], its, **run)
    known = {heads.block for heads in observer.heads}
    return [
        {
            "lifecycle": number,
            "blocks": [asdict(each) for each in found],
            "not_understood": [block for block in life.insert_blocks if block not in known],
        }
        for number, (life, found) in enumerate(
            zip(lives, observer.mechanisms(), strict=True), start=1
        )
    ]


def _products(
    sites: Sites, sizes: Mapping[str, TokenSizes], lives: Sequence[Lifecycle]
) -> list[dict[str, Any]]:
    """Every value that products read, in graph order: its range with and without the tokens that
    spike there. `typical` is the root mean square of the others, and the errors what rounding to a
    static int8 range adds, as a share of it (1: nothing is left)."""
    scopes = [life.scopes(sites) for life in lives]
    found: dict[str, dict[str, Any]] = {}
    for block in sites.blocks:
        for branch in block.branches:
            for linear in branch.linears:
                if linear.input in found:
                    found[linear.input]["products"].append(linear.node)
                    continue
                whose, inside = [], np.zeros(0, int)
                for number, scope in enumerate(scopes, start=1):
                    for nodes, members in scope:
                        if linear.node in nodes:
                            whose.append(number)
                            inside = np.union1d(inside, members)
                seen = sizes[linear.input]
                rest = np.delete(np.arange(seen.absmax.size), inside)
                typical = float(np.sqrt(seen.square[rest].mean(dtype=np.float64)))
                largest = float(seen.absmax.max())
                without = float(seen.absmax[rest].max())
                found[linear.input] = {
                    "input": linear.input,
                    "block": block.index,
                    "place": f"{branch.kind} {'out' if linear is branch.output else 'in'}",
                    "products": [linear.node],
                    "lifecycles": whose,
                    "absmax": largest,
                    "absmax_without": without,
                    "typical": typical,
                    "int8_error": _int8_error(largest, typical),
                    "int8_error_without": _int8_error(without, typical),
                }
    return list(found.values())


def _int8_error(absmax: float, typical: float) -> float:
    """Rounding to steps of `absmax` / 127 moves a value by a step / sqrt(12), and never by more
    than all of it."""
    return min(1.0, absmax / _CODES / 12**0.5 / max(typical, 1e-30))


def _scores(base: Lowered, peaks: Mapping[str, float]) -> list[dict[str, Any]]:
    """The largest product of query and key of every attention, at most, and behind its scale."""
    return [
        {"node": each.node, "product": peaks[each.node], "score": peaks[each.node] * each.scale}
        for each in attentions(base.model)
    ]
