"""The work folder: intermediate graphs of one compile at a time, and what `eval` compares with.

    D/.iq-export-owner          the mark: the folder is ours, and locked by the run that uses it
    D/run/                      what the running compile makes; gone when it ends
    D/unfinished/               kept: what a run finished that was then killed or failed
    D/traced/                   kept: the traced graph, found again by the next run
    D/RECIPE-DTYPE/             kept: the graphs of one bundle, and references.json about them

What is kept is replaced when a bundle is finished, never by a run that fails.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from iq_export.bundle.lock import Say, claim, quiet
from iq_export.bundle.manifest import write_atomically
from iq_export.bundle.package import parents_of
from iq_export.checksum import sha256_file
from iq_export.errors import BundleError, UsageError
from iq_export.graph.model_files import model_files

REFERENCES = "references.json"
_RUN, _TRACED, _UNFINISHED = "run", "traced", "unfinished"


@dataclass(frozen=True)
class Work:
    """A claimed work folder. With `keep` its graphs outlive the run."""

    folder: Path
    keep: bool

    @property
    def run(self) -> Path:
        """Where this run writes."""
        return self.folder / _RUN

    @property
    def traced(self) -> Path:
        """Where an earlier run may have left its traced graph."""
        return self.folder / _TRACED

    @property
    def unfinished(self) -> Path | None:
        """Where the results of finished steps lie for the next run, if anything is kept."""
        return self.folder / _UNFINISHED if self.keep else None

    def place_of_trace(self) -> Path:
        """Where a new traced graph goes: a run that fails leaves it to the next one, unless a
        bundle's graphs depend on the one that is there."""
        kept = any(self.folder.glob(f"*/{REFERENCES}"))
        return self.run / _TRACED if kept or not self.keep else self.traced

    def keep_graphs(self, stage: Path, graphs: Mapping[str, Path], plan_sha256: str) -> None:
        """Keep `graphs`, by label, of the bundle whose plan.json has this checksum. They lie in
        the folder `stage` of this run, or are the traced one."""
        files = {file for graph in graphs.values() for file in model_files(graph)}
        record = {
            "plan_sha256": plan_sha256,
            "graphs": {label: self._kept(graph, stage) for label, graph in graphs.items()},
            "files": {self._kept(file, stage): sha256_file(file) for file in sorted(files)},
        }
        write_atomically(stage / REFERENCES, json.dumps(record, indent=1) + "\n")
        if (self.run / _TRACED).is_dir():
            _replace(self.run / _TRACED, self.traced)
        _replace(stage, self.folder / stage.name)
        shutil.rmtree(self.folder / _UNFINISHED, ignore_errors=True)

    def _kept(self, file: Path, stage: Path) -> str:
        """Where the file will lie, relative to the work folder."""
        place = _TRACED if file.is_relative_to(self.traced) else None
        if place is None and not file.is_relative_to(stage):
            place = str(file.parent.relative_to(self.run))
        return f"{place or stage.name}/{file.name}"


def recall_graphs(folder: Path, plan_sha256: str) -> dict[str, Path]:
    """The kept graphs of the bundle whose plan.json has this checksum, label -> file.

    Empty if there are none, or if one is not what it was then.
    """
    home = folder.resolve()
    for file in sorted(folder.glob(f"*/{REFERENCES}")):
        try:
            record = json.loads(file.read_text(encoding="utf-8"))
            graphs = {label: folder / path for label, path in record["graphs"].items()}
            files = {folder / path: digest for path, digest in record.get("files", {}).items()}
            inside = all(home in path.resolve().parents for path in (*graphs.values(), *files))
            there = inside and all(path.is_file() for path in graphs.values())
            same = there and record["plan_sha256"] == plan_sha256
            if same and all(sha256_file(path) == digest for path, digest in files.items()):
                return graphs
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
    return {}


def default_work(out: Path) -> Path:
    """Where a compile keeps its intermediate graphs if no folder is named."""
    out = Path(out).absolute()
    return out.parent / f".{out.name}.work"


def check_work(out: Path, work: Path | None) -> None:
    """Raise UsageError if `work` lies inside `out`, which is replaced as a whole."""
    if work is None:
        return
    inner, outer = (Path(os.path.realpath(path)) for path in (work, out))
    if inner == outer or outer in inner.parents:
        raise UsageError(f"--work {work} lies in the output folder {out}: give one outside of it")


@contextmanager
def work_folder(out: Path, work: Path | None, *, keep: bool, say: Say = quiet) -> Iterator[Work]:
    """The work folder of `out`, or the one that is named, for this run alone.

    Waits for another run that uses it. Afterwards it is as it was but for what was kept. Raises
    BundleError if there is a folder that is not ours, or it cannot be made.
    """
    folder = Path(os.path.realpath(work)) if work is not None else default_work(out)
    made = Work(folder, keep)
    with parents_of(folder), ExitStack() as stack:
        try:
            stack.enter_context(claim(folder, keep=keep, say=say))
            # Of a run that was killed; the graphs, of one by an older version.
            shutil.rmtree(made.run, ignore_errors=True)
            for graph in folder.glob("*/.taps-*"):
                graph.unlink(missing_ok=True)
            stack.callback(shutil.rmtree, made.run, ignore_errors=True)
            made.run.mkdir()
        except OSError as error:
            raise BundleError(f"cannot make the work folder {folder}: {error.strerror}") from error
        yield made


def _replace(new: Path, place: Path) -> None:
    """Put a folder of this run in the place of one that an earlier run kept."""
    if place.exists():
        os.rename(place, new.with_name(f"{new.name}.old"))
    os.rename(new, place)
