"""The commands that build an index and search in it: plain functions, parsed by `dualenc.cli.parser`."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dualenc.cli.common import UsageError, make_folder, writing
from dualenc.utils.arguments import Precision
from dualenc.utils.progress import progress

if TYPE_CHECKING:
    from dualenc.search.index import Hits, Index

_CAPTION = 20  # least number of columns for a caption


def build_search(
    model: str,
    source: list[str],
    out: Path,
    index: str = "exact",
    texts: bool = False,
    captions: str = "auto",
    image: str | None = None,
    column: str = "text",
    query_prompt: str | None = None,
    document_prompt: str | None = None,
    precision: Precision = "fp32",
    workers: int = 2,
    batch_size: int = 64,
) -> None:
    """Build an index to search pictures or texts by words or pictures; again, to add what is new and drop what is gone.

    Args:
        model: model directory, run directory, hf-hub:owner/name[@revision] or open_clip:ARCH/WEIGHTS; for texts also a
            text model.
        source: paths, globs, brace patterns or folders of shards; or of pictures, or a .txt with a path on each line;
            or texts, .txt, .tsv, .csv or .jsonl, such as BEIR's corpus.jsonl, whose titles come before the texts.
        out: folder of the index; the same command continues a stopped one and brings the index up to date.
        index: exact compares every row; auto is exact below 100,000 rows and approximate above, by faiss; or a
            specification of faiss such as HNSW32. What approximate search finds of the exact result is measured.
        texts: index the captions of shards instead of their pictures: each caption is a row that words or pictures
            find.
        captions: "auto" for json.captions, as `make-shards` writes them, or else txt; or "txt"; or "json.FIELD" for a
            field of the .json, which may list several and be nested as in json.meta.caption.
        image: member that is the picture, such as "input.jpg"; several names are separated by ";"; by default the
            .jpg, .jpeg, .png or .webp.
        column: column of the texts in text files.
        query_prompt: text before each query of words, such as "query: ", or the name of one of the text model's
            prompts; "" for none; by default the prompt "query" of the model, or else its default.
        document_prompt: the same for each text of the index; by default the prompt "document", "passage" or "corpus"
            of the model, or else its default.
        precision: bf16 to compute the towers in it, which is faster.
        workers: processes that decode pictures.
        batch_size: pictures embedded at once.
    """
    from dualenc.search.build import build_search

    with writing(out):
        built = build_search(
            model,
            source,
            out,
            index=index,
            texts=texts,
            captions=captions,
            image=image,
            column=column,
            query_prompt=query_prompt,
            document_prompt=document_prompt,
            precision=precision,
            workers=workers,
            batch_size=batch_size,
            bar=progress,
        )
    print("\n".join(built.lines()))


def search(
    out: Path,
    query: list[str],
    k: int = 20,
    minus: tuple[str, ...] = (),
    weights: tuple[float, ...] = (),
    where: str | None = None,
    min_score: float | None = None,
    distinct: float | None = None,
    json: bool = False,
    save: Path | None = None,
    select: Path | None = None,
    model: str | None = None,
) -> None:
    """Search an index by words and pictures, which make one query together.

    Args:
        out: folder that `dualenc build-search` wrote.
        query: words in quotes, and pictures: an argument that is an existing file is a picture, others are words.
        k: number of hits.
        minus: words to avoid.
        weights: weight of each query, in their order; equal by default.
        where: condition on the fields of a sample, such as 'width >= 200 and license == "cc0"'; those of an index are
            listed where a condition is met by no row.
        min_score: least cosine of a hit.
        distinct: leave out hits whose cosine with a better hit is this or more, such as 0.95 for near duplicates.
        json: print JSON instead of a table.
        save: folder to copy the pictures of the hits to; their names begin with the rank.
        select: file to write the keys of the hits to, one on each line, for --data.select of `dualenc fit`.
        model: spec of the model that the index was made with, if it was moved.
    """
    from dualenc.data.images import ImageError
    from dualenc.search.index import Index

    if k < 1:
        raise UsageError(f"--k {k} must be at least 1")
    opened = Index.open(out, model)
    pictures = [one for one in query if os.path.isfile(one)]
    words = [one for one in query if one not in pictures]
    if missing := next((one for one in words if _looks_like_picture(one)), None):
        raise UsageError(f"{missing} does not exist: name a picture file, or write other words")
    try:
        hits = opened.search(
            texts=words,
            images=pictures,
            minus=minus,
            weights=_in_order(weights, query, pictures),
            k=k,
            min_score=min_score,
            where=where,
            distinct=distinct,
        )
    except ImageError as error:
        raise UsageError(error) from None
    _show(opened, hits, json)
    if save is not None:
        _save(opened, hits, save)
    if select is not None:
        with writing(select):
            _write_select(opened, hits, select)


def _in_order(weights: Sequence[float], query: list[str], pictures: list[str]) -> list[float] | None:
    """Return the weights of the words, then those of the pictures."""
    if not weights:
        return None
    if len(weights) != len(query):
        raise UsageError(f"--weights must be {len(query)} numbers, one for each query, found {len(weights)}")
    order = sorted(range(len(query)), key=lambda i: query[i] in pictures)
    return [weights[i] for i in order]


def _looks_like_picture(words: str) -> bool:
    """Return whether an argument that is not a file was meant to be one."""
    from dualenc.data.shards.shard import IMAGE_EXTENSIONS

    return words.lower().endswith(tuple(f".{one}" for one in IMAGE_EXTENSIONS)) and " " not in words


def _show(index: "Index", hits: "Hits", as_json: bool) -> None:
    """Print the hits as JSON or as a table."""
    if as_json:
        import json

        found = [hit._asdict() | {"fields": index.record(hit.row)["fields"]} for hit in hits]
        print(json.dumps({"model": index.about["model"], "rows": len(index), "hits": found}, indent=1))
        return
    if not len(hits):
        print(f"no hits among {len(index):,} rows")
        return
    from rich.cells import cell_len
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from dualenc.utils.text import printable

    table = Table(box=None, pad_edge=False)
    console, names = Console(highlight=False), ["", "score", "row", "key"]
    rows = [[f"{rank}", f"{hit.score:.3f}", f"{hit.row}", printable(hit.key)] for rank, hit in enumerate(hits, 1)]
    captions = any(hits.captions)
    names += ["caption" if index.kind == "images" else "text"] * captions
    widths = [max(cell_len(row[i]) for row in [names, *rows]) + 2 for i in range(4)]
    for name in names:
        fold = "fold" if name == "key" else "ellipsis"
        table.add_column(name, justify="right" if name in names[:3] else "left", overflow=fold)
    for row, caption in zip(rows, hits.captions):
        text = Text(printable(caption))
        # A long caption takes the rest of its line; the table would shrink the numbers too.
        text.truncate(max(console.width - sum(widths), _CAPTION), overflow="ellipsis")
        table.add_row(*row, *([text] * captions))
    console.print(table)


def _save(index: "Index", hits: "Hits", folder: Path) -> None:
    """Copy the pictures of the hits, with the rank at the beginning of their names."""
    from dualenc.utils.errors import DataError
    from dualenc.utils.files import write_bytes
    from dualenc.utils.text import plural

    make_folder(folder, "--save")
    width, saved, failures = len(str(len(hits))), 0, []
    with writing(folder):
        for rank, hit in enumerate(hits, 1):
            try:
                data, kind = index.image_bytes(hit.row)
            except DataError as error:
                failures.append(str(error))
                continue
            # A key comes from a stranger's shard: only its plain characters become part of a name.
            stem = Path(hit.key).stem if hit.key == hit.source else hit.key
            name = "".join(one if one.isalnum() or one in "-_" else "_" for one in stem)[-100:]
            write_bytes(folder / f"{rank:0{width}d}-{name}.{kind.partition('/')[2].replace('jpeg', 'jpg')}", data)
            saved += 1
    if failures and not saved:
        raise UsageError(f"--save: {failures[0]}")
    more = f"; {len(failures)} could not be read, such as: {failures[0]}" if failures else ""
    print(f"{folder}: {plural(saved, 'picture')}{more}")


def _write_select(index: "Index", hits: "Hits", path: Path) -> None:
    """Write the keys of the hits, which select samples of the shards."""
    from dualenc.utils.files import write_text
    from dualenc.utils.text import plural

    lines = hits.select_list()
    write_text(path, "".join(f"{line}\n" for line in lines))
    shards = any("shard" in one for one in index.about["segments"])
    use = "use it with --data.select" if shards else "build-search and embed read it in place of the pictures"
    print(f"{path}: {plural(len(lines), 'key')}{f'; {use}' if lines else ''}")
