"""Reads nvdisasm's listing of a cubin."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_SECTION = re.compile(r"^\s*\.section\s+(\S+?)\s*,")
_LABEL = re.compile(r"^(\.L\S*|\$\S+):")
_INSTRUCTION = re.compile(
    r"^\s*/\*(?P<address>[0-9a-f]{4,})\*/\s+(?:@(?P<guard>!?U?P(?:T|\d+))\s+)?"
    r"(?P<opcode>[A-Z][\w.]*)(?P<operands>[^;]*);"
)
_BYTES = re.compile(r"\.(byte|short|word|dword)\s+(.+)")
_SIZES = {"byte": 1, "short": 2, "word": 4, "dword": 8}
_TEXT, _CONSTANTS = ".text.", re.compile(r"\.nv\.constant(\d+)\.(.+)")


@dataclass(frozen=True)
class Instruction:
    """`@guard NAME.MODIFIERS operands` at `address` (bytes); `guard` is "" where there is none."""

    address: int
    guard: str
    name: str
    modifiers: tuple[str, ...]
    operands: tuple[str, ...]

    def __str__(self) -> str:
        guard = f"@{self.guard} " if self.guard else ""
        opcode = ".".join((self.name, *self.modifiers))
        return f"{guard}{opcode} {', '.join(self.operands)}".rstrip()


@dataclass
class Kernel:
    """One function's code: `labels` are positions in `instructions`, `constants` the compiler's
    constant banks by number (bank 0, the arguments, is the launch's)."""

    name: str
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    constants: dict[int, bytes] = field(default_factory=dict)


def parse(listing: str) -> dict[str, Kernel]:
    """The kernels of a listing with all sections (`nvdisasm FILE`), by mangled name."""
    kernels: dict[str, Kernel] = {}
    banks: dict[str, dict[int, bytes]] = {}
    kernel: Kernel | None = None
    bank: tuple[str, int] | None = None
    for line in listing.splitlines():
        section = _SECTION.match(line)
        if section:
            kernel, bank = None, None
            name = section[1].strip('"')
            constants = _CONSTANTS.fullmatch(name)
            if name.startswith(_TEXT):
                kernel = kernels.setdefault(name[len(_TEXT) :], Kernel(name[len(_TEXT) :]))
            elif constants:
                bank = constants[2], int(constants[1])
        elif kernel is not None:
            _read_code(line, kernel)
        elif bank is not None:
            data = _BYTES.search(line)
            if data:
                of = banks.setdefault(bank[0], {})
                of[bank[1]] = of.get(bank[1], b"") + _bytes(_SIZES[data[1]], data[2])
    for name, kernel in kernels.items():
        kernel.constants = banks.get(name, {})
    return kernels


def _read_code(line: str, kernel: Kernel) -> None:
    label = _LABEL.match(line)
    if label:
        kernel.labels[label[1]] = len(kernel.instructions)
        return
    found = _INSTRUCTION.match(line)
    if found:
        name, *modifiers = found["opcode"].split(".")
        kernel.instructions.append(
            Instruction(
                int(found["address"], 16), found["guard"] or "", name, tuple(modifiers),
                _operands(found["operands"]),
            )
        )  # fmt: skip


def _operands(text: str) -> tuple[str, ...]:
    # .reuse is a hint to the register cache; (*"SpillRefill"*) is a remark.
    text = re.sub(r"\(\*.*?\*\)", "", text).replace(".reuse", "")
    parts = re.split(r",\s*(?![^\[(]*[\])])", text)
    return tuple(part.strip() for part in parts if part.strip())


def _bytes(size: int, values: str) -> bytes:
    numbers = [int(value, 0) for value in re.findall(r"0x[0-9a-fA-F]+|\d+", values)]
    return b"".join(number.to_bytes(size, "little") for number in numbers)
