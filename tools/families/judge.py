"""What becomes of one type: its tiny model is compiled, with an engine, in a fork.

A fork has everything imported already, and its own limits of time and memory; what it finds is a
row of the record.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from iq_export.compile import calibrate_and_rewrite, trace_model
from iq_export.engine.build import build_engine
from iq_export.engine.targets import resolve_target
from iq_export.errors import EngineError, IqError
from iq_export.graph import io
from iq_export.lengths import bundle_limit
from iq_export.model.part import TEXT, text_part
from iq_export.options import CompileOptions
from iq_export.precheck import check, with_limit
from iq_export.progress import Progress
from iq_export.work import work_folder
from tools.families.products import block_products
from tools.families.tiny import NotMade, first_line, tiny_config, write_model

COMPILES, REFUSED, TRACEBACK, NOT_MADE = "compiles", "refused", "traceback", "not made"
OUTCOMES = (COMPILES, REFUSED, TRACEBACK, NOT_MADE)
SAMPLES, LENGTH = 4, 64
TARGET = "rtx-all"  # one plan for compute capability 8.0, 8.6, 8.9 and 12.0
# The step before which nothing of the model but its configuration was looked at.
CONFIGURATION = "configuration"

Row = dict[str, Any]


def judge(kind: str, folder: Path) -> Row:
    """Compile a tiny model of the type in `folder`, an empty one; the row that says how it went."""
    progress = _Steps()
    begin = time.perf_counter()
    try:
        row = _compiled(kind, folder, progress)
    except NotMade as error:
        row = {"outcome": NOT_MADE, "reason": str(error)}
    except IqError as error:
        row = {"outcome": REFUSED, "reason": str(error), "step": progress.begun}
    except Exception as error:
        row = {"outcome": TRACEBACK, "reason": first_line(error), "step": progress.begun}
        row["where"] = traceback.format_exception(error)[-2].splitlines()[0].strip()
    if "reason" in row:
        row["reason"] = row["reason"].replace(f"{folder}/", "")
    row["seconds"] = round(time.perf_counter() - begin, 1)
    return row


def apart(work: Callable[[Path], Row], *, seconds: float, memory: int) -> Row:
    """`work` of an empty folder, in a fork that may take so long and have so many bytes.

    One that is ended, or ends by itself, is a row too.
    """
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "row.json"
        child = context.Process(target=_limited, args=(work, answer, memory))
        child.start()
        child.join(seconds)
        if child.is_alive():
            child.kill()
            child.join()
            return {"outcome": TRACEBACK, "reason": f"not done within {seconds:g} seconds."}
        if not answer.is_file():
            return {"outcome": TRACEBACK, "reason": f"the process ended with {child.exitcode}."}
        row: Row = json.loads(answer.read_text(encoding="utf-8"))
        return row


def _limited(work: Callable[[Path], Row], answer: Path, memory: int) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    least = min(size for size in (memory, soft, hard) if size != resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_AS, (least, hard))
    row = work(answer.parent)
    answer.write_text(json.dumps(row), encoding="utf-8")


class _Steps(Progress):
    """Knows the step that was begun last, and prints nothing."""

    def __init__(self) -> None:
        super().__init__(quiet=True)
        self.begun = CONFIGURATION

    @contextmanager
    def step(self, name: str) -> Iterator[Progress]:
        self.begun = name
        with super().step(name) as progress:
            yield progress


def _compiled(kind: str, folder: Path, progress: Progress) -> Row:
    config, model = tiny_config(kind), folder / kind
    check_saved(config, kind, folder / "config")
    write_model(config, model)
    part = None if text_part(config) is None else TEXT
    options = CompileOptions(  # its targets are those of whoever names none: a gap is a note
        str(model), folder / "bundle", samples=SAMPLES, length=LENGTH, part=part
    )
    checked = check(options)
    with work_folder(options.out, None, keep=False) as work:
        traced = trace_model(checked.options, work, progress)
        checked = with_limit(checked, bundle_limit(traced.assets, traced.model), progress)
        made = calibrate_and_rewrite(checked.options, checked, traced, work, progress)
        products = block_products(io.load(traced.model))
        gap = next(iter(checked.gaps.values()), None)
        engine = _engine(made, checked, folder, progress) if gap is None else {"engine": gap}
    quantized = {node for quantizer in made.quantizers.values() for node in quantizer.linears}
    assert made.check is not None
    return {
        "outcome": COMPILES,
        "products": len(products),
        "int8": len(products & quantized),
        "parity": traced.parity,
        "noise_ratio": traced.noise_ratio,
        **engine,
        **({} if part is None else {"part": part}),
    }


def _engine(made: Any, checked: Any, folder: Path, progress: Progress) -> Row:
    """What became of the engine: "" where one was built, else "fails" with TensorRT's reason."""
    target = resolve_target(TARGET)
    try:
        report = build_engine(
            made.quantized, folder / f"{TARGET}.plan", target, checked.options.profile,
            sink_nodes=made.sink_nodes, progress=progress,
        )  # fmt: skip
    except EngineError as error:
        return {"engine": f"fails: {error}".replace(f"{folder}/", "")}
    return {"engine": "", "engine_seconds": round(report.seconds, 1)}


def check_saved(config: Any, kind: str, folder: Path) -> None:
    """Refuse what a config.json of it tells, before its weights are made. Raises ModelError."""
    from iq_export.model.support import check_support
    from iq_export.recipe import load_recipe

    config.save_pretrained(folder)
    raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    part = None if text_part(config) is None else TEXT
    check_support(raw, kind, load_recipe("w8a8"), part=part)
