"""The page's part about schemes per group: which hurts where, what was chosen, and how the error falls as the model grows."""

from __future__ import annotations

import math
from html import escape
from typing import TYPE_CHECKING

from fqonnx.report import format as words
from fqonnx.report.parts import breakable, page, section, short_names

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from fqonnx.report.mixed import AllocationReport, CurvePoint, GroupSensitivity, SchemeError, SensitivityReport

_WIDTH, _HEIGHT = 720, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 16, 14, 44
"""Margins of the curve, in its own units."""


def save_page(report: SensitivityReport, path: Path) -> None:
    """Write the page of ``fqonnx sensitivity``."""
    path.write_text(render(report), encoding="utf-8")


def render(report: SensitivityReport) -> str:
    """The page of ``fqonnx sensitivity`` as a string."""
    recipe = f"transform {report.recipe.get('transform')} · weights {report.recipe.get('weights')}"
    words_of_it = f"Sensitivity of {len(report.groups)} groups · {escape(recipe)}"
    head = f"<header><div><h1>{escape(report.model)}</h1><p class='soft'>{words_of_it}</p></div></header>"
    command = f"<section><code class='command'>{escape(report.command)}</code></section>" if report.command else ""
    return page(f"Sensitivity: {report.model}", head + heat_map_section(report) + curve_section(report) + command)


# --- the heat map -----------------------------------------------------------------------------------------------------------------------


def heat_map_section(report: SensitivityReport, allocation: AllocationReport | None = None) -> str:
    """Groups by schemes; the darker the worse, on a logarithmic scale; what was chosen is framed."""
    schemes = [scheme for scheme in report.schemes if scheme != "float"]
    errors = [group.of(scheme).error for group in report.groups for scheme in schemes]
    finite = [error for error in errors if math.isfinite(error) and error > 0]
    low, high = (min(finite), max(finite)) if finite else (1.0, 1.0)
    short = short_names([group.name for group in report.groups])
    heads = "".join(f"<th scope='col' class='number'>{escape(scheme)}</th>" for scheme in schemes)
    rows = "".join(_heat_row(group, short[group.name], schemes, (low, high), allocation) for group in report.groups)
    table = (
        f"<table class='heat'><thead><tr><th scope='col'>Group</th><th scope='col' class='number'>Weights</th>"
        f"<th scope='col' class='number'>Gain</th>{heads}</tr></thead><tbody>{rows}</tbody></table>"
    )
    measured = any(group.of(scheme).rel_l2 is not None for group in report.groups for scheme in schemes)
    lead = (
        f"Relative L2 error of the model's output when this group alone is quantized, {'measured' if measured else 'estimated'} on "
        f"{report.samples} of calibration's samples. Darker is worse. "
        + ("In small print the first-order estimate: the gain times the error of the group's own output. " if measured else "")
        + "The gain is how much of a small error of the group's output, relative to it, arrives at the model's output."
        + ("" if allocation is None else " Framed is the scheme that the group was given.")
    )
    region = f"<div class='scroll tall' tabindex='0' role='region' aria-label='Sensitivity of all groups'>{table}</div>"
    return section("Sensitivity", lead, region, identifier="sensitivity")


def _heat_row(
    group: GroupSensitivity, short: str, schemes: Sequence[str], limits: tuple[float, float], allocation: AllocationReport | None
) -> str:
    chosen = None if allocation is None else allocation.schemes.get(group.name)
    cells = "".join(_heat_cell(group.of(scheme), limits, chosen=scheme == chosen) for scheme in schemes)
    left = " <span class='soft'>(float)</span>" if chosen == "float" else ""
    name = f"<span class='mono name'>{breakable(short)}{left}</span>"
    return (
        f"<tr><th scope='row' title='{escape(group.name)}'>{name}</th><td class='number'>{words.count(group.parameters)}</td>"
        f"<td class='number'>{words.plain(group.gain)}</td>{cells}</tr>"
    )


def _heat_cell(error: SchemeError, limits: tuple[float, float], *, chosen: bool) -> str:
    value = error.error
    if not math.isfinite(value):
        heat = 1.0
    elif value <= 0 or limits[0] == limits[1]:
        heat = 0.0
    else:
        heat = math.log(value / limits[0]) / math.log(limits[1] / limits[0])
    detail = "" if error.rel_l2 is None or error.estimate is None else f"<small>{words.percent(error.estimate)}</small>"
    title = error.scheme if error.kl is None else f"{error.scheme}: KL {words.plain(error.kl)} nats"
    mark = " chosen" if chosen else ""
    return f"<td class='number warm{mark}' style='--heat:{heat:.3f}' title='{escape(title)}'>{words.percent(value)}{detail}</td>"


# --- the choice -------------------------------------------------------------------------------------------------------------------------


def allocation_section(allocation: AllocationReport) -> str:
    """What was asked for, what came of it, and how many groups have each scheme."""
    asked = (
        f"at most {allocation.avg_bits:g} bits"
        if allocation.avg_bits is not None
        else f"an error of at most {words.percent(allocation.max_error)}"
    )
    counts: dict[str, int] = {}
    for scheme in allocation.schemes.values():
        counts[scheme] = counts.get(scheme, 0) + 1
    lead = (
        f"Asked for {escape(asked)}; chosen by {'dynamic programming' if allocation.method == 'dynamic' else 'the greedy rule'} among the "
        "schemes of each group. Average bits are of both operands of the products, groups weighted by their parameters."
    )
    figures = [
        (
            "Average bits",
            f"{allocation.average_bits:.3f} ({allocation.weight_bits:.3f} of weights, {allocation.activation_bits:.3f} of activations)",
        ),
        ("Error, predicted", _error_words(allocation.predicted, allocation.measure)),
        ("Error, measured", _error_words(allocation.measured, allocation.measure)),
        ("Groups", ", ".join(f"{count} {scheme}" for scheme, count in sorted(counts.items(), key=lambda pair: -pair[1]))),
    ]
    listed = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in figures)
    return section("Schemes", lead, f"<dl>{listed}</dl>", identifier="allocation")


def _error_words(error: float, measure: str) -> str:
    return f"KL {words.plain(error)} nats" if measure == "kl" else f"{words.percent(error)} relative L2"


# --- the curve --------------------------------------------------------------------------------------------------------------------------


def curve_section(report: SensitivityReport, allocation: AllocationReport | None = None) -> str:
    """Error against average bits: the best choices as a line, what was measured as dots."""
    best = [point for point in report.curve if not point.label]
    figures = [figure for point in report.curve for figure in (point.predicted, point.measured)]
    if allocation is not None and allocation.measure == report.measure:
        figures += [allocation.predicted, allocation.measured]
    axis = _log_axis(figures)
    if len(best) < 2 or axis is None:
        return ""
    low, high = min(p.average_bits for p in report.curve), max(p.average_bits for p in report.curve)

    def x(bits: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * (bits - low) / (high - low or 1.0)

    def y(error: float) -> float:
        share = (math.log10(max(error, 10 ** axis[0])) - axis[0]) / (axis[1] - axis[0])
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * min(1.0, share)

    parts = [_grid(axis, y, report.measure), _bits_axis(report.curve, x, low, high)]
    line = " ".join(f"{x(p.average_bits):.1f},{y(p.predicted):.1f}" for p in best if p.predicted > 0)
    parts.append(f"<polyline class='after' points='{line}'/>")
    for point in report.curve:
        if point.measured is None or not math.isfinite(point.measured) or point.measured <= 0:
            continue  # what has no place on a logarithmic axis
        kind, radius = ("uniform", 5) if point.label else ("measured", 4)
        title = _point_words(point, report.measure)
        at = f"cx='{x(point.average_bits):.1f}' cy='{y(point.measured):.1f}'"
        parts.append(f"<circle class='{kind}' {at} r='{radius}'><title>{escape(title)}</title></circle>")
        if point.label:
            parts.append(f"<text x='{x(point.average_bits) + 8:.1f}' y='{y(point.measured) - 6:.1f}'>{escape(point.label)}</text>")
    if allocation is not None and allocation.measure == report.measure and math.isfinite(allocation.measured):
        at = f"cx='{x(allocation.average_bits):.1f}' cy='{y(allocation.measured):.1f}'"
        parts.append(f"<circle class='chosen' {at} r='7'><title>chosen: {allocation.average_bits:.3f} bits</title></circle>")
    legend = (
        "<div class='legend'><span style='--swatch:var(--after)'>best choices, predicted</span>"
        "<span style='--swatch:var(--weight)'>best choices, measured</span>"
        "<span style='--swatch:var(--before)'>one scheme for all, measured</span></div>"
    )
    what = "KL divergence of the next-token distributions, nats" if report.measure == "kl" else "relative L2 error of the output"
    lead = (
        f"{what[0].upper() + what[1:]}, against the average bits of weights and activations; below them the bytes of the groups' weights. "
        "Predicted is the sum over groups of their errors alone."
    )
    svg = f"<svg class='curve' viewBox='0 0 {_WIDTH} {_HEIGHT}' role='img' aria-label='Error against average bits'>{''.join(parts)}</svg>"
    return section("Accuracy against size", lead, legend + svg, identifier="curve")


def _log_axis(figures: Iterable[float | None]) -> tuple[int, int] | None:
    """Powers of ten around the figures; None where none is positive and finite."""
    known = [figure for figure in figures if figure is not None and math.isfinite(figure) and figure > 0]
    if not known:
        return None
    low, high = math.floor(math.log10(min(known))), math.ceil(math.log10(max(known)))
    return max(low, high - 6), max(high, low + 1)


def _grid(axis: tuple[int, int], y: object, measure: str) -> str:
    assert callable(y)
    parts = []
    for power in range(axis[0], axis[1] + 1):
        at = y(10.0**power)
        label = f"{10.0**power:g}" if measure == "kl" else words.percent(10.0**power)
        parts.append(f"<line class='grid' x1='{_LEFT}' x2='{_WIDTH - _RIGHT}' y1='{at:.1f}' y2='{at:.1f}'/>")
        parts.append(f"<text x='{_LEFT - 6}' y='{at + 4:.1f}' text-anchor='end'>{escape(label)}</text>")
    return "".join(parts)


def _bits_axis(curve: Sequence[CurvePoint], x: object, low: float, high: float) -> str:
    assert callable(x)
    parts = []
    step = max(1, round((high - low) / 8))
    for bits in range(math.ceil(low), math.floor(high) + 1, step):
        nearest = min(curve, key=lambda point: (bool(point.label), abs(point.average_bits - bits)))
        at = x(bits)
        parts.append(f"<text x='{at:.1f}' y='{_HEIGHT - _BOTTOM + 18}' text-anchor='middle'>{bits} bits</text>")
        parts.append(
            f"<text x='{at:.1f}' y='{_HEIGHT - _BOTTOM + 34}' text-anchor='middle'>{escape(words.size(nearest.weight_bytes))}</text>"
        )
    return "".join(parts)


def _point_words(point: CurvePoint, measure: str) -> str:
    found = "" if point.measured is None else f", measured {_error_words(point.measured, measure)}"
    name = f"{point.label}: " if point.label else ""
    return (
        f"{name}{point.average_bits:.2f} bits, {words.size(point.weight_bytes)}, predicted {_error_words(point.predicted, measure)}{found}"
    )
