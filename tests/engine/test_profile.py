from __future__ import annotations

import pytest

from iq_export.engine.profile import Profile, Range
from iq_export.errors import EngineError, UsageError


def test_default_serves_prefill_and_decode() -> None:
    profile = Profile()
    assert profile.past.min == 0
    assert profile.seq.min == 1


def test_total_is_past_plus_seq() -> None:
    profile = Profile(Range(1, 2, 4), Range(1, 8, 16), Range(0, 32, 64))
    assert profile.shapes("attention_mask", ["batch", "total"]) == ((1, 1), (2, 40), (4, 80))
    assert profile.shapes("key", ["batch", 3, "past", 64])[0] == (1, 3, 0, 64)


def test_parse_reads_trtexec_like_texts() -> None:
    profile = Profile.parse(
        "batch:1,seq:1,past:0", "batch:1, seq:128, past:512", "batch:2,seq:256,past:2048"
    )
    assert profile == Profile(Range(1, 1, 2), Range(1, 128, 256), Range(0, 512, 2048))


@pytest.mark.parametrize(
    ("texts", "seq"),
    [
        (("", "", ""), Range(1, 128, 512)),
        (("", "", "seq:64"), Range(1, 64, 64)),
        (("seq:1024", "", ""), Range(1024, 1024, 1024)),
        (("", "seq:2048", ""), Range(1, 2048, 2048)),
        (("seq:16", "", "seq:16"), Range(16, 16, 16)),
    ],
)
def test_parse_completes_what_is_left_out(texts: tuple[str, str, str], seq: Range) -> None:
    assert Profile.parse(*texts).seq == seq


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (("seq:16", "", "seq:4"), "'seq' must satisfy min <= opt <= max, but is min 16"),
        (("", "batch:9", "batch:2"), "'batch' must satisfy min <= opt <= max"),
        (("batch:0", "", ""), "'batch' must be at least 1"),
        (("sequence:4", "", ""), "unknown axis 'sequence'"),
        (("seq:x", "", ""), "'seq:x' .* is not axis:size"),
        (("seq:-1", "", ""), "is not axis:size"),
        (("seq", "", ""), "is not axis:size"),
        (("", "", "past:2147483648"), "'past' must be at most 2147483647"),
        (("", "", "seq:" + "9" * 5000), "is not axis:size"),
    ],
)
def test_bad_shapes_are_usage_errors(texts: tuple[str, str, str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Profile.parse(*texts)


def test_unknown_axis_of_an_input_is_named() -> None:
    with pytest.raises(EngineError, match="input 'pixels' has the dynamic axis 'height'"):
        Profile().shapes("pixels", ["batch", "height"])


def test_json_round_trip() -> None:
    profile = Profile.parse("", "past:7", "batch:8")
    assert Profile.from_json(profile.to_json()) == profile
