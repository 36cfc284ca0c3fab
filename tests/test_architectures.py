"""Hugging Face's architectures, tiny and random, as torch exports them: every linear and block is found, and a build computes the same."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn

from fqonnx import model as model_file
from fqonnx.build import build
from fqonnx.calib.blocks import find_blocks
from fqonnx.passes.linears import find
from fqonnx.passes.prepare import prepare
from fqonnx.recipe import Recipe
from tests.runtime import run
from tests.test_exporters import HEADS, HIDDEN, VOCABULARY, WIDE, export

if TYPE_CHECKING:
    from pathlib import Path

transformers = pytest.importorskip("transformers")

LAYERS = 2
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": WIDE,
    "max_position_embeddings": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
CAUSAL = {**TEXT, "num_key_value_heads": 2, "head_dim": 16, "use_cache": False}
IMAGE = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "intermediate_size": WIDE,
    "image_size": 32,
    "patch_size": 8,
}
GPT = {
    "vocab_size": VOCABULARY,
    "n_embd": HIDDEN,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "n_positions": 48,
    "use_cache": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SEQ2SEQ = {
    "d_model": HIDDEN,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS,
    "encoder_attention_heads": HEADS,
    "decoder_attention_heads": HEADS,
    "encoder_ffn_dim": WIDE,
    "decoder_ffn_dim": WIDE,
    "vocab_size": VOCABULARY,
    "use_cache": False,
}


@dataclass(frozen=True)
class Architecture:
    """A model, and what is to be found in it.

    Attributes:
        model: Class in ``transformers``; ``module:Class`` below ``transformers.models``.
        config: Its configuration's class.
        options: Of the configuration.
        inputs: Names of what is fed.
        output: Attribute of what it returns.
        linears: Linears to be found.
        norms: Norms that a channel scale folds into.
        blocks: Groups of each block.
        dynamo: Whether the exporter is the new one: the old one cannot write the masks of newer decoders.
    """

    model: str
    config: str
    options: dict[str, Any] = field(default_factory=lambda: TEXT)
    inputs: tuple[str, ...] = ("input_ids", "attention_mask")
    output: str = "last_hidden_state"
    linears: int = 6 * LAYERS
    norms: int = 0
    blocks: tuple[int, ...] = (4, 4)
    dynamo: bool = False


PIXELS, IDS = ("pixel_values",), ("input_ids",)
ARCHITECTURES = {
    "roberta": Architecture("RobertaModel", "RobertaConfig"),
    "distilbert": Architecture(
        "DistilBertModel",
        "DistilBertConfig",
        {"vocab_size": VOCABULARY, "dim": HIDDEN, "n_layers": LAYERS, "n_heads": HEADS, "hidden_dim": WIDE, "max_position_embeddings": 48},
    ),
    # One layer's weights, used twice, behind a projection of the embedding.
    "albert": Architecture("AlbertModel", "AlbertConfig", {**TEXT, "embedding_size": 32}, linears=13, norms=1, blocks=(1, 4, 4)),
    # The keys and queries of relative positions are constants.
    "deberta-v2": Architecture(
        "DebertaV2Model", "DebertaV2Config", {**TEXT, "relative_attention": True, "position_buckets": 8, "pos_att_type": ["p2c", "c2p"]}
    ),
    # One linear for q, k and v, another for gate and up; local and global attention.
    "modernbert": Architecture(
        "ModernBertModel",
        "ModernBertConfig",
        {**TEXT, "cls_token_id": 1, "sep_token_id": 2, "attn_implementation": "eager"},
        linears=4 * LAYERS,
        norms=3,
    ),
    "t5-encoder": Architecture(
        "T5EncoderModel",
        "T5Config",
        {"vocab_size": VOCABULARY, "d_model": HIDDEN, "d_kv": 16, "d_ff": WIDE, "num_layers": LAYERS, "num_heads": HEADS}
        | {"feed_forward_proj": "gated-gelu"},
        linears=7 * LAYERS,
        norms=4,
    ),
    "clip-text": Architecture("CLIPTextModel", "CLIPTextConfig", norms=4),
    "vit": Architecture("ViTModel", "ViTConfig", IMAGE, PIXELS, norms=4),
    # Positions are resized, which blocks need not do; the branches are scaled.
    "dinov2": Architecture("Dinov2Model", "Dinov2Config", {**IMAGE, "mlp_ratio": 2}, PIXELS, norms=4),
    "siglip": Architecture("SiglipVisionModel", "SiglipVisionConfig", IMAGE, PIXELS, norms=4),
    # Windows that move, and fewer tokens of more channels after each stage.
    "swin": Architecture(
        "SwinModel",
        "SwinConfig",
        {"image_size": 32, "patch_size": 4, "embed_dim": 32, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4},
        PIXELS,
        linears=13,
        norms=3,
        blocks=(4, 1, 4),
    ),
    "segformer": Architecture(
        "SegformerModel",
        "SegformerConfig",
        {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [32, 64], "patch_sizes": [7, 3]}
        | {"strides": [4, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2]},
        PIXELS,
        norms=4,
        blocks=(5, 4),
    ),
    "whisper-encoder": Architecture(
        "whisper.modeling_whisper:WhisperEncoder",
        "WhisperConfig",
        {**SEQ2SEQ, "num_mel_bins": 16, "max_source_positions": 20},
        ("input_features",),
        norms=4,
    ),
    "wav2vec2": Architecture(
        "Wav2Vec2Model",
        "Wav2Vec2Config",
        {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "intermediate_size": WIDE}
        | {"conv_dim": (32, 32), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}
        | {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4},
        ("input_values",),
        linears=13,
        norms=1,
        blocks=(1, 4, 4),
    ),
    # The decoder's layers all attend to what the encoder gives, which is alive in all of them: one block.
    "bart": Architecture(
        "BartForConditionalGeneration",
        "BartConfig",
        {**SEQ2SEQ, "max_position_embeddings": 48, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2},
        ("input_ids", "decoder_input_ids"),
        "logits",
        linears=16 * LAYERS,
        blocks=(4, 4, 14),
    ),
    "opt": Architecture(
        "OPTForCausalLM",
        "OPTConfig",
        {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "ffn_dim": WIDE}
        | {"max_position_embeddings": 48, "word_embed_proj_dim": HIDDEN, "use_cache": False, "pad_token_id": 0},
        IDS,
        "logits",
        norms=4,
    ),
    "bloom": Architecture(
        "BloomForCausalLM",
        "BloomConfig",
        {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "n_layer": LAYERS, "n_head": HEADS, "use_cache": False, "pad_token_id": 0},
        IDS,
        "logits",
        linears=4 * LAYERS,
        norms=4,
    ),
    # One key and value for all heads; attention beside the MLP.
    "falcon": Architecture(
        "FalconForCausalLM",
        "FalconConfig",
        {"vocab_size": VOCABULARY, "hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "use_cache": False},
        IDS,
        "logits",
        linears=4 * LAYERS,
        norms=2,
        blocks=(3, 3),
    ),
    "gpt2": Architecture("GPT2LMHeadModel", "GPT2Config", GPT, IDS, "logits", linears=4 * LAYERS, norms=4, dynamo=True),
    "gptj": Architecture("GPTJForCausalLM", "GPTJConfig", {**GPT, "rotary_dim": 8}, IDS, "logits", norms=2, blocks=(3, 3), dynamo=True),
    "phi3": Architecture("Phi3ForCausalLM", "Phi3Config", CAUSAL, IDS, "logits", linears=4 * LAYERS, norms=4, dynamo=True),
    "qwen3": Architecture("Qwen3ForCausalLM", "Qwen3Config", CAUSAL, IDS, "logits", linears=7 * LAYERS, norms=4, dynamo=True),
    "gemma3": Architecture("Gemma3ForCausalLM", "Gemma3TextConfig", CAUSAL, IDS, "logits", linears=7 * LAYERS, norms=4, dynamo=True),
}


class Positional(nn.Module):
    """One output for inputs in a row, as exporters want it."""

    def __init__(self, model: nn.Module, names: tuple[str, ...], output: str) -> None:
        super().__init__()
        self.model, self.names, self.output = model, names, output

    def forward(self, first: torch.Tensor, second: torch.Tensor | None = None) -> torch.Tensor:
        fed = [first] if second is None else [first, second]
        found: torch.Tensor = getattr(self.model(**dict(zip(self.names, fed, strict=True))), self.output)
        return found


def made(architecture: Architecture) -> nn.Module:
    home: Any = transformers
    *path, name = architecture.model.replace(":", ".").split(".")
    for part in ["models", *path] if path else []:
        home = getattr(home, part)
    torch.manual_seed(0)
    model = getattr(home, name)(getattr(transformers, architecture.config)(**architecture.options)).eval()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name.lower() and parameter.ndim == 1:  # a gain of ones would hide that one is lost
                parameter.add_(0.1 * torch.randn_like(parameter))
    return Positional(model, architecture.inputs, architecture.output)


def fed(architecture: Architecture) -> tuple[torch.Tensor, ...]:
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=random)
    known = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "decoder_input_ids": ids[:, :9],
        "pixel_values": torch.randn(2, 3, 32, 32, generator=random),
        "input_features": torch.randn(2, 16, 40, generator=random),
        "input_values": torch.randn(2, 400, generator=random),
    }
    return tuple(known[name] for name in architecture.inputs)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architecture(tmp_path: Path, name: str) -> None:
    architecture = ARCHITECTURES[name]
    args = fed(architecture)
    axes = {0: "batch", 1: "seq"} if architecture.inputs[0] == "input_ids" else {0: "batch"}
    path = tmp_path / "m.onnx"
    (expected,) = export(made(architecture), args, path, dynamo=architecture.dynamo, opset=20 if architecture.dynamo else 18, axes=axes)

    model = prepare(model_file.load(path))
    found = find(model)
    feeds = {f"input_{index}": arg.numpy() for index, arg in enumerate(args)}
    actual = run(model, feeds)[model.graph.outputs[0].name or ""]
    assert np.linalg.norm(actual - expected) < 1e-5 * np.linalg.norm(expected)
    assert sum(len(group.linears) for group in found.groups) == architecture.linears
    assert sum(group.norm is not None for group in found.groups) == architecture.norms
    blocks = find_blocks(model, found.groups)
    assert tuple(len(block.groups) for block in blocks) == architecture.blocks
    assert blocks[0].input is not None

    recipe = Recipe(scheme="w8a8", weights="rtn", reconstruct="block", steps=2)
    report = build(path, tmp_path / "out", recipe=recipe, random_calibration=True, calib_samples=4, max_error=0.05)
    assert report.passed
