"""The work folder: intermediate graphs of one compile at a time, and what `eval` compares with.

    D/.iq-export-owner          the mark: the folder is ours, and locked by the run that uses it
    D/run/                      what the running compile makes; gone when it ends
    D/unfinished/               kept: what a run finished that was then killed or failed
    D/traced/                   kept: the traced graph, found again by the next run
    D/kept                      a finished bundle is compared with that graph

What is kept is replaced when a bundle is finished, never by a run that fails.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from iq_export.bundle.lock import Say, claim, quiet
from iq_export.bundle.package import parents_of
from iq_export.errors import BundleError, UsageError

_RUN, _TRACED, _KEPT, _UNFINISHED = "run", "traced", "kept", "unfinished"
# In the folders with whole graphs that older versions kept.
_OLD_RECORD = "references.json"


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
        bundle depends on the one that is there."""
        kept = (self.folder / _KEPT).exists() or any(self.folder.glob(f"*/{_OLD_RECORD}"))
        return self.run / _TRACED if kept or not self.keep else self.traced

    def keep_trace(self) -> None:
        """Keep the traced graph of this run for the bundle that was made of it."""
        if (self.run / _TRACED).is_dir():
            _replace(self.run / _TRACED, self.traced)
        (self.folder / _KEPT).touch()
        for record in self.folder.glob(f"*/{_OLD_RECORD}"):
            shutil.rmtree(record.parent, ignore_errors=True)

    def forget_unfinished(self) -> None:
        """Drop the results of steps: the bundle that they were kept for is there."""
        shutil.rmtree(self.folder / _UNFINISHED, ignore_errors=True)


def kept_trace(folder: Path) -> Path | None:
    """The folder of the traced graph that is kept in the work folder, None if there is none, or it
    lies elsewhere."""
    traced = folder / _TRACED
    inside = traced.is_dir() and traced.resolve() == folder.resolve() / _TRACED
    return traced if inside else None


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
