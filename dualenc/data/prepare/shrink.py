"""Rewriting of shards with smaller images, which take fewer bytes to store, to read and to decode.

A shard is written to a temporary file and renamed when it is complete; then a line about it is appended to a journal,
from which a stopped run resumes. The output depends only on the content of the shard and the options, so that a stopped
and resumed run makes the same files.
"""

import io
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image
from torch.utils.data import Dataset, get_worker_info

from dualenc.data.images import ImageError, decode_image, resize
from dualenc.data.pairs import no_images
from dualenc.data.prepare.resumable import JOURNAL, check_same, other_inputs, read_begun, read_lines
from dualenc.data.shards.index import ShardIndex
from dualenc.data.shards.sample import Sample, image_argument, image_members
from dualenc.data.shards.shard import IMAGE_EXTENSIONS
from dualenc.data.workers import item_loader
from dualenc.utils.errors import DataError
from dualenc.utils.files import append_lines, atomic_write, write_json, write_text
from dualenc.utils.text import plural

FORMAT = 1  # of shrink.json


@dataclass(frozen=True)
class Shrunk:
    """The result of `shrink_shards`, in numbers of shards, samples, images and bytes."""

    out: str
    size: int
    shards: int
    samples: int
    shrunk: int  # images that were made smaller
    kept: int  # images that were small enough
    undecodable: list[tuple[str, str, str]]  # shard, key, cause; the images are copied unchanged
    bytes_before: int  # of all shards
    bytes_after: int
    images: tuple[str, ...] = IMAGE_EXTENSIONS  # members that may hold the image
    finished_before: bool = False

    def lines(self) -> list[str]:
        """Return the lines to print: the result, and the next command."""
        text = [f"{self.out} was finished before; remove it to write it again"] if self.finished_before else []
        text.append(
            f"{self.samples:,} samples in {plural(self.shards, 'shard')}: {self.shrunk:,} images made "
            f"smaller, {self.kept:,} kept, their shorter side is at most {self.size} pixels"
        )
        text.append(
            f"{self.bytes_before / 1e6:,.1f} MB became {self.bytes_after / 1e6:,.1f} MB, "
            f"{self.bytes_after / self.bytes_before:.1%} of that"
        )
        if self.undecodable:
            examples = ", ".join(f"{shard} {key!r} {cause}" for shard, key, cause in self.undecodable[:3])
            text.append(
                f"{len(self.undecodable):,} images cannot be made smaller and are copied unchanged: {examples}"
                f"{', ...' if len(self.undecodable) > 3 else ''}; all are named in {Path(self.out) / 'shrink.json'}"
            )
        text.append(
            f"next: dualenc fit --config run.yaml --data.train {quote(str(self.out))}{image_argument(self.images)}"
        )
        return text


def shrink_image(data: bytes, size: int, quality: int) -> bytes:
    """Shrink a JPEG, PNG or WebP to a shorter side of at most `size` pixels, and keep its format.

    The image is decoded by `decode_image` and resized as by `Preprocess`. If the format is lossless, training at this
    size therefore gets the same pixels as from the original. Metadata is dropped.

    JPEGs keep the full resolution of color (4:4:4). Files of the same size with half the resolution (4:2:0) and higher
    quality differ more from the image, most of all at edges between colors.

    Args:
        data: bytes of the file; returned unchanged if the image is small enough.
        size: largest shorter side in pixels.
        quality: quality of JPEG and of lossy WebP, 1 to 100.

    Raises:
        ImageError: If the data cannot be decoded.
    """
    image = decode_image(data)
    height, width = image.shape[-2:]
    side = min(height, width)
    if side <= size:
        return data
    image = resize(image, (int(height * size / side), int(width * size / side)))
    pixels = np.ascontiguousarray(image.permute(1, 2, 0).numpy())  # (H, W, 3)
    gray = bool((pixels == pixels[..., :1]).all())
    if data.startswith(b"\xff\xd8"):
        if gray:
            return simplejpeg.encode_jpeg(pixels[..., :1].copy(), quality, "Gray", "Gray")
        return simplejpeg.encode_jpeg(pixels, quality, "RGB", "444")
    file, small = io.BytesIO(), Image.fromarray(pixels[..., 0] if gray else pixels)
    if data.startswith(b"RIFF"):
        options = {"lossless": True} if _is_lossless(data) else {"quality": quality}
        small.save(file, "WEBP", **options)
    else:
        small.save(file, "PNG")
    return file.getvalue()


def _is_lossless(data: bytes) -> bool:
    """Return whether a WebP is lossless, by its first chunk of pixels; EXIF and profiles may come before it."""
    start = 12  # after "RIFF", the length and "WEBP"; each chunk then has four letters, a length and its data
    while start + 8 <= len(data):
        kind, length = data[start : start + 4], int.from_bytes(data[start + 4 : start + 8], "little")
        if kind in (b"VP8L", b"VP8 "):
            return kind == b"VP8L"
        # A frame of an animation (ANMF) has 24 bytes before the chunk of its pixels. Lengths are padded to even ones.
        start += 24 if kind == b"ANMF" else 8 + length + length % 2
    return False


def shrink_shards(
    shards: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    size: int = 256,
    quality: int = 90,
    image: str | None = None,
    workers: int = 2,
    track: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Shrunk:
    """Rewrite shards with smaller images; keys, captions, all other members and their order are kept.

    In each sample, only the image that training reads is shrunk. A `seg.png`, or the `.png` of a sample that has a
    `.jpg`, is copied unchanged. So are images that are small enough or cannot be decoded.

    If the process was stopped, the same call resumes it and writes the same shards.

    Args:
        shards: paths, globs, brace patterns, folders or URLs.
        out: output folder, for `shrink.json` and a shard of the same name for each input shard.
        size: largest shorter side in pixels.
        quality: quality of JPEG and of lossy WebP, 1 to 100.
        image: members that may hold the image; see `dualenc.data.shards.sample.image_members`.
        workers: number of processes, each with one shard at a time; 0 for none.
        track: wrapper of the loop over the shards, for a progress bar.

    Raises:
        DataError: If a shard cannot be read, no sample has the member `image`, two shards have one name, or OUT holds
            other files or was begun with other options.
    """
    if size < 1 or not 1 <= quality <= 100 or workers < 0:
        raise DataError(f"size {size} must be 1 or more, quality {quality} 1 to 100, workers {workers} 0 or more")
    out = Path(out)
    plan: dict[str, Any] = {"format": FORMAT, "size": size, "quality": quality, "members": list(image_members(image))}
    begun = _begun(out, plan)
    index = ShardIndex.build(
        shards, image=image, workers=workers
    )  # raises for a broken shard before anything is written
    if image is not None and not index.having(index.images).any():
        raise no_images(index)
    names = _output_names(index, out)
    inputs = {name: [shard.facts["size"], shard.facts["digest"]] for name, shard in zip(names, index.parts)}
    plan["inputs"] = dict(sorted(inputs.items()))
    description, journal = out / "shrink.json", out / JOURNAL
    if begun:
        check_same(out, begun, {"inputs": inputs}, {"inputs": other_inputs(begun["inputs"], inputs)})
    else:
        out.mkdir(parents=True, exist_ok=True)
        write_json(description, plan, indent=1)
    lines = [*begun.get("shards", []), *read_lines(journal)]
    parts = {line["shard"]: line for line in lines if _file_size(out / line["shard"]) == line["bytes"]}
    finished_before = len(parts) == len(names) and not journal.exists()
    if not finished_before:
        write_text(journal, "".join(json.dumps(line) + "\n" for line in parts.values()))
        for temporary in out.glob("*.part"):
            temporary.unlink()
        for part in track(_shrink_rest(_Shards(index, names, out, size, quality), list(parts), workers)):
            if isinstance(part, Exception):
                raise part
            append_lines(journal, [json.dumps(part)], sync=True)
            parts[part["shard"]] = part
        write_json(description, {**plan, "shards": [parts[name] for name in sorted(names)]}, indent=1)
        journal.unlink()
    return _shrunk(out, size, inputs, parts, index.images, finished_before)


def _shrunk(
    out: Path,
    size: int,
    inputs: dict[str, list[Any]],
    parts: dict[str, dict[str, Any]],
    images: tuple[str, ...],
    finished_before: bool,
) -> Shrunk:
    """Sum up the lines of the journal, one for each shard."""
    count = {name: sum(part[name] for part in parts.values()) for name in ("samples", "shrunk", "kept", "bytes")}
    return Shrunk(
        out=str(out),
        size=size,
        shards=len(inputs),
        samples=count["samples"],
        shrunk=count["shrunk"],
        kept=count["kept"],
        undecodable=[(name, key, cause) for name in inputs for key, cause in parts[name]["undecodable"]],
        bytes_before=sum(bytes_before for bytes_before, _ in inputs.values()),
        bytes_after=count["bytes"],
        images=images,
        finished_before=finished_before,
    )


def _begun(out: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Read OUT/shrink.json of an earlier call; return an empty dict for a new folder."""
    begun = read_begun(out / "shrink.json", "shrink")
    if not begun:
        return {}
    begun.setdefault("members", list(IMAGE_EXTENSIONS))  # Older versions read these only, and did not say so.
    check_same(out, begun, options, {"members": f"--image {';'.join(begun['members'])}"})
    return begun


def _output_names(index: ShardIndex, out: Path) -> list[str]:
    """Return the names that the shards will have in OUT: their base names."""
    found: dict[str, str] = {}
    for shard in index.parts:
        name, path = shard.facts["name"], str(shard)
        if name in found:
            raise DataError(f"{found[name]} and {path} would both become {out / name}: shrink them into two folders")
        if os.path.realpath(os.path.dirname(path)) == os.path.realpath(out):
            raise DataError(f"{out} is the folder of {path}, which would be overwritten: name another one")
        found[name] = path
    return list(found)


def _file_size(path: Path) -> int | None:
    """Return the size of a file in bytes; None if it does not exist."""
    return path.stat().st_size if path.is_file() else None


def _shrink_rest(shards: "_Shards", done: list[str], workers: int) -> Iterable[Any]:
    """Shrink the shards that are not done; yield a line for the journal, or an error, as each one finishes."""
    rest = [number for number, name in enumerate(shards.names) if name not in done]
    workers = min(workers, len(rest))
    options = {"worker_init_fn": _remember_parent, "prefetch": 1, "in_order": False}
    return item_loader(shards, rest, workers, **options)


def _remember_parent(worker: int) -> None:
    """Store the process that started this worker, so that the worker can see when it is gone."""
    info = get_worker_info()
    assert info is not None
    info.dataset.parent = os.getppid()  # pyright: ignore[reportAttributeAccessIssue]


class _Shards(Dataset[Any]):
    """Data set that, indexed by the number of a shard, writes this shard and returns a line for the journal."""

    def __init__(self, index: ShardIndex, names: list[str], out: Path, size: int, quality: int) -> None:
        self.index, self.names, self.out, self.size, self.quality = index, names, out, size, quality
        self.starts = [0, *accumulate(index.counts())]  # number of each shard's first sample
        self.parent = 0  # process id of a worker's parent

    def __getitem__(self, number: int) -> Any:
        try:
            return self._shrink(number)
        except (OSError, DataError) as error:  # returned, because torch would add a traceback to the message
            return error

    def _shrink(self, number: int) -> dict[str, Any]:
        """Write one shard and return its line of the journal."""
        name = self.names[number]
        part = {"shard": name, "bytes": 0, "samples": 0, "shrunk": 0, "kept": 0, "undecodable": []}
        with atomic_write(self.out / name) as temporary:
            # GNU headers store any name; PAX headers need a kilobyte for each name that is not ASCII.
            with tarfile.open(temporary, "w", format=tarfile.GNU_FORMAT, encoding="utf-8") as tar:
                for i in range(self.starts[number], self.starts[number + 1]):
                    if self.parent and os.getppid() != self.parent:
                        raise SystemExit  # The command was killed, and its worker must not keep writing.
                    self._write(tar, self.index[i], part)
            part["bytes"] = temporary.stat().st_size
        return part

    def _write(self, tar: tarfile.TarFile, sample: Sample, part: dict[str, Any]) -> None:
        """Write a sample, and count it in `part`, the line of the journal."""
        part["samples"] += 1
        for extension, (offset, size) in sample.members.items():
            data = sample.source.read(offset, size)  # not `Sample.read`, which refuses very large members
            if extension == sample.image:
                data = self._shrink_image(data, sample.key, part)
            # Owner and time stay 0, so that the file is always the same.
            info = tarfile.TarInfo(f"{sample.key}.{extension}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))

    def _shrink_image(self, data: bytes, key: str, part: dict[str, Any]) -> bytes:
        """Shrink the image of a sample if it can be decoded, and count it in `part`."""
        try:
            small = shrink_image(data, self.size, self.quality)
        except ImageError as error:
            part["undecodable"].append([key, error.cause])
            return data
        part["kept" if small is data else "shrunk"] += 1
        return small
