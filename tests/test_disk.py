"""What cannot be written is one sentence, whichever library could not write it."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from iq_export.disk import is_read_only, trouble, trouble_is_bundle_error
from iq_export.errors import BundleError, ModelError


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file may become larger than `size` bytes (Python ignores SIGXFSZ)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def _numpy(path: Path) -> None:
    np.zeros(4096, np.float32).tofile(path)


def _safetensors(path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(4096, np.float32)}, path)


def _tokenizers(path: Path) -> None:
    from tokenizers import Tokenizer, models

    words = {f"word {i}": i for i in range(2000)}
    Tokenizer(models.WordLevel(words, unk_token="word 0")).save(str(path))


def _onnx_ir(path: Path) -> None:
    import onnx_ir as ir

    from iq_export.graph import io

    value = ir.Value(name="w", const_value=ir.tensor(np.zeros(4096, np.float32), name="w"))
    value.type, value.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([4096])
    graph = ir.Graph([], [], nodes=[], initializers=[value], name="g", opset_imports={"": 23})
    io.save(ir.Model(graph, ir_version=10), path)


def _onnx(path: Path) -> None:
    import onnx

    tensor = onnx.numpy_helper.from_array(np.zeros(4096, np.float32), "w")
    graph = onnx.helper.make_graph([], "g", [], [], [tensor])
    onnx.save(onnx.helper.make_model(graph), path, save_as_external_data=True, location="data")


@pytest.mark.parametrize("write", [_numpy, _safetensors, _tokenizers, _onnx_ir, _onnx])
def test_each_library_under_a_limit(tmp_path: Path, write: Callable[[Path], None]) -> None:
    with pytest.raises(Exception) as caught, largest_file(1000):
        write(tmp_path / "file")
    found = trouble(caught.value, "OUT")
    assert found is not None and "larger than is allowed" in found and "was not written" in found


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, "No space left"), "the disk is full: OUT was not written; free"),
        (OSError(errno.EDQUOT, "Quota", "x"), "quota is used up: x was"),
        (OSError(errno.EROFS, "Read-only", "x"), "read-only: x was not written; choose"),
        (OSError(errno.ENOSPC, "No space left", "from", None, "to"), "full: to was"),
        (Exception("No space left on device (os error 28)"), "the disk is full: OUT"),
        (ModelError("Cannot download x: [Errno 28] No space left on device"), "full"),
        (OSError("4096 requested and 1000 written"), "the disk is full, or a file"),
    ],
)
def test_the_sentence(error: Exception, says: str) -> None:
    assert says in str(trouble(error, "OUT"))


def test_what_came_of_it_is_that_too() -> None:
    try:
        try:
            raise OSError(errno.ENOSPC, "No space left")
        except OSError as error:
            raise ModelError("it cannot be traced") from error
    except ModelError as error:
        assert str(trouble(error)).startswith("the disk is full")


@pytest.mark.parametrize(
    "error",
    [OSError("4 requested"), OSError(errno.ENOENT, "No such file", "x"), ModelError("no space"),
     ModelError("[Errno 2] no such file"), ValueError("(os error 2)")],
)  # fmt: skip
def test_other_errors_are_none(error: Exception) -> None:
    assert trouble(error) is None
    with pytest.raises(type(error)), trouble_is_bundle_error("OUT"):
        raise error


def test_trouble_as_a_bundle_error() -> None:
    """One that says it already is not said again, but for what is done all the same."""
    expected = pytest.raises(BundleError, match=r"^the disk is full: OUT was")
    with expected, trouble_is_bundle_error("OUT"):
        raise OSError(errno.ENOSPC, "No space left")
    said = BundleError("said")
    said.__cause__ = OSError(errno.ENOSPC, "No space left")
    with pytest.raises(BundleError, match=r"^said$"), trouble_is_bundle_error("OUT"):
        raise said
    expected = pytest.raises(BundleError, match=r"^it is complete, but: the disk is full: OUT was")
    with expected, trouble_is_bundle_error("OUT", "it is complete, but: "):
        raise said


def test_read_only_is_known_through_its_consequences() -> None:
    try:
        try:
            os.mkdir("/proc/1/x")
        except OSError as error:
            raise OSError(errno.EROFS, "Read-only file system") from error
    except OSError as error:
        assert is_read_only(error)
    assert not is_read_only(OSError(errno.ENOSPC, "No space left"))
    assert not is_read_only(ModelError("x"))
