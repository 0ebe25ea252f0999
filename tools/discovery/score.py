"""What discovery says of a planted model, against what was planted."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx

from iq_export.graph import io
from iq_export.graph.sites import find_sites
from iq_export.observe.token_stats import TokenStats, observe_tokens
from iq_export.progress import Progress
from iq_export.sinks.lifecycle import Lifecycle, discover
from tools.discovery.models import Model, members, plant, windows

CPU = ("CPUExecutionProvider",)
LEAST_OVERLAP = 0.9
BINS = (20, 50, 200, 1000, 12_000)


@dataclass(frozen=True)
class Planted:
    """One planted lifecycle: who is first written where, and where it is taken out."""

    births: dict[int, np.ndarray]
    death: int | None
    members: np.ndarray
    ratio: float


@dataclass(frozen=True)
class Outcome:
    """Of one model. `found[i]`: what is wrong with planted lifecycle i, empty if nothing is.
    `additional`: lifecycles that were found and not planted."""

    kind: str
    seed: int
    ratios: list[float]
    found: list[str]
    additional: int

    @property
    def right(self) -> list[bool]:
        return [not fault and not self.additional for fault in self.found]


def observed(model: Model) -> TokenStats:
    """The real path: a file, its sites, its tokens."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        onnx.save(plant(model), path)
        sites = find_sites(io.load(path))
        assert len(sites.blocks) == model.blocks, sites.refused
        return observe_tokens(
            path, sites, windows(model), providers=CPU, progress=Progress(quiet=True)
        )


def truth(model: Model) -> list[Planted]:
    """What is planted as a spike: lifecycles below 20 x are none."""
    data = windows(model)
    found = []
    for life in model.lives:
        births: dict[int, np.ndarray] = {}
        for group in life.groups:
            block, mine = group.births[0][0], members(model, group.token, data)
            births[block] = np.union1d(births.get(block, mine[:0]), mine)
        everyone = np.unique(np.concatenate(list(births.values())))
        if life.ratio >= BINS[0]:
            found.append(Planted(births, life.death, everyone, life.ratio))
    return found


def check_planted(model: Model, stats: TokenStats) -> None:
    """Raise AssertionError if the graph has not the spikes that the model names."""
    typical = np.median(stats.residual_max, axis=1)
    for spike in truth(model):
        block = max(spike.births)
        least = np.median(stats.residual_max[block, spike.members]) / typical[block]
        assert least > 0.4 * spike.ratio, (model.kind, model.seed, least, spike.ratio)


def judge(model: Model, lives: Sequence[Lifecycle]) -> Outcome:
    planted, left = truth(model), list(lives)
    found = []
    for spike in planted:
        best = max(left, key=lambda life: _overlap(spike, life), default=None)
        if best is None or not _overlap(spike, best):
            found.append("missed")
            continue
        left.remove(best)
        found.append(_fault(spike, best))
    ratios = [spike.ratio for spike in planted]
    return Outcome(model.kind, model.seed, ratios, found, len(left))


def _overlap(spike: Planted, life: Lifecycle) -> float:
    """Jaccard of the members; 0 if the blocks in which they live have none in common."""
    last = np.inf if spike.death is None else spike.death
    if life.birth > last or life.end < min(spike.births):
        return 0.0
    both = np.intersect1d(spike.members, life.members).size
    return both / np.union1d(spike.members, life.members).size


def _fault(spike: Planted, life: Lifecycle) -> str:
    if _overlap(spike, life) < LEAST_OVERLAP:
        return "members"
    if {block for block, _ in life.detections} != spike.births.keys():
        return "birth"
    if (spike.death is None) != (life.death is None):
        return "death"
    if spike.death is not None and life.death is not None and abs(spike.death - life.death) > 1:
        return "death"
    return ""


def judged(model: Model) -> Outcome:
    stats = observed(model)
    check_planted(model, stats)
    return judge(model, discover(stats))


def summary(outcomes: Sequence[Outcome]) -> dict[str, object]:
    """Counts by kind and by size of the spike, and every model that was not right."""
    spiked = [o for o in outcomes if o.ratios]
    calm = [o for o in outcomes if not o.ratios]
    planted = [(o, r, ok) for o in spiked for r, ok in zip(o.ratios, o.right, strict=True)]
    faults = Counter(fault for o in spiked for fault in o.found if fault)
    bins = list(pairwise(BINS))
    return {
        "models with spikes": len(spiked),
        "lifecycles": len(planted),
        "recalled": sum(ok for *_, ok in planted),
        "recall": sum(ok for *_, ok in planted) / max(len(planted), 1),
        "faults": dict(sorted(faults.items())),
        "models with additional lifecycles": sum(o.additional > 0 for o in spiked),
        "models without spikes": len(calm),
        "false alarms": sum(o.additional > 0 for o in calm),
        "by size": {
            f"{low} to {min(high, 10_000)} x": _share(
                [ok for _, r, ok in planted if low <= r < high]
            )
            for low, high in bins
        },
        "by kind": {
            kind: _share([ok for o, _, ok in planted if o.kind == kind])
            for kind in dict.fromkeys(o.kind for o in spiked)
        },
        "false alarms by kind": {
            kind: _share([o.additional > 0 for o in calm if o.kind == kind])
            for kind in dict.fromkeys(o.kind for o in calm)
        },
        "not right": [asdict(o) for o in outcomes if any(o.found) or o.additional],
    }


def _share(right: Sequence[bool]) -> list[int]:
    return [sum(right), len(right)]
