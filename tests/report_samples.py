"""Reports for tests, with figures of the size that real builds have."""

from __future__ import annotations

import math

import numpy as np

from fqonnx.report import DataReport, GroupReport, LanguageReport, LeftReport, Report, SizeReport, TensorReport

SHAPES = {
    "self_attn.q_proj+k_proj+v_proj": (2048, 3072, 3),
    "self_attn.o_proj": (2048, 2048, 1),
    "mlp.gate_proj+up_proj": (2048, 16384, 2),
    "mlp.down_proj": (8192, 2048, 1),
}


def tensor_report(rel_l2=0.1234, **values):
    defaults = {
        "dtype": "float32",
        "elements": 65_536_000,
        "cosine": 1 - rel_l2**2 / 2,
        "mean_cosine": 1 - rel_l2**2 / 1.9,
        "rel_l2": rel_l2,
        "sqnr_db": -20 * math.log10(rel_l2) if rel_l2 > 0 else math.nan,
        "max_abs": 3.41,
        "exact": 0.0,
        "nan": 0,
        "inf": 0,
        "nan_reference": 0,
        "inf_reference": 0,
        "worst_sample": 3,
    }
    return TensorReport(**(defaults | values))


def profiles(rng, k, outliers):
    """Sorted magnitudes with a few outlier channels before, nearly equal ones after."""
    before = np.exp(rng.normal(0, 0.5, k))
    before[: max(1, k // 300)] *= outliers * rng.uniform(0.3, 1, max(1, k // 300))
    after = np.exp(rng.normal(0, 0.12, k)) * np.sqrt((before**2).mean())
    places = np.linspace(0, k - 1, 256).round().astype(int)
    return (tuple(float(v) for v in np.sort(p)[::-1][places]) for p in (before, after))


def group_report(rng, name, k, n, linears, layer):
    before, after = profiles(rng, k, rng.choice([6, 20, 80, 400], p=[0.4, 0.3, 0.2, 0.1]))
    weight, activation = rng.uniform(0.06, 0.11), rng.uniform(0.07, 0.14)
    return GroupReport(
        name=name,
        linears=linears,
        in_features=k,
        out_features=n,
        scheme="w4a4",
        transform="flatquant",
        weight_bits=4,
        activation_bits=4,
        group_size=0,
        weight_rel_l2=weight,
        activation_rel_l2=activation,
        output_rel_l2=math.hypot(weight, activation) * rng.uniform(0.7, 0.95),
        flatness_before=rng.uniform(0.5, 1.2),
        flatness_after=rng.uniform(0.05, 0.2),
        profile_before=before,
        profile_after=after,
        seconds=rng.uniform(3, 14),
        layer=tensor_report(rng.uniform(0.08, 0.32)) if layer else None,
    )


def realistic_report(*, layers=True, passed=True, language=True, seed=0, **changes):
    """32 groups of a Llama of eight blocks; the last block's down projection is left in float."""
    rng = np.random.default_rng(seed)
    groups = []
    for block in range(8):
        for name, (k, n, count) in SHAPES.items():
            prefix, _, members = name.rpartition(".")
            linears = tuple(f"model.layers.{block}.{prefix}.{m}" for m in members.split("+"))
            assert len(linears) == count
            groups.append(group_report(rng, f"model.layers.{block}.{name}", k, n, linears, layers))
    left = [
        LeftReport(name=f"model.layers.{b}.self_attn.{p}", op_type="MatMul", reason="both operands are activations")
        for b in range(8)
        for p in ("scores", "context")
    ]
    left += [
        LeftReport(
            name="lm_head",
            op_type="MatMul",
            reason="shares its weight with the embedding table (quantize it with --quantize-head)",
            weight_shape=(128256, 2048),
        ),
        LeftReport(name="model.rotary_emb", op_type="MatMul", reason="too small: 1 of K is below 32", weight_shape=(1, 32)),
    ]
    values = {
        "model": "llama-3.2-1b.onnx",
        "candidate": "llama-w4a4",
        "passed": passed,
        "failures": () if passed else ("output 'logits' has a relative L2 error of 0.1234, above the bound of 0.05",),
        "max_error": 0.3 if passed else 0.05,
        "outputs": {"logits": tensor_report(kl=0.0381, top1=0.9127)},
        "language": LanguageReport(perplexity_reference=9.764, perplexity=10.371, top1=0.9127, tokens=65472) if language else None,
        "groups": tuple(groups),
        "left_in_float": tuple(left),
        "size": SizeReport(
            float_bytes=2_471_628_800,
            quantized_bytes=1_019_314_176,
            parts={"4-bit weights": 486_539_264, "16-bit floats": 525_336_576, "32-bit floats": 7_400_000, "other": 38_336},
        ),
        "time": {"read": 0.8, "observe": 96.4, "solve": 412.0, "rewrite": 2.1, "engine": 0.0, "verify": 61.7, "total": 573.0},
        "data": DataReport(source="text:wiki.txt", samples=64, note="samples that calibration did not see"),
        "recipe": {
            "scheme": "w4a4", "transform": "flatquant", "weights": "gptq", "group_size": 0, "keep": [r"layers\.7\.mlp\.down"],
            "quantize_head": False, "seed": 0, "steps": None,
        },
        "environment": {
            "fqonnx": "0.1.0", "python": "3.11.9", "onnxruntime-gpu": "1.31.1", "torch": "2.13.0", "platform": "Linux-6.1", "cpus": "16"
        },
        "command": "fqonnx build llama-3.2-1b.onnx -o llama-w4a4 --calib-data text:wiki.txt --tokenizer tokenizer.json --seq-len 1024 "
        "--keep 'layers\\.7\\.mlp\\.down'",
        "notes": (),
    }  # fmt: skip
    return Report(**(values | changes))
