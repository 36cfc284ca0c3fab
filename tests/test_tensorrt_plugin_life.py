"""TensorRT plugins from creation to enqueue, in a harness that does with them what TensorRT does: kernels in plain loops, or on a GPU."""

from __future__ import annotations

import ctypes
import math
import shutil
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from fqonnx.ops import reference
from fqonnx.ops.bodies import function_for
from fqonnx.ops.layout import LAYOUTS, pack_int4, to_layout
from fqonnx.plugins import library
from tests.plugin_support import require_compiler
from tests.rewriting import matrix
from tests.tensorrt_fields import BAD_FIELDS, BadField
from tests.tensorrt_harness import (
    BF16,
    FLOAT,
    HALF,
    INT4,
    INT8,
    NUMPY,
    SOURCES,
    Device,
    Harness,
    Operand,
    Refused,
    compile_harness,
    compile_host_library,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tests.tensorrt_harness import Array

TYPES = pytest.mark.parametrize("dtype", [FLOAT, HALF, BF16], ids=["fp32", "fp16", "bf16"])
MAJORS = pytest.mark.parametrize("major", [10, 11])


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tensorrt")


@pytest.fixture(scope="session")
def harness_path(folder: Path) -> Path:
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    return compile_harness(folder)


@pytest.fixture(scope="session")
def host_library(folder: Path) -> Path:
    """Kernels in plain loops under the library's own host code."""
    require_compiler()
    return compile_host_library(folder)


@pytest.fixture
def harness(harness_path: Path, host_library: Path) -> Harness:
    return Harness(harness_path, host_library)


# --- ops to build -----------------------------------------------------------------------------------------------------------------------


@dataclass
class Quantizer:
    """An op that ends in FlatQuantize, its constants, and what it is to give."""

    op: str = "FlatQuantize"
    k: int = 64
    factors: tuple[int, int] = (8, 8)
    dtype: int = HALF
    bits: int = 4
    packed: int = 0
    gate: int = 0
    epsilon: float = 1e-5

    @property
    def fields(self) -> dict[str, Any]:
        fields: dict[str, Any] = {"bits": self.bits, "packed": self.packed}
        if self.op.startswith("Silu"):
            fields["gate"] = self.gate
        if "Norm" in self.op:
            fields["epsilon"] = self.epsilon
        return fields

    def inputs(self, *lead: int) -> list[Operand]:
        rng = np.random.default_rng(self.k + sum(lead))
        columns = 2 * self.k if self.op.startswith("Silu") else self.k
        dtype = NUMPY[self.dtype]

        def data(name: str, *shape: int, base: float = 0.0) -> Operand:
            return Operand.of(name, (base + 3 * rng.standard_normal(shape)).astype(dtype))

        operands = [data("x", *lead, columns)]
        if self.op.startswith("Add"):
            operands.append(data("residual", *lead, columns))
        constants = np.random.default_rng(7)
        if "Norm" in self.op:
            operands.append(Operand.of("gamma", (1 + 0.2 * constants.standard_normal(self.k)).astype(dtype)))
        left, right = (matrix(constants, n).astype(np.float32) for n in self.factors)
        return [*operands, Operand.of("left", left), Operand.of("right", right), Operand.of("clip", np.array(0.9, np.float32))]

    def expected(self, inputs: Sequence[Operand]) -> list[Array]:
        *prologue, left, right, clip = (operand.array for operand in inputs)
        x, factors, kept = prologue[0], (left, right, float(clip)), {"bits": self.bits, "packed": bool(self.packed)}
        if self.op == "FlatQuantize":
            return list(reference.flat_quantize(x, *factors, **kept))
        if self.op == "SiluMulFlatQuantize":
            return list(reference.silu_mul_flat_quantize(x, *factors, gate=self.gate, **kept))
        if self.op == "RmsNormFlatQuantize":
            return list(reference.rms_norm_flat_quantize(x, prologue[1], *factors, epsilon=self.epsilon, **kept))
        return list(reference.add_rms_norm_flat_quantize(x, *prologue[1:], *factors, epsilon=self.epsilon, **kept))

    def compare(self, got: Sequence[Array], expected: Sequence[Array]) -> None:
        eps = {FLOAT: 2.0**-10, HALF: 2.0**-10, BF16: 2.0**-7}[self.dtype]
        np.testing.assert_allclose(got[1], expected[1], rtol=eps)
        q, codes = (reference.unpack_rows(value[0]) if self.packed else value[0] for value in (got, expected))
        # A code is moved by the error of its value: up to 2^(bits - 1) steps of `eps` of a step each.
        difference = np.abs(q.astype(int) - codes)
        assert difference.max(initial=0) <= 1 + 2 ** (self.bits - 1) * eps
        assert np.count_nonzero(difference) <= difference.size * 2 ** (self.bits - 1) * eps + 2
        for one, other in zip(got[2:], expected[2:], strict=True):
            np.testing.assert_array_equal(one, other)


@dataclass
class Gemm:
    n: int = 32
    k: int = 64
    groups: int = 1
    dtype: int = HALF
    packed: int = 0
    layout: str = "plain"
    op: str = field(default="W4A4Gemm", init=False)

    @property
    def fields(self) -> dict[str, Any]:
        layout = LAYOUTS[self.layout]
        numbers = {FLOAT: 1, HALF: 10, BF16: 16}
        return {
            "packed": self.packed,
            "layout": self.layout.encode() + b"\0",  # as the parser has it
            "layout_shape": list(layout.shape),
            "layout_perm": list(layout.perm),
            "dtype": numbers[self.dtype],
        }

    def _weight(self) -> Array:
        return np.random.default_rng(3).integers(-8, 8, (self.n, self.k)).astype(np.int8)

    def inputs(self, *lead: int) -> list[Operand]:
        rng = np.random.default_rng(sum(lead))
        q = rng.integers(-8, 8, (*lead, self.k)).astype(np.int8)
        constants = np.random.default_rng(4)
        w_scale = constants.uniform(0.5, 2, (self.n, self.groups)).astype(np.float32)
        return [
            Operand.of("q", reference.pack_rows(q) if self.packed else q),
            Operand.of("scale", rng.uniform(0.01, 0.1, (*lead, 1)).astype(np.float32)),
            Operand("w", pack_int4(to_layout(self._weight(), self.layout)), INT4, (self.n, self.k)),
            Operand.of("w_scale", w_scale),
            Operand.of("bias", constants.standard_normal(self.n).astype(np.float32)),
        ]

    def expected(self, inputs: Sequence[Operand]) -> list[Array]:
        q, scale, _, w_scale, bias = (operand.array for operand in inputs)
        w = to_layout(self._weight(), self.layout)
        return [reference.w4a4_gemm(q, scale, w, w_scale, bias, packed=bool(self.packed), layout=self.layout, dtype=NUMPY[self.dtype])]

    def compare(self, got: Sequence[Array], expected: Sequence[Array]) -> None:
        if self.groups == 1:
            np.testing.assert_array_equal(got[0], expected[0])
        else:
            eps = {FLOAT: 2.0**-20, HALF: 2.0**-10, BF16: 2.0**-7}[self.dtype]
            np.testing.assert_allclose(got[0].astype(np.float32), expected[0].astype(np.float32), rtol=eps, atol=1e-4)


Problem = Quantizer | Gemm
LEADS = ((1, 1), (2, 5), (2, 100))
"""The profile: least, optimal and largest."""


def walk(harness: Harness, problem: Problem, leads: Sequence[tuple[int, ...]] = LEADS) -> tuple[Any, list[int]]:
    """Build, time every tactic at the optimal shape, load, and run shapes of the profile in two contexts; the engine and its tactics."""
    profile = [problem.inputs(*lead) for lead in leads]
    expected = problem.expected(profile[1])
    timed: list[int] = []

    def check(tactic: int, outputs: list[Array]) -> None:
        problem.compare(outputs, expected)
        timed.append(tactic)

    engine = harness.build(problem.op, problem.fields, profile, expected, check)
    contexts = engine.context(), engine.context()
    middle = tuple((low + high) // 2 for low, high in zip(leads[0], leads[2], strict=True))
    for lead in (*leads, middle, leads[0]):
        inputs = problem.inputs(*lead)
        expected = problem.expected(inputs)
        for context in contexts:
            problem.compare(context.run(inputs, expected), expected)
    assert harness.messages() == ""
    return engine, timed


# --- the whole life, on the host --------------------------------------------------------------------------------------------------------


@TYPES
def test_the_life_of_flat_quantize(harness: Harness, dtype: int) -> None:
    engine, timed = walk(harness, Quantizer(dtype=dtype))
    assert engine.trace == [
        "plugin FlatQuantize 1 fqonnx",
        "output 2 [x.0, x.1, 64]",
        "output 0 [x.0, x.1, 1]",
        *(f"formats {x}:0 0:0 0:0 0:0 2:0 0:0" for x in (0, 1, 7)),
        "tactics",
        "workspace 0",
        f"timing bits=4 packed=0 sources: {SOURCES}",
        "metadata bits=4 packed=0",
        "state bits int32 4",
        "state packed int32 0",
    ]
    assert timed == [0]


QUANTIZERS = [
    Quantizer(k=96, factors=(4, 8)),  # three blocks
    Quantizer(k=64, factors=(1, 1)),
    Quantizer(bits=8),
    Quantizer(packed=1),
    Quantizer(k=90, factors=(9, 10)),  # no multiple of 16 bytes
    Quantizer(k=33, factors=(3, 11), dtype=BF16),
    Quantizer("RmsNormFlatQuantize", epsilon=0.5),
    *(
        Quantizer(op, k, factors, dtype, packed=packed, gate=gate)
        for op, gate in (("SiluMulFlatQuantize", 0), ("SiluMulFlatQuantize", 1), ("RmsNormFlatQuantize", 0), ("AddRmsNormFlatQuantize", 0))
        for k, factors, dtype, packed in (
            (64, (8, 8), HALF, 0),
            (64, (8, 8), FLOAT, 1),
            (64, (8, 8), BF16, 0),
            (90, (9, 10), HALF, 0),
            (33, (3, 11), FLOAT, 0),
        )
    ),
]


@pytest.mark.parametrize("problem", QUANTIZERS, ids=str)
def test_the_life_of_ops_that_end_in_flat_quantize(harness: Harness, problem: Quantizer) -> None:
    engine, _ = walk(harness, problem)
    assert engine.told("plugin") == [f"{problem.op} 1 fqonnx"]
    outputs = [(INT8, problem.k // (1 + problem.packed)), (FLOAT, 1)]
    if problem.op.startswith("Add"):
        outputs.append((problem.dtype, problem.k))
    assert engine.told("output") == [f"{kind} [x.0, x.1, {columns}]" for kind, columns in outputs]
    assert len(engine.told("formats")) == 3
    assert engine.told("state") == [
        f"{name} {'float32' if name == 'epsilon' else 'int32'} {value:{'.6f' if name == 'epsilon' else ''}}"
        for name, value in problem.fields.items()
    ]
    # 200 rows, of 16 bytes' multiples, once or for gate and up each, where the rows of the input are no such multiple.
    size = 4 if problem.dtype == FLOAT else 2
    parts = 2 if problem.op.startswith("Silu") else 1
    aligned = problem.k * size * parts % 16 == 0 and problem.gate * problem.k * size % 16 == 0
    assert engine.workspace == (0 if aligned else 200 * parts * math.ceil(problem.k * size / 16) * 16)


@TYPES
def test_the_life_of_w4a4_gemm(harness: Harness, dtype: int) -> None:
    engine, timed = walk(harness, Gemm(dtype=dtype))
    tactics = [4 << 16 | tile for tile in range(1, 6)]  # 10 rows take 4 bits
    number = {FLOAT: 1, HALF: 10, BF16: 16}[dtype]
    assert engine.trace == [
        "plugin W4A4Gemm 1 fqonnx",
        f"output {dtype} [q.0, q.1, 32]",
        f"formats 2:0 0:0 9:0 0:0 0:0 {dtype}:0",
        f"tactics {' '.join(map(str, tactics))}",
        "workspace 0",
        f"timing packed=0 layout=0 dtype={number} sources: {SOURCES}",
        f"metadata packed=0 layout=0 dtype={number}",
        "state packed int32 0",
        "state layout int32 0",
        f"state dtype int32 {number}",
    ]
    assert timed == [0, *tactics]


@pytest.mark.parametrize("problem", [Gemm(k=256, layout="k128"), Gemm(k=256, groups=2, layout="k128"), Gemm(n=48, groups=2)], ids=str)
def test_weights_of_all_layouts(harness: Harness, problem: Gemm) -> None:
    engine, _ = walk(harness, problem)
    assert f"layout int32 {int(problem.layout == 'k128')}" in engine.told("state")


def test_packed_codes_on_a_device_that_takes_them(
    harness_path: Path, host_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FQ_TEST_CAPABILITY", "86")
    engine, timed = walk(Harness(harness_path, shutil.copy(host_library, tmp_path)), Gemm(packed=1))
    assert len(timed) == 4
    assert "packed int32 1" in engine.told("state")


def test_a_device_that_does_not_take_them_refuses_the_build(harness: Harness) -> None:
    with pytest.raises(Refused) as caught:
        walk(harness, Gemm(packed=1))
    first, second = str(caught.value).splitlines()
    assert first == "configurePlugin failed"
    assert second.startswith("fqonnx: W4A4Gemm (layer): no W4A4Gemm kernel takes this on compute capability 9.0: kernel wgmma_s8: ")
    assert "kernel mma_s8: wants container int8, not packed" in second


def test_no_rows(harness: Harness) -> None:
    for problem in (Quantizer(k=90, factors=(9, 10)), Gemm()):
        walk(harness, problem, leads=((0, 1), (2, 5), (2, 100)))


def test_ranks_from_one_on(harness: Harness) -> None:
    for problem in (Quantizer("AddRmsNormFlatQuantize"), Gemm()):
        walk(harness, problem, leads=((), (), ()))
        walk(harness, problem, leads=((1, 1, 1, 2, 1), (1, 2, 1, 2, 3), (1, 2, 1, 2, 4)))


def test_a_tactic_is_for_about_the_rows_it_was_timed_with(harness: Harness) -> None:
    """Seen by one that the kernel does not have: where it is used, the kernel refuses it."""
    problem = Gemm()
    engine = harness.build(problem.op, problem.fields, [problem.inputs(*lead) for lead in LEADS])
    context = engine.context(tactic=4 << 16 | 9)
    for rows, is_used in ((1, False), (3, False), (4, True), (8, True), (15, True), (31, True), (32, False), (200, False)):
        inputs = problem.inputs(rows)
        expected = problem.expected(inputs)
        if is_used:
            with pytest.raises(Refused, match=r"enqueue failed\nfqonnx: W4A4Gemm \(layer\): tactic is 9, and kernel mma_s8 has 1 to 5"):
                context.run(inputs, expected)
        else:
            problem.compare(context.run(inputs, expected), expected)
    with pytest.raises(Refused, match=r"setTactic failed\nfqonnx: W4A4Gemm \(layer\): tactic is -7, not 0 or more"):
        engine.context(tactic=-7)


# --- what is refused --------------------------------------------------------------------------------------------------------------------


def replaced(inputs: list[Operand], name: str, array: Array) -> list[Operand]:
    return [Operand.of(name, array) if operand.name == name else operand for operand in inputs]


OF_TYPES, OF_SHAPES, AT_CONFIGURATION = "getOutputDataTypes", "getOutputShapes", "configurePlugin"
NORM, SUM_NORM = "RmsNormFlatQuantize", "AddRmsNormFlatQuantize"


def zeros(*shape: int, dtype: Any = np.float32) -> Array:
    return np.zeros(shape, dtype)


REFUSED: list[tuple[Problem, str, Array, str, str]] = [
    (Quantizer(), "x", zeros(2, 64, dtype=np.int8), OF_TYPES, "activations are of type INT8, not FLOAT, HALF or BF16"),
    (Quantizer(), "left", zeros(8, 8, dtype=np.float16), OF_TYPES, "input left is of type HALF, not FLOAT"),
    (Quantizer(), "clip", zeros(dtype=np.int8), OF_TYPES, "input clip is of type INT8, not FLOAT"),
    (Quantizer(NORM), "gamma", zeros(64), OF_TYPES, "input gamma is of type FLOAT, not HALF"),
    (Gemm(), "scale", zeros(2, 1, dtype=np.float16), OF_TYPES, "input scale is of type HALF, not FLOAT"),
    (Gemm(), "w", zeros(32, 64, dtype=np.int8), OF_TYPES, "input w is of type INT8, not INT4"),
    (Quantizer(), "x", zeros(dtype=np.float16), OF_SHAPES, "input x has rank 0, not 1 or more"),
    (
        Quantizer("SiluMulFlatQuantize"),
        "x",
        zeros(2, 129, dtype=np.float16),
        OF_SHAPES,
        "the columns of gate_up, which are two halves, are 129, an odd number",
    ),
    (
        Quantizer(packed=1),
        "x",
        zeros(2, 63, dtype=np.float16),
        OF_SHAPES,
        "the codes of a row, which are packed two a byte, are 63, an odd number",
    ),
    (Quantizer(), "left", zeros(8, 7), AT_CONFIGURATION, "left [8, 7] is not square"),
    (Quantizer(), "right", zeros(8), AT_CONFIGURATION, "right [8] is not square"),
    (Quantizer(), "clip", zeros(2), AT_CONFIGURATION, "clip [2] is not one number"),
    (Quantizer(), "right", zeros(7, 7), AT_CONFIGURATION, "k is 64, not a multiple of n1 n2 = 8 * 7"),
    (Quantizer(), "left", zeros(300, 300), AT_CONFIGURATION, "n1 is 300, not 1 to 256"),
    (Quantizer(NORM), "gamma", zeros(63, dtype=np.float16), AT_CONFIGURATION, "gamma [63] does not fit x [ROWS, 64]"),
    (Quantizer(SUM_NORM), "residual", zeros(1, 64, dtype=np.float16), AT_CONFIGURATION, "residual [1, 64] does not fit x [2, 64]"),
    (Quantizer(SUM_NORM), "residual", zeros(64, dtype=np.float16), AT_CONFIGURATION, "residual [64] does not fit x [ROWS, 64]"),
    (Gemm(), "w_scale", zeros(31, 1), AT_CONFIGURATION, "w [32, 64], w_scale [31, 1] and bias [32] do not fit"),
    (Gemm(), "bias", zeros(32, 1), AT_CONFIGURATION, "w [32, 64], w_scale [32, 1] and bias [32, 1] do not fit"),
    (Gemm(), "q", zeros(2, 60, dtype=np.int8), AT_CONFIGURATION, "q [2, 60] and scale [ROWS, 1] do not fit w [32, 64]"),
    (Gemm(), "scale", zeros(3, 1), AT_CONFIGURATION, "q [2, 64] and scale [3, 1] do not fit w [32, 64]"),
    (Gemm(), "scale", zeros(2, 2), AT_CONFIGURATION, "q [ROWS, 64] and scale [2, 2] do not fit w [32, 64]"),
    (Gemm(n=24), "bias", zeros(24), AT_CONFIGURATION, "n is 24, not a multiple of 16"),
]


@pytest.mark.parametrize(("problem", "name", "array", "step", "message"), REFUSED)
def test_operands_that_do_not_fit(harness: Harness, problem: Problem, name: str, array: Array, step: str, message: str) -> None:
    profile = [replaced(problem.inputs(rows), name, array) for rows in (1, 2, 200)]
    with pytest.raises(Refused) as caught:
        harness.build(problem.op, problem.fields, profile)
    first, second = str(caught.value).splitlines()
    assert first == f"{step} failed"
    title, told = second.split(": ", 2)[1:]
    assert title == f"{problem.op} (layer)"
    assert told in (message.replace("ROWS", "-1"), message.replace("ROWS", "2"))  # as declared, or as the profile has it


@pytest.mark.parametrize(
    ("problem", "name", "array", "message"), [(*operand, message) for *operand, step, message in REFUSED if step == AT_CONFIGURATION]
)
def test_shapes_are_checked_when_they_change(harness: Harness, problem: Problem, name: str, array: Array, message: str) -> None:
    """All that a builder would have been told is told by ``onShapeChange`` too, before anything is enqueued."""
    good = problem if not isinstance(problem, Gemm) else Gemm()
    context = harness.build(good.op, good.fields, [good.inputs(rows) for rows in (1, 2, 200)]).context()
    outputs = good.expected(good.inputs(2))
    with pytest.raises(Refused) as caught:
        context.run(replaced(problem.inputs(2), name, array), outputs)
    told = message.replace("ROWS", "2")
    assert str(caught.value) == f"onShapeChange failed\nfqonnx: {good.op} (layer): {told}"
    good.compare(context.run(good.inputs(2), outputs), outputs)


def test_weight_groups_that_no_kernel_takes(harness: Harness) -> None:
    problem = Gemm(k=48, groups=3)
    with pytest.raises(Refused, match=r'configurePlugin failed\nfqonnx: W4A4Gemm \(layer\): .* wants weight groups of "0 -1" .*, not 16$'):
        walk(harness, problem)


def test_a_state_that_is_not_whole(harness: Harness) -> None:
    for problem in (Quantizer("RmsNormFlatQuantize"), Gemm()):
        engine = harness.build(problem.op, problem.fields, [problem.inputs(*lead) for lead in LEADS])
        for line in engine.told("state"):
            name = line.split()[0]
            message = f"the engine holds no field {name}: it was built with another version of fqonnx, build it anew"
            with pytest.raises(Refused, match=rf"^createPlugin failed\nfqonnx: {problem.op} \(layer\): {message}$"):
                engine.context(drop=name)


def test_an_enqueue_without_its_workspace(harness: Harness) -> None:
    problem = Quantizer(k=90, factors=(9, 10))
    engine = harness.build(problem.op, problem.fields, [problem.inputs(*lead) for lead in LEADS])
    inputs = problem.inputs(2, 5)
    with pytest.raises(Refused, match=r"^enqueue failed\nfqonnx: FlatQuantize \(layer\): no workspace was given for 10 rows of 180 bytes$"):
        engine.context().run(inputs, problem.expected(inputs), workspace=0)


@pytest.mark.parametrize("case", BAD_FIELDS, ids=str)
def test_fields_are_checked_one_by_one(harness: Harness, case: BadField) -> None:
    with pytest.raises(Refused, match=r"^createPlugin failed\n") as caught:
        harness.build(case.op, case.fields, [[], [], []])
    assert str(caught.value).splitlines()[1:] == [f"fqonnx: {case.op} (layer): {case.message}"]


MALFORMED = [
    "field bits is there twice",
    "field 0 has no name",
    "field bits has 1 values at null",
    "field bits has -1 values, not 0 to 1024",
    "field packed is of type 99, not INT32",
    "the collection of fields has 1 at null",
    "the collection of fields has -1 at null",
    "the collection of fields is null",
    "phase is 2, not 0 (build) or 1 (runtime)",
]


def test_malformed_collections_make_no_plugin(harness: Harness) -> None:
    for which, message in enumerate(MALFORMED):
        assert harness.c.harness_create_malformed(harness.library, which) == 0, harness.messages()
        assert harness.messages() in (f"fqonnx: FlatQuantize (layer): {message}", f"fqonnx: FlatQuantize: {message}")
    assert harness.c.harness_create_malformed(harness.library, 99) == len(MALFORMED)


@pytest.mark.parametrize("fields", [{}, {"bits": np.int64(4), "packed": np.int64(0)}], ids=["left out", "int64"])
def test_fields_that_may_be_otherwise(harness: Harness, fields: dict[str, Any]) -> None:
    problem = Quantizer()
    engine = harness.build(problem.op, fields, [problem.inputs(*lead) for lead in LEADS])
    assert engine.told("state") == ["bits int32 4", "packed int32 0"]


def test_defaults_are_those_of_the_functions(harness: Harness) -> None:
    """An attribute that a node leaves out is what the op's function, the meaning of the op, says it is."""
    for problem in (
        Quantizer(),
        *(Quantizer(op) for op in ("SiluMulFlatQuantize", "RmsNormFlatQuantize", "AddRmsNormFlatQuantize")),
        Gemm(dtype=FLOAT),
    ):
        defaults = {
            name: attribute for name, attribute in function_for(problem.op, 21).attributes.items() if not name.startswith("plugin_")
        }
        engine = harness.build(problem.op, {}, [problem.inputs(*lead) for lead in LEADS])
        state = dict(line.split()[::2] for line in engine.told("state"))
        for name, value in state.items():
            default = defaults[name].value
            assert float(value) == pytest.approx({"plain": 0}.get(default, default))
        assert state.keys() | {"layout_shape", "layout_perm"} >= defaults.keys()


@MAJORS
def test_what_fails_is_in_tensorrts_log(harness_path: Path, host_library: Path, major: int) -> None:
    """The interface of loggers differs between TensorRT 10 and 11; one library speaks both."""
    harness = Harness(harness_path, host_library, major)
    with pytest.raises(Refused, match="field bits is 5, not 4 or 8"):
        harness.build("FlatQuantize", {"bits": 5}, [[], [], []])


def test_without_a_log_that_is_known_it_goes_to_standard_error(
    harness_path: Path, host_library: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    harness = Harness(harness_path, shutil.copy(host_library, tmp_path), 9)
    with pytest.raises(Refused, match=r"^createPlugin failed$"):
        harness.build("FlatQuantize", {"bits": 5}, [[], [], []])
    assert capfd.readouterr().err == "fqonnx: FlatQuantize (layer): field bits is 5, not 4 or 8\n"


# --- the kernels themselves -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def built() -> Path:
    """The library with its CUDA kernels."""
    path = library.library_path()
    if path is None or not hasattr(ctypes.CDLL(str(path)), "getCreators"):
        pytest.skip("the kernels' library is not built, or without its part for TensorRT: fqonnx plugin build")
    return path


def has_gpu() -> bool:
    import torch

    return bool(torch.cuda.is_available())


def test_without_a_gpu_an_enqueue_fails_and_says_why(harness_path: Path, built: Path) -> None:
    """Everything before is told from sizes alone."""
    if has_gpu():
        pytest.skip("there is a CUDA device")
    harness = Harness(harness_path, built)
    for problem in (Quantizer(), Quantizer("AddRmsNormFlatQuantize")):
        engine = harness.build(problem.op, problem.fields, [problem.inputs(*lead) for lead in LEADS])
        inputs = problem.inputs(2, 5)
        with pytest.raises(Refused, match=rf"^enqueue failed\nfqonnx: {problem.op} \(layer\): cudaGetDevice: .*"):
            engine.context().run(inputs, problem.expected(inputs))
    with pytest.raises(Refused, match=r"^configurePlugin failed\nfqonnx: W4A4Gemm \(layer\): cudaGetDevice: "):
        harness.build("W4A4Gemm", Gemm().fields, [Gemm().inputs(*lead) for lead in LEADS])


@pytest.fixture
def gpu(harness_path: Path, built: Path) -> Harness:
    if not has_gpu():
        pytest.skip("no CUDA device")
    return Harness(harness_path, built, memory=Device())


OPS = ["FlatQuantize", "SiluMulFlatQuantize", "RmsNormFlatQuantize", "AddRmsNormFlatQuantize"]


@pytest.mark.gpu
@pytest.mark.parametrize(("k", "factors"), [(512, (4, 128)), (4096, (32, 128)), (90, (9, 10)), (33, (3, 11))])
@TYPES
@pytest.mark.parametrize("op", OPS)
def test_quantizers_on_a_gpu(gpu: Harness, op: str, dtype: int, k: int, factors: tuple[int, int]) -> None:
    walk(gpu, Quantizer(op, k=k, factors=factors, dtype=dtype, packed=(k + 1) % 2, gate=dtype % 2))


ON_A_GPU = [
    Gemm(256, 512, 1, HALF, 0, "k128"),
    Gemm(256, 512, 4, BF16, 0, "k128"),
    Gemm(48, 96, 1, FLOAT),
    Gemm(48, 96, 3, HALF),
]


@pytest.mark.gpu
@pytest.mark.parametrize("problem", ON_A_GPU, ids=str)
def test_every_tactic_of_the_gemm_on_a_gpu(gpu: Harness, problem: Gemm) -> None:
    import torch

    if problem.layout == "k128" and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("layout k128 is for compute capability 9.0")
    for leads in (LEADS, ((1,), (1,), (2048,)), ((1,), (700,), (2048,))):
        _, timed = walk(gpu, problem, leads)
        assert len(timed) > 1


@pytest.mark.gpu
@pytest.mark.parametrize("problem", [Quantizer(), Quantizer("SiluMulFlatQuantize", k=90, factors=(9, 10)), ON_A_GPU[-1]], ids=str)
def test_in_a_cuda_graph(gpu: Harness, problem: Problem) -> None:
    """Captured once, with the copy of rows that are on no border of 16 bytes, and replayed: nothing is left on the host's side."""
    import torch

    assert isinstance(gpu.memory, Device)
    context = gpu.build(problem.op, problem.fields, [problem.inputs(*lead) for lead in LEADS]).context()
    inputs = problem.inputs(2, 100)
    expected = problem.expected(inputs)
    context.run(inputs, expected)  # what is loaded on first use may not be loaded in a capture
    call = context.prepare(inputs, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=gpu.memory.torch_stream):
        context.enqueue(call)
    assert all((output.view(np.uint8) == 0x5A).all() for output in call.results())
    graph.replay()
    torch.cuda.synchronize()
    problem.compare(call.results(), expected)
