"""
What the docs site takes from the code when it is built: the pages of the reference, the table of families, and
those of the options of commands and of the fields of a dataclass.

Long because each of these tables is asked of what it describes.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from dataclasses import fields, replace
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
import typer
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
    MODEL_MAPPING,
)

import hawada_peft
from hawada_peft.cli.program import app
from hawada_peft.vanilla.family import FAMILIES, Family, Layout, locate
from hawada_peft.vanilla.legality import build_sizes, head_shapes, legal_head_shapes

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

SEARCHED = ("bert", "gemma", "fsdp", "deepspeed", "sfttrainer", "wandb", "pipeline", "bench-quick")
"""What people look for: the search must find each."""

FAMILIES_MARK = "<!-- families -->"

OPTIONS_MARK = re.compile(r"<!-- options of (?P<command>\w+)(?: beyond (?P<known>\w+))? -->")
"""Stands for a table of a command's options: of those that another command does not have, if one is named."""

FIELDS_MARK = re.compile(r"<!-- fields of (?P<name>\w+) -->")
"""Stands for a table of what a dataclass of the package adds to those that it is made from."""

EVERY = "every"
"""In the place of a command: the options of all of them."""

TOP = "The package"
FOLDERS = (
    "basis",
    "gates",
    "latency",
    "planning",
    "search",
    "walked",
    "distil",
    "training",
    "surgery",
    "refit",
    "evaluation",
    "shipping",
    "page",
    "recipes",
    "vanilla",
)
"""Each has a page of the reference, for those of its names that the package does not have itself."""

ROOT_PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md"}
"""Pages of the site that stand for files of the repository's root."""

BEYOND = {"Errors": ["hawada_peft.errors"], "Extension points": ["hawada_peft.gates.relaxation"]}
"""Pages of modules that are read as a whole."""


def reference() -> dict[str, list[str]]:
    """The pages of the reference, and what stands on them: every public name once."""
    pages = {TOP: [f"hawada_peft.{name}" for name in hawada_peft.__all__]}
    seen = set(hawada_peft.__all__)
    for folder in FOLDERS:
        found = importlib.import_module(f"hawada_peft.{folder}")
        names = [each for each in found.__all__ if each not in seen and callable(getattr(found, each))]
        seen |= set(names)
        if names:
            pages[folder.capitalize()] = [f"hawada_peft.{folder}.{name}" for name in names]
    return pages | BEYOND


def file_of(title: str) -> str:
    """Where a page of the reference is."""
    return f"reference/{title.lower().replace(',', '').replace(' ', '-')}.md"


def families_table() -> str:
    """A line per registered family: what its classes allow, asked of them."""
    head = [
        "`model_type`",
        "query heads",
        "head size",
        "KV groups",
        "FFN",
        "hidden size",
        "re-homes to",
        "tied embeddings",
    ]
    lines = [head, ["---"] * len(head)]
    for model_type, family in sorted(FAMILIES.items()):
        model = _skeleton(model_type, family)
        layout = locate(model)
        lines.append(
            [
                f"`{model_type}`",
                _heads(layout),
                f"stays, in `{family.head_dim_field}`" if family.head_dim_field else "derived, so heads stay",
                "own number" if family.kv_heads_field else "as query heads",
                _ffn(layout),
                _hidden(layout),
                f"`{family.twin}`, heads free" if family.twin else "-",
                _tied(model),
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _skeleton(model_type: str, family: Family) -> PreTrainedModel:
    """A small model of the family on the meta device, as its config class makes it."""
    cls = CONFIG_MAPPING[model_type]
    sizes = {"hidden_size": 64, "num_attention_heads": 8, "num_hidden_layers": 2}
    sizes |= {family.kv_heads_field: 4} if family.kv_heads_field else {}
    sizes |= {family.ffn_field: 2 if family.ffn_unit else 96}
    sizes |= {"head_dim": 8} if "head_dim" in cls().to_dict() else {}
    config = cls(**sizes)
    mappings = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING, MODEL_MAPPING)
    built = next(mapping[cls] for mapping in mappings if cls in mapping)
    with torch.device("meta"):
        model: PreTrainedModel = (built[0] if isinstance(built, tuple) else built)(config)
    return model


def _heads(layout: Layout) -> str:
    asked, legal = head_shapes(layout.dense), legal_head_shapes(layout)
    if legal == asked:
        return "any number"
    if legal == [shape for shape in asked if layout.hidden_size % (shape.num_attention_heads or 1) == 0]:
        return "divisors of the hidden size"
    return "of 8: " + ", ".join(str(size) for size in sorted({shape.num_attention_heads or 0 for shape in legal}))


def _ffn(layout: Layout) -> str:
    odd = replace(layout.dense, intermediate_size=41)
    if build_sizes(layout, odd) is None:
        return "any size"
    return f"multiples of the {layout.family.ffn_unit.replace('_', ' ')}" if layout.family.ffn_unit else "some sizes"


def _hidden(layout: Layout) -> str:
    if not layout.norms:
        return "no"
    sizes = range(33, layout.hidden_size)
    legal = [size for size in sizes if build_sizes(layout, layout.narrowed(size)) is None]
    heads = layout.dense.num_attention_heads or 1
    if legal == list(sizes):
        return "any size"
    return "multiples of the head count" if legal == [size for size in sizes if size % heads == 0] else "some sizes"


def _tied(model: PreTrainedModel) -> str:
    if model.get_output_embeddings() is None:
        return "no head of words"
    return "by default" if model.config.tie_word_embeddings else "if the config says so"


def options_table(command: str, known: str | None = None) -> str:
    """
    A line per option of a command, as its help tells it.

    Args:
        command: name of the command; `EVERY` for what all commands have.
        known: a command whose options are left out.
    """
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    have = {name: {each.name for each in one.params} for name, one in commands.items()}
    shared = set.intersection(*have.values())
    wanted = shared if command == EVERY else have[command] - shared - have.get(known or "", set())
    one = next(iter(have)) if command == EVERY else command
    choices = _choices(one)
    lines = [["option", "default", "what"], ["---"] * 3]
    for each in commands[one].params:
        if each.param_type_name == "option" and each.name in wanted:
            names = ", ".join(f"`{name}`" for name in (*each.opts, *each.secondary_opts))
            allowed = ", ".join(f"`{choice}`" for choice in choices.get(each.name, ()))
            lines.append([names, _said(each.default), " ".join(filter(None, (allowed and f"{allowed}.", each.help)))])
    return _table(lines)


def _choices(command: str) -> dict[str, list[str]]:
    """The values that options of a command can have, where they are counted."""
    name = {each.name or "": each.callback for each in app.registered_commands}
    parameters = name[command].__signature__.parameters.values()  # type: ignore[union-attr]
    return {
        each.name: [choice.value for kind in _kinds(each.annotation) for choice in kind]
        for each in parameters
        if list(_kinds(each.annotation))
    }


def _kinds(annotation: Any) -> Iterator[type[Enum]]:
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        yield annotation
    for part in get_args(annotation):
        yield from _kinds(part)


def fields_table(name: str) -> str:
    """A line per field that a dataclass of the package adds to those that it is made from."""
    cls = getattr(hawada_peft, name)
    old = {each.name for base in cls.__bases__ for each in fields(base)}
    lines = [["knob", "default", "what"], ["---"] * 3]
    lines += [
        [f"`{each.name}`", _said(each.default), each.metadata["help"]] for each in fields(cls) if each.name not in old
    ]
    return _table(lines)


def _said(default: Any) -> str:
    if default is None or default is False:
        return ""
    if default is True:
        return "on"
    return f"`{default.value if isinstance(default, Enum) else default}`"


def _table(lines: list[list[str]]) -> str:
    escaped = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


# ---------------------------------------------------------------- MkDocs


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add to the navigation the pages of the reference, and to the guides the pages that it does not name."""
    sections: dict[str, Any] = {title: part for entry in config.nav or [] for title, part in entry.items()}
    named = re.findall(r"[\w-]+\.md", str(config.nav))
    sections["Guides"] += sorted({path.name for path in Path(config.docs_dir).glob("*.md")} - set(named))
    sections["API reference"] += [{title: file_of(title)} for title in reference()]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Make the pages of the reference: mkdocstrings fills them from the docstrings."""
    from mkdocs.structure.files import File

    for title, names in reference().items():
        text = "\n\n".join([f"# {title}", *(f"::: {name}" for name in names)])
        files.append(File.generated(config, file_of(title), content=text))
    return files


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Take off the types what stands beside them: docstrings write them as transformers does, with their defaults."""
    if not page.file.src_uri.startswith("reference/"):
        return html
    return re.sub(r", \*optional\*(?:, defaults to [^<]*)?", "", html).replace("`", "")


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put the tables where pages want them, and lead links to files of the root to their pages."""
    for file, its_page in ROOT_PAGES.items():
        markdown = markdown.replace(f"](../{file})", f"]({its_page})")
    markdown = OPTIONS_MARK.sub(lambda found: options_table(found["command"], found["known"]), markdown)
    markdown = FIELDS_MARK.sub(lambda found: fields_table(found["name"]), markdown)
    return markdown.replace(FAMILIES_MARK, families_table()) if FAMILIES_MARK in markdown else markdown


def on_post_build(config: MkDocsConfig) -> None:
    """Refuse a site whose search, which has written its index by now, does not find what people look for."""
    from mkdocs.exceptions import PluginError

    index = Path(config.site_dir, "search", "search_index.json").read_text(encoding="utf-8").lower()
    missing = [word for word in SEARCHED if word not in index]
    if missing:
        raise PluginError(f"the search finds nothing for {', '.join(missing)}")
