"""What ``fqonnx bench`` measured, as tables for people."""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from fqonnx.bench import CANDIDATE, shape_in_words
from fqonnx.engines.tensorrt_library import FLAVOURS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from rich.console import Console

    from fqonnx.bench import Bench, ShapeResult
    from fqonnx.profile import Profile

_SHOWN_OPS = 12


def _runtimes(versions: Mapping[str, str]) -> list[str]:
    """What ran, by name and version."""
    titles = {"onnxruntime": "ONNX Runtime"} | {name: flavour.title for name, flavour in FLAVOURS.items()}
    return [f"{title} {versions[name]}" for name, title in titles.items() if name in versions]


def print_bench(result: Bench, console: Console) -> None:
    """Print tables for people: the models, the times by shape, and where they go."""
    from rich.markup import escape

    for printed in (_models_table(result), _times_table(result), *_profile_tables(result)):
        console.print(printed)
    how = "replayed CUDA graphs" if result.cuda_graphs else "one call each"
    cache = f"; past and present share buffers of {result.kv_cache} tokens" if result.kv_cache else ""
    runtimes = ", ".join(_runtimes(result.versions))
    console.print(
        f"{escape(result.device)}, {runtimes}; {how}{cache}. Inputs and outputs stay on the device; "
        "back-to-back runs in alternating blocks, caches as the run before left them."
    )
    for note in result.notes:
        console.print(f"note: {escape(note)}", style="dim", highlight=False)


def _table(title: str, *columns: str) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=bool(index), overflow="fold")
    return table


def _models_table(result: Bench) -> Any:
    from rich.markup import escape

    from fqonnx.report import format as words

    table = _table("Models", "", "weights", "memory", "load")
    for role, model in result.models.items():
        memory = words.MISSING if model.memory is None else words.size(model.memory)
        table.add_row(f"{role} {escape(model.name)}", words.size(model.weights), memory, words.duration(model.load_seconds))
    return table


def _times_table(result: Bench) -> Any:
    from rich.markup import escape

    from fqonnx.report import format as words

    table = _table("Latency in ms", "", "median", "p90", "p99", "runs/s", "speed-up")
    for shape in result.shapes:
        table.add_row(f"[bold]{escape(_label(shape))}[/bold]")
        for role, times in shape.latency.items():
            figures = (times.median, times.p90, times.p99, times.per_second)
            speedup = shape.speedup if role == CANDIDATE else None
            table.add_row(f"  {role}", *(_figure(value) for value in figures), "" if speedup is None else words.times(speedup))
        table.add_section()
    return table


def _profile_tables(result: Bench) -> Iterator[Any]:
    for shape in result.shapes:
        if not shape.profile:
            continue
        heads = [head for role in shape.profile for head in (role, "share", "calls")]
        table = _table(f"Time by op in µs a run, {_label(shape)}", "op", *heads)
        longest: dict[str, float] = defaultdict(float)
        for profile in shape.profile.values():
            for name, op in profile.ops.items():
                longest[name] = max(longest[name], op.microseconds)
        names = sorted(longest, key=lambda name: -longest[name])
        for label, members in (*((name, [name]) for name in names[:_SHOWN_OPS]), ("others", names[_SHOWN_OPS:]), ("all", names)):
            if members:
                table.add_row(label, *(cell for profile in shape.profile.values() for cell in _op_cells(profile, members)))
        yield table


def _op_cells(profile: Profile, names: Sequence[str]) -> tuple[str, str, str]:
    found = [profile.ops[name] for name in names if name in profile.ops]
    if not found:
        return "", "", ""
    spent, total = sum(op.microseconds for op in found), sum(op.microseconds for op in profile.ops.values())
    return _figure(spent), f"{spent / total:.0%}", f"{sum(op.calls for op in found):g}"


def _figure(value: float) -> str:
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _label(shape: ShapeResult) -> str:
    """What the set said; where that is nothing, the shapes, those of one layer for all layers'."""
    if shape.asked:
        return " ".join(f"{name}:{shape_in_words(sizes)}" for name, sizes in shape.asked.items())
    shown: dict[str, str] = {}
    for name, sizes in shape.inputs.items():
        alike = "".join("*" if char.isdigit() else char for char in name)
        shown.setdefault(f"{alike} {sizes}", f"{alike}:{shape_in_words(sizes)}")
    return " ".join(shown.values())
