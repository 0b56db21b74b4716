"""The model card, `README.md`: the model, its metrics, its training data, its license, and programs that load it.

Text that users wrote, such as a title or a path, is escaped: it cannot become markup or a link, and the secrets of its
URLs are removed.
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

LOCAL = "path/of/this/folder"  # stands for the folder on a card that is not on the hub
# Text that renderers turn into links, or GitHub into mentions.
_LINK = re.compile(r"\w://|\bwww\.|\b(?:mailto|xmpp):|@[\w-]+\.[a-z]|(?<!\w)@\w", re.IGNORECASE)


@dataclass(frozen=True)
class ModelSource:
    """Place from which a program on a card loads a model: a folder, or a repository on the hub.

    Attributes:
        folder: the folder, where no repository is named.
        repo: `owner/name` on the hub, or empty.
        revision: branch of the repository.
    """

    folder: str = LOCAL
    repo: str = ""
    revision: str = "main"

    @property
    def spec(self) -> str:
        """The model spec of dualenc."""
        branch = f"@{self.revision}" if self.revision != "main" else ""
        return f"hf-hub:{self.repo}{branch}" if self.repo else self.folder

    @property
    def arguments(self) -> str:
        """The arguments of a function that loads a folder or downloads a repository, as Python code."""
        return f'"{self.repo}", revision="{self.revision}"' if self.repo else f'"{self.folder}"'

    def with_folder(self, imports: str, body: str) -> str:
        """Return a program for a library that loads local folders only.

        Args:
            imports: import statements.
            body: statements that follow the definition of the variable `folder`.
        """
        if not self.repo:
            return f"{imports}\n\nfolder = {self.arguments}\n{body}"
        download = f"folder = huggingface_hub.snapshot_download({self.arguments})"
        return f"import huggingface_hub\n{imports}\n\n{download}\n{body}"


LOCAL_FOLDER = ModelSource()


@dataclass(frozen=True)
class Card:
    """Content of the card of every model.

    Attributes:
        title: name of the model.
        library: the hub's name of the library that reads the folder.
        summary: one sentence about the model, in Markdown.
        facts: pairs of a label and a value.
        programs: pairs of a library and a program that loads the folder with it.
        notes: what the export changed, one sentence each.
        more: further text, in Markdown.
        task: the hub's name of the task that the model is for.
        images: whether the model embeds images and texts.
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
    """Further content of the card of a model on the hub.

    Attributes:
        results: metrics of evaluation sets as arguments of the hub's `EvalResult`.
        figures: the same metrics as rows of a table: set, task, metric, value, interval and number of samples.
        incomplete: pairs of an evaluation set and its problems.
        step: step at which the run measured `in_training`.
        in_training: pairs of a metric and its value.
        data: pairs of a label and a value about the training data; empty without the record of a run.
        sources: training data in the run's configuration, in YAML; empty without one.
        config: the run's configuration, in YAML; empty without one.
        license: the hub's name of the license.
        branch: branch of the repository.
        pin: code that loads one commit, with HASH in place of its hash; empty if the commit does not fix all files that
            are loaded.
        others: pairs of a command that exports the model to another library and a program that loads the export.
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

    Its metadata follow the hub (https://github.com/huggingface/hub-docs/blob/main/modelcard.md).

    Args:
        card: content of the card.
        published: further content, for a model on the hub.
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
    """Write the card of a folder as its `README.md`; see `render_card`."""
    write_text(folder / "README.md", render_card(card))


def dual_encoder_program(source: ModelSource = LOCAL_FOLDER) -> str:
    """Return a program that loads a model directory of dualenc."""
    return f"""import dualenc

embedder = dualenc.load("{source.spec}")
images = embedder.embed_images(["photo.jpg"])  # (1, E), unit length
texts = embedder.embed_texts(["a dog on a beach"])
print(images @ texts.T)"""


def text_model_program(source: ModelSource = LOCAL_FOLDER, *, calls: Sequence[str]) -> str:
    """Return a program that loads a text model of dualenc and uses its heads.

    Args:
        source: folder or repository of the model.
        calls: calls of its methods, such as 'embed(["a sentence"])'.
    """
    lines = ["import dualenc\n", f'model = dualenc.load_text("{source.spec}")']
    return "\n".join([*lines, *(f"print(model.{call})" for call in calls)])


@cache
def _templates() -> Environment:
    environment = templates(autoescape=False)  # The card is Markdown and Python; the filter `text` escapes.
    environment.filters |= {"text": _text, "fenced": _fenced}
    return environment


def _fenced(text: str, language: str) -> str:
    """Return a fenced block whose fence does not occur in the text."""
    # Markdown needs three backticks at least, and more than any run of them inside.
    fence = "`" * max([3, *(len(run) + 1 for run in re.findall("`+", text))])
    return f"{fence}{language}\n{text}\n{fence}"


def _text(value: Any) -> str:
    """Return the text of a user in one line, with markup escaped and links turned into code."""
    words = re.split(r"([`|\s]+)", one_line(value))
    return "".join(f"`{word}`" if _LINK.search(word) else _escaped(word) for word in words)


def _escaped(text: str) -> str:
    """Escape the characters with a meaning in Markdown; an underscore inside a word has none."""
    return re.sub(r"[\\`*\[\]<>|~$&!#]|(?<![^\W_])_|_(?![^\W_])", lambda found: f"\\{found[0]}", text)
