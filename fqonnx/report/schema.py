"""Dataclasses to strict JSON and back: ``report.json`` and its relatives."""

from __future__ import annotations

import json
import math
import types
from dataclasses import fields, is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

from fqonnx.errors import ArtifactError


def encode(value: Any) -> Any:
    """Dataclasses, dicts, lists and plain values as strict JSON types."""
    if is_dataclass(value) and not isinstance(value, type):
        encoded = {}
        non_finite = {}
        for f in fields(value):
            item = getattr(value, f.name)
            encoded[f.name] = encode(item)
            if isinstance(item, float) and not math.isfinite(item):
                non_finite[f.name] = str(item)
        return encoded | ({"non_finite": non_finite} if non_finite else {})
    if isinstance(value, dict):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def decode(kind: Any, value: Any, where: str) -> Any:
    """What ``encode`` made ``value`` of.

    Args:
        kind: A dataclass, or the annotation of one's field.
        value: JSON types.
        where: What it is, for errors.

    Raises:
        ArtifactError: It is nothing of that kind.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        return None if value is None else decode(next(a for a in arguments if a is not type(None)), value, where)
    if is_dataclass(kind):
        return _dataclass(kind, value, where)
    if origin is tuple and isinstance(value, list):
        return tuple(decode(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {key: decode(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if kind is float and value is None:
        return math.nan
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if kind in (int, str, bool) and type(value) is kind:
        return value
    raise ArtifactError(f"not a report: {where} is {json.dumps(value)[:60]}")


def _dataclass(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise ArtifactError(f"not a report: {where} is {json.dumps(value)[:60]}")
    value = dict(value)
    non_finite = value.pop("non_finite", {})
    hints = get_type_hints(kind)
    unknown = sorted(set(value) - set(hints))
    if unknown:
        raise ArtifactError(f"not a report: {where} has the unknown key {unknown[0]!r}")
    arguments = {key: decode(hints[key], item, f"{where}.{key}") for key, item in value.items()}
    if not isinstance(non_finite, dict) or any(k not in arguments or v not in ("nan", "inf", "-inf") for k, v in non_finite.items()):
        raise ArtifactError(f"not a report: {where}.non_finite is {json.dumps(non_finite)[:60]}")
    arguments |= {key: float(item) for key, item in non_finite.items()}
    try:
        return kind(**arguments)
    except TypeError as error:
        raise ArtifactError(f"not a report: {where}: {str(error).partition('__init__() ')[2]}") from None
