from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from fqonnx.calib.random_data import RandomSource
from fqonnx.calib.roles import input_roles, padding_mask, sequence_limit
from fqonnx.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Sequence

node = helper.make_node
INT, FLOAT, BOOL = TensorProto.INT64, TensorProto.FLOAT, TensorProto.BOOL


def value(name: str, dtype: int, shape: Sequence[int | str | None] | None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def build(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    weights: dict[str, Any],
    functions: Sequence[onnx.FunctionProto] = (),
    *,
    infer: bool = True,
) -> onnx.ModelProto:
    tensors = [numpy_helper.from_array(np.asarray(array), name) for name, array in weights.items()]
    outputs = [onnx.ValueInfoProto(name=nodes[-1].output[0])]
    graph = helper.make_graph(list(nodes), "g", list(inputs), outputs, tensors)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1), helper.make_opsetid("local", 1)]
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=10, functions=functions)
    return onnx.shape_inference.infer_shapes(proto) if infer else proto


def run(proto: onnx.ModelProto, feed: dict[str, Any]) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(None, feed)[0]


def table(rows: int, width: int = 4) -> np.ndarray[Any, Any]:
    return np.zeros((rows, width), np.float32)


def ids(name: str = "tokens") -> onnx.ValueInfoProto:
    return value(name, INT, ["batch", "seq"])


def through_where(rows: int) -> onnx.ModelProto:
    nodes = [
        node("Equal", ["tokens", "pad"], ["is_pad"]),
        node("Where", ["is_pad", "zero", "tokens"], ["clean"]),
        node("Gather", ["table", "clean"], ["y"]),
    ]
    return build(nodes, [ids()], {"pad": -100, "zero": 0, "table": table(rows)})


def through_moves(rows: int) -> onnx.ModelProto:
    nodes = [
        node("Cast", ["tokens"], ["narrow"], to=TensorProto.INT32),
        node("Reshape", ["narrow", "flat"], ["line"]),
        node("Unsqueeze", ["line", "zero"], ["row"]),
        node("Transpose", ["row"], ["column"]),
        node("Identity", ["column"], ["same"]),
        node("Slice", ["same", "zero", "many"], ["cut"]),
        node("Gather", ["table", "cut"], ["y"]),
    ]
    return build(nodes, [ids()], {"flat": [-1], "zero": [0], "many": [10**9], "table": table(rows)})


def with_offset(rows: int) -> onnx.ModelProto:
    # OPT and BART look positions up two rows further down.
    nodes = [node("Add", ["tokens", "two"], ["shifted"]), node("Gather", ["table", "shifted"], ["y"])]
    return build(nodes, [ids()], {"two": 2, "table": table(rows + 2)})


def less_one(rows: int) -> onnx.ModelProto:
    nodes = [node("Sub", ["tokens", "one"], ["shifted"]), node("Gather", ["table", "shifted"], ["y"])]
    return build(nodes, [ids()], {"one": 1, "table": table(rows)})


def two_tables(rows: int) -> onnx.ModelProto:
    nodes = [
        node("Gather", ["large", "tokens"], ["a"]),
        node("Gather", ["table", "tokens"], ["b"]),
        node("Add", ["a", "b"], ["y"]),
    ]
    return build(nodes, [ids()], {"large": table(1000), "table": table(rows)})


def along_the_last_axis(rows: int) -> onnx.ModelProto:
    return build([node("Gather", ["table", "tokens"], ["y"], axis=-1)], [ids()], {"table": table(3, rows)})


def quantized_table(rows: int) -> onnx.ModelProto:
    nodes = [node("DequantizeLinear", ["table", "scale"], ["wide"]), node("Gather", ["wide", "tokens"], ["y"])]
    return build(nodes, [ids()], {"table": np.zeros((rows, 4), np.int8), "scale": np.float32(1)}, infer=False)


def in_a_branch(rows: int) -> onnx.ModelProto:
    branch = helper.make_graph([node("Gather", ["table", "tokens"], ["p"])], "p", [], [value("p", FLOAT, None)])
    other = helper.make_graph(
        [node("Identity", ["tokens"], ["i"]), node("Gather", ["table", "i"], ["q"])], "q", [], [value("q", FLOAT, None)]
    )
    return build([node("If", ["cond"], ["y"], then_branch=branch, else_branch=other)], [ids()], {"cond": True, "table": table(rows)})


def out_of_a_branch(rows: int) -> onnx.ModelProto:
    branch = helper.make_graph([node("Identity", ["tokens"], ["p"])], "p", [], [value("p", INT, None)])
    other = helper.make_graph([node("Neg", ["tokens"], ["q"])], "q", [], [value("q", INT, None)])
    nodes = [node("If", ["cond"], ["chosen"], then_branch=branch, else_branch=other), node("Gather", ["table", "chosen"], ["y"])]
    return build(nodes, [ids()], {"cond": True, "table": table(rows)})


def through_a_loop(rows: int) -> onnx.ModelProto:
    body = helper.make_graph(
        [node("Identity", ["go"], ["on"]), node("Identity", ["carried"], ["next"])],
        "body",
        [value("i", INT, []), value("go", BOOL, []), value("carried", INT, None)],
        [value("on", BOOL, []), value("next", INT, None)],
    )
    nodes = [node("Loop", ["twice", "yes", "tokens"], ["after"], body=body), node("Gather", ["table", "after"], ["y"])]
    return build(nodes, [ids()], {"twice": 2, "yes": True, "table": table(rows)})


def in_a_function(rows: int) -> onnx.ModelProto:
    embed = helper.make_function(
        "local", "Embed", ["weight", "index"], ["out"], [node("Gather", ["weight", "index"], ["out"])], [helper.make_opsetid("", 21)]
    )
    nodes = [node("Embed", ["table", "tokens"], ["y"], domain="local")]
    return build(nodes, [ids()], {"table": table(rows)}, [embed], infer=False)


def through_a_function(rows: int) -> onnx.ModelProto:
    same = helper.make_function("local", "Same", ["a"], ["b"], [node("Identity", ["a"], ["b"])], [helper.make_opsetid("", 21)])
    nodes = [node("Same", ["tokens"], ["s"], domain="local"), node("Gather", ["table", "s"], ["y"])]
    return build(nodes, [ids()], {"table": table(rows)}, [same], infer=False)


def one_hot(rows: int) -> onnx.ModelProto:
    nodes = [node("OneHot", ["tokens", "depth", "onoff"], ["hot"]), node("MatMul", ["hot", "table"], ["y"])]
    return build(nodes, [ids()], {"depth": rows, "onoff": np.float32([0, 1]), "table": table(rows)})


LOOKUPS = [
    through_where, through_moves, with_offset, less_one, two_tables, along_the_last_axis, quantized_table, in_a_branch, out_of_a_branch,
    through_a_loop, one_hot,
]  # fmt: skip


@settings(max_examples=6, deadline=None)
@given(rows=st.integers(2, 60), seed=st.integers(0, 1000))
@pytest.mark.parametrize("make", LOOKUPS)
def test_ids_stay_in_the_table_and_use_all_of_it(make: Any, rows: int, seed: int) -> None:
    proto = make(rows)
    feeds = list(RandomSource(ir.from_proto(proto), seed=seed, samples=3))
    for feed in feeds:
        run(proto, feed)  # ONNX Runtime refuses an index outside the table
    tokens = np.concatenate([feed["tokens"].reshape(-1) for feed in feeds])
    if make is less_one:
        tokens = tokens - 1
    assert tokens.min() >= 0
    assert tokens.max() < rows
    assert len(set(tokens)) > rows * 0.8, "uniform over the table, not a corner of it"


@pytest.mark.parametrize("make", [in_a_function, through_a_function])
def test_local_functions_are_followed(make: Any) -> None:
    role = input_roles(ir.from_proto(make(9)))["tokens"]
    assert role.kind == "ids"
    # Inside a function shapes are not known: the bound is when the table's are.
    assert role.high == (9 if make is through_a_function else None)


def test_what_only_compares_ids_does_not_bound_them() -> None:
    # RoBERTa counts positions from ids != pad: that must not take the ids for positions.
    nodes = [
        node("Equal", ["tokens", "pad"], ["is_pad"]),
        node("Not", ["is_pad"], ["kept"]),
        node("Cast", ["kept"], ["ones"], to=INT),
        node("CumSum", ["ones", "axis"], ["count"]),
        node("Gather", ["positions", "count"], ["p"]),
        node("Gather", ["table", "tokens"], ["e"]),
        node("Add", ["p", "e"], ["y"]),
    ]
    weights = {"pad": 1, "axis": 1, "positions": table(200), "table": table(5000)}
    proto = build(nodes, [ids()], weights)
    assert input_roles(ir.from_proto(proto))["tokens"].high == 5000
    run(proto, next(iter(RandomSource(ir.from_proto(proto)))))


def bert(rows: int = 30, positions: int = 512) -> onnx.ModelProto:
    """Ids, segments and positions looked up, and a mask that ends in (1 - mask) * min added to scores."""
    nodes = [
        node("Gather", ["words", "input_ids"], ["w"]),
        node("Gather", ["types", "token_type_ids"], ["t"]),
        node("Gather", ["places", "position_ids"], ["p"]),
        node("Sum", ["w", "t", "p"], ["h"]),
        node("Transpose", ["h"], ["ht"], perm=[0, 2, 1]),
        node("MatMul", ["h", "ht"], ["scores"]),
        node("Unsqueeze", ["attention_mask", "one"], ["m3"]),
        node("Cast", ["m3"], ["mf"], to=FLOAT),
        node("Sub", ["onef", "mf"], ["inverse"]),
        node("Mul", ["inverse", "min"], ["bias"]),
        node("Add", ["scores", "bias"], ["masked"]),
        node("Softmax", ["masked"], ["y"]),
    ]
    names = ("input_ids", "token_type_ids", "position_ids", "attention_mask")
    weights = {
        "words": table(rows), "types": table(2), "places": table(positions), "one": [1], "onef": np.float32(1), "min": np.float32(-3e38),
    }  # fmt: skip
    return build(nodes, [value(name, INT, ["batch", "seq"]) for name in names], weights)


def test_ids_segments_positions_and_masks_are_told_apart() -> None:
    model = ir.from_proto(bert())
    assert {name: (role.kind, role.high) for name, role in input_roles(model).items()} == {
        "input_ids": ("ids", 30),
        "token_type_ids": ("segments", 2),
        "position_ids": ("positions", 512),
        "attention_mask": ("mask", None),
    }
    assert padding_mask(model) == "attention_mask"
    assert padding_mask(ir.from_proto(through_where(9))) is None
    feed = next(iter(RandomSource(model)))
    assert {array.shape for array in feed.values()} == {(1, 128)}
    assert feed["attention_mask"].all()
    assert feed["position_ids"].tolist() == [list(range(128))]
    assert set(np.unique(feed["token_type_ids"])) <= {0, 1}
    assert np.isfinite(run(bert(), feed)).all()


def test_a_short_table_of_positions_shortens_the_sequence() -> None:
    feed = next(iter(RandomSource(ir.from_proto(bert(positions=40)))))
    assert {array.shape for array in feed.values()} == {(1, 40)}
    run(bert(positions=40), feed)


def inner_positions(rows: int, offset: int = 0) -> onnx.ModelProto:
    """Positions counted inside the graph from the ids' shape, as GPT-2 and OPT do."""
    nodes = [
        node("Shape", ["tokens"], ["shape"]),
        node("Gather", ["shape", "one"], ["length"]),
        node("Range", ["zero", "length", "one"], ["count"]),
        node("Add", ["count", "offset"], ["shifted"]),
        node("Gather", ["places", "shifted"], ["p"]),
        node("Gather", ["table", "tokens"], ["e"]),
        node("Add", ["e", "p"], ["y"]),
    ]
    return build(nodes, [ids()], {"one": 1, "zero": 0, "offset": offset, "places": table(rows), "table": table(50)})


def sliced_positions(rows: int) -> onnx.ModelProto:
    """Positions cut from a constant, as BERT's TorchScript export does."""
    nodes = [
        node("Shape", ["tokens"], ["shape"]),
        node("Gather", ["shape", "one"], ["length"]),
        node("Unsqueeze", ["length", "zero1"], ["end"]),
        node("Slice", ["numbers", "zero1", "end", "one1"], ["count"]),
        node("Gather", ["places", "count"], ["p"]),
        node("Gather", ["table", "tokens"], ["e"]),
        node("Add", ["e", "p"], ["y"]),
    ]
    weights = {
        "one": 1, "zero1": [0], "one1": [1], "numbers": np.arange(rows)[None], "places": table(rows), "table": table(50),
    }  # fmt: skip
    return build(nodes, [ids()], weights)


def summed_positions(rows: int) -> onnx.ModelProto:
    """Positions as a running sum of ids that are no padding, times that mask, behind the padding's row, as RoBERTa does."""
    nodes = [
        node("Equal", ["tokens", "one"], ["is_pad"]),
        node("Not", ["is_pad"], ["kept"]),
        node("Cast", ["kept"], ["ones"], to=INT),
        node("CumSum", ["ones", "one"], ["count"]),
        node("Mul", ["count", "ones"], ["masked"]),
        node("Add", ["masked", "one"], ["index"]),
        node("Gather", ["places", "index"], ["p"]),
        node("Gather", ["table", "tokens"], ["e"]),
        node("Add", ["e", "p"], ["y"]),
    ]
    return build(nodes, [ids()], {"one": 1, "places": table(rows), "table": table(50)})


def summed_ones(rows: int) -> onnx.ModelProto:
    """Positions as a running sum of a mask that the graph makes itself, in fp32 and two rows further down, as OPT does."""
    nodes = [
        node("Shape", ["tokens"], ["size"]),
        node("Expand", ["one", "size"], ["ones"]),
        node("CumSum", ["ones", "axis"], ["count"]),
        node("Mul", ["count", "ones"], ["masked"]),
        node("Sub", ["masked", "one"], ["numbers"]),
        node("Cast", ["numbers"], ["whole"], to=INT),
        node("Add", ["whole", "two"], ["index"]),
        node("Gather", ["places", "index"], ["p"]),
        node("Gather", ["table", "tokens"], ["e"]),
        node("Add", ["e", "p"], ["y"]),
    ]
    return build(nodes, [ids()], {"one": np.float32(1), "axis": 1, "two": 2, "places": table(rows), "table": table(50)})


@pytest.mark.parametrize(
    ("proto", "limit"),
    [
        (summed_positions(33), 31),
        (summed_ones(33), 31),
        (inner_positions(33), 33),
        (inner_positions(33, 2), 31),
        (sliced_positions(20), 20),
        (through_where(9), None),
    ],
)
def test_positions_inside_the_graph_limit_the_sequence(proto: onnx.ModelProto, limit: int | None) -> None:
    model = ir.from_proto(proto)
    assert sequence_limit(model) == limit
    feed = next(iter(RandomSource(model)))
    assert feed["tokens"].shape == (1, limit or 128)
    run(proto, feed)


def test_embed_layer_normalization_bounds_all_its_ids() -> None:
    nodes = [
        node(
            "EmbedLayerNormalization",
            ["i", "s", "words", "places", "types", "gamma", "beta", "m"],
            ["y", "lengths"],
            domain="com.microsoft",
            epsilon=1e-5,
        )
    ]
    weights = {
        "words": table(11), "places": table(24), "types": table(2), "gamma": np.ones(4, np.float32), "beta": np.zeros(4, np.float32),
    }  # fmt: skip
    inputs = [value(name, TensorProto.INT32, ["batch", "seq"]) for name in ("i", "s", "m")]
    proto = build(nodes, inputs, weights, infer=False)
    model = ir.from_proto(proto)
    roles = input_roles(model)
    assert {name: (role.kind, role.high) for name, role in roles.items()} == {"i": ("ids", 11), "s": ("ids", 2), "m": ("mask", None)}
    feed = next(iter(RandomSource(model)))
    assert feed["i"].shape == (1, 24)
    run(proto, feed)


def test_rotary_positions_count_up() -> None:
    nodes = [
        node("Cast", ["where"], ["f"], to=FLOAT),
        node("Unsqueeze", ["f", "two"], ["f3"]),
        node("MatMul", ["f3", "freq"], ["angle"]),
        node("Concat", ["angle", "angle"], ["both"], axis=-1),
        node("Sin", ["both"], ["y"]),
    ]
    proto = build(nodes, [ids("where")], {"two": [2], "freq": np.ones((1, 3), np.float32)})
    model = ir.from_proto(proto)
    assert input_roles(model)["where"].kind == "positions"
    assert next(iter(RandomSource(model)))["where"].tolist() == [list(range(128))]


def decoder(mask_dim: str | None) -> onnx.ModelProto:
    past = ["batch", 2, "past_sequence_length", 4]
    nodes = [
        node("Gather", ["table", "input_ids"], ["e"]),
        node("Concat", ["past_key_values.0.key", "new"], ["keys"], axis=2),
        node("Cast", ["attention_mask"], ["mf"], to=FLOAT),
        node("Unsqueeze", ["mf", "axes"], ["m4"]),
        node("ReduceSum", ["keys", "last"], ["summed"], keepdims=0),
        node("Unsqueeze", ["summed", "two"], ["s4"]),
        node("Mul", ["s4", "m4"], ["y"]),
    ]
    inputs = [
        value("input_ids", INT, ["batch", "sequence_length"]),
        value("attention_mask", INT, ["batch", mask_dim]),
        value("past_key_values.0.key", FLOAT, past),
        value("new", FLOAT, ["batch", 2, "sequence_length", 4]),
    ]
    weights = {"table": table(9), "axes": [1, 2], "last": [-1], "two": [2]}
    return build(nodes, inputs, weights)


@pytest.mark.parametrize("mask_dim", ["past_sequence_length + sequence_length", "total_sequence_length", None, "mask_length"])
def test_past_keys_and_masks_have_sizes_that_fit(mask_dim: str | None) -> None:
    proto = decoder(mask_dim)
    model = ir.from_proto(proto)
    assert input_roles(model)["past_key_values.0.key"].kind == "past"
    feed = next(iter(RandomSource(model)))
    assert feed["past_key_values.0.key"].shape == (1, 2, 16, 4)
    assert feed["attention_mask"].shape == (1, 144)
    run(proto, feed)


def test_floats_images_flags_and_fixed_sizes() -> None:
    inputs = [
        value("pixels", FLOAT, ["batch", 3, "height", "width"]),
        value("patches", FLOAT, [None, None, None, None]),
        value("half", TensorProto.FLOAT16, [2, 5]),
        value("brain", TensorProto.BFLOAT16, [2, 5]),
        value("flag", BOOL, []),
        value("additive_mask", FLOAT, ["batch", 1, "seq", "seq"]),
        value("count", INT, [4]),
    ]
    nodes = [
        node("Softmax", ["scored"], ["y"]),
        node("Identity", ["pixels"], ["z"]),
    ]
    nodes.insert(0, node("Add", ["scores", "additive_mask"], ["scored"]))
    nodes.insert(0, node("Exp", ["additive_mask"], ["scores"]))
    model = ir.from_proto(build(nodes, inputs, {}))
    feed = next(iter(RandomSource(model, seed=1)))
    assert feed["pixels"].shape == feed["patches"].shape == (1, 3, 224, 224)
    assert abs(feed["pixels"].mean()) < 0.01
    assert abs(feed["pixels"].std() - 1) < 0.01
    assert feed["half"].dtype == np.float16
    assert feed["brain"].dtype == ml_dtypes.bfloat16
    assert feed["flag"] == np.array(True)
    assert not feed["additive_mask"].any()
    assert feed["additive_mask"].shape == (1, 1, 128, 128)
    assert set(feed["count"]) <= {0, 1}


def test_samples_differ_and_repeat() -> None:
    model = ir.from_proto(through_where(500))
    source = RandomSource(model, seed=3, samples=3)
    first, again, fewer = list(source), list(source), list(RandomSource(model, seed=3, samples=1))
    assert source.length == len(first) == 3
    assert all(np.array_equal(a["tokens"], b["tokens"]) for a, b in zip(first, again, strict=True))
    assert np.array_equal(first[0]["tokens"], fewer[0]["tokens"])
    assert not np.array_equal(first[0]["tokens"], first[1]["tokens"])
    others = [
        RandomSource(model, seed=4, samples=3),
        RandomSource(model, seed=3),
        RandomSource(ir.from_proto(through_where(501)), seed=3, samples=3),
    ]
    assert len({source.fingerprint, *(other.fingerprint for other in others)}) == 4
    assert RandomSource(model, seed=3, samples=3).fingerprint == source.fingerprint


def test_what_has_no_random_values_is_told() -> None:
    text = build([node("Identity", ["s"], ["y"])], [value("s", TensorProto.STRING, [1])], {})
    with pytest.raises(DataError, match="input 's' of type object has no random values: give --calib-data"):
        RandomSource(ir.from_proto(text))
    empty = build([node("Gather", ["table", "tokens"], ["y"])], [ids()], {"table": table(0)})
    with pytest.raises(DataError, match="input 'tokens' looks up a table without a valid row"):
        RandomSource(ir.from_proto(empty))


def test_contrib_lookups_and_lengths() -> None:
    nodes = [
        node("RotaryEmbedding", ["q", "where", "cos", "sin"], ["r"], domain="com.microsoft"),
        node(
            "GroupQueryAttention", ["r", "k", "v", "pk", "pv", "lengths", "total"], ["y", "a", "b"],
            domain="com.microsoft", num_heads=1, kv_num_heads=1,
        ),
    ]  # fmt: skip
    shapes: dict[str, Any] = {name: ["batch", "sequence_length", 8] for name in ("q", "k", "v")}
    inputs = [value(name, FLOAT, shape) for name, shape in shapes.items()]
    inputs += [value(name, FLOAT, ["batch", 1, "past_sequence_length", 8]) for name in ("pk", "pv")]
    inputs += [value("where", INT, ["batch", "sequence_length"]), value("lengths", TensorProto.INT32, ["batch"])]
    inputs += [value("total", TensorProto.INT32, [])]
    weights = {"cos": np.ones((300, 4), np.float32), "sin": np.zeros((300, 4), np.float32)}
    model = ir.from_proto(build(nodes, inputs, weights, infer=False))
    roles = input_roles(model)
    assert (roles["where"].kind, roles["where"].high) == ("positions", 300)
    assert (roles["lengths"].kind, roles["total"].kind) == ("kv_lengths", "kv_total")
    assert (roles["pk"].kind, roles["pv"].kind) == ("past", "past")
    feed = next(iter(RandomSource(model)))
    assert feed["lengths"].tolist() == [143]
    assert int(feed["total"]) == 144
    assert feed["where"].tolist() == [list(range(16, 144))]
    run(build(nodes, inputs, weights, infer=False), feed)


def test_the_rotary_tables_of_attention_limit_past_and_sequence() -> None:
    attention = node(
        "GroupQueryAttention", ["q", "k", "v", "pk", "pv", "lengths", "total", "cos", "sin"], ["y", "a", "b"],
        domain="com.microsoft", num_heads=1, kv_num_heads=1, do_rotary=1,
    )  # fmt: skip
    inputs = [value(name, FLOAT, ["batch", "sequence_length", 16]) for name in ("q", "k", "v")]
    inputs += [value(name, FLOAT, ["batch", 1, "past_sequence_length", 16]) for name in ("pk", "pv")]
    inputs += [value("lengths", TensorProto.INT32, ["batch"]), value("total", TensorProto.INT32, [])]
    proto = build([attention], inputs, {"cos": np.ones((40, 8), np.float32), "sin": np.zeros((40, 8), np.float32)}, infer=False)
    assert sequence_limit(ir.from_proto(proto)) == 40
    feed = next(iter(RandomSource(ir.from_proto(proto))))
    assert int(feed["total"]) == 40 == feed["pk"].shape[2] + feed["q"].shape[1]
    run(proto, feed)
