from __future__ import annotations

import json
from pathlib import Path

import pytest

from iq_export.engine.profile import Profile, Range
from iq_export.errors import DataError, ModelError, UsageError
from iq_export.lengths import bundle_limit, engine_profile, generated, window_length
from iq_export.model.limits import PositionLimit
from tests import planted

HARD, SOFT = (PositionLimit(256, hard, "so it is") for hard in (True, False))


@pytest.mark.parametrize("limit", [HARD, SOFT])
def test_a_default_length_is_shortened_with_a_note(limit: PositionLimit) -> None:
    assert window_length(0, None) == (512, [])
    assert window_length(0, PositionLimit(512, True, "")) == (512, [])
    length, notes = window_length(0, limit)
    assert length == 256
    assert notes == ["windows of 256 tokens, not 512: the model has 256 positions (so it is)"]


def test_a_length_that_was_asked_for() -> None:
    assert window_length(256, HARD) == (256, [])
    with pytest.raises(UsageError, match="Give --length 256 or less"):
        window_length(257, HARD)
    length, (note,) = window_length(300, SOFT)
    assert length == 300 and "longer than the model's 256 positions" in note


def test_a_default_profile_is_shortened_with_a_note() -> None:
    assert engine_profile(Profile(), PositionLimit(1536, True, "")) == (Profile(), [])
    fitted, (note,) = engine_profile(Profile(), HARD)
    assert (fitted.seq, fitted.past) == (Range(1, 128, 128), Range(0, 128, 128))
    assert "seq:128,past:128" in note
    assert fitted.batch == Profile.batch
    fitted, _ = engine_profile(Profile(seq=Range(1, 1, 1)), HARD)
    assert (fitted.seq, fitted.past) == (Range(1, 1, 1), Range(0, 255, 255))
    fitted, _ = engine_profile(Profile(past=Range(0, 0, 0)), HARD)
    assert (fitted.seq, fitted.past) == (Range(1, 128, 256), Range(0, 0, 0))


@pytest.mark.parametrize("limit", [PositionLimit(n, True, "") for n in (1, 2, 5, 100, 1535)])
def test_a_shortened_profile_stays_within_the_positions(limit: PositionLimit) -> None:
    fitted, notes = engine_profile(Profile(), limit)
    assert fitted.seq.max + fitted.past.max <= limit.positions and notes


def test_shapes_that_were_asked_for() -> None:
    within = Profile.parse("", "", "seq:56,past:200")
    assert engine_profile(within, HARD) == (within, [])
    beyond = Profile.parse("", "", "seq:4096,past:32768")
    with pytest.raises(UsageError, match="together be at most 256"):
        engine_profile(beyond, HARD)
    profile, (note,) = engine_profile(beyond, SOFT)
    assert profile == beyond and "more than the model's 256 positions" in note
    with pytest.raises(UsageError):  # past cannot be shortened below what was asked for
        engine_profile(Profile(seq=Range(1, 128, 512), past=Range(256, 300, 300)), HARD)


def test_a_prompt_and_what_follows() -> None:
    assert generated(250, 7, HARD) == (7, [])  # the last token is never fed back
    assert generated(10, 9999, None) == (9999, [])
    room, (note,) = generated(250, 8, HARD)
    assert room == 7 and "at most 7 new tokens" in note
    assert generated(256, 5, HARD)[0] == 1
    with pytest.raises(DataError, match="The prompt has 257 tokens"):
        generated(257, 1, HARD)
    wanted, (note,) = generated(300, 5, SOFT)
    assert wanted == 5 and "256 positions" in note


def test_the_limit_of_a_bundle(tmp_path: Path) -> None:
    assert bundle_limit(tmp_path, tmp_path / "m.onnx") is None
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    assert bundle_limit(tmp_path, tmp_path / "m.onnx") is None
    for text in ("[]", "{"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ModelError, match=r"config\.json is damaged"):
            bundle_limit(tmp_path, tmp_path / "m.onnx")
    record = {"model_type": "gpt_bigcode", "n_positions": 256}
    (tmp_path / "config.json").write_text(json.dumps(record))
    limit = bundle_limit(tmp_path, tmp_path / "m.onnx")
    assert limit is not None and (limit.positions, limit.hard) == (256, True)


@pytest.mark.parametrize(
    ("stated", "limit"),
    [({}, (64, True)), ({"max_position_embeddings": 32}, (64, True)),
     ({"model_type": "gpt2", "n_positions": 32}, (32, True)),
     ({"model_type": "gpt2", "n_positions": 128}, (64, True))],
)  # fmt: skip
def test_the_table_of_a_graph(
    stated: dict[str, object], limit: tuple[int, bool], tmp_path: Path
) -> None:
    """As of an ONNX file without a config.json, or with one that says something else."""
    graph = planted.save(planted.Decoder(positions=64), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(stated))
    found = bundle_limit(tmp_path, graph)
    assert found is not None and (found.positions, found.hard) == limit
