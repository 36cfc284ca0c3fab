"""Writes ONNX models of random weights, for samples that are about size and speed; one weight at a time is in memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import numpy as np
import onnx_ir as ir

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from types import TracebackType

    import numpy.typing as npt

IR_VERSION = 10


class GraphWriter:
    """A graph under construction; a context, since the weights' file is open until the graph is done.

    Args:
        path: The ``.onnx`` file; weights go to ``path`` + ``.data``.
        dtype: Type of the weights, and of constants that name no other.
        seed: Seed of the weights.
    """

    def __init__(self, path: Path, dtype: ir.DataType = ir.DataType.FLOAT16, seed: int = 0) -> None:
        self.dtype = dtype
        self._path, self._data = path, path.with_name(path.name + ".data")
        self._random = np.random.default_rng(seed)
        self._nodes: list[ir.Node] = []
        self._initializers: list[ir.Value] = []

    def __enter__(self) -> Self:
        self._file = self._data.open("wb")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.close()

    def node(self, op: str, inputs: Sequence[ir.Value | None], *, domain: str = "", name: str | None = None, **attributes: Any) -> ir.Value:
        """Add a node of one output."""
        return self.nodes(op, inputs, 1, domain=domain, name=name, **attributes)[0]

    def nodes(
        self, op: str, inputs: Sequence[ir.Value | None], outputs: int, *, domain: str = "", name: str | None = None, **attributes: Any
    ) -> Sequence[ir.Value]:
        """Add a node of several outputs, named ``NAME.out``, ``NAME.out1``, ...; None among the inputs is one left out."""
        node = ir.node(op, inputs, attributes, domain=domain, num_outputs=outputs, name=name or f"{op}_{len(self._nodes)}")
        for index, output in enumerate(node.outputs):
            output.name = f"{node.name}.out{index or ''}"
        self._nodes.append(node)
        return node.outputs

    def constant(self, name: str, value: Any, dtype: Any = None) -> ir.Value:
        """A small initializer, held in the graph."""
        return self._add(ir.Tensor(np.asarray(value, self.dtype.numpy() if dtype is None else dtype), name=name))

    def random(self, shape: tuple[int, ...], std: float, mean: float = 0.0) -> npt.NDArray[Any]:
        """Normally distributed values of ``dtype``."""
        values = self._random.standard_normal(shape, np.float32)
        values *= np.float32(std)
        values += np.float32(mean)
        return values.astype(self.dtype.numpy())

    def weight(self, name: str, values: npt.NDArray[Any]) -> ir.Value:
        """An initializer in the weights' file."""
        offset = self._file.tell()
        values.tofile(self._file)
        self._file.flush()  # numpy writes behind the file object's back
        shape = ir.Shape(values.shape)
        return self._add(
            ir.ExternalTensor(self._data.name, offset, values.nbytes, self.dtype, shape=shape, name=name, base_dir=self._data.parent)
        )

    def save(self, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value], *, name: str, opsets: dict[str, int]) -> None:
        """Write the graph."""
        graph = ir.Graph(inputs, outputs, nodes=self._nodes, initializers=self._initializers, opset_imports=opsets, name=name)
        ir.save(ir.Model(graph, ir_version=IR_VERSION), self._path)

    def _add(self, tensor: ir.TensorProtocol) -> ir.Value:
        value = ir.Value(name=tensor.name, const_value=tensor, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape))
        self._initializers.append(value)
        return value


def declared(name: str, dtype: ir.DataType, shape: Sequence[int | str], value: ir.Value | None = None) -> ir.Value:
    """A value named, typed and shaped as a graph's inputs and outputs are; None makes a new one, an input."""
    value = ir.Value() if value is None else value
    value.name, value.type, value.shape = name, ir.TensorType(dtype), ir.Shape(shape)
    return value
