"""Data of the commands that evaluate, where it is texts alone: folders of documents, and tables of labeled texts."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from dualenc.cli.common import UsageError

if TYPE_CHECKING:
    from dualenc.data import SetOptions
    from dualenc.data.eval_sets.beir import DocumentSet
    from dualenc.data.eval_sets.labeled_texts import LabeledTexts
    from dualenc.evaluation import DocumentOptions, DocumentRetrieval, TextProbe
    from dualenc.evaluation.kinds import OpenSet


def open_documents(
    data: Sequence[str],
    split: str | None,
    images: Mapping[str, Any],
    options: "DocumentOptions | None" = None,
) -> "list[tuple[DocumentRetrieval, DocumentSet]]":
    """Open folders of documents; an empty list if the data is something else.

    Args:
        data: what the user named.
        split: split of all folders.
        images: options that were given for image sets, by name.
        options: options of documents.

    Raises:
        UsageError: If documents and image sets are mixed, or an option has no use.
        DataError: If a folder cannot be opened, or two have the same name.
    """
    from dualenc import DataError
    from dualenc.data.eval_sets.beir import is_document_folder
    from dualenc.data.eval_sets.beir import open_documents as open_folder
    from dualenc.evaluation import DocumentOptions, DocumentRetrieval

    options = options or DocumentOptions()
    if not _all_or_none(data, [is_document_folder(path) for path in data], "a folder of documents"):
        if given := list(options.given()):
            raise UsageError(
                f"{_option(given[0])} is for folders of documents (corpus.jsonl, queries.jsonl, qrels/), but {data[0]} "
                "is not one"
            )
        return []
    _refuse(images, f"{data[0]}, a folder of documents")
    found = [open_folder(path, split) for path in data]
    names = [one.name for one in found]
    if twice := [name for i, name in enumerate(names) if name in names[:i]]:
        raise DataError(f"two folders of documents are called {twice[0]!r}: rename one, or measure them one by one")
    kind = DocumentRetrieval(options)
    return [(kind, one) for one in found]


def retrieval_sets(
    data: Sequence[str],
    split: str | None,
    between: Literal["image-text", "text-text", "image-image"],
    options: "SetOptions",
) -> "list[OpenSet]":
    """Open image sets for retrieval.

    Args:
        data: what the user named.
        split: split of all sets.
        between: what is looked for by what.
        options: options of image sets.
    """
    from dualenc.evaluation import KINDS, open_sets

    return open_sets(data, [KINDS["retrieval" if between == "image-text" else between]], split, options)


def open_tables(
    data: Sequence[str], text: Sequence[str], label: str | None, images: Mapping[str, Any]
) -> "list[tuple[TextProbe, LabeledTexts]]":
    """Open two tables of labeled texts; an empty list if the data is something else.

    Args:
        data: what the user named.
        text: columns of the text; empty for "text".
        label: column of the label; None for "label".
        images: options that were given for image sets, by name.

    Raises:
        UsageError: If tables and image sets are mixed, there are not two tables, or an option has no use.
        DataError: If a table cannot be read.
    """
    from dualenc.data.eval_sets.labeled_texts import is_table, open_labeled_texts
    from dualenc.evaluation import TextProbe

    if not _all_or_none(data, [is_table(path) for path in data], "a table of texts"):
        for name, value in {"text": text, "label": label}.items():
            if value:
                raise UsageError(
                    f"{_option(name)} is for tables of texts (.tsv, .csv, .jsonl), but {data[0]} is not one"
                )
        return []
    _refuse(images, f"{data[0]}, a table of texts")
    if len(data) != 2:
        raise UsageError(
            f"texts need two tables, one to learn from and one to measure on, such as train.tsv dev.tsv; found "
            f"{len(data)}"
        )
    return [(TextProbe(), open_labeled_texts(data[0], data[1], text or ("text",), label or "label"))]


def _all_or_none(data: Sequence[str], are: Sequence[bool], what: str) -> bool:
    """Return whether all of the data is of a sort.

    Raises:
        UsageError: If only a part is.
    """
    if any(are) and not all(are):
        one, other = data[are.index(True)], data[are.index(False)]
        raise UsageError(f"{one} is {what}, but {other} is not: measure them by two commands")
    return all(are)


def _refuse(given: Mapping[str, Any], where: str) -> None:
    """Refuse options of image sets, by name, where texts are measured."""
    for name, value in given.items():
        if value:
            raise UsageError(f"{_option(name)} has no use for {where}")


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
