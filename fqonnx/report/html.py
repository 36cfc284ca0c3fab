"""``report.html``: one self-contained page. It is complete without JavaScript, which adds sorting and the picture of any group."""

from __future__ import annotations

import math
from html import escape
from itertools import groupby
from statistics import median
from typing import TYPE_CHECKING

from fqonnx.report import format as words
from fqonnx.report.mixed_html import allocation_section, curve_section, heat_map_section
from fqonnx.report.parts import breakable, page, section, short_names

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from fqonnx.report.data import GroupReport, Report

WORST = 12
"""Groups in the bar chart and in the small multiples."""

_STAGES = {
    "read": "Read and prepare",
    "observe": "Observe activations",
    "solve": "Solve groups",
    "rewrite": "Rewrite the graph",
    "engine": "Build the engine",
    "verify": "Verify",
    "reference": "Run the float model",
    "candidate": "Run the candidate",
    "layers": "Compare layers",
}
NO_BREAK = "\N{NO-BREAK SPACE}"
_PANEL = (240, 140)
"""Width and height of a small multiple, in its own units."""

_PANEL_LEFT = 40
"""Where its lines start; tick labels stand left of it."""

_FLOOR, _CEILING = 0.1, 0.5
"""Where an axis may begin, times the median: at its smallest channel, but what is far below the median cannot hurt a quantizer."""


def render(report: Report) -> str:
    """The page as a string. Every name in it is escaped, and it asks for nothing from the network."""
    makers = (
        _header,
        _problems,
        _tiles,
        _outputs,
        _worst_groups,
        _sensitivities,
        _flatness,
        _groups,
        _left,
        _engine,
        _size_and_time,
        _conditions,
    )
    body = "\n".join(part for part in (make(report) for make in makers) if part)
    return page(f"{_verdict(report)}: {report.model}", body, profiles=_normalised_profiles(report))


def save_html(report: Report, path: Path) -> None:
    """Write the page."""
    path.write_text(render(report), encoding="utf-8")


def _verdict(report: Report) -> str:
    return "Passed" if report.passed else "Failed"


# --- top ------------------------------------------------------------------------------------------------------------------------------


def _header(report: Report) -> str:
    mark = "✓" if report.passed else "✗"
    return (
        f"<header><div><h1>{escape(report.model)}</h1><p class='soft'>{escape(_recipe_words(report))}</p></div>"
        f"<div class='verdict {_verdict(report).lower()}'>{mark} {_verdict(report)}</div></header>"
    )


def _recipe_words(report: Report) -> str:
    recipe = report.recipe
    if not recipe:
        return f"compared with {report.candidate}"
    group_size = recipe.get("group_size")
    scales = f"scales per {group_size} weights" if group_size else "scales per channel"
    scheme = str(recipe.get("scheme", "")).upper()
    if report.allocation is not None:
        scheme = f"mixed schemes, {report.allocation.average_bits:.2f} bits on average"
    elif recipe.get("schemes"):
        scheme += ", some groups otherwise"
    return " · ".join([scheme, f"transform {recipe.get('transform')}", f"weights {recipe.get('weights')}", scales])


def _problems(report: Report) -> str:
    failures = "".join(f"<li>{escape(line)}</li>" for line in report.failures)
    notes = "".join(f"<li>{escape(line)}</li>" for line in report.notes)
    return (f"<ul class='failures failed'>{failures}</ul>" if failures else "") + (f"<ul class='notes'>{notes}</ul>" if notes else "")


def _tiles(report: Report) -> str:
    tiles = [_main_tile(report), _error_tile(report), _size_tile(report), _groups_tile(report)]
    return f"<div class='tiles'>{''.join(tile for tile in tiles if tile)}</div>"


def _tile(label: str, figure: str, detail: str, *, main: bool = False, bad: bool = False) -> str:
    detail = detail.replace(" %", f"{NO_BREAK}%")
    value, _, unit = figure.partition(" ")
    unit = f"<span class='unit'>{escape(unit)}</span>" if unit else ""
    return (
        f"<div class='tile{' main' if main else ''}'><div class='label'>{escape(label)}</div>"
        f"<div class='figure{' bad' if bad else ''}'>{escape(value)}{unit}</div>"
        f"<div class='detail'>{escape(detail)}</div></div>"
    )


def _main_tile(report: Report) -> str:
    language = report.language
    if language is not None:
        change = language.perplexity / language.perplexity_reference - 1 if language.perplexity_reference else math.nan
        sign = "+" if change >= 0 else ""
        detail = f"float {_perplexity(language.perplexity_reference)}"
        detail += f" ({sign}{words.percent(change)})" if math.isfinite(change) else ""
        detail += f" · same top token {words.percent(language.top1)} · {words.count(language.tokens)} tokens"
        return _tile("Perplexity", _perplexity(language.perplexity), detail, main=True, bad=not math.isfinite(language.perplexity))
    name = report.worst_output
    if name is not None:
        t = report.outputs[name]
        detail = f"mean cosine {words.cosine(t.mean_cosine)} · SQNR {words.decibel(t.sqnr_db)} dB"
        return _tile(f"Cosine to the float model · {name}", words.cosine(t.cosine), detail, main=True, bad=not math.isfinite(t.cosine))
    if report.outputs:
        name, t = min(report.outputs.items(), key=lambda item: item[1].exact)
        return _tile(f"Equal elements · {name}", words.percent(t.exact), "the model has no float outputs", main=True)
    return _tile("Accuracy", words.MISSING, "no outputs were compared", main=True)


def _perplexity(value: float) -> str:
    return words.fixed(value) if value < 1000 else words.plain(value)


def _error_tile(report: Report) -> str:
    name = report.worst_output
    if name is None:
        return ""
    error = report.outputs[name].rel_l2
    bound = "no bound was set" if report.max_error is None else f"bound {words.percent(report.max_error)}"
    bad = not error <= (math.inf if report.max_error is None else report.max_error)
    return _tile("Relative L2 error", words.percent(error), f"{bound} · worst output {name}", bad=bad)


def _size_tile(report: Report) -> str:
    size = report.size
    if size is None:
        return ""
    detail = f"{words.size(size.float_bytes)} → {words.size(size.quantized_bytes)}"
    return _tile("Size of the weights", f"{words.times(size.ratio)} smaller", detail)


def _groups_tile(report: Report) -> str:
    linears = sum(len(group.linears) for group in report.groups)
    if not report.groups:
        return ""
    left = len(report.left_in_float)
    return _tile(
        "Quantized",
        f"{linears} linears" if linears else f"{len(report.groups)} groups",
        f"in {len(report.groups)} groups · {left} products left in float",
    )


# --- tables ---------------------------------------------------------------------------------------------------------------------------


def _number(text: str, *, bad: bool = False) -> str:
    return f"<td class='number{' bad' if bad else ''}'>{escape(text)}</td>"


def _outputs(report: Report) -> str:
    if not report.outputs:
        return ""
    tensors = report.outputs.values()
    has_logits = any(t.kl is not None for t in tensors)
    has_exact = any(not t.is_float for t in tensors)
    heads = ["Cosine", "Mean cosine", "Relative L2", "SQNR, dB", "Largest error"]
    heads += ["KL, nats", "Same top-1"] if has_logits else []
    heads += ["Equal elements"] if has_exact else []
    heads += ["NaN / Inf"]
    rows = []
    for name, t in report.outputs.items():
        cells = [
            words.cosine(t.cosine),
            words.cosine(t.mean_cosine),
            words.percent(t.rel_l2),
            words.decibel(t.sqnr_db),
            words.plain(t.max_abs),
        ]
        cells = cells if t.is_float else [words.MISSING] * len(cells)
        cells += [words.plain(t.kl), words.percent(t.top1)] if has_logits else []
        cells += [words.percent(t.exact)] if has_exact else []
        bad = math.isnan(t.rel_l2)
        row = "".join(_number(cell, bad=bad and cell == "NaN") for cell in cells) + _number(f"{t.nan} / {t.inf}", bad=bad)
        rows.append(f"<tr><th scope='row'><span class='mono'>{escape(name)}</span></th>{row}</tr>")
    head = "".join(f"<th scope='col' class='number'>{h}</th>" for h in heads)
    table = f"<table><thead><tr><th scope='col'>Output</th>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return section(
        "Outputs",
        _data_words(report),
        f"<div class='scroll' tabindex='0' role='region' aria-label='Outputs'>{table}</div>",
        identifier="outputs",
    )


def _data_words(report: Report) -> str:
    if report.data is None:
        return ""
    data = report.data
    text = f"Against the float model, over {words.count(data.samples)} sample{'s' if data.samples != 1 else ''}"
    text += f" of {data.source}" if data.source else ""
    return escape(text + (f"; {data.note}" if data.note else "") + ".")


_RANKINGS = {
    "layer": "Relative L2 error of a group's output inside the whole quantized model, what earlier groups did to its input included.",
    "output": "Relative L2 error of a group's output for float input: each group alone.",
    "weights": "Relative L2 error of a group's weights; nothing was measured on activations.",
}


def _largest(errors: Iterable[float | None]) -> float:
    """The end of an axis: the largest finite error, 1 where there is none."""
    return max((e for e in errors if e is not None and math.isfinite(e)), default=0.0) or 1.0


def _worst_groups(report: Report) -> str:
    errors = [(group, error) for group in report.worst_groups if (error := report.error_of(group)) is not None][:WORST]
    if not errors or report.ranking is None:
        return ""
    largest, short = _largest(error for _, error in errors), short_names([group.name for group in report.groups])
    rows = [
        f"<span class='mono' title='{escape(group.name)}'>{escape(short[group.name])}</span>"
        + _bar(
            82 * min(1.0, error / largest if math.isfinite(error) else 1.0),
            words.percent(error),
            "error" if math.isfinite(error) else "bad",
        )
        for group, error in errors
    ]
    title = "Worst groups" if len(report.groups) > len(errors) else "Groups, worst first"
    return section(title, _RANKINGS[report.ranking], f"<div class='bars'>{''.join(rows)}</div>", identifier="worst")


def _bar(width: float, label: str, kind: str) -> str:
    return f"<span class='bar'><i class='{kind}' style='width:{width:.2f}%'></i>{escape(label)}</span>"


def _sensitivities(report: Report) -> str:
    parts = [] if report.allocation is None else [allocation_section(report.allocation)]
    if report.sensitivity is not None:
        parts += [heat_map_section(report.sensitivity, report.allocation), curve_section(report.sensitivity, report.allocation)]
    return "".join(parts)


def _groups(report: Report) -> str:
    if not report.groups:
        return ""
    whole = report.ranking == "layer"
    columns = ["Shape", "Bits", "In the model", "Alone", "Weights", "Activations", "Flatness before", "Flatness after", "Solved in"]
    if not whole:
        columns.remove("In the model")
    scale = _largest(e for g in report.groups for e in (_layer_error(g), g.output_rel_l2, g.weight_rel_l2, g.activation_rel_l2))
    sorted_by = columns.index({"layer": "In the model", "output": "Alone"}.get(report.ranking or "", "Weights"))
    names = "".join(
        f"<th scope='col' class='number'{' aria-sort=descending' if index == sorted_by else ''}><button type='button'>{c}</button></th>"
        for index, c in enumerate(columns)
    )
    short = short_names([group.name for group in report.groups])
    rows = "".join(_group_row(group, short[group.name], scale, whole=whole) for group in report.worst_groups)
    table = (
        f"<table id='groups'><thead><tr><th scope='col'><button type='button'>Group</button></th>{names}</tr></thead>"
        f"<tbody>{rows}</tbody></table>"
    )
    lead = (
        f"Relative L2 errors: {'of the output inside the quantized model, ' if whole else ''}of the output for float input (alone), and of "
        "its two causes, rounded weights and rounded activations. Flatness is how far channel magnitudes are from equal; 0 is flat."
    )
    region = f"<div class='scroll tall' tabindex='0' role='region' aria-label='All groups'>{table}</div>"
    return section("All groups", lead, region, identifier="all")


def _group_row(group: GroupReport, short: str, scale: float, *, whole: bool) -> str:
    title = group.name + (f"; transform {group.transform}" if group.transform else "")
    title += f"; linears: {', '.join(group.linears)}" if group.linears else ""
    name = f"<span class='mono name'>{breakable(short)}</span>"
    cells = [
        f"<th scope='row' data-value='{escape(group.name)}' title='{escape(title)}'>{name}</th>",
        _sortable(*_shape(group)),
        _sortable(_bits(group), group.weight_bits),
    ]
    if whole:
        cells.append(_error_cell(_layer_error(group), scale, ""))
    cells += [
        _error_cell(group.output_rel_l2, scale, ""),
        _error_cell(group.weight_rel_l2, scale, "weight"),
        _error_cell(group.activation_rel_l2, scale, "activation"),
        _sortable(words.fixed(group.flatness_before), group.flatness_before),
        _sortable(words.fixed(group.flatness_after), group.flatness_after),
        _sortable(None if group.seconds is None else words.duration(group.seconds), group.seconds),
    ]
    return f"<tr>{''.join(cells)}</tr>"


def _layer_error(group: GroupReport) -> float | None:
    return group.layer.rel_l2 if group.layer is not None else None


def _shape(group: GroupReport) -> tuple[str | None, float | None]:
    k, n = group.in_features, group.out_features
    return (None, None) if k is None or n is None else (f"{k} → {n}", k * n)


def _bits(group: GroupReport) -> str | None:
    if group.weight_bits is None:
        return None
    suffix = f" g{group.group_size}" if group.group_size else ""
    return f"W{group.weight_bits}A{group.activation_bits}{suffix}"


def _sort_key(value: float | None) -> str:
    if value is None:
        return ""
    if math.isfinite(value):
        return f"{value:.9g}"
    return "-1e999" if value < 0 else "1e999"  # what is not finite sorts with the worst


def _sortable(text: str | None, value: float | None) -> str:
    return f"<td class='number' data-value='{_sort_key(value)}'>{escape(text or words.MISSING)}</td>"


def _error_cell(value: float | None, scale: float, kind: str) -> str:
    if value is None:
        return f"<td class='number' data-value=''>{words.MISSING}</td>"
    bad = not math.isfinite(value)
    share = 1.0 if bad else value / scale
    bar = f"<i><b class='{'bad' if bad else kind}' style='width:{100 * share:.1f}%'></b></i>"
    return f"<td class='number' data-value='{_sort_key(value)}'><span class='cell'>{escape(words.percent(value))}{bar}</span></td>"


def _left(report: Report) -> str:
    left = report.left_in_float
    if not left:
        return ""
    by_reason = groupby(sorted(left, key=lambda item: item.reason), key=lambda item: item.reason)
    items = []
    for reason, members in sorted(((r, list(m)) for r, m in by_reason), key=lambda pair: -len(pair[1])):
        names = "".join(
            f"<li><span class='mono'>{escape(m.name)}</span> <span class='soft'>{escape(m.op_type)}"
            f"{escape(f', weight {list(m.weight_shape)}') if m.weight_shape is not None else ''}</span></li>"
            for m in members
        )
        noun = "product" if len(members) == 1 else "products"
        listed = f"<details><summary class='soft'>{len(members)} {noun}</summary><ul>{names}</ul></details>"
        items.append(f"<li class='reason'>{escape(reason)}{listed}</li>")
    return section("Left in float", "", f"<ul class='reasons'>{''.join(items)}</ul>", identifier="left")


# --- the paper's picture --------------------------------------------------------------------------------------------------------------


def _normalised(profile: Sequence[float] | None) -> list[float] | None:
    """Channel magnitudes in multiples of their median (their mean where half of the channels are dead)."""
    if not profile or not all(math.isfinite(v) for v in profile):
        return None
    unit = median(profile) or sum(profile) / len(profile)
    return [float(f"{v / unit:.4g}") for v in profile] if unit else None


def _normalised_profiles(report: Report) -> list[dict[str, list[float] | str | None]]:
    found: list[dict[str, list[float] | str | None]] = [
        {"name": group.name, "before": _normalised(group.profile_before), "after": _normalised(group.profile_after)}
        for group in report.groups
    ]
    return [entry for entry in found if entry["before"] or entry["after"]]


def _flatness(report: Report) -> str:
    groups = [group for group in report.worst_groups if _normalised(group.profile_before)]
    if not groups:
        return ""
    shown = groups[:WORST]
    axis = _axis([p for g in shown for p in (_normalised(g.profile_before), _normalised(g.profile_after)) if p])
    short = short_names([group.name for group in report.groups])
    panels = "".join(_panel(group, short[group.name], axis, first=index == 0) for index, group in enumerate(shown))
    names = [str(entry["name"]) for entry in _normalised_profiles(report)]
    worst = names.index(shown[0].name)
    choices = "".join(
        f"<option value='{i}'{' selected' if i == worst else ''}>{escape(short[name])}</option>" for i, name in enumerate(names)
    )
    explorer = (
        f"<div class='explorer'><label for='group'>Group</label><select id='group'>{choices}</select>"
        "<svg id='chart' role='img' aria-label='Sorted channel magnitudes of the chosen group'></svg>"
        "<p class='detail' id='chart-detail'></p></div>"
    )
    legend = (
        "<div class='legend'><span style='--swatch:var(--before)'>input of the group</span>"
        "<span style='--swatch:var(--after)'>after the transform</span></div>"
    )
    lead = (
        "Channel magnitudes of a group's input, sorted and in multiples of their median, on a logarithmic axis. "
        "A flat line wastes no quantization level on outliers."
    )
    more = f"<h3 style='margin-top:22px'>The {len(shown)} worst groups, one axis for all</h3>" if len(shown) > 1 else ""
    return section("Flatness before and after", lead, f"{legend}{explorer}{more}<div class='panels'>{panels}</div>", identifier="flatness")


def _panel(group: GroupReport, short: str, axis: tuple[float, float], *, first: bool) -> str:
    width, height = _PANEL
    before, after = _normalised(group.profile_before), _normalised(group.profile_after)
    parts = []
    for power in range(round(math.log10(axis[1])) + 1):
        y = _y(10.0**power, axis)
        parts.append(f"<line class='{'grid' if power else 'one'}' x1='{_PANEL_LEFT}' x2='{width}' y1='{y:.1f}' y2='{y:.1f}'/>")
        parts.append(f"<text x='{_PANEL_LEFT - 5}' y='{y + 4:.1f}' text-anchor='end'>{10**power}\N{MULTIPLICATION SIGN}</text>")
    for side, profile in (("before", before), ("after", after)):
        if profile:
            points = " ".join(f"{x:.1f},{_y(v, axis):.1f}" for x, v in _thinned(profile, _PANEL_LEFT, width))
            parts.append(f"<polyline class='{side}' points='{points}'/>")
    ends = [f"<span class='is-{side}'>{words.times(p[0])}</span>" for side, p in (("before", before), ("after", after)) if p]
    label = f"{group.name}: largest channel {' then '.join(words.times(p[0]) for p in (before, after) if p)} the median"
    name = f"<span class='mono' title='{escape(group.name)}'><bdi>{escape(short)}</bdi></span>"
    bottom = height - 3
    ends_of_x = (
        f"<text x='{_PANEL_LEFT}' y='{bottom}'>largest</text><text x='{width}' y='{bottom}' text-anchor='end'>smallest channel</text>"
    )
    parts.append(ends_of_x if first else "")
    return (
        f"<figure class='panel' style='margin:0'>{name}"
        f"<svg viewBox='0 0 {width} {height}' role='img' aria-label='{escape(label)}'>{''.join(parts)}</svg>"
        f"<figcaption class='detail'>largest {' → '.join(ends)}</figcaption></figure>"
    )


def _axis(profiles: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Where the logarithmic axis of these profiles begins and ends; the median is always on it."""
    top = 10.0 ** math.ceil(math.log10(max(p[0] for p in profiles)))
    return min(_CEILING, max(_FLOOR, min(p[-1] for p in profiles))), max(10.0, top)


def _y(value: float, axis: tuple[float, float]) -> float:
    height = _PANEL[1]
    low, high = map(math.log10, axis)
    at = min(high, max(low, math.log10(max(value, 1e-30))))
    return 8 + (high - at) / (high - low) * (height - 8 - 18)


def _thinned(profile: Sequence[float], left: float, right: float) -> list[tuple[float, float]]:
    """At most 64 points, closer together at the outliers' end, where the curve bends."""
    n = len(profile)
    places = sorted({round((n - 1) * (i / 63) ** 2) for i in range(64)})
    return [(left + (right - left) * (i / max(1, n - 1)), profile[i]) for i in places]


# --- size, time, conditions -----------------------------------------------------------------------------------------------------------


def _engine(report: Report) -> str:
    """What the engine is, what became of the groups in it, and, folded away, every layer."""
    engine = report.engine
    if engine is None:
        return ""
    fates = "".join(
        f"<tr><th scope='row'>{escape(how)}</th>{_number(str(len(groups)))}<td>{escape(weights)}</td><td>{escape(product)}</td></tr>"
        for (weights, product, how), groups in engine.fates.items()
    )
    heads = "<th scope='col'>What became of groups</th><th scope='col' class='number'>Groups</th>"
    heads += "<th scope='col'>Weights</th><th scope='col'>Multiplied</th>"
    body = f"<table><thead><tr>{heads}</tr></thead><tbody>{fates}</tbody></table>" if fates else ""
    layers = "".join(
        f"<tr><th scope='row'><span class='mono'>{breakable(layer.name)}</span></th><td>{escape(layer.kind)}</td>"
        f"<td>{escape(', '.join((*layer.inputs, *layer.constants)) or words.MISSING)}</td><td>{escape(', '.join(layer.outputs))}</td>"
        f"<td>{escape(', '.join(layer.groups))}</td></tr>"
        for layer in engine.layers
    )
    if layers:
        heads = "".join(f"<th scope='col'>{head}</th>" for head in ("Layer", "Kind", "Reads", "Writes", "Groups"))
        table = f"<table><thead><tr>{heads}</tr></thead><tbody>{layers}</tbody></table>"
        region = f"<div class='scroll tall' tabindex='0' role='region' aria-label='Layers of the engine'>{table}</div>"
        body += f"<details><summary>All {len(engine.layers)} layers</summary>{region}</details>"
    return section("Engine", escape(words.engine(engine)) + ".", body, identifier="engine")


def _size_and_time(report: Report) -> str:
    parts = [part for part in (_size_section(report), _time_section(report)) if part]
    return f"<div class='two'>{''.join(parts)}</div>" if len(parts) == 2 else "".join(parts)


def _size_section(report: Report) -> str:
    size = report.size
    if size is None or not size.float_bytes:
        return ""
    largest = max(size.float_bytes, size.quantized_bytes)
    ordered = sorted(size.parts.items(), key=lambda item: -item[1])
    stack = "".join(
        f"<i style='width:{100 * n / max(1, size.quantized_bytes):.2f}%;background:var(--part-{min(i, 4)})'></i>"
        for i, (_, n) in enumerate(ordered)
    )
    legend = "".join(
        f"<span style='--swatch:var(--part-{min(i, 4)})'>{escape(name)} {words.size(n)} "
        f"({words.percent(n / max(1, size.quantized_bytes))})</span>"
        for i, (name, n) in enumerate(ordered)
    )

    def row(name: str, count: int, content: str) -> str:
        return (
            f"<span>{name}</span><div class='stack-row'><div class='stack' style='width:{72 * count / largest:.2f}%'>{content}</div>"
            f"<span class='total'>{words.size(count)}</span></div>"
        )

    rows = row("Float", size.float_bytes, "<i style='width:100%;background:var(--part-4)'></i>") + row(
        "Quantized", size.quantized_bytes, stack
    )
    body = f"<div class='sizes'>{rows}</div><div class='legend' style='margin:12px 0 0'>{legend}</div>"
    return section("Size", "Bytes of all constants.", body, identifier="size")


def _time_section(report: Report) -> str:
    stages = {name: seconds for name, seconds in report.time.items() if name != "total" and seconds >= 0.005}
    if not stages:
        return ""
    largest = max(stages.values()) or 1.0
    rows = "".join(
        f"<span>{escape(_STAGES.get(name, name))}</span>" + _bar(60 * seconds / largest, words.duration(seconds), "plain")
        for name, seconds in stages.items()
    )
    lead = f"{words.duration(report.time['total'])} in all." if "total" in report.time else ""
    return section("Time", lead, f"<div class='bars narrow'>{rows}</div>", identifier="time")


def _conditions(report: Report) -> str:
    def listed(values: Iterable[tuple[str, object]]) -> str:
        return "<dl>" + "".join(f"<dt>{escape(key)}</dt><dd>{escape(_text(value))}</dd>" for key, value in values) + "</dl>"

    command = f"<code class='command'>{escape(report.command)}</code>" if report.command else ""
    parts = []
    if report.recipe or command:
        recipe = ((key.replace("_", " "), value) for key, value in report.recipe.items())
        parts.append(section("Recipe", "", command + listed(recipe), identifier="recipe"))
    if report.environment:
        parts.append(section("Environment", "", listed(report.environment.items()), identifier="environment"))
    return f"<div class='two'>{''.join(parts)}</div>" if len(parts) == 2 else "".join(parts)


def _text(value: object) -> str:
    if value is None or value == []:
        return "default" if value is None else "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return str(value)
