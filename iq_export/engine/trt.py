"""One adapter over TensorRT for RTX (`tensorrt_rtx`) and enterprise TensorRT (`tensorrt`).

Both share one Python API with gaps: what differs between the flavours, and between the lines 10.3
to 11.x, is decided here and nowhere else. Nothing is imported before `load` is called.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import platform
import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from iq_export.engine.soname import provide_alias
from iq_export.engine.targets import (
    ENTERPRISE,
    RTX,
    TRIED_RTX,
    AttentionForm,
    Target,
    attention_gap,
    engine_note,
)
from iq_export.errors import EngineError, UsageError

LABELS = {RTX: "TensorRT for RTX", ENTERPRISE: "TensorRT"}
_EXTRAS = {RTX: "rtx", ENTERPRISE: "tensorrt"}
_OLDEST = {RTX: (1, 0), ENTERPRISE: (10, 3)}
_RTX_ALIAS = ("libtensorrt_rtx.so", "libtensorrt_rtx.so.1")

# Lines of a build's log that say why it failed, and how many of its warnings a report keeps.
_KEPT_ERRORS = 6
_KEPT_WARNINGS = 20
_NO_GPU = "(cudaError "
# Said for every call of an ONNX function but the first, and for every 64-bit input.
_HARMLESS = ("already exists, the output tensors of this new instance", "has Int64 binding")


def available() -> list[str]:
    """The flavours that are installed, by module name; imports none of them."""
    return [flavour for flavour in LABELS if importlib.util.find_spec(flavour) is not None]


def installed_version(flavour: str) -> str | None:
    """The version of an installed flavour, found without importing it; None if nothing tells."""
    found = importlib.metadata.packages_distributions().get(flavour)
    return importlib.metadata.version(found[0]) if found else None


def builder_gap(target: Target, form: AttentionForm) -> str | None:
    """Why the builder of `target` is known to refuse such a graph; None if it may be tried.

    What a TensorRT RTX of a later line than the tried one lacks is not known: it is tried.
    """
    gap = attention_gap(target, form)
    version = installed_version(target.flavour)
    if gap is None or (target.flavour == RTX and version and later_than_tried(version)):
        return None
    label = f"{LABELS[target.flavour]} {version}" if version else LABELS[target.flavour]
    return f"{engine_note(target.name)}: {label} {gap}"


def later_than_tried(version: str) -> bool:
    return parse_version(version)[:2] > TRIED_RTX


def install_hint(flavour: str) -> str:
    """How to get `flavour`, as the end of a sentence."""
    hint = f"install it with: pip install 'iq-export[{_EXTRAS[flavour]}]'"
    if flavour == ENTERPRISE:
        hint += " (on Jetson it comes with JetPack: make the environment with system packages)"
    return hint


def why_not_here(target: Target) -> str | None:
    """Why no engine for `target` can be built on this machine, as a sentence; None if it can."""
    if not target.portable:
        sm = device_compute_capability()
        if sm not in target.compute_capabilities:
            found = f"has sm_{sm}" if sm else "has no NVIDIA GPU"
            return (
                f"{engine_note(target.name)} here: enterprise TensorRT builds only on the "
                f"device itself (sm_{target.compute_capabilities[0]}), and this machine {found}. "
                f"Copy the bundle there and run: iq-export build BUNDLE --target {target.name}."
            )
    if target.flavour not in available():
        return (
            f"{engine_note(target.name)}: {LABELS[target.flavour]} (module {target.flavour}) is "
            f"not installed, {install_hint(target.flavour)}."
        )
    return None


def check_levers(target: Target, *, version_compatible: bool, strip_weights: bool) -> None:
    """UsageError for a build option that `target`'s flavour does not have here (1.7.1, tried)."""
    if target.flavour != RTX:
        return
    if version_compatible:
        raise UsageError(
            f"{LABELS[RTX]} ships no lean runtime, so it builds no version compatible plans: leave "
            f"the option out for target '{target.name}'."
        )
    if strip_weights and device_compute_capability() is None:
        raise UsageError(
            f"{LABELS[RTX]} strips weights only on a machine with an NVIDIA GPU: leave the option "
            f"out for target '{target.name}'."
        )


def device_compute_capability() -> int | None:
    """The first GPU's compute capability, 86 for sm_86; None without a GPU or its driver."""
    import ctypes

    name = "nvcuda.dll" if platform.system() == "Windows" else "libcuda.so.1"
    try:
        driver = ctypes.CDLL(name)
    except OSError:
        return None
    device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    calls = (
        # cuda.h: CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR = 75, _MINOR = 76
        lambda: driver.cuInit(0),
        lambda: driver.cuDeviceGet(ctypes.byref(device), 0),
        lambda: driver.cuDeviceGetAttribute(ctypes.byref(major), 75, device),
        lambda: driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, device),
    )
    if any(call() != 0 for call in calls):
        return None
    return major.value * 10 + minor.value


def load(flavour: str) -> TensorRT:
    """Import `flavour`; EngineError naming the pip extra if it is missing, broken or too old."""
    try:
        module = importlib.import_module(flavour)
    except ModuleNotFoundError as error:
        raise EngineError(
            f"{LABELS[flavour]} (module {flavour}) is not installed: {install_hint(flavour)}."
        ) from error
    except (ImportError, OSError) as error:
        raise EngineError(f"{LABELS[flavour]} cannot be loaded: {error}.") from error
    tensorrt = TensorRT(flavour, module)
    if tensorrt.version < _OLDEST[flavour]:
        oldest = ".".join(map(str, _OLDEST[flavour]))
        raise EngineError(
            f"{tensorrt.label} is too old: {oldest} or later is needed, {install_hint(flavour)}."
        )
    return tensorrt


def parse_version(text: str) -> tuple[int, ...]:
    """`1.7.1.116` -> (1, 7, 1, 116); `11.1.0b1` -> (11, 1, 0): stops at a suffix."""
    numbers = []
    for part in text.split("."):
        match = re.match(r"\d+", part)
        if match is None:
            break
        numbers.append(int(match.group()))
        if match.end() != len(part):
            break
    return tuple(numbers)


class BuildLog:
    """What a TensorRT logger heard: errors and distinct warnings, in order."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.warnings: list[str] = []

    def add_error(self, text: str) -> None:
        if text not in self.errors:
            self.errors.append(text)

    def add_warning(self, text: str) -> None:
        if any(harmless in text for harmless in _HARMLESS):
            return
        if text not in self.warnings and len(self.warnings) < _KEPT_WARNINGS:
            self.warnings.append(text)

    def summary(self) -> str:
        """The first errors in one line; says so if TensorRT gave none.

        A build on a machine with no GPU logs CUDA errors that harm nothing: they come last.
        """
        ordered = sorted(self.errors, key=lambda text: _NO_GPU in text)
        return " | ".join(ordered[:_KEPT_ERRORS]) or "TensorRT logged no error"


class TensorRT:
    """An imported flavour: its Python `module`, and `version` as a tuple like (1, 7, 1, 116)."""

    def __init__(self, flavour: str, module: ModuleType) -> None:
        self.flavour = flavour
        self.module: Any = module
        self.version = parse_version(module.__version__)

    @property
    def label(self) -> str:
        """Name and version for messages."""
        return f"{LABELS[self.flavour]} {self.module.__version__}"

    def logger(self, log: BuildLog) -> Any:
        """An ILogger that fills `log`. Keep it alive as long as anything that was made with it."""
        trt = self.module

        class _Logger(trt.ILogger):  # type: ignore[name-defined]
            def __init__(self) -> None:
                trt.ILogger.__init__(self)

            def log(self, severity: Any, text: str) -> None:
                if severity in (trt.Logger.ERROR, trt.Logger.INTERNAL_ERROR):
                    log.add_error(text.strip())
                elif severity == trt.Logger.WARNING:
                    log.add_warning(text.strip())

        return _Logger()

    def network_flags(self) -> int:
        """Flags of a strongly typed network: the ONNX types decide every precision.

        From 11.0 on that is the only kind there is, and the flag may be gone.
        """
        flags = self.module.NetworkDefinitionCreationFlag
        if hasattr(flags, "STRONGLY_TYPED"):
            return 1 << int(flags.STRONGLY_TYPED)
        if self.flavour == ENTERPRISE and self.version < (11, 0):
            raise EngineError(f"{self.label} has no strongly typed networks.")
        return 0

    def set_compute_capabilities(self, config: Any, capabilities: tuple[int, ...]) -> None:
        """Aim at `capabilities`, or at the device itself if there are none; enterprise TensorRT can
        do nothing else."""
        if self.flavour != RTX:
            return
        members = self.module.ComputeCapability.__members__
        if not capabilities:
            config.num_compute_capabilities = 1
            config.set_compute_capability(members["CURRENT"], 0)
            return
        missing = [sm for sm in capabilities if f"SM{sm}" not in members]
        if missing:
            names = ", ".join(f"sm_{sm}" for sm in missing)
            raise EngineError(f"{self.label} cannot build for {names}.")
        config.num_compute_capabilities = len(capabilities)
        for position, sm in enumerate(capabilities):
            config.set_compute_capability(members[f"SM{sm}"], position)

    def set_flag(self, config: Any, name: str) -> None:
        """Set the builder flag `name`; EngineError where this version does not have it."""
        flag = getattr(self.module.BuilderFlag, name, None)
        if flag is None:
            raise EngineError(f"{self.label} has no builder flag {name}.")
        config.set_flag(flag)

    def load_plugin(self, registry: Any, library: Path, namespace: str) -> None:
        """Register the creators in `library`; EngineError if it has none of `namespace`."""
        if self.flavour == RTX and platform.system() == "Linux":
            try:
                provide_alias(*_RTX_ALIAS)
            except OSError as error:
                raise EngineError(
                    f"{self.label} cannot use plugins here: {error}. As a way out, put a symlink "
                    f"named {_RTX_ALIAS[0]} to its {_RTX_ALIAS[1]} on LD_LIBRARY_PATH."
                ) from error
        handle = registry.load_library(str(library))
        found = any(creator.plugin_namespace == namespace for creator in registry.all_creators)
        if handle is None or not found:
            raise EngineError(
                f"{self.label} found no plugin creators of namespace '{namespace}' in '{library}'."
            )

    def progress_monitor(self, report: Callable[[int, int], None]) -> Any | None:
        """An IProgressMonitor that reports (done, total) of the outermost phase; None if absent."""
        trt = self.module
        if not hasattr(trt, "IProgressMonitor"):
            return None

        class _Monitor(trt.IProgressMonitor):  # type: ignore[name-defined]
            def __init__(self) -> None:
                trt.IProgressMonitor.__init__(self)
                self._outer: tuple[str, int] | None = None

            def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
                if parent is None:
                    self._outer = (phase, steps)

            def step_complete(self, phase: str, step: int) -> bool:
                if self._outer is not None and phase == self._outer[0]:
                    report(step + 1, self._outer[1])
                return True

            def phase_finish(self, phase: str) -> None:
                pass

        return _Monitor()
