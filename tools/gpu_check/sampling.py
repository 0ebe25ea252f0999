"""Sampling and the cache's moves on the GPU: against their serial definition, and their times.

    python -m tools.gpu_check.sampling LIBRARY

LIBRARY is libiq_step_gpu_test.so, of plugins/runtime with -DIQ_GPU_TESTS=ON. Prints one JSON
object. The kernels must give the very tokens and bytes of the serial definition.
"""

from __future__ import annotations

import ctypes
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tools.gpu_check.timing import SETS, graph_time

CASES, MOVES, SEED = 300, 40, 0
# The bar, in microseconds of a launch in a graph.
BAR = 60.0
VOCAB, BATCHES = 151_936, (1, 32)
TYPES = ("float32", "float16", "bfloat16")  # in the order of iq::LogitType
VOCABS = (1, 2, 7, 8, 9, 33, 255, 1000, 4097, 20_001, 50_257, 151_936, 200_000)
KINDS = (
    "normal", "narrow", "wide", "rounded", "equal", "two values", "outlier", "falling", "nan",
    "inf", "-inf",
)  # fmt: skip
_SPARE = 8  # elements by which the first logit may be displaced


@dataclass(frozen=True)
class Rule:
    """As iq::Sampling, without the seed."""

    temperature: float
    top_k: int = 0
    top_p: float = 1.0


RULES = {
    "greedy": Rule(0.0),
    "temperature": Rule(0.8),
    "top-k 50": Rule(0.8, 50),
    "top-p 0.9": Rule(0.8, 0, 0.9),
    "top-k 50, top-p 0.95": Rule(0.8, 50, 0.95),
}


@dataclass(frozen=True)
class Case:
    """Logits `[batch, seq, vocab]` as float32, to be given as `type` from element `offset` on."""

    kind: str
    type: str
    logits: np.ndarray
    rule: Rule
    seed: int
    draws: np.ndarray  # uint64 [batch]
    offset: int

    def __str__(self) -> str:
        shape = "x".join(map(str, self.logits.shape))
        return f"{self.kind} {self.type} {shape}+{self.offset} {self.rule}"


def random_case(rng: np.random.Generator, largest: int) -> Case:
    """A case of up to `largest` tokens: all kinds of rows, rules that cut anywhere."""
    kind = str(rng.choice(KINDS))
    batch, seq = int(rng.integers(1, 4)), int(rng.integers(1, 3))
    vocab = int(rng.choice([size for size in VOCABS if size <= largest]))
    logits = rng.normal(size=(batch, seq, vocab)) * rng.uniform(0.5, 8)
    token = int(rng.integers(vocab))
    if kind == "narrow":
        logits *= 1e-3
    elif kind == "wide":
        logits *= 1e3
    elif kind == "rounded":
        logits = logits.round(int(rng.integers(3)))
    elif kind == "equal":
        logits[:] = rng.normal()
    elif kind == "two values":
        logits = np.where(logits > rng.normal(), 0.5, -0.25)
    elif kind == "outlier":
        logits[..., token] += rng.choice([-1e4, 50.0, 1e4])
    elif kind == "falling":
        logits = -np.sort(-logits, axis=-1)
    elif kind != "normal":
        logits[-1, -1, token] = float(kind)
    rule = Rule(
        float(
            rng.choice(
                [0.0, 1e-30, 1e-3, 0.5, 1.0, 3.0, 1e5], p=[0.1, 0.05, 0.1, 0.2, 0.3, 0.15, 0.1]
            )
        ),
        int(rng.choice([0, 1, 2, 50, 1000, vocab, vocab + 1])),
        float(rng.choice([1.0, 0.99, 0.9, 0.5, 1e-3])),
    )
    return Case(
        kind, str(rng.choice(TYPES)), logits.astype(np.float32), rule, int(rng.integers(1 << 62)),
        rng.integers(0, 1000, batch).astype(np.uint64), int(rng.integers(_SPARE)),
    )  # fmt: skip


def open_library(path: Path) -> ctypes.CDLL:
    """The library, with the types that its functions return."""
    library = ctypes.CDLL(str(path))
    library.iq_choose.restype = library.iq_choose_bytes.restype = ctypes.c_int64
    library.iq_uniform.restype = ctypes.c_double
    return library


def compare_choices(library: ctypes.CDLL, cases: list[Case], device: str) -> list[str]:
    """The cases in which a token, an id or a count of draws is not the serial definition's."""
    return [text for case in cases for text in _compare_choice(library, case, device)]


def _compare_choice(library: ctypes.CDLL, case: Case, device: str) -> list[str]:
    import torch

    batch, seq, vocab = case.logits.shape
    given = torch.from_numpy(case.logits).to(getattr(torch, case.type))
    buffer = torch.zeros(given.numel() + _SPARE, dtype=given.dtype, device=device)
    logits = buffer[case.offset : case.offset + given.numel()]
    logits.copy_(given.flatten())
    expected = [
        library.iq_choose(
            _pointer(row), ctypes.c_int64(vocab), ctypes.c_float(case.rule.temperature),
            ctypes.c_int32(case.rule.top_k), ctypes.c_float(case.rule.top_p),
            ctypes.c_double(_uniform(library, case, number)),
        )
        for number, row in enumerate(given[:, -1].float())
    ]  # fmt: skip
    choice = Choice(library, batch, vocab, device)
    wrong = []
    for _ in range(2):  # the second time over what the first one left in the workspace
        choice.draws.copy_(torch.from_numpy(case.draws.astype(np.int64)))
        choice.launch(case.type, logits, seq, case.rule, case.seed)
        found = choice.chosen.tolist()
        if found != expected:
            wrong.append(f"{case}: {found}, not {expected}")
        if choice.ids.tolist() != [max(token, 0) for token in expected]:
            wrong.append(f"{case}: ids {choice.ids.tolist()}")
        if choice.draws.tolist() != [int(draw) + 1 for draw in case.draws]:
            wrong.append(f"{case}: draws {choice.draws.tolist()}")
    return wrong


def _uniform(library: ctypes.CDLL, case: Case, row: int) -> float:
    numbers = (case.seed, row, int(case.draws[row]))
    return float(library.iq_uniform(*map(ctypes.c_uint64, numbers)))


class Choice:
    """The buffers of a launch for `batch` rows of `vocab` logits, and the launch."""

    def __init__(self, library: ctypes.CDLL, batch: int, vocab: int, device: str) -> None:
        import torch

        self.library, self.batch, self.vocab, self.device = library, batch, vocab, device
        sizes = (ctypes.c_int64(batch), ctypes.c_int64(vocab))
        bytes_ = int(library.iq_choose_bytes(*sizes))
        self.workspace = torch.full((bytes_,), 0xAB, dtype=torch.uint8, device=device)
        self.draws, self.ids, self.chosen = (
            torch.zeros(batch, dtype=torch.int64, device=device) for _ in range(3)
        )

    def launch(self, type_: str, logits: Any, seq: int, rule: Rule, seed: int) -> None:
        """A token for each row, into `chosen`. Raises RuntimeError if CUDA refuses."""
        status = self.library.iq_launch_choose(
            TYPES.index(type_), _pointer(logits), ctypes.c_int64(self.batch), ctypes.c_int64(seq),
            ctypes.c_int64(self.vocab), ctypes.c_float(rule.temperature),
            ctypes.c_int32(rule.top_k), ctypes.c_float(rule.top_p), ctypes.c_uint64(seed),
            *map(_pointer, (self.draws, self.ids, self.chosen, self.workspace)),
            _stream(self.device),
        )  # fmt: skip
        if status:
            raise RuntimeError(f"sampling gives CUDA error {status}")


def compare_moves(
    library: ctypes.CDLL, rng: np.random.Generator, count: int, device: str
) -> list[str]:
    """Of `count` random moves those that are not the serial definition's."""
    wrong = []
    for _ in range(count):
        batch, before, after = (int(number) for number in rng.integers(1, [4, 300, 300]))
        shapes = [
            (int(rng.integers(1, 20)), 4 * int(rng.choice([1, 3, 4, 16, 33, 64])))
            for _ in range(rng.integers(1, 5))
        ]
        move = Move(library, batch, shapes, before, after, device)
        for present, past in zip(move.present, move.past, strict=True):
            values = rng.integers(1, 256, tuple(present.shape), dtype=np.uint8)
            present.copy_(_tensor(values))
            past.fill_(0xAB)
        move.launch()
        for (heads, row_bytes), present, past in zip(shapes, move.present, move.past, strict=True):
            expected = np.empty(tuple(past.shape), np.uint8)
            source = present.cpu()  # its memory must outlive the call
            library.iq_move(
                _pointer(source), ctypes.c_void_p(expected.ctypes.data),
                *map(ctypes.c_int64, (batch * heads, row_bytes, before, after)),
            )  # fmt: skip
            if not np.array_equal(past.cpu().numpy(), expected):
                wrong.append(f"{batch} x {heads} heads of {row_bytes} bytes, {before} to {after}")
    return wrong


class Move:
    """Cache tensors of `shapes` (heads, bytes of a row) with `before` and `after` rows."""

    def __init__(
        self, library: ctypes.CDLL, batch: int, shapes: list[tuple[int, int]], before: int,
        after: int, device: str,
    ) -> None:  # fmt: skip
        import torch

        def tensors(rows: int) -> list[Any]:
            return [
                torch.zeros(batch * heads, rows, size, dtype=torch.uint8, device=device)
                for heads, size in shapes
            ]

        self.library, self.device = library, device
        self.present, self.past = tensors(before), tensors(after)
        table = [
            [present.data_ptr(), past.data_ptr(), *shape]
            for present, past, shape in zip(self.present, self.past, shapes, strict=True)
        ]
        self.table = torch.tensor(table, dtype=torch.int64, device=device)
        self.sizes = [ctypes.c_int64(size) for size in (batch, before, after)]

    def launch(self) -> None:
        """Moves all of them. Raises RuntimeError if CUDA refuses."""
        status = self.library.iq_launch_moves(
            _pointer(self.table), ctypes.c_int32(len(self.table)), *self.sizes,
            _stream(self.device),
        )  # fmt: skip
        if status:
            raise RuntimeError(f"the cache's moves give CUDA error {status}")


def measure(library: Path) -> dict[str, Any]:
    """What differs from the serial definition, microseconds of each rule, and the bars missed."""
    import torch

    opened = open_library(library)
    rng = np.random.default_rng(SEED)
    cases = [random_case(rng, max(VOCABS)) for _ in range(CASES)]
    wrong = compare_choices(opened, cases, "cuda") + compare_moves(opened, rng, MOVES, "cuda")
    times: dict[str, float] = {}
    for name, rule in RULES.items():
        for type_ in TYPES[:2]:
            for batch in BATCHES:
                times[f"{name}, {type_}, batch {batch}"] = _time_choice(opened, rule, type_, batch)
    worst = {
        f"{row}, {name}": _time_choice(opened, RULES[name], "float16", 1, row)
        for row in ("equal", "two values")
        for name in ("top-k 50", "top-p 0.9", "temperature")
    }
    return {
        "device": torch.cuda.get_device_name(),
        "cases": CASES + MOVES,
        "wrong": wrong[:20],
        "microseconds": times,
        "microseconds_of_worst_rows": worst,
        "moves": _time_moves(opened),
        "missed": missed(times, wrong),
    }


def missed(times: dict[str, float], wrong: list[str]) -> list[str]:
    """The bars that are missed: every launch takes at most BAR, nothing differs."""
    result = [f"{name}: {time:.1f} us" for name, time in times.items() if time > BAR]
    return result + ([f"{len(wrong)} differences"] if wrong else [])


def _time_choice(
    library: ctypes.CDLL, rule: Rule, type_: str, batch: int, row: str = "normal"
) -> float:
    import torch

    generator = torch.Generator("cuda").manual_seed(SEED)
    buffers = []
    for _ in range(SETS):
        logits = torch.randn(batch, 1, VOCAB, device="cuda", generator=generator) * 2.5
        if row == "equal":
            logits.fill_(1.5)
        elif row == "two values":
            logits = (logits > 0).float()
        buffers.append(logits.to(getattr(torch, type_)))
    choice = Choice(library, batch, VOCAB, "cuda")
    return graph_time(lambda turn: choice.launch(type_, buffers[turn % SETS], 1, rule, SEED))


def _time_moves(library: ctypes.CDLL) -> dict[str, float]:
    """A decode step's moves of 56 tensors of 8 heads, 2048 rows of 256 bytes, beside a copy."""
    import torch

    move = Move(library, 1, [(8, 256)] * 56, 2049, 2048, "cuda")
    bytes_ = sum(past.numel() for past in move.past)
    source, target = (torch.zeros(bytes_, dtype=torch.uint8, device="cuda") for _ in range(2))
    moved, copied = (
        graph_time(lambda turn: move.launch()),
        graph_time(lambda turn: target.copy_(source)),
    )
    return {"bytes": bytes_, "microseconds": moved, "copy_microseconds": copied}


def _tensor(values: np.ndarray) -> Any:
    import torch

    return torch.from_numpy(values)


def _stream(device: str) -> ctypes.c_void_p:
    import torch

    return ctypes.c_void_p(torch.cuda.current_stream().cuda_stream if device == "cuda" else None)


def _pointer(tensor: Any) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]))))
