"""The base class of export formats."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dualenc.interop.references import Reference
from dualenc.utils.errors import ModelError
from dualenc.utils.files import read_json

if TYPE_CHECKING:
    from dualenc.inference.embedder import Embedder
    from dualenc.inference.text_model import TextPredictor
    from dualenc.interop.inputs import Inputs
    from dualenc.interop.verify import Check
    from dualenc.report.card import ModelSource

IMAGES_AND_TEXTS = "zero-shot-image-classification"  # pipeline tag of models with an image tower


class ExportFormat(ABC):
    """Format of another library: writes a model, names the library that checks it, and describes it on its card.

    A subclass sets `name`, `files` and `reference`, and defines `write` and `snippet`; the rest has defaults. The
    formats of dualenc are listed in `dualenc.interop.exporting.FORMATS`. A format in a module of your own needs no
    list: `dualenc export MODEL OUT --format my_package.my_module.MyFormat`.

    Attributes:
        name: name of the format in `export.json` and on the card.
        files: all files that `write` may write, as paths relative to the folder. A folder that holds anything else,
            except `README.md` and `export.json`, is not replaced by another export.
        reference: function or program that loads the folder with the other library, in a process of its own.
        tolerance: largest difference between dualenc and the reference that is allowed.
        compared: names of the outputs that are compared, see `dualenc.interop.references`; None for all that dualenc
            computes.
        library: the hub's name of the library that reads the folder; empty if it is `name`.
        uploaded: patterns of the files that `dualenc push` uploads, with `export.json`; empty for `files`.
        weights: patterns of the files with weights; a push needs at least one such file.
        offered_for: kinds of models whose cards on the hub show how to export to this format.
    """

    name: str
    files: tuple[str, ...]
    reference: Reference
    tolerance: float = 1e-5
    compared: tuple[str, ...] | None = None
    library: str = ""
    uploaded: tuple[str, ...] = ()
    weights: tuple[str, ...] = ("*.safetensors",)
    offered_for: tuple[str, ...] = ("dual encoder", "text model")

    @abstractmethod
    def write(self, model: "Embedder | TextPredictor", folder: Path) -> list[str]:
        """Write a model.

        Args:
            model: a dual encoder or a text model, on the CPU, in eval mode.
            folder: an empty folder, which is moved to its final place after the check.

        Returns:
            One note for each thing that the format does not keep.

        Raises:
            ModelError: If the format cannot express the model.
        """

    @abstractmethod
    def snippet(self, source: "ModelSource", images: bool) -> str:
        """Return the program on the card that loads the model with the other library.

        Args:
            source: folder or repository of the model.
            images: whether the model embeds images.
        """

    def checks(self, model: "Embedder | TextPredictor", folder: Path, inputs: "Inputs") -> "list[Check]":
        """Return the comparisons that must agree before the folder is kept.

        Args:
            model: the model that was written.
            folder: the folder that `write` filled.
            inputs: inputs for both libraries.
        """
        from dualenc.interop.inputs import outputs_of
        from dualenc.interop.verify import Check

        outputs = outputs_of(model, inputs)
        if self.compared is not None:
            outputs = {name: x for name, x in outputs.items() if name in self.compared}
        tokenizer: Any = model.tokenizer if "texts" in outputs else None
        return [Check(self.reference, str(folder), inputs, outputs, tokenizer)]

    def finish(self, folder: Path, out: Path) -> None:  # noqa: B027 (an optional hook)
        """Rewrite what depends on the path of the folder, before it is moved there; the default does nothing.

        Args:
            folder: the folder that `write` filled.
            out: its final path.
        """

    def task(self, folder: Path) -> str:
        """Return the pipeline tag of a folder: the hub's name of the task that its model is for.

        The default, "zero-shot-image-classification", marks a model that embeds images and texts.
        """
        return IMAGES_AND_TEXTS

    def describe(self, folder: Path) -> str:
        """Return what the card of an exported folder says about its files, in Markdown; by default nothing."""
        return ""

    def settings(self, folder: Path) -> dict[str, Any]:
        """Return the configuration whose sizes the card on the hub lists; by default that of `config.json`.

        Raises:
            ModelError: If a file is damaged; the message names it.
        """
        return read_object(folder / "config.json") if (folder / "config.json").is_file() else {}

    def is_pinned(self, folder: Path) -> bool:
        """Return whether a commit hash of the hub fixes all files that the other library loads."""
        return True

    def prepare_upload(self, staged: Path, folder: Path, repo: str, revision: str | None) -> None:  # noqa: B027
        """Adjust staged files to their repository on the hub; the default does nothing.

        Args:
            staged: folder with links to the files of `folder`. A file is replaced by unlinking it first.
            folder: the exported folder, which must not change.
            repo: `owner/name` on the hub.
            revision: the branch; None for main.

        Raises:
            ModelError: If the other library cannot load the model from there.
        """


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that must hold an object.

    Raises:
        ModelError: If the file cannot be read, or holds something else.
    """
    found = read_json(path)
    if not isinstance(found, dict):
        raise ModelError(f"{path} must hold a JSON object, found {type(found).__name__}")
    return found
