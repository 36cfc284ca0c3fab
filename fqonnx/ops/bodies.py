"""The ops of domain ``fqonnx`` as ONNX local functions: what they mean, in standard operators that every runtime knows.

There is one body per op and model, without overloads, because TensorRT's parser looks functions up by name: whatever varies is an
attribute that the body refers to, or an input that is always there. No body branches: a path that an attribute turns off works on
slices without columns. ``fqonnx.ops.reference`` says the same in numpy.

``GroupQueryAttention`` is for ONNX Runtime alone: its body is that runtime's own operator, which has no meaning elsewhere, and optional
inputs are passed on as they are.
"""

from __future__ import annotations

import onnx.parser
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from fqonnx.errors import ModelError

DOMAIN = "fqonnx"
VERSION = 1
OPSETS = range(21, 26)
"""Opsets of the default domain that the bodies are proven at; a body imports its model's own."""

# ONNX's text form. Every node is named after its output when it is read.
_CONSTANTS = """    one = Constant <value_float: float = 1.0> ()
    one_int = Constant <value_int: int = 1> ()
    begin = Constant <value_ints: ints = [0]> ()
    second = Constant <value_ints: ints = [1]> ()
    last = Constant <value_ints: ints = [-1]> ()
"""

# From x to q and scale, the same behind every prologue.
_QUANTIZE = """
    # 30 bits - 113 is 2^(bits - 1) - 1 for 4 as for 8, in integers and so exactly.
    bits = Constant <value_int: int = @bits> ()
    thirty = Constant <value_int: int = 30> ()
    bits_offset = Constant <value_int: int = 113> ()
    thirty_bits = Mul (thirty, bits)
    qmax_int = Sub (thirty_bits, bits_offset)
    qmax = Cast <to: int = 1> (qmax_int)
    qmax_negative = Neg (qmax)
    qmin = Sub (qmax_negative, one)

    # The transform, on [rows, blocks, n1, n2]: a rank that does not depend on x. The left factor's product is one [n1, n1] x
    # [n1, rows blocks n2]: a product per row would be slow for small factors, and ONNX Runtime refuses it for no rows.
    x_shape = Shape (x)
    k = Shape <start: int = -1> (x)
    n1 = Shape <start: int = 0, end: int = 1> (left)
    n2 = Shape <start: int = 0, end: int = 1> (right)
    n1_n2 = Mul (n1, n2)
    blocks = Div (k, n1_n2)
    x_float = Cast <to: int = 1> (x)
    x_rows = Flatten <axis: int = -1> (x_float)
    rows = Shape <start: int = 0, end: int = 1> (x_rows)
    blocks_shape = Concat <axis: int = 0> (rows, blocks, n1, n2)
    x_blocks = Reshape <allowzero: int = 1> (x_rows, blocks_shape)
    x_right = MatMul (x_blocks, right)
    x_right_n1_first = Transpose <perm: ints = [2, 0, 1, 3]> (x_right)
    n1_first_shape = Shape (x_right_n1_first)
    n1_matrix_shape = Concat <axis: int = 0> (n1, last)
    x_right_matrix = Reshape (x_right_n1_first, n1_matrix_shape)
    left_transposed = Transpose <perm: ints = [1, 0]> (left)
    t_matrix = MatMul (left_transposed, x_right_matrix)
    t_n1_first = Reshape <allowzero: int = 1> (t_matrix, n1_first_shape)
    t_blocks = Transpose <perm: ints = [1, 2, 0, 3]> (t_n1_first)
    t = Reshape <allowzero: int = 1> (t_blocks, x_shape)

    # 2^-126, reference.SMALLEST_SCALE.
    smallest = Constant <value_float: float = 1.1754943508222875e-38> ()
    t_abs = Abs (t)
    t_max = ReduceMax <keepdims: int = 1> (t_abs, last)
    t_clip = Mul (t_max, clip)
    step = Div (t_clip, qmax)
    is_zero = Less (step, smallest)
    scale_finite = Where (is_zero, one, step)
    t_steps = Div (t, scale_finite)
    # Not every runtime's ReduceMax sees a NaN; a sum does, and is finite for a finite row: |t_steps| is at most qmax / clip.
    zero = Constant <value_float: float = 0.0> ()
    t_steps_sum = ReduceSum <keepdims: int = 1> (t_steps, last)
    nan_or_zero = Mul (t_steps_sum, zero)
    scale_or_nan = Add (scale_finite, nan_or_zero)
    # ONNX Runtime (1.31) leaves a tensor without rows unreduced; elsewhere this slice is all there is.
    scale = Slice (scale_or_nan, begin, second, last)
    t_round = Round (t_steps)
    codes = Clip (t_round, qmin, qmax)

    # Packing, on no columns unless packed: the low nibble modulo 16 plus 16 times the signed high nibble.
    end = Constant <value_ints: ints = [9223372036854775807]> ()
    two = Constant <value_ints: ints = [2]> ()
    sixteen = Constant <value_float: float = 16.0> ()
    packed = Constant <value_int: int = @packed> ()
    unpacked = Sub (one_int, packed)
    plain_end = Mul (end, unpacked)
    packed_end = Mul (end, packed)
    plain = Slice (codes, begin, plain_end, last)
    low_signed = Slice (codes, begin, packed_end, last, two)
    high = Slice (codes, second, packed_end, last, two)
    low_sixteenth = Div (low_signed, sixteen)
    low_wraps = Floor (low_sixteenth)
    high_carried = Sub (high, low_wraps)
    high_shifted = Mul (high_carried, sixteen)
    pairs = Add (high_shifted, low_signed)
    container = Concat <axis: int = -1> (plain, pairs)
    q = Cast <to: int = 3> (container)
"""

# h in the place of x, rounded once to x's type. A half is a slice from gate K, and from (1 - gate) K.
_SILU_MUL = """
    gate = Constant <value_int: int = @gate> ()
    up = Sub (one_int, gate)
    halves = Constant <value_ints: ints = [2]> ()
    merged_k = Shape <start: int = -1> (gate_up)
    half_k = Div (merged_k, halves)
    gate_begin = Mul (half_k, gate)
    gate_end = Add (gate_begin, half_k)
    up_begin = Mul (half_k, up)
    up_end = Add (up_begin, half_k)
    gate_up_float = Cast <to: int = 1> (gate_up)
    gate_float = Slice (gate_up_float, gate_begin, gate_end, last)
    up_float = Slice (gate_up_float, up_begin, up_end, last)
    sigmoid = Sigmoid (gate_float)
    silu = Mul (gate_float, sigmoid)
    h = Mul (silu, up_float)
    x = CastLike (h, gate_up)
"""

# Likewise: hidden normalised to a mean square of 1, times gamma.
_RMS_NORM = """
    epsilon = Constant <value_float: float = @epsilon> ()
    hidden_float = Cast <to: int = 1> (hidden)
    square = Mul (hidden_float, hidden_float)
    mean_square = ReduceMean <keepdims: int = 1> (square, last)
    mean_square_epsilon = Add (mean_square, epsilon)
    root = Sqrt (mean_square_epsilon)
    unit = Div (hidden_float, root)
    gamma_float = Cast <to: int = 1> (gamma)
    h = Mul (unit, gamma_float)
    x = CastLike (h, hidden)
"""

_ADD = """
    summand_float = Cast <to: int = 1> (summand)
    residual_float = Cast <to: int = 1> (residual)
    sum_float = Add (summand_float, residual_float)
    hidden = CastLike (sum_float, summand)
    sum = Identity (hidden)
"""

_ATTRIBUTES = 'bits: int = 4, packed: int = 0, plugin_namespace: string = "fqonnx", plugin_version: string = "1"'

CONTRIB = "com.microsoft"
"""The domain of ONNX Runtime's own operators."""

_BODIES = {
    "FlatQuantize": f"""
FlatQuantize <{_ATTRIBUTES}>
(x, left, right, clip) => (q, scale)
{{
{_CONSTANTS}{_QUANTIZE}}}
""",
    "SiluMulFlatQuantize": f"""
SiluMulFlatQuantize <gate: int = 0, {_ATTRIBUTES}>
(gate_up, left, right, clip) => (q, scale)
{{
{_CONSTANTS}{_SILU_MUL}{_QUANTIZE}}}
""",
    "RmsNormFlatQuantize": f"""
RmsNormFlatQuantize <epsilon: float = 0.00001, {_ATTRIBUTES}>
(hidden, gamma, left, right, clip) => (q, scale)
{{
{_CONSTANTS}{_RMS_NORM}{_QUANTIZE}}}
""",
    "AddRmsNormFlatQuantize": f"""
AddRmsNormFlatQuantize <epsilon: float = 0.00001, {_ATTRIBUTES}>
(summand, residual, gamma, left, right, clip) => (q, scale, sum)
{{
{_CONSTANTS}{_ADD}{_RMS_NORM}{_QUANTIZE}}}
""",
    "W4A4Gemm": f"""
W4A4Gemm <packed: int = 0, layout: string = "plain", layout_shape: ints = [0, -1], layout_perm: ints = [0, 1], dtype: int = 1,
          plugin_namespace: string = "fqonnx", plugin_version: string = "1">
(q, scale, w, w_scale, bias) => (y)
{{
{_CONSTANTS}
    # Unpacking, on no columns unless packed.
    end = Constant <value_ints: ints = [9223372036854775807]> ()
    sixteen = Constant <value_float: float = 16.0> ()
    eight = Constant <value_float: float = 8.0> ()
    packed = Constant <value_int: int = @packed> ()
    unpacked = Sub (one_int, packed)
    plain_end = Mul (end, unpacked)
    packed_end = Mul (end, packed)
    q_rows = Flatten <axis: int = -1> (q)
    container = Cast <to: int = 1> (q_rows)
    plain = Slice (container, begin, plain_end, second)
    pairs = Slice (container, begin, packed_end, second)
    pairs_sixteenth = Div (pairs, sixteen)
    high = Floor (pairs_sixteenth)
    high_shifted = Mul (high, sixteen)
    low_unsigned = Sub (pairs, high_shifted)
    low_eighth = Div (low_unsigned, eight)
    low_wraps = Floor (low_eighth)
    low_wrapped = Mul (low_wraps, sixteen)
    low = Sub (low_unsigned, low_wrapped)
    low_column = Unsqueeze (low, last)
    high_column = Unsqueeze (high, last)
    nibbles_paired = Concat <axis: int = -1> (low_column, high_column)
    nibbles = Flatten <axis: int = 1> (nibbles_paired)
    codes = Concat <axis: int = 1> (plain, nibbles)

    # The weight in the order of K, as exact integers: INT4 may only be read by DequantizeLinear in TensorRT.
    w_float = DequantizeLinear (w, one)
    w_shape = Shape (w_float)
    layout_shape = Constant <value_ints: ints = @layout_shape> ()
    w_stored = Reshape (w_float, layout_shape)
    w_blocks = Transpose <perm: ints = @layout_perm> (w_stored)
    w_ordered = Reshape (w_blocks, w_shape)

    # The sums are of integers and exact in fp32 up to 2^24: whatever the data up to K = 262144 for 4-bit codes, 16384 for 8-bit ones.
    # A channel's largest scale is applied to the sum, the groups' share of it to the weight: exactly 1 where there is one group.
    channel_scale = ReduceMax <keepdims: int = 1> (w_scale, second)
    share = Div (w_scale, channel_scale)
    share_column = Unsqueeze (share, last)
    groups = Shape <start: int = 1, end: int = 2> (w_scale)
    grouped_shape = Concat <axis: int = 0> (begin, groups, last)
    w_grouped = Reshape (w_ordered, grouped_shape)
    w_shared = Mul (w_grouped, share_column)
    w_matrix = Reshape (w_shared, w_shape)

    sums = Gemm <transB: int = 1> (codes, w_matrix)
    channel_scale_row = Reshape (channel_scale, last)
    sums_channel = Mul (sums, channel_scale_row)
    scale_rows = Flatten <axis: int = -1> (scale)
    sums_scaled = Mul (sums_channel, scale_rows)
    y_rows = Add (sums_scaled, bias)
    lead = Shape <start: int = 0, end: int = -1> (q)
    n = Shape <start: int = 0, end: int = 1> (w_float)
    y_shape = Concat <axis: int = 0> (lead, n)
    y_float = Reshape <allowzero: int = 1> (y_rows, y_shape)
    y = Cast <to: int = @dtype> (y_float)
}}
""",
    "GroupQueryAttention": f"""
GroupQueryAttention <num_heads, kv_num_heads, scale: float = 0.0, do_rotary: int = 0, rotary_interleaved: int = 0,
                     k_quant_type: string = "NONE", v_quant_type: string = "NONE", kv_cache_bit_width: int = 0,
                     plugin_namespace: string = "fqonnx", plugin_version: string = "1">
(query, key, value, past_key, past_value, seqlens_k, total_sequence_length, cos_cache, sin_cache, k_scale, v_scale)
=> (output, present_key, present_value)
{{
    output, present_key, present_value = {CONTRIB}.GroupQueryAttention <num_heads: int = @num_heads, kv_num_heads: int = @kv_num_heads,
        scale: float = @scale, do_rotary: int = @do_rotary, rotary_interleaved: int = @rotary_interleaved,
        k_quant_type: string = @k_quant_type, v_quant_type: string = @v_quant_type, kv_cache_bit_width: int = @kv_cache_bit_width>
        (query, key, value, past_key, past_value, seqlens_k, total_sequence_length, cos_cache, sin_cache, "", "", "", k_scale, v_scale)
}}
""",
}

_IMPORTS = {"GroupQueryAttention": {CONTRIB: 1}}
"""What a body imports besides the default domain."""


def function_for(op: str, opset: int) -> ir.Function:
    """The body of an op.

    Args:
        op: A key of ``_BODIES``, such as ``FlatQuantize``.
        opset: The model's version of the default domain.

    Returns:
        A function of its own for each call, ready for ``ir.Model.functions``.

    Raises:
        ModelError: The opset is not one of ``OPSETS``.
    """
    if opset not in OPSETS:
        raise ModelError(f"opset {opset} has no fqonnx ops: export the model at opset {OPSETS[0]} to {OPSETS[-1]}")
    imports = {"": opset, **_IMPORTS.get(op, {})}
    imported = ", ".join(f'"{domain}" : {version}' for domain, version in imports.items())
    text = f'<domain: "{DOMAIN}", opset_import: [{imported}]>{_BODIES[op]}'
    function = ir.serde.deserialize_function(onnx.parser.parse_function(text))
    for node in function:
        node.name = f"{op}_{node.outputs[0].name}"
    return function


def add_functions(model: ir.Model) -> bool:
    """Give a model the bodies of the fqonnx ops that its nodes call, at its own opset, and the import of the domain.

    Returns:
        Whether anything was added.

    Raises:
        ModelError: The model's opset is not one of ``OPSETS``, or a node calls an fqonnx op that does not exist.
    """
    modified = False
    called: set[str] = set()
    scopes: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
    for scope in scopes:
        ops = {node.op_type for node in ir.traversal.RecursiveGraphIterator(scope) if node.domain == DOMAIN}
        if ops and scope.opset_imports.get(DOMAIN) != VERSION:
            scope.opset_imports[DOMAIN] = VERSION
            modified = True
        called |= ops
    for op in sorted(called):
        if op not in _BODIES:
            raise ModelError(f"there is no op {DOMAIN}.{op}: this version has {', '.join(_BODIES)}")
        if (DOMAIN, op, "") not in model.functions:
            model.functions[(DOMAIN, op, "")] = function_for(op, model.opset_imports.get("", 0))
            # The checker asks for the imports in the model, also where only a function calls the op.
            model.opset_imports[DOMAIN] = VERSION
            for domain, version in _IMPORTS.get(op, {}).items():
                model.opset_imports.setdefault(domain, version)
            modified = True
    return modified


def inline_bodies(model: ir.Model) -> bool:
    """Put the body of every fqonnx op in the place of its call, nodes and values named ``{call}/{name in the body}``.

    For runtimes that have no kernels and cannot take the functions themselves: TensorRT-RTX's parser (1.7) names a layer of
    ``DequantizeLinear`` after its node and so refuses the second call of ``W4A4Gemm``. All other functions of the model are inlined too.

    Args:
        model: Has its bodies already (``add_functions``); changed in place, initializers untouched.

    Returns:
        Whether there was a call.
    """
    calls = [node for node in ir.traversal.RecursiveGraphIterator(model.graph) if node.domain == DOMAIN]
    opset = model.opset_imports[""]
    for call in calls:
        body = function_for(call.op_type, opset)
        for node in body:
            node.name = f"{call.name}/{node.outputs[0].name}"
            for value in node.outputs:
                value.name = f"{call.name}/{value.name}"
        # An overload of its own, so that the inliner takes this copy.
        body.overload = call.overload = f"{len(model.functions)}"
        model.functions[body.identifier()] = body
    if calls:
        InlinePass()(model)
        for op in _BODIES:
            model.functions.pop((DOMAIN, op, ""), None)  # the inliner leaves what nothing called
        model.opset_imports.pop(DOMAIN, None)
    return bool(calls)
