"""The table of what the plugin's kernels execute: made again from the sources, for one architecture
by default; and the reader and runner of machine code on code written by hand."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import pytest

from iq_export.engine.plugin import find_nvcc
from iq_export.errors import DataError, EngineError
from tools.kernel_table.__main__ import ARCHITECTURES, PAGE, PLUGINS, RECORD, figures_of
from tools.kernel_table.build import Compiled, compiled, find_nvdisasm, version_of
from tools.kernel_table.count import _one, figures
from tools.kernel_table.launch import Argument, arguments, launch
from tools.kernel_table.machine import Memory, Thread, Trace
from tools.kernel_table.rows import ORDINARY, Row, rows
from tools.kernel_table.sass import Kernel, parse
from tools.kernel_table.table import tables
from tools.pages import part

ROOT = Path(__file__).resolve().parents[2]
RECORDED = json.loads((ROOT / RECORD).read_text(encoding="utf-8"))
QUICK = 87


@pytest.fixture(scope="module")
def toolchain() -> tuple[Path, Path]:
    nvcc = find_nvcc()
    if nvcc is None:
        pytest.skip("nvcc is missing")
    nvdisasm = find_nvdisasm(nvcc)
    if nvdisasm is None:
        pytest.skip("nvdisasm is missing: pip install nvidia-cuda-nvdisasm")
    version, recorded = version_of(nvcc), RECORDED["after"]["nvcc"]
    if version != recorded:
        pytest.skip(f"nvcc is {version}, the table is of {recorded}")
    return nvcc, nvdisasm


@pytest.fixture(scope="module")
def quick(toolchain: tuple[Path, Path]) -> dict[str, Compiled]:
    return compiled(ROOT / PLUGINS, QUICK, *toolchain)


def test_the_table_is_of_these_sources(quick: dict[str, Compiled]) -> None:
    """Else: python -m tools.kernel_table."""
    recorded = RECORDED["after"]["figures"][str(QUICK)]
    assert {row.label for row in rows()} == set(recorded)
    for row in rows():
        assert figures(row, quick, ROOT / PLUGINS, QUICK) == recorded[row.label], row.label


@pytest.mark.heavy
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_table_of_every_architecture(
    architecture: int, toolchain: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    found, spilled = figures_of(PLUGINS, architecture)
    assert found == RECORDED["after"]["figures"][str(architecture)]
    assert spilled == RECORDED["after"]["spilled"][str(architecture)]


def test_the_page_shows_the_record() -> None:
    assert part(ROOT / PAGE, "measured") == tables(RECORDED).strip()


def test_ordinary_data_go_the_usual_way() -> None:
    """No row runs a subroutine (the slow paths of divisions and roots) or touches local memory."""
    for kernels in RECORDED["after"]["figures"].values():
        for label, found in kernels.items():
            assert found["calls"] == 0, label
            assert found["spilled"] or not (found["LDL"] or found["STL"]), label


# The runner computes what the kernels mean: it took the branches that they take.


def _written(label: str, name: str, size: int, count: int, kernels: dict[str, Compiled]) -> Any:
    row = next(row for row in rows() if row.label == label)
    given = arguments(ROOT / PLUGINS, row.kernel)
    bank, memory, pointers = launch(given, row.values, QUICK, row.threads)
    Thread(_one(row, kernels)[1].code, bank, memory, Memory(), 0).run()
    values = [memory.load(pointers[name] + size * i, size) for i in range(count)]
    if size == 1:
        return [value - 256 if value > 127 else value for value in values]
    return [struct.unpack("<e", struct.pack("<H", value))[0] for value in values]


@pytest.mark.parametrize(
    "label, expected",
    [
        ("insert, sink, half", [1.25] * 8),
        ("insert, other row, half", ORDINARY[:8]),
        ("restore, sink, half", [value + 1.25 for value in ORDINARY[:8]]),
    ],
)
def test_what_a_change_writes(
    label: str, expected: list[float], quick: dict[str, Compiled]
) -> None:
    rounded = [struct.unpack("<e", struct.pack("<e", value))[0] for value in expected]
    assert _written(label, "y", 2, 8, quick) == rounded


def test_the_codes_of_a_product(quick: dict[str, Compiled]) -> None:
    expected = [gate / (1 + math.exp(-gate)) * gate * 0.5 / 0.03 for gate in ORDINARY[:8]]
    codes = _written("SiLU x up, block 1, half", "codes", 1, 8, quick)
    assert codes == [round(min(max(value, -128), 127)) for value in expected]
    assert len(set(codes)) > 4


def test_the_sum_before_a_norm(quick: dict[str, Compiled]) -> None:
    expected = [2 * value for value in ORDINARY[:8]]
    assert _written("add + norm, half", "sum", 2, 8, quick) == expected


# Reading.

LISTING = """
	.headerflags	@"EF_CUDA_SM87"
	.section	.nv.constant2.walk,"a",@progbits
	.align	4
.nv.constant2.walk:
        /*0000*/ 	.byte	0xff, 0x01
        /*0002*/ 	.short	0x0203
	.section	.text.walk,"ax",@progbits
	.align	128
.text.walk:
        .type           walk,@function
walk:
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/                   HFMA2.MMA R1, -RZ, RZ, 0, 0 ;
.L_x_0:
        /*0020*/                   IADD3 R1, R1.reuse, 0x1, RZ ;
        /*0030*/                   ISETP.GE.AND P0, PT, R1, c[0x0][0x160], PT ;
        /*0040*/              @!P0 BRA `(.L_x_0) ;
        /*0050*/              @!P0 STL.S16 [R1+0x4], R0        (*"SpillRefill"*) ;
        /*0060*/                   CALL.REL.NOINC `($twice) ;
        /*0070*/                   IMAD.MOV.U32 R2, RZ, RZ, c[0x0][0x168] ;
        /*0080*/                   MOV R3, c[0x0][0x16c] ;
        /*0090*/                   STG.E desc[UR4][R2.64+0x8], R1 ;
        /*00a0*/                   EXIT ;
        .weak           $twice
$twice:
        /*00b0*/                   IMAD.SHL.U32 R1, R1, 0x2, RZ ;
        /*00c0*/                   RET.REL.NODEC R4 `(walk) ;
"""


def test_reading_a_listing() -> None:
    kernel = parse(LISTING)["walk"]
    assert kernel.constants == {2: b"\xff\x01\x03\x02"}
    assert kernel.labels == {".L_x_0": 2, "$twice": 11}
    assert [str(one) for one in kernel.instructions[2:6]] == [
        "IADD3 R1, R1, 0x1, RZ",
        "ISETP.GE.AND P0, PT, R1, c[0x0][0x160], PT",
        "@!P0 BRA `(.L_x_0)",
        "@!P0 STL.S16 [R1+0x4], R0",
    ]
    assert kernel.instructions[11].address == 0xB0


def _run(kernel: Kernel, number: int, memory: Memory, *values: float | bytes) -> Trace:
    given = [Argument("count", "int", 0), Argument("to", "*", 8)][: len(values)]
    names = dict(zip(("count", "to"), values, strict=False))
    bank, _, _ = launch(given, names, 87, 32)
    return Thread(kernel, bank, memory, Memory(), number).run()


def test_running_a_loop_and_a_call() -> None:
    memory = Memory({range(2 << 32, 3 << 32): b"\0"})
    trace = _run(parse(LISTING)["walk"], 0, memory, 5, b"\0")
    assert memory.load((2 << 32) + 8, 4) == 10
    assert trace.executed.total() == 2 + 5 * 3 + 2 + 2 + 4
    assert trace.executed[5] == 1  # issued, though its predicate was false
    assert trace.accesses == {("STG", 4): 1}


def _code(*lines: str) -> Kernel:
    text = [f"/*{16 * i:04x}*/ {line} ;" for i, line in enumerate(lines)]
    return parse("\n".join(['.section .text.it,"ax"', *text]))["it"]


@pytest.mark.parametrize(
    "lines, value",
    [
        (["MOV R0, 0x7", "IADD3 R0, P0, R0, -R0, RZ", "IADD3.X R0, RZ, RZ, RZ, P0, !PT"], 1),
        (["MOV R1, 0x80000001", "SHF.R.S32.HI R0, RZ, 0x1f, R1"], 0xFFFFFFFF),
        (["MOV R1, 0x80000001", "SHF.L.U64.HI R0, R1, 0x1, RZ"], 1),
        (["MOV R1, 0x10", "LEA R0, P0, R1, 0x4, 0x2"], 0x44),
        (["MOV R1, 0xf0000000", "LEA.HI R0, R1, 0x1, RZ, 0x5"], 0x1F),
        (["MOV R1, 0x12345678", "PRMT R0, R1, 0x7610, RZ"], 0x5678),
        (["MOV R1, 0x6", "LOP3.LUT P0, R0, R1, 0x3, RZ, 0xc0, !PT", "@!P0 MOV R0, 0x9"], 2),
        (["MOV R1, 0x6", "LOP3.LUT R0, R1, 0x3, RZ, 0x3c, !PT"], 5),
        (["MOV R1, 0xffffffff", "IMAD.WIDE R2, R1, 0x2, RZ", "MOV R0, R3"], 0xFFFFFFFF),
        (["MOV R1, 0xffffffff", "IMAD.WIDE.U32 R2, R1, 0x2, RZ", "MOV R0, R3"], 1),
        (["MOV R2, 0x5", "MOV R3, 0x3", "MOV R1, 0xffffffff", "IMAD.HI.U32 R0, R1, 0x2, R2"], 5),
        (["ISETP.EQ.U32.AND P0, PT, RZ, RZ, PT", "P2R R0, PR, RZ, 0x1"], 1),
        (["MOV R1, 0x1", "ISETP.GT.U32.AND P0, PT, R1, RZ, PT",
          "ISETP.GT.AND.EX P0, PT, RZ, RZ, PT, P0", "SEL R0, R1, 0x5, P0"], 1),
        (["UMOV UR4, 0x3", "UIADD3 UR4, UR4, 0x4, URZ", "IMAD.U32 R0, RZ, RZ, UR4"], 7),
        (["HFMA2.MMA R0, -RZ, RZ, 0, 1.847743988037109375e-06"], 31),
        (["MOV R1, 0x3f800000", "FADD R0, R1, 1"], 0x40000000),
        (["MOV R1, 0x3f800000", "F2FP.PACK_AB R0, RZ, R1"], 0x3C00),
        (["MOV R1, 0x3f808000", "F2FP.BF16.PACK_AB R0, R1, R1"], 0x3F803F80),
        (["MOV R1, 0x3c004000", "HADD2.F32 R0, -RZ, R1.H1_H1"], 0x3F800000),
        (["MOV R1, 0x40200000", "F2I.NTZ R0, R1"], 2),
        (["MOV R1, 0x7f", "I2F R0, R1"], 0x42FE0000),
        (["FSETP.NAN.AND P0, PT, +QNAN, 1, PT", "SEL R0, 0x1, 0x2, P0"], 1),
        (["FSETP.GEU.AND P0, PT, +QNAN, 1, PT", "SEL R0, 0x1, 0x2, P0"], 1),
        (["FMNMX.NAN R1, 3, 2, PT", "F2I.NTZ R0, R1"], 2),
        (["MOV R1, 0x3f800001", "FFMA.RM R0, R1, 1, 1"], 0x40000000),
        (["MOV R1, 0x40000000", "MUFU.RCP R0, R1"], 0x3F000000),
        (["S2R R1, SR_LANEID", "ISETP.NE.AND P0, PT, R1, 0x1f, PT", "SEL R0, 0x1, 0x2, P0"], 2),
        (["PLOP3.LUT P0, PT, PT, PT, PT, 0x80, 0x0", "SEL R0, 0x1, 0x2, P0"], 1),
    ],
)  # fmt: skip
def test_what_an_instruction_computes(lines: list[str], value: int) -> None:
    memory = Memory({range(4096): b"\0"})
    _run(_code(*lines, "MOV R8, 0x20", "STG.E [R8.64], R0", "EXIT"), 31, memory)
    assert memory.load(0x20, 4) == value


def test_an_unknown_instruction_matters_only_where_something_depends_on_it() -> None:
    memory = Memory({range(4096): b"\0"})
    harmless = _code("I2IP.S8.S32.SAT R0, R1, R2, R3", "MOV R8, 0x20", "STG.E [R8.64], R0", "EXIT")
    assert _run(harmless, 0, memory).executed.total() == 4
    issued = _code("XYZ P0, R1", "@P0 MOV R0, 0x1", "EXIT")
    assert _run(issued, 0, memory).executed.total() == 3
    decides = _code("XYZ P0, R1", "@P0 EXIT", "EXIT")
    with pytest.raises(DataError, match=r"'@P0 EXIT' at 0x10 depends on what 'XYZ P0, R1' wrote"):
        _run(decides, 0, memory)
    leads = _code("XYZ R2, R1", "LDG.E R0, [R2.64]", "EXIT")
    with pytest.raises(DataError, match="depends on what 'XYZ R2, R1' wrote"):
        _run(leads, 0, memory)


def test_what_cannot_be_followed_is_said() -> None:
    memory = Memory({range(4096): b"\0"})
    with pytest.raises(DataError, match="0x5000 is of no argument"):
        _run(_code("MOV R2, 0x5000", "LDG.E R0, [R2.64]", "EXIT"), 0, memory)
    with pytest.raises(DataError, match="'BRX R2 -0x10' cannot be followed"):
        _run(_code("BRX R2 -0x10", "EXIT"), 0, memory)
    endless = parse('.section .text.it,"ax"\n.L_x_0:\n /*0000*/ BRA `(.L_x_0) ;\n')["it"]
    with pytest.raises(DataError, match="no end after"):
        _run(endless, 0, memory)


# Launching.


def _sources(folder: Path, signature: str) -> Path:
    (folder / "src").mkdir()
    (folder / "include/iq").mkdir(parents=True)
    (folder / "src/kernels.cu").write_text(
        f"template <typename T>\n__global__ void __launch_bounds__(kMost) it({signature})\n{{\n}}\n"
        "void start() { it<float><<<1, 2>>>(x, y); }\n"
    )
    (folder / "include/iq/kernels.h").write_text(
        "struct Shape\n{\n    int64_t rows; // how many\n    int32_t block;\n};\n"
        "struct Op { bool first; Shape shape; void const* x; };\n"
    )
    return folder


def test_the_layout_of_arguments(tmp_path: Path) -> None:
    found = arguments(_sources(tmp_path, "float threshold, Op op, T const* y, int n"), "it")
    assert [(one.name, one.kind, one.offset) for one in found] == [
        ("threshold", "float", 0), ("first", "bool", 8), ("rows", "int64_t", 16),
        ("block", "int32_t", 24), ("x", "*", 32), ("y", "*", 40), ("n", "int", 48),
    ]  # fmt: skip
    values = {"threshold": 2.0, "first": 1, "rows": 3, "block": 4, "x": b"\1\2", "y": None, "n": 5}
    bank, memory, pointers = launch(found, values, 90, 64)
    assert struct.unpack_from("<f4x?7xqi", bank, 0x210) == (2.0, True, 3, 4)
    assert struct.unpack_from("<QQi", bank, 0x210 + 32) == (pointers["x"], 0, 5)
    assert struct.unpack_from("<I", bank)[0] == 64
    assert memory.load(pointers["x"] + 1, 2) == 0x0102


def test_arguments_that_are_not_understood(tmp_path: Path) -> None:
    plugins = _sources(tmp_path, "float threshold, Strange what")
    with pytest.raises(DataError, match="does not know the type 'Strange what'"):
        arguments(plugins, "it")
    with pytest.raises(DataError, match="has no kernel 'other'"):
        arguments(plugins, "other")
    with pytest.raises(DataError, match="'threshold' has no value in"):
        launch([Argument("threshold", "float", 0)], {}, 87, 32)


def test_a_pattern_means_one_kernel() -> None:
    kernel = Compiled(_code("EXIT"), 8, 0, 0, 0)
    row = Row("this", "it", "it<float, .>", 32, 32, {})
    two = {"it<float, 1>(Op)": kernel, "it<float, 4>(Op)": kernel}
    with pytest.raises(DataError, match=r"'this': .* matches 2 kernels.*; there are it<float, 1>"):
        _one(row, two)
    with pytest.raises(DataError, match="matches 0 kernels"):
        _one(row, {"other<float, 1>(Op)": kernel})


def test_a_tool_that_fails_is_named(tmp_path: Path) -> None:
    mute = tmp_path / "nvcc"
    mute.write_text("#!/bin/sh\nexit 0\n")
    mute.chmod(0o755)
    with pytest.raises(EngineError, match="does not say which version"):
        version_of(mute)
    mute.write_text("#!/bin/sh\necho no license >&2\nexit 3\n")
    with pytest.raises(EngineError, match="nvcc' failed: no license"):
        compiled(tmp_path, QUICK, mute, mute)


def test_the_disassembler_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the wheel, before that beside nvcc, before that on PATH."""
    folders = [tmp_path / "wheels/nvidia/cu13/bin", tmp_path / "cuda/bin", tmp_path / "path"]
    monkeypatch.setattr("sysconfig.get_path", lambda _: str(tmp_path / "wheels"))
    monkeypatch.setenv("PATH", str(folders[2]))
    nvcc = folders[1] / "nvcc"
    assert find_nvdisasm(nvcc) is None
    for folder in folders:
        folder.mkdir(parents=True)
        program = folder / "nvdisasm"
        program.write_text("#!/bin/sh\n")
        program.chmod(0o755)
        assert find_nvdisasm(nvcc) == program
