"""Recordings of a folder as windows: the logarithm of the mel spectrogram of WAV files.

numpy alone; the steps are those of transformers' extractor, and tests compare them. Nothing is
resampled: a recording of another rate is refused, with what makes one of the right rate.
"""

from __future__ import annotations

import io
import random
import wave
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from iq_export.errors import DataError, UsageError
from iq_export.files import read_named
from iq_export.observe.folder import files_below
from iq_export.observe.preprocessor import SoundSteps

_MAX_BYTES = 256 << 20
_NAMES = (".wav", ".wave")
# Mels are even up to 1000 Hz and logarithmic above (Slaney's scale), and end at 8000 Hz.
_EVEN_HERTZ, _EVEN_MELS = 200 / 3, 15.0
_LOG_STEP = np.log(6.4) / 27
_HIGHEST = 8000.0
_FLOOR = 1e-10  # of the power in front of the logarithm
_RANGE = 8.0  # decades below the loudest value that are kept
_CENTRE = 4.0


def recordings(folder: Path) -> list[Path]:
    """The WAV files below `folder`, by their names. Raises DataError if there is none."""
    return files_below(folder, _NAMES, "recording")


def load_recordings(
    folder: Path, steps: SoundSteps, *, count: int, seed: int
) -> list[NDArray[np.float32]]:
    """Features `[mels, frames]` of up to `count` recordings below `folder`, drawn by `seed`.

    Raises DataError if there is none or one cannot be read; UsageError for a count below 1.
    """
    if count < 1:
        raise UsageError(f"at least one recording is needed, not {count}")
    files = recordings(folder)
    chosen = random.Random(seed).sample(files, min(count, len(files)))
    return [log_mel(read_recording(path, steps.rate), steps) for path in chosen]


def read_recording(path: Path, rate: int) -> NDArray[np.float32]:
    """Samples `[length]` from -1 to 1; of several channels the mean.

    Raises DataError if it is no WAV file of whole numbers, damaged, empty, or not of `rate` samples
    per second.
    """
    try:
        content = read_named(path, _MAX_BYTES, DataError)
    except FileNotFoundError as error:
        raise DataError(f"recording {path} does not exist") from error
    remedy = f"convert it, e.g. sox {path.name} -r {rate} -b 16 -e signed converted.wav"
    try:
        with wave.open(io.BytesIO(content)) as opened:
            channels, width = opened.getnchannels(), opened.getsampwidth()
            found_rate, length = opened.getframerate(), opened.getnframes()
            data = opened.readframes(length)
    except (wave.Error, EOFError, OverflowError) as error:
        said = str(error) or "it ends too early"
        raise DataError(f"recording {path} is no WAV file of samples ({said}): {remedy}") from error
    if found_rate != rate:
        raise DataError(
            f"recording {path} has {found_rate} samples per second and the model takes {rate}: "
            f"{remedy}"
        )
    if not data or len(data) < length * channels * width:
        raise DataError(f"recording {path} is empty or ends too early: take it out of the folder")
    if not 1 <= width <= 4:
        raise DataError(f"recording {path} has samples of {8 * width} bits: {remedy}")
    return _samples(data, width).reshape(-1, channels).mean(axis=1, dtype=np.float64).astype("f4")


def log_mel(samples: NDArray[np.float32], steps: SoundSteps) -> NDArray[np.float32]:
    """`[mels, frames]` of the first `steps.seconds` of `samples` `[length]`, then of silence."""
    whole = np.zeros(steps.seconds * steps.rate)
    kept = samples[: whole.size]
    whole[: kept.size] = kept
    half = steps.window // 2
    padded = np.pad(whole, half, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(padded, steps.window)[:: steps.hop]
    frames = frames[: whole.size // steps.hop]  # the one at the end is left out
    shape = np.hanning(steps.window + 1)[:-1]
    power = np.abs(np.fft.rfft(frames * shape, axis=1)) ** 2
    mels = np.maximum(power @ _filters(steps), _FLOOR)
    logarithm = np.log10(mels).T
    kept_range = np.maximum(logarithm, logarithm.max() - _RANGE)
    return np.ascontiguousarray(((kept_range + _CENTRE) / _CENTRE).astype(np.float32))


@lru_cache(maxsize=2)
def _filters(steps: SoundSteps) -> NDArray[np.float64]:
    """Triangles of equal area over the frequencies, `[window // 2 + 1, mels]`."""
    edges = _hertz(np.linspace(0, _mel(_HIGHEST), steps.mels + 2))
    bins = np.linspace(0, steps.rate // 2, steps.window // 2 + 1)
    rising = (bins[:, None] - edges[None, :-2]) / np.diff(edges)[:-1]
    falling = (edges[None, 2:] - bins[:, None]) / np.diff(edges)[1:]
    area = 2.0 / (edges[2:] - edges[:-2])
    return np.asarray(np.maximum(0.0, np.minimum(rising, falling)) * area)


def _mel(hertz: float) -> float:
    logarithmic = np.log(hertz / (_EVEN_MELS * _EVEN_HERTZ)) / _LOG_STEP
    return float(_EVEN_MELS + logarithmic if logarithmic > 0 else hertz / _EVEN_HERTZ)


def _hertz(mels: NDArray[np.float64]) -> NDArray[np.float64]:
    above = _EVEN_MELS * _EVEN_HERTZ * np.exp(_LOG_STEP * (mels - _EVEN_MELS))
    return np.where(mels < _EVEN_MELS, mels * _EVEN_HERTZ, above)


def _samples(data: bytes, width: int) -> NDArray[np.float32]:
    """Samples of `width` bytes as numbers from -1 to 1; those of one byte have no sign."""
    if width == 1:
        return ((np.frombuffer(data, np.uint8) - 128.0) / 128).astype(np.float32)
    wide = np.zeros((len(data) // width, 4), np.uint8)  # the lowest bytes stay 0
    wide[:, 4 - width :] = np.frombuffer(data, np.uint8).reshape(-1, width)
    return (wide.view("<i4")[:, 0] / float(1 << 31)).astype(np.float32)
