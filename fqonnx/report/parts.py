"""What pages are put together from."""

from __future__ import annotations

import json
import re
from html import escape
from importlib.resources import files
from string import Template
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def page(title: str, body: str, *, profiles: Sequence[object] = ()) -> str:
    """A self-contained page.

    Args:
        title: As text.
        body: As HTML.
        profiles: What the script draws the chosen group's picture from.
    """
    folder = files("fqonnx.report")

    def read(name: str) -> str:
        return (folder / name).read_text(encoding="utf-8")

    return Template(read("template.html")).substitute(
        title=escape(f"{title} - fqonnx"), css=read("style.css"), js=read("script.js"), profiles=_json(profiles), body=body
    )


def _json(value: object) -> str:
    """JSON that cannot end the script element it stands in."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def section(title: str, lead: str, body: str, *, identifier: str) -> str:
    """A card of the page: the title is text, lead and body are HTML."""
    lead = f"<p class='lead'>{lead}</p>" if lead else ""
    return f"<section aria-labelledby='{identifier}'><h2 id='{identifier}'>{escape(title)}</h2>{lead}{body}</section>"


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Names without what all of them start with: ``layers.5.mlp.down_proj`` of ``model.layers.5.mlp.down_proj``.

    The last common part stays, since a bare ``5.mlp.down_proj`` would not say what 5 is.
    """
    parts = [re.findall(r"[^./]*[./]|[^./]+$", name) for name in names]
    common = 0
    while len(names) > 1 and all(len(p) > common + 1 and p[common] == parts[0][common] for p in parts):
        common += 1
    return {name: "".join(p[max(0, common - 1) :]) for name, p in zip(names, parts, strict=True)}


def breakable(name: str) -> str:
    """A name, escaped, that may be broken where its parts end."""
    return "<wbr>".join(escape(part) for part in re.findall(r"[^+./]*[+./]|[^+./]+$", name))
