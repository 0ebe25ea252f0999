"""The kernels of a step on emulated threads, against their serial definition."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from tools.gpu_check import sampling
from tools.gpu_check.sampling import KINDS, Case, Rule, compare_choices, compare_moves, random_case


@pytest.fixture(scope="module")
def library(arithmetic: ctypes.CDLL) -> ctypes.CDLL:
    arithmetic.iq_choose_bytes.restype = ctypes.c_int64
    return arithmetic


def test_tokens_are_the_serial_ones(library: ctypes.CDLL) -> None:
    rng = np.random.default_rng(1)
    cases = [random_case(rng, 1000) for _ in range(40)] + [random_case(rng, 4097) for _ in range(5)]
    assert {case.kind for case in cases} == set(KINDS)
    assert compare_choices(library, cases, "cpu") == []


def test_wrong_tokens_and_moves_are_found(library: ctypes.CDLL) -> None:
    """Two cases and a move, whose definition says something else."""

    class Wrong:
        def __getattr__(self, name: str) -> object:
            return getattr(library, name)

        def iq_choose(self, *given: object) -> int:
            return int(library.iq_choose(*given)) + 1

        def iq_move(self, _present: object, past: ctypes.c_void_p, *_: object) -> None:
            ctypes.memset(past, 0xAB, 1)

    rng = np.random.default_rng(4)
    cases = [random_case(rng, 9) for _ in range(2)]
    wrong = compare_choices(Wrong(), cases, "cpu")  # type: ignore[arg-type]
    assert len({text.split(":")[0] for text in wrong}) == 2
    assert len(compare_moves(Wrong(), rng, 1, "cpu")) >= 1  # type: ignore[arg-type]


# Rows that no list in shared memory holds, and a border in each of their bins.
@pytest.mark.parametrize("kind", ["equal", "two values", "outlier"])
@pytest.mark.parametrize("rule", [Rule(1.0, 9000), Rule(1.0, 0, 0.9), Rule(2.0, 9500, 0.7)])
def test_borders_among_many_tokens(library: ctypes.CDLL, kind: str, rule: Rule) -> None:
    logits = np.full((1, 1, 10_001), 0.25, np.float32)
    if kind == "two values":
        logits[..., ::3] = -0.5
    if kind == "outlier":  # all others are in one bin, some of them with keys of their own
        logits[..., 1::2] -= np.arange(5000, dtype=np.float32) * 2**-24
        logits[..., 77] = -1e4
    draws = np.array([5], np.uint64)
    case = Case(kind, "float32", logits, rule, 0, draws, 3)
    assert compare_choices(library, [case], "cpu") == []


@pytest.mark.heavy
def test_tokens_of_large_vocabularies_are_the_serial_ones(library: ctypes.CDLL) -> None:
    rng = np.random.default_rng(2)
    cases = [random_case(rng, max(sampling.VOCABS)) for _ in range(300)]
    assert compare_choices(library, cases, "cpu") == []


def test_moves_are_the_serial_ones(library: ctypes.CDLL) -> None:
    assert compare_moves(library, np.random.default_rng(3), 5, "cpu") == []
