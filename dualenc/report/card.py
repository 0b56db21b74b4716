"""The model card, `README.md`: what a model is, how good, of what data, under which license, and how it is loaded.

Whatever users wrote stands in it as text, never as markup or a link, and without the secrets of its URLs.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jinja2 import Environment

from dualenc.report.templates import templates
from dualenc.utils.files import write_text
from dualenc.utils.text import one_line

LOCAL = "path/of/this/folder"
EXPORTS = ("open_clip", "transformers", "sentence-transformers", "onnx")  # formats of other libraries
# What renderers make links of, and GitHub mentions, in the midst of a text.
_LINK = re.compile(r"\w://|\bwww\.|\b(?:mailto|xmpp):|@[\w-]+\.[a-z]|(?<!\w)@\w", re.IGNORECASE)


@dataclass(frozen=True)
class Card:
    """What the card of every model says.

    Attributes:
        title: name of the model.
        library: the hub's name of the library that reads the folder.
        summary: what it is, in Markdown.
        facts: pairs of a word and its value.
        programs: libraries that read the folder, each with a program that does so.
        notes: what is not as it was in the model that was exported.
        more: what else there is to say, in Markdown.
        task: the hub's name of what the model is for.
        images: whether it embeds images too.
    """

    title: str
    library: str
    summary: str
    facts: Sequence[tuple[str, Any]]
    programs: Sequence[tuple[str, str]]
    notes: Sequence[str] = ()
    more: str = ""
    task: str | None = None
    images: bool = False


@dataclass(frozen=True)
class Published:
    """What the card of a model on the hub says besides.

    Attributes:
        results: metrics of evaluation sets as arguments of the hub's `EvalResult`.
        figures: the same for people: set, task, metric, value, interval and number.
        incomplete: pairs of a set and what was wrong with it.
        step: at which the run measured `in_training`.
        in_training: pairs of a metric and its value.
        data: pairs of a word and its value on the training data; empty where there is no record of a run.
        sources, config: of the run's configuration, in YAML; empty where there is none.
        license: the hub's name of it.
        branch: of the repository.
        pin: how a reader names one commit, with HASH in its place; empty where some of it is always of the branch.
        others: pairs of a command that exports the model and a program that loads what it writes.
    """

    results: Sequence[Mapping[str, Any]]
    figures: Sequence[Sequence[str]]
    incomplete: Sequence[tuple[str, str]]
    step: int
    in_training: Sequence[tuple[str, str]]
    data: Sequence[tuple[str, Any]]
    sources: str
    config: str
    license: str | None
    branch: str
    pin: str
    others: Sequence[tuple[str, str]]


def render_card(card: Card, published: Published | None = None) -> str:
    """Return the text of a card.

    Its metadata are as the hub has them (https://github.com/huggingface/hub-docs/blob/main/modelcard.md).

    Args:
        card: what it says.
        published: what it says besides, on the hub.
    """
    from huggingface_hub import EvalResult, ModelCardData

    results = [EvalResult(**one) for one in published.results] if published is not None else []
    metadata = ModelCardData(
        license=published.license if published is not None else None,
        library_name=card.library,
        pipeline_tag=card.task,
        tags=["dualenc", *(["image-text"] if card.images else [])],
        model_name=one_line(card.title) if results else None,
        eval_results=results or None,
    )
    text = (
        _templates()
        .get_template("card.jinja")
        .render(card=card, published=published, metadata=metadata.to_yaml().strip(), version=version("dualenc"))
    )
    return re.sub(r"\n{3,}", "\n\n", text.lstrip()).rstrip() + "\n"


def write_card(folder: Path, card: Card) -> None:
    """Write `README.md`; see `render_card`."""
    write_text(folder / "README.md", render_card(card))


def program(library: str, images: bool, folder: str = LOCAL, repo: str = "", revision: str = "main") -> str:
    """Return a program that loads a model with a library.

    Args:
        library: "dualenc", "text" for a text model of dualenc, or one of `EXPORTS`.
        images: whether the model embeds images too.
        folder: that is loaded where no repository is named.
        repo, revision: on the hub.
    """
    where = f'"{repo}", revision="{revision}"' if repo else f'"{folder}"'
    return (
        _templates()
        .get_template("program.jinja")
        .render(
            library=library,
            images=images,
            spec=f"hf-hub:{repo}" + (f"@{revision}" if revision != "main" else "") if repo else folder,
            where=where,
            folder=f"folder = huggingface_hub.snapshot_download({where})" if repo else f"folder = {where}",
            fetch=bool(repo) and library in ("open_clip", "onnx"),  # the others fetch by themselves
        )
        .rstrip("\n")
    )


@cache
def _templates() -> Environment:
    environment = templates(autoescape=False)  # it is Markdown and Python: `text` escapes
    environment.filters |= {"text": _text, "fenced": _fenced}
    return environment


def _fenced(text: str, language: str) -> str:
    """Return a fenced block, with a fence that is not in the text."""
    fence = "`" * max(3, *(len(run) + 1 for run in re.findall("`+", text)), 3)
    return f"{fence}{language}\n{text}\n{fence}"


def _text(value: Any) -> str:
    """Return anybody's words in one line with everything escaped that would be markup; a link becomes code."""
    words = re.split(r"([`|\s]+)", one_line(value))
    return "".join(f"`{word}`" if _LINK.search(word) else _escaped(word) for word in words)


def _escaped(text: str) -> str:
    return re.sub(r"[\\`*\[\]<>|~$&!#]|(?<![^\W_])_|_(?![^\W_])", lambda found: f"\\{found[0]}", text)
