"""Compile from the decisions of an earlier bundle: nothing is calibrated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from iq_export.bundle.package import MODEL_NAME, PLAN_NAME, Bundle
from iq_export.bundle.recipe import recipe_of
from iq_export.calibration import long_windows
from iq_export.checksum import check_files
from iq_export.decide.job import Run
from iq_export.decisions import Decisions
from iq_export.errors import BundleError, IqError, UsageError
from iq_export.evaluate.final_check import FinalCheck, short_windows
from iq_export.graph.sites import Sites
from iq_export.observe.samples import Sample
from iq_export.observe.tail import Tail
from iq_export.options import CompileOptions
from iq_export.passes.order import lower
from iq_export.precheck import Checked
from iq_export.progress import Progress
from iq_export.recipe import load_recipe
from iq_export.run.ort import PROVIDERS
from iq_export.saved_decisions import TEMPLATES_NAME, load_decisions, recorded
from iq_export.ship import MODEL, Made, check_file, started, written
from iq_export.sinks.ops import DOMAIN
from iq_export.work import Work


@dataclass(frozen=True)
class Carried(Made):
    """A file that was lowered from decisions made earlier, as in Rewrite."""

    chosen: Decisions
    sites: Sites
    sink_nodes: int
    traced: Path
    quantized: Path
    check: FinalCheck
    warnings: list[str]


def carry(
    traced: Path,
    work: Path,
    decide_for: Callable[[Sites], Decisions],
    windows: Sequence[Sample],
    *,
    providers: tuple[str, ...],
    progress: Progress,
) -> Carried:
    """Lower decisions that another compile made; nothing is calibrated, and the file is compared
    with fp32 on `windows` as always. `decide_for` gives them for the sites of `traced`.

    Raises GraphError as `rewrite` does.
    """
    base, warnings = started(traced, progress)
    with progress.step("Quantize"):
        chosen = decide_for(base.sites)
        lowered, path = lower(base, chosen), work / MODEL
        warnings += written(lowered, path, progress)
    with progress.step("Check the quantized graph"):
        options = Run(providers=providers, progress=progress)
        tail = Tail.of_graph(base.model, short_windows(windows), **options)
        check = check_file(base, chosen, path, tail, windows, options)
        if warning := check.warning():
            warnings.append(warning)
            progress.note(f"warning: {warning}")
    sinks = sum(node.domain == DOMAIN for node in lowered.model.graph)
    return Carried(chosen, base.sites, sinks, traced, path, check, warnings)


def earlier_bundle(options: CompileOptions, folder: Path) -> tuple[Bundle, CompileOptions]:
    """The bundle in `folder`, whose decisions are taken, and the options with its recipe.

    Raises BundleError if it is damaged or of an older version, which did not record them, and
    UsageError for an option that they do not leave open.
    """
    earlier = Bundle.open(folder)
    for name in ("budget", "insertion", "max_relative_deviation"):
        if getattr(options, name) != getattr(CompileOptions, name):
            raise UsageError(
                f"--{name.replace('_', '-')} is among what was decided for {earlier.folder}: "
                "leave it out, or compile without --decisions"
            )
    options = replace(options, recipe=recipe_for(earlier, options.recipe))
    recorded(earlier)
    if options.dtype == "fp16" and earlier.manifest.dtype != "fp16":
        raise UsageError(
            f"{earlier.folder} was decided for fp32, and half precision needs decisions of its "
            "own: give --dtype fp32, or compile without --decisions"
        )
    return earlier, options


@contextmanager
def unchanged(earlier: Bundle) -> Iterator[None]:
    """Raise BundleError if files of `earlier` that decisions are read from are not, when the block
    ends, what they were when it was opened: whatever it made, or failed at, came of others."""
    read = {
        name: record.sha256
        for name, record in earlier.manifest.files.items()
        if name in (PLAN_NAME, TEMPLATES_NAME) or name.startswith(MODEL_NAME)
    }
    try:
        yield
    except IqError as error:
        try:
            check_files(earlier.folder, read)
        except BundleError as changed:
            raise changed from error
        raise
    check_files(earlier.folder, read)


def carry_over(
    options: CompileOptions,
    checked: Checked,
    traced: Any,
    earlier: Bundle,
    work: Work,
    progress: Progress,
) -> Carried:
    """The model lowered from the decisions of `earlier`."""
    cut = long_windows(options, checked, traced)
    stages = work.run / f"{options.recipe}-{options.dtype}"
    stages.mkdir()

    def decide_for(sites: Sites) -> Decisions:
        return replace(load_decisions(earlier, sites), dtype=options.dtype)

    done = carry(
        traced.model, stages, decide_for, cut,
        providers=PROVIDERS[options.device], progress=progress,
    )  # fmt: skip
    return replace(done, warnings=[*traced.notes, *done.warnings])


def recipe_for(earlier: Bundle, asked: str) -> str:
    """The name of the recipe that the decisions of `earlier` were made for.

    Raises UsageError if another one was `asked` for, and BundleError if it has changed since.
    """
    name = earlier.manifest.recipe
    if asked not in (name, CompileOptions.recipe):
        raise UsageError(
            f"the decisions of {earlier.folder} are for recipe '{name}', and '{asked}' is another: "
            "leave --recipe out, or compile without --decisions"
        )
    if (made := recipe_of(earlier.manifest)) is not None and made != load_recipe(name):
        raise BundleError(
            f"recipe '{name}' is not what it was when {earlier.folder} was made: compile without "
            "--decisions"
        )
    return name
