"""What a `preprocessor_config.json` says: the steps from a picture or a recording to a window.

Only what a file states is done, or what transformers does by default for a processor it names;
what else it asks for is refused. The steps themselves are in `pictures.py` and `sound.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iq_export.errors import ModelError
from iq_export.run.assets import read_object

# The file that transformers wrote up to version 4, and the one that holds all parts of a processor.
FILE, _WHOLE = "preprocessor_config.json", "processor_config.json"
_PARTS = ("image_processor", "feature_extractor")
_TYPE_KEYS = ("image_processor_type", "feature_extractor_type")
_TYPE = re.compile(r"(.+?)(?:ImageProcessor(?:Fast|Pil)?|FeatureExtractor)")

# Filters by Pillow's numbers.
_BILINEAR, _BICUBIC = 2, 3
_FILTERS = range(6)
_LARGEST_SIDE = 1 << 14
_HALF = (0.5, 0.5, 0.5)
_IMAGENET = {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)}
_OPENAI = {
    "image_mean": (0.48145466, 0.4578275, 0.40821073),
    "image_std": (0.26862954, 0.26130258, 0.27577711),
}
_SQUARE = {
    "size": {"height": 224, "width": 224}, "resample": _BILINEAR,
    "image_mean": _HALF, "image_std": _HALF, "do_center_crop": False,
}  # fmt: skip
_CLIP = {
    "size": {"shortest_edge": 224}, "crop_size": {"height": 224, "width": 224},
    "resample": _BICUBIC, "do_center_crop": True, **_OPENAI,
}  # fmt: skip
# Processors of transformers that do nothing but these steps, with what their files may leave out.
# (DINOv3's resizes values that are not rounded to 8 bits.)
_PICTURE_TYPES: dict[str, Mapping[str, Any]] = {
    "Bit": _CLIP,
    "Blip": {**_SQUARE, "size": {"height": 384, "width": 384}, "resample": _BICUBIC, **_OPENAI},
    "CLIP": _CLIP,
    "ChineseCLIP": _CLIP,
    "DINOv3ViT": {**_SQUARE, **_IMAGENET},
    "DeiT": {
        **_SQUARE, "size": {"height": 256, "width": 256}, "resample": _BICUBIC,
        "crop_size": {"height": 224, "width": 224}, "do_center_crop": True,
    },
    "Pvt": {**_SQUARE, "resample": _BICUBIC, **_IMAGENET},
    "Siglip": {**_SQUARE, "resample": _BICUBIC},
    "ViT": _SQUARE,
}  # fmt: skip
# Of these a size that is one number means the shorter edge.
_EDGE = frozenset({"Bit", "CLIP", "ChineseCLIP", "Siglip"})
# The step that a key belongs to.
_STEPS = {
    "do_resize": ("size", "resample"),
    "do_center_crop": ("crop_size",),
    "do_rescale": ("rescale_factor",),
    "do_normalize": ("image_mean", "image_std"),
}
# A picture is always made RGB; the rest says how transformers calls its code, or nothing.
_SAY_NOTHING = frozenset({
    *_TYPE_KEYS, "processor_class", "_valid_processor_keys", "do_convert_rgb", "default_to_square",
    "data_format", "input_data_format", "return_tensors", "device", "disable_grouping", "auto_map",
})  # fmt: skip
_SOUND_TYPE = "Whisper"
_SOUND = {
    "feature_size": 80, "sampling_rate": 16000, "hop_length": 160, "chunk_length": 30, "n_fft": 400,
}  # fmt: skip
_SOUND_SAYS_NOTHING = frozenset({
    *_TYPE_KEYS, "processor_class", "n_samples", "nb_max_frames", "mel_filters", "padding_side",
    "return_attention_mask", "return_tensors",
})  # fmt: skip
_LARGEST_SOUND = 1 << 20


@dataclass(frozen=True)
class PictureSteps:
    """From an RGB picture of 8 bits to pixels, in this order.

    resize: to (height, width), or its shorter edge to that many pixels; None leaves it. resample:
    the filter, by Pillow's number. crop: (height, width) around the centre, black where the picture
    is smaller; None takes all. Then pixels are multiplied by `scale`, `mean` of each channel is
    subtracted, and what is left divided by `deviation`.
    """

    resize: tuple[int, int] | int | None
    resample: int
    crop: tuple[int, int] | None
    scale: float
    mean: tuple[float, float, float]
    deviation: tuple[float, float, float]


@dataclass(frozen=True)
class SoundSteps:
    """From a recording to the logarithm of its mel spectrogram `[mels, seconds * rate / hop]`.

    rate: samples per second; seconds: length to which a recording is cut or padded with silence;
    window, hop: samples of a frame and between the starts of two.
    """

    mels: int
    rate: int
    seconds: int
    window: int
    hop: int


def read_steps(place: Path) -> PictureSteps | SoundSteps:
    """The steps that a file states, or the file of a model's folder (of an `.onnx`: beside it).

    Raises ModelError if there is none, if it states what has no meaning or asks for a step that is
    none of these, or if its processor is not known.
    """
    path, config = _find(place)
    given = {key: value for key, value in config.items() if value is not None}
    name = next((str(given[key]) for key in _TYPE_KEYS if key in given), "")
    match = _TYPE.fullmatch(name)
    kind = match.group(1) if match else name
    if kind == _SOUND_TYPE:
        return _sound(path, given)
    if kind and kind not in _PICTURE_TYPES:
        known = ", ".join(sorted({*_PICTURE_TYPES, _SOUND_TYPE}))
        raise ModelError(
            f"{path}: the steps of '{name}' are not known (known: {known}): write them into a "
            "file without a type, if they are resize, crop, rescale and normalise"
        )
    return _picture(path, given, kind)


def _find(place: Path) -> tuple[Path, dict[str, Any]]:
    if place.is_file() and place.suffix != ".onnx":
        return place, _part(place, read_object(place))
    folder = place if place.is_dir() else place.parent
    for name in (FILE, _WHOLE):
        if (folder / name).is_file():
            return folder / name, _part(folder / name, read_object(folder / name))
    raise ModelError(
        f"{folder} has no {FILE}, so nothing says how pictures or recordings become the model's "
        "input: give such a file"
    )


def _part(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The object of pictures or sound in a file that may hold a whole processor."""
    inside = [config[name] for name in _PARTS if isinstance(config.get(name), dict)]
    if len(inside) > 1:
        raise ModelError(f"{path} has steps for pictures and for sound: give a file with one")
    return inside[0] if inside else config


def _picture(path: Path, given: Mapping[str, Any], kind: str) -> PictureSteps:
    _refuse_others(path, given, {*_STEPS, *(k for keys in _STEPS.values() for k in keys)})
    config = {"rescale_factor": 1 / 255, **_PICTURE_TYPES.get(kind, {}), **given}
    # Without a type a step is done if what it needs is stated.
    done = {
        step: _flag(path, config.get(step, all(key in config for key in needed)), step)
        for step, needed in _STEPS.items()
    }
    for step, needed in _STEPS.items():
        for key in needed:
            if key not in config and (done[step] or key in given):
                raise ModelError(f"{path} says nothing of '{key}'")
            if key in given and not done[step] and step not in config:
                raise ModelError(f"{path} has '{key}' but not all of {', '.join(needed)}")
    resample = config.get("resample", _BICUBIC)
    if not isinstance(resample, int) or resample not in _FILTERS:
        raise ModelError(f"{path}: resample is {resample!r}, not a number from 0 to 5")
    resize = _size(path, config["size"], "size", kind) if done["do_resize"] else None
    crop = _size(path, config["crop_size"], "crop_size", "ViT") if done["do_center_crop"] else None
    if isinstance(crop, int):
        raise ModelError(f"{path}: crop_size is {config['crop_size']!r}, not a height and a width")
    scale = 1.0
    if done["do_rescale"]:
        scale = _number(path, config["rescale_factor"], "rescale_factor")
    mean, deviation = (0.0,) * 3, (1.0,) * 3
    if done["do_normalize"]:
        mean = _channels(path, config["image_mean"], "image_mean")
        deviation = _channels(path, config["image_std"], "image_std")
    if 0 in (scale, *deviation):
        raise ModelError(f"{path}: rescale_factor and image_std must not be 0")
    return PictureSteps(resize, resample, crop, scale, mean, deviation)


def _sound(path: Path, given: Mapping[str, Any]) -> SoundSteps:
    others = {k: v for k, v in given.items() if k not in _SOUND_SAYS_NOTHING}
    _refuse_others(path, others, set(_SOUND))
    config = {**_SOUND, **given}
    for key in _SOUND:
        value = config[key]
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < _LARGEST_SOUND:
            raise ModelError(f"{path}: {key} is {value!r}, not a whole number above 0")
    if config["n_fft"] < config["hop_length"]:
        raise ModelError(f"{path}: n_fft is smaller than hop_length, so samples would be left out")
    return SoundSteps(
        mels=config["feature_size"], rate=config["sampling_rate"], seconds=config["chunk_length"],
        window=config["n_fft"], hop=config["hop_length"],
    )  # fmt: skip


def _refuse_others(path: Path, given: Mapping[str, Any], known: set[str]) -> None:
    for key, value in given.items():
        if key not in known and key not in _SAY_NOTHING and value:
            raise ModelError(f"{path} asks for '{key}', which is no step that is known")


def _flag(path: Path, value: Any, key: str) -> bool:
    if not isinstance(value, bool):
        raise ModelError(f"{path}: {key} is {value!r}, neither true nor false")
    return value


def _size(path: Path, value: Any, key: str, kind: str) -> tuple[int, int] | int:
    """(height, width), or the shorter edge."""
    if isinstance(value, dict):
        sizes = {name: size for name, size in value.items() if size is not None}
        names = set(sizes)
        numbers = [sizes[name] for name in ("height", "width", "shortest_edge") if name in sizes]
    else:
        names, numbers = {"one number"}, [value]
    right = all(isinstance(n, int) and not isinstance(n, bool) for n in numbers) and numbers
    if not right or not all(0 < n <= _LARGEST_SIDE for n in numbers):
        raise ModelError(f"{path}: {key} is {value!r}, which is no size of a picture")
    if names == {"height", "width"}:
        return numbers[0], numbers[1]
    if names == {"shortest_edge"} or (names == {"one number"} and kind in _EDGE):
        return int(numbers[0])
    if names == {"one number"} and kind:
        return numbers[0], numbers[0]
    raise ModelError(
        f'{path}: {key} is {value!r}: write {{"height": ..., "width": ...}} or '
        '{"shortest_edge": ...}'
    )


def _number(path: Path, value: Any, key: str) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not abs(value) < 1e6:
        raise ModelError(f"{path}: {key} is {value!r}, not a number")
    return float(value)


def _channels(path: Path, value: Any, key: str) -> tuple[float, float, float]:
    values = value if isinstance(value, list | tuple) else [value] * 3
    if len(values) != 3:
        raise ModelError(f"{path}: {key} is {value!r}, not a number for each of three channels")
    first, second, third = (_number(path, item, key) for item in values)
    return first, second, third
