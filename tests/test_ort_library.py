"""The ONNX Runtime custom ops: what is registered, what is refused, and on a GPU every node against the reference."""

from __future__ import annotations

import ctypes
import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from fqonnx.engines import onnxruntime as engine
from fqonnx.errors import EngineError
from fqonnx.ops import DOMAIN, add_functions, silu_mul_flat_quantize_node
from fqonnx.ops.reference import flat_quantize, rms_norm, silu_mul, unpack_rows, w4a4_gemm
from fqonnx.passes.fuse import target_named
from fqonnx.passes.pipeline import quantize_model
from fqonnx.plugins import library
from fqonnx.recipe import SCHEMES, Recipe
from tests.ops_graphs import cast, constant, empty_model, rms_norm_model
from tests.rewriting import NUMPY, Builder, feed, found, matrix, mlp, qkv, run, solve

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

Arrays = dict[str, np.ndarray[Any, Any]]
FP32, FP16, BF16 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16


@pytest.fixture
def built() -> Path:
    path = library.library_path()
    if path is None:
        pytest.skip("the kernels' library is not built: fqonnx plugin build")
    if not hasattr(ctypes.CDLL(str(path)), "RegisterCustomOps"):
        pytest.skip("the kernels' library is built without its part for ONNX Runtime")
    return path


def lowered(proto: onnx.ModelProto, target: str | None, scheme: str = "w4a4", **solving: Any) -> ir.Model:
    """The model with fqonnx ops of random transforms."""
    model, groups = found(proto)
    solutions = solve(groups, SCHEMES[scheme], **solving)
    return quantize_model(model, groups, solutions.__getitem__, Recipe(scheme=scheme, transform="none", weights="rtn"), target)


def serialized(model: ir.Model) -> bytes:
    return ir.to_proto(model).SerializeToString()


# --- without a GPU --------------------------------------------------------------------------------------------------------------------


def test_an_import_is_found_without_reading_the_graph(tmp_path: Path) -> None:
    plain, quantized = mlp().SerializeToString(), serialized(lowered(mlp(), None))
    (tmp_path / "model.onnx").write_bytes(quantized)
    assert engine.imports_domain(quantized, DOMAIN)
    assert engine.imports_domain(tmp_path / "model.onnx", DOMAIN)
    assert engine.imports_domain(str(tmp_path / "model.onnx"), DOMAIN)
    assert not engine.imports_domain(plain, DOMAIN)
    assert not engine.imports_domain(quantized, "fqonn")
    for junk in (b"", b"junk", quantized[: len(quantized) // 2], b"\xff" * 20, tmp_path / "missing.onnx"):
        assert not engine.imports_domain(junk, DOMAIN)


def test_without_the_library_a_session_on_cuda_says_how_to_build_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "library_path", lambda: None)
    monkeypatch.delenv(engine.BODIES_VARIABLE, raising=False)
    model = serialized(lowered(mlp(), None))
    for call in (engine.require_kernels, lambda: engine.session(model, device="cuda")):
        with pytest.raises(EngineError, match=r"run `fqonnx plugin build` \(or set FQONNX_BODIES=1") as caught:
            call()
        assert "\n" not in str(caught.value)


def test_a_session_on_the_cpu_and_a_float_model_need_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> Path | None:
        raise AssertionError("nobody should look for it")

    monkeypatch.setattr(library, "library_path", absent)
    proto = mlp()
    engine.session(serialized(lowered(proto, None)), device="cpu")
    if ort.get_device() == "GPU":
        try:
            engine.session(proto.SerializeToString(), device="cuda")
        except EngineError as error:
            assert "cannot start CUDA" in str(error)  # noqa: PT017


def test_the_bodies_are_run_where_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "library_path", lambda: None)
    monkeypatch.setenv(engine.BODIES_VARIABLE, "1")
    engine.require_kernels()
    options = ort.SessionOptions()
    engine._register_kernels(options)


def test_a_file_that_is_no_library_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "libfqonnx.so").write_bytes(b"not a library")
    monkeypatch.setenv(library.VARIABLE, str(tmp_path / "libfqonnx.so"))
    with pytest.raises(EngineError, match=r"cannot use the kernels in .*libfqonnx.so: .*: build them with `fqonnx plugin build`") as caught:
        engine.session(serialized(lowered(mlp(), None)), device="cuda")
    assert "\n" not in str(caught.value)


def test_the_library_registers_in_a_session_without_its_ops(built: Path) -> None:
    options = ort.SessionOptions()
    options.register_custom_ops_library(str(built))
    proto = mlp()
    arrays = feed(proto)
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(session.run(None, arrays)[0], run(proto, arrays)["down_add_out"], rtol=1e-4, atol=1e-4)


def test_with_the_library_no_body_stands_in_for_a_kernel(built: Path) -> None:
    """There are kernels for CUDA alone: where that is not among the providers the model is refused, though it has the bodies."""
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(str(built))
    with pytest.raises(Exception, match="Could not find an implementation for FlatQuantize"):
        ort.InferenceSession(serialized(lowered(mlp(), None)), options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("version", [b"1.20.0", b"1.9.2", b"0.5.0", b"odd"])
def test_another_onnx_runtime_is_refused(built: Path, version: bytes) -> None:
    """``RegisterCustomOps`` called by a runtime that is too old: it answers through the oldest interface that there is."""
    status_of = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)
    api_of = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)
    version_of = ctypes.CFUNCTYPE(ctypes.c_void_p)
    asked: list[Any] = []

    @status_of
    def create_status(code: int, message: bytes) -> int:
        asked.append((code, message.decode()))
        return 4711

    api = (ctypes.c_void_p * 2)(ctypes.cast(create_status, ctypes.c_void_p))

    @api_of
    def get_api(number: int) -> int:
        asked.append(number)
        return ctypes.addressof(api)

    text = ctypes.create_string_buffer(version)
    get_version = version_of(lambda: ctypes.addressof(text))
    base = (ctypes.c_void_p * 2)(ctypes.cast(get_api, ctypes.c_void_p), ctypes.cast(get_version, ctypes.c_void_p))
    register = ctypes.CDLL(str(built)).RegisterCustomOps
    register.restype, register.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_void_p]
    assert register(None, ctypes.addressof(base)) == 4711
    number, (code, message) = asked
    assert (number, code) == (1, 9)
    assert message == (
        f"fqonnx's kernels need version 21 of ONNX Runtime's interface, which {version.decode()} does not have: "
        "install onnxruntime-gpu 1.21 or newer"
    )


# --- on a GPU -------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def gpu(built: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The target's name."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    monkeypatch.delenv(engine.BODIES_VARIABLE, raising=False)
    assert built
    return "sm{}{}".format(*torch.cuda.get_device_capability())


def attention(b: Builder, q: str, k: str, v: str, heads: int, width: int, name: str) -> str:
    split = b.constant(f"{name}.split", np.array([0, 0, heads, width // heads], np.int64))
    join = b.constant(f"{name}.join", np.array([0, 0, width], np.int64))
    parts = [
        b.node("Transpose", [b.node("Reshape", [x, split], f"{name}_{part}_heads")], f"{name}_{part}", perm=perm)
        for part, x, perm in (("q", q, [0, 2, 1, 3]), ("k", k, [0, 2, 3, 1]), ("v", v, [0, 2, 1, 3]))
    ]
    scale = b.constant(f"{name}.scale", np.array((width // heads) ** -0.5, NUMPY[b.dtype]))
    scores = b.node("Mul", [b.node("MatMul", parts[:2], f"{name}_scores"), scale], f"{name}_scaled")
    mixed = b.node("MatMul", [b.node("Softmax", [scores], f"{name}_softmax", axis=-1), parts[2]], f"{name}_mixed")
    return b.node("Reshape", [b.node("Transpose", [mixed], f"{name}_rows", perm=[0, 2, 1, 3]), join], f"{name}_joined")


def decoder(dtype: int = FP16, opset: int = 21) -> onnx.ModelProto:
    """Two layers like Llama's, one of whose widths (1,376 = 16 x 86) is no multiple of 128."""
    b, width, inner = Builder(dtype, opset), 512, 1376
    x = b.input("x", ["batch", "tokens", width])
    for layer in ("0", "1"):
        normed = b.rms_norm(x, width, f"{layer}.norm")
        q, k, v = (b.linear(normed, width, n, f"{layer}.{name}") for name, n in (("q", width), ("k", width), ("v", width)))
        x = b.node("Add", [x, b.linear(attention(b, q, k, v, 4, width, f"{layer}.attention"), width, width, f"{layer}.o")], f"{layer}.add")
        normed = b.rms_norm(x, width, f"{layer}.norm2")
        gate, up = b.linear(normed, width, inner, f"{layer}.gate"), b.linear(normed, width, inner, f"{layer}.up")
        act = b.node("Mul", [b.node("Mul", [gate, b.node("Sigmoid", [gate], f"{layer}.sigmoid")], f"{layer}.silu"), up], f"{layer}.mul")
        x = b.node("Add", [x, b.linear(act, inner, width, f"{layer}.down")], f"{layer}.add2")
    b.output(x, ["batch", "tokens", width])
    return b.model()


def encoder(dtype: int = FP32, opset: int = 21) -> onnx.ModelProto:
    """Two layers like MiniLM's: biases, norms behind the residual's sum, GELU."""
    b, width, inner = Builder(dtype, opset), 384, 1536
    x = b.input("x", ["batch", "tokens", width])
    for layer in ("0", "1"):
        q, k, v = (b.linear(x, width, width, f"{layer}.{name}", bias="left") for name in "qkv")
        mixed = b.linear(attention(b, q, k, v, 12, width, f"{layer}.attention"), width, width, f"{layer}.o", bias="right")
        x = b.layer_norm(b.node("Add", [mixed, x], f"{layer}.add"), width, f"{layer}.norm")
        hidden = b.node("Gelu", [b.linear(x, width, inner, f"{layer}.up", bias="right")], f"{layer}.gelu")
        x = b.layer_norm(
            b.node("Add", [b.linear(hidden, inner, width, f"{layer}.down", bias="right"), x], f"{layer}.add2"), width, f"{layer}.norm2"
        )
    b.output(x, ["batch", "tokens", width])
    return b.model()


def odd(dtype: int = FP16, opset: int = 21) -> onnx.ModelProto:
    """Sizes that kernels do not take as they are."""
    b = Builder(dtype, opset)
    x = b.input("x", ["batch", "tokens", 90])
    b.output(b.linear(x, 90, 33, "a", bias="right"), ["batch", "tokens", 33])
    b.output(b.linear(b.node("Relu", [b.linear(x, 90, 75, "b")], "relu"), 75, 64, "c"), ["batch", "tokens", 64])
    return b.model()


def on_cuda(model: ir.Model | onnx.ModelProto, arrays: Mapping[str, Any], taps: tuple[str, ...] = ()) -> Arrays:
    """The outputs and taps on CUDA; bfloat16 as fp32."""
    proto = ir.to_proto(model) if isinstance(model, ir.Model) else model
    proto = onnx.ModelProto.FromString(proto.SerializeToString())
    types = {value.name: value.type.tensor_type.elem_type for value in (*proto.graph.value_info, *proto.graph.input, *proto.graph.output)}
    names = list(dict.fromkeys((*(value.name for value in proto.graph.output), *taps)))
    del proto.graph.output[:]
    for index, name in enumerate(names):
        if types[name] == BF16:
            proto.graph.node.append(helper.make_node("Cast", [name], [f"{name}/fp32"], name=f"tap{index}", to=FP32))
        proto.graph.output.append(onnx.ValueInfoProto(name=f"{name}/fp32" if types[name] == BF16 else name))
    session = engine.session(proto.SerializeToString(), device="cuda")
    return dict(zip(names, session.run(None, dict(arrays)), strict=True))


def check_nodes(model: ir.Model, arrays: Mapping[str, Any], dtype: int) -> None:
    """Runs the model in the kernels and every fqonnx node again in the reference, on what the node itself was given."""
    nodes = [node for node in model.graph if node.domain == DOMAIN]
    taps = [v.name or "" for node in nodes for v in (*node.inputs, *node.outputs) if v is not None and not v.is_initializer()]
    ran = on_cuda(model, arrays, tuple(name for name in taps if name not in arrays)) | dict(arrays)
    # Kernels transform fp32 in the precision of TF32 or better; bf16 rounds both factors and the first product, 2^-9 each.
    eps = {FP32: 2.0**-10, FP16: 2.0**-10, BF16: 1.5 * 2.0**-7}[dtype]
    for node in nodes:
        given = [v.const_value.numpy() if v.const_value is not None else ran[v.name or ""] for v in node.inputs if v is not None]
        got = [ran[value.name or ""] for value in node.outputs]
        if node.op_type.endswith("FlatQuantize"):
            bits, packed = node.attributes["bits"].as_int(), bool(node.attributes["packed"].as_int())
            *prologue, left, right, clip = given
            x, *others = (value.astype(NUMPY[dtype]) for value in prologue)
            if node.op_type == "SiluMulFlatQuantize":
                x = silu_mul(x, gate=node.attributes["gate"].as_int())
            elif others:
                *residual, gamma = others
                if residual:
                    x = (x.astype(np.float32) + residual[0].astype(np.float32)).astype(NUMPY[dtype])
                    np.testing.assert_array_equal(got[2], x.astype(got[2].dtype), err_msg=node.name)
                x = rms_norm(x, gamma, epsilon=node.attributes["epsilon"].as_float())
            codes, scale = flat_quantize(x, left, right, float(clip), bits=bits)
            q = unpack_rows(got[0]) if packed else got[0]
            np.testing.assert_allclose(got[1], scale, rtol=eps, err_msg=node.name)
            # A code is moved by the error of its value: up to 2^(bits - 1) steps of `eps` of a step each.
            difference = np.abs(q.astype(int) - codes)
            assert difference.max(initial=0) <= 1 + 2 ** (bits - 1) * eps, node.name
            assert np.count_nonzero(difference) <= difference.size * 2 ** (bits - 1) * eps + 2, node.name
        else:
            layout, packed = node.attributes["layout"].as_string(), bool(node.attributes["packed"].as_int())
            q, scale, w, w_scale, bias = given
            expected = w4a4_gemm(q, scale, w.astype(np.int8), w_scale, bias, packed=packed, layout=layout, dtype=NUMPY[dtype])
            if w_scale.shape[1] == 1:
                np.testing.assert_array_equal(got[0], expected.astype(got[0].dtype), err_msg=node.name)
            else:
                np.testing.assert_allclose(got[0], expected.astype(np.float32), rtol=eps, atol=1e-4, err_msg=node.name)


MODELS: dict[str, Callable[..., onnx.ModelProto]] = {"decoder": decoder, "encoder": encoder, "odd": odd}


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 3, 150])
@pytest.mark.parametrize("portable", [False, True], ids=["target", "portable"])
@pytest.mark.parametrize(("name", "dtype"), [("decoder", FP16), ("encoder", FP32), ("encoder", FP16), ("odd", FP16), ("odd", FP32)])
def test_every_node_is_the_reference(gpu: str, name: str, dtype: int, portable: bool, tokens: int) -> None:
    proto = MODELS[name](dtype)
    model = lowered(proto, None if portable else gpu)
    width = proto.graph.input[0].type.tensor_type.shape.dim[2].dim_value
    x = np.random.default_rng(tokens).standard_normal((2, tokens, width)) * np.where(np.arange(width) % 31 == 0, 8, 1)
    check_nodes(model, {"x": x.astype(NUMPY[dtype])}, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("transform", [True, False], ids=["flat", "plain"])
@pytest.mark.parametrize(("scheme", "group_size"), [("w4a8", 0), ("w8a8", 0), ("w4a4", 128), ("w4a4", 32)])
def test_every_scheme_is_the_reference(gpu: str, scheme: str, group_size: int, transform: bool) -> None:
    b = Builder(FP16)
    x = b.input("x", ["batch", "tokens", 256])
    b.output(b.linear(x, 256, 128, "up", bias="left"), ["batch", "tokens", 128])
    b.output(b.linear(x, 256, 64, "side"), ["batch", "tokens", 64])
    proto = b.model()
    check_nodes(lowered(proto, gpu, scheme, group_size=group_size, transform=transform), feed(proto), FP16)


@pytest.mark.gpu
@pytest.mark.parametrize("opset", range(21, 26))
def test_every_opset(gpu: str, opset: int) -> None:
    proto = qkv(FP16, opset)
    check_nodes(lowered(proto, gpu), feed(proto), FP16)


@pytest.mark.gpu
def test_bfloat16(gpu: str) -> None:
    b = Builder(BF16)
    x = b.node("Cast", [b.input("x", ["batch", "tokens", 256], FP32)], "narrow", to=BF16)
    b.output(b.linear(x, 256, 128, "a"), ["batch", "tokens", 128])
    proto = b.model()
    check_nodes(lowered(proto, gpu, scaled=False), {"x": np.random.default_rng(0).standard_normal((2, 5, 256)).astype(np.float32)}, BF16)


def single(dtype: int = FP16, opset: int = 21) -> onnx.ModelProto:
    """Three linears on one input, so that no rounding is carried on to another."""
    b = Builder(dtype, opset)
    x = b.input("x", ["batch", "tokens", 512])
    parts = [b.linear(x, 512, n, name) for name, n in (("q", 512), ("k", 128), ("v", 128))]
    b.output(b.node("Concat", parts, "joined", axis=-1), ["batch", "tokens", 768])
    return b.model()


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "dtype", "share"), [("single", FP16, 0.3), ("single", FP32, 0.3), ("decoder", FP16, 1.5), ("encoder", FP32, 1.5)]
)
def test_the_same_model_gives_the_same_with_and_without_the_library(
    gpu: str, name: str, dtype: int, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within ``share`` of what rounding to 4 bits costs, and as near to the float model.

    A code on the border between two falls as the last bit of a sum does. Further on in a model whatever moves a value by that much moves
    many codes: two runs with equal rounding errors then differ by as much as two independent roundings, the root of 2.
    """
    proto = (MODELS | {"single": single})[name](dtype)
    arrays = feed(proto)
    model = lowered(proto, gpu)
    (output,) = (value.name for value in proto.graph.output)
    kernels = on_cuda(model, arrays)[output].astype(np.float64)
    on_cpu = run(model, arrays)[output].astype(np.float64)
    monkeypatch.setenv(engine.BODIES_VARIABLE, "1")
    bodies = on_cuda(model, arrays)[output].astype(np.float64)
    exact = run(proto, arrays)[output].astype(np.float64)
    cost = np.linalg.norm(on_cpu - exact)
    for other in (on_cpu, bodies):
        assert np.linalg.norm(kernels - other) < share * cost
    assert np.linalg.norm(kernels - exact) < 1.15 * cost


@pytest.mark.gpu
def test_every_node_ran_in_a_kernel(gpu: str, tmp_path: Path) -> None:
    proto = decoder()
    model = lowered(proto, gpu)
    session = engine.session(serialized(model), device="cuda", profile_to=tmp_path / "profile")
    engine.run(session, feed(proto))
    events = json.loads((tmp_path / session.end_profiling().rpartition("/")[2]).read_text())
    ran = Counter(
        (event["args"]["op_name"], event["args"]["provider"])
        for event in events
        if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")
    )
    assert {key: count for key, count in ran.items() if key[0].endswith(("FlatQuantize", "W4A4Gemm"))} == {
        ("FlatQuantize", "CUDAExecutionProvider"): 2,
        ("RmsNormFlatQuantize", "CUDAExecutionProvider"): 1,
        ("AddRmsNormFlatQuantize", "CUDAExecutionProvider"): 3,
        ("SiluMulFlatQuantize", "CUDAExecutionProvider"): 2,
        ("W4A4Gemm", "CUDAExecutionProvider"): 8,
    }
    assert not {op for op, _ in ran} & {"Sigmoid", "Sqrt", "ReduceMean", "SimplifiedLayerNormalization"}
    assert not any(op in ("DequantizeLinear", "Round") for op, _ in ran), "a body was inlined"


@pytest.mark.gpu
def test_in_a_cuda_graph(gpu: str) -> None:
    """Captured once, replayed on other data in the same buffers."""
    proto = decoder()
    model = serialized(lowered(proto, gpu))
    plain = engine.session(model, device="cuda")
    captured = engine.session(model, device="cuda", provider_options={"enable_cuda_graph": "1"})
    feeds = [feed(proto, seed)["x"] for seed in range(4)]
    bound = ort.OrtValue.ortvalue_from_numpy(feeds[0], "cuda", 0)
    result = ort.OrtValue.ortvalue_from_shape_and_type(feeds[0].shape, np.float16, "cuda", 0)
    binding = captured.io_binding()
    binding.bind_ortvalue_input("x", bound)
    binding.bind_ortvalue_output(captured.get_outputs()[0].name, result)
    for x in feeds:
        bound.update_inplace(x)
        captured.run_with_iobinding(binding)
        np.testing.assert_array_equal(result.numpy(), plain.run(None, {"x": x})[0])


@pytest.mark.gpu
def test_from_two_threads(gpu: str) -> None:
    proto = decoder()
    session = engine.session(serialized(lowered(proto, gpu)), device="cuda")
    feeds = [feed(proto, seed) for seed in range(8)]
    expected = [session.run(None, arrays)[0] for arrays in feeds]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(4):
            for got, wanted in zip(pool.map(lambda arrays: session.run(None, arrays)[0], feeds), expected, strict=True):
                np.testing.assert_array_equal(got, wanted)


@pytest.mark.gpu
def test_factors_that_are_computed(gpu: str) -> None:
    """Factors that are inputs of the model instead of constants are read in every call."""
    b = Builder(FP16)
    b.output(b.linear(b.input("x", ["batch", 256]), 256, 64, "a"), ["batch", 64])
    float_model = b.model()
    model = ir.to_proto(lowered(float_model, gpu))
    arrays = feed(float_model)
    constant = on_cuda(model, arrays)
    for tensor in [tensor for tensor in model.graph.initializer if tensor.name.endswith((".left", ".right"))]:
        model.graph.initializer.remove(tensor)
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, FP32, None))
        arrays[tensor.name] = numpy_helper.to_array(tensor)
    computed = on_cuda(model, arrays)
    for name, value in constant.items():
        assert np.linalg.norm(computed[name].astype(float) - value) < 0.1 * np.linalg.norm(value.astype(float))
    bad = arrays | {name: np.ones((3, 4), np.float32) for name in arrays if name.endswith(".left")}
    with pytest.raises(EngineError, match=r"FlatQuantize: left is square, not \[3, 4\]"):
        engine.run(engine.session(model.SerializeToString(), device="cuda"), bad)


@pytest.mark.gpu
@pytest.mark.parametrize("up_first", [False, True], ids=["gate_up", "up_gate"])
@pytest.mark.parametrize("rows", [0, 1, 5, 200])
@pytest.mark.parametrize("inner", [4096, 512, 90, 33])
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=["fp32", "fp16", "bf16"])
def test_gated_activations(gpu: str, dtype: int, inner: int, rows: int, up_first: bool) -> None:
    """The op alone on halves of every alignment; 90 and 33 columns are no multiple of 16 bytes and are copied."""
    rng = np.random.default_rng(inner + rows)
    x = ir.val("x", ir.DataType.FLOAT, ["rows", 2 * inner])
    model = empty_model([x])
    n1 = next(n for n in range(int(inner**0.5), 0, -1) if inner % n == 0)
    left, right = (matrix(rng, n) for n in (n1, inner // n1))
    factors = [
        constant(model.graph, name, value) for name, value in (("left", left), ("right", right), ("clip", np.array(0.9, np.float32)))
    ]
    typed = cast(model.graph, x, ir.DataType(dtype), "typed")
    node = silu_mul_flat_quantize_node(typed, *factors, gate=int(up_first), packed=inner % 2 == 0, name="gated")
    model.graph.append(node)
    model.graph.outputs.extend(node.outputs)
    add_functions(model)
    check_nodes(model, {"x": (3 * rng.standard_normal((rows, 2 * inner))).astype(np.float32)}, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("residual", [False, True], ids=["norm", "sum"])
@pytest.mark.parametrize("rows", [0, 1, 5, 200])
@pytest.mark.parametrize("width", [4096, 512, 90, 33])
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16], ids=["fp32", "fp16", "bf16"])
def test_norms(gpu: str, dtype: int, width: int, rows: int, residual: bool) -> None:
    rng = np.random.default_rng(width + rows)
    n1 = next(n for n in range(int(width**0.5), 0, -1) if width % n == 0)
    left, right = (matrix(rng, n) for n in (n1, width // n1))
    gamma = (1 + 0.3 * rng.standard_normal(width)).astype(np.float32)
    model = rms_norm_model(gamma, left, right, 0.9, dtype=ir.DataType(dtype), residual=residual, packed=width % 2 == 0)
    arrays = {name: (3 * rng.standard_normal((rows, width))).astype(np.float32) for name in ("x", "residual")[: 1 + residual]}
    check_nodes(model, arrays, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("gamma", (63,), r"AddRmsNormFlatQuantize: gamma \[63\] does not fit rows of \[2, 64\]"),
        ("residual", (1, 64), r"AddRmsNormFlatQuantize: residual \[1, 64\] does not fit \[2, 64\]"),
    ],
)
def test_a_norm_whose_operands_do_not_fit(gpu: str, name: str, shape: tuple[int, ...], message: str) -> None:
    model = ir.to_proto(rms_norm_model(np.ones(64, np.float32), np.eye(8), np.eye(8), 0.9, residual=True))
    arrays = {"x": np.ones((2, 64), np.float32), "residual": np.ones((2, 64), np.float32)}
    if name == "gamma":
        (tensor,) = (tensor for tensor in model.graph.initializer if tensor.name == "gamma")
        tensor.CopyFrom(numpy_helper.from_array(np.ones(shape, np.float32), "gamma"))
    else:
        arrays[name] = np.ones(shape, np.float32)
        del model.graph.input[1].type.tensor_type.shape.dim[:]
        for _ in shape:
            model.graph.input[1].type.tensor_type.shape.dim.add()
    session = engine.session(model.SerializeToString(), device="cuda")
    with pytest.raises(EngineError, match=message):
        engine.run(session, arrays)


@pytest.mark.gpu
def test_no_rows(gpu: str) -> None:
    proto = qkv(FP16)
    (y,) = on_cuda(lowered(proto, gpu), {"x": np.zeros((0, 3, 64), np.float16)}).values()
    assert y.shape == (0, 3, 64)


@pytest.mark.gpu
def test_operands_for_another_gpu_are_refused(gpu: str) -> None:
    """Packed codes belong to 8.x: elsewhere the kernels say so, and nothing else steps in."""
    if target_named(gpu).lower(n=64, k=64, activation_bits=4).container == "packed":
        pytest.skip("this GPU takes packed codes")
    proto = qkv(FP16)
    model = lowered(proto, "sm80")
    session = engine.session(serialized(model), device="cuda")
    with pytest.raises(EngineError, match=r"running W4A4Gemm node\. Name:'layer.*W4A4Gemm: .*packed") as caught:
        engine.run(session, feed(proto))
    assert "\n" not in str(caught.value)


def _set(model: onnx.ModelProto, op: str, name: str, value: Any) -> None:
    for node in model.graph.node:
        if node.op_type == op:
            for attribute in [attribute for attribute in node.attribute if attribute.name == name]:
                node.attribute.remove(attribute)
            node.attribute.append(helper.make_attribute(name, value))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("op", "name", "value", "message"),
    [
        ("W4A4Gemm", "layout", "k256", "unknown weight layout k256: this library knows plain, k128"),
        ("W4A4Gemm", "layout_perm", [1, 0], "layout_shape and layout_perm are not the layout's"),
        ("W4A4Gemm", "plugin_version", "2", "of version 2 of the fqonnx ops, this library knows 1"),
        ("W4A4Gemm", "dtype", 7, "attribute dtype is 1, 10 or 16, not 7"),
        ("FlatQuantize", "bits", 5, "attribute bits is 4 or 8, not 5"),
        ("FlatQuantize", "packed", 2, "attribute packed is 0 or 1, not 2"),
        ("SiluMulFlatQuantize", "bits", 3, "SiluMulFlatQuantize: attribute bits is 4 or 8, not 3"),
        ("SiluMulFlatQuantize", "gate", 2, "attribute gate is 0 or 1, not 2"),
    ],
)
def test_attributes_that_make_no_sense(gpu: str, op: str, name: str, value: Any, message: str) -> None:
    model = ir.to_proto(lowered(decoder(FP16), gpu))
    _set(model, op, name, value)
    with pytest.raises(EngineError, match=message) as caught:
        engine.session(model.SerializeToString(), device="cuda")
    assert "\n" not in str(caught.value)
