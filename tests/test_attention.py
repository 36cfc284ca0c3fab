"""ONNX Runtime's GroupQueryAttention to the op of a kernel: what becomes it, what stays, and that nothing changes in what is computed."""

from __future__ import annotations

import importlib
import json
import logging
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from fqonnx.artifact import open_artifact
from fqonnx.bench import CANDIDATE, bench
from fqonnx.build import build
from fqonnx.debug import bisect
from fqonnx.engines.onnxruntime import run as run_session
from fqonnx.engines.onnxruntime import session
from fqonnx.errors import EngineError, ModelError
from fqonnx.ops import OPSETS, add_functions, function_for, group_query_attention_node, inline_bodies
from fqonnx.ops.kernels import KERNELS, kernel_for
from fqonnx.ops.reference import group_query_attention
from fqonnx.passes import linears
from fqonnx.passes.attention import KERNEL_TAG, LowerAttention, attention_kernels, has_attention
from fqonnx.passes.pipeline import check, quantize_model
from fqonnx.passes.prepare import prepare
from fqonnx.recipe import SCHEMES, Recipe
from fqonnx.verify import verify
from tests.graph_text import graph_text
from tests.rewriting import left_alone_by, run, solve

if TYPE_CHECKING:
    from collections.abc import Callable

    from fqonnx.passes.groups import LinearGroup

sys.path.insert(0, str(Path(__file__).parents[1] / "samples"))
decoder: Any = importlib.import_module("decoder")

Arrays = dict[str, npt.NDArray[Any]]

FP32, FP16, BF16 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16
NUMPY = {FP32: np.float32, FP16: np.float16, BF16: ml_dtypes.bfloat16}
OP = "GroupQueryAttention"
POSITIONS = 32


@dataclass(frozen=True)
class Case:
    """One node of attention."""

    dtype: int = FP16
    packed: bool = True
    rotary: bool = True
    heads: int = 4
    kv_heads: int = 2
    head: int = 64
    opset: int = 21

    @property
    def widths(self) -> list[int]:
        return [self.heads * self.head, self.kv_heads * self.head, self.kv_heads * self.head]

    @property
    def tables(self) -> list[npt.NDArray[Any]]:
        angles = np.outer(np.arange(POSITIONS), 100.0 ** (-np.arange(0, self.head, 2) / self.head))
        return [np.cos(angles).astype(NUMPY[self.dtype]), np.sin(angles).astype(NUMPY[self.dtype])]

    def proto(self, **attributes: Any) -> onnx.ModelProto:
        """The float model: attention of the inputs, and something that reads it. Attributes given as None are left out."""
        cache: list[int | str | None] = ["batch", self.kv_heads, "past", self.head]
        present: list[int | str | None] = ["batch", self.kv_heads, "total", self.head]
        widths = [sum(self.widths)] if self.packed else self.widths
        parts = [(name, ["batch", "tokens", width]) for name, width in zip("qkv", widths, strict=False)]
        inputs = [
            *(helper.make_tensor_value_info(name, self.dtype, shape) for name, shape in parts),
            *(helper.make_tensor_value_info(name, self.dtype, cache) for name in ("past_key", "past_value")),
            helper.make_tensor_value_info("lengths", TensorProto.INT32, ["batch"]),
            helper.make_tensor_value_info("total_length", TensorProto.INT32, []),
        ]
        names = [*(name for name, _ in parts), *(["", ""] if self.packed else []), "past_key", "past_value", "lengths", "total_length"]
        names += ["cos", "sin"] if self.rotary else []
        known = {"num_heads": self.heads, "kv_num_heads": self.kv_heads, "scale": 0.2, "do_rotary": int(self.rotary)}
        node = helper.make_node(
            OP, names, ["attended", "present_key", "present_value"], "attention", domain="com.microsoft",
            **{name: value for name, value in (known | attributes).items() if value is not None},
        )  # fmt: skip
        outputs = [helper.make_tensor_value_info("y", self.dtype, ["batch", "tokens", self.widths[0]])]
        outputs += [helper.make_tensor_value_info(name, self.dtype, present) for name in ("present_key", "present_value")]
        tables = [numpy_helper.from_array(table, name) for table, name in zip(self.tables, ("cos", "sin"), strict=True)]
        graph = helper.make_graph(
            [node, helper.make_node("Neg", ["attended"], ["y"], "negated")], "main", inputs, outputs, tables if self.rotary else []
        )
        opsets = [helper.make_opsetid("", self.opset), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        onnx.checker.check_model(model, full_check=True)
        return model

    def model(self, **attributes: Any) -> ir.Model:
        """As it comes to the pass."""
        return prepare(ir.from_proto(self.proto(**attributes)))

    def feed(self, lengths: tuple[int, ...], tokens: int, capacity: int = 0) -> Arrays:
        """New tokens behind others, so many in all per sequence; ``capacity`` rows in the cache at least."""
        rng = np.random.default_rng(sum(lengths) + tokens)
        dtype, rows = NUMPY[self.dtype], max(max(lengths) - tokens, capacity)
        new = [rng.standard_normal((len(lengths), tokens, width)).astype(dtype) for width in self.widths]
        arrays = {"q": np.concatenate(new, axis=-1)} if self.packed else dict(zip("qkv", new, strict=True))
        past = {
            name: rng.standard_normal((len(lengths), self.kv_heads, rows, self.head)).astype(dtype) for name in ("past_key", "past_value")
        }
        counts = {"lengths": np.array(lengths, np.int32) - 1, "total_length": np.array(max(lengths), np.int32)}
        return {**arrays, **past, **counts}


FORMS = [Case(packed=packed, rotary=rotary) for packed in (True, False) for rotary in (True, False)]
FORM_IDS = [f"{'packed' if case.packed else 'separate'}{'-rotary' if case.rotary else ''}" for case in FORMS]
# Lengths, new tokens, rows of the cache: a step, a step of sequences of several lengths in a larger cache, a prompt, one behind another.
LOADS: list[tuple[tuple[int, ...], int, int]] = [((6,), 1, 0), ((3, 9, 1), 1, 16), ((5, 5), 5, 0), ((7,), 3, 0)]


def lower(model: ir.Model, capability: int | None = 90) -> list[ir.Node]:
    """Run the pass; the model is valid afterwards, and ``modified`` true."""
    result = LowerAttention(capability)(model)
    check(model)
    nodes = [node for graph in model.graphs() for node in graph if (node.domain, node.op_type) == ("fqonnx", OP)]
    assert result.modified == bool(nodes)
    return nodes


def stays(model: ir.Model, caplog: pytest.LogCaptureFixture, capability: int | None = 90) -> str:
    """Why the pass leaves the only node of a model alone, as it logs it."""
    caplog.clear()
    with caplog.at_level(logging.DEBUG, "fqonnx.passes.attention"):
        assert left_alone_by(LowerAttention(capability), model)
    (message,) = [record.getMessage() for record in caplog.records if record.name == "fqonnx.passes.attention"]
    assert message.startswith("attention stays com.microsoft.GroupQueryAttention: it ")
    return message.removeprefix("attention stays com.microsoft.GroupQueryAttention: it ")


def attention_of(model: ir.Model) -> ir.Node:
    return next(node for node in model.graph if node.op_type == OP)


# --- The op -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", [64, 128])
@pytest.mark.parametrize("form", FORMS, ids=FORM_IDS)
def test_the_op_computes_what_the_node_did_bit_for_bit(form: Case, head: int) -> None:
    case = replace(form, head=head)
    proto, model = case.proto(), case.model()
    (node,) = lower(model)
    assert [name for name, value in zip("qkv", node.inputs, strict=False) if value is None] == (["k", "v"] if case.packed else [])
    assert [value is None for value in node.inputs[7:]] == [not case.rotary] * 2
    for lengths, tokens, capacity in LOADS:
        arrays = case.feed(lengths, tokens, capacity)
        before, after = run(proto, arrays), run(model, arrays)
        assert np.isfinite(before["y"].astype(np.float32)).all()
        assert before["y"].any()
        for name, array in before.items():
            # What ONNX Runtime leaves in rows behind a sequence is its own affair.
            for sequence, length in enumerate(lengths):
                rows = np.s_[sequence] if name == "y" else np.s_[sequence, :, :length]
                np.testing.assert_array_equal(after[name][rows], array[rows], strict=True)


@pytest.mark.parametrize("form", FORMS, ids=FORM_IDS)
def test_the_op_is_the_reference(form: Case) -> None:
    """In fp32, which the body takes too."""
    case = replace(form, dtype=FP32)
    proto = case.proto()
    model = ir.from_proto(proto)
    old = attention_of(model)
    inputs = [*old.inputs, *[None] * (9 - len(old.inputs))]
    new = group_query_attention_node(
        *inputs, num_heads=case.heads, kv_num_heads=case.kv_heads, head=case.head, scale=0.2, name="op"  # type: ignore[arg-type]
    )  # fmt: skip
    model.graph.insert_before(old, new)
    for value, by in zip(old.outputs, new.outputs, strict=True):
        ir.convenience.replace_all_uses_with(value, by, replace_graph_outputs=True)
        by.name = value.name
    model.graph.remove(old, safe=True)
    add_functions(model)
    check(model)
    for lengths, tokens, capacity in LOADS:
        arrays = case.feed(lengths, tokens, capacity)
        got = run(model, arrays)
        operands = [arrays.get(name) for name in ("q", "k", "v", "past_key", "past_value", "lengths")]
        tables = case.tables if case.rotary else []
        wanted = group_query_attention(*operands, *tables, num_heads=case.heads, kv_num_heads=case.kv_heads, scale=0.2)  # type: ignore[arg-type]
        np.testing.assert_allclose(-got["y"], wanted[0], rtol=1e-4, atol=1e-5)
        for name, present in zip(("present_key", "present_value"), wanted[1:], strict=True):
            assert got[name].shape == present.shape
            for sequence, length in enumerate(lengths):
                np.testing.assert_allclose(got[name][sequence, :, :length], present[sequence, :, :length], rtol=1e-5, atol=1e-6)


def test_the_reference_in_numbers() -> None:
    """Two equal keys share a query; a key that points away from it is not seen; a head of keys serves two of queries."""
    query = np.zeros((1, 1, 4), np.float32)
    query[0, 0, [0, 2]] = 1, -1
    past = np.array([[[[1, 0], [100, 0]]]], np.float32)
    values = np.array([[[[2, 4], [6, 8]]]], np.float32)
    key, value = np.array([[[100, 0]]], np.float32), np.array([[[10, 12]]], np.float32)
    y, keys, present = group_query_attention(query, key, value, past, values, np.array([2], np.int32), num_heads=2, kv_num_heads=1, scale=1)
    np.testing.assert_allclose(y[0, 0], [8, 10, 2, 4], rtol=1e-6)
    assert keys[0, 0].tolist() == [[1, 0], [100, 0], [100, 0]]
    assert present[0, 0, 2].tolist() == [10, 12]
    # Half a turn for every position: the second position is the first one's negative.
    half = np.array([[1], [-1]], np.float32), np.zeros((2, 1), np.float32)
    _, keys, _ = group_query_attention(
        query, key, value, past[:, :, :1], values[:, :, :1], np.array([1], np.int32), *half, num_heads=2, kv_num_heads=1
    )
    assert keys[0, 0].tolist() == [[1, 0], [-100, 0]]
    with pytest.raises(ValueError, match="do not fit 2/1 heads"):
        group_query_attention(query, key, value, past, values, np.array([-1], np.int32), num_heads=2, kv_num_heads=1)


@pytest.mark.parametrize("opset", OPSETS)
def test_the_body_is_one_node_at_every_opset(opset: int) -> None:
    function = function_for(OP, opset)
    assert [(node.domain, node.op_type, node.name) for node in function] == [("com.microsoft", OP, f"{OP}_output")]
    assert function.opset_imports == {"": opset, "com.microsoft": 1}
    assert {name for name, attribute in function.attributes.items() if attribute.type == ir.AttributeType.UNDEFINED} == {
        "num_heads",
        "kv_num_heads",
    }
    case = Case(opset=opset)
    model = case.model()
    assert len(lower(model)) == 1
    arrays = case.feed((6,), 1)
    np.testing.assert_array_equal(run(model, arrays)["y"], run(case.proto(), arrays)["y"])


@pytest.mark.parametrize("form", FORMS, ids=FORM_IDS)
def test_inlined_it_is_the_node_again(form: Case) -> None:
    model = form.model()
    lower(model)
    assert inline_bodies(model)
    assert Counter((node.domain, node.op_type) for node in model.graph) == {("com.microsoft", OP): 1, ("", "Neg"): 1}
    assert model.opset_imports == {"": 21, "com.microsoft": 1}
    check(model)
    arrays = form.feed((4, 4), 1)
    np.testing.assert_array_equal(run(model, arrays)["y"], run(form.proto(), arrays)["y"])


def operands(dtype: ir.DataType = ir.DataType.FLOAT16) -> list[ir.Value | None]:
    query, past = ir.val("q", dtype, ["b", 1, 512]), [ir.val(name, ir.DataType.FLOAT16, ["b", 2, "p", 64]) for name in ("k", "v")]
    return [query, None, None, *past, ir.val("n", ir.DataType.INT32, ["b"]), ir.val("t", ir.DataType.INT32, []), None, None]


def test_the_constructor_types_its_outputs_and_refuses_what_does_not_fit() -> None:
    make: Any = group_query_attention_node
    sizes = {"num_heads": 4, "kv_num_heads": 2, "head": 64, "name": "a"}
    node = make(*operands(), **sizes)
    assert [(value.name, value.dtype, str(value.shape)) for value in node.outputs] == [
        ("a.output", ir.DataType.FLOAT16, "[b,1,256]"),
        ("a.present_key", ir.DataType.FLOAT16, "[b,2,None,64]"),
        ("a.present_value", ir.DataType.FLOAT16, "[b,2,None,64]"),
    ]
    with pytest.raises(ModelError, match=r"the input of a is INT32, not FLOAT"):
        make(*operands(ir.DataType.INT32), **sizes)
    with pytest.raises(ModelError, match=r"a reads FLOAT16 beside FLOAT: export"):
        make(*operands(ir.DataType.FLOAT), **sizes)
    with pytest.raises(ValueError, match="4 heads are no multiple of 3"):
        make(*operands(), **{**sizes, "kv_num_heads": 3})
    with pytest.raises(ValueError, match="given together or not at all"):
        make(*operands()[:-1], ir.val("sin", ir.DataType.FLOAT16), **sizes)


# --- What becomes it --------------------------------------------------------------------------------------------------------------------


def test_names_types_and_tags_stay() -> None:
    model = Case().model()
    old = attention_of(model)
    old.metadata_props["exporter"] = "note"
    named = [(value.name, value.dtype, str(value.shape)) for value in old.outputs]
    (node,) = lower(model)
    assert (node.name, node.op_type) == ("attention", OP)
    assert [(value.name, value.dtype, str(value.shape)) for value in node.outputs] == named
    assert node.metadata_props["exporter"] == "note"
    kernel = kernel_for(OP, capability=90)
    assert json.loads(node.metadata_props[KERNEL_TAG]) == {"kernel": kernel.name, "instruction": kernel.instruction}
    assert attention_kernels(model) == [
        {"name": "attention", "op": f"fqonnx.{OP}", "kernel": kernel.name, "instruction": kernel.instruction}
    ]
    assert left_alone_by(LowerAttention(90), model)


def test_no_scale_is_the_default_and_words_without_effect_are_left_out() -> None:
    """Bit for bit; each attribute here has the value that its absence means."""
    said: dict[str, Any] = {
        "causal": 1, "k_quant_type": "NONE", "v_quant_type": "NONE", "local_window_size": -1, "qk_output": 0, "smooth_softmax": 0,
        "softcap": 0.0, "rotary_interleaved": 0, "qk_norm_epsilon": 1e-5, "kv_cache_bit_width": 0, "sliding_window_cache": 0,
    }  # fmt: skip
    arrays = Case().feed((6,), 1)
    for attributes in ({"scale": None}, {"scale": None, **said}, {"scale": 64**-0.5, "smooth_softmax": -1}):
        proto = Case().proto(**attributes)
        model = Case().model(**attributes)
        (node,) = lower(model)
        assert set(node.attributes) == {
            "num_heads", "kv_num_heads", "scale", "do_rotary", "rotary_interleaved", "plugin_namespace", "plugin_version",
        }  # fmt: skip
        np.testing.assert_array_equal(run(model, arrays)["y"], run(proto, arrays)["y"])


def test_tables_that_nothing_is_turned_by_are_left_out() -> None:
    model = Case().model(do_rotary=0, rotary_interleaved=1)
    (node,) = lower(model)
    assert node.inputs[7:] == (None, None)
    arrays = Case().feed((6,), 1)
    np.testing.assert_array_equal(run(model, arrays)["y"], run(Case().proto(do_rotary=0), arrays)["y"])


@pytest.mark.parametrize("unknown", ["query", "caches"])
def test_the_size_of_a_head_is_known_by_the_cache_or_the_queries(unknown: str) -> None:
    model = Case().model()
    node = attention_of(model)
    for value in node.inputs[:1] if unknown == "query" else node.inputs[3:5]:
        assert value is not None
        value.shape = None
    assert LowerAttention(90)(model).modified
    assert attention_of(model).domain == "fqonnx"


def test_bfloat16_and_subgraphs() -> None:
    case = Case(dtype=BF16)
    model = case.model()
    inner = attention_of(model)
    assert len(lower(model)) == 1
    model = case.model()
    inner = attention_of(model)
    negated = next(node for node in model.graph if node.op_type == "Neg")
    model.graph.remove([inner, negated])
    branches = {}
    for name in ("then_branch", "else_branch"):
        node = ir.node(OP, inner.inputs, inner.attributes, domain="com.microsoft", num_outputs=3, name=f"{name}_attention")
        for value, like in zip(node.outputs, inner.outputs, strict=True):
            value.name, value.type, value.shape = f"{name}_{like.name}", like.type, like.shape
        branches[name] = ir.Graph([], list(node.outputs), nodes=[node], name=name)
    condition = ir.val("condition", ir.DataType.BOOL, [])
    model.graph.inputs.append(condition)
    chosen = ir.node("If", [condition], branches, num_outputs=3, name="if")
    for value, like in zip(chosen.outputs, inner.outputs, strict=True):
        value.name, value.type, value.shape = f"chosen_{like.name}", like.type, like.shape
    model.graph.append(chosen)
    model.graph.outputs[:] = chosen.outputs
    assert [node.name for node in lower(model)] == ["then_branch_attention", "else_branch_attention"]


# --- What stays -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capability", [None, 75, 80, 89, 90, 100, 120])
def test_only_where_the_target_has_a_kernel(capability: int | None, caplog: pytest.LogCaptureFixture) -> None:
    """By the table itself: no capability is known to the pass."""
    has = capability is not None and any(k.op == OP and k.chosen[0] <= capability <= k.chosen[1] for k in KERNELS)
    if has:
        assert len(lower(Case().model(), capability)) == 1
    else:
        why = stays(Case().model(), caplog, capability)
        assert why.startswith("is for no GPU in particular" if capability is None else f"has no kernel for this {OP} on compute capability")
    assert has == (capability is not None and capability >= 90)


@pytest.mark.parametrize(
    ("attributes", "why"),
    [
        ({"local_window_size": 128}, "has local_window_size = 128"),
        ({"softcap": 30.0}, "has softcap = 30.0"),
        ({"smooth_softmax": 1}, "has smooth_softmax = 1"),
        ({"rotary_interleaved": 1}, "has rotary_interleaved = 1"),
        ({"causal": 0}, "has causal = 0"),
        ({"k_quant_type": "PER_TENSOR"}, "has k_quant_type = PER_TENSOR"),
        ({"v_quant_type": "PER_CHANNEL"}, "has v_quant_type = PER_CHANNEL"),
        ({"kv_cache_bit_width": 8}, "has kv_cache_bit_width = 8"),
        ({"qk_output": 1}, "has qk_output = 1"),
        ({"sliding_window_cache": 1}, "has sliding_window_cache = 1"),
        ({"invented": 1}, "has invented = 1"),
        ({"num_heads": 5, "kv_num_heads": 2}, "has 5 heads of queries for 2 of keys"),
        ({"num_heads": 2, "kv_num_heads": 1}, "has caches of 2 heads for 1 of keys"),
        ({"num_heads": 6}, "has a query of 512 columns for 10 heads"),
        ({"num_heads": 12}, "has heads of 32 and 64"),
        ({"kv_num_heads": None}, "has 4 heads of queries for 0 of keys"),
    ],
)
def test_attention_of_another_kind_stays(attributes: dict[str, Any], why: str, caplog: pytest.LogCaptureFixture) -> None:
    assert stays(Case().model(**attributes), caplog) == why


@pytest.mark.parametrize(
    ("case", "why"),
    [
        (Case(dtype=FP32), "is of FLOAT, not FLOAT16 or BFLOAT16"),
        (Case(head=32), "has heads of 32, not 64 or 128"),
        (Case(head=80), "has heads of 80, not 64 or 128"),
        (Case(head=256, packed=False), "has heads of 256, not 64 or 128"),
    ],
)
def test_types_and_sizes_without_a_kernel_stay(case: Case, why: str, caplog: pytest.LogCaptureFixture) -> None:
    assert stays(case.model(), caplog) == why


@pytest.mark.parametrize(
    ("slot", "name"),
    list(enumerate(("position_ids", "attention_bias", "head_sink", "k_scale", "v_scale", "q_norm_weight", "k_norm_weight"), start=9)),
)
def test_inputs_that_the_op_has_not_stay(slot: int, name: str, caplog: pytest.LogCaptureFixture) -> None:
    model = Case().model()
    node = attention_of(model)
    node.resize_inputs(slot + 1)
    node.replace_input_with(slot, ir.val(name, ir.DataType.FLOAT16, ["x"]))
    assert stays(model, caplog) == f"reads {name}"


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ("no past", "has no past_key"),
        ("no lengths", "has no seqlens_k"),
        ("key alone", "has one of key and value"),
        ("present not given", "does not give all keys and values"),
        ("scores", "gives its scores"),
        ("no tables", "has a cos_cache of unknown columns for heads of 64"),
        ("half the head turned", "has a cos_cache of 16 columns for heads of 64"),
        ("int8 cache", "has no k_scale"),
        ("nothing known", "has heads of unknown size"),
        ("an input of the future", "reads an unknown input"),
    ],
)
def test_other_inputs_and_outputs_stay(changed: str, why: str, caplog: pytest.LogCaptureFixture) -> None:
    model = Case().model()
    node = attention_of(model)
    if changed in ("no past", "no lengths", "key alone"):
        slot = {"no past": 3, "no lengths": 5, "key alone": 1}[changed]
        node.replace_input_with(slot, ir.val("key", ir.DataType.FLOAT16, ["batch", 1, 128]) if changed == "key alone" else None)
    elif changed == "present not given":
        model.graph.outputs[:] = model.graph.outputs[:1]
        node.resize_outputs(1)
    elif changed == "scores":
        node.resize_outputs(4)
        node.outputs[3].name = "scores"
    elif changed == "no tables":
        node.resize_inputs(7)
    elif changed == "half the head turned":
        node.replace_input_with(7, ir.val("cos", ir.DataType.FLOAT16, [POSITIONS, 16]))
    elif changed == "int8 cache":
        for slot in (3, 4):
            node.replace_input_with(slot, ir.val(f"codes{slot}", ir.DataType.INT8, ["batch", 2, "past", 64]))
    elif changed == "nothing known":
        for value in (*node.inputs[:1], *node.inputs[3:5]):
            assert value is not None
            value.shape = None
    else:
        node.resize_inputs(17)
        node.replace_input_with(16, ir.val("future", ir.DataType.FLOAT16, ["x"]))
    assert stays(model, caplog) == why


# --- Whole models -----------------------------------------------------------------------------------------------------------------------

STACK = decoder.Shape(hidden=256, heads=4, kv_heads=2, intermediate=256, layers=2, positions=64)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stack") / "model.onnx"
    decoder.export(path, STACK)
    return Path(path)


@pytest.fixture(scope="module")
def built(stack: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("built") / "w4a4"
    recipe = Recipe(transform="hadamard", weights="rtn")
    build(stack, out, recipe=recipe, random_calibration=True, calib_samples=2, target="sm90")
    return out


def attention_ops(model: ir.Model | Path) -> Counter[str]:
    nodes = (ir.load(model) if isinstance(model, Path) else model).graph
    return Counter(node.domain for node in nodes if node.op_type == OP)


def stack_feeds(tokens: int, past: int, rows: int = 0) -> Arrays:
    rng = np.random.default_rng(tokens)
    caches = {
        f"past_key_values.{layer}.{part}": rng.standard_normal((2, STACK.kv_heads, rows or past, STACK.head)).astype(np.float16)
        for layer in range(STACK.layers)
        for part in ("key", "value")
    }
    hidden = rng.standard_normal((2, tokens, STACK.hidden)).astype(np.float16)
    return {"hidden_states": hidden, "attention_mask": np.ones((2, past + tokens), np.int64), **caches}


def quantized(stack: Path, target: str | None, engine: str = "onnxruntime") -> ir.Model:
    model = prepare(ir.load(stack))
    groups: tuple[LinearGroup, ...] = linears.find(model).groups
    solutions = solve(groups, SCHEMES["w4a4"], scaled=False)
    return quantize_model(model, groups, solutions.__getitem__, Recipe(transform="none", weights="rtn"), target, engine, validate=True)


def test_a_decoder_computes_the_same_with_the_op_and_without(stack: Path) -> None:
    plain, lowered = quantized(stack, "sm90", "tensorrt"), quantized(stack, "sm90")
    assert (attention_ops(plain), attention_ops(lowered)) == ({"com.microsoft": 2}, {"fqonnx": 2})
    for arrays in (stack_feeds(1, 5), stack_feeds(6, 0), stack_feeds(1, 3, rows=8)):
        before, after = run(plain, arrays), run(lowered, arrays)
        assert len(before) == 1 + 2 * STACK.layers
        for name, array in before.items():
            valid = np.s_[:] if name == "last_hidden_state" else np.s_[:, :, : arrays["attention_mask"].shape[1]]
            np.testing.assert_array_equal(after[name][valid], array[valid], strict=True)


@pytest.mark.parametrize(
    ("target", "engine"), [(None, "onnxruntime"), ("sm86", "onnxruntime"), ("sm90", "tensorrt"), ("sm90", "tensorrt-rtx")]
)
def test_other_targets_and_engines_keep_onnx_runtimes_node(stack: Path, target: str | None, engine: str) -> None:
    assert attention_ops(quantized(stack, target, engine)) == {"com.microsoft": 2}


def test_a_build_has_the_op_and_says_so(built: Path, stack: Path) -> None:
    assert attention_ops(built / "model.onnx") == {"fqonnx": 2}
    onnx.checker.check_model(str(built / "model.onnx"), full_check=True)
    manifest = open_artifact(built).manifest
    kernel = kernel_for(OP, capability=90)
    assert manifest["attention"] == [
        {"name": f"/model/layers.{layer}/attn/{OP}", "op": f"fqonnx.{OP}", "kernel": kernel.name, "instruction": kernel.instruction}
        for layer in range(2)
    ]
    expected, got = (run_session(session(path), stack_feeds(1, 5))["last_hidden_state"] for path in (stack, built / "model.onnx"))
    error = np.linalg.norm(got.astype(np.float32) - expected) / np.linalg.norm(expected.astype(np.float32))
    assert 1e-4 < error < 0.2


def test_kernels_that_attention_alone_needs_are_told_before_the_work(stack: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights alone in four bits have no op of fqonnx's, but attention has."""
    monkeypatch.setattr("fqonnx.build.require_device", lambda _device: None)
    monkeypatch.setattr("fqonnx.plugins.library.library_path", lambda: None)
    monkeypatch.setattr("fqonnx.build.Data.read", lambda *_, **__: pytest.fail("the work began"))
    recipe = Recipe(scheme="w4a16", transform="none", weights="rtn")
    with pytest.raises(EngineError, match="run `fqonnx plugin build`"):
        build(stack, tmp_path / "out", recipe=recipe, random_calibration=True, target="sm90", verify_device="cuda")
    model = prepare(ir.load(stack))
    assert [has_attention(model, capability) for capability in (90, 120, 86, None)] == [True, True, False, False]
    assert attention_ops(model) == {"com.microsoft": 2}


def test_a_build_for_no_gpu_in_particular_lists_no_attention(stack: Path, tmp_path: Path) -> None:
    recipe = Recipe(transform="hadamard", weights="rtn")
    build(stack, tmp_path / "out", recipe=recipe, random_calibration=True, calib_samples=2)
    assert "attention" not in open_artifact(tmp_path / "out").manifest
    assert attention_ops(tmp_path / "out" / "model.onnx") == {"com.microsoft": 2}


@pytest.mark.parametrize("rows", [0, 8], ids=["buffers of their own", "in place"])
def test_verify_goes_through_the_op(built: Path, stack: Path, rows: int) -> None:
    report = verify(stack, built, [stack_feeds(1, 5, rows=rows), stack_feeds(6, 0, rows=rows)], layers=True)
    assert 0 < report.outputs["last_hidden_state"].rel_l2 < 0.2
    layers = {group.name: group.layer for group in report.groups}
    assert set(layers) == {entry["name"] for entry in open_artifact(built).manifest["groups"]}
    assert all(layer is not None and 0 < layer.rel_l2 < 0.6 for layer in layers.values())


def test_bisecting_goes_through_the_op(built: Path, stack: Path) -> None:
    found = bisect(stack, built, [stack_feeds(1, 5), stack_feeds(6, 0)])
    assert found.first in found.groups
    whole = verify(stack, built, [stack_feeds(1, 5), stack_feeds(6, 0)])
    assert found.whole == pytest.approx(max(t.rel_l2 for t in whole.outputs.values()), rel=0.05)


def test_bench_finds_the_cache_of_a_build_alone(built: Path) -> None:
    """By what the op does with it: there is no float model beside it to ask."""
    sizes = {"batch": (2,), "sequence": (1,), "past_sequence": (5,)}
    result = bench(built, shapes=[sizes], kv_cache=16, profile=True, duration=0.0, warm_up=0.0, iterations=10)
    (shape,) = result.shapes
    assert shape.inputs["past_key_values.1.key"] == (2, STACK.kv_heads, 16, STACK.head)
    assert shape.profile[CANDIDATE].ops[OP].calls == STACK.layers


def test_golden(golden: Callable[[str, ir.Model | str], None]) -> None:
    model = Case().model()
    lower(model)
    golden("attention", graph_text(model))
