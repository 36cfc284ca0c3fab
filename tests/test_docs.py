"""The documentation tells the truth: links resolve, commands and options exist, Python runs, tables name real modules."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

import click
import pytest

from fqonnx.cli.main import program
from fqonnx.recipe import Recipe

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import ModuleType

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").glob("*.md")])


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path) -> Iterator[tuple[str, str]]:
    """Language and content of every fenced block."""
    return ((match[1], match[2]) for match in re.finditer(r"^```(\w*)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL))


def commands(page: Path) -> Iterator[list[str]]:
    """Every ``fqonnx ...`` command in a block."""
    for _, content in blocks(page):
        for line in content.splitlines():
            words = shlex.split(line, comments=True) if line.startswith("fqonnx ") else []
            if words:
                yield words[1:]


def leaves() -> dict[tuple[str, ...], click.Command]:
    """Every command by its words, those of groups too."""
    found: dict[tuple[str, ...], click.Command] = {}
    for word, command in program.commands.items():
        below = command.commands if isinstance(command, click.Group) else {}
        found |= {(word, inner): leaf for inner, leaf in below.items()} or {(word,): command}
    return found


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        found = (page.parent / path).resolve() if path else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


@pytest.mark.parametrize("page", [page for page in PAGES if any(commands(page))], ids=name)
def test_commands_parse(page: Path) -> None:
    """Each command is one that the parser takes, up to files that are not there."""
    for words in commands(page):
        name, command = next((name, command) for name, command in leaves().items() if tuple(words[: len(name)]) == name)
        with command.make_context(" ".join(name), words[len(name) :]) as context:
            assert context.params or not command.params


def test_the_pages_show_commands() -> None:
    shown = [tuple(words) for page in PAGES for words in commands(page)]
    assert [name for name in leaves() if not any(words[: len(name)] == name for words in shown)] == []


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_options_exist(page: Path) -> None:
    """Every ``--option`` in the text is one of the program's, or of a tool that is named with it."""
    known = {opt for command in leaves().values() for option in command.params for opt in (*option.opts, *option.secondary_opts)}
    others = {"--help", "--regen-golden", "--build", "--install", "--prefix", "--shape", "--plugins", "--past"}
    others |= {"--llama", "--jobs", "--prepare"}  # of benchmarks.accuracy
    polygraphy = "--onnxrt --trt --model-type --load-inputs --load-outputs --save-outputs --validate --compare --check --snr-threshold"
    others |= {*polygraphy.split(), "--model-input-shapes"}
    for option in re.findall(r"(?<![\w-])--[a-z][a-z-]*", page.read_text()):
        assert option in known | others, option


def test_every_option_is_documented() -> None:
    text = (ROOT / "docs" / "cli.md").read_text() + (ROOT / "docs" / "plugin.md").read_text()
    obvious = {
        "--verbose", "--quiet", "--seed", "--steps", "--batch-size", "--calib-samples", "--samples", "--target", "--device", "--float-head",
    }  # fmt: skip
    for command in leaves().values():
        for option in command.params:
            if isinstance(option, click.Option):
                assert any(opt in text for opt in option.opts) or set(option.opts) & obvious, option.opts


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_paths_in_tables_and_text_exist(page: Path) -> None:
    """What is written as ``folder/file`` in code quotes is there."""
    for path in re.findall(r"`((?:fqonnx|passes|calib|cli|plugins|tests|samples|docs)/[\w./-]*)`", page.read_text()):
        assert (ROOT / path).exists(), path


def module_of(file: str) -> ModuleType:
    """The module of a source file as the documentation names it, from the repository's root."""
    return importlib.import_module("fqonnx." + file.removeprefix("fqonnx/").removesuffix(".py").removesuffix("/__init__").replace("/", "."))


def test_names_in_the_architecture_exist() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    tables = re.findall(r"`([A-Z_]+)` in `([\w/.]+\.py)`", text)
    types = [
        (name, file)
        for names, file in re.findall(r"\| ((?:`\w+`(?:, )?)+) \(`([\w/.]+\.py)`\)", text)
        for name in re.findall(r"\w+", names)
    ]
    assert len(tables) >= 5
    assert len(types) >= 6
    for name, file in (*tables, *types):
        assert hasattr(module_of(file), name), (name, file)


def test_python_blocks_import_what_exists_and_call_it_rightly() -> None:
    import inspect

    from fqonnx.build import build

    seen = 0
    for page in PAGES:
        for language, content in blocks(page):
            if language != "python":
                continue
            seen += 1
            tree = ast.parse(content)
            for node in ast.walk(tree):
                if isinstance(node, ast.ImportFrom):
                    module = importlib.import_module(node.module or "")
                    assert all(hasattr(module, alias.name) for alias in node.names)
                if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "build":
                    inspect.signature(build).bind(*node.args, **{keyword.arg or "": None for keyword in node.keywords})
    assert seen


def test_recipe_examples_are_recipes() -> None:
    tables = [content for page in PAGES for language, content in blocks(page) if language == "toml"]
    assert tables
    for content in tables:
        Recipe.from_dict(tomllib.loads(content))


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for page in PAGES:
        for target in re.findall(r"`make ([\w-]+)`|^make ([\w-]+)$", page.read_text(), re.MULTILINE):
            assert re.search(rf"^{''.join(target)}:", makefile, re.MULTILINE), target
