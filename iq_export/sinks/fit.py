"""Fit templates to the rows of a lifecycle's sinks, and say how constant those are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np

from iq_export.sinks.lifecycle import EarlySite, Lifecycle
from iq_export.sinks.templates import (
    TOKENS_PER_TEMPLATE,
    EarlyTemplates,
    KeyValueTemplates,
    SinkTemplates,
)

_KMEANS_ROUNDS = 50
Read = Mapping[str, np.ndarray]


MAX_TEMPLATES = 4


@dataclass(frozen=True)
class EarlyRows:
    """What was collected for an early site: float32 `[members, features]`, all members' rows.

    `detection`: the down-projection input there. `norms`: outputs of the norms up to the next site.
    """

    site: EarlySite
    detection: np.ndarray
    norms: dict[str, np.ndarray]


def fit(
    lifecycle: Lifecycle,
    detection_rows: np.ndarray,
    norm_rows: dict[str, np.ndarray],
    threshold: float,
    *,
    limit: float,
    seed: int,
    early: Sequence[EarlyRows] = (),
    read: Read = MappingProxyType({}),
) -> SinkTemplates:
    """The smallest K whose templates explain the sinks to within `limit`, else the best K found.

    Rows are clustered by their post-norm vectors, each norm weighing the same. The graph sees the
    detection site instead: where its match disagrees, the clusters are refined until it does not,
    if that explains the sinks better. The deviation is that of every second token from the
    templates of the others, matched as the graph does, so that many templates over few tokens do
    not look constant. `read`: by name, how strongly products read each channel `[features]`, where
    that is not the same for all.
    """
    features = _features(norm_rows, read)
    seen = _seen(lifecycle, detection_rows, early)
    best: SinkTemplates | None = None
    most = max(1, min(MAX_TEMPLATES, features.shape[0] // TOKENS_PER_TEMPLATE))
    for count in range(1, most + 1):
        clusters = _cluster(features, count, seed)
        for labels in (clusters, _refined(seen, clusters, count)):
            if labels is None:
                continue
            candidate = _candidate(
                lifecycle, seen, features, norm_rows, threshold, labels, count, early, read
            )
            if best is None or candidate.mean_deviation < best.mean_deviation:
                best = candidate
        if best is not None and best.is_constant(limit):
            return best
    assert best is not None
    return best


def fit_again(
    first: SinkTemplates,
    detection_rows: np.ndarray,
    norm_rows: dict[str, np.ndarray],
    early: Sequence[EarlyRows] = (),
) -> SinkTemplates:
    """The same clusters on rows of another graph that computes the same function.

    `deviation` and its kin stay those of `first`: they are of the model's own norms.
    """
    life, labels = first.lifecycle, first.assignment
    again = _candidate(
        life, _seen(life, detection_rows, early), _features(norm_rows, {}), norm_rows,
        first.threshold, labels, first.count, early, {},
    )  # fmt: skip
    return replace(
        again,
        deviation=first.deviation,
        deviation_max=first.deviation_max,
        template_spread=first.template_spread,
    )


# Per site of detection: all members' rows there, `[members, features]`, and whom it catches first.
_Seen = Sequence[tuple[np.ndarray, np.ndarray]]


def _seen(lifecycle: Lifecycle, detection_rows: np.ndarray, early: Sequence[EarlyRows]) -> _Seen:
    caught = [np.isin(lifecycle.members, rows.site.members) for rows in early]
    rest = ~np.any(caught, axis=0) if caught else np.ones(len(lifecycle.members), bool)
    masks = [(rows.detection, mask) for rows, mask in zip(early, caught, strict=True)]
    return [*masks, (detection_rows, rest)]


def _as_read(rows: dict[str, np.ndarray], read: Read) -> dict[str, np.ndarray]:
    """Rows with each channel as large as the products make of it."""
    return {name: values * read[name] if name in read else values for name, values in rows.items()}


def _features(norm_rows: dict[str, np.ndarray], read: Read) -> np.ndarray:
    """What tells the templates apart: the rows after all norms, each norm weighing the same."""
    found = _as_read(norm_rows, read).values()
    return np.concatenate([rows / np.linalg.norm(rows, axis=1).mean() for rows in found], axis=1)


def _candidate(
    lifecycle: Lifecycle,
    seen: _Seen,
    features: np.ndarray,
    norm_rows: dict[str, np.ndarray],
    threshold: float,
    labels: np.ndarray,
    count: int,
    early: Sequence[EarlyRows],
    read: Read,
) -> SinkTemplates:
    """Templates of the clusters `labels`, and how well they explain held-out members."""
    fitted = _fitting_half(labels, count)
    matched = _matches(seen, _tables(seen, labels, count, fitted))
    deviation, worst = _held_out_deviation(_as_read(norm_rows, read), labels, count, matched)
    reached = np.zeros(labels.size, bool)
    early_templates = []
    tables = _tables(seen, labels, count)
    for rows, table, (_, mask) in zip(early, tables, seen, strict=False):
        reached = reached | mask
        norms = {n: _site_means(r, labels, reached, count) for n, r in rows.norms.items()}
        early_templates.append(EarlyTemplates(rows.site, rows.site.threshold, table, norms))
        for name, values in _as_read(rows.norms, read).items():
            inside = {name: values[reached]}
            if all((labels[reached] == k).any() for k in range(count)):
                mean, largest = _held_out_deviation(
                    inside, labels[reached], count, matched[reached]
                )
                deviation, worst = deviation | mean, worst | largest
    return SinkTemplates(
        lifecycle=lifecycle,
        threshold=threshold,
        detection=tables[-1],
        norms={name: means(rows, labels, count) for name, rows in norm_rows.items()},
        deviation=deviation,
        deviation_max=worst,
        template_spread=_spread(_as_read(norm_rows, read), labels, count),
        assignment=_matches(seen, tables),
        agreement=_agreement(features, labels, count, fitted, matched),
        early=tuple(early_templates),
    )


def nearest(rows: np.ndarray, templates: np.ndarray) -> np.ndarray:
    """Number of the nearest template of each row by squared error, as SinkDetect finds it."""
    distances = [((rows - template) ** 2).sum(1) for template in templates]
    return np.argmin(distances, axis=0)


def _refined(seen: _Seen, labels: np.ndarray, count: int) -> np.ndarray | None:
    """Clusters that the graph's own match reproduces; None if it does so already or loses one."""
    begin = labels
    for _ in range(_KMEANS_ROUNDS):
        updated = _matches(seen, _tables(seen, labels, count))
        if np.unique(updated).size < count:
            return None
        if (updated == labels).all():
            break
        labels = updated
    return None if (labels == begin).all() else labels


def _tables(
    seen: _Seen, labels: np.ndarray, count: int, chosen: np.ndarray | None = None
) -> list[np.ndarray]:
    """The detection templates of every site, from the `chosen` members or all."""
    keep = np.ones(labels.size, bool) if chosen is None else chosen
    return [_site_means(rows[keep], labels[keep], mask[keep], count) for rows, mask in seen]


def _site_means(
    rows: np.ndarray, labels: np.ndarray, spiking: np.ndarray, count: int
) -> np.ndarray:
    """As `means`, over the rows that are `spiking`; a template without such is its usual row."""
    averages = []
    for k in range(count):
        own = labels == k
        chosen = own & spiking if (own & spiking).any() else own
        averages.append(rows[chosen].mean(0, dtype=np.float64))
    return np.stack(averages).astype(np.float32)


def _matches(seen: _Seen, tables: Sequence[np.ndarray]) -> np.ndarray:
    """The template that the graph gives every member: that of the first site that catches it."""
    matched = np.zeros(seen[0][1].size, np.int64)
    for (rows, mask), table in zip(seen, tables, strict=True):
        matched[mask] = nearest(rows[mask], table)
    return matched


def _fitting_half(labels: np.ndarray, count: int) -> np.ndarray:
    """Bool `[members]`: every second one, and all of a template that would have none."""
    fitted = np.arange(labels.size) % 2 == 0
    for k in range(count):
        if not (fitted & (labels == k)).any():
            fitted |= labels == k
    return fitted


def _agreement(
    features: np.ndarray, labels: np.ndarray, count: int, fitted: np.ndarray, matched: np.ndarray
) -> float:
    """Share of held-out members whose match is the template that is nearest after the norms."""
    held = ~fitted
    if not held.any():
        return 1.0
    after_norms = nearest(features[held], means(features[fitted], labels[fitted], count))
    return float((after_norms == matched[held]).mean())


def fit_key_values(
    rows: dict[str, np.ndarray], residual: np.ndarray, labels: np.ndarray, count: int
) -> KeyValueTemplates:
    """Templates of keys and values for tokens that are clustered already, `labels` `[tokens]`."""
    deviation, worst = _held_out_deviation(rows, labels, count)
    templates = {name: means(values, labels, count) for name, values in rows.items()}
    return KeyValueTemplates(templates, means(residual, labels, count), deviation, worst)


def _spread(norm_rows: dict[str, np.ndarray], labels: np.ndarray, count: int) -> list[float]:
    totals = np.zeros(count)
    for rows in norm_rows.values():
        templates = means(rows, labels, count)
        relative = np.linalg.norm(rows - templates[labels], axis=1)
        relative /= np.linalg.norm(templates[labels], axis=1)
        totals += [relative[labels == k].mean() for k in range(count)]
    return (totals / max(len(norm_rows), 1)).tolist()


def means(rows: np.ndarray, labels: np.ndarray, count: int) -> np.ndarray:
    """Mean row of every label: `[tokens, features]` -> float32 `[count, features]`."""
    averages = [rows[labels == k].mean(0, dtype=np.float64) for k in range(count)]
    return np.stack(averages).astype(np.float32)


def _cluster(features: np.ndarray, count: int, seed: int) -> np.ndarray:
    """Lloyd's k-means with k-means++ seeding; no empty cluster. Deterministic for a seed."""
    if count == 1:
        return np.zeros(features.shape[0], np.int64)
    rng = np.random.default_rng(seed)
    centres = [features[rng.integers(features.shape[0])]]
    while len(centres) < count:
        distance = np.min([((features - c) ** 2).sum(1) for c in centres], axis=0)
        total = distance.sum()
        chosen = rng.choice(features.shape[0], p=distance / total) if total else len(centres)
        centres.append(features[chosen])
    labels = np.zeros(features.shape[0], np.int64)
    for _ in range(_KMEANS_ROUNDS):
        distances = np.stack([((features - c) ** 2).sum(1) for c in centres])
        updated = distances.argmin(0)
        for k in range(count):
            if not (updated == k).any():  # give an empty cluster the worst explained row
                updated[distances.min(0).argmax()] = k
        if (updated == labels).all():
            break
        labels = updated
        centres = [features[labels == k].mean(0) for k in range(count)]
    return labels


def _held_out_deviation(
    norm_rows: dict[str, np.ndarray],
    labels: np.ndarray,
    count: int,
    matched: np.ndarray | None = None,
) -> tuple[dict[str, float], dict[str, float]]:
    """Mean and largest relative deviation per value, of odd tokens from the even tokens' means.

    `matched`: the template that an odd token gets, if not that of its label.
    """
    fitted = _fitting_half(labels, count)
    held = ~fitted if (~fitted).any() else fitted
    mean: dict[str, float] = {}
    worst: dict[str, float] = {}
    for name, rows in norm_rows.items():
        templates = means(rows[fitted], labels[fitted], count)
        target = templates[(labels if matched is None else matched)[held]]
        size = np.maximum(np.linalg.norm(target, axis=1), 1e-12)
        relative = np.linalg.norm(rows[held] - target, axis=1) / size
        mean[name] = float(relative.mean())
        worst[name] = float(relative.max())
    return mean, worst
