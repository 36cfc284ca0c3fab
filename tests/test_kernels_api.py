"""The C API and its Python side, without a GPU: structures, the table, and every argument that is refused."""

from __future__ import annotations

import ctypes
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from fqonnx import kernels
from fqonnx.errors import EngineError, FqonnxError, UsageError
from fqonnx.ops import kernels as table
from fqonnx.ops.layout import LAYOUTS
from fqonnx.plugins.library import library_path
from tests.plugin_support import built_library

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

FOLDER = Path(__file__).parents[1] / "plugins" / "kernels"
HEADER = FOLDER / "fqonnx.h"

STRUCTURES = {
    "fq_flat_quantize_params": kernels.FlatQuantizeParams,
    "fq_rms_norm_params": kernels.RmsNormParams,
    "fq_silu_mul_params": kernels.SiluMulParams,
    "fq_dequantize_params": kernels.DequantizeParams,
    "fq_w4a4_gemm_params": kernels.W4A4GemmParams,
    "fq_decode_attention_params": kernels.DecodeAttentionParams,
    "fq_kernel": kernels.Kernel,
}

NULL = 0
ALIGNED = 1 << 20
"""An address that nothing reads: every call that gets it is refused before anything would."""


# --- the header -------------------------------------------------------------------------------------------------------------------------


def compile_c(source: str, tmp_path: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler")
    path = tmp_path / "test.c"
    path.write_text(source)
    return subprocess.run([compiler, "-I", FOLDER, *flags, path], capture_output=True, text=True, check=False)


def test_the_header_is_plain_c(tmp_path: Path) -> None:
    done = compile_c('#include "fqonnx.h"\n', tmp_path, "-std=c99", "-pedantic", "-Wall", "-Wextra", "-Werror", "-fsyntax-only")
    assert done.returncode == 0, done.stderr


def test_structures_have_the_compilers_layout(tmp_path: Path) -> None:
    lines = [f'printf("{name} %zu\\n", sizeof({name}));' for name in STRUCTURES]
    for name, structure in STRUCTURES.items():
        for field, _ in structure._fields_:
            lines.append(f'printf("{name}.{field} %zu %zu\\n", offsetof({name}, {field}), sizeof((({name}*)0)->{field}));')
    program = tmp_path / "layout"
    source = '#include <stdio.h>\n#include "fqonnx.h"\nint main(void) { BODY return 0; }\n'.replace("BODY", "\n".join(lines))
    done = compile_c(source, tmp_path, "-o", str(program))
    assert done.returncode == 0, done.stderr
    told = dict(line.split(" ", 1) for line in subprocess.run([program], capture_output=True, text=True, check=True).stdout.splitlines())
    for name, structure in STRUCTURES.items():
        assert told.pop(name) == str(ctypes.sizeof(structure)), name
        for field, _ in structure._fields_:
            here = getattr(structure, field)
            assert told.pop(f"{name}.{field}") == f"{here.offset} {here.size}", f"{name}.{field}"
    assert not told


def test_structures_have_the_headers_fields_in_its_order() -> None:
    text = re.sub(r"/\*.*?\*/", "", HEADER.read_text(), flags=re.DOTALL)
    declared = dict(re.findall(r"typedef struct (\w+) \{(.*?)\} \1;", text, flags=re.DOTALL))
    assert declared.keys() == STRUCTURES.keys()
    for name, body in declared.items():
        fields = [re.findall(r"\w+", part)[-1] for line in body.split(";") if line.strip() for part in line.split(",")]
        assert fields == [field for field, _ in STRUCTURES[name]._fields_], name


def test_constants_are_the_headers() -> None:
    values = {name: int(value) for name, value in re.findall(r"\b(FQ_\w+) = (\d+)", HEADER.read_text())}
    values["FQ_ABI_VERSION"] = int(re.findall(r"#define FQ_ABI_VERSION (\d+)", HEADER.read_text())[0])
    assert values.pop("FQ_ABI_VERSION") == kernels.ABI_VERSION
    assert {name: values.pop(f"FQ_{name}") for name in ("OK", "INVALID_ARGUMENT", "UNSUPPORTED", "CUDA_ERROR")} == {
        "OK": kernels.OK,
        "INVALID_ARGUMENT": kernels.INVALID_ARGUMENT,
        "UNSUPPORTED": kernels.UNSUPPORTED,
        "CUDA_ERROR": kernels.CUDA_ERROR,
    }
    names = {"float32": "FQ_FLOAT", "float16": "FQ_FLOAT16", "bfloat16": "FQ_BFLOAT16"}
    assert {name: values.pop(constant) for name, constant in names.items()} == kernels.DTYPES
    assert {name: values.pop(f"FQ_{name.upper()}") for name in kernels.CONTAINERS} == kernels.CONTAINERS
    assert {name: values.pop(f"FQ_CACHE_{name.upper()}") for name in kernels.CACHES} == kernels.CACHES
    assert {name: values.pop(f"FQ_SCALE_A_{name.upper()}") for name in kernels.CACHE_SCALES} == kernels.CACHE_SCALES
    assert {name: values.pop(f"FQ_{name.upper()}") for name in LAYOUTS} == kernels.LAYOUTS
    assert not values


def test_every_function_of_the_header_is_declared_in_python() -> None:
    declared = set(re.findall(r"^FQ_API .*?\b(fq_\w+)\(", HEADER.read_text(), flags=re.MULTILINE))
    assert declared == set(kernels._SIGNATURES)


# --- the table --------------------------------------------------------------------------------------------------------------------------


def test_python_and_the_library_read_the_same_table() -> None:
    library = load()
    entries = library.fq_kernels()[: library.fq_kernel_count()]
    containers = {None: -1, **kernels.CONTAINERS}
    layouts = {None: -1, **kernels.LAYOUTS}
    assert [
        (
            e.op.decode(),
            e.name.decode(),
            e.instruction.decode(),
            e.container,
            e.layout,
            e.lowest,
            e.highest,
            e.runs_on_lowest,
            e.runs_on_highest,
        )
        for e in entries
    ] == [(k.op, k.name, k.instruction, containers[k.container], layouts[k.layout], *k.chosen, *k.runs) for k in table.KERNELS]


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"capability": 90, "k": 4096, "n": 4096, "group_size": 0}, "wgmma_s8"),
        ({"capability": 90, "k": 4096, "n": 4096, "group_size": 128}, "wgmma_s8"),
        ({"capability": 90, "k": 4096, "n": 4096, "group_size": 64}, "mma_s8"),
        ({"capability": 90, "k": 4112, "n": 4096, "group_size": 0}, "mma_s8"),
        ({"capability": 90, "k": 4096, "n": 4096, "layout": "plain"}, "mma_s8"),
        ({"capability": 80, "k": 4096, "n": 4096, "group_size": 0}, "mma_s4"),
        ({"capability": 89, "k": 4096, "n": 4096, "group_size": 32}, "mma_s4"),
        ({"capability": 86, "container": "int8"}, "mma_s8"),
        ({"capability": 120, "k": 64, "n": 16, "layout": "plain"}, "mma_s8"),
    ],
)
def test_the_kernel_of_a_gemm(arguments: dict[str, Any], name: str) -> None:
    assert table.kernel_for("W4A4Gemm", **arguments).name == name


def test_the_kernel_of_a_quantizer() -> None:
    assert table.kernel_for("FlatQuantize", capability=90, k=4096).name == "wgmma_f16"
    assert table.kernel_for("FlatQuantize", capability=90, k=4097).name == "mma_f16"
    assert table.kernel_for("FlatQuantize", capability=103).name == "mma_f16"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"capability": 75}, ["compute capability 7.5", "mma_s8 is for compute capability 8.0 to 12.9"]),
        ({"capability": 90, "container": "packed"}, ["wgmma_s8 wants container int8, not packed", "mma_s8 wants container int8"]),
        ({"capability": 90, "n": 24}, ["wgmma_s8 wants an N that is a multiple of 16, not 24"]),
        ({"capability": 80, "k": 40}, ["mma_s4 wants a K that is a multiple of 32, not 40", "mma_s8 wants a K that is a multiple of 16"]),
        ({"capability": 90, "group_size": 48}, ["wgmma_s8 wants weight groups of whole channels or 128, not 48", "multiple of 32"]),
        ({"capability": 89, "container": "packed", "layout": "k128"}, ["mma_s4 wants weight layout plain, not k128"]),
    ],
)
def test_no_kernel_is_an_error_that_says_why_for_each(arguments: dict[str, Any], said: list[str]) -> None:
    with pytest.raises(EngineError) as caught:
        table.kernel_for("W4A4Gemm", **arguments)
    for part in said:
        assert part in str(caught.value)
    assert all(kernel.name in str(caught.value) for kernel in table.KERNELS if kernel.op == "W4A4Gemm")


def test_an_op_without_kernels() -> None:
    with pytest.raises(ValueError, match=r"MatMul.*W4A4Gemm, FlatQuantize"):
        table.kernel_for("MatMul", capability=90)


@pytest.mark.parametrize("line", ['FQ_KERNEL(A, b, INT8, PLAIN, 1, 2, 3, 4, 5, 6, "")', "FQ_KERNEL(A", 'FQ_KERNEL(A, b, INT8) // "c"'])
def test_a_broken_entry_is_told(line: str) -> None:
    with pytest.raises(ValueError, match=re.escape(line)):
        table.read_table(f"/* a comment */\n{line}\n")


# --- arguments that the library refuses -------------------------------------------------------------------------------------------------


def load() -> ctypes.CDLL:
    if library_path() is None:
        built_library()
    return kernels.library()


def flat_quantize(**changes: Any) -> kernels.FlatQuantizeParams:
    pointers = dict.fromkeys(("x", "left", "right", "q", "scale"), ALIGNED)
    sizes = {"rows": 3, "k": 64, "x_stride": 64, "n1": 4, "n2": 8}
    good: dict[str, Any] = {**pointers, **sizes, "dtype": 10, "factor_dtype": 10, "bits": 4, "container": 0, "clip": 1.0}
    return kernels.FlatQuantizeParams(**{**good, **changes})


def w4a4_gemm(**changes: Any) -> kernels.W4A4GemmParams:
    pointers = dict.fromkeys(("q", "scale", "w", "w_scale", "bias", "y"), ALIGNED)
    good: dict[str, Any] = {**pointers, "m": 3, "n": 32, "k": 256, "groups": 1, "dtype": 10, "container": 0, "layout": 0}
    return kernels.W4A4GemmParams(**{**good, **changes})


def dequantize(**changes: Any) -> kernels.DequantizeParams:
    good: dict[str, Any] = {"q": ALIGNED, "scale": ALIGNED, "y": ALIGNED, "rows": 3, "k": 64, "container": 0, "dtype": 10}
    return kernels.DequantizeParams(**{**good, **changes})


def decode_attention(**changes: Any) -> kernels.DecodeAttentionParams:
    good: dict[str, Any] = dict.fromkeys(("q", "k", "v", "cos", "sin", "past", "key", "value", "y"), ALIGNED)
    good |= {"batch": 2, "capacity": 32, "positions": 64, "longest": 8, "q_stride": 512, "k_stride": 512, "v_stride": 512}
    good |= {"heads": 4, "kv_heads": 2, "head": 64, "dtype": 10, "scale": 0.125}
    return kernels.DecodeAttentionParams(**{**good, **changes})


def rms_norm(**changes: Any) -> kernels.RmsNormParams:
    return kernels.RmsNormParams(**{"gamma": ALIGNED, "epsilon": 1e-6, **changes})


def silu_mul(**changes: Any) -> kernels.SiluMulParams:
    return kernels.SiluMulParams(**{"up": ALIGNED, "up_stride": 64, **changes})


def refused(function: str, *params: ctypes.Structure | None) -> str:
    """The message of a call that must be refused for its arguments."""
    library = load()
    pointers = [None if entry is None else ctypes.byref(entry) for entry in params]
    assert getattr(library, function)(*pointers, None) == kernels.INVALID_ARGUMENT
    message: str = library.fq_last_error().decode()
    assert message
    assert "\n" not in message
    return message


QUANTIZE_ERRORS = [
    ({"x": NULL}, "x is null"),
    ({"q": NULL}, "q is null"),
    ({"scale": NULL}, "scale is null"),
    ({"left": NULL}, "left is null and right is not"),
    ({"right": NULL}, "right is null and left is not"),
    ({"left": NULL, "right": NULL}, "left and right are null, which is no transform, and n1 n2 is 4 * 8"),
    ({"x": ALIGNED + 8}, "x is 0x100008, which is not aligned to 16 bytes"),
    ({"q": ALIGNED + 4}, "q is 0x100004, which is not aligned to 16 bytes"),
    ({"scale": ALIGNED + 2}, "scale is 0x100002, which is not aligned to 4 bytes"),
    ({"left": ALIGNED + 1}, "left is 0x100001, which is not aligned to 2 bytes"),
    ({"right": ALIGNED + 2, "factor_dtype": 1}, "right is 0x100002, which is not aligned to 4 bytes"),
    ({"clip_ptr": ALIGNED + 2}, "clip_ptr is 0x100002, which is not aligned to 4 bytes"),
    ({"rows": -1}, "rows is -1, not 0 to 2147483647"),
    ({"rows": 1 << 31}, "rows is 2147483648, not 0 to 2147483647"),
    ({"k": 0}, "k is 0, not 1 to"),
    ({"k": -64}, "k is -64, not 1 to"),
    ({"k": 48, "x_stride": 48}, "k is 48, not a multiple of n1 n2 = 4 * 8"),
    ({"n1": 0}, "n1 is 0, not 1 to 256"),
    ({"n1": 257}, "n1 is 257, not 1 to 256"),
    ({"n2": -8}, "n2 is -8, not 1 to 256"),
    ({"n2": 512, "k": 2048, "x_stride": 2048}, "n2 is 512, not 1 to 256"),
    ({"dtype": 0}, "dtype is 0, not 1 (float), 10 (float16) or 16 (bfloat16)"),
    ({"dtype": 11}, "dtype is 11"),
    ({"factor_dtype": 16}, "factor_dtype is 16, neither 1 (float) nor dtype, 10"),
    ({"bits": 3}, "bits is 3, not 4 or 8"),
    ({"container": 3}, "container is 3, not 0 to 2"),
    ({"container": -1}, "container is -1, not 0 to 2"),
    ({"container": 1, "bits": 8}, "container is 1, which holds 4-bit codes, and bits is 8"),
    ({"container": 2, "bits": 8}, "container is 2, which holds 4-bit codes, and bits is 8"),
    ({"container": 1, "k": 33, "n1": 3, "n2": 11, "x_stride": 40}, "k is 33: container 1 (packed) holds an even number of codes"),
    ({"container": 2, "k": 36, "n1": 4, "n2": 9, "x_stride": 40}, "k is 36: container 2 (int32x8) holds a multiple of 8 codes"),
    ({"x_stride": 63}, "x_stride is 63, not 64 to"),
    ({"x_stride": 65}, "x_stride is 65 elements of 2 bytes: rows are then not aligned to 16 bytes"),
    ({"clip": 0.0}, "clip is 0, not above 0 and at most 1"),
    ({"clip": -0.5}, "clip is -0.5, not above 0 and at most 1"),
    ({"clip": 1.5}, "clip is 1.5, not above 0 and at most 1"),
    ({"clip": math.nan}, "clip is nan, not above 0 and at most 1"),
    ({"clip": math.inf}, "clip is inf, not above 0 and at most 1"),
    ({"variant": -1}, "variant is -1, not 0 to"),
    ({"variant": 1}, "variant is 1, which is W4A4Gemm wgmma_s8 and no FlatQuantize kernel"),
    ({"variant": 99}, "variant is 99, not 0 to"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "said"), QUANTIZE_ERRORS, ids=lambda value: value if isinstance(value, str) else "-".join(value))
def test_flat_quantize_refuses(changes: dict[str, Any], said: str) -> None:
    assert said in refused("fq_flat_quantize", flat_quantize(**changes))
    assert said in refused("fq_rms_norm_flat_quantize", flat_quantize(**changes), rms_norm())
    assert said in refused("fq_silu_mul_flat_quantize", flat_quantize(**changes), silu_mul())


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"gamma": NULL}, "gamma is null"),
        ({"gamma": ALIGNED + 8}, "gamma is 0x100008, which is not aligned to 16 bytes"),
        ({"residual": ALIGNED + 8}, "residual is 0x100008, which is not aligned"),
        ({"residual": ALIGNED, "sum": ALIGNED + 2}, "sum is 0x100002, which is not aligned"),
        ({"normed": ALIGNED + 2}, "normed is 0x100002, which is not aligned"),
        ({"sum": ALIGNED}, "sum is wanted and residual is null"),
        ({"epsilon": -1e-6}, "epsilon is -1e-06, not a finite number from 0 on"),
        ({"epsilon": math.nan}, "epsilon is nan"),
        ({"epsilon": math.inf}, "epsilon is inf"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_rms_norm_flat_quantize_refuses(changes: dict[str, Any], said: str) -> None:
    assert said in refused("fq_rms_norm_flat_quantize", flat_quantize(), rms_norm(**changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"up": NULL}, "up is null"),
        ({"up": ALIGNED + 2}, "up is 0x100002, which is not aligned to 16 bytes"),
        ({"up_stride": 63}, "up_stride is 63, not 64 to"),
        ({"up_stride": 68}, "up_stride is 68 elements of 2 bytes: rows are then not aligned to 16 bytes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_silu_mul_flat_quantize_refuses(changes: dict[str, Any], said: str) -> None:
    assert said in refused("fq_silu_mul_flat_quantize", flat_quantize(), silu_mul(**changes))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"q": NULL}, "q is null"),
        ({"scale": NULL}, "scale is null"),
        ({"y": NULL}, "y is null"),
        ({"q": ALIGNED + 2, "container": 2}, "q is 0x100002, which is not aligned to 4 bytes"),
        ({"scale": ALIGNED + 1}, "scale is 0x100001, which is not aligned to 4 bytes"),
        ({"y": ALIGNED + 1}, "y is 0x100001, which is not aligned to 2 bytes"),
        ({"y": ALIGNED + 2, "dtype": 1}, "y is 0x100002, which is not aligned to 4 bytes"),
        ({"rows": -3}, "rows is -3, not 0 to"),
        ({"k": 0}, "k is 0, not 1 to"),
        ({"k": 7, "container": 1}, "k is 7: container 1 (packed) holds an even number of codes"),
        ({"k": 12, "container": 2}, "k is 12: container 2 (int32x8) holds a multiple of 8 codes"),
        ({"container": 7}, "container is 7, not 0 to 2"),
        ({"dtype": 3}, "dtype is 3, not 1 (float)"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_dequantize_refuses(changes: dict[str, Any], said: str) -> None:
    assert said in refused("fq_dequantize", dequantize(**changes))


GEMM_ERRORS = [
    *(({name: NULL}, f"{name} is null") for name in ("q", "scale", "w", "w_scale", "y")),
    *(({name: ALIGNED + 8}, f"{name} is 0x100008, which is not aligned to 16 bytes") for name in ("q", "w", "y")),
    *(({name: ALIGNED + 2}, f"{name} is 0x100002, which is not aligned to 4 bytes") for name in ("scale", "w_scale", "bias")),
    ({"m": -1}, "m is -1, not 0 to"),
    ({"m": 1 << 40}, "m is 1099511627776, not 0 to"),
    ({"n": 0}, "n is 0, not 16 to"),
    ({"n": 24}, "n is 24, not a multiple of 16"),
    ({"k": 0}, "k is 0, not 16 to 131071"),
    ({"k": 131072}, "k is 131072, not 16 to 131071"),
    ({"k": 40}, "k is 40, not a multiple of 16"),
    ({"groups": 0}, "groups is 0, not 1 to"),
    ({"groups": -1}, "groups is -1, not 1 to"),
    ({"groups": 3}, "groups is 3, which does not divide k, 256"),
    ({"dtype": 2}, "dtype is 2, not 1 (float), 10 (float16) or 16 (bfloat16)"),
    ({"container": 3}, "container is 3, not 0 to 2"),
    ({"layout": 2}, "layout is 2, not 0 to 1"),
    ({"layout": -1}, "layout is -1, not 0 to 1"),
    ({"layout": 1, "k": 192}, "k is 192: layout 1 (k128) orders blocks of 128"),
    ({"variant": -2}, "variant is -2, not 0 to"),
    ({"variant": 1 + len(table.KERNELS)}, f"variant is {1 + len(table.KERNELS)}, not 0 to {len(table.KERNELS)}"),
    ({"variant": len(table.KERNELS)}, "GroupQueryAttention decode and no W4A4Gemm kernel"),
    ({"tactic": -1}, "tactic is -1, not 0 or the number of a tile"),
]


@pytest.mark.parametrize(("changes", "said"), GEMM_ERRORS, ids=lambda value: value if isinstance(value, str) else "-".join(value))
def test_w4a4_gemm_refuses(changes: dict[str, Any], said: str) -> None:
    assert said in refused("fq_w4a4_gemm", w4a4_gemm(**changes))
    library = load()
    assert library.fq_w4a4_gemm_tactics(ctypes.byref(w4a4_gemm(**changes))) == 0
    assert said in library.fq_last_error().decode()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        *(({name: NULL}, f"{name} is null") for name in ("q", "k", "v", "past", "key", "value", "y")),
        *(
            ({name: ALIGNED + 8}, f"{name} is 0x100008, which is not aligned to 16 bytes")
            for name in ("q", "k", "v", "key", "value", "cos", "y")
        ),
        ({"past": ALIGNED + 2}, "past is 0x100002, which is not aligned to 4 bytes"),
        ({"cos": NULL}, "cos is null and sin is not"),
        ({"sin": NULL}, "sin is null and cos is not"),
        ({"batch": -1}, "batch is -1, not 0 to"),
        ({"heads": 0}, "heads is 0, not 1 to"),
        ({"kv_heads": 3}, "heads is 4, not a multiple of kv_heads, 3"),
        ({"head": 0}, "head is 0, not 1 to"),
        ({"capacity": 0}, "capacity is 0, not 1 to"),
        ({"positions": 0}, "positions is 0, not 1 to"),
        ({"q_stride": 255}, "q_stride is 255, not 256 to"),
        ({"k_stride": 132}, "k_stride is 132 elements of 2 bytes: rows are then not aligned to 16 bytes"),
        ({"v_stride": 127}, "v_stride is 127, not 128 to"),
        ({"dtype": 3}, "dtype is 3, not 1 (float)"),
        ({"scale": math.nan}, "scale is nan, not a finite number"),
        ({"cache": 2}, "cache is 2, not 0 to 1"),
        ({"scales": 2}, "scales is 2, not 0 to 1"),
        ({"cache": 1, "value_scale": ALIGNED}, "key_scale is null, and cache is 1"),
        ({"key_scale": ALIGNED}, "key_scale is given, and cache is 0"),
        (
            {"cache": 1, "scales": 1, "key_scale": ALIGNED + 4, "value_scale": ALIGNED},
            "key_scale is 0x100004, which is not aligned to 8 bytes",
        ),
        ({"cache": 1, "key_scale": ALIGNED, "value_scale": ALIGNED + 2}, "value_scale is 0x100002, which is not aligned to 4 bytes"),
        ({"variant": 1}, "variant is 1, which is W4A4Gemm wgmma_s8 and no GroupQueryAttention kernel"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_decode_attention_refuses(changes: dict[str, Any], said: str) -> None:
    assert said in refused("fq_decode_attention", decode_attention(**changes))


def test_null_structures_are_refused() -> None:
    assert refused("fq_decode_attention", None) == "params is null"
    assert refused("fq_flat_quantize", None) == "params is null"
    assert refused("fq_rms_norm_flat_quantize", None, rms_norm()) == "params is null"
    assert refused("fq_rms_norm_flat_quantize", flat_quantize(), None) == "norm is null"
    assert refused("fq_silu_mul_flat_quantize", None, silu_mul()) == "params is null"
    assert refused("fq_silu_mul_flat_quantize", flat_quantize(), None) == "gate is null"
    assert refused("fq_dequantize", None) == "params is null"
    assert refused("fq_w4a4_gemm", None) == "params is null"
    assert load().fq_w4a4_gemm_tactics(None) == 0


def test_empty_problems_are_fine_without_a_device() -> None:
    """With no rows there is nothing to point to, nothing to launch, and no device to ask."""
    empty = flat_quantize(rows=0, x=NULL, q=NULL, scale=NULL)
    kernels.call("fq_flat_quantize", empty)
    kernels.call("fq_rms_norm_flat_quantize", empty, rms_norm())
    kernels.call("fq_silu_mul_flat_quantize", empty, silu_mul(up=NULL))
    kernels.call("fq_dequantize", dequantize(rows=0, q=NULL, scale=NULL, y=NULL))
    kernels.call("fq_w4a4_gemm", w4a4_gemm(m=0, q=NULL, scale=NULL, y=NULL))
    kernels.call("fq_decode_attention", decode_attention(batch=0, q=NULL, k=NULL, v=NULL, past=NULL, key=NULL, value=NULL, y=NULL))


def test_an_empty_problem_is_checked_all_the_same() -> None:
    assert "bits is 5" in refused("fq_flat_quantize", flat_quantize(rows=0, bits=5))
    assert "n is 8" in refused("fq_w4a4_gemm", w4a4_gemm(m=0, n=8))
    assert "k is 0" in refused("fq_dequantize", dequantize(rows=0, k=0))


@pytest.mark.skipif(torch.cuda.is_available(), reason="without a GPU")
def test_without_a_device_good_arguments_get_cudas_error() -> None:
    for call in (
        lambda: kernels.call("fq_flat_quantize", flat_quantize()),
        lambda: kernels.call("fq_rms_norm_flat_quantize", flat_quantize(), rms_norm()),
        lambda: kernels.call("fq_silu_mul_flat_quantize", flat_quantize(), silu_mul()),
        lambda: kernels.call("fq_w4a4_gemm", w4a4_gemm()),
        lambda: kernels.call("fq_decode_attention", decode_attention()),
    ):
        with pytest.raises(EngineError, match=r"cudaGetDevice: .*\(cudaError\w+\)"):
            call()
    assert load().fq_w4a4_gemm_tactics(ctypes.byref(w4a4_gemm())) == 0


def test_the_last_error_is_this_threads() -> None:
    import threading

    library = load()
    refused("fq_flat_quantize", flat_quantize(bits=5))
    seen: list[bytes] = []

    def other() -> None:
        seen.append(library.fq_last_error())
        refused("fq_flat_quantize", flat_quantize(bits=6))
        seen.append(library.fq_last_error())

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen[0] == b""
    assert b"bits is 6" in seen[1]
    assert b"bits is 5" in library.fq_last_error()


def test_a_refused_argument_is_a_usage_error_in_python() -> None:
    load()
    with pytest.raises(UsageError, match="fq_flat_quantize: bits is 5, not 4 or 8"):
        kernels.call("fq_flat_quantize", flat_quantize(bits=5))


def test_the_version_of_the_library() -> None:
    assert load().fq_abi_version() == kernels.ABI_VERSION


def test_kernels_are_named_by_the_table() -> None:
    assert kernels.variant_of("W4A4Gemm", None) == 0
    for index, kernel in enumerate(table.KERNELS):
        assert kernels.variant_of(kernel.op, kernel.name) == 1 + index
    with pytest.raises(UsageError, match="unknown W4A4Gemm kernel 'mma_f16': choose from wgmma_s8, mma_s4, mma_s8"):
        kernels.variant_of("W4A4Gemm", "mma_f16")


# --- the library that is loaded ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def _unloaded() -> Iterator[None]:
    kernels.library.cache_clear()
    yield
    kernels.library.cache_clear()


@pytest.mark.usefixtures("_unloaded")
def test_no_library_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FQONNX_LIBRARY", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(EngineError, match="run `fqonnx plugin build`"):
        kernels.library()


@pytest.mark.usefixtures("_unloaded")
def test_a_file_that_is_no_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "libfqonnx.so"
    path.write_text("not a library")
    monkeypatch.setenv("FQONNX_LIBRARY", str(path))
    with pytest.raises(EngineError, match=f"does not load: {path}.*run `fqonnx plugin build --force`"):
        kernels.library()


@pytest.mark.usefixtures("_unloaded")
@pytest.mark.parametrize(
    ("body", "said"),
    [("int fq_abi_version(void) { return 1; }", "undefined symbol: fq_flat_quantize"), ("", "has version 99 of the C API, not 1")],
)
def test_another_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, said: str) -> None:
    path = tmp_path / "libfqonnx.so"
    functions = "\n".join(f"int {name}(void) {{ return 99; }}" for name in kernels._SIGNATURES)
    done = compile_c(body or functions, tmp_path, "-shared", "-fPIC", "-o", str(path))
    assert done.returncode == 0, done.stderr
    monkeypatch.setenv("FQONNX_LIBRARY", str(path))
    with pytest.raises(EngineError, match=said):
        kernels.library()


# --- torch tensors ----------------------------------------------------------------------------------------------------------------------


@given(st.integers(1, 200_000))
def test_get_decompose_dim_returns_for_any_size(n: int) -> None:
    n1, n2 = kernels.get_decompose_dim(n)
    assert n1 * n2 == n
    assert 1 <= n1 <= n2


@pytest.mark.parametrize(
    ("n", "pair"),
    [(1, (1, 1)), (6, (2, 3)), (8191, (1, 8191)), (4096, (32, 128)), (11008, (86, 128)), (14336, (112, 128))],
)
def test_get_decompose_dim(n: int, pair: tuple[int, int]) -> None:
    assert kernels.get_decompose_dim(n) == pair


def test_get_decompose_dim_of_nothing() -> None:
    with pytest.raises(ValueError, match="cannot factor 0"):
        kernels.get_decompose_dim(0)


def tensor(*shape: int, dtype: torch.dtype = torch.float16, device: str = "cuda", stride: tuple[int, ...] | None = None) -> torch.Tensor:
    """A tensor without content: checks come before any of it is touched."""
    return (
        torch.empty(shape, dtype=dtype, device=device) if stride is None else torch.empty_strided(shape, stride, dtype=dtype, device=device)
    )


def quantized(*, k: int = 64, rows: int = 3, dtype: torch.dtype = torch.int8) -> tuple[torch.Tensor, torch.Tensor]:
    return tensor(rows, k, dtype=dtype), tensor(rows, 1, dtype=torch.float32)


def weight(n: int = 16, k: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    return tensor(n, k // 2, dtype=torch.uint8), tensor(n, dtype=torch.float32)


k = kernels
TORCH_ERRORS: list[tuple[str, Callable[[], object], str]] = [
    ("x on the CPU", lambda: k.quantize(tensor(3, 64, device="cpu")), "x is on cpu: kernels take CUDA tensors"),
    ("x of int8", lambda: k.quantize(tensor(3, 64, dtype=torch.int8)), "x is torch.int8: kernels take float32, float16, bfloat16"),
    ("x scalar", lambda: k.quantize(tensor()), "x is a scalar"),
    (
        "x strided columns",
        lambda: k.quantize(tensor(3, 64, stride=(128, 2))),
        r"x \[3, 64\] with strides \[128, 2\] .* pass x.contiguous",
    ),
    ("x broadcast", lambda: k.quantize(tensor(3, 64, stride=(0, 1))), r"strides \[0, 1\] has no one stride"),
    ("x transposed", lambda: k.quantize(tensor(2, 3, 64, stride=(64, 128, 1))), "has no one stride from row to row"),
    ("container", lambda: k.quantize(tensor(3, 64), container="int4"), "unknown container 'int4': choose from int8, packed, int32x8"),
    ("odd k packed", lambda: k.quantize(tensor(3, 63), container="packed"), "rows of 63 codes do not fill container packed"),
    ("k in int32", lambda: k.quantize(tensor(3, 60), container="int32x8"), "rows of 60 codes do not fill container int32x8"),
    (
        "kernel",
        lambda: k.quantize(tensor(3, 64), kernel="fast"),
        "kernel 'fast': choose from wgmma_f16, mma_f16",
    ),
    (
        "left alone",
        lambda: k.rms_norm_flat_quantize(tensor(3, 64), tensor(64), tensor(8, 8), None, epsilon=0),
        "are given together",
    ),
    ("left not square", lambda: k.flat_quantize(tensor(3, 64), tensor(4, 8), tensor(8, 8)), r"left has shape \[4, 8\], not \[8, 8\]"),
    ("right 1-D", lambda: k.flat_quantize(tensor(3, 64), tensor(8, 8), tensor(8)), r"right has shape \[8\], not \[8, 8\]"),
    ("left of int8", lambda: k.flat_quantize(tensor(3, 64), tensor(8, 8, dtype=torch.int8), tensor(8, 8)), "left is torch.int8"),
    (
        "factors of two types",
        lambda: k.flat_quantize(tensor(3, 64), tensor(8, 8), tensor(8, 8, dtype=torch.float32)),
        "right is torch.float32, not torch.float16",
    ),
    ("left on the CPU", lambda: k.flat_quantize(tensor(3, 64), tensor(8, 8, device="cpu"), tensor(8, 8)), "left is on cpu"),
    ("left elsewhere", lambda: k.flat_quantize(tensor(3, 64), tensor(8, 8, device="cuda:1"), tensor(8, 8)), "left is on cuda:1 and"),
    ("left strided", lambda: k.flat_quantize(tensor(3, 64), tensor(8, 8, stride=(1, 8)), tensor(8, 8)), r"pass left.contiguous\(\)"),
    ("two clips", lambda: k.quantize(tensor(3, 64), clip=tensor(2, dtype=torch.float32)), "clip has 2 values, not 1"),
    ("clip of fp16", lambda: k.quantize(tensor(3, 64), clip=tensor(1)), "clip is torch.float16, not torch.float32"),
    (
        "gamma",
        lambda: k.rms_norm_flat_quantize(tensor(3, 64), tensor(32), None, None, epsilon=0),
        r"\[32\], not \[64\]",
    ),
    (
        "residual",
        lambda: k.rms_norm_flat_quantize(tensor(3, 64), tensor(64), None, None, epsilon=0, residual=tensor(1, 64)),
        r"residual has shape \[1, 64\], not \[3, 64\]",
    ),
    ("up", lambda: k.silu_mul_flat_quantize(tensor(3, 64), tensor(3, 32), None, None), r"up has shape \[3, 32\], not \[3, 64\]"),
    (
        "up of fp32",
        lambda: k.silu_mul_flat_quantize(tensor(3, 64), tensor(3, 64, dtype=torch.float32), None, None),
        "torch.float32, not",
    ),
    ("up strided", lambda: k.silu_mul_flat_quantize(tensor(3, 64), tensor(3, 64, stride=(1, 3)), None, None), "pass up.contiguous"),
    ("q of fp16", lambda: k.dequantize(tensor(3, 64), tensor(3, dtype=torch.float32)), "q is torch.float16: codes are int8"),
    ("q scalar", lambda: k.dequantize(tensor(dtype=torch.int8), tensor(dtype=torch.float32)), "q is a scalar"),
    ("q strided", lambda: k.dequantize(tensor(3, 64, dtype=torch.int8, stride=(128, 1)), tensor(3)), "pass q.contiguous"),
    ("scales", lambda: k.dequantize(tensor(3, 64, dtype=torch.int8), tensor(4, dtype=torch.float32)), "has 4 values for 3 rows"),
    ("scale of fp16", lambda: k.dequantize(tensor(3, 64, dtype=torch.int8), tensor(3)), "scale is torch.float16, not torch.float32"),
    ("to int32", lambda: k.dequantize(*quantized(), dtype=torch.int32), "dtype is torch.int32: kernels take"),
    ("layout", lambda: k.w4a4_gemm(*quantized(), *weight(), layout="k64"), "unknown weight layout 'k64': choose from plain, k128"),
    (
        "w of int32",
        lambda: k.w4a4_gemm(*quantized(), tensor(16, 8, dtype=torch.int32), tensor(16)),
        "two 4-bit codes",
    ),
    ("w too wide", lambda: k.w4a4_gemm(*quantized(), *weight(k=128)), r"w has shape \[16, 64\], not \[16, 32\]"),
    ("packed q", lambda: k.w4a4_gemm(*quantized(dtype=torch.uint8), *weight()), r"w has shape \[16, 32\], not \[16, 64\]"),
    ("w_scale", lambda: k.w4a4_gemm(*quantized(), weight()[0], tensor(8, 2, dtype=torch.float32)), r"w_scale has shape \[8, 2\]"),
    ("bias", lambda: k.w4a4_gemm(*quantized(), *weight(), tensor(8, dtype=torch.float32)), r"bias has shape \[8\], not \[16\]"),
    ("bias of fp16", lambda: k.w4a4_gemm(*quantized(), *weight(), tensor(16)), "bias is torch.float16, not torch.float32"),
    (
        "scale elsewhere",
        lambda: k.w4a4_gemm(quantized()[0], tensor(3, dtype=torch.float32, device="cuda:1"), *weight()),
        "cuda:1 and",
    ),
    (
        "seed's rank",
        lambda: k.flatquant_dynamic_quantize(tensor(2, 3, 64), tensor(8, 8), tensor(8, 8)),
        "do not transform",
    ),
    (
        "seed's factors",
        lambda: k.flatquant_dynamic_quantize(tensor(3, 64), tensor(4, 4), tensor(8, 8)),
        "do not transform",
    ),
]


@pytest.mark.parametrize(("call", "said"), [case[1:] for case in TORCH_ERRORS], ids=[case[0] for case in TORCH_ERRORS])
def test_tensors_that_do_not_fit(call: Callable[[], object], said: str) -> None:
    with FakeTensorMode(), pytest.raises(FqonnxError, match=said):
        call()
