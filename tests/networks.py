"""Small networks of blocks, written by hand: the tests of blocks and of their reconstruction share them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

from fqonnx.passes.linears import find
from fqonnx.passes.prepare import prepare
from tests import zoo

if TYPE_CHECKING:
    import onnx

    from fqonnx.passes.groups import LinearGroup

WIDTH = 64


class Network:
    """Writes a graph of blocks by hand; ``h`` is the residual stream.

    Args:
        width: Channels of the stream.
        name: Seed of the weights.
    """

    def __init__(self, width: int = WIDTH, name: str = "network") -> None:
        self.graph = zoo.Graph(name)
        self.width = width
        self.h = "x"

    def linear(self, x: str, name: str, n: int = 0) -> str:
        """A linear without a bias, to ``n`` channels or as many as the stream has."""
        k, n = (2 * self.width, self.width) if name.endswith("down") else (self.width, n or self.width)
        return self.graph.op("MatMul", x, self.graph.weight(k, n, scale=k**-0.5), name=f"/{name}/MatMul")

    def norm(self, x: str) -> str:
        """A layer norm with a gain and an offset."""
        gain, offset = self.graph.weight(self.width, mean=1.0), self.graph.weight(self.width)
        return self.graph.op("LayerNormalization", x, gain, offset)

    def attention(self, x: str, name: str, memory: str | None = None) -> str:
        """Attention of ``x`` to ``memory``, or to itself."""
        memory = memory or x
        q, k, v = self.linear(x, f"{name}.q"), self.linear(memory, f"{name}.k"), self.linear(memory, f"{name}.v")
        scores = self.graph.op("Softmax", self.graph.op("MatMul", q, self.graph.op("Transpose", k, perm=[0, 2, 1])), axis=-1)
        return self.linear(self.graph.op("MatMul", scores, v), f"{name}.o")

    def mlp(self, x: str, name: str) -> str:
        """Up, GELU, down."""
        return self.linear(self.graph.op("Gelu", self.linear(x, f"{name}.up", 2 * self.width)), f"{name}.down")

    def add(self, branch: str) -> str:
        """Add a branch to the stream."""
        self.h = self.graph.op("Add", self.h, branch)
        return self.h

    def layer(self, name: str) -> None:
        """A layer with norms before its branches."""
        self.add(self.attention(self.norm(self.h), name))
        self.add(self.mlp(self.norm(self.h), name))

    def proto(self, *outputs: str) -> onnx.ModelProto:
        """The model; by default it gives the stream."""
        return self.graph.model(list(outputs or (self.h,)), {"x": (zoo.FLOAT, ("batch", "seq", self.width))})

    def model(self, *outputs: str) -> tuple[ir.Model, tuple[LinearGroup, ...]]:
        """The same, prepared, and its groups."""
        model = prepare(ir.from_proto(self.proto(*outputs)))
        return model, find(model).groups
