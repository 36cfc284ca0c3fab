"""The recipe: every choice of a build, validated once. Nothing downstream checks these values again."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from fqonnx.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

GROUP_SIZES = (0, 32, 64, 128)
"""Weights that share one scale along K; 0 is one scale per output channel."""


@dataclass(frozen=True)
class Scheme:
    """Bit widths of a linear: ``weight_bits`` symmetric weights, ``activation_bits`` symmetric per-token activations (16: float)."""

    name: str
    weight_bits: int
    activation_bits: int

    @property
    def quantizes_activations(self) -> bool:
        """Whether activations are rounded to integers at run time."""
        return self.activation_bits < 16


SCHEMES = {
    s.name: s for s in (Scheme("w4a4", 4, 4), Scheme("w4a8", 4, 8), Scheme("w8a8", 8, 8), Scheme("w4a16", 4, 16), Scheme("w8a16", 8, 16))
}

FLOAT = Scheme("float", 16, 16)
"""What a group that is left in float counts as, whatever float type the model was exported in: deployed it is 16 bits."""

GROUP_SCHEMES = {**SCHEMES, FLOAT.name: FLOAT}
"""What a single group may be given."""

KV_CACHES = ("none", "int8", "int4", "fp8")
"""How keys and values of earlier tokens are stored; none leaves the cache in float."""

ALLOCATIONS = ("dynamic", "greedy")
"""How schemes are chosen per group: exactly, or by the upgrade that saves the most error per bit, over and over."""


RECONSTRUCTIONS = ("group", "block", "model")
"""What a group is solved for: the output of its own linears, fast, that of the whole block it lies in, or that of the model behind it."""

WIDTHS = (128, 256)
"""Right factors of Kronecker pairs are at most so wide: what costs least online, and the widest that kernels take."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to build, in the field's terms.

    Attributes:
        scheme: A key of ``SCHEMES``.
        schemes: Schemes of single groups, pairs of a group's name or a regular expression (``re.search`` on that name) and a key of
            ``GROUP_SCHEMES``. A pair with the very name of a group decides, else the first that matches, else ``scheme``.
        transform: A key of ``fqonnx.calib.transforms.TRANSFORMS``.
        weights: A key of ``fqonnx.calib.weights.WEIGHT_QUANTIZERS``.
        group_size: Weights along K that share a scale, one of ``GROUP_SIZES``; 0 is per output channel.
        bias_correction: Add to each linear's bias what its output lacks on average.
        keep: Regular expressions (``re.search``) on linear names; what matches stays in float.
        quantize_head: Quantize the vocabulary projection (lm_head) too.
        kv: How a decoder's cache of keys and values is stored, one of ``KV_CACHES``.
        reconstruct: What a group is solved for, one of ``RECONSTRUCTIONS``.
        width: Size of the right factor of a transform at most, one of ``WIDTHS``.
        seed: Seed of every random choice: token reservoir, random rotations, training order.
        steps: Training steps of a learned transform, per group or per block; None takes the default.
        augment: Copies of each calibration sample of a language model, some tokens drawn anew, that blocks are trained on too.

    Raises:
        UsageError: A value is not one of the choices; the message lists them.
    """

    scheme: str = "w4a4"
    schemes: tuple[tuple[str, str], ...] = ()
    transform: str = "flatquant"
    weights: str = "gptq"
    group_size: int = 0
    bias_correction: bool = False
    keep: tuple[str, ...] = ()
    quantize_head: bool = False
    kv: str = "none"
    reconstruct: str = "group"
    width: int = WIDTHS[0]
    seed: int = 0
    steps: int | None = None
    augment: int = 0

    def __post_init__(self) -> None:
        from fqonnx.calib.transforms import TRANSFORMS
        from fqonnx.calib.weights import WEIGHT_QUANTIZERS

        _one_of("scheme", self.scheme, SCHEMES)
        for pattern, scheme in self.schemes:
            _one_of(f"scheme of group {pattern!r}", scheme, GROUP_SCHEMES)
            _regular_expression("--group-scheme", pattern)
        _one_of("transform", self.transform, TRANSFORMS)
        _one_of("weights", self.weights, WEIGHT_QUANTIZERS)
        _one_of("group size", self.group_size, GROUP_SIZES)
        _one_of("KV cache", self.kv, KV_CACHES)
        _one_of("reconstruction", self.reconstruct, RECONSTRUCTIONS)
        _one_of("width", self.width, WIDTHS)
        if self.bias_correction and self.reconstruct != "group":
            raise UsageError(
                f"bias correction is for groups solved alone, not for --reconstruct {self.reconstruct}: leave out --bias-correction"
            )
        if self.augment < 0:
            raise UsageError(f"augment {self.augment} is out of range: give 0 or more copies")
        if self.augment and self.reconstruct == "group":
            raise UsageError("--augment is for --reconstruct block or model: groups solved alone have rows enough")
        if not 0 <= self.seed < 2**31:
            raise UsageError(f"seed {self.seed} is out of range: give an integer from 0 to 2147483647")
        if self.steps is not None and self.steps < 1:
            raise UsageError(f"steps {self.steps} is out of range: give 1 or more")
        for pattern in self.keep:
            _regular_expression("--keep", pattern)

    @property
    def bits(self) -> Scheme:
        """The scheme's bit widths."""
        return SCHEMES[self.scheme]

    def scheme_of(self, group: str) -> Scheme:
        """The scheme of the group of that name."""
        exact = dict(self.schemes).get(group)
        name = exact or next((scheme for pattern, scheme in self.schemes if re.search(pattern, group)), self.scheme)
        return GROUP_SCHEMES[name]

    def for_group(self, group: str) -> Recipe:
        """The recipe of one group that is quantized: the same for every group but for what ``schemes`` say of it.

        A group that is given w8a16 among others takes no transform: float activations have no outliers to flatten, 8-bit weights hardly
        feel theirs, and the transform would cost time online.
        """
        scheme = self.scheme_of(group).name
        plain = scheme == "w8a16" and scheme != self.scheme
        return replace(self, scheme=scheme, schemes=(), transform="none" if plain else self.transform)

    def alone(self) -> Recipe:
        """The same recipe for groups that are each solved for their own output."""
        return replace(self, reconstruct="group", augment=0)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, for the manifest; ``Recipe.from_dict`` reads it back."""
        return asdict(self) | {"keep": list(self.keep), "schemes": dict(self.schemes)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Recipe:
        """A recipe from plain JSON types.

        Raises:
            UsageError: An unknown key or a value out of its choices.
        """
        unknown = sorted(set(values) - set(cls.__dataclass_fields__))
        if unknown:
            raise UsageError(f"unknown recipe key {unknown[0]!r}: choose from {', '.join(cls.__dataclass_fields__)}")
        for key, value in values.items():
            said, fits = _KINDS[key]
            if not fits(value):
                raise UsageError(f"recipe key {key!r} is {value!r}: give {said}")
        return cls(**{**values, "keep": tuple(values.get("keep", ())), "schemes": tuple(values.get("schemes", {}).items())})


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


_KINDS: dict[str, tuple[str, Callable[[object], bool]]] = {
    "scheme": ("a name", _is_text),
    "schemes": ("a table of schemes by group", lambda value: isinstance(value, dict) and all(map(_is_text, value.values()))),
    "transform": ("a name", _is_text),
    "weights": ("a name", _is_text),
    "kv": ("a name", _is_text),
    "group_size": ("an integer", _is_integer),
    "bias_correction": ("true or false", lambda value: isinstance(value, bool)),
    "keep": ("a list of regular expressions", lambda value: isinstance(value, list | tuple) and all(map(_is_text, value))),
    "quantize_head": ("true or false", lambda value: isinstance(value, bool)),
    "reconstruct": ("a name", _is_text),
    "width": ("an integer", _is_integer),
    "seed": ("an integer", _is_integer),
    "steps": ("an integer or null", lambda value: value is None or _is_integer(value)),
    "augment": ("an integer", _is_integer),
}
"""By recipe key, what its value is in words, and whether a value read from a file is one."""


def _one_of(what: str, value: object, choices: Any) -> None:
    if value not in choices:
        raise UsageError(f"unknown {what} {value!r}: choose from {', '.join(str(c) for c in choices)}")


def _regular_expression(option: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise UsageError(f"{option} {pattern!r} is not a regular expression: {error}") from None
