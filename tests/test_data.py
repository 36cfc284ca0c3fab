from __future__ import annotations

import json
import logging
import textwrap
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

from fqonnx.calib.data import open_source
from fqonnx.errors import DataError, FqonnxError, UsageError
from fqonnx.model import ModelInput

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Array = np.ndarray[Any, Any]
IDS = ModelInput("input_ids", np.dtype(np.int64), ("batch", "seq"))
MASK = ModelInput("attention_mask", np.dtype(np.int64), ("batch", "seq"))
X = ModelInput("x", np.dtype(np.float32), ("batch", 3))


def feeds(spec: object, *inputs: ModelInput, **options: Any) -> list[dict[str, Array]]:
    source = open_source(str(spec), inputs, **options)
    first, second = list(source), list(source)
    assert len(first) == len(second)
    assert source.length in (None, len(first))
    for one, other in zip(first, second, strict=True):
        assert set(one) == set(other)
        assert all(np.array_equal(one[name], other[name]) for name in one)
    assert open_source(str(spec), inputs, **options).fingerprint == source.fingerprint
    return first


def save(path: Path, **arrays: Array) -> Path:
    path.parent.mkdir(exist_ok=True)
    np.savez(path, **arrays)
    return path


def rows(count: int = 5) -> Array:
    return np.arange(count * 3, dtype=np.float32).reshape(count, 3)


# --- npz --------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("batch_size", "sizes"), [(1, [1] * 5), (2, [2, 2, 1]), (8, [5])])
def test_npz_rows_are_batched(tmp_path: Path, batch_size: int, sizes: list[int]) -> None:
    got = feeds(save(tmp_path / "d.npz", x=rows()), X, batch_size=batch_size)
    assert [len(feed["x"]) for feed in got] == sizes
    assert np.array_equal(np.concatenate([feed["x"] for feed in got]), rows())


def test_samples_limit_what_is_read(tmp_path: Path) -> None:
    path = save(tmp_path / "d.npz", x=rows())
    assert [len(feed["x"]) for feed in feeds(path, X, samples=3, batch_size=2)] == [2, 1]
    assert len(feeds(path, X, samples=99)) == 5
    prints = {open_source(str(path), [X], samples=n, batch_size=b).fingerprint for n, b in ((None, 1), (3, 1), (3, 2))}
    assert len(prints) == 3


def test_a_fixed_batch_is_fed_with_exactly_that(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fixed = ModelInput("x", np.dtype(np.float32), (2, 3))
    got = feeds(save(tmp_path / "d.npz", x=rows()), fixed, batch_size=1)
    assert [feed["x"].shape for feed in got] == [(2, 3), (2, 3)]
    assert "1 samples left over do not fill the model's fixed batch of 2" in caplog.text
    with pytest.raises(DataError, match=r"holds no samples: give at least 2"):
        list(open_source(str(save(tmp_path / "one.npz", x=rows(1))), [fixed]))


def test_a_graph_without_batch_axis_is_fed_sample_by_sample(tmp_path: Path) -> None:
    alone = ModelInput("x", np.dtype(np.float32), (3,))
    got = feeds(save(tmp_path / "d.npz", x=rows()), alone, batch_size=4)
    assert [feed["x"].shape for feed in got] == [(3,)] * 5


def test_the_content_decides_the_fingerprint(tmp_path: Path) -> None:
    one = open_source(str(save(tmp_path / "a" / "d.npz", x=rows())), [X]).fingerprint
    other = open_source(str(save(tmp_path / "b" / "d.npz", x=rows() + 1)), [X]).fingerprint
    assert one != other


# --- folders ----------------------------------------------------------------------------------------------------------------------------


def test_folder_of_npz_holds_ragged_feeds_in_order_of_names(tmp_path: Path) -> None:
    for index, (batch, length) in enumerate([(1, 5), (2, 3), (1, 7)]):
        ids = np.full((batch, length), index)
        save(tmp_path / "d" / f"{index:03d}.npz", input_ids=ids, attention_mask=np.ones_like(ids))
    got = feeds(tmp_path / "d", IDS, MASK, batch_size=2)
    assert [feed["input_ids"].shape for feed in got] == [(1, 5), (2, 3), (1, 7)]
    assert [int(feed["input_ids"][0, 0]) for feed in got] == [0, 1, 2]


def test_folder_of_npy_named_after_inputs_holds_rows(tmp_path: Path) -> None:
    np.save(tmp_path / "input_ids.npy", np.arange(12).reshape(4, 3))
    np.save(tmp_path / "attention_mask.npy", np.ones((4, 3), np.int64))
    got = feeds(tmp_path, IDS, MASK, batch_size=3)
    assert [feed["input_ids"].shape for feed in got] == [(3, 3), (1, 3)]


def test_folder_of_npy_of_any_name_feeds_the_one_input(tmp_path: Path) -> None:
    for index in range(3):
        np.save(tmp_path / f"s{index}.npy", rows(index + 1))
    assert [feed["x"].shape for feed in feeds(tmp_path, X)] == [(1, 3), (2, 3), (3, 3)]


def test_a_fixed_batch_cuts_larger_feeds(tmp_path: Path) -> None:
    np.save(tmp_path / "s.npy", rows(6))
    fixed = ModelInput("x", np.dtype(np.float32), (2, 3))
    got = feeds(tmp_path, fixed)
    assert np.array_equal(np.concatenate([feed["x"] for feed in got]), rows(6))
    assert [len(feed["x"]) for feed in got] == [2, 2, 2]


# --- Polygraphy JSON --------------------------------------------------------------------------------------------------------------------


def test_polygraphy_json(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from polygraphy.json import save_json

    save_json([{"x": rows(2)}, {"x": rows(1)}], str(tmp_path / "inputs.json"))
    capfd.readouterr()
    assert [feed["x"].shape for feed in feeds(tmp_path / "inputs.json", X)] == [(2, 3), (1, 3)]
    assert capfd.readouterr() == ("", ""), "Polygraphy logs to standard output"


@pytest.mark.parametrize("text", ["", "{not json", '{"a": 1}', "[1, 2]"])
def test_json_that_is_not_polygraphys(tmp_path: Path, text: str, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "inputs.json").write_text(text)
    with pytest.raises(DataError, match="polygraphy run --save-inputs") as caught:
        open_source(str(tmp_path / "inputs.json"), [X])
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


# --- scripts ----------------------------------------------------------------------------------------------------------------------------


def script(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "loader.py"
    path.write_text(textwrap.dedent(text))
    return path


def test_script_yields_feeds(tmp_path: Path) -> None:
    (tmp_path / "beside_the_loader.py").write_text("N = 3\n")
    path = script(
        tmp_path,
        """
        import numpy as np
        import torch
        from beside_the_loader import N
        buffer = np.zeros((1, 3), np.float32)
        def load_data():
            for i in range(N):
                buffer[:] = i
                yield {"x": buffer}
        def other():
            return [{"x": torch.ones(1, 3)}, {"x": [[1.0, 2.0, 3.0]]}]
        """,
    )
    assert [float(feed["x"][0, 0]) for feed in feeds(path, X)] == [0, 1, 2]
    assert [float(feed["x"].sum()) for feed in feeds(f"{path}:other", X)] == [3, 6]
    assert len(feeds(path, X, samples=2)) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import numpy as np\ndef load_data():\n    yield {'x': np.zeros((1, 3), np.float32)}\n    raise RuntimeError('disk\\n gone')\n",
         r"loader\.py:4 raised RuntimeError: disk gone: mend the script$"),
        ("def load_data():\n    return undefined\n", r"loader\.py:2 raised NameError: "),
        ("def load_data(:\n", r"loader\.py:1 raised SyntaxError: "),
        ("import no_such_package\n", r"loader\.py:1 raised ModuleNotFoundError: "),
        ("import sys\nsys.exit(3)\n", r"loader\.py:2 raised SystemExit: 3"),
        ("def load_data():\n    return None\n", "gave NoneType, not feeds: yield one dict"),
        ("def load_data():\n    return {'x': 1}\n", "gave dict, not feeds"),
        ("def load_data():\n    yield 1\n", "sample 0: int, not a dict of arrays"),
        ("def load_data():\n    yield None\n", "sample 0: NoneType, not a dict of arrays"),
        ("def load_data():\n    yield {'x': [[1], [1, 2]]}\n", "input 'x': rows of different lengths"),
        ("def get_batches():\n    yield 1\n", "has no function 'load_data': it has get_batches"),
        ("x = 1\n", "has no function 'load_data': define one that yields feeds"),
        ("def load_data():\n    return []\n", "holds no samples"),
    ],
)  # fmt: skip
def test_script_mistakes_are_one_line(tmp_path: Path, text: str, message: str) -> None:
    path = script(tmp_path, text)
    with pytest.raises(DataError, match=message) as caught:
        list(open_source(str(path), [X]))
    assert "\n" not in str(caught.value)


def test_a_script_that_changes_between_passes_is_told(tmp_path: Path) -> None:
    path = script(
        tmp_path, "import numpy as np\nr = np.random.default_rng(0)\ndef load_data():\n    yield {'x': r.random((1, 3), np.float32)}\n"
    )
    source = open_source(str(path), [X])
    list(source)
    with pytest.raises(DataError, match="other data on the second pass: seed its random generator inside the function"):
        list(source)


def test_an_interrupted_script_is_no_mistake_of_it(tmp_path: Path) -> None:
    path = script(tmp_path, "def load_data():\n    raise KeyboardInterrupt\n    yield\n")
    with pytest.raises(KeyboardInterrupt):
        list(open_source(str(path), [X]))


# --- text -------------------------------------------------------------------------------------------------------------------------------


def tokenizer_file(path: Path, *, special: bool) -> Path:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = {word: index for index, word in enumerate(["[UNK]", "[CLS]", "[SEP]", "a", *(f"w{i}" for i in range(20))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))  # noqa: S106  a token of text
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if special:
        tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)])
    tokenizer.save(str(path))
    return path


def test_text_becomes_windows_of_tokens(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(" ".join(f"w{i}" for i in range(17)))
    plain = tokenizer_file(tmp_path / "plain.json", special=False)
    positions = ModelInput("position_ids", np.dtype(np.int32), ("batch", "seq"))
    segments = ModelInput("token_type_ids", np.dtype(np.int64), ("batch", "seq"))
    got = feeds(f"text:{tmp_path / 't.txt'}", IDS, MASK, positions, segments, tokenizer=plain, seq_len=5, batch_size=2)
    assert [feed["input_ids"].shape for feed in got] == [(2, 5), (1, 5)]
    assert got[0]["input_ids"][1].tolist() == [9, 10, 11, 12, 13]
    assert got[0]["attention_mask"].tolist() == [[1] * 5] * 2
    assert got[0]["position_ids"].tolist() == [[0, 1, 2, 3, 4]] * 2
    assert got[0]["position_ids"].dtype == np.int32
    assert not got[0]["token_type_ids"].any()


def test_each_window_of_text_has_the_special_tokens(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(" ".join(f"w{i}" for i in range(17)))
    dressed = tokenizer_file(tmp_path / "dressed.json", special=True)
    got = feeds(f"text:{tmp_path / 't.txt'}", IDS, tokenizer=dressed, seq_len=7)
    assert [feed["input_ids"][0].tolist() for feed in got] == [[1, *range(4 + 5 * i, 9 + 5 * i), 2] for i in range(3)]
    fixed = ModelInput("input_ids", np.dtype(np.int64), (1, 4))
    assert [feed["input_ids"].shape for feed in feeds(f"text:{tmp_path / 't.txt'}", fixed, tokenizer=dressed)] == [(1, 4)] * 8


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"tokenizer": None}, UsageError, "needs a tokenizer: give --tokenizer"),
        ({"seq_len": 2}, UsageError, "--seq-len 2 leaves no room .*: give 3 or more"),
        ({"seq_len": 100}, DataError, "has 17 tokens, less than one sample of 98"),
        ({"tokenizer": "nowhere.json"}, DataError, "no such file: .*nowhere.json"),
        ({"tokenizer": "t.txt"}, DataError, "is not a tokenizer.json"),
    ],
)
def test_text_mistakes(tmp_path: Path, change: dict[str, Any], error: type[FqonnxError], message: str) -> None:
    (tmp_path / "t.txt").write_text(" ".join(f"w{i}" for i in range(17)))
    options = {"tokenizer": tokenizer_file(tmp_path / "tok.json", special=True), "seq_len": 7, **change}
    if isinstance(options["tokenizer"], str):
        options["tokenizer"] = tmp_path / options["tokenizer"]
    with pytest.raises(error, match=message) as caught:
        open_source(f"text:{tmp_path / 't.txt'}", [IDS], **options)
    assert "\n" not in str(caught.value)


def test_text_does_not_fit_a_model_without_ids(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_bytes(b"\xff\xfe")
    tokenizer = tokenizer_file(tmp_path / "tok.json", special=False)
    with pytest.raises(DataError, match=r"no input .* of token ids"):
        open_source(f"text:{tmp_path / 't.txt'}", [X], tokenizer=tokenizer)
    with pytest.raises(DataError, match=r"is not UTF-8 text .* at byte 0\): convert it"):
        open_source(f"text:{tmp_path / 't.txt'}", [IDS], tokenizer=tokenizer)
    fixed = ModelInput("input_ids", np.dtype(np.int64), (1, 4))
    with pytest.raises(UsageError, match="takes exactly 4 tokens"):
        open_source(f"text:{tmp_path / 't.txt'}", [fixed], tokenizer=tokenizer, seq_len=5)


# --- checks that all sources share ------------------------------------------------------------------------------------------------------


def nan_at(value: float) -> Array:
    array = rows()
    array[2, 1] = value
    return array


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"y": rows()}, r"d\.npz, sample 0: the model has no input 'y': "),
        ({"x_": rows(), "x": rows()}, r"sample 0: the model has no input 'x_': did you mean 'x'\?"),
        ({"x": rows().astype(str)}, r"sample 0, input 'x': type <U\d+, the model wants float32"),
        ({"x": rows().astype(np.int64)}, r"input 'x': type int64, the model wants float32: convert \(and normalise\)"),
        ({"x": rows().astype(np.complex64)}, "input 'x': type complex64, the model wants float32"),
        ({"x": rows().astype(np.float64) * 1e300}, "values of type float64 overflow float32"),
        ({"x": nan_at(np.nan)}, r"sample 2, input 'x': holds NaN"),
        ({"x": nan_at(-np.inf)}, r"sample 2, input 'x': holds Inf"),
        ({"x": rows()[:, :2]}, r"sample 0, input 'x': shape \[1, 2\], the model wants \[batch, 3\]"),
        ({"x": rows()[:, None, :, None]}, r"input 'x': 3 axes behind the samples' axis, the model wants \[batch, 3\]"),
        ({"x": rows(0)}, "holds no samples"),
        ({"x": np.float32(3)}, "array 'x' is a single value"),
        ({}, "holds no arrays"),
    ],
)
def test_data_that_do_not_fit_are_told_in_one_line(tmp_path: Path, arrays: dict[str, Array], message: str) -> None:
    path = save(tmp_path / "d.npz", **arrays)
    with pytest.raises(DataError, match=message) as caught:
        list(open_source(str(path), [X]))
    assert "\n" not in str(caught.value)
    assert "d.npz" in str(caught.value)


def test_inputs_must_agree_with_each_other(tmp_path: Path) -> None:
    path = save(tmp_path / "d.npz", input_ids=np.ones((2, 4), np.int64), attention_mask=np.ones((2, 5), np.int64))
    with pytest.raises(DataError, match="input 'attention_mask': seq is 5 here but 4 in 'input_ids'"):
        list(open_source(str(path), [IDS, MASK]))
    path = save(tmp_path / "e.npz", input_ids=np.ones((2, 4), np.int64), attention_mask=np.ones((3, 4), np.int64))
    with pytest.raises(DataError, match="'input_ids' has 2 samples but 'attention_mask' has 3"):
        open_source(str(path), [IDS, MASK])
    path = save(tmp_path / "f.npz", attention_mask=np.ones((2, 4), np.int64))
    with pytest.raises(DataError, match=r"sample 0: input 'input_ids' is missing \(there is attention_mask\): add it"):
        list(open_source(str(path), [IDS, MASK]))


def test_an_empty_sample_is_told(tmp_path: Path) -> None:
    save(tmp_path / "d" / "0.npz", input_ids=np.ones((1, 0), np.int64))
    with pytest.raises(DataError, match=r"file 0\.npz, input 'input_ids': shape \[1, 0\] holds no values"):
        list(open_source(str(tmp_path / "d"), [IDS]))


@pytest.mark.parametrize(
    ("array", "wanted"),
    [
        (np.array([[1, 2, 3]], np.uint16), np.int64),
        (np.array([[1, 2, 3]], np.int64), np.int32),
        (np.array([[True, False, True]]), np.int64),
        (np.array([[1, 0, 1]]), np.bool_),
        (np.array([[1, 0, 1]]), np.float32),
        (np.array([[1.5, 2.5, -3.0]]), np.float32),
        (np.array([[1.5, 2.5, -3.0]], np.float32), np.float16),
    ],
)
def test_lossless_casts_are_made_and_said_once(tmp_path: Path, array: Array, wanted: type, caplog: pytest.LogCaptureFixture) -> None:
    path = save(tmp_path / "d.npz", x=np.repeat(array, 4, 0))
    with caplog.at_level(logging.INFO):
        (got, *_) = list(open_source(str(path), [ModelInput("x", np.dtype(wanted), ("batch", 3))]))
    assert got["x"].dtype == wanted
    assert np.array_equal(got["x"], array)
    assert caplog.text.count(f"input 'x' is cast from {array.dtype} to {np.dtype(wanted)}") == 1


def test_integers_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "d.npz", input_ids=np.array([[2**40]]))
    with pytest.raises(DataError, match="values of type int64 do not fit int32"):
        list(open_source(str(path), [ModelInput("input_ids", np.dtype(np.int32), ("b", "s"))]))
    path = save(tmp_path / "e.npz", input_ids=np.array([[1.0]]))
    with pytest.raises(DataError, match="type float64, the model wants int64"):
        list(open_source(str(path), [IDS]))


def test_an_additive_mask_may_hold_minus_infinity(tmp_path: Path) -> None:
    item = ModelInput("attention_mask", np.dtype(np.float32), ("batch", "seq"))
    path = save(tmp_path / "d.npz", attention_mask=np.array([[0, -np.inf]], np.float32))
    assert len(feeds(path, item)) == 1


def test_what_a_tokenizer_gives_beside_the_ids_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = save(tmp_path / "d.npz", input_ids=np.ones((2, 4), np.int64), token_type_ids=np.zeros((2, 4), np.int64))
    with caplog.at_level(logging.INFO):
        assert [set(feed) for feed in feeds(path, IDS)] == [{"input_ids"}] * 2
    assert "'token_type_ids' is not an input of the model and is left out" in caplog.text


def ids_model(rows_of_table: int = 10) -> ir.Model:
    """``tokens`` look up a table; ``keep`` masks; ``where`` counts positions: none of them named as usual."""
    nodes = [
        helper.make_node("Gather", ["table", "tokens"], ["e"]),
        helper.make_node("Cast", ["keep"], ["k"], to=1),
        helper.make_node("Sub", ["one", "k"], ["inv"]),
        helper.make_node("Unsqueeze", ["inv", "two"], ["inv3"]),
        helper.make_node("Cast", ["where"], ["w"], to=1),
        helper.make_node("Mul", ["w", "freq"], ["angle"]),
        helper.make_node("Cos", ["angle"], ["c"]),
        helper.make_node("Unsqueeze", ["c", "two"], ["c3"]),
        helper.make_node("Sum", ["e", "inv3", "c3"], ["y"]),
    ]
    inputs = [helper.make_tensor_value_info(name, 7, ["b", "s"]) for name in ("tokens", "keep", "where")]
    weights = [
        numpy_helper.from_array(np.ones((rows_of_table, 4), np.float32), "table"),
        numpy_helper.from_array(np.array(1, np.float32), "one"),
        numpy_helper.from_array(np.array(0.1, np.float32), "freq"),
        numpy_helper.from_array(np.array([2]), "two"),
    ]
    graph = helper.make_graph(nodes, "g", inputs, [onnx.ValueInfoProto(name="y")], weights)
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)]))


def test_missing_inputs_are_derived_by_the_graphs_own_use(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from fqonnx.model import inputs

    model = ids_model()
    path = save(tmp_path / "d.npz", tokens=np.arange(8).reshape(2, 4))
    with caplog.at_level(logging.INFO):
        got = feeds(path, *inputs(model), model=model, batch_size=2)
    assert got[0]["keep"].tolist() == [[1] * 4] * 2
    assert got[0]["where"].tolist() == [[0, 1, 2, 3]] * 2
    assert "input 'keep' is not in the data: taken as ones like 'tokens'" in caplog.text


PAST = """
<ir_version: 10, opset_import: ["" : 21]>
decoder (int64[batch,sequence] input_ids, int64[batch,total] attention_mask, float[batch,2,past,4] past_key_values_0_key)
    => (float[batch,2,total,4] present) <float[9,8] table>
{
    x = Gather (table, input_ids)
    heads = Constant <value_ints: ints = [0, 0, 2, 4]> ()
    split = Reshape (x, heads)
    key = Transpose <perm: ints = [0, 2, 1, 3]> (split)
    keys = Concat <axis: int = 2> (past_key_values_0_key, key)
    axes = Constant <value_ints: ints = [1, 3]> ()
    kept = Unsqueeze (attention_mask, axes)
    weight = Cast <to: int = 1> (kept)
    present = Mul (keys, weight)
}
"""


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_decoder_without_past_in_the_data_starts_without_one(tmp_path: Path, caplog: pytest.LogCaptureFixture, batch_size: int) -> None:
    from fqonnx.model import inputs

    proto = onnx.parser.parse_model(PAST)
    proto.graph.initializer.append(numpy_helper.from_array(np.ones((9, 8), np.float32), "table"))
    model = ir.from_proto(proto)
    path = save(tmp_path / "d.npz", input_ids=np.arange(8).reshape(2, 4))
    with caplog.at_level(logging.INFO):
        got = feeds(path, *inputs(model), model=model, batch_size=batch_size)
    assert got[0]["past_key_values_0_key"].shape == (batch_size, 2, 0, 4)
    assert got[0]["attention_mask"].tolist() == [[1] * 4] * batch_size
    assert "every sample starts without a past" in caplog.text
    given = save(tmp_path / "given.npz", input_ids=np.arange(8).reshape(2, 4), past_key_values_0_key=np.ones((2, 2, 3, 4), np.float32))
    feed = feeds(given, *inputs(model), model=model)[0]
    assert feed["past_key_values_0_key"].shape == (1, 2, 3, 4)
    assert feed["attention_mask"].shape == (1, 7)


def test_ids_outside_the_models_table_are_refused(tmp_path: Path) -> None:
    from fqonnx.model import inputs

    model = ids_model(rows_of_table=7)
    path = save(tmp_path / "d.npz", tokens=np.arange(8).reshape(2, 4))
    with pytest.raises(DataError, match=r"sample 1, input 'tokens': 7 is outside 0\.\.6, the rows of the table .* tokenizer"):
        list(open_source(str(path), inputs(model), model=model))


# --- sources that cannot be opened ------------------------------------------------------------------------------------------------------


def pickled(path: Path) -> Path:
    return save(path / "d.npz", x=np.array([[1], [1, 2]], dtype=object))


def cut(path: Path) -> Path:
    save(path / "d.npz", x=rows(500))
    (path / "d.npz").write_bytes((path / "d.npz").read_bytes()[:-300])
    return path / "d.npz"


def not_numpy(path: Path) -> Path:
    (path / "d.npz").write_text("hello")
    return path / "d.npz"


def nothing(path: Path) -> Path:
    (path / "d.npz").touch()
    return path / "d.npz"


def two_kinds(path: Path) -> Path:
    save(path / "f" / "a.npz", x=rows())
    np.save(path / "f" / "b.npy", rows())
    return path / "f"


def empty_folder(path: Path) -> Path:
    (path / "f").mkdir()
    return path / "f"


def stranger(path: Path) -> Path:
    np.save(path / "input_id.npy", rows())
    return path


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (pickled, r"array 'x' of .*d\.npz holds pickled objects, which can run code when read: save plain arrays"),
        (cut, r"d\.npz is not a whole \.npy or \.npz file"),
        (not_numpy, r"d\.npz (is not a whole|holds pickled)"),
        (nothing, r"d\.npz is not a whole"),
        (two_kinds, r"holds both \.npz and \.npy files: keep one kind"),
        (empty_folder, r"holds no \.npy or \.npz files"),
        (stranger, r"is not named after an input of the model: did you mean input_ids\.npy\?"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, make: Callable[[Path], Path], message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        list(open_source(str(make(tmp_path)), [IDS, X]))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spec", ["nowhere.npz", "text:nowhere.txt", "nowhere.py:load", "nowhere"])
def test_no_such_file(spec: str) -> None:
    with pytest.raises(DataError, match="no such file or folder: nowhere"):
        open_source(spec, [X])


@pytest.mark.parametrize("name", ["data.csv", "data"])
def test_an_unknown_kind_lists_the_known_ones(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("1")
    with pytest.raises(UsageError, match=r"is no kind of data known here: give text:FILE, DATA\.npz, .*folder"):
        open_source(str(tmp_path / name), [X])


@pytest.mark.parametrize("options", [{"samples": 0}, {"batch_size": 0}])
def test_counts_start_at_one(tmp_path: Path, options: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="ask for 1 or more"):
        open_source(str(save(tmp_path / "d.npz", x=rows())), [X], **options)


def test_reading_polygraphy_json_runs_no_code(tmp_path: Path) -> None:
    (tmp_path / "d.json").write_text(json.dumps([{"x": {"polygraphy_class": "ndarray", "array": "gASVAAAA"}}]))
    with pytest.raises(DataError):
        list(open_source(str(tmp_path / "d.json"), [X]))
