"""Runs one thread of a kernel from its SASS, to see which instructions it executes.

Integers, floating point, predicates and memory are computed. The other threads are not there: a
shuffle gives a value close to the thread's own, a barrier does nothing, and shared memory that
nobody has written reads as 0. What an instruction that is not known writes is unknown, and that is
an error only where control flow or an address depends on it.
"""

from __future__ import annotations

import math
import re
import struct
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache

from iq_export.errors import DataError
from tools.kernel_table.sass import Instruction, Kernel

_MASK = 0xFFFFFFFF
_MOST_STEPS = 50_000
# What another thread's value differs in, float or a pair of halves: their difference is not 0,
# which divisions take slowly.
_OTHER = 0x00040004
# Instructions that a thread alone does not notice.
_SILENT = (
    "BAR", "BMOV", "BREAK", "BSSY", "BSYNC", "CCTL", "DEPBAR", "ENDCOLLECTIVE", "ERRBAR", "MEMBAR",
    "NOP", "WARPSYNC", "YIELD",
)  # fmt: skip
_CONTROL = ("EXIT", "BRA", "CALL", "RET", "BRX", "JMX", "JMP", "KILL")
_WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
_MEMORY = ("LDG", "LD", "LDS", "LDL", "LDC", "ULDC", "STG", "ST", "STS", "STL")
_OPERAND = re.compile(
    r"(?P<sign>[-~]?)(?P<absolute>\|?)"
    r"(?:(?P<register>U?R(?:Z|\d+))|c\[(?P<bank>0x[0-9a-f]+)\]\[(?P<offset>[^\]]+)\])"
    r"\|?(?P<suffix>(?:\.\w+)*)"
)
_COMPARE: dict[str, Callable[[float, float], bool]] = {
    "F": lambda a, b: False, "LT": lambda a, b: a < b, "EQ": lambda a, b: a == b,
    "LE": lambda a, b: a <= b, "GT": lambda a, b: a > b, "NE": lambda a, b: a < b or a > b,
    "GE": lambda a, b: a >= b, "NUM": lambda a, b: a == a and b == b,
    "NAN": lambda a, b: a != a or b != b, "LTU": lambda a, b: not a >= b,
    "EQU": lambda a, b: not (a < b or a > b), "LEU": lambda a, b: not a > b,
    "GTU": lambda a, b: not a <= b, "NEU": lambda a, b: a != b, "GEU": lambda a, b: not a < b,
    "T": lambda a, b: True,
}  # fmt: skip
_JOIN: dict[str, Callable[[bool, bool], bool]] = {
    "AND": lambda a, b: a and b, "OR": lambda a, b: a or b, "XOR": lambda a, b: a != b,
}  # fmt: skip


class _Unknown(Exception):
    """A value that no known instruction has written."""


class Memory:
    """Bytes by address: what was stored, else what `regions` says, else 0 or an error.

    A region (first address, bytes) is filled with a pattern that repeats.
    """

    def __init__(self, regions: Mapping[range, bytes] | None = None) -> None:
        self._regions = regions
        self._stored: dict[int, int | None] = {}

    def load(self, address: int, size: int) -> int:
        return int.from_bytes((self._byte(address + i) for i in range(size)), "little")

    def store(self, address: int, size: int, value: int | None) -> None:
        self._byte(address)  # is it of a region?
        for i in range(size):
            self._stored[address + i] = None if value is None else value >> 8 * i & 255

    def _byte(self, address: int) -> int:
        if address in self._stored:
            value = self._stored[address]
            if value is None:
                raise _Unknown
            return value
        if self._regions is None:
            return 0
        for region, pattern in self._regions.items():
            if address in region:
                return pattern[(address - region.start) % len(pattern)]
        raise DataError(f"address {address:#x} is of no argument of the kernel.")


@dataclass
class Trace:
    """What a thread executed: how often each position of the code, and the accesses among them
    (name, bytes) whose guard was true."""

    executed: Counter[int] = field(default_factory=Counter)
    accesses: Counter[tuple[str, int]] = field(default_factory=Counter)


class Thread:
    """Thread `number` of the only block, with the launch's constant bank 0."""

    def __init__(
        self, kernel: Kernel, bank: bytes, memory: Memory, shared: Memory, number: int
    ) -> None:
        self._kernel = kernel
        self._banks = {**kernel.constants, 0: bank}
        self._spaces = {"G": memory, "S": shared, "L": Memory()}
        self._special = {
            "SR_TID.X": number, "SR_TID.Y": 0, "SR_TID.Z": 0, "SR_LANEID": number % 32,
            "SR_CTAID.X": 0, "SR_CTAID.Y": 0, "SR_CTAID.Z": 0, "SR_CgaCtaId": 0, "SRZ": 0,
        }  # fmt: skip
        self._registers: dict[str, int | None] = {}
        self._predicates: dict[str, bool | None] = {}
        self._calls: list[int] = []
        self._unknown = ""  # the first instruction whose result is unknown
        self._at: int | None = 0

    def run(self) -> Trace:
        """To its end. Raises DataError where that cannot be followed."""
        trace = Trace()
        for _ in range(_MOST_STEPS):
            if self._at is None or self._at >= len(self._kernel.instructions):
                return trace
            trace.executed[self._at] += 1
            self._step(self._kernel.instructions[self._at], trace)
        raise DataError(f"{self._kernel.name}: no end after {_MOST_STEPS} instructions.")

    def _step(self, instruction: Instruction, trace: Trace) -> None:
        assert self._at is not None
        self._at += 1
        name, operands, modifiers = instruction.name, instruction.operands, instruction.modifiers
        if name in _SILENT:
            return
        try:
            if name in _CONTROL or name in _MEMORY:
                if instruction.guard and not self._predicate(instruction.guard):
                    return
                if name in _CONTROL:
                    self._control(instruction)
                else:
                    access = next((_WIDTHS[part] for part in modifiers if part in _WIDTHS), 4)
                    trace.accesses[name, access] += 1
                    self._access(instruction, access)
                return
        except _Unknown as error:
            raise DataError(
                f"{self._kernel.name}: '{instruction}' at {instruction.address:#x} depends on what "
                f"'{self._unknown or 'nothing'}' wrote, which tools/kernel_table/machine.py does "
                "not compute."
            ) from error
        compute = getattr(self, f"_do_{name.lower()}", None)
        if compute is None and name[0] in "UV":  # the same for a warp's registers; the other pipe
            compute = getattr(self, f"_do_{name[1:].lower()}", None)
        try:
            if instruction.guard and not self._predicate(instruction.guard):
                return
            if compute is None:
                raise _Unknown
            compute(operands, modifiers)
        except _Unknown:
            self._unknown = self._unknown or str(instruction)
            self._forget(operands, modifiers)

    def _forget(self, operands: tuple[str, ...], modifiers: tuple[str, ...]) -> None:
        wide = "WIDE" in modifiers or "64" in modifiers
        for operand in operands:
            if re.fullmatch(r"U?P\d", operand):
                self._predicates[operand] = None
            elif re.fullmatch(r"U?R\d+", operand):
                self._registers[operand] = None
                if wide:
                    self._registers[_next(operand)] = None
                return
            elif operand not in ("PT", "UPT"):
                return

    # Control flow.

    def _control(self, instruction: Instruction) -> None:
        name, operands = instruction.name, instruction.operands
        if name == "EXIT":
            self._at = None
        elif name == "BRA":
            divergent = "DIV" in instruction.modifiers or "CONV" in instruction.modifiers
            if not divergent and all(self._predicate(p) for p in operands[:-1]):
                self._at = self._target(instruction)
        elif name == "CALL":
            assert self._at is not None
            self._calls.append(self._at)
            self._at = self._target(instruction)
        elif name == "RET":
            self._at = self._calls.pop()
        else:
            raise DataError(f"{self._kernel.name}: '{instruction}' cannot be followed.")

    def _target(self, instruction: Instruction) -> int:
        label = re.fullmatch(r"`\((.+)\)", instruction.operands[-1])
        if label is None or label[1] not in self._kernel.labels:
            raise DataError(f"{self._kernel.name}: '{instruction}' goes nowhere.")
        return self._kernel.labels[label[1]]

    # Memory.

    def _access(self, instruction: Instruction, size: int) -> None:
        name, operands = instruction.name, instruction.operands
        if name in ("LDC", "ULDC"):
            self._put(operands[0], self._constant(operands[1], size), size)
            return
        space = self._spaces[{"S": "S", "L": "L"}.get(name[2:], "G")]
        if name.startswith("LD"):
            address = self._address(operands[-1] if "]" in operands[-1] else operands[-2])
            try:
                value = space.load(address, size)
                if {"S8", "S16"} & set(instruction.modifiers):
                    value = _signed(value, 8 * size) & _MASK
                self._put(operands[0], value, size)
            except _Unknown:
                self._put(operands[0], None, size)
        else:
            try:
                value = self._whole(operands[1], size)
            except _Unknown:
                space.store(self._address(operands[0]), size, None)
            else:
                space.store(self._address(operands[0]), size, value)

    def _address(self, operand: str) -> int:
        inner = re.search(r"\[([^\[\]]*)\]$", operand)
        assert inner is not None, operand
        total = 0
        for term in inner[1].split("+"):
            register, _, suffix = term.partition(".")
            if re.fullmatch(r"-?0x[0-9a-f]+", term):
                total += int(term, 16)
            elif suffix == "64" or (register.startswith("UR") and "desc" in operand):
                total += self._whole(register, 8)
            elif suffix.startswith("X"):
                total += self._bits(register) * int(suffix[1:])
            else:
                total += self._bits(register)
        return total

    def _whole(self, register: str, size: int) -> int:
        value = 0
        for i in range((size + 3) // 4):
            value |= self._bits(register) << 32 * i
            register = _next(register)
        return value & ((1 << 8 * size) - 1)

    def _put(self, register: str, value: int | None, size: int = 4) -> None:
        for i in range((size + 3) // 4):
            if register not in ("RZ", "URZ"):
                self._registers[register] = None if value is None else value >> 32 * i & _MASK
            register = _next(register)

    # Operands.

    def _constant(self, operand: str, size: int) -> int:
        found = _decode(operand)
        assert found is not None and found["bank"], operand
        total = 0
        for term in found["offset"].split("+"):
            total += int(term, 16) if "x" in term else self._bits(term)
        data = self._banks.get(int(found["bank"], 16))
        if data is None or total + size > len(data):
            raise _Unknown
        return int.from_bytes(data[total : total + size], "little")

    def _raw(self, found: Mapping[str, str]) -> int:
        if found["bank"]:
            return self._constant(f"c[{found['bank']}][{found['offset']}]", 4)
        if found["register"] in ("RZ", "URZ"):
            return 0
        value = self._registers.get(found["register"], 0)
        if value is None:
            raise _Unknown
        return value

    def _bits(self, operand: str) -> int:
        """As an integer of 32 bits."""
        found = _decode(operand)
        if found is None:
            return _immediate(operand) & _MASK
        value = self._raw(found)
        part = re.search(r"\.([BH])([0-3])", found["suffix"])
        if part:
            width = 8 if part[1] == "B" else 16
            value = value >> width * int(part[2]) & ((1 << width) - 1)
        if found["sign"] == "-":
            return -value & _MASK
        return ~value & _MASK if found["sign"] == "~" else value

    def _float(self, operand: str) -> float:
        found = _decode(operand)
        if found is None:
            return _number(operand)
        value = _as_float(self._raw(found))
        value = abs(value) if found["absolute"] else value
        return -value if found["sign"] == "-" else value

    def _int(self, operand: str, unsigned: bool) -> int:
        value = self._bits(operand)
        return value if unsigned else _signed(value, 32)

    def _predicate(self, operand: str) -> bool:
        name = operand.lstrip("!")
        value = True if name in ("PT", "UPT") else self._predicates.get(name, False)
        if value is None:
            raise _Unknown
        return value != operand.startswith("!")

    def _decide(self, predicate: str, value: bool) -> None:
        if predicate not in ("PT", "UPT"):
            self._predicates[predicate] = value

    # Moves.

    def _do_mov(self, o: tuple[str, ...], m: tuple[str, ...]) -> None:
        if "64" in m:
            self._put(o[0], self._whole(o[1], 8), 8)
        else:
            self._put(o[0], self._bits(o[1]))

    _do_r2ur = _do_mov

    def _do_s2r(self, o: tuple[str, ...], m: tuple[str, ...]) -> None:
        if o[1] not in self._special:
            raise _Unknown
        self._put(o[0], self._special[o[1]])

    _do_s2ur = _do_s2r

    def _do_cs2r(self, o: tuple[str, ...], m: tuple[str, ...]) -> None:
        if o[1] != "SRZ":
            raise _Unknown
        self._put(o[0], 0, 4 if "32" in m else 8)

    def _do_sel(self, o: tuple[str, ...], m: tuple[str, ...]) -> None:
        self._put(o[0], self._bits(o[1] if self._predicate(o[3]) else o[2]))

    def _do_shfl(self, o: tuple[str, ...], m: tuple[str, ...]) -> None:
        self._decide(o[0], True)
        self._put(o[1], self._bits(o[2]) ^ _OTHER)

    def _do_prmt(self, o: tuple[str, ...], m: tuple[str, ...]) -> None:
        if m:
            raise _Unknown
        source, selector = self._bits(o[3]) << 32 | self._bits(o[1]), self._bits(o[2])
        value = 0
        for i in range(4):
            choice = selector >> 4 * i & 15
            byte = source >> 8 * (choice & 7) & 255
            if choice & 8:
                byte = 255 if byte & 128 else 0
            value |= byte << 8 * i
        self._put(o[0], value)

    def _do_p2r(self, o: tuple[str, ...], m: tuple[str, ...]) -> None:
        if m or not o[3].startswith("0x"):
            raise _Unknown
        mask = int(o[3], 16)
        prefix = "UP" if o[1] == "UPR" else "P"
        value = self._bits(o[2]) & ~mask
        for i in range(7):
            if mask >> i & 1:
                value |= self._predicate(f"{prefix}{i}") << i
        self._put(o[0], value)

    _do_p2ur = _do_p2r

    def _do_r2p(self, o: tuple[str, ...], m: tuple[str, ...]) -> None:
        value, mask = self._bits(o[1]), self._bits(o[2])
        for i in range(7):
            if mask >> i & 1:
                self._predicates[f"P{i}"] = bool(value >> i & 1)

    def _do_vote(self, o: tuple[str, ...], m: tuple[str, ...]) -> None:
        value = self._predicate(o[-1])
        for operand in o[:-1]:
            if "P" in operand:
                self._decide(operand, value)
            else:
                self._put(operand, _MASK if value else 0)

    _do_voteu = _do_vote  # not UVOTE

    # Integers.

    def _do_iadd3(self, o: tuple[str, ...], m: tuple[str, ...]) -> None:
        carries, o = self._carries(o)
        total = sum(self._addend(operand) for operand in o[1:4])
        total += sum(self._predicate(p) for p in o[4:])
        self._put(o[0], total & _MASK)
        for i, carry in enumerate(carries):
            self._decide(carry, total >> 32 > i)

    _do_iadd = _do_iadd3

    def _carries(self, o: tuple[str, ...]) -> tuple[list[str], tuple[str, ...]]:
        """The predicates behind the first operand, and the operands without them."""
        end = 1
        while end < len(o) and re.fullmatch(r"U?P(T|\d)", o[end]):
            end += 1
        return list(o[1:end]), (o[0], *o[end:])

    def _addend(self, operand: str) -> int:
        """-x is ~x + 1, whose carry counts."""
        if operand.startswith("-") and _decode(operand) is not None:
            return (~self._bits(operand[1:]) & _MASK) + 1
        return self._bits(operand)

    def _do_imad(self, o: tuple[str, ...], m: tuple[str, ...]) -> None:
        carries, o = self._carries(o)
        unsigned = "U32" in m
        product = self._int(o[1], unsigned) * self._int(o[2], unsigned)
        if "WIDE" in m or "HI" in m:
            total = product + self._pair(o[3])
            if "WIDE" in m:
                self._put(o[0], total & 2**64 - 1, 8)
            else:
                self._put(o[0], total >> 32 & _MASK)
            for carry in carries:
                self._decide(carry, bool(total >> 64))
        else:
            total = (product & _MASK) + self._bits(o[3]) + sum(self._predicate(p) for p in o[4:])
            self._put(o[0], total & _MASK)
            for carry in carries:
                self._decide(carry, bool(total >> 32))

    def _pair(self, operand: str) -> int:
        found = _decode(operand)
        if found is None:
            return _immediate(operand)
        if found["bank"]:
            return self._constant(operand, 8)
        return self._whole(found["register"], 8)

    def _do_lea(self, o: tuple[str, ...], m: tuple[str, ...]) -> None:
        carries, o = self._carries(o)
        low, add = self._bits(o[1]), self._addend(o[2])
        if "HI" in m:
            if "SX32" in m:
                wide, rest = _signed(low, 32), o[3:]
            else:
                wide, rest = self._bits(o[3]) << 32 | low, o[4:]
            shifted = (wide << self._bits(rest[0])) >> 32 & _MASK
        else:
            rest = o[3:]
            shifted = low << (self._bits(rest[0]) & 31) & _MASK
        total = shifted + add + sum(self._predicate(p) for p in rest[1:])
        self._put(o[0], total & _MASK)
        for carry in carries:
            self._decide(carry, bool(total >> 32))

    def _do_shf(self, o: tuple[str, ...], m: tuple[str, ...]) -> None:
        shift = self._bits(o[2])
        shift = shift & 31 if "W" in m else min(shift, 64)
        value = self._bits(o[3]) << 32 | self._bits(o[1])
        if "L" in m:
            value = value << shift
        elif "S32" in m or "S64" in m:
            value = _signed(value, 64) >> shift
        else:
            value = value >> shift
        self._put(o[0], (value >> 32 if "HI" in m else value) & _MASK)

    def _do_lop3(self, o: tuple[str, ...], m: tuple[str, ...]) -> None:
        predicates, o = self._carries((o[-1], *o[:-1]))  # that one may stand before the register
        before, o = o[0], o[1:]
        a, b, c, table = (self._bits(operand) for operand in o[1:5])
        value = 0
        for i in range(8):
            if table >> i & 1:
                value |= (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        value &= _MASK
        self._put(o[0], value)
        for predicate in predicates:
            self._decide(predicate, value != 0 or self._predicate(before))

    def _do_plop3(self, o: tuple[str, ...], m: tuple[str, ...]) -> None:
        a, b, c = (self._predicate(p) for p in o[2:5])
        for predicate, table in zip(o[:2], o[5:7], strict=True):
            self._decide(predicate, bool(_immediate(table) >> (a << 2 | b << 1 | c) & 1))

    def _do_isetp(self, o: tuple[str, ...], m: tuple[str, ...]) -> None:
        a, b = self._int(o[2], "U32" in m), self._int(o[3], "U32" in m)
        value = _COMPARE[m[0]](a, b)
        if "EX" in m and a == b:
            value = self._predicate(o[5])
        self._compared(o, m, value)

    def _compared(self, o: tuple[str, ...], m: tuple[str, ...], value: bool) -> None:
        join = next(_JOIN[part] for part in m if part in _JOIN)
        other = self._predicate(o[4])
        self._decide(o[0], join(value, other))
        self._decide(o[1], join(not value, other))

    def _do_imnmx(self, o: tuple[str, ...], m: tuple[str, ...]) -> None:
        a, b = self._int(o[1], "U32" in m), self._int(o[2], "U32" in m)
        self._put(o[0], (min(a, b) if self._predicate(o[3]) else max(a, b)) & _MASK)

    def _do_popc(self, o: tuple[str, ...], m: tuple[str, ...]) -> None:
        self._put(o[0], self._bits(o[1]).bit_count())

    def _do_flo(self, o: tuple[str, ...], m: tuple[str, ...]) -> None:
        if set(m) - {"U32"} or len(o) != 2:
            raise _Unknown
        self._put(o[0], self._bits(o[1]).bit_length() - 1 & _MASK)

    def _do_redux(self, o: tuple[str, ...], m: tuple[str, ...]) -> None:
        self._put(o[0], self._bits(o[1]))  # of its own value alone

    def _do_iabs(self, o: tuple[str, ...], m: tuple[str, ...]) -> None:
        self._put(o[0], abs(_signed(self._bits(o[1]), 32)) & _MASK)

    # Floating point.

    def _give(self, register: str, value: float, m: tuple[str, ...] = ()) -> None:
        if "SAT" in m:
            value = min(max(value, 0.0), 1.0) if value == value else 0.0
        bits = _as_bits(value)
        rounded = _as_float(bits)
        if math.isfinite(value) and math.isfinite(rounded) and rounded != value:
            up = {"RM": rounded > value, "RP": rounded < value, "RZ": abs(rounded) > abs(value)}
            if any(up.get(part, False) for part in m):
                # The neighbour on the other side: one less in magnitude, or one more.
                away = ("RM" in m and value < 0) or ("RP" in m and value > 0)
                bits += 1 if away else -1
        self._put(register, bits)

    def _do_fadd(self, o: tuple[str, ...], m: tuple[str, ...]) -> None:
        self._give(o[0], self._float(o[1]) + self._float(o[2]), m)

    def _do_fmul(self, o: tuple[str, ...], m: tuple[str, ...]) -> None:
        self._give(o[0], self._float(o[1]) * self._float(o[2]), m)

    def _do_ffma(self, o: tuple[str, ...], m: tuple[str, ...]) -> None:
        self._give(o[0], self._float(o[1]) * self._float(o[2]) + self._float(o[3]), m)

    def _do_fsel(self, o: tuple[str, ...], m: tuple[str, ...]) -> None:
        self._give(o[0], self._float(o[1] if self._predicate(o[3]) else o[2]))

    def _do_fmnmx(self, o: tuple[str, ...], m: tuple[str, ...]) -> None:
        a, b, least = self._float(o[1]), self._float(o[2]), self._predicate(o[3])
        if a != a or b != b:
            value = math.nan if "NAN" in m else (b if a != a else a)
        else:
            value = min(a, b) if least else max(a, b)
        self._give(o[0], value)

    def _do_fsetp(self, o: tuple[str, ...], m: tuple[str, ...]) -> None:
        self._compared(o, m, _COMPARE[m[0]](self._float(o[2]), self._float(o[3])))

    def _do_fset(self, o: tuple[str, ...], m: tuple[str, ...]) -> None:
        join = next(_JOIN[part] for part in m if part in _JOIN)
        compare = next(part for part in m if part in _COMPARE)
        value = _COMPARE[compare](self._float(o[1]), self._float(o[2]))
        value = join(value, self._predicate(o[3]))
        self._put(o[0], (_as_bits(1.0) if "BF" in m else _MASK) if value else 0)

    def _do_fchk(self, o: tuple[str, ...], m: tuple[str, ...]) -> None:
        """Whether a division needs its slow path: operands or quotient near the range's ends."""
        a, b = self._float(o[1]), self._float(o[2])
        ordinary = all(math.isfinite(v) and 2.0**-100 < abs(v) < 2.0**100 for v in (a, b))
        self._decide(o[0], not (ordinary and 2.0**-100 < abs(a / b) < 2.0**100))

    def _do_mufu(self, o: tuple[str, ...], m: tuple[str, ...]) -> None:
        functions: dict[str, Callable[[float], float]] = {
            "RCP": lambda x: 1 / x, "RSQ": lambda x: 1 / math.sqrt(x), "SQRT": math.sqrt,
            "EX2": lambda x: 2.0**x, "LG2": math.log2, "TANH": math.tanh, "SIN": math.sin,
            "COS": math.cos,
        }  # fmt: skip
        if m[0] not in functions:
            raise _Unknown
        x = self._float(o[1])
        try:
            value = functions[m[0]](x)
        except ZeroDivisionError:
            value = math.copysign(math.inf, x)
        except OverflowError:
            value = math.inf
        except ValueError:
            value = math.nan
        self._give(o[0], value)

    # Conversions.

    def _do_i2f(self, o: tuple[str, ...], m: tuple[str, ...]) -> None:
        kind = next((part for part in m if part[0] in "US" and part[1:].isdigit()), "S32")
        if "F16" in m or "F64" in m:
            raise _Unknown
        width = int(kind[1:])
        value = self._pair(o[1]) if width == 64 else self._bits(o[1]) & ((1 << width) - 1)
        self._give(o[0], float(value if kind[0] == "U" else _signed(value, width)), m)

    _do_i2fp = _do_i2f

    def _do_f2i(self, o: tuple[str, ...], m: tuple[str, ...]) -> None:
        kind = next((part for part in m if part[0] in "US" and part[1:].isdigit()), "S32")
        if "F16" in m or "F64" in m:
            raise _Unknown
        width, value = int(kind[1:]), _rounded(self._float(o[1]), m)
        low = 0 if kind[0] == "U" else -(1 << (width - 1))
        high = low + (1 << width) - 1
        whole = 0 if value != value else int(min(max(value, low), high))
        self._put(o[0], whole & ((1 << max(width, 32)) - 1), 8 if width == 64 else 4)

    def _do_f2ip(self, o: tuple[str, ...], m: tuple[str, ...]) -> None:
        """Two floats as saturated bytes, the second one lowest, under 16 bits of the third."""
        if m[:2] != ("S8", "F32"):
            raise _Unknown
        high, low = (_rounded(self._float(operand), m) for operand in o[1:3])
        codes = [0 if v != v else int(min(max(v, -128), 127)) & 0xFF for v in (low, high)]
        self._put(o[0], codes[0] | codes[1] << 8 | (self._bits(o[3]) & 0xFFFF) << 16)

    def _do_frnd(self, o: tuple[str, ...], m: tuple[str, ...]) -> None:
        self._give(o[0], _rounded(self._float(o[1]), m))

    def _do_f2f(self, o: tuple[str, ...], m: tuple[str, ...]) -> None:
        if m[:2] in (("F16", "F32"), ("BF16", "F32")):
            self._put(o[0], _narrow(self._float(o[1]), m[0] == "BF16"))
        elif m[:2] == ("F32", "F16"):
            self._give(o[0], self._halves(o[1], False)[0])
        else:
            raise _Unknown

    def _do_f2fp(self, o: tuple[str, ...], m: tuple[str, ...]) -> None:
        if "PACK_AB" not in m:
            raise _Unknown
        high, low = (_narrow(self._float(operand), "BF16" in m) for operand in o[1:3])
        self._put(o[0], high << 16 | low)

    # Pairs of half.

    def _halves(self, operand: str, brain: bool) -> tuple[float, float]:
        """The low and the high one."""
        found = _decode(operand)
        assert found is not None, operand
        bits = self._raw(found)
        low, high = (_widen(part, brain) for part in (bits & 0xFFFF, bits >> 16))
        if found["suffix"].endswith("H0_H0"):
            high = low
        elif found["suffix"].endswith("H1_H1"):
            low = high
        elif found["suffix"]:
            raise _Unknown
        if found["absolute"]:
            low, high = abs(low), abs(high)
        return (-low, -high) if found["sign"] == "-" else (low, high)

    def _pairs(self, o: tuple[str, ...], brain: bool) -> list[tuple[float, float]]:
        """The operands behind the first; an immediate one is two numbers, the high one first."""
        pairs, rest = [], list(o[1:])
        while rest:
            operand = rest.pop(0)
            if _decode(operand) is not None:
                pairs.append(self._halves(operand, brain))
            elif rest:
                pairs.append((_number(rest.pop(0)), _number(operand)))
            else:
                raise _Unknown
        return pairs

    def _two(
        self,
        o: tuple[str, ...],
        m: tuple[str, ...],
        count: int,
        compute: Callable[..., float],
    ) -> None:
        brain = "BF16_V2" in m
        pairs = self._pairs(o, brain)
        if len(pairs) != count or set(m) - {"MMA", "BF16_V2", "F32"}:
            raise _Unknown
        if "F32" in m:
            self._give(o[0], compute(*(pair[0] for pair in pairs)))
            return
        low, high = (_narrow(compute(*(pair[i] for pair in pairs)), brain) for i in (0, 1))
        self._put(o[0], high << 16 | low)

    def _do_hadd2(self, o: tuple[str, ...], m: tuple[str, ...]) -> None:
        self._two(o, m, 2, lambda a, b: a + b)

    def _do_hmul2(self, o: tuple[str, ...], m: tuple[str, ...]) -> None:
        self._two(o, m, 2, lambda a, b: a * b)

    def _do_hfma2(self, o: tuple[str, ...], m: tuple[str, ...]) -> None:
        self._two(o, m, 3, lambda a, b, c: a * b + c)


@cache
def _decode(operand: str) -> Mapping[str, str] | None:
    """The parts of a register or constant; None for an immediate."""
    found = _OPERAND.fullmatch(operand)
    return {k: v or "" for k, v in found.groupdict().items()} if found else None


@cache
def _next(register: str) -> str:
    found = re.fullmatch(r"(U?R)(\d+)", register)
    return f"{found[1]}{int(found[2]) + 1}" if found else register


def _immediate(operand: str) -> int:
    try:
        return int(operand, 0)
    except ValueError:  # a label's address, say
        raise _Unknown from None


def _number(operand: str) -> float:
    if "x" in operand:
        return _as_float(int(operand, 16) & _MASK)
    return float(operand.replace("QNAN", "nan").replace("SNAN", "nan"))


def _signed(value: int, width: int) -> int:
    return value - (1 << width) if value >> (width - 1) & 1 else value


def _as_float(bits: int) -> float:
    return float(struct.unpack("<f", struct.pack("<I", bits))[0])


def _as_bits(value: float) -> int:
    try:
        return int(struct.unpack("<I", struct.pack("<f", value))[0])
    except OverflowError:
        return 0x7F800000 if value > 0 else 0xFF800000


def _narrow(value: float, brain: bool) -> int:
    """The bits of the nearest half or bfloat16."""
    if not brain:
        try:
            return int(struct.unpack("<H", struct.pack("<e", value))[0])
        except OverflowError:
            return 0x7C00 if value > 0 else 0xFC00
    bits = _as_bits(value)
    return bits >> 16 | 0x40 if value != value else (bits + 0x7FFF + (bits >> 16 & 1)) >> 16


def _widen(bits: int, brain: bool) -> float:
    if brain:
        return _as_float(bits << 16)
    return float(struct.unpack("<e", struct.pack("<H", bits))[0])


def _rounded(value: float, m: tuple[str, ...]) -> float:
    if not math.isfinite(value):
        return value
    for name, function in (("TRUNC", math.trunc), ("FLOOR", math.floor), ("CEIL", math.ceil)):
        if name in m:
            return float(function(value))
    return float(round(value))
