"""The ops of domain ``fqonnx``: their meaning (``reference``), their ONNX bodies, their nodes and the storage of their codes."""

from fqonnx.ops.bodies import CONTRIB, DOMAIN, OPSETS, VERSION, add_functions, function_for, inline_bodies
from fqonnx.ops.layout import CONTAINERS, LAYOUTS, from_layout, int4_tensor, lazy_int4_tensor, pack_int4, to_layout, unpack_int4
from fqonnx.ops.nodes import (
    FLOAT_TYPES,
    dequantize_nodes,
    flat_quantize_node,
    group_query_attention_node,
    rms_norm_flat_quantize_node,
    silu_mul_flat_quantize_node,
    w4a4_gemm_node,
)

__all__ = [
    "CONTAINERS",
    "CONTRIB",
    "DOMAIN",
    "FLOAT_TYPES",
    "LAYOUTS",
    "OPSETS",
    "VERSION",
    "add_functions",
    "dequantize_nodes",
    "flat_quantize_node",
    "from_layout",
    "function_for",
    "group_query_attention_node",
    "inline_bodies",
    "int4_tensor",
    "lazy_int4_tensor",
    "pack_int4",
    "rms_norm_flat_quantize_node",
    "silu_mul_flat_quantize_node",
    "to_layout",
    "unpack_int4",
    "w4a4_gemm_node",
]
