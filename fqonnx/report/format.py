"""Figures in words: the same in the page and in the terminal."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fqonnx.report.data import EngineReport

MISSING = "\N{EN DASH}"
"""What was not measured."""


def percent(value: float | None) -> str:
    """A share or a relative error, three significant digits: ``4.21 %``."""
    if value is None:
        return MISSING
    if not math.isfinite(value):
        return not_finite(value)
    scaled = 100 * value
    if scaled and abs(scaled) < 0.0005:
        return f"{scaled:.1e} %"
    return f"{scaled:.{_decimals(scaled)}f} %"


def cosine(value: float | None) -> str:
    """Five decimals; more nines where those would round to one."""
    if value is None:
        return MISSING
    if not math.isfinite(value):
        return not_finite(value)
    return f"{value:.5f}" if value <= 0.99999 or value == 1 else f"{value:.8f}"


def decibel(value: float | None) -> str:
    """Tenths of a dB."""
    if value is None:
        return MISSING
    return f"{value:.1f}" if math.isfinite(value) else not_finite(value)


def plain(value: float | None) -> str:
    """Three significant digits without a unit."""
    if value is None:
        return MISSING
    return f"{value:.3g}" if math.isfinite(value) else not_finite(value)


def fixed(value: float | None) -> str:
    """Three decimals, for figures around one that stand in a column."""
    if value is None:
        return MISSING
    return f"{value:.3f}" if math.isfinite(value) else not_finite(value)


def times(value: float) -> str:
    """A factor: ``6.1×``."""
    return f"{value:.{_decimals(value)}f}\N{MULTIPLICATION SIGN}" if math.isfinite(value) else MISSING


def size(count: int) -> str:
    """Bytes in decimal units, three significant digits: ``21.4 MB``."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.{_decimals(count / scale)}f} {unit}"
    return f"{count} B"


def duration(seconds: float) -> str:
    """``0.42 s``, ``12.3 s``, ``3 min 07 s``, ``2 h 05 min``."""
    if not math.isfinite(seconds):
        return MISSING
    if seconds < 10:
        return f"{seconds:.2f} s"
    if seconds < 60:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def engine(report: EngineReport) -> str:
    """``tensorrt-rtx 1.7.1 for sm86 and sm120, 21.4 MB, 28 layers``."""
    parts = [f"{report.engine} {report.version}"]
    if report.gpu or report.target:
        parts[0] += f" for {report.gpu or ' and '.join(report.target)}"
    parts += [size(report.file_bytes), f"{len(report.layers)} layers" if report.layers else "its layers are not told"]
    if len(report.profiles) > 1:
        parts.append(f"{len(report.profiles)} profiles")
    parts.append(f"built in {duration(report.seconds)}{', taken from the cache' if report.cached else ''}")
    return ", ".join(parts)


def count(value: int) -> str:
    """An integer with thin groups: ``33 554 432``."""
    return f"{value:,}".replace(",", "\u202f")


def not_finite(value: float) -> str:
    """``NaN``, ``∞`` or ``-∞``."""
    return "NaN" if math.isnan(value) else "∞" if value > 0 else "-∞"


def _decimals(value: float) -> int:
    """Decimals that leave three significant digits, none from 100 on."""
    return max(0, min(4, 2 - math.floor(math.log10(abs(value))))) if value else 0
