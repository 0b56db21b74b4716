"""Building of an index: new parts of the source are embedded, parts that are there are kept, others are removed."""

import hashlib
import json
import os
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dualenc.data.prepare.resumable import check_same
from dualenc.data.shards.index import ShardIndex
from dualenc.data.shards.patterns import expand_shards
from dualenc.data.shards.sample import image_members
from dualenc.data.text.files import KINDS, TextIndex
from dualenc.inference.embed_files import Towers, Track, check_loading
from dualenc.inference.embedder import Embedder, load
from dualenc.inference.image_files import find_images
from dualenc.inference.text_model import TextPredictor
from dualenc.inference.text_tower import DOCUMENT_PROMPTS, QUERY_PROMPTS, TextTower, load_text_tower
from dualenc.search.ann import GOOD, build_ann, check_spec, choose_spec, covers
from dualenc.search.folder import ABOUT, ANN, FORMAT, SEGMENTS, building, read_about
from dualenc.search.segments import Rows, Segment, write_segment
from dualenc.search.sources import (
    PICTURES,
    CaptionsToSearch,
    EarlierRows,
    FilesToSearch,
    LinesToSearch,
    PicturesToSearch,
    SearchSource,
    SourcePart,
)
from dualenc.utils.arguments import Precision
from dualenc.utils.errors import DataError, ModelError
from dualenc.utils.files import write_json
from dualenc.utils.text import plural
from dualenc.utils.urls import is_remote, redact

EXAMPLES = 12  # captions that the index keeps to show what a query may be
LONGEST_EXAMPLE = 80  # characters, of which longer captions and passages give the first words
_NAMES = {bool: "true or false", int: "number", float: "number", str: "text", list: "list", dict: "object"}


@dataclass
class BuiltSearch:
    """Result of `build_search`.

    Attributes:
        out: the folder.
        about: content of `search.json`.
        new: number of rows in segments that this call wrote.
        dropped: names of segments that were in the index and no longer are.
        damaged: paths of damaged segments, which were made again.
        notes: further lines to print.
    """

    out: Path
    about: dict[str, Any]
    new: int = 0
    dropped: list[str] = field(default_factory=list)
    damaged: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def lines(self) -> list[str]:
        """Return a summary for the terminal, with the next command."""
        segments = self.about["segments"]
        rows, bad = sum(one["rows"] for one in segments), sum(one["bad"] for one in segments)
        what = "picture" if self.about["kind"] == PICTURES else "text"
        lines = [f"{path} was damaged: made again" for path in self.damaged]
        lines.append(
            f"{self.out}: {plural(rows, what)} in {plural(len(segments), 'segment')}, {self.about['dims']} dimensions, "
            f"by {self.about['model']}"
        )
        if self.new < rows:
            lines.append(f"{'all' if not self.new else f'{rows - self.new:,}'} of these were there before")
        if self.dropped:
            lines.append(f"{plural(len(self.dropped), 'segment')} no longer in the source: removed")
        if bad:
            lines.append(
                f"{plural(bad, what)} cannot be used and {'is' if bad == 1 else 'are'} not in it: {self._causes()}"
            )
        example = next(iter(self.about["examples"]), "a red flower")
        return [*lines, *self.notes, f"next: dualenc search {self.out} {json.dumps(example, ensure_ascii=False)}"]

    def _causes(self) -> str:
        """Return the most frequent causes of bad samples as text."""
        found = Counter(
            cause for one in self.about["segments"] for _, cause, _ in Segment(self.out / SEGMENTS / one["file"]).bad
        )
        return ", ".join(f"{cause} ({count:,})" for cause, count in found.most_common(3))


def build_search(
    model: str | os.PathLike[str] | Embedder | TextPredictor,
    source: Sequence[str],
    out: str | os.PathLike[str],
    *,
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
    bar: Callable[[str], Track] = lambda what: lambda items, total: items,
) -> BuiltSearch:
    """Build an index of pictures or texts, or bring one up to date.

    What is there is kept if its content is the same, what is new is embedded, what is gone from the source is removed.
    The same call resumes a stopped one, and then writes the same bytes as one without a stop.

    Args:
        model: a model, or a spec of `dualenc.load`, or for texts of `dualenc.load_text`.
        source: shards; pictures, folders of them, or a `.txt` that lists them; or files of texts.
        out: folder of the index.
        index: "exact"; "auto" or a specification of faiss for approximate search, see `dualenc.search.ann`.
        texts: index the captions of shards instead of the pictures.
        captions: source of the captions, see `dualenc.data.pairs.captions_of`.
        image: member that holds the pictures, see `dualenc.data.shards.sample.image_members`.
        column: column of the texts in files of texts.
        query_prompt: text before each query, or the name of a prompt of the model, see `TextTower.prompt`.
        document_prompt: the same for each text of the index.
        precision: precision of the towers.
        workers: processes that decode pictures.
        batch_size: pictures embedded at once.
        bar: returns the wrapper of a loop for a progress bar, by the noun of what is counted.

    Raises:
        DataError: If the source is missing or unreadable, the folder was begun with other options or another model, or
            another process is building it.
        ModelError: If the model cannot be read, or does not fit the source.
    """
    check_loading(batch_size, workers)
    job = _Job(Path(out), index, captions=captions, image=image, column=column, precision=precision)
    job.open(
        model, list(source), texts, (query_prompt, document_prompt), {"workers": workers, "batch_size": batch_size}
    )
    with building(job.out):
        built = job.write(bar)
    return built


class _Job:
    """The state of `build_search`."""

    def __init__(
        self, out: Path, index: str, *, captions: str, image: str | None, column: str, precision: Precision
    ) -> None:
        self.index = index
        self.out, self.captions, self.column = out, captions, column
        self.precision: Precision = precision
        self.image = image
        self.source: SearchSource
        self.about: dict[str, Any] = {}

    def open(
        self,
        model: str | os.PathLike[str] | Embedder | TextPredictor,
        source: list[str],
        texts: bool,
        prompts: tuple[str | None, str | None],
        options: dict[str, Any],
    ) -> None:
        """Find what the source names, load the model, and fill in `source` and `about`."""
        found = _find(source, texts, self.image, self.column, options["workers"])
        pictures = not (texts or isinstance(found, TextIndex))
        embedder, name = _load(model, pictures, self.precision)
        query = document = ""
        if isinstance(embedder, TextTower):
            query, document = embedder.prompt(prompts[0], QUERY_PROMPTS), embedder.prompt(prompts[1], DOCUMENT_PROMPTS)
            of_texts = partial(_embed_texts, embedder, document)
            if isinstance(found, TextIndex):
                self.source, kept = LinesToSearch(found, of_texts, self.column), {"column": self.column}
            else:
                assert isinstance(found, ShardIndex)
                self.source, kept = CaptionsToSearch(found, of_texts, self.captions), {"captions": self.captions}
            dims = of_texts(["a"]).shape[1]
        else:
            dims = int(embedder.model.embed_dim)
            of_images = partial(embedder.embed_images, batch_size=options["batch_size"])
            towers = Towers(embedder.preprocess, of_images, dims)
            if isinstance(found, ShardIndex):
                self.source, kept = PicturesToSearch(found, towers, self.captions, options), {"captions": self.captions}
            else:
                assert isinstance(found, list)
                self.source, kept = FilesToSearch(found, towers, options), {}
        if isinstance(found, ShardIndex):
            kept["image"] = ";".join(image_members(self.image))
        check_spec(self.index, dims)
        self.about = {
            "format": FORMAT,
            "kind": self.source.kind,
            "model": name,
            "fingerprint": embedder.fingerprint,
            "dims": dims,
            "precision": embedder.precision,
            "image_queries": isinstance(embedder.source if isinstance(embedder, TextTower) else embedder, Embedder),
            "prompts": {"query": query, "document": document},
            "options": kept,
            "source": [redact(one) if is_remote(one) else os.path.abspath(os.path.expanduser(one)) for one in source],
        }

    def write(self, bar: Callable[[str], Track]) -> BuiltSearch:
        """Write the segments that are missing and the description, then remove what is no longer part of the index."""
        before = read_about(self.out)
        if before is not None:
            self._check_same(before)
        built = BuiltSearch(self.out, self.about)
        folder, parts = self.out / SEGMENTS, self.source.parts
        files = [self._file(part) for part in parts]
        known = {one["file"]: folder / one["file"] for one in before["segments"]} if before else {}
        earlier, todo = [], []
        for number, name in enumerate(files):
            if not _usable(folder / name, built) and name not in files[:number]:
                todo.append(number)
        for path in known.values():
            with suppress(DataError):
                earlier.append(Segment(path))
        noun = "images" if self.source.kind == PICTURES else "texts"
        contents = self.source.embed(todo, EarlierRows(earlier), bar(noun))
        for number in todo:
            content = next(contents)
            write_segment(folder / files[number], parts[number].digest, content)
            built.new += len(content.records)
        for _ in contents:  # An exhausted iterator closes its progress bar.
            pass
        rows = self._describe(files, built)
        self.about["ann"] = self._approximate(rows, files, before, built)
        write_json(self.out / ABOUT, self.about, indent=1)
        built.dropped = [name for name in known if name not in files]
        for path in [*folder.iterdir(), *self.out.glob(ANN)]:
            if path.name not in files and path.name != (self.about["ann"] or {}).get("file"):
                path.unlink()
        return built

    def _check_same(self, before: dict[str, Any]) -> None:
        """Refuse to add to an index of another model or with other options."""
        words = {
            "fingerprint": f"another model ({before['model']}, which differs in weights, architecture or tokenizer)"
        }
        names = ("kind", "fingerprint", "precision", "prompts", "options")
        check_same(self.out, before, {name: self.about[name] for name in names}, words)

    def _file(self, part: SourcePart) -> str:
        """Return the name of the file of a segment, which differs if its content does."""
        made_by = [self.about[name] for name in ("fingerprint", "precision", "prompts", "options")]
        digest = hashlib.blake2b(json.dumps([part.digest, made_by]).encode(), digest_size=8)
        return f"{part.name}-{digest.hexdigest()}.safetensors"

    def _describe(self, files: list[str], built: BuiltSearch) -> Rows:
        """Add to the description what depends on the segments, and return their rows."""
        segments = [Segment(self.out / SEGMENTS / name) for name in files]
        self.about["segments"] = [
            {"name": part.name, "file": name, "digest": part.digest, "rows": len(segment), "bad": len(segment.bad)}
            | part.about
            for part, name, segment in zip(self.source.parts, files, segments, strict=True)
        ]
        rows = Rows([segment.embeddings for segment in segments], self.about["dims"])
        if not len(rows):
            causes = built._causes()
            raise DataError(f"nothing of the source can be used{f': {causes}' if causes else ''}")
        examples, fields = [], {}
        for row in np.unique(np.linspace(0, len(rows) - 1, min(len(rows), 10 * EXAMPLES)).astype(int)).tolist():
            segment, i = rows.find(row)
            record = segments[segment].record(i)
            examples += [textwrap.wrap(text, LONGEST_EXAMPLE)[0] for text in record["captions"][:1]]
            for name, value in record["fields"].items():
                if value is not None:
                    fields.setdefault(name, _NAMES[type(value)])
        places = np.unique(np.linspace(0, len(examples) - 1, min(len(examples), EXAMPLES)).astype(int))
        self.about["examples"] = list(dict.fromkeys(examples[i] for i in places.tolist()))
        self.about["fields"] = [{"name": name, "type": kind} for name, kind in fields.items()]
        return rows

    def _approximate(
        self, rows: Rows, files: list[str], before: dict[str, Any] | None, built: BuiltSearch
    ) -> dict[str, Any] | None:
        """Return the facts of the file of approximate search, which is written if it is missing or of other rows."""
        spec = choose_spec(self.index, len(rows))
        if spec is None:
            return None
        path = self.out / f"ann-{covers(spec, files)}.faiss"
        facts = before["ann"] if before else None
        if facts is None or facts["file"] != path.name or not path.is_file() or path.stat().st_size != facts["size"]:
            facts = build_ann(spec, rows, path)
        recall = facts["recall@10"]
        built.notes.append(
            f"approximate search by faiss ({spec}), {facts['size'] / 1e6:,.1f} MB: it finds {recall:.1%} of the exact "
            "10 nearest"
        )
        if recall < GOOD:
            built.notes.append(
                f"warning: more than {1 - GOOD:.0%} of the nearest rows are missed: run it again with --index auto or "
                "exact, which keeps the embeddings"
            )
        return facts


def _find(
    source: list[str], texts: bool, image: str | None, column: str, workers: int
) -> ShardIndex | TextIndex | list[str]:
    """Return the shards, text files or paths of pictures that a source names."""
    if not texts and image is None and (paths := find_images(source)):
        return paths
    if named := [name for name in source if name.lower().endswith(KINDS)]:
        if len(named) < len(source):
            other = next(name for name in source if name not in named)
            raise DataError(f"{named[0]} is a text file, and {other} is not: build an index of each")
        return TextIndex.build(source, [column])
    remote = any(map(is_remote, expand_shards(source)))  # whose content is known by its header and tag
    return ShardIndex.build(source, image=image, workers=workers, hashes=() if remote else ("piece", "text"))


def _load(
    model: str | os.PathLike[str] | Embedder | TextPredictor, pictures: bool, precision: Precision
) -> tuple[Embedder | TextTower, str]:
    """Return the model that embeds the source, and its name."""
    if isinstance(model, Embedder):
        return model if pictures else TextTower(model), model.name
    if isinstance(model, TextPredictor):
        if pictures:
            raise DataError(f"{model.name} is a text model, which cannot embed pictures: index texts with it")
        return TextTower(model), model.name
    name = os.fspath(model)
    name = os.path.abspath(os.path.expanduser(name)) if os.path.exists(os.path.expanduser(name)) else name
    if not pictures:
        return load_text_tower(model, precision=precision), name
    try:
        return load(model, precision=precision), name
    except ModelError as error:
        raise ModelError(f"{error}; with a text model, --texts indexes the captions of shards") from None


def _embed_texts(tower: TextTower, prompt: str, texts: list[str]) -> np.ndarray:
    return tower.embed(texts, prompt).numpy()


def _usable(path: Path, built: BuiltSearch) -> bool:
    """Return whether a segment is there; a damaged one is noted and removed."""
    if not path.exists():
        return False
    try:
        Segment(path).verify()
    except DataError:
        built.damaged.append(str(path))
        path.unlink()
        return False
    return True
