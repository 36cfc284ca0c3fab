"""How ``fqonnx.build`` puts the parts together."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from fqonnx import artifact
from fqonnx.build import build
from fqonnx.errors import EngineError
from fqonnx.recipe import Recipe
from tests.cli_support import write_data, write_mlp

if TYPE_CHECKING:
    from pathlib import Path

K = 32


def write_attention(path: Path) -> Path:
    """``x [batch, seq, K] -> y``, attention over itself and a linear; one mask for pairs of tokens, one for padding."""
    rng = np.random.default_rng(0)
    constants = {
        "w": rng.normal(size=(K, K)).astype(np.float32) / K**0.5,
        "low": np.float32(-1e9),
        "none": np.float32(0),
        "axis": np.array([1]),
        "no": np.array(0),
    }
    nodes = [
        helper.make_node("Transpose", ["x"], ["xt"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["x", "xt"], ["scores"], name="scores"),
        helper.make_node("Where", ["pairs", "scores", "low"], ["paired"]),
        helper.make_node("Unsqueeze", ["attention_mask", "axis"], ["row"]),
        helper.make_node("Equal", ["row", "no"], ["padding"]),
        helper.make_node("Where", ["padding", "low", "none"], ["bias"]),
        helper.make_node("Add", ["paired", "bias"], ["masked"]),
        helper.make_node("Softmax", ["masked"], ["share"]),
        helper.make_node("MatMul", ["share", "x"], ["context"], name="context"),
        helper.make_node("Add", ["context", "x"], ["h"]),
        helper.make_node("MatMul", ["h", "w"], ["y"], name="linear"),
    ]
    inputs = [
        helper.make_tensor_value_info("pairs", TensorProto.BOOL, ["batch", "seq", "seq"]),
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "seq", K]),
        helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "seq"]),
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "seq", K])]
    tensors = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "attention", inputs, outputs, tensors)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def test_padding_does_not_count_in_calibration(tmp_path: Path) -> None:
    """Whatever stands in padded rows; the other mask, which comes first, is not taken for the one of padding."""
    model = write_attention(tmp_path / "m.onnx")
    x = np.random.default_rng(1).normal(size=(20, 8, K)).astype(np.float32)
    mask = (np.arange(8) < np.arange(1, 21)[:, None] % 8 + 1).astype(np.int64)
    records = []
    for padding in (0, 30):
        np.savez(
            tmp_path / "d.npz",
            x=np.where(mask[..., None] != 0, x, np.float32(padding)),
            attention_mask=mask,
            pairs=np.ones((20, 8, 8), bool),
        )
        out = tmp_path / f"out{padding}"
        build(model, out, recipe=Recipe(transform="smooth", scheme="w8a8"), calib_data=str(tmp_path / "d.npz"))
        records.append((out / "calibration.safetensors").read_bytes())
    assert records[0] == records[1]


@pytest.mark.parametrize("weights", ["rtn", "gptq"])
@pytest.mark.parametrize("samples", [40, 4000])
def test_the_disk_that_a_build_needs_is_told_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weights: str, samples: int
) -> None:
    """Statistics are most of it; small files weigh more than the estimate says."""
    told, written = [], []

    def commit(workspace: artifact.Workspace) -> None:
        paths = [workspace.files / artifact.MODEL, *workspace.work.rglob("*.safetensors")]
        written.append(sum(path.stat().st_size for path in paths))
        whole(workspace)

    whole = artifact.Workspace.commit
    monkeypatch.setattr(artifact.Workspace, "require_space", lambda _, needed: told.append(needed))
    monkeypatch.setattr(artifact.Workspace, "commit", commit)
    model, data = write_mlp(tmp_path / "m.onnx", layers=2), write_data(tmp_path / "d.npz", samples)
    recipe = Recipe(transform="hadamard", weights=weights)
    build(model, tmp_path / "out", recipe=recipe, calib_data=str(data), calib_samples=samples, batch_size=100)
    assert 0.5 < written[0] / told[0] < 1.3


def test_a_tenth_of_the_samples_is_held_out_whatever_the_batch(tmp_path: Path) -> None:
    model, data = write_mlp(tmp_path / "m.onnx"), write_data(tmp_path / "d.npz", samples=40)
    recipe = Recipe(transform="none", weights="rtn")
    report = build(model, tmp_path / "out", recipe=recipe, calib_data=str(data), batch_size=32)
    assert report.data.samples == 4
    assert "calibration saw the 36 before them" in report.data.note


def test_a_build_from_local_files_opens_no_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a build of local files reached for the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    with socket.socket() as probe, pytest.raises(AssertionError, match="reached for the network"):
        probe.connect(("127.0.0.1", 9))
    model, data = write_mlp(tmp_path / "m.onnx"), write_data(tmp_path / "d.npz", samples=40)
    assert build(model, tmp_path / "out", recipe=Recipe(transform="hadamard", weights="gptq"), calib_data=str(data)).outputs


def test_an_op_that_only_onnx_runtime_has_in_the_default_domain(tmp_path: Path) -> None:
    """As generators of models for it write norms; ``onnx.checker`` refuses such a model, the runtime does not."""
    proto, data = onnx.load(write_mlp(tmp_path / "m.onnx")), write_data(tmp_path / "d.npz", samples=40)
    k = proto.graph.input[0].type.tensor_type.shape.dim[1].dim_value
    proto.graph.initializer.append(numpy_helper.from_array(np.ones(k, np.float32), "gamma"))
    norm = helper.make_node("SimplifiedLayerNormalization", ["x", "gamma"], ["normed"], name="norm", axis=-1, epsilon=1e-5)
    proto.graph.node[0].input[0] = "normed"
    proto.graph.node.insert(0, norm)
    onnx.save(proto, tmp_path / "normed.onnx")
    with pytest.raises(onnx.checker.ValidationError, match="SimplifiedLayerNormalization"):
        onnx.checker.check_model(proto)
    report = build(tmp_path / "normed.onnx", tmp_path / "out", recipe=Recipe(transform="none", weights="rtn"), calib_data=str(data))
    assert report.outputs["y"].rel_l2 < 0.5


def test_a_device_to_verify_on_that_is_not_there_is_told_first(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(EngineError, match="finds no CUDA device here: use --device cpu"):
        build(write_mlp(tmp_path / "mlp.onnx"), tmp_path / "out", calib_data=str(write_data(tmp_path / "x.npz")), verify_device="cuda")
    assert not (tmp_path / "out").exists()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_what_is_solved_on_a_gpu_may_be_verified_without_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unneeded() -> None:
        raise AssertionError("kernels are asked for")

    monkeypatch.setattr("fqonnx.engines.onnxruntime.require_kernels", unneeded)
    data = str(write_data(tmp_path / "x.npz"))
    report = build(write_mlp(tmp_path / "mlp.onnx"), tmp_path / "out", calib_data=data, device="cuda", verify_device="cpu")
    assert report.passed
