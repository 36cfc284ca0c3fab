"""Model files: what is refused and in which words, and saving that neither changes nor holds the model."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from typing import TYPE_CHECKING

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from fqonnx import model as model_file
from fqonnx.errors import ArtifactError, ModelError
from tests import zoo
from tests.graph_text import graph_text
from tests.runtime import run

if TYPE_CHECKING:
    from pathlib import Path


def _saved(tmp_path: Path, name: str = "matmul", *, external: bool = False) -> Path:
    path = tmp_path / "in" / "m.onnx"
    path.parent.mkdir(exist_ok=True)
    onnx.save(zoo.proto(name), path, save_as_external_data=external, size_threshold=0, location="m.data")
    return path


# --- What is refused ------------------------------------------------------------------------------------------------------------------


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"^no such file: .*absent\.onnx: check the path$"):
        model_file.load(tmp_path / "absent.onnx")


def test_folder_names_the_model_in_it(tmp_path: Path) -> None:
    path = _saved(tmp_path)
    with pytest.raises(ModelError, match=r"is a folder: give the .onnx file in it \(m\.onnx\)$"):
        model_file.load(path.parent)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty: export or copy it again"),
        (b"hello, I am no model\n" * 10, "is not an ONNX protobuf, or is cut short"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer, not the model: run `git lfs pull`"),
        (helper.make_tensor("t", TensorProto.FLOAT, [1], [1.0]).SerializeToString(), "(holds no ONNX graph|is not an ONNX protobuf)"),
    ],
    ids=["empty", "text", "lfs", "another protobuf"],
)
def test_other_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=message) as caught:
        model_file.load(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kept", [0.1, 0.5, 0.99])
def test_truncated_file(tmp_path: Path, kept: float) -> None:
    path = _saved(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(ModelError, match=r"cut short \(\d+ bytes\): export or copy it again$"):
        model_file.load(path)


def test_unreadable_file(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.symlink_to(path)  # root may read any mode; a link to itself nobody can
    with pytest.raises(ModelError, match=r"^cannot read .*m\.onnx: Too many levels of symbolic links"):
        model_file.load(path)


def test_missing_external_data(tmp_path: Path) -> None:
    path = _saved(tmp_path, external=True)
    (path.parent / "m.data").unlink()
    with pytest.raises(
        ModelError, match=r"^external data of tensor 'onnx::1' in .*m\.onnx is missing: .*m\.data: copy it beside the model$"
    ):
        model_file.load(path)


def test_truncated_external_data(tmp_path: Path) -> None:
    path = _saved(tmp_path, external=True)
    data = path.parent / "m.data"
    size = data.stat().st_size
    os.truncate(data, size - 1)
    with pytest.raises(
        ModelError, match=rf"tensor 'onnx::1' in .* is cut short: .*m\.data has {size - 1} bytes, needs {size}: copy it again$"
    ):
        model_file.load(path)


def test_external_data_of_another_length(tmp_path: Path) -> None:
    path = _saved(tmp_path, external=True)
    proto = onnx.load(path, load_external_data=False)
    (entry,) = (e for e in proto.graph.initializer[0].external_data if e.key == "length")
    entry.value = "8"
    onnx.save(proto, path)
    with pytest.raises(ModelError, match=r"is 8 bytes but its shape and type need 24576: export the model again$"):
        model_file.load(path)


def test_external_data_outside_the_folder(tmp_path: Path) -> None:
    """ONNX Runtime would refuse it after calibration had begun."""
    path = _saved(tmp_path, external=True)
    data = path.parent / "m.data"
    data.rename(tmp_path / "blob")
    data.symlink_to(tmp_path / "blob")
    with pytest.raises(ModelError, match=r"lies outside the model's folder .*: copy the real file beside the model$"):
        model_file.load(path)


def test_hard_linked_external_data(tmp_path: Path) -> None:
    path = _saved(tmp_path, external=True)
    (tmp_path / "link").hardlink_to(path.parent / "m.data")
    with pytest.raises(ModelError, match=r"has several hard links, .*: make it a plain copy$"):
        model_file.load(path)


def _with_node(op_type: str, domain: str = "", name: str = "it") -> ir.Model:
    g = zoo.Graph("refused")
    return ir.from_proto(g.model([g.op(op_type, "x", domain=domain, name=name)]))


@pytest.mark.parametrize(
    ("op_type", "domain"),
    [
        ("DynamicQuantizeLinear", ""),
        ("QuantizeLinear", ""),
        ("MatMulNBits", "com.microsoft"),
        ("QAttention", "com.microsoft"),
        ("W4A4Gemm", "fqonnx"),
    ],
)
def test_already_quantized(op_type: str, domain: str) -> None:
    with pytest.raises(ModelError, match=rf"^the model is already quantized \({op_type} in node 'it'\): start from the float export"):
        model_file.require_float(_with_node(op_type, domain))


def test_quantized_inside_a_function() -> None:
    g = zoo.Graph("function")
    body = [helper.make_node("DynamicQuantizeLinear", ["a"], ["q", "s", "z"]), helper.make_node("Cast", ["q"], ["b"], to=zoo.FLOAT)]
    g.functions.append(helper.make_function("custom", "F", ["a"], ["b"], body, [helper.make_opsetid("", 21)]))
    with pytest.raises(ModelError, match="already quantized"):
        model_file.require_float(ir.from_proto(g.model([g.op("F", "x", domain="custom")])))


def test_unknown_operators() -> None:
    with pytest.raises(
        ModelError, match=r"^unknown operator Swirl of domain 'acme' in node 'it': ONNX Runtime cannot run it for calibration; "
    ):
        model_file.require_float(_with_node("Swirl", "acme"))
    with pytest.raises(ModelError, match=r"^Swirl in node 'it' is not an ONNX operator"):
        model_file.require_float(_with_node("Swirl"))


@pytest.mark.parametrize(
    ("opset", "message"), [(12, "^opset 12 is too old: export the model with opset 13 or newer$"), (99, "^opset 99 is newer than")]
)
def test_opsets_out_of_range(opset: int, message: str) -> None:
    model = zoo.model("matmul")
    model.opset_imports[""] = opset
    with pytest.raises(ModelError, match=message):
        model_file.require_float(model)


def test_no_standard_opset() -> None:
    model = zoo.model("matmul")
    model.opset_imports.clear()
    with pytest.raises(ModelError, match="imports no standard ONNX operators"):
        model_file.require_float(model)


@pytest.mark.parametrize("name", zoo.ZOO)
def test_the_zoo_is_float(name: str) -> None:
    """Weights behind DequantizeLinear, runtime operators and local functions are fine."""
    model_file.require_float(zoo.model(name))


# --- Inputs --------------------------------------------------------------------------------------------------------------------------


def test_inputs() -> None:
    proto = zoo.proto("linear_in_if_body")
    proto.graph.input.append(
        helper.make_tensor_value_info("onnx::1", zoo.FLOAT, [zoo.K, zoo.K])
    )  # an initializer, as old exporters list them
    proto.graph.input.append(helper.make_tensor_value_info("half", zoo.BFLOAT16, [None, 3]))
    assert model_file.inputs(ir.from_proto(proto)) == (
        model_file.ModelInput("x", np.dtype(np.float32), ("batch", "seq", zoo.K)),
        model_file.ModelInput("flag", np.dtype(np.bool_), ()),
        model_file.ModelInput("half", np.dtype(ml_dtypes.bfloat16), (None, 3)),
    )


def test_inputs_that_are_no_tensors() -> None:
    proto = zoo.proto("matmul")
    proto.graph.input.append(helper.make_tensor_sequence_value_info("many", zoo.FLOAT, None))
    with pytest.raises(ModelError, match=r"^input 'many' is .*, not a tensor of known rank: export it with one$"):
        model_file.inputs(ir.from_proto(proto))


# --- Saving --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("external_in", [False, True])
@pytest.mark.parametrize("external_out", [False, True])
@pytest.mark.parametrize(
    "name", ["dequantized_blocked_int4", "linear_in_if_body", "matmul_weight_in_constant_node", "fp16", "local_functions"]
)
def test_round_trip(tmp_path: Path, name: str, external_in: bool, external_out: bool) -> None:
    model = model_file.load(_saved(tmp_path, name, external=external_in))
    before = graph_text(model)
    target = tmp_path / "out" / "copy.onnx"
    target.parent.mkdir()
    model_file.save(model, target, external=external_out)
    assert graph_text(model) == before
    assert sorted(p.name for p in target.parent.iterdir()) == (["copy.onnx", "copy.onnx.data"] if external_out else ["copy.onnx"])
    (tmp_path / "in" / "m.onnx").unlink()  # the copy stands alone
    (tmp_path / "in" / "m.data").unlink(missing_ok=True)
    again = model_file.load(target)
    feeds = zoo.feeds(zoo.proto(name))
    for output, value in run(zoo.proto(name), feeds).items():
        np.testing.assert_array_equal(run(onnx.load(target), feeds)[output], value)
    again_lines, lines = graph_text(again).splitlines(), before.splitlines()
    assert sorted(again_lines) == sorted(lines)  # weights may change their order


@pytest.mark.parametrize("external", [False, True])
def test_external_data_of_constant_nodes_and_bodies_moves_along(tmp_path: Path, external: bool) -> None:
    """Both may hold weights; a saved model must not go on pointing at the old file."""
    g = zoo.Graph("elsewhere")
    weight = onnx.numpy_helper.from_array(g.random.normal(size=(zoo.K, zoo.K)).astype(np.float32), "inner")
    y = helper.make_tensor_value_info("y", zoo.FLOAT, None)
    then = helper.make_graph([helper.make_node("MatMul", ["h", "inner"], ["y"])], "then", [], [y], [weight])
    other = helper.make_graph([helper.make_node("Relu", ["h"], ["y"])], "else", [], [y])
    constant = onnx.numpy_helper.from_array(g.random.normal(size=(zoo.K, zoo.K)).astype(np.float32), "outer")
    g.op("MatMul", "x", g.op("Constant", value=constant), outputs=["h"])
    out = g.op("If", "flag", then_branch=then, else_branch=other)
    proto = g.model([out], {"x": (zoo.FLOAT, ("rows", zoo.K)), "flag": (zoo.BOOL, ())})
    feeds = zoo.feeds(proto)
    expected = run(proto, feeds)[out]
    source = tmp_path / "in" / "m.onnx"
    source.parent.mkdir()
    onnx.save(proto, source, save_as_external_data=True, size_threshold=0, location="m.data", convert_attribute=True)
    model_file.save(model_file.load(source), tmp_path / "copy.onnx", external=external)
    (source.parent / "m.data").unlink()
    np.testing.assert_array_equal(run(onnx.load(tmp_path / "copy.onnx"), feeds)[out], expected)


def test_tensors_without_tofile_are_written(tmp_path: Path) -> None:
    """The tensor protocol does not ask for it."""

    class Plain:
        name, doc_string, meta, metadata_props = "w", None, {}, {}
        dtype, shape, size, nbytes = ir.DataType.FLOAT, ir.Shape([zoo.K, zoo.N]), zoo.K * zoo.N, zoo.K * zoo.N * 4
        raw = None

        def numpy(self) -> np.ndarray:
            return np.full((zoo.K, zoo.N), 3, np.float32)

        def tobytes(self) -> bytes:
            return self.numpy().tobytes()

        __array__ = __dlpack__ = __dlpack_device__ = numpy

    model = zoo.model("matmul")
    model.graph.initializers["onnx::1"].const_value = Plain()
    model_file.save(model, tmp_path / "m.onnx", external=False)
    assert (onnx.numpy_helper.to_array(onnx.load(tmp_path / "m.onnx").graph.initializer[0]) == 3).all()


def test_model_that_the_ir_cannot_hold(tmp_path: Path) -> None:
    proto = zoo.proto("matmul")
    proto.graph.initializer[0].data_type = 99
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(ModelError, match=r"m\.onnx is not a valid ONNX model \(.*\): export it again$") as caught:
        model_file.load(tmp_path / "m.onnx")
    assert "\n" not in str(caught.value)


def test_bf16_and_strings_round_trip(tmp_path: Path) -> None:
    text = ir.StringTensor(np.array([b"a", b"bc"]), name="words")
    words = ir.Value(name="words", const_value=text, shape=ir.Shape([2]), type=ir.TensorType(ir.DataType.STRING))
    model = zoo.model("bf16")
    model.graph.register_initializer(words)
    model_file.save(model, tmp_path / "m.onnx")
    again = model_file.load(tmp_path / "m.onnx")
    for name, value in model.graph.initializers.items():
        loaded = again.graph.initializers[name].const_value
        assert loaded is not None
        assert value.const_value is not None
        assert loaded.dtype == value.const_value.dtype
        np.testing.assert_array_equal(loaded.numpy(), value.const_value.numpy())


def test_save_over_the_file_that_was_loaded(tmp_path: Path) -> None:
    expected = onnx.numpy_helper.to_array(zoo.proto("matmul").graph.initializer[0])
    for external in (True, False):
        path = _saved(tmp_path, external=external)
        model_file.save(model_file.load(path), path, external=external)
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(onnx.load(path).graph.initializer[0]), expected)


def test_lazy_tensors_are_evaluated_once_each_and_dropped(tmp_path: Path) -> None:
    calls: list[str] = []

    def lazy(name: str) -> ir.LazyTensor:
        def make() -> ir.TensorProtocol:
            calls.append(name)
            return ir.tensor(np.full((zoo.K, zoo.N), len(name), np.float32))

        return ir.LazyTensor(make, dtype=ir.DataType.FLOAT, shape=ir.Shape([zoo.K, zoo.N]), name=name)

    for external in (False, True):
        calls.clear()
        model = zoo.model("input_shared_with_other_nodes")
        for name, value in model.graph.initializers.items():
            if value.const_value is not None and value.const_value.size > 1000:
                value.const_value = lazy(name)
        model_file.save(model, tmp_path / "m.onnx", external=external)
        assert len(calls) == len(set(calls)) == 2
        saved = onnx.load(tmp_path / "m.onnx")
        for name, array in ((t.name, onnx.numpy_helper.to_array(t)) for t in saved.graph.initializer if t.name in calls):
            assert (array == len(name)).all()


def test_failed_save_leaves_what_was_there(tmp_path: Path) -> None:
    path = _saved(tmp_path)
    before = path.read_bytes()
    model = zoo.model("matmul")

    def fail() -> ir.TensorProtocol:
        raise OSError(28, "No space left on device")

    model.graph.initializers["onnx::1"].const_value = ir.LazyTensor(fail, dtype=ir.DataType.FLOAT, shape=ir.Shape([zoo.K, zoo.N]))
    for external in (False, True):
        with pytest.raises(ArtifactError, match=r"^cannot write .*m\.onnx: No space left on device: free space or choose another place$"):
            model_file.save(model, path, external=external)
        assert path.read_bytes() == before
        assert [p.name for p in path.parent.iterdir()] == ["m.onnx"]


def test_save_into_no_folder(tmp_path: Path) -> None:
    for external in (False, True):
        with pytest.raises(ArtifactError, match=r"cannot write .*m\.onnx: No such file or directory"):
            model_file.save(zoo.model("matmul"), tmp_path / "absent" / "m.onnx", external=external)


def test_a_tensor_that_lies_about_its_size_is_our_bug(tmp_path: Path) -> None:
    model = zoo.model("matmul")
    wrong = ir.LazyTensor(lambda: ir.tensor(np.zeros(3, np.float32)), dtype=ir.DataType.FLOAT, shape=ir.Shape([zoo.K, zoo.N]))
    model.graph.initializers["onnx::1"].const_value = wrong
    with pytest.raises(AssertionError, match="wrote 12 bytes, its shape and type say 24576"):
        model_file.save(model, tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("external", [False, True])
def test_saving_holds_one_tensor_at_a_time(tmp_path: Path, external: bool) -> None:
    """384 MB of weights in 24 tensors; what the process grows by while it makes and writes them."""
    script = textwrap.dedent(f"""
        import resource
        import numpy as np, onnx_ir as ir
        from fqonnx import model as model_file
        shape = [2048, 2048]
        make = lambda: ir.tensor(np.ones(shape, np.float32))
        weights = [
            ir.Value(name=f"w{{i}}", shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT),
                     const_value=ir.LazyTensor(make, dtype=ir.DataType.FLOAT, shape=ir.Shape(shape), name=f"w{{i}}"))
            for i in range(24)
        ]
        x = ir.Value(name="x", shape=ir.Shape(["b", 2048]), type=ir.TensorType(ir.DataType.FLOAT))
        nodes, h = [], x
        for w in weights:
            nodes.append(ir.node("MatMul", [h, w])); h = nodes[-1].outputs[0]
        graph = ir.Graph([x], [h], nodes=nodes, initializers=weights, opset_imports={{"": 21}}, name="big")
        model = ir.Model(graph, ir_version=10)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        model_file.save(model, {str(tmp_path / "m.onnx")!r}, external={external})
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert sum(p.stat().st_size for p in tmp_path.iterdir()) > 24 * 2048 * 2048 * 4
    assert int(done.stdout) < 100_000  # kB; a tensor is 16 MB


def test_five_gigabytes_are_prepared_and_searched_in_little_memory(tmp_path: Path) -> None:
    """80 linears of 64 MiB in a sparse file; one weight is read at the end."""
    layers, k, n = 80, 4096, 8192
    x = helper.make_tensor_value_info("x", zoo.FLOAT16, ["rows", k])
    nodes, initializers = [], []
    for i in range(layers):
        weight = TensorProto(name=f"w{i}", data_type=zoo.FLOAT16, dims=[k, n], data_location=TensorProto.EXTERNAL)
        for key, value in (("location", "m.data"), ("offset", i * 2 * k * n), ("length", 2 * k * n)):
            weight.external_data.add(key=key, value=str(value))
        initializers.append(weight)
        nodes.append(helper.make_node("MatMul", ["x", f"w{i}"], [f"y{i}"]))
    nodes.append(helper.make_node("Sum", [f"y{i}" for i in range(layers)], ["y"]))
    graph = helper.make_graph(nodes, "large", [x], [helper.make_tensor_value_info("y", zoo.FLOAT16, ["rows", n])], initializers)
    (tmp_path / "m.onnx").write_bytes(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]).SerializeToString())
    with (tmp_path / "m.data").open("wb") as file:
        file.truncate(layers * 2 * k * n)
    script = textwrap.dedent(f"""
        import resource
        from fqonnx import model as model_file
        from fqonnx.passes.linears import find
        from fqonnx.passes.prepare import prepare
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        groups = find(prepare(model_file.load({str(tmp_path / "m.onnx")!r}))).groups
        print(len(groups[0].linears), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        assert groups[0].linears[-1].read_weight().shape == ({n}, {k})
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    linears, searched, read = (int(word) for word in done.stdout.split())
    assert linears == layers
    assert searched < 50_000  # kB
    assert read < 400_000  # the 64 MiB read, its 128 MiB in fp32, and that transposed
