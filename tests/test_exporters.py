"""Models as torch's two exporters really write them, from random tiny configurations: all linears found, norms folded, outputs kept."""

from __future__ import annotations

import warnings
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from torch import nn

from fqonnx import model as model_file
from fqonnx.passes.linears import find
from fqonnx.passes.pipeline import quantize_model
from fqonnx.passes.prepare import prepare
from fqonnx.recipe import SCHEMES, Recipe
from tests.rewriting import solve
from tests.runtime import run

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import numpy.typing as npt

    from fqonnx.passes.groups import Linears

HIDDEN, WIDE, HEADS, VOCABULARY = 64, 96, 4, 120


class RMSNorm(nn.Module):
    """As Llama writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(HIDDEN))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x.float()
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * y.to(x.dtype)


class Block(nn.Module):
    """A decoder block: q/k/v on one norm, o, gate/up on another, down."""

    def __init__(self, norm: type[nn.Module], bias: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(), norm()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(HIDDEN, HIDDEN, bias=bias) for _ in range(4))
        self.gate, self.up, self.down = (
            nn.Linear(HIDDEN, WIDE, bias=bias),
            nn.Linear(HIDDEN, WIDE, bias=bias),
            nn.Linear(WIDE, HIDDEN, bias=bias),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.shape[:2]
        h = self.norm1(x)
        q, k, v = (p(h).view(*rows, HEADS, -1).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        attention = torch.softmax(q @ k.transpose(-1, -2) * (HIDDEN // HEADS) ** -0.5, -1) @ v
        x = x + self.o_proj(attention.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


class Decoder(nn.Module):
    """Blocks between an embedding and the head tied to it."""

    def __init__(self, norm: type[nn.Module] = RMSNorm, *, bias: bool = False, blocks: int = 1) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList(Block(norm, bias) for _ in range(blocks))
        self.norm = norm()
        self.lm_head = nn.Linear(HIDDEN, VOCABULARY, bias=False)
        self.lm_head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        h = self.embed(ids)
        for layer in self.layers:
            h = layer(h)
        return self.lm_head(self.norm(h))


class LayerNorm(nn.LayerNorm):
    def __init__(self) -> None:
        super().__init__(HIDDEN)
        nn.init.normal_(self.weight, 1.0, 0.1)
        nn.init.normal_(self.bias)


class Mlp(nn.Module):
    """2-D input: exporters write Gemm."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, WIDE), nn.GELU(), nn.Linear(WIDE, HIDDEN))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def export(
    module: nn.Module, args: tuple[torch.Tensor, ...], path: Path, *, dynamo: bool, opset: int, axes: dict[int, str] | None = None
) -> list[npt.NDArray[Any]]:
    """Export to ``path``; the module's outputs for ``args``."""
    module = module.eval()
    names = [f"input_{i}" for i in range(len(args))]
    axes = axes or {0: "batch", 1: "seq"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporters' own: deprecations, tracing, constant folding
        if dynamo:
            shapes = tuple(dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for _ in args)
            program = torch.onnx.export(
                module, args, dynamo=True, input_names=names, dynamic_shapes=shapes, opset_version=opset, verbose=False
            )
            assert program is not None
            program.save(path)
        else:
            dynamic = dict.fromkeys(names, axes)
            torch.onnx.export(module, args, path, dynamo=False, input_names=names, dynamic_axes=dynamic, opset_version=opset)
    with torch.no_grad():
        output = module(*args)
    outputs: Sequence[torch.Tensor] = output if isinstance(output, tuple) else [output]
    return [tensor.float().numpy() for tensor in outputs]


def check(
    path: Path, args: tuple[torch.Tensor, ...], expected: list[npt.NDArray[Any]], tolerance: float = 1e-5
) -> tuple[ir.Model, Linears]:
    """Prepare and find; the prepared model gives torch's outputs, and every linear's weight and bias give its tapped output."""
    model = prepare(model_file.load(path))
    result = find(model)
    linears = [linear for group in result.groups for linear in group.linears]
    taps = [value.name or "" for linear in linears for value in (linear.input, linear.output)]
    values = run(model, {f"input_{i}": arg.numpy() for i, arg in enumerate(args)}, taps)
    for output, reference in zip(model.graph.outputs, expected, strict=False):
        assert _relative(values[output.name or ""], reference) < tolerance
    for linear in linears:
        assert linear.input.dtype is not None
        assert linear.input.shape is not None
        assert linear.input.shape[-1] == linear.in_features
        y = values[linear.input.name or ""].astype(np.float32) @ linear.read_weight().T
        if linear.read_bias is not None:
            y = y + linear.read_bias()
        assert _relative(values[linear.output.name or ""], y) < max(tolerance, 1e-5)
    return model, result


def _relative(a: npt.NDArray[Any], b: npt.NDArray[Any]) -> float:
    return float(np.linalg.norm(a.astype(np.float64) - b) / np.linalg.norm(b.astype(np.float64)))


def _names(result: Linears) -> list[str]:
    return [group.name for group in result.groups]


def _fused_activations(model: ir.Model, result: Linears) -> int:
    """How many gated activations W4A4 computes together with the quantizer behind them."""
    solutions = solve(result.groups, SCHEMES["w4a4"])
    model = quantize_model(model, result.groups, solutions.__getitem__, Recipe(transform="none", weights="rtn"))
    counts = Counter(node.op_type for node in model.graph)
    assert sum(count for op, count in counts.items() if op.endswith("FlatQuantize")) == counts["W4A4Gemm"] == len(result.groups)
    assert "Sigmoid" not in counts
    return counts["SiluMulFlatQuantize"]


def decoder_groups(blocks: int = 1) -> list[str]:
    parts = ("q_proj+k_proj+v_proj", "o_proj", "gate+up", "down")
    return [f"layers.{i}.{part}" for i in range(blocks) for part in parts]


IDS = (torch.randint(0, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(0)),)


@pytest.mark.parametrize(
    ("dynamo", "opset", "norm", "bias"),
    [
        (True, 18, RMSNorm, False),
        (True, 23, LayerNorm, True),
        (False, 13, LayerNorm, True),  # LayerNorm decomposed
        (False, 17, RMSNorm, False),
        (False, 20, LayerNorm, False),
    ],
)
def test_decoder(tmp_path: Path, dynamo: bool, opset: int, norm: type[nn.Module], bias: bool) -> None:
    torch.manual_seed(0)
    blocks = 1 if dynamo else 2  # the dynamo export takes seconds a block
    expected = export(Decoder(norm, bias=bias, blocks=blocks), IDS, tmp_path / "m.onnx", dynamo=dynamo, opset=opset)
    model, result = check(tmp_path / "m.onnx", IDS, expected)
    assert model.opset_imports[""] == max(opset, 21)
    assert _names(result) == decoder_groups(blocks)
    for group in result.groups:
        # What a norm feeds folds; what attention and the activation feed does not.
        assert (group.norm is not None) == (len(group.linears) > 1), group.name
        if group.norm is not None:
            assert (group.norm.read_bias is not None) == (norm is LayerNorm)
        assert all((linear.read_bias is not None) == bias for linear in group.linears)
    reasons = [left.reason for left in result.left_in_float]
    assert reasons[:-1] == ["both operands are activations"] * 2 * blocks
    assert reasons[-1].startswith("the vocabulary projection (120 x 64")
    assert result.left_in_float[-1].name == "lm_head"
    assert _fused_activations(model, result) == blocks


def test_fp16_decoder_with_norms_in_fp32(tmp_path: Path) -> None:
    torch.manual_seed(0)
    expected = export(Decoder().half(), IDS, tmp_path / "m.onnx", dynamo=True, opset=18)
    model, result = check(tmp_path / "m.onnx", IDS, expected, tolerance=5e-3)
    assert _names(result) == decoder_groups()
    assert {group.input.dtype for group in result.groups} == {ir.DataType.FLOAT16}
    assert [group.norm is not None for group in result.groups] == [True, False, True, False]
    assert _fused_activations(model, result) == 1


def test_bf16_decoder(tmp_path: Path) -> None:
    """ONNX Runtime's CPU provider cannot run it: found all the same, weights read exactly."""
    torch.manual_seed(0)
    module = Decoder().bfloat16()
    export(module, IDS, tmp_path / "m.onnx", dynamo=True, opset=18)
    model = prepare(model_file.load(tmp_path / "m.onnx"))
    result = find(model)
    assert _names(result) == decoder_groups()
    assert {group.input.dtype for group in result.groups} == {ir.DataType.BFLOAT16}
    q_proj = result.groups[0].linears[0]
    np.testing.assert_array_equal(q_proj.read_weight(), module.layers[0].q_proj.weight.detach().float().numpy())
    assert _fused_activations(model, result) == 1


@pytest.mark.parametrize(("dynamo", "opset"), [(True, 18), (False, 17), (False, 14)])
def test_mlp_on_rows(tmp_path: Path, dynamo: bool, opset: int) -> None:
    torch.manual_seed(0)
    args = (torch.randn(5, HIDDEN),)
    expected = export(Mlp(), args, tmp_path / "m.onnx", dynamo=dynamo, opset=opset, axes={0: "rows"})
    model, result = check(tmp_path / "m.onnx", args, expected)
    assert sum(node.op_type == "Gemm" for node in model.graph) == 2
    assert _names(result) == ["layers.1", "layers.3"]
    assert [group.norm is not None for group in result.groups] == [True, False]
    assert not result.left_in_float


def test_torch_transformer_encoder(tmp_path: Path) -> None:
    """Its packed in-projection is one linear of 3 K outputs."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(HIDDEN, HEADS, WIDE, batch_first=True, norm_first=True)
    args = (torch.randn(2, 7, HIDDEN),)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        expected = export(nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), args, tmp_path / "m.onnx", dynamo=False, opset=18)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
    _, result = check(tmp_path / "m.onnx", args, expected)
    features = sorted((linear.out_features, linear.in_features) for group in result.groups for linear in group.linears)
    assert features == sorted([(3 * HIDDEN, HIDDEN), (HIDDEN, HIDDEN), (WIDE, HIDDEN), (HIDDEN, WIDE)])


@pytest.mark.parametrize("dynamo", [True, False])
def test_hugging_face_bert(tmp_path: Path, dynamo: bool) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=1, num_attention_heads=HEADS, intermediate_size=WIDE,
        max_position_embeddings=HIDDEN, attn_implementation="eager",
    )  # fmt: skip

    class Encoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bert = transformers.BertModel(config, add_pooling_layer=False)

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return self.bert(input_ids=ids, attention_mask=mask).last_hidden_state

    args = (*IDS, torch.ones(2, 7, dtype=torch.int64))
    expected = export(Encoder(), args, tmp_path / "m.onnx", dynamo=dynamo, opset=18 if dynamo else 14)
    _, result = check(tmp_path / "m.onnx", args, expected)
    parts = ("attention.self.query+key+value", "attention.output.dense", "intermediate.dense", "output.dense")
    assert _names(result) == [f"bert.encoder.layer.0.{part}" for part in parts]
    # Post-norm: the residual reads every norm too, so nothing folds.
    assert not any(group.norm for group in result.groups)
    assert all(linear.read_bias is not None for group in result.groups for linear in group.linears)
    assert {left.reason for left in result.left_in_float} == {"both operands are activations"}


def test_hugging_face_llama(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, num_hidden_layers=1, num_attention_heads=HEADS, num_key_value_heads=2, head_dim=32,
        intermediate_size=WIDE, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.llama = transformers.LlamaForCausalLM(config)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.llama(input_ids=ids, use_cache=False).logits

    expected = export(Logits(), IDS, tmp_path / "m.onnx", dynamo=True, opset=18)
    _, result = check(tmp_path / "m.onnx", IDS, expected)
    parts = ("self_attn.q_proj+k_proj+v_proj", "self_attn.o_proj", "mlp.gate_proj+up_proj", "mlp.down_proj")
    assert _names(result) == [f"llama.model.layers.0.{part}" for part in parts]
    assert [group.norm is not None for group in result.groups] == [True, False, True, False]
    assert result.left_in_float[-1].name == "llama.lm_head"
    assert "vocabulary projection" in result.left_in_float[-1].reason
