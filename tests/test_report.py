from __future__ import annotations

import io
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from rich.console import Console

from fqonnx.calib.solution import GroupSolution
from fqonnx.console import command_line, print_report
from fqonnx.errors import ArtifactError
from fqonnx.passes.groups import LeftInFloat, Linear, LinearGroup
from fqonnx.recipe import Recipe
from fqonnx.report import GroupReport, LeftReport, Report, SizeReport, load_report, save_report
from fqonnx.report import format as words
from fqonnx.report.html import render, save_html
from tests.report_samples import realistic_report, tensor_report

NAN, INF = math.nan, math.inf


def same(a, b):
    """Equality that takes NaN for equal to NaN."""
    return repr(a) == repr(b)


# --- report.json ----------------------------------------------------------------------------------------------------------------------


def test_round_trip_through_a_file(tmp_path):
    report = realistic_report()
    save_report(report, tmp_path / "report.json")
    assert load_report(tmp_path / "report.json") == report


def test_the_schema_is_the_documented_one():
    values = realistic_report(language=False).to_dict()
    assert {"model", "outputs", "groups", "size", "time", "passed", "version"} <= set(values)
    assert {"cosine", "rel_l2", "sqnr_db", "max_abs", "kl", "nan", "inf"} <= set(values["outputs"]["logits"])
    group = {"name", "scheme", "transform", "weight_rel_l2", "activation_rel_l2", "output_rel_l2", "flatness_before", "flatness_after"}
    assert group | {"profile_before", "profile_after"} <= set(values["groups"][0])
    assert {"float_bytes", "quantized_bytes"} <= set(values["size"])
    assert (values["passed"], values["language"], values["version"]) == (True, None, 1)


def test_what_is_not_finite_is_null_and_marked(tmp_path):
    tensor = tensor_report(sqnr_db=-INF, max_abs=INF, cosine=NAN, kl=None, top1=NAN)
    report = realistic_report(outputs={"y": tensor}, time={"total": 1.0}, groups=(GroupReport(name="g", output_rel_l2=NAN),))
    save_report(report, tmp_path / "report.json")

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    values = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    written = values["outputs"]["y"]
    assert (written["cosine"], written["kl"], written["sqnr_db"]) == (None, None, None)
    assert written["non_finite"] == {"cosine": "nan", "max_abs": "inf", "sqnr_db": "-inf", "top1": "nan"}
    assert "non_finite" not in values["size"]
    assert same(load_report(tmp_path / "report.json"), report)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(version=99), "version 99, this fqonnx reads up to 1: upgrade"),
        (lambda v: v.update(outputs=[]), r"not a report: report\.outputs is \[\]"),
        (lambda v: v.update(passed="yes"), r"not a report: report\.passed is \"yes\""),
        (lambda v: v["size"].update(float_bytes=1.5), r"report\.size\.float_bytes is 1\.5"),
        (lambda v: v["groups"][2].update(name=None), r"report\.groups\[2\]\.name is null"),
        (lambda v: v["groups"][2].update(surprise=1), r"report\.groups\[2\] has the unknown key 'surprise'"),
        (lambda v: v["outputs"]["logits"].pop("cosine"), r"report\.outputs\.logits: .*'cosine'"),
        (lambda v: v.update(language=3), r"report\.language is 3"),
        (lambda v: v["outputs"]["logits"].update(non_finite={"cosine": "x"}), r"report\.outputs\.logits\.non_finite"),
    ],
)
def test_what_is_no_report_is_refused_by_name(change, message):
    values = realistic_report().to_dict()
    change(values)
    with pytest.raises(ArtifactError, match=message) as caught:
        Report.from_dict(values)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[1]", b"NaN"])
def test_files_that_are_no_reports(tmp_path, content):
    path = tmp_path / "report.json"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=r"cannot be read|not a report"):
        load_report(path)


def test_a_missing_file_is_told_with_what_to_give(tmp_path):
    with pytest.raises(ArtifactError, match="give a build directory"):
        load_report(tmp_path / "report.json")


@pytest.mark.parametrize(
    ("groups", "ranking", "order"),
    [
        ("a:.1:.3: b:.5:nan: c:.2:.4: d:.9::", "output", "b c a d"),
        ("a:.1:.3:.2 b:.5:.5: c:.2:.4:.4", "layer", "c a b"),
        ("a:.1:: b:.5:: c:.5::", "weights", "b c a"),
        ("b::: a:::", None, "b a"),
    ],
)
def test_groups_are_ranked_by_one_error(groups, ranking, order):
    made = []
    for word in groups.split():
        name, *errors = word.split(":")
        weights, output, layer = (float(e) if e else None for e in errors)
        made.append(
            GroupReport(name=name, weight_rel_l2=weights, output_rel_l2=output, layer=None if layer is None else tensor_report(layer))
        )
    report = realistic_report(groups=tuple(made))
    assert report.ranking == ranking
    assert " ".join(g.name for g in report.worst_groups) == order


def test_the_worst_output_is_a_float():
    outputs = {"a": tensor_report(0.3), "ids": tensor_report(0.9, dtype="int64"), "b": tensor_report(0.4)}
    assert realistic_report(outputs=outputs).worst_output == "b"
    assert realistic_report(outputs={**outputs, "c": tensor_report(NAN)}).worst_output == "c"
    assert realistic_report(outputs={}).worst_output is None


def test_groups_without_activations_are_ranked_by_their_weights():
    report = realistic_report(groups=(GroupReport(name="g.a", weight_rel_l2=0.1), GroupReport(name="g.b", weight_rel_l2=0.2)))
    text = Page(render(report)).words
    assert "nothing was measured on activations. g.b 20.0 % g.a 10.0 %" in text
    assert re.search(rf"g\.b +{words.MISSING} +20\.0 %", printed(report))


def test_of_a_group_and_its_solution():
    linears = tuple(
        Linear(name=f"blk.{n}", input=None, output=None, nodes=(), out_features=4, in_features=6, read_weight=lambda: None) for n in "qk"
    )
    solution = GroupSolution(
        group="blk.q+k",
        channel_scale=None,
        left=None,
        right=None,
        clip=1.0,
        codes=np.zeros((8, 6), np.int8),
        scales=np.ones((8, 1), np.float32),
        metrics={"weight_rel_l2": 0.1, "flatness_before": 1.0, "seconds": 2.5},
        profile_before=np.array([3, 1], np.float32),
    )
    report = GroupReport.from_solution(LinearGroup("blk.q+k", None, linears), solution, Recipe(scheme="w4a8", group_size=32))
    assert (report.name, report.linears, report.in_features, report.out_features) == ("blk.q+k", ("blk.q", "blk.k"), 6, 8)
    assert (report.weight_bits, report.activation_bits, report.group_size) == (4, 8, 32)
    assert (report.weight_rel_l2, report.output_rel_l2, report.seconds) == (0.1, None, 2.5)
    assert (report.profile_before, report.profile_after) == ((3.0, 1.0), None)


def test_of_what_is_left_in_float():
    assert LeftReport.of(LeftInFloat("mm", "MatMul", "too small", (2, 3))).weight_shape == (2, 3)
    assert LeftReport.of(LeftInFloat("mm", "MatMul", "no weight")).weight_shape is None


def test_size_ratio():
    assert SizeReport(float_bytes=100, quantized_bytes=40).ratio == 2.5
    assert math.isnan(SizeReport(float_bytes=100, quantized_bytes=0).ratio)


# --- figures in words -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "value", "text"),
    [
        (words.percent, 0.04214, "4.21 %"),
        (words.percent, 0.9127, "91.3 %"),
        (words.percent, 1.0, "100 %"),
        (words.percent, 12.345, "1234 %"),
        (words.percent, 0.0, "0 %"),
        (words.percent, 0.00004, "0.0040 %"),
        (words.percent, 1.234e-9, "1.2e-07 %"),
        (words.percent, NAN, "NaN"),
        (words.percent, INF, "∞"),
        (words.percent, None, words.MISSING),
        (words.cosine, 0.97412345, "0.97412"),
        (words.cosine, 0.9999987654, "0.99999877"),
        (words.cosine, 1.0, "1.00000"),
        (words.cosine, None, words.MISSING),
        (words.decibel, 18.24, "18.2"),
        (words.decibel, INF, "∞"),
        (words.plain, 0.038149, "0.0381"),
        (words.plain, None, words.MISSING),
        (words.decibel, None, words.MISSING),
        (words.duration, NAN, words.MISSING),
        (words.fixed, 0.76, "0.760"),
        (words.times, 6.123, "6.12\N{MULTIPLICATION SIGN}"),
        (words.times, 803.7, "804\N{MULTIPLICATION SIGN}"),
        (words.size, 999, "999 B"),
        (words.size, 38_336, "38.3 kB"),
        (words.size, 2_471_628_800, "2.47 GB"),
        (words.duration, 0.4211, "0.42 s"),
        (words.duration, 12.34, "12.3 s"),
        (words.duration, 187.2, "3 min 07 s"),
        (words.duration, 3599.6, "1 h 00 min"),
        (words.duration, 7500, "2 h 05 min"),
        (words.count, 65472, "65\u202f472"),
    ],
)
def test_words(function, value, text):
    assert function(value) == text


# --- report.html ----------------------------------------------------------------------------------------------------------------------

VOID = {"meta", "link", "br", "wbr", "line", "polyline"}


class Page(HTMLParser):
    """Checks that elements nest, and collects what a test asks about."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.text, self.ids, self.links = [], [], [], [], []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [v for k, v in attrs if k == "id"]
        self.links += [v for k, v in attrs if k in ("src", "href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text.append(data)

    @property
    def words(self):
        return re.sub(r"[ \n]+", " ", " ".join(self.text))


@pytest.mark.parametrize(
    "report",
    [
        realistic_report(),
        realistic_report(passed=False, language=False, layers=False),
        Report(model="m", candidate="c", passed=True),
        Report(model="m", candidate="c", passed=False, failures=("x",), outputs={"y": tensor_report(NAN, nan=3)}),
        Report(model="m", candidate="c", passed=True, outputs={"ids": tensor_report(0.0, dtype="int64", exact=1.0)}),
        realistic_report(groups=(GroupReport(name="g", output_rel_l2=NAN, profile_before=(0.0, 0.0), profile_after=(NAN, 1.0)),)),
        realistic_report(groups=(GroupReport(name="g"), GroupReport(name="h", profile_before=(1.0,)))),
        realistic_report(size=SizeReport(float_bytes=0, quantized_bytes=0), time={}),
    ],
    ids=["full", "failed", "empty", "nan", "integers", "broken groups", "bare groups", "no size"],
)
def test_the_page_is_well_formed_and_self_contained(report):
    html = render(report)
    page = Page(html)
    assert page.links == ["data:,"]
    assert "http" not in re.sub(r'http-equiv|"http://www\.w3\.org/2000/svg"', "", html)
    assert len(set(page.ids)) == len(page.ids)
    assert dict(page.tags)["html"] == {"lang": "en"}
    assert ("title", {}) in page.tags
    for tag, attributes in page.tags:
        if "aria-labelledby" in attributes:
            assert attributes["aria-labelledby"] in page.ids
        if tag == "svg":
            assert attributes["role"] == "img"
            assert attributes["aria-label"]


def test_the_page_shows_the_figures():
    text = Page(render(realistic_report())).words
    for figure in ("✓ Passed", "10.371", "float 9.764 (+6.22\u00a0%)", "12.3 %", "2.42", "2.47 GB → 1.02 GB", "56 linears", "9 min 33 s"):
        assert figure in text
    for words_ in ("both operands are activations", "16 products", "4-bit weights 487 MB (47.7 %)", "fqonnx build llama-3.2-1b.onnx"):
        assert words_ in text
    assert text.count("W4A4") == 1 + 32


def test_names_cannot_break_out_of_the_page():
    evil = "</script><script>alert('x')</script><img src=x onerror=alert(1)>\"&"
    base = realistic_report()
    groups = tuple(
        GroupReport(name=f"{evil}.{i}", linears=(evil,), transform=evil, output_rel_l2=0.1 * i, profile_before=(2.0, 1.0)) for i in range(3)
    )
    report = realistic_report(
        model=evil,
        candidate=evil,
        passed=False,
        failures=(evil,),
        notes=(evil,),
        outputs={evil: base.outputs["logits"]},
        groups=groups,
        left_in_float=(LeftReport(name=evil, op_type=evil, reason=evil),),
        recipe={"scheme": evil, evil: [evil]},
        environment={evil: evil},
        command=evil,
        time={evil: 1.0},
        size=SizeReport(float_bytes=9, quantized_bytes=9, parts={evil: 9}),
    )
    html = render(report)
    page = Page(html)
    assert html.count("<script") == 2
    assert not any(tag == "img" for tag, _ in page.tags)
    assert evil in page.text
    profiles = re.search(r'id="profiles">(.*?)</script>', html, re.DOTALL)
    assert [entry["name"] for entry in json.loads(profiles[1])] == [group.name for group in groups]


def test_dollar_signs_are_not_placeholders():
    assert "$css $model" in Page(render(realistic_report(model="$css $model"))).words


def test_names_lose_what_all_share():
    text = Page(render(realistic_report())).text
    assert "layers.5.mlp.down_proj" in text
    assert not any(part.startswith("model.layers.5.mlp.down") for part in text)
    single = render(realistic_report(groups=(GroupReport(name="a.b.c", output_rel_l2=0.1),)))
    assert "a.b.c" in Page(single).text


def test_a_failed_figure_is_marked():
    html = render(realistic_report(passed=False))
    assert "<div class='figure bad'>12.3<span" in html
    assert "<div class='figure bad'>12.3<span" not in render(realistic_report())


def test_the_page_of_hundreds_of_groups_stays_small(tmp_path):
    groups = realistic_report().groups
    many = tuple(
        GroupReport(**{**{f: getattr(g, f) for f in ("output_rel_l2", "profile_before", "profile_after")}, "name": f"{i}.{g.name}"})
        for i in range(8)
        for g in groups
    )
    save_html(realistic_report(groups=many), tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 1_500_000


# --- terminal -------------------------------------------------------------------------------------------------------------------------


def printed(report, width=120, **options):
    console = Console(file=io.StringIO(), width=width)
    print_report(report, console, **options)
    return console.file.getvalue()


def test_the_last_line_is_the_verdict_with_the_command():
    lines = printed(realistic_report(), command="fqonnx build x.onnx -o out").splitlines()
    assert lines[-1] == "PASSED | Runtime: 9 min 33 s | Command: fqonnx build x.onnx -o out"
    failed = printed(realistic_report(passed=False, time={})).splitlines()
    assert failed[-1].startswith("FAILED | Command: fqonnx build llama-3.2-1b.onnx")
    assert failed[-2] == "FAILED: output 'logits' has a relative L2 error of 0.1234, above the bound of 0.05"


def test_the_command_defaults_to_that_of_the_process(monkeypatch):
    monkeypatch.setattr("sys.argv", ["/usr/bin/fqonnx", "verify", "a b.onnx"])
    assert command_line() == "fqonnx verify 'a b.onnx'"
    assert printed(realistic_report(command="")).splitlines()[-1].endswith("Command: fqonnx verify 'a b.onnx'")


def test_tables_hold_the_figures():
    text = printed(realistic_report(notes=("be [careful]",)))
    assert re.search(r"logits +0\.99239 +12\.3 % +18\.2 +3\.41 +0\.0381 +91\.3 % +0/0", text)
    assert re.search(r"perplexity +9\.764 +10\.37", text)
    assert "the worst 8 of 32" in text
    assert re.search(r"model\.layers\.5\.self_attn\.q_proj\+k_proj\+v_proj +31\.9 % +12\.1 % ", text)
    assert re.search(r"both operands are activations +16 +model\.layers\.0\.self_attn\.scores", text)
    assert "2.47 GB → 1.02 GB" in text
    assert "note: be [careful]" in text


def test_names_are_not_markup_and_80_columns_suffice():
    report = realistic_report(outputs={"[bold]y[/bold]": tensor_report(NAN, nan=2), "ids": tensor_report(0.0, dtype="int32", exact=0.5)})
    text = printed(report, width=80)
    assert "[bold]" in text.replace("\n", "")
    assert "2/0" in text
    assert re.search(r"ids .*50\.0 % +0/0", text)
    assert max(len(line) for line in text.splitlines()[:-1]) <= 80


def test_an_empty_report_prints_its_verdict_alone():
    assert printed(Report(model="m", candidate="c", passed=True), command="x") == "PASSED | Command: x\n"
