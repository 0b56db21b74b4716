"""Export of models: a format writes the model, its library checks the folder, and the card describes it."""

import os
import re
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from shlex import quote

from dualenc.formats.model_folder import CONFIG, EXPORT, MODULES, TEXT_MODEL, detect, open_folder
from dualenc.inference.embedder import Embedder, facts_of, load
from dualenc.inference.text_model import TextPredictor, facts_of_text, load_text
from dualenc.interop.export_format import IMAGES_AND_TEXTS, ExportFormat
from dualenc.interop.inputs import Inputs, make_inputs, make_text_inputs
from dualenc.interop.onnx import OnnxFormat
from dualenc.interop.open_clip import OpenClipFormat
from dualenc.interop.sentence_transformers import SentenceTransformersFormat
from dualenc.interop.transformers import TransformersFormat
from dualenc.interop.verify import Verified, verify
from dualenc.report.card import Card, ModelSource, write_card
from dualenc.utils.errors import ModelError
from dualenc.utils.files import atomic_folder, write_json
from dualenc.utils.imports import import_by_path
from dualenc.utils.text import did_you_mean, one_line

# All export formats of dualenc; a new one is listed here.
FORMATS: dict[str, ExportFormat] = {
    one.name: one for one in (OpenClipFormat(), TransformersFormat(), SentenceTransformersFormat(), OnnxFormat())
}
CARD = "README.md"


@dataclass(frozen=True)
class Exported:
    """Result of an export.

    Attributes:
        folder: the folder that was written.
        verified: the comparisons with other libraries.
        notes: what the export changed, one sentence each.
    """

    folder: Path
    verified: list[Verified]
    notes: list[str]

    def lines(self) -> list[str]:
        """Return a summary for the terminal."""
        files = [path for path in self.folder.rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files) / 1e6
        lines = [f"{self.folder}: {len(files)} files, {size:,.1f} MB"]
        lines += [line for one in self.verified for line in one.lines()]
        return lines + [f"changed by the export: {note}" for note in self.notes]


def find_format(name: str | ExportFormat) -> ExportFormat:
    """Return an export format.

    Args:
        name: a key of `FORMATS`, or the import path of an `ExportFormat`, object or class. The module is imported, so
            the path must come from the user and never from a file.

    Raises:
        ModelError: If there is no such format, or it lacks an attribute.
    """
    if isinstance(name, ExportFormat):
        return _check_format(name, type(name).__name__)
    if name in FORMATS:
        return FORMATS[name]
    if "." not in name:
        every = (
            f"choose one of {', '.join(FORMATS)}, or the import path of an ExportFormat such as "
            "my_package.my_module.MyFormat"
        )
        if not name:
            raise ModelError(f"--format is missing: {every}")
        raise ModelError(f"unknown --format {name!r}: {did_you_mean(name, FORMATS, every)}")
    try:
        found = import_by_path(name)
        found = found() if isinstance(found, type) and issubclass(found, ExportFormat) else found
    except (ImportError, TypeError) as error:  # a TypeError of a class that lacks a method or needs arguments
        reason = str(error) if isinstance(error, ImportError) else f"TypeError: {one_line(error)}"
        raise ModelError(
            f"--format {name} cannot be imported ({reason}): correct the path, or add its folder to PYTHONPATH"
        ) from error
    if not isinstance(found, ExportFormat):
        raise ModelError(f"--format {name} must be an ExportFormat, object or class, found {type(found).__name__}")
    return _check_format(found, name)


def _check_format(found: ExportFormat, where: str) -> ExportFormat:
    """Return an export format of the user if it is complete and has a name of its own.

    Raises:
        ModelError: If it is not; the message names the attribute.
    """
    if missing := [name for name in ("name", "files", "reference") if not hasattr(found, name)]:
        raise ModelError(f"{where} does not set {', '.join(missing)}, which every ExportFormat needs")
    if not re.fullmatch(r"[A-Za-z0-9][\w.-]*", found.name, re.ASCII):
        raise ModelError(f"{where}: name must consist of letters, digits, -, _ and ., found {found.name!r}")
    if found.name in FORMATS and type(found) is not type(FORMATS[found.name]):
        raise ModelError(f"{where}: name {found.name!r} is that of a format of dualenc: choose another one")
    return found


def open_model(spec: str) -> Embedder | TextPredictor:
    """Load a dual encoder or a text model of dualenc, or a text model that `dualenc.load_text` reads.

    Raises:
        ModelError: If the spec names something else, or it cannot be loaded.
    """
    if spec.startswith("open_clip:"):
        raise ModelError(f"{spec} is a model of open_clip: import it first, with dualenc import {quote(spec)} OUT")
    found = open_folder(spec, [CONFIG, TEXT_MODEL, MODULES])
    kind = found.first("text_model", "sentence_transformers", "dual_encoder", "transformers")
    return load(spec, "cpu") if kind in ("dual_encoder", None) else load_text(spec, "cpu")


def export(
    spec: str,
    out: str | os.PathLike[str],
    format: str | ExportFormat,
    draw: Callable[[Embedder], Inputs] = make_inputs,
) -> Exported:
    """Write a model in the format of another library, and check it with that library.

    Args:
        spec: a model directory, run directory, text model, or hf-hub:owner/name[@revision].
        out: folder to write; an earlier export is replaced.
        format: an export format, its name, or its import path; see `find_format`.
        draw: function that draws the inputs on which both libraries are compared, for a dual encoder.

    Raises:
        ModelError: If there is no such format, it cannot express the model, its library is not installed, or the
            outputs differ by more than the format's tolerance. Nothing is written then.
    """
    chosen, out = find_format(format), Path(out)
    _check_place(spec, out)
    model = open_model(spec)
    with atomic_folder(out, _replaceable(out, chosen)) as folder:
        try:
            notes = chosen.write(model, folder)
        except ModelError as error:
            raise ModelError(f"{error}; {_way_out(model, chosen, folder)}") from error
        _check_files(folder, chosen)
        inputs = draw(model) if isinstance(model, Embedder) else make_text_inputs(model)
        verified = [verify(check, chosen.tolerance) for check in chosen.checks(model, folder, inputs)]
        if not verified:
            raise ModelError(
                f"the format {chosen.name} checks nothing: nothing was written; its method checks must return a check"
            )
        chosen.finish(folder, out)
        about = {"format": chosen.name, "fingerprint": model.fingerprint, "notes": notes, "dualenc": version("dualenc")}
        write_json(folder / EXPORT, about)
        write_card(folder, _card(model, chosen, folder, notes))
    return Exported(out, verified, notes)


def _way_out(model: Embedder | TextPredictor, refused: ExportFormat, folder: Path) -> str:
    """Return which formats take a model that a format refuses: each of them is asked to write the model.

    Args:
        model: the model.
        refused: the format that refuses it.
        folder: folder for what is written, which is removed afterwards.
    """
    able = []
    for one in FORMATS.values():
        if one.name != refused.name:
            with tempfile.TemporaryDirectory(dir=folder) as place, suppress(ModelError, OSError):
                one.write(model, Path(place))
                able.append(f"--format {one.name}")
    return f"the model can be exported with {' or '.join(able)}" if able else "no other format takes the model either"


def _card(model: Embedder | TextPredictor, chosen: ExportFormat, folder: Path, notes: list[str]) -> Card:
    """Return the card of an exported folder."""
    task = chosen.task(folder)
    images = task == IMAGES_AND_TEXTS
    kind = "A dual encoder of images and texts" if images else "A text encoder"
    return Card(
        title=model.name,
        library=chosen.library or chosen.name,
        summary=f"{kind} in the format of {chosen.name}.",
        facts=facts_of(model) if isinstance(model, Embedder) else facts_of_text(model),
        programs=[(chosen.name, chosen.snippet(ModelSource(), images))],
        notes=notes,
        more=chosen.describe(folder),
        task=task,
        images=images,
    )


def _check_place(spec: str, out: Path) -> None:
    """Refuse to replace a model of dualenc, some of whose files have the same names as those of an export."""
    found = detect(out)
    if (found.ours and found.path == out) or any(
        out.resolve() == (Path(spec) / inside).resolve() for inside in ("", "best", "last")
    ):
        raise ModelError(f"{out} is a model of dualenc, which the export would replace: choose another path")


def _replaceable(out: Path, chosen: ExportFormat) -> list[str]:
    """Return the names in a folder that an earlier export in any format may have written, and that may be replaced."""
    patterns = [EXPORT, CARD, *(name.split("/")[0] for one in (*FORMATS.values(), chosen) for name in one.files)]
    names = [path.name for path in out.iterdir()] if out.is_dir() else []
    return [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


def _check_files(folder: Path, chosen: ExportFormat) -> None:
    """Refuse an export with files that its format does not list, which could not be replaced or pushed later."""
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    if unknown := [name for name in names if not any(fnmatchcase(name, pattern) for pattern in chosen.files)]:
        raise ModelError(f"the format {chosen.name} wrote {unknown[0]}: add it to the attribute files of the format")
