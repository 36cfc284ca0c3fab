"""Options that several subcommands share, and how their values are read."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from fqonnx.calib.transforms import TRANSFORMS
from fqonnx.calib.weights import WEIGHT_QUANTIZERS
from fqonnx.cli import terminal
from fqonnx.engines import Profile
from fqonnx.errors import UsageError
from fqonnx.recipe import ALLOCATIONS, GROUP_SIZES, KV_CACHES, RECONSTRUCTIONS, SCHEMES, WIDTHS, Recipe

if TYPE_CHECKING:
    from fqonnx.calib.data.base import Source
    from fqonnx.sensitivity import Mix

Command = TypeVar("Command", bound=Callable[..., Any])
Shapes = dict[str, tuple[int, ...]]

_SHAPE = re.compile(r"(?P<name>.+):(?P<dims>\d+(?:x\d+)*|\[\s*(?:\d+(?:\s*,\s*\d+)*)?\s*\])")

PATH = click.Path(path_type=Path)


def group(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """One decorator that adds ``options`` in the order given."""

    def decorate(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


recipe_options = group(
    click.option(
        "--recipe", "recipe_file", type=PATH, metavar="FILE", help="JSON or TOML file with any of the choices below; flags win over it."
    ),
    click.option(
        "--scheme", type=click.Choice(list(SCHEMES)), help=f"Bits of weights (w) and activations (a).  [default: {Recipe.scheme}]"
    ),
    click.option(
        "--group-scheme",
        "schemes",
        multiple=True,
        callback=lambda _context, _option, values: _parse_group_schemes(values),
        metavar="REGEX=SCHEME",
        help="Scheme of the groups whose name matches, float to leave them alone; may be repeated, the first that matches decides.",
    ),
    click.option(
        "--transform", type=click.Choice(list(TRANSFORMS)), help=f"What makes a group's input flat.  [default: {Recipe.transform}]"
    ),
    click.option("--weights", type=click.Choice(list(WEIGHT_QUANTIZERS)), help=f"How weights are rounded.  [default: {Recipe.weights}]"),
    click.option(
        "--group-size",
        type=click.Choice([str(size) for size in GROUP_SIZES]),
        callback=lambda _context, _option, value: None if value is None else int(value),
        help=f"Weights along K that share a scale; 0: one scale per output channel.  [default: {Recipe.group_size}]",
    ),
    click.option(
        "--bias-correction/--no-bias-correction",
        default=None,
        help="Add to each linear's bias what its output lacks on average.  [default: no-bias-correction]",
    ),
    click.option("--keep", multiple=True, metavar="REGEX", help="Leave linears whose name matches in float; may be repeated."),
    click.option("--quantize-head/--float-head", default=None, help="Quantize the vocabulary projection too.  [default: float-head]"),
    click.option(
        "--kv", type=click.Choice(list(KV_CACHES)), help=f"How past keys and values of a decoder are stored.  [default: {Recipe.kv}]"
    ),
    click.option(
        "--reconstruct",
        type=click.Choice(list(RECONSTRUCTIONS)),
        help=f"What a group is solved for: its own output, fast, its block's, accurate, or the model's.  [default: {Recipe.reconstruct}]",
    ),
    click.option(
        "--width",
        type=click.Choice([str(width) for width in WIDTHS]),
        callback=lambda _context, _option, value: None if value is None else int(value),
        help=f"Size of a transform's right factor at most; 256 is more accurate and slower online.  [default: {Recipe.width}]",
    ),
    click.option("--seed", type=int, help=f"Seed of every random choice.  [default: {Recipe.seed}]"),
    click.option("--steps", type=int, help="Training steps of a learned transform, per group or per block.  [default: the method's own]"),
    click.option(
        "--augment",
        type=click.IntRange(min=0),
        metavar="COPIES",
        help="Copies of each sample of text, a third of the tokens drawn from the float model's predictions, that blocks are trained on "
        f"too.  [default: {Recipe.augment}]",
    ),
)
"""The fields of ``Recipe``, plus ``--recipe``; read them with ``read_recipe``."""

calibration_options = group(
    click.option(
        "--calib-data",
        metavar="DATA",
        help="What the model sees in use: file.npz, a folder of .npy/.npz, Polygraphy .json, script.py[:function] or text:FILE.",
    ),
    click.option(
        "--random-calibration",
        is_flag=True,
        help="Calibrate on random inputs that fit the graph. Accuracy suffers: for size and speed trials.",
    ),
    click.option("--calib-samples", type=click.IntRange(min=1), default=128, show_default=True, help="Samples to read at most."),
)
"""What calibration runs on; check them with ``check_calibration``."""

mix_option = click.option(
    "--mix",
    metavar="SCHEME,...",
    callback=lambda _context, _option, value: None if value is None else tuple(part.strip() for part in value.split(",")),
    help="Schemes that a group may get, float among them.  [default: w4a4,w4a8,w8a8,w8a16,float]",
)

allocation_options = group(
    mix_option,
    click.option(
        "--avg-bits",
        type=click.FloatRange(min=1, max=16),
        help="Choose a scheme per group for the smallest error at this many bits of weights and activations on average.",
    ),
    click.option(
        "--allocation", "method", type=click.Choice(ALLOCATIONS), default=ALLOCATIONS[0], show_default=True, help="How schemes are chosen."
    ),
    click.option("--sensitivity", "known", type=PATH, metavar="DIR", help="Take the groups' errors from an `fqonnx sensitivity -o DIR`."),
    click.option(
        "--sensitivity-samples",
        type=click.IntRange(min=1),
        default=8,
        show_default=True,
        help="Samples of the calibration data that the groups' errors are measured on.",
    ),
)
"""A scheme for each group; read them with ``read_mix``."""

data_options = group(
    click.option("--tokenizer", type=PATH, metavar="FILE", help="tokenizer.json for text:FILE data."),
    click.option("--seq-len", type=click.IntRange(min=1), help="Tokens per sample for text:FILE data."),
    click.option(
        "--batch-size", type=click.IntRange(min=1), default=1, show_default=True, help="Samples per run where the shapes allow it."
    ),
)
"""How data is read; ``--calib-data`` and ``--data`` name it."""

verbosity_options = group(
    click.option(
        "-v",
        "--verbose",
        count=True,
        expose_value=False,
        callback=lambda _context, _option, count: _louder(count),
        help="Say more; -vv: all.",
    ),
    click.option(
        "-q", "--quiet", is_flag=True, callback=lambda _context, _option, quiet: _quieter(quiet), help="Print nothing but errors."
    ),
)

device_option = click.option(
    "--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True, help="Where models run and transforms are trained."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for machines on stdout.")


def _louder(count: int) -> None:
    if count:
        terminal.set_verbosity(count)


def _quieter(quiet: bool) -> bool:
    if quiet:
        terminal.set_verbosity(-1)
    return quiet


def read_recipe(file: Path | None, flags: Mapping[str, Any]) -> Recipe:
    """The recipe of ``file`` (or the defaults) with the given flags on top.

    Args:
        file: JSON, or TOML where the suffix is ``.toml``; None for the defaults.
        flags: Recipe fields by name; None and empty mean "not given".

    Raises:
        UsageError: The file cannot be read, or holds a value that is not one of the choices.
    """
    values = {} if file is None else _read_table(file)
    values |= {name: value for name, value in flags.items() if name in Recipe.__dataclass_fields__ and value not in (None, ())}
    return Recipe.from_dict(values)


def check_calibration(data: str | None, *, random_calibration: bool) -> None:
    """Whether exactly one kind of calibration data is given.

    Raises:
        UsageError: None is, or both.
    """
    if data is None and not random_calibration:
        raise UsageError("no calibration data: give --calib-data DATA (what the model sees in use), or say --random-calibration")
    if data is not None and random_calibration:
        raise UsageError("--calib-data and --random-calibration exclude each other: give one of them")


def open_inputs(reference: Path, data: str | None, *, random_data: bool, **choices: Any) -> Source:
    """What ``--data`` or ``--random-data`` gives a comparison with the model ``reference``; ``choices`` are those of ``open_data``.

    Raises:
        UsageError: Neither of the two is given, or both are.
    """
    if (data is None) == (not random_data):
        raise UsageError("give exactly one of --data DATA (what the model sees in use) and --random-data")
    from fqonnx.build import open_data
    from fqonnx.model import load

    return open_data(load(reference), data, random=random_data, **choices)


def read_mix(mix: tuple[str, ...] | None, avg_bits: float | None, method: str, known: Path | None, samples: int) -> Mix | None:
    """How schemes are chosen per group; None where neither ``--mix`` nor ``--avg-bits`` is given.

    Raises:
        UsageError: A scheme is unknown, or ``--sensitivity`` is given without them.
    """
    if mix is None and avg_bits is None:
        if known is not None:
            raise UsageError("--sensitivity says what schemes cost: say what to choose with --avg-bits, or --mix and --max-error")
        return None
    from fqonnx.sensitivity import MIX, Mix

    return Mix(schemes=mix or MIX, avg_bits=avg_bits, method=method, samples=samples, known=known)


def _read_table(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
        values = tomllib.loads(text) if file.suffix.lower() == ".toml" else json.loads(text)
    except OSError as error:
        raise UsageError(f"--recipe {file}: {error.strerror}: give a JSON or TOML file") from None
    except ValueError as error:
        raise UsageError(f"--recipe {file} is not valid {'TOML' if file.suffix.lower() == '.toml' else 'JSON'}: {error}") from None
    if not isinstance(values, dict):
        raise UsageError(f'--recipe {file} holds no table of choices: write for example {{"scheme": "w4a4"}}')
    return values


def _parse_group_schemes(values: tuple[str, ...]) -> dict[str, str] | None:
    pairs: dict[str, str] = {}
    for value in values:
        pattern, equals, scheme = value.rpartition("=")
        if not (pattern and equals):
            raise UsageError(f"--group-scheme {value!r} is no pair: write REGEX=SCHEME, such as 'down_proj=w4a8'")
        pairs.setdefault(pattern, scheme)
    return pairs or None


def _parse_shapes(context: click.Context, option: click.Parameter, values: tuple[str, ...]) -> Shapes:
    """``name:1x3`` or ``name:[1,3]``; the name may hold colons, an empty list of dimensions is a scalar."""
    shapes = {}
    for value in values:
        match = _SHAPE.fullmatch(value.strip())
        if match is None:
            raise click.BadParameter(f"{value!r} is no shape: write NAME:1x3 or NAME:[1,3]", context, option)
        shapes[match["name"]] = tuple(int(dim) for dim in re.findall(r"\d+", match["dims"]))
    return shapes


def _parse_shape_sets(context: click.Context, option: click.Parameter, values: tuple[str, ...]) -> tuple[Shapes, ...]:
    """One set a value; ``ShapesCommand`` puts each of its shapes on a line."""
    return tuple(_parse_shapes(context, option, tuple(value.splitlines())) for value in values)


_SHAPE_OPTIONS = ("--min-shapes", "--opt-shapes", "--max-shapes")
_SHAPE_SETS = "--shapes"

shape_options = group(
    *(
        click.option(
            name,
            multiple=True,
            callback=_parse_shape_sets,
            metavar="NAME:1x3 ...",
            help=f"{what} shape of each dynamic input, for an engine; again for another optimization profile.",
        )
        for name, what in zip(_SHAPE_OPTIONS, ("Smallest", "Usual", "Largest"), strict=True)
    )
)
"""``--min-shapes a:1x3 b:1x4`` as in Polygraphy, once for each profile; the command needs ``cls=ShapesCommand``."""

engine_options = group(
    click.option(
        "--timing-cache",
        type=PATH,
        metavar="FILE",
        help="TensorRT: measured times of kernels to read and add to.  [default: a file in the user's cache]",
    ),
    click.option("--version-compatible", is_flag=True, help="TensorRT: a plan that later versions load, with the plugins inside."),
    click.option("--optimization-level", type=click.IntRange(0, 5), help="How long the engine's builder searches.  [default: its own]"),
)
"""Of ``EngineOptions``."""

shape_sets_option = click.option(
    _SHAPE_SETS,
    multiple=True,
    callback=_parse_shape_sets,
    metavar="NAME:1x3 ...",
    help="Sizes to measure: shapes of inputs, or sizes of dynamic dimensions by their names (batch:16); again for another set.",
)
"""``--shapes a:1x3 batch:2 --shapes ...``: sets of sizes; the command needs ``cls=ShapesCommand``."""


class ShapesCommand(click.Command):
    """Lets a shapes option take several values in a row, as in Polygraphy: they are a set, and the option again begins another."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Join the shapes of a set: they are one value."""
        spread: list[str] = []
        option: str | None = None
        taken = 0
        for arg in args:
            if arg in (*_SHAPE_OPTIONS, _SHAPE_SETS):
                option, taken = arg, 0
            elif option is not None and (taken == 0 or _SHAPE.fullmatch(arg)):
                taken += 1
                if taken > 1:
                    spread[-1] += f"\n{arg}"
                    continue
            else:
                option = None
            spread.append(arg)
        return super().parse_args(ctx, spread)


def read_profiles(low: Sequence[Shapes], mid: Sequence[Shapes], high: Sequence[Shapes]) -> list[dict[str, Profile]]:
    """The optimization profiles that the three shapes options name: the first sets of each are the first profile, and so on.

    What is not given is taken from the others: the usual shape from the largest, the rest from the usual one.

    Raises:
        UsageError: Ranks differ, or the three are not in order.
    """
    return [_read_profile(*sets) for sets in zip_longest(low, mid, high, fillvalue=Shapes())]


def _read_profile(low: Shapes, mid: Shapes, high: Shapes) -> dict[str, Profile]:
    profiles = {}
    for name in {**low, **mid, **high}:
        usual = next(shapes[name] for shapes in (mid, high, low) if name in shapes)
        shapes = (low.get(name, usual), usual, high.get(name, usual))
        if len({len(shape) for shape in shapes}) > 1 or not all(a <= b <= c for a, b, c in zip(*shapes, strict=True)):
            said = ", ".join("x".join(map(str, shape)) for shape in shapes)
            raise UsageError(f"shapes of {name!r} are not in order ({said}): give --min-shapes <= --opt-shapes <= --max-shapes of one rank")
        profiles[name] = Profile(*shapes)
    return profiles
