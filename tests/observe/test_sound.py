"""Recordings become what transformers' own extractor makes of them, or are refused."""

from __future__ import annotations

import json
import struct
import wave
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from iq_export.errors import DataError, UsageError
from iq_export.observe.preprocessor import FILE, SoundSteps, read_steps
from iq_export.observe.sound import load_recordings, log_mel, read_recording, recordings

STEPS = SoundSteps(80, 16000, 30, 400, 160)
SHORT = SoundSteps(8, 1000, 2, 40, 16)


def tones(seconds: float, rate: int = 16000, seed: int = 0) -> np.ndarray:
    """A chord that swells, with noise."""
    rng = np.random.default_rng(seed)
    time = np.arange(int(seconds * rate)) / rate
    chord = sum(np.sin(2 * np.pi * f * time) for f in rng.uniform(80, rate / 2.2, 5))
    loud = 0.1 * chord * np.sin(3 * time) ** 2 + 0.01 * rng.normal(size=time.size)
    return np.asarray(loud.clip(-1, 1), np.float32)


def write(path: Path, samples: np.ndarray, rate: int = 16000, width: int = 2) -> Path:
    """`[length]` or `[length, channels]` as a WAV file."""
    channels = 1 if samples.ndim == 1 else samples.shape[1]
    if width == 1:
        data = np.uint8(samples * 127 + 128).tobytes()
    else:
        whole = (np.float64(samples).ravel() * (2.0**31 - 1)).astype("<i4")
        data = whole.view(np.uint8).reshape(-1, 4)[:, 4 - width :].tobytes()
    with wave.open(str(path), "wb") as file:
        file.setparams((channels, width, rate, len(samples), "NONE", ""))
        file.writeframes(data)
    return path


@pytest.mark.parametrize(("mels", "seconds"), [(80, 3.7), (128, 30.0), (80, 31.2)])
def test_features_are_those_of_transformers(tmp_path: Path, mels: int, seconds: float) -> None:
    from transformers import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor(feature_size=mels)
    extractor.save_pretrained(tmp_path)
    steps = read_steps(tmp_path)
    assert steps == SoundSteps(mels, 16000, 30, 400, 160)
    samples = tones(seconds)
    theirs = extractor(samples, sampling_rate=16000, return_tensors="np")["input_features"][0]
    ours = log_mel(samples, steps)
    assert ours.shape == theirs.shape == (mels, 3000) and ours.dtype == np.float32
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-4)


def test_silence_is_flat() -> None:
    assert np.ptp(log_mel(np.zeros(100, np.float32), SHORT)) == 0


@pytest.mark.parametrize(("width", "error"), [(1, 1 / 100), (2, 1e-4), (3, 1e-6), (4, 1e-6)])
def test_samples_of_all_widths(tmp_path: Path, width: int, error: float) -> None:
    samples = tones(0.2)
    found = read_recording(write(tmp_path / "a.wav", samples, width=width), 16000)
    np.testing.assert_allclose(found, samples, rtol=0, atol=error)


def test_channels_are_averaged(tmp_path: Path) -> None:
    left, right = tones(0.1, seed=1), tones(0.1, seed=2)
    path = write(tmp_path / "a.wav", np.stack([left, right], axis=1))
    np.testing.assert_allclose(read_recording(path, 16000), (left + right) / 2, rtol=0, atol=1e-4)


def _float(path: Path) -> None:
    write(path, tones(0.1))
    content = bytearray(path.read_bytes())
    content[20:22] = struct.pack("<H", 3)
    path.write_bytes(content)


def _cut(path: Path) -> None:
    write(path, tones(0.1))
    path.write_bytes(path.read_bytes()[:200])


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda path: write(path, tones(0.1), rate=44100), "has 44100 samples per second"),
        (lambda path: write(path, np.zeros(0)), "is empty"),
        (lambda path: path.write_bytes(b"RIFF"), "is no WAV file"),
        (lambda path: path.write_text("hello"), "is no WAV file"),
        (_float, "is no WAV file"),
        (_cut, "ends too early"),
    ],
)
def test_a_bad_recording_is_one_sentence(
    tmp_path: Path, make: Callable[[Path], object], match: str
) -> None:
    make(tmp_path / "a.wav")
    with pytest.raises(DataError, match=match) as error:
        load_recordings(tmp_path, STEPS, count=1, seed=0)
    assert str(tmp_path / "a.wav") in str(error.value) and "\n" not in str(error.value)


def test_recordings_are_drawn_by_the_seed(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no recording"):
        recordings(tmp_path)
    for number in range(4):
        write(tmp_path / f"{number}.WAV", tones(1.0, 1000, number), 1000)
    (tmp_path / ".hidden.wav").touch()
    (tmp_path / FILE).write_text(json.dumps({}))
    first, again, other = (load_recordings(tmp_path, SHORT, count=2, seed=s) for s in (0, 0, 2))
    assert first[0].shape == (8, 125)
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert len(load_recordings(tmp_path, SHORT, count=9, seed=0)) == 4
    with pytest.raises(UsageError):
        load_recordings(tmp_path, SHORT, count=0, seed=0)
