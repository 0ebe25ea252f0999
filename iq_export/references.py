"""The graphs that a bundle is compared with: the traced one, baselines, and insertion alone."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from iq_export.bundle.lock import claim_shared
from iq_export.bundle.manifest import MANIFEST_NAME
from iq_export.bundle.package import Bundle
from iq_export.compile import calibrate_and_rewrite, trace_model
from iq_export.disk import trouble_is_bundle_error
from iq_export.errors import BundleError, DataError, ModelError
from iq_export.observe.samples import is_pipe
from iq_export.options import CompileOptions, repeated
from iq_export.precheck import Checked, check
from iq_export.progress import Progress
from iq_export.work import check_work, default_work, kept_trace, work_folder

if TYPE_CHECKING:
    from iq_export.observe.walk import Graph


def reference_graphs(
    bundle: Bundle,
    work: Path | None,
    progress: Progress | None = None,
    hold: ExitStack | None = None,
    **permitted: bool,
) -> dict[str, Graph]:
    """Graphs to compare a bundle with, by label, in the order of the table.

    The first is the traced graph, from the work folder or traced again; the others are lowered in
    memory from the decisions in the bundle; one of an older version, which does not hold them, is
    calibrated again from the options in its manifest.
    What permits code or terms (`options.PERMISSIONS`) is not taken from there, whoever wrote it: it
    is asked for anew.
    Until `hold` is closed no other run changes the traced graph. Raises ModelError if the model is
    not what the bundle was made of, and BundleError if another run replaced the graph at once.
    """
    from iq_export.baselines import baselines
    from iq_export.passes.order import INSERTED
    from iq_export.saved_decisions import recall

    check_work(bundle.folder, work)
    folder = work or default_work(bundle.folder)
    progress = progress or Progress(quiet=True)
    plan = bundle.plan()
    recalled = isinstance(plan.get("decisions"), dict) and isinstance(plan.get("absmax"), dict)
    if not recalled and is_pipe(str(bundle.manifest.options.get("calibration"))):
        raise DataError(
            f"the calibration text of {bundle.folder} came from a pipe and cannot be read again: "
            "measure the bundle alone with --bundle-only, or compile it again from a file"
        )
    held, done = _hold(bundle, folder, progress, hold) if recalled else None, None
    if held is None:
        options = _options_of(bundle, folder, **permitted)
        if recalled:
            progress.note(f"no traced graph of this bundle in {folder}: tracing {options.model!r}")
        else:
            progress.note(f"{bundle.folder} is of an older version: calibrating again")
        with work_folder(bundle.folder, folder, keep=True, say=progress.waits) as made:
            checked = None if recalled else _checked_again(bundle, options, folder, progress)
            traced = trace_model(options, made, progress)
            _check_same_source(bundle, traced.source_sha256)
            if checked is not None:
                done = calibrate_and_rewrite(options, checked, traced, made, progress)
            with trouble_is_bundle_error(made.folder):
                made.keep_trace()
        held = _hold(bundle, folder, progress, hold)
    if held is None:
        raise BundleError(f"another run has replaced the graph in {folder}: run it again")
    done = recall(bundle, held, plan["absmax"]) if done is None else replace(done, traced=held)
    graphs: dict[str, Graph] = {"fp32": held, **baselines(done)}
    if done.sinks:
        graphs["insertion only"] = done.graph(INSERTED)
    return graphs


def _checked_again(
    bundle: Bundle, options: CompileOptions, folder: Path, progress: Progress
) -> Checked:
    """What the bundle, of an older version, is calibrated from."""
    if "alpha" in bundle.manifest.options:
        progress.note(
            "this bundle is of an older version, which found sinks by --alpha: they are found "
            "anew, so the graph with insertion alone may differ from what the bundle was made of"
        )
    checked = check(replace(options, out=folder / "bundle"))  # the bundle itself is only read
    recorded = bundle.manifest.options.get("calibration_sha256", checked.calibration_sha256)
    if recorded != checked.calibration_sha256:
        progress.note(
            f"warning: the calibration text {options.calibration} has changed since "
            f"{bundle.folder} was made: only the fp32 graph is what it was then"
        )
    return checked


def _hold(bundle: Bundle, folder: Path, progress: Progress, hold: ExitStack | None) -> Path | None:
    """The kept graph that was traced from the source of `bundle`, if there is one and it is whole:
    then no run changes it until `hold` is closed."""
    from iq_export.model.trace import TracedModel

    with ExitStack() as stack:
        stack.enter_context(claim_shared(folder, say=progress.waits))
        place = kept_trace(folder)
        if place is None:
            return None
        try:
            traced = TracedModel.load(place)
        except ModelError:
            return None
        if bundle.manifest.source.get("sha256", traced.source_sha256) != traced.source_sha256:
            return None
        if not _weights_are_there(traced.model):
            return None
        if hold is not None:
            hold.push(stack.pop_all())
        return traced.model


def _weights_are_there(traced: Path) -> bool:
    """Whether the files that a traced graph refers to are what they were."""
    from iq_export.graph import io
    from iq_export.graph.stored import Stored, StoredTensor

    tensors = (value.const_value for value in io.load(traced).graph.initializers.values())
    places = (t.place for t in tensors if isinstance(t, StoredTensor))
    files = {place.file: place for place in places if isinstance(place, Stored)}
    return all(place.is_there() for place in files.values())


def _check_same_source(bundle: Bundle, sha256: str) -> None:
    """Refuse to compare a bundle with another model than it was made of."""
    if bundle.manifest.source.get("sha256", sha256) != sha256:
        raise ModelError(
            f"{bundle.manifest.source['model']} is not what {bundle.folder} was made of: its files "
            "have changed since. Compile it again, or measure the bundle alone with --bundle-only."
        )


def _options_of(bundle: Bundle, work: Path, **permitted: bool) -> CompileOptions:
    """The options that a bundle was compiled with, as far as its references depend on them.

    Raises BundleError if one is of another kind than this version writes.
    """
    values = permitted | repeated(bundle.manifest.options, bundle.folder / MANIFEST_NAME)
    return CompileOptions(**values, out=bundle.folder, work=work, targets=())
