"""``tests/tensorrt/harness.cpp`` from Python: plugins taken through the life that TensorRT leads them, on the host or on a GPU."""

from __future__ import annotations

import ctypes
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from fqonnx.plugins.library import EXPORTS, FOLDER
from fqonnx.plugins.toolchain import find_toolchain

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

HERE = Path(__file__).parent / "tensorrt"

Array = np.ndarray[Any, Any]

FLOAT, HALF, INT8, INT32, BF16, INT4 = 0, 1, 2, 3, 7, 9
"""TensorRT's ``DataType``."""

TYPES: dict[Any, int] = {np.float32: FLOAT, np.float16: HALF, ml_dtypes.bfloat16: BF16, np.int8: INT8, np.int32: INT32}
NUMPY = {number: dtype for dtype, number in TYPES.items()}

FIELD_TYPES = {np.dtype(np.float32): 1, np.dtype(np.float64): 2, np.dtype(np.int32): 5, np.dtype(np.int8): 3, np.dtype(np.int64): 10}
"""TensorRT's ``PluginFieldType``."""
CHAR = 6

SOURCES = "0123456789abcdef"
"""What the host library says its sources are."""


def compile_host_library(folder: Path) -> Path:
    """The plugins, the C API's own host code, and kernels in plain loops: all of the library but CUDA."""
    out = folder / "libfqonnx_host.so"
    told = {"ARCHITECTURES": "host", "COMPILER": "g++", "SOURCES": SOURCES}
    code = [FOLDER / "kernels" / "api.cpp", HERE / "host_kernels.cpp", *sorted((FOLDER / "tensorrt").glob("*.cpp"))]
    flags = [f"-I{FOLDER / 'kernels'}", *(f'-DFQ_{name}="{value}"' for name, value in told.items()), "-Xcompiler=-ffp-contract=off"]
    link = ["-cudart=none", f"-Xlinker=--version-script={FOLDER / EXPORTS},-z,defs"]
    _compile([str(find_toolchain().nvcc), *flags, *map(str, code), *link], out, "-Xcompiler=")
    return out


def compile_harness(folder: Path) -> Path:
    """The harness, on our declarations of TensorRT's interfaces."""
    out = folder / "harness.so"
    _compile(["g++", f"-I{FOLDER / 'tensorrt'}", str(HERE / "harness.cpp")], out, "")
    return out


def _compile(command: list[str], out: Path, prefix: str) -> None:
    host = [prefix + flag for flag in ("-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra", "-Werror")]
    done = subprocess.run(
        [*command, "-std=c++17", "-O1", "-shared", *host, "-ldl", "-o", str(out)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


class _Field(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_int64),
        ("type", ctypes.c_int32),
        ("length", ctypes.c_int32),
    )


class _Dims(ctypes.Structure):
    _fields_ = (("rank", ctypes.c_int32), ("d", ctypes.c_int64 * 8))


class _Tensor(ctypes.Structure):
    _fields_ = (("name", ctypes.c_char_p), ("type", ctypes.c_int32), ("dims", _Dims), ("shapes", _Dims * 3))


_TIMED = ctypes.CFUNCTYPE(None, ctypes.c_int32, ctypes.c_int64, ctypes.POINTER(ctypes.c_void_p))


def _dims(shape: Sequence[int]) -> _Dims:
    dims = _Dims(len(shape))
    dims.d[: len(shape)] = list(shape)
    return dims


class Refused(Exception):  # noqa: N818 - what TensorRT would report
    """A step that failed: the harness's word for it, and what the plugin logged."""


@dataclass(frozen=True)
class Operand:
    """A tensor: its data as numpy has it, and its type and shape as TensorRT does, which differ for 4-bit weights."""

    name: str
    array: Array
    type: int
    shape: tuple[int, ...]

    @classmethod
    def of(cls, name: str, array: Array) -> Operand:
        return cls(name, array.copy(), TYPES[array.dtype.type], array.shape)


class Host:
    """Memory in which the host library computes."""

    stream = 0

    def put(self, array: Array) -> tuple[object, int]:
        """A copy, and its address: on a border of 256 bytes, as TensorRT's are."""
        room = np.zeros(array.nbytes + 256, np.uint8)
        start = -room.ctypes.data % 256
        place = room[start : start + array.nbytes]
        place[:] = array.reshape(-1).view(np.uint8)
        return place, room.ctypes.data + start

    def get(self, kept: object, like: Array) -> Array:
        assert isinstance(kept, np.ndarray)
        return kept.view(like.dtype).reshape(like.shape)


class Device:
    """Memory of the current CUDA device, and a stream of its own."""

    def __init__(self) -> None:
        import torch

        self.torch = torch
        self.torch_stream = torch.cuda.Stream()
        self.stream: int = self.torch_stream.cuda_stream

    def put(self, array: Array) -> tuple[object, int]:
        place = self.torch.from_numpy(array.reshape(-1).view(np.uint8).copy()).cuda()
        self.torch.cuda.synchronize()
        return place, place.data_ptr()

    def get(self, kept: Any, like: Array) -> Array:
        self.torch_stream.synchronize()
        return kept.cpu().numpy().view(like.dtype).reshape(like.shape)


@dataclass
class Call:
    """Operands in memory, outputs full of rubbish and a workspace, for one enqueue."""

    memory: Host | Device
    outputs: list[Array]
    inputs: list[Operand] = field(default_factory=list)
    kept: list[object] = field(default_factory=list)
    addresses: list[int] = field(default_factory=list)

    def fill(self, inputs: Sequence[Operand], workspace: int) -> None:
        self.inputs = list(inputs)
        rubbish = [np.full(output.nbytes, 0x5A, np.uint8) for output in self.outputs]
        for array in (*(operand.array for operand in inputs), *rubbish):
            self._add(array)
        if workspace:
            self._add(np.full(workspace, 0x5A, np.uint8))
        else:
            self.addresses.append(0)

    def results(self) -> list[Array]:
        kept = self.kept[len(self.inputs) :]
        return [self.memory.get(place, like) for place, like in zip(kept, self.outputs, strict=False)]

    def _add(self, array: Array) -> None:
        place, address = self.memory.put(array)
        self.kept.append(place)
        self.addresses.append(address)


class Harness:
    """One library under one major version of TensorRT."""

    def __init__(self, harness: Path, library: Path, major: int = 11, memory: Host | Device | None = None) -> None:
        self._c = ctypes.CDLL(str(harness))
        for name in ("open", "build", "context"):
            getattr(self._c, f"harness_{name}").restype = ctypes.c_void_p
        for name in ("messages", "trace"):
            getattr(self._c, f"harness_{name}").restype = ctypes.c_char_p
        self._c.harness_workspace.restype = ctypes.c_int64
        self.memory = memory or Host()
        self._library = ctypes.c_void_p(self._c.harness_open(str(library).encode(), major))
        assert self._library, self.messages()

    def messages(self) -> str:
        """What was logged since the last look."""
        told: bytes = self._c.harness_messages()
        return told.decode()

    def build(
        self,
        op: str,
        fields: Mapping[str, Any],
        profile: Sequence[Sequence[Operand]],
        outputs: Sequence[Array] | None = None,
        check: Callable[[int, list[Array]], None] | None = None,
    ) -> Engine:
        """Make an engine of one plugin.

        Args:
            op: Its name.
            fields: Its attributes: a numpy array is handed over as it is, bytes as characters.
            profile: Its inputs at the least, the optimal and the largest shapes; a dimension in which they differ is open.
            outputs: Arrays like those of the optimal shapes; with them every tactic is timed.
            check: Called with each tactic and its outputs.

        Raises:
            Refused: A step failed.
        """
        held = [(name, field_data(value)) for name, value in fields.items()]
        given = (_Field * len(held))(
            *(_Field(name.encode(), data.ctypes.data, data.nbytes, kind, length) for name, (data, kind, length) in held)
        )
        tensors = (_Tensor * len(profile[1]))()
        for index, (least, best, most) in enumerate(zip(*profile, strict=True)):
            shapes = (least.shape, best.shape, most.shape)
            open_shape = [sizes[0] if len(set(sizes)) == 1 else -1 for sizes in zip(*shapes, strict=True)]
            tensors[index] = _Tensor(best.name.encode(), best.type, _dims(open_shape), (_Dims * 3)(*map(_dims, shapes)))
        call: Call | None = None
        problems: list[BaseException] = []

        def timed(tactic: int, workspace: int, data: Any) -> None:
            nonlocal call
            try:
                if data:
                    call = Call(self.memory, list(outputs or ()))
                    call.fill(profile[1], workspace)
                    for index, address in enumerate(call.addresses):
                        data[index] = address
                elif check is not None and call is not None:
                    check(tactic, call.results())
            except BaseException as error:  # noqa: BLE001 - it cannot pass through C++, and is raised again below
                problems.append(error)

        callback = _TIMED(timed) if outputs is not None else _TIMED()
        made = self._c.harness_build(
            self._library, op.encode(), given, len(held), tensors, len(tensors), callback, ctypes.c_void_p(self.memory.stream)
        )
        if problems:
            raise problems[0]
        if not made:
            raise Refused(self.messages())
        return Engine(self, ctypes.c_void_p(made))

    @property
    def c(self) -> ctypes.CDLL:
        return self._c

    @property
    def library(self) -> ctypes.c_void_p:
        return self._library


class Engine:
    """What a build leaves: a plugin's name and state."""

    def __init__(self, harness: Harness, handle: ctypes.c_void_p) -> None:
        self.harness = harness
        self.handle = handle
        self.trace: list[str] = harness.c.harness_trace(handle).decode().splitlines()
        self.workspace: int = harness.c.harness_workspace(handle)

    def told(self, what: str) -> list[str]:
        """The rest of the trace's lines that begin so."""
        return [line.removeprefix(what).strip() for line in self.trace if line.startswith(what)]

    def context(self, *, drop: str | None = None, tactic: int = -(2**31)) -> Context:
        """Load the engine and attach the plugin to a context.

        Args:
            drop: A field of the state to leave out.
            tactic: In the place of the last one that was timed.

        Raises:
            Refused: The plugin was not made.
        """
        made = self.harness.c.harness_context(self.harness.library, self.handle, drop.encode() if drop else None, tactic)
        if not made:
            raise Refused(self.harness.messages())
        return Context(self, ctypes.c_void_p(made))

    def __del__(self) -> None:
        self.harness.c.harness_free_engine(self.handle)


class Context:
    """An engine's plugin, ready to run."""

    def __init__(self, engine: Engine, handle: ctypes.c_void_p) -> None:
        self._engine = engine
        self._handle = handle

    def prepare(self, inputs: Sequence[Operand], outputs: Sequence[Array], *, workspace: int | None = None) -> Call:
        """Put operands into memory, and make room for outputs and for a workspace; its bytes are by default those of the build."""
        call = Call(self._engine.harness.memory, list(outputs))
        call.fill(inputs, self._engine.workspace if workspace is None else workspace)
        return call

    def enqueue(self, call: Call) -> None:
        """Set shapes and enqueue, on the memory's stream.

        Raises:
            Refused: ``onShapeChange`` or ``enqueue`` did not return 0.
        """
        harness = self._engine.harness
        every = [*call.inputs, *(Operand.of("", output) for output in call.outputs)]
        tensors = (_Tensor * len(every))(*(_Tensor(b"", operand.type, _dims(operand.shape)) for operand in every))
        data = (ctypes.c_void_p * len(call.addresses))(*call.addresses)
        code = harness.c.harness_run(self._handle, tensors, data, ctypes.c_void_p(harness.memory.stream))
        if code:
            raise Refused(f"{('onShapeChange', 'enqueue')[code - 1]} failed\n{harness.messages()}")

    def run(self, inputs: Sequence[Operand], outputs: Sequence[Array], *, workspace: int | None = None) -> list[Array]:
        """Prepare, enqueue, and get the outputs.

        Args:
            inputs: The operands.
            outputs: Arrays like the outputs.
            workspace: Bytes given; None is what the engine was built with.

        Raises:
            Refused: As ``enqueue``.
        """
        call = self.prepare(inputs, outputs, workspace=workspace)
        self.enqueue(call)
        return call.results()

    def __del__(self) -> None:
        self._engine.harness.c.harness_free_context(self._handle)


def field_data(value: Any) -> tuple[Array, int, int]:
    """A field's data, type and number of values."""
    if isinstance(value, bytes):
        return np.frombuffer(value or b"\0", np.uint8), CHAR, len(value)
    array = np.atleast_1d(np.asarray(value))
    if not isinstance(value, np.ndarray | np.generic):  # as the parser of ONNX models has it
        array = array.astype(np.float32 if array.dtype.kind == "f" else np.int32)
    return array, FIELD_TYPES[array.dtype], array.size
