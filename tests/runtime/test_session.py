"""TextSession over a TensorRT and a CUDA that run on the CPU (plugins/runtime/test/fake).

What it does on a GPU is shown by none of this; how it fills, chunks, moves and captures is.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.runtime.conftest import (
    ORIN,
    PAST_MAX,
    RTX,
    VOCAB,
    Done,
    engine,
    execute,
    write_bundle,
)

END = 5  # of generation_config.json
Run = Callable[..., Done]


@pytest.fixture(scope="module")
def machine(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the libraries of the fake machine: TensorRT 10.15.1 and a driver for sm_87."""
    folder = tmp_path_factory.mktemp("machine")
    for name in ("libnvinfer.so.10", "libcuda.so.1"):
        (folder / name).symlink_to(built / "libiq_fake_machine.so")
    return folder


@pytest.fixture
def run(built: Path, bundle: Path, machine: Path) -> Run:
    """`run("1,2", "3", "--max-new", "4")`: prompts, then options."""

    def call(*words: str, folder: Path = bundle, **variables: str) -> Done:
        count = next((i for i, word in enumerate(words) if word.startswith("--")), len(words))
        ids = [part for prompt in words[:count] for part in ("--ids", prompt)]
        return execute(
            [built / "iq_run_fake", folder, *ids, *words[count:]],
            **{"LD_LIBRARY_PATH": str(machine), **variables},
        )

    return call


def expected(prompt: list[int], count: int) -> list[int]:
    """What the fake model says: the sum of (token + 1) x (position + 1), up to an end token."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + count:
        token = sum((t + 1) * (i + 1) for i, t in enumerate(tokens)) % VOCAB
        if token == END:
            break
        tokens.append(token)
    return tokens[len(prompt) :]


def lines(done: Done) -> list[list[int]]:
    assert done.code == 0, done.error
    return [[int(t) for t in line.split(",") if t] for line in done.out.splitlines()]


@pytest.mark.parametrize(
    "prompts",
    [
        [[7]],
        [[1, 2, 3, 4, 5]],
        [[3, 9, 27, 81, 49, 50]],  # two chunks
        [[1, 2, 3], [4], [9, 8, 7, 6, 50, 40, 30, 20, 10, 60, 70, 80]],  # padding fills a chunk
        [list(range(6, 6 + 80)) * 3],
    ],
)
def test_tokens_are_the_models(run: Run, prompts: list[list[int]]) -> None:
    words = [",".join(map(str, prompt)) for prompt in prompts]
    done = run(*words, "--max-new", "40")
    assert lines(done) == [expected(prompt, 40) for prompt in prompts]
    assert done.error == ""  # no note: decode steps were captured


def test_the_whole_cache_is_used_and_no_more(run: Run) -> None:
    """Windows of 128, 256 and 300 rows, and the end of the engine's profile."""
    # The last step reads a full window and adds a row, and the token it chooses needs none.
    room = PAST_MAX - 1 + 2
    prompt = next([t] for t in range(VOCAB) if len(expected([t], room)) == room)
    assert lines(run(str(prompt[0]), "--max-new", str(room))) == [expected(prompt, room)]
    done = run(str(prompt[0]), "--max-new", str(room + 1))
    assert done.code == 4 and "the cache is full" in done.error


def test_without_capture_the_tokens_are_the_same(run: Run) -> None:
    done = run("1,2,3", "4", "--max-new", "30", IQ_FAKE_NO_CAPTURE="1")
    assert lines(done) == [expected([1, 2, 3], 30), expected([4], 30)]
    assert "without a CUDA graph: TensorRT cannot run the step" in done.error


@pytest.mark.parametrize("form", ["body", "plugin"])
def test_the_lean_runtime_in_a_plan_is_allowed(run: Run, tmp_path: Path, form: str) -> None:
    report = engine("orin", form=form, version_compatible=True)
    done = run("1,2,3", "--max-new", "3", folder=write_bundle(tmp_path / "b", report))
    assert lines(done) == [expected([1, 2, 3], 3)]


def test_a_plan_without_weights_is_refused(run: Run, tmp_path: Path) -> None:
    """TensorRT would refit it; a session does not."""
    report = engine("orin", strip_weights=True)
    done = run("1,2,3", folder=write_bundle(tmp_path / "b", report))
    assert done.code == 6 and re.search(r"orin: weights +in the plan +stripped", done.error)


def test_sampling_follows_the_seed(run: Run) -> None:
    words = ("1,2,3", "1,2,3", "--max-new", "12", "--temperature", "20", "--seed")
    first, again, other = (lines(run(*words, seed)) for seed in ("1", "1", "2"))
    assert first == again != other
    assert first[0] != first[1]
    greedy = lines(run("1,2,3", "--max-new", "12", "--temperature", "20", "--top-k", "1"))
    assert greedy == [expected([1, 2, 3], 12)]


def test_logits_that_overflow_are_told(run: Run) -> None:
    done = run("1,2,3", "--max-new", "40", IQ_FAKE_OVERFLOW="1")
    assert done.code == 5 and "not finite" in done.error


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("96", "97"), 4, r"outside 0\.\.96"),
        ((",".join(["1"] * 301),), 4, "301 tokens"),
        (("1", "2", "3", "4"), 2, "takes 1 to 3 sequences, not 4"),
        (("1", "--top-p", "0"), 2, "top-p above 0"),
        (("1", "--temperature", "nan"), 2, "temperature >= 0"),
        (("1", "--temperature", "-1"), 2, "temperature >= 0"),
        (("1", "--engine", "rtx-ampere"), 6, "TensorRT flavour"),
        (("1", "--tensorrt", "/nowhere/lib.so"), 6, "no engine can run here: /nowhere/lib.so"),
        (("1", "--tensorrt", "libc.so.6"), 6, "libc.so.6 is no TensorRT"),
    ],
)
def test_what_cannot_run_is_told(run: Run, words: tuple[str, ...], code: int, message: str) -> None:
    done = run(*words)
    assert (done.code, bool(re.search(message, done.error))) == (code, True), done.error


def test_without_tensorrt_the_reason_is_told(run: Run, tmp_path: Path) -> None:
    done = run("1", LD_LIBRARY_PATH="/nowhere")
    assert done.code == 6 and "libnvinfer.so.10" in done.error
    done = run("1", LD_LIBRARY_PATH="/nowhere", folder=write_bundle(tmp_path / "rtx", RTX))
    assert done.code == 6 and "build it with the headers of that TensorRT" in done.error


def test_a_plan_that_is_none_is_told(run: Run, tmp_path: Path) -> None:
    """Whole by its checksum, but TensorRT does not take it."""
    folder = write_bundle(tmp_path / "b", engine("orin", plan="x.plan"))
    plan = folder / "engines" / "x.plan"
    (folder / "plan").write_bytes(b"nope" + plan.read_bytes()[4:])
    (folder / "plan").replace(plan)
    done = run("1", folder=folder)
    assert done.code == 7
    from iq_export.bundle.manifest import record_files
    from iq_export.bundle.package import Bundle, update_manifest

    bundle = Bundle.open(folder, verify=False)
    record = record_files(folder, ["engines/x.plan"])["engines/x.plan"]
    graph = bundle.manifest.graph
    graph.engines["orin"]["sha256"] = record.sha256
    update_manifest(bundle, rehash=["engines/x.plan"], graphs=[graph])
    done = run("1", folder=folder)
    assert done.code == 6 and "x.plan: this is no plan" in done.error


def test_a_plan_of_another_graph_is_told(run: Run, tmp_path: Path) -> None:
    from tests.runtime.conftest import tensors

    inputs, outputs = tensors()
    outputs[0] = type(outputs[0])("logits", "float16", outputs[0].shape)
    folder = write_bundle(tmp_path / "b", ORIN, inputs=inputs, outputs=outputs)
    done = run("1", folder=folder)
    assert done.code == 6 and re.search("logits +float16 +another type", done.error)
