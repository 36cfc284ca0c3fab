"""A model as stable, readable text: one line per value and node, no weights, nothing that depends on the libraries' versions."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir

if TYPE_CHECKING:
    from collections.abc import Iterator

_SMALL = 8


def graph_text(model: ir.Model) -> str:
    """Opsets, inputs, initializers (values of small ones), nodes and outputs, then each function, in the model's own order."""
    imports = ", ".join(f"{domain or 'ai.onnx'} {version}" for domain, version in sorted(model.opset_imports.items()))
    lines = [f"opset: {imports}; ir {model.ir_version}", *_graph_lines(model.graph, "")]
    for (domain, name, _), function in sorted(model.functions.items()):
        ports = f"({', '.join(v.name or '' for v in function.inputs)}) -> {', '.join(v.name or '' for v in function.outputs)}"
        lines += ["", f"function {domain}.{name}{ports}"]
        lines += [line for node in function for line in _node_lines(node, "  ")]
    return "\n".join(lines) + "\n"


def _graph_lines(graph: ir.Graph, indent: str) -> Iterator[str]:
    for value in graph.inputs:
        yield f"{indent}input {_described(value)}"
    for value in graph.initializers.values():
        yield f"{indent}constant {_described(value)}{_content(value)}"
    for node in graph:
        yield from _node_lines(node, indent)
    for value in graph.outputs:
        yield f"{indent}output {_described(value)}"


def _node_lines(node: ir.Node, indent: str) -> Iterator[str]:
    simple = {k: a for k, a in node.attributes.items() if a.is_ref() or a.type not in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)}
    attributes = ", ".join(f"{name}={_attribute(attr)}" for name, attr in sorted(simple.items()))
    op = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    inputs = ", ".join("-" if v is None else v.name or "" for v in node.inputs)
    outputs = ", ".join(_described(v) for v in node.outputs)
    yield f"{indent}{outputs} = {op}{f'<{attributes}>' if attributes else ''}({inputs})  # {node.name}"
    for name, attr in sorted(node.attributes.items()):
        if name not in simple:
            graphs = [attr.as_graph()] if attr.type == ir.AttributeType.GRAPH else attr.as_graphs()
            for graph in graphs:
                yield f"{indent}  {name}:"
                yield from _graph_lines(graph, indent + "    ")


def _described(value: ir.Value) -> str:
    dtype = value.dtype.name.lower() if value.dtype is not None else "?"
    shape = "..." if value.shape is None else ", ".join("?" if (d := _dim(dim)) is None else str(d) for dim in value.shape)
    return f"{value.name}: {dtype}[{shape}]"


def _dim(dim: int | ir.SymbolicDim) -> int | str | None:
    return dim if isinstance(dim, int) else dim.value


def _content(value: ir.Value) -> str:
    tensor = value.const_value
    if tensor is None or tensor.size > _SMALL or tensor.dtype == ir.DataType.STRING:
        return ""
    return f" = {tensor.numpy().tolist()}"


def _attribute(attr: ir.Attr) -> str:
    if attr.is_ref():
        return f"@{attr.ref_attr_name}"
    if attr.type == ir.AttributeType.TENSOR:
        tensor = attr.as_tensor()
        return f"{tensor.dtype.name.lower()}{list(tensor.shape.numpy())}" + (f" {tensor.numpy().tolist()}" if tensor.size <= _SMALL else "")
    if attr.type == ir.AttributeType.FLOAT:
        return f"{attr.as_float():.6g}"
    return repr(list(attr.value) if isinstance(attr.value, tuple) else attr.value)
