"""The kernels against the same arithmetic on the CPU, over random shapes, types and tables.

    python -m tools.gpu_check.kernels GPU_LIBRARY HOST_LIBRARY CASES SEED

prints one JSON object; needs neither torch nor TensorRT, so that compute-sanitizer can watch it.
"""

from __future__ import annotations

import ctypes
import json
import sys
from dataclasses import asdict, dataclass, field

import numpy as np

from tests.plugins.calls import DTYPES, Rows

EPSILON, TAU = 1e-5, 200.0
# Bars: codes that must be equal, and the relative error of a norm in float32.
EQUAL_CODES, NORM_ERROR = 0.9999, 2e-6
_HOST_WORKERS = 128
_HIDDEN = (1, 7, 64, 577, 1536, 2048, 4096, 8192, 12_288, 20_480)


@dataclass
class Totals:
    """What all cases together found. `flips` and `steps` are of float32 norms: see `norm_error`."""

    cases: int = 0
    rows: int = 0
    index_differs: int = 0
    inserted_differs: int = 0
    sum_differs: int = 0
    codes: int = 0
    codes_differ: int = 0
    largest_step: int = 0
    side_error: float = 0.0
    flips: int = 0
    steps: float = 0.0
    first: list[str] = field(default_factory=list)

    @property
    def norm_error(self) -> float:
        """Mean relative difference of norms in float32, from codes that differ.

        The kernel gives codes only. value / scale crosses a boundary between codes, one step apart,
        with a probability of the difference in steps: |value / scale| x the relative difference.
        """
        return self.flips / self.steps if self.steps else 0.0

    def reasons(self) -> list[str]:
        """Which bars are missed."""
        equal = 1 - self.codes_differ / max(self.codes, 1)
        checks = {
            f"{self.index_differs} sink indices differ": self.index_differs > 0,
            f"{self.inserted_differs} inserted rows differ": self.inserted_differs > 0,
            f"{self.sum_differs} rows of sums differ": self.sum_differs > 0,
            f"int8 codes differ by up to {self.largest_step} steps": self.largest_step > 1,
            f"only {equal:.4%} of the int8 codes are equal": equal < EQUAL_CODES,
            f"norms differ by {self.norm_error:.1e}": self.norm_error > NORM_ERROR,
            f"side channels differ by {self.side_error:.1e}": self.side_error > 1e-2,
        }
        return [text for text, missed in checks.items() if missed]

    def to_json(self) -> dict[str, object]:
        return {**asdict(self), "norm_error": self.norm_error, "missed": self.reasons()}


def compare(gpu: Rows, host: Rows, cases: int, seed: int) -> Totals:
    """`cases` of every op. Calls that fail raise AssertionError with the CUDA error."""
    rng = np.random.default_rng(seed)
    totals = Totals()
    for _ in range(cases):
        dtype = str(rng.choice(list(DTYPES)))
        rows, hidden = int(rng.integers(0, 70)), int(rng.choice(_HIDDEN))
        shifted = Rows(gpu.library, gpu.workers, int(rng.integers(0, 2)))
        where = f"{dtype} [{rows}, {hidden}] shift {shifted.shift}"
        totals.cases += 1
        totals.rows += rows
        x, templates = _rows(rng, dtype, rows, hidden)
        index = _sinks(rng, shifted, host, x, templates, totals, where)
        _norm(rng, shifted, host, x, index, templates, totals, where)
        _gated(rng, shifted, host, dtype, rows, totals, where)
    return totals


def _rows(
    rng: np.random.Generator, dtype: str, rows: int, hidden: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of all sizes, some near a template, some with NaN or infinities; and the templates."""
    k = int(rng.integers(1, 6))
    templates = rng.standard_normal((k, hidden)).astype(np.float32)
    templates[np.arange(k), rng.integers(hidden, size=k)] = rng.uniform(300, 30_000, k)
    sizes = np.power(10.0, rng.uniform(-2, 2, (rows, 1)))
    x = sizes * rng.standard_normal((rows, hidden))
    near = rng.random(rows) < 0.3
    x[near] = templates[rng.integers(k, size=rows)][near]
    for value in (np.nan, np.inf, -np.inf):
        if rows:
            x[rng.integers(rows), rng.integers(hidden)] = value
    return x.astype(DTYPES[dtype]), templates


def _sinks(
    rng: np.random.Generator, gpu: Rows, host: Rows, x: np.ndarray, templates: np.ndarray,
    totals: Totals, where: str,
) -> np.ndarray:  # fmt: skip
    first, valid = rng.random(len(x)) < 0.2, rng.random(len(x)) < 0.9
    index = host.detect(x, first, valid, templates, TAU)
    wrong = (gpu.detect(x, first, valid, templates, TAU) != index) & ~_tied(x, templates)
    totals.index_differs += _note(totals, wrong, f"detect {where}")
    for restore in (False, True):
        wrong = ~_same(*(library.change(x, index, templates, restore) for library in (gpu, host)))
        totals.inserted_differs += _note(totals, wrong, f"change {where}")
    return index


def _tied(x: np.ndarray, templates: np.ndarray) -> np.ndarray:
    """Rows as near to one template as to another, or with no distance: the order of sums decides.

    Clamped to half's range, as the kernels do it.
    """
    wide = np.clip(
        np.nan_to_num(x.astype(np.float64), posinf=np.inf, neginf=-np.inf), -65504, 65504
    )
    distances = np.stack([((wide - row) ** 2).sum(1) for row in templates.astype(np.float64)], 1)
    distances.sort(axis=1)
    tied = np.isnan(x.astype(np.float32)).any(1)
    if distances.shape[1] > 1:
        tied |= distances[:, 1] - distances[:, 0] <= 1e-6 * distances[:, 1]
    return np.asarray(tied)


def _norm(
    rng: np.random.Generator, gpu: Rows, host: Rows, x: np.ndarray, index: np.ndarray,
    templates: np.ndarray, totals: Totals, where: str,
) -> None:  # fmt: skip
    layer, insert = rng.random() < 0.4, rng.random() < 0.6
    hidden, kind = x.shape[1], x.dtype
    branch = np.asarray(rng.standard_normal(x.shape)).astype(kind)
    weight = np.asarray(rng.standard_normal(hidden)).astype(kind)
    bias = np.asarray(rng.standard_normal(hidden)).astype(kind) if layer else None
    scale = float(np.float16(rng.uniform(0.02, 0.05)))
    sinks = (index, templates) if insert else (None, None)
    arguments = (x, branch, weight, bias, *sinks, EPSILON, scale)
    total, codes, _ = gpu.add_norm(*arguments)
    expected, expected_codes, values = host.add_norm(*arguments)
    name = f"{'layer' if layer else 'rms'} norm {where}"
    totals.sum_differs += _note(totals, ~_same(total, expected), f"sum of {name}")
    inserted = (index > 0) & insert
    wrong = inserted & (codes != expected_codes).any(1)
    totals.inserted_differs += _note(totals, wrong, f"inserted rows of {name}")
    # Inserted rows and rows with an infinity or NaN say nothing of a norm.
    usual = np.isfinite(expected.astype(np.float32)).all(1) & ~inserted
    differ = _codes(totals, codes, expected_codes, name)
    if kind == np.float32 and not layer:
        within = np.abs(values[usual] / scale) < 127
        totals.flips += int((differ[usual] & within).sum())
        totals.steps += float(np.abs(values[usual] / scale)[within].sum())


def _gated(
    rng: np.random.Generator, gpu: Rows, host: Rows, dtype: str, rows: int, totals: Totals,
    where: str,
) -> None:  # fmt: skip
    block = int(2 ** rng.integers(0, 10))
    features = block * int(rng.integers(1, 6))
    kind = DTYPES[dtype]
    gate = rng.normal(0, 4, (rows, features)).astype(kind)
    up = rng.normal(0, 2, (rows, features)).astype(kind)
    if rows:
        gate[rng.integers(rows), rng.integers(features)] = rng.choice([np.nan, np.inf, -np.inf])
    index = rng.integers(0, 3, rows).astype(np.int32) if rng.random() < 0.5 else None
    sides = int(rng.integers(0, min(features, 5)))
    channels = rng.choice(features, sides, replace=False).astype(np.int32) if sides else None
    arguments = (gate, up, index, channels, block, float(np.float32(block**-0.5)), 0.05)
    codes, side = gpu.silu_mul(*arguments)
    expected, expected_side = host.silu_mul(*arguments)
    name = f"gated product {where}, blocks of {block}"
    _codes(totals, codes, expected, name)
    a, b = side.astype(np.float64), expected_side.astype(np.float64)
    both = np.isfinite(a) & np.isfinite(b)
    error = np.abs(a - b)[both] / np.maximum(np.abs(b[both]), 1e-3)
    totals.side_error = max(totals.side_error, float(error.max(initial=0)))
    other = ~both & ~(np.isnan(a) & np.isnan(b)) & (a != b)
    totals.sum_differs += _note(totals, other.any(1) if sides else np.zeros(0, bool), name)


def _codes(totals: Totals, found: np.ndarray, expected: np.ndarray, name: str) -> np.ndarray:
    steps = np.abs(found.astype(int) - expected.astype(int))
    totals.codes += steps.size
    totals.codes_differ += int((steps > 0).sum())
    totals.largest_step = max(totals.largest_step, int(steps.max(initial=0)))
    _note(totals, (steps > 1).any(1), f"codes of {name}")
    return np.asarray(steps > 0)


def _same(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Which rows are equal to the bit, but for the bits of a NaN."""
    bits = np.dtype(f"u{a.dtype.itemsize}")
    nan = np.isnan(a.astype(np.float32)) & np.isnan(b.astype(np.float32))
    return np.asarray(((a.view(bits) == b.view(bits)) | nan).all(1))


def _note(totals: Totals, wrong: np.ndarray, what: str) -> int:
    """The number of wrong rows; the first cases are kept by name."""
    count = int(wrong.sum())
    if count and len(totals.first) < 8:
        totals.first.append(f"{what}: {count} rows, the first is {int(wrong.argmax())}")
    return count


def main() -> int:
    gpu, host, cases, seed = sys.argv[1:]
    totals = compare(
        Rows(ctypes.CDLL(gpu)), Rows(ctypes.CDLL(host), _HOST_WORKERS), int(cases), int(seed)
    )
    print(json.dumps(totals.to_json()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
