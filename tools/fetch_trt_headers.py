"""Fetch TensorRT's headers into the cache, where the plugin's build finds them.

    python tools/fetch_trt_headers.py

For machines without a TensorRT SDK, such as CI. The headers (TensorRT 10.14) come from the wheel
`kernel-lens` on PyPI, pinned by checksum and never imported; they stay under NVIDIA's licence and
out of this repository. With an SDK at hand, set TENSORRT_INCLUDE_DIR instead.
"""

from __future__ import annotations

import sys
from pathlib import Path

from iq_export.engine.plugin import HEADER, HEADERS_CACHE, HEADERS_MEMBERS
from iq_export.errors import IqError
from iq_export.model.fetch import fetch_wheel_members

_WHEEL = "kernel-lens==2.0.1"
_WHEEL_SHA256 = "07cc714e8b5e7f34b672f7c7fad93febe7c747be5837ba276b1527370134ffe0"


def fetch_headers() -> Path:
    """The folder with NvInferRuntime.h. Raises ModelError if the wheel cannot be fetched."""
    root = fetch_wheel_members(
        _WHEEL,
        wheel_sha256=_WHEEL_SHA256,
        patterns=(f"{HEADERS_MEMBERS}/*.h",),
        folder=HEADERS_CACHE,
    )
    return root / HEADERS_MEMBERS


def main() -> int:
    """Print the folder; what is there already is not fetched again."""
    try:
        folder = fetch_headers()
    except IqError as error:
        print(f"fetch_trt_headers: error: {error}", file=sys.stderr)
        return error.exit_code
    assert (folder / HEADER).is_file()
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
