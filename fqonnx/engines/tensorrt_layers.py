"""What became of a model in an engine, layer by layer, as TensorRT's engine inspector lists it.

The builder writes the inspector's listing to its verbose log too, so that no GPU is needed to read it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import onnx_ir as ir

from fqonnx.ops import DOMAIN
from fqonnx.passes.edit import GROUP_TAG, LINEAR_TAG
from fqonnx.report.data import EngineGroup, EngineLayer

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

LISTING = "Layers:\n"
"""How the inspector's listing begins."""

_NODE, _BETWEEN = "[ONNX Layer: ", "\x1e\x1f "
"""What a node of a layer's metadata begins with, and what stands between two."""
_FIELDS = ("Inputs: [", "Constants: [", "Outputs: [")
_TYPE = re.compile(r"(?<!/)Datatype: (\w+)|Format/Datatype: [^}]*?\b((?:FP|BF|INT|UINT|BOOL)\w*)")
"""A tensor's type: by itself since TensorRT-RTX 1 and TensorRT 11, in words with its format before."""
_TYPES = {"FP32": "Float", "FP16": "Half", "BF16": "BFloat16", "INT4": "Int4", "INT8": "Int8", "UINT8": "UInt8", "INT32": "Int32"}
_STORED = {4: ("Int4",), 8: ("Int8", "UInt8")}
"""What a weight of so many bits is called in the listing."""
_PRODUCT_OF_BODY = "sums"
"""The matrix product in the body of ``W4A4Gemm``."""


@dataclass
class Weights:
    """What the model holds of a group: the bits of its weights, and the nodes that multiply by them."""

    bits: int
    products: set[str] = field(default_factory=set)


@dataclass(frozen=True)
class Origin:
    """What an engine's layers are traced back to: the model before its bodies were inlined.

    Attributes:
        ops: By node name, its operator.
        groups: By node name, the group that the node was made for.
        calls: By node name, the op, of every node of an fqonnx op.
        weights: By group, its weights.
    """

    ops: Mapping[str, str]
    groups: Mapping[str, str]
    calls: Mapping[str, str]
    weights: Mapping[str, Weights]

    @classmethod
    def of(cls, model: ir.Model) -> Origin:
        """Of a model as it is."""
        ops: dict[str, str] = {}
        groups: dict[str, str] = {}
        calls: dict[str, str] = {}
        weights: dict[str, Weights] = {}
        for node in ir.traversal.RecursiveGraphIterator(model.graph):
            name, group, op = node.name or "", node.metadata_props.get(GROUP_TAG), (node.domain, node.op_type)
            ops[name] = node.op_type
            if node.domain == DOMAIN:
                calls[name] = node.op_type
            if group is None:
                continue
            groups[name] = group
            if op == (DOMAIN, "W4A4Gemm"):
                weights.setdefault(group, Weights(4)).products |= {name, f"{name}/{_PRODUCT_OF_BODY}"}
            elif op == ("", "DequantizeLinear") and LINEAR_TAG in node.metadata_props:
                codes = node.inputs[0]
                weights.setdefault(group, Weights(4 if codes is not None and codes.dtype == ir.DataType.INT4 else 8))
            elif op == ("", "MatMul") and LINEAR_TAG in node.metadata_props and group in weights:
                weights[group].products.add(name)
        return cls(ops, groups, calls, weights)

    def node_in(self, message: str) -> str | None:
        """The node that a message of the builder speaks of, with its operator and group in words; None where it names none."""
        words = set(re.findall(r"[^\s\[\](){}'\",;:]+", message))
        named = [name for name in self.ops if name in words or any(word.startswith(f"{name}/") for word in words)]
        # A name of a letter or two may be an article.
        name = max((name for name in named if len(name) > 2 or f"[ONNX Layer: {name}]" in message), key=len, default=None)
        if name is None:
            return None
        group = self.groups.get(name)
        return f"node {name!r} ({self.ops[name]}{f', of group {group!r}' if group else ''})"

    def group_of(self, node: str) -> str | None:
        """Of a node of the model, or one of an inlined body, which is called ``{call}/{name in the body}``."""
        return self.groups.get(node) or self.groups.get(node.rpartition("/")[0])


def read_layers(listing: str, origin: Origin) -> tuple[EngineLayer, ...]:
    """The layers in a listing: the inspector's text in its one-line form, of an engine that was built with detailed verbosity."""
    body = listing.partition(LISTING)[2].partition("\n\n")[0]
    return tuple(_read_layer(line, origin) for line in body.split("\n") if ", LayerType: " in line)


def _read_layer(line: str, origin: Origin) -> EngineLayer:
    name, _, rest = line.removeprefix("Name: ").partition(", LayerType: ")
    kind, _, rest = rest.partition(",")
    tensors, _, notes = rest.partition("Metadata: ")
    types: dict[str, tuple[str, ...]] = dict.fromkeys(_FIELDS, ())
    starts = [(tensors.find(start), start) for start in _FIELDS if start in tensors]
    ends = [at for at, _ in starts[1:]] + [len(tensors)]
    for (at, start), end in zip(starts, ends, strict=True):
        types[start] = _types_in(tensors[at:end])
    nodes = tuple(part.strip(_BETWEEN).removesuffix("]") for part in notes.split(_NODE)[1:])
    found = {group: None for node in nodes if (group := origin.group_of(node)) is not None}
    inputs, constants, outputs = (types[start] for start in _FIELDS)
    return EngineLayer(name=name, kind=kind, inputs=inputs, constants=constants, outputs=outputs, nodes=nodes, groups=tuple(found))


def _types_in(text: str) -> tuple[str, ...]:
    """The tensors' types, each once."""
    return tuple({_TYPES.get(word, word): None for match in _TYPE.finditer(text) for word in match.groups() if word})


def summarize(layers: Sequence[EngineLayer], origin: Origin) -> tuple[EngineGroup, ...]:
    """What became of each group's weight and of the product with it."""
    return tuple(_summarize(name, weights, layers) for name, weights in origin.weights.items())


def _summarize(name: str, weights: Weights, layers: Sequence[EngineLayer]) -> EngineGroup:
    stored, bits = _STORED[weights.bits], weights.bits
    own = [layer for layer in layers if name in layer.groups]
    products = [layer for layer in own if weights.products.intersection(layer.nodes)]
    if not products:
        return EngineGroup(name=name, weights=None, product=None, how="not found among the engine's layers")
    product = products[-1]  # those before it copy or join what it reads, and bear its name too
    computed = (product.inputs or product.constants or ("?",))[0]
    if "plugin" in product.kind.lower():
        return EngineGroup(
            name=name, weights=f"Int{bits}", product=f"Int{bits}", how="the plugin multiplies integer codes", layer=product.name
        )
    if set(stored).intersection((*product.constants, *product.inputs)):
        how = f"one kernel reads the {bits}-bit weight"
        return EngineGroup(name=name, weights=stored[0], product=product.outputs[0], how=how, layer=product.name)
    if any(set(stored).intersection(layer.constants) or set(stored).intersection(layer.inputs) for layer in own if layer is not product):
        how = f"a kernel of its own widens the {bits}-bit weight to {computed}, then {computed} is multiplied"
        return EngineGroup(name=name, weights=stored[0], product=computed, how=how, layer=product.name)
    how = f"the builder made the {bits}-bit weight {computed}: nothing of it is left in the engine"
    return EngineGroup(name=name, weights=computed, product=computed, how=how, layer=product.name)
