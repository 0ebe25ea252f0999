"""`iq-export build OUT --target NAME`: an engine for an existing bundle, where it will run."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from iq_export.bundle.manifest import (
    CHECKSUM_NAME,
    MANIFEST_NAME,
    checksum_line,
    reading_records,
)
from iq_export.bundle.package import Bundle
from iq_export.bundle.recipe import recipe_of
from iq_export.bundle.update import (
    LARGEST_MANIFEST,
    UPDATED,
    bundle_lock,
    leftovers,
    remove_leftovers,
)
from iq_export.cli import options
from iq_export.disk import trouble_is_bundle_error
from iq_export.engine.build import VERBOSITIES, EngineReport, build_engine, check_timing_cache
from iq_export.engine.onnx_header import read_header
from iq_export.engine.plugin import provide_plugin
from iq_export.engine.profile import Profile
from iq_export.engine.targets import (
    AttentionForm,
    Target,
    check_formats,
    check_opset,
    engine_note,
    resolve_target,
)
from iq_export.engine.trt import builder_gap, check_levers, why_not_here
from iq_export.errors import BundleError, EngineError, UsageError
from iq_export.files import move_inside, read_inside
from iq_export.lengths import bundle_limit, engine_profile
from iq_export.options import SHAPES, add
from iq_export.progress import Progress
from iq_export.report.html import REPORT_NAME, check_report, update_with_report

if TYPE_CHECKING:
    from iq_export.recipe import Recipe

_EPILOG = """examples:
  iq-export build OUT --target rtx-ada
  iq-export build OUT --target orin --maxShapes batch:1,seq:256,past:1024   (on the Jetson)
"""


def add_parser(subparsers: Any) -> None:
    """Define the subcommand and its options."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "build",
        help="build or rebuild TensorRT engines of a bundle",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("bundle", metavar="OUT", type=Path, help="a compiled bundle")
    parser.add_argument(
        "--target", action="append", metavar="NAME", dest="targets",
        help="device to build for, repeatable (default: the bundle's targets)",
    )  # fmt: skip
    add(parser, "plugin")
    add(parser.add_argument_group(SHAPES), "profile")
    group = parser.add_argument_group("TensorRT, as in trtexec")
    group.add_argument("--timingCacheFile", type=Path, metavar="FILE", dest="timing_cache")
    group.add_argument("--versionCompatible", action="store_true", dest="version_compatible")
    group.add_argument("--stripWeights", action="store_true", dest="strip_weights")
    group.add_argument(
        "--profilingVerbosity", choices=VERBOSITIES, default="detailed", dest="verbosity"
    )


def run(args: argparse.Namespace) -> int:
    """Build each target's engine, and record it in the manifest as soon as it is there.

    One that fails does not stop the others.
    """
    if args.timing_cache is not None:
        check_timing_cache(args.timing_cache)
    progress = options.progress(args)
    if not args.bundle.is_dir():
        Bundle.open(args.bundle)  # says what it is instead
    with bundle_lock(args.bundle, progress.waits) as scratch:
        return _build_all(args, scratch, progress)


def _build_all(args: argparse.Namespace, scratch: Path, progress: Progress) -> int:
    with progress.step("Check the files"):
        bundle, dropped = repaired(args.bundle, progress)
        check_report(bundle)
    names = [*(args.targets or bundle.manifest.targets), *_built_here(dropped)]
    targets = list(dict.fromkeys(resolve_target(name) for name in names))
    if not targets:
        raise UsageError("the bundle names no target: give --target.")
    profile, remarks = engine_profile(
        choose_profile(args, bundle), bundle_limit(bundle.folder, bundle.model)
    )
    for remark in remarks:
        progress.note(remark)
    recipe = choose_recipe(bundle, progress)
    for target in targets:
        _check(bundle, target, recipe, args)
    reports = []
    failures: dict[str, EngineError] = {}
    for target in targets:
        try:
            with progress.step(f"Build {target.name}"), trouble_is_bundle_error(bundle.folder):
                bundle, report = _build(args, bundle, scratch, target, profile, progress)
        except EngineError as error:
            failures[target.name] = error
        else:
            reports.append(report)
    if args.json:
        options.print_json([report.to_json() for report in reports])
    elif reports:
        options.say("\n".join(_line(bundle, report) for report in reports))
    if failures:
        raise EngineError(" | ".join(str(error).rstrip(".") for error in failures.values()) + ".")
    return 0


def choose_profile(args: argparse.Namespace, bundle: Bundle) -> Profile:
    """The shape options if there is one, else the shapes the bundle was compiled with."""
    if args.min_shapes or args.opt_shapes or args.max_shapes or not bundle.manifest.graph.profile:
        return Profile.parse(args.min_shapes, args.opt_shapes, args.max_shapes)
    with reading_records(bundle.folder / MANIFEST_NAME):
        return Profile.from_json(bundle.manifest.graph.profile)


def choose_recipe(bundle: Bundle, progress: Progress) -> Recipe | None:
    """The recipe of a bundle; None where only a name is known, of no recipe of this version.

    Raises UsageError for one that no engine is built of.
    """
    from iq_export.recipe import load_recipe, recipe_names

    recipe = recipe_of(bundle.manifest)
    if recipe is None and bundle.manifest.recipe in recipe_names():
        recipe = load_recipe(bundle.manifest.recipe)
        progress.note(
            f"{bundle.folder} is of an older version: its number formats are taken from the "
            f"recipe's name, {recipe.name}"
        )
    if recipe is not None and recipe.simulated:
        raise UsageError(
            f"recipe '{recipe.name}' is for study: no kernel multiplies what it makes, so no "
            "engine is built of it. Compile with another recipe, such as w8a8."
        )
    return recipe


def _check(bundle: Bundle, target: Target, recipe: Recipe | None, args: argparse.Namespace) -> None:
    """Refuse before the first build what cannot be built."""
    if recipe is not None:
        check_formats(target, recipe.formats)
    check_opset(target, bundle.manifest.opset)
    check_levers(
        target, version_compatible=args.version_compatible, strip_weights=args.strip_weights
    )
    reason = why_not_here(target)
    if reason is not None:
        raise EngineError(reason)
    header = read_header(bundle.model)
    gap = builder_gap(target, AttentionForm(bundle.manifest.dtype, header.head_dim, header.softcap))
    if gap is not None:
        raise EngineError(f"{gap}.")


def _build(
    args: argparse.Namespace,
    bundle: Bundle,
    scratch: Path,
    target: Target,
    profile: Profile,
    progress: Progress,
) -> tuple[Bundle, EngineReport]:
    """Build in a folder inside the bundle, which is removed, and move what is finished."""
    sink_nodes = read_header(bundle.model).sink_nodes
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        folder = Path(name)
        architectures = plugin_architectures(bundle, target)
        plugin = provide_plugin(args.plugin, folder, architectures, sink_nodes)
        plugin = plugin.covering(architectures)  # it replaces the one of the other engines
        if args.plugin == "auto" and sink_nodes and plugin.path is None:
            progress.note(plugin.reason)
        plan = folder / f"{target.name}.plan"
        report = build_engine(
            bundle.model,
            plan,
            target,
            profile,
            plugin=plugin.path,
            form_reason=plugin.reason,
            sink_nodes=sink_nodes,
            progress=progress,
            timing_cache=args.timing_cache,
            version_compatible=args.version_compatible,
            strip_weights=args.strip_weights,
            profiling_verbosity=args.verbosity,
        )
        return _install(bundle, plan, plugin.path, report), report


def plugin_architectures(bundle: Bundle, target: Target) -> list[int]:
    """Those of `target` and of the bundle's engines: there is one plugin library for all."""
    wanted = set(target.compute_capabilities)
    with reading_records(bundle.folder / MANIFEST_NAME):
        for engine in bundle.manifest.graph.engines.values():
            wanted.update(engine.get("compute_capabilities", ()))
        return sorted(wanted)


def _install(bundle: Bundle, plan: Path, library: Path | None, report: EngineReport) -> Bundle:
    """The bundle with the plan, the library if there is one, and their manifest."""
    new: dict[str, Path | str] = {f"engines/{plan.name}": plan}
    if library is not None:
        new[f"plugins/{library.name}"] = library
    graph = bundle.manifest.graph
    engines = {**graph.engines, report.target: report.to_json()}
    failures = {k: v for k, v in graph.engine_failures.items() if k != report.target}
    head = engine_note(report.target)
    return update_with_report(
        bundle,
        new=new,
        graphs=[replace(graph, engines=engines, engine_failures=failures)],
        targets=list(dict.fromkeys([*bundle.manifest.targets, report.target])),
        notes=[note for note in bundle.manifest.notes if not note.startswith(head)],
    )


def repaired(folder: Path, progress: Progress) -> tuple[Bundle, list[str]]:
    """The bundle with its files checked, and the targets whose engine was damaged, now dropped.

    Versions that replaced files one by one left, when they were killed, engines and a report that
    the manifest does not describe. The lock is held. Raises BundleError if anything else differs.
    """
    _adopt_checksum(folder)
    bundle = Bundle.open(folder, verify=False)
    remove_leftovers(folder)
    damaged = {name for name, _, _ in bundle.mismatches()}
    if not damaged:
        return bundle, []
    if not all(name.startswith(UPDATED) for name in damaged):
        return Bundle.open(folder), []  # says what differs
    graph = bundle.manifest.graph
    engines = graph.engines
    with reading_records(folder / MANIFEST_NAME):
        library = any(name.startswith("plugins/") for name in damaged)
        dropped = [
            target
            for target, engine in engines.items()
            if f"engines/{engine.get('plan', f'{target}.plan')}" in damaged
            or (library and engine.get("form") == "plugin" and not engine["plugin_embedded"])
        ]
        plans = {f"engines/{engines[t].get('plan', f'{t}.plan')}" for t in dropped}
    for target in dropped:
        progress.note(f"the engine of {target} is not the one that was recorded: dropped")
    bundle = update_with_report(
        bundle,
        drop=[*(damaged - {REPORT_NAME}), *plans],
        graphs=[replace(graph, engines={t: e for t, e in engines.items() if t not in dropped})],
    )
    return Bundle.open(folder), dropped


def _adopt_checksum(folder: Path) -> None:
    """Put the manifest's checksum in place if a version that replaced the two one after the other
    was killed in between: it had written it already."""
    try:
        line = checksum_line(read_inside(folder, MANIFEST_NAME, LARGEST_MANIFEST)).encode()
        if read_inside(folder, CHECKSUM_NAME, len(line) + 1) == line:
            return
        for path in leftovers(folder):
            ours = path.name.startswith(f".{CHECKSUM_NAME}.")
            if ours and read_inside(folder, path.name, len(line) + 1) == line:
                move_inside(folder, path.name, CHECKSUM_NAME)
                return
    except (OSError, BundleError):
        return  # opening it says what is wrong


def _built_here(names: Sequence[str]) -> list[str]:
    return [name for name in names if why_not_here(resolve_target(name)) is None]


def _line(bundle: Bundle, report: EngineReport) -> str:
    form = {
        "plugin": f"{report.plugin_layers} plugin layers, {sum(report.fused.values())} fused",
        "body": "sink ops as function bodies",
    }
    return (
        f"{bundle.folder / 'engines' / report.plan}: {options.size(report.bytes)}, "
        f"{form.get(report.form, 'no sink ops')}, {report.seconds:.0f} s"
    )
