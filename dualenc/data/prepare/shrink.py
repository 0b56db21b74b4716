"""The same shards with smaller images: fewer bytes to keep, to read and to decode.

A shard is written beside its place and renamed when it is whole, then a journal gets a line for it. What it becomes
depends on its content and the options alone, so a run that was stopped ends with the same files.
"""

import io
import json
import os
import tarfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
from PIL import Image
from torch.utils.data import Dataset, get_worker_info

from dualenc.data.images import ImageError, decode_image, resize
from dualenc.data.prepare.resumable import JOURNAL, check_same, other_inputs, read_lines
from dualenc.data.shards.index import Sample, ShardIndex
from dualenc.data.workers import each
from dualenc.utils.errors import DataError
from dualenc.utils.files import append_lines, atomic_write, write_json, write_text
from dualenc.utils.text import plural

FORMAT = 1


@dataclass(frozen=True)
class Shrunk:
    """What `shrink_shards` wrote."""

    out: str
    size: int
    shards: int
    samples: int
    shrunk: int  # images that are smaller now
    kept: int  # images that were small enough
    undecodable: list[tuple[str, str, str]]  # shard, key, cause; their bytes are kept
    bytes_before: int  # of the shards
    bytes_after: int
    finished_before: bool = False

    def lines(self) -> list[str]:
        """For the screen, with what to do next."""
        text = [f"{self.out} was finished before; remove it to make it anew"] if self.finished_before else []
        text.append(
            f"{self.samples:,} samples in {plural(self.shards, 'shard')}: {self.shrunk:,} images made "
            f"smaller, {self.kept:,} kept, their shorter side is at most {self.size} pixels"
        )
        text.append(
            f"{self.bytes_before / 1e6:,.1f} MB became {self.bytes_after / 1e6:,.1f} MB, "
            f"{self.bytes_after / self.bytes_before:.1%} of it"
        )
        if self.undecodable:
            some = ", ".join(f"{shard} {key!r} {cause}" for shard, key, cause in self.undecodable[:3])
            text.append(
                f"{len(self.undecodable):,} images cannot be made smaller and are kept as they are: {some}"
                f"{', ...' if len(self.undecodable) > 3 else ''}; all are named in {Path(self.out) / 'shrink.json'}"
            )
        text.append(f"next: dualenc fit --config run.yaml --data.train {self.out}")
        return text


def shrink_image(data: bytes, size: int, quality: int) -> bytes:
    """A JPEG, PNG or WebP whose shorter side is at most `size` pixels, in the format it had.

    The picture is what `decode_image` makes of the data, and is resized as `Preprocess` does: at its size and without
    loss in the format, training sees the same pixels as from the original. What is no pixel is left behind.

    JPEGs get their color at full resolution (4:4:4): for the same bytes that is closer to the picture than 4:2:0 at a
    higher quality, above all where colors meet.

    Args:
        data: the file; returned as it is when it is small enough.
        size: the most pixels of the shorter side.
        quality: of JPEG and of lossy WebP, 1 to 100.

    Raises:
        ImageError: the data cannot be decoded.
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
        how = {"lossless": True} if _lossless(data) else {"quality": quality}
        small.save(file, "WEBP", **how)
    else:
        small.save(file, "PNG")
    return file.getvalue()


def _lossless(data: bytes) -> bool:
    """Whether a WebP holds its pixels without loss: by its chunks, of which EXIF and profiles may come first."""
    place = 12
    while place + 8 <= len(data):
        kind, length = data[place : place + 4], int.from_bytes(data[place + 4 : place + 8], "little")
        if kind in (b"VP8L", b"VP8 "):
            return kind == b"VP8L"
        place += 24 if kind == b"ANMF" else 8 + length + length % 2  # a frame's own chunk stands inside of it
    return False


def shrink_shards(
    shards: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out: str | os.PathLike[str],
    *,
    size: int = 256,
    quality: int = 90,
    workers: int = 2,
    track: Callable[[Iterable[Any]], Iterable[Any]] = iter,
) -> Shrunk:
    """Rewrites shards with smaller images; keys, captions, all other members and every order are kept.

    Of a sample only its image is touched, the member that training reads: a `seg.png`, or a `.png` beside a `.jpg`, is
    copied. So are images that are small enough or cannot be decoded.

    The same call again goes on where a stopped one was, and the shards are the same as without the stop.

    Args:
        shards: paths, globs, brace patterns, folders or URLs.
        out: folder for a shard of the same name for each, and `shrink.json`.
        size: the most pixels of the shorter side.
        quality: of JPEG and of lossy WebP, 1 to 100.
        workers: processes, each with a shard of its own; 0 for none.
        track: wraps the loop over the shards, for a progress bar.

    Raises:
        DataError: a shard cannot be read, two have one name, or OUT holds something else or was begun otherwise.
    """
    if size < 1 or not 1 <= quality <= 100 or workers < 0:
        raise DataError(f"size {size} must be 1 or more, quality {quality} 1 to 100, workers {workers} 0 or more")
    out = Path(out)
    plan: dict[str, Any] = {"format": FORMAT, "size": size, "quality": quality}
    begun = _begun(out, plan)
    index = ShardIndex.build(shards, workers=workers)  # a broken shard is named before anything is written
    names = _names(index, out)
    inputs = {name: [shard.facts["size"], shard.facts["digest"]] for name, shard in zip(names, index.parts)}
    plan["inputs"] = dict(sorted(inputs.items()))
    about, journal = out / "shrink.json", out / JOURNAL
    if begun:
        check_same(out, begun, {"inputs": inputs}, {"inputs": other_inputs(begun["inputs"], inputs)})
    else:
        out.mkdir(parents=True, exist_ok=True)
        write_json(about, plan, indent=1)
    lines = [*begun.get("shards", []), *read_lines(journal)]
    parts = {line["shard"]: line for line in lines if _bytes(out / line["shard"]) == line["bytes"]}
    finished_before = len(parts) == len(names) and not journal.exists()
    if not finished_before:
        write_text(journal, "".join(json.dumps(line) + "\n" for line in parts.values()))
        for beside in out.glob("*.part"):
            beside.unlink()
        for part in track(_results(_Shards(index, names, out, size, quality), list(parts), workers)):
            if isinstance(part, Exception):
                raise part
            append_lines(journal, [json.dumps(part)], sync=True)
            parts[part["shard"]] = part
        write_json(about, {**plan, "shards": [parts[name] for name in sorted(names)]}, indent=1)
        journal.unlink()
    return _shrunk(out, size, inputs, parts, finished_before)


def _shrunk(
    out: Path, size: int, inputs: dict[str, list[Any]], parts: dict[str, dict[str, Any]], finished_before: bool
) -> Shrunk:
    """Sum up the shards' lines of the journal."""
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
        finished_before=finished_before,
    )


def _begun(out: Path, options: dict[str, Any]) -> dict[str, Any]:
    """What OUT/shrink.json says, or nothing for a new folder."""
    about = out / "shrink.json"
    if not about.exists():
        if out.exists() and not out.is_dir():
            raise DataError(f"{out} is no folder")
        if out.exists() and any(path.suffix != ".part" for path in out.iterdir()):
            raise DataError(f"{out} holds files that are not of shrink: name a new folder")
        return {}
    try:
        begun = json.loads(about.read_text("utf-8"))
        begun["inputs"] = dict(begun["inputs"])
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{about} is not of shrink: name a new folder") from None
    check_same(out, begun, options, {})
    return begun


def _names(index: ShardIndex, out: Path) -> list[str]:
    """The shards' base names: those that they will have in OUT."""
    found: dict[str, str] = {}
    for shard in index.parts:
        name, path = shard.facts["name"], str(shard)
        if name in found:
            raise DataError(f"{found[name]} and {path} would both become {out / name}: shrink them into two folders")
        if os.path.realpath(os.path.dirname(path)) == os.path.realpath(out):
            raise DataError(f"{out} is the folder of {path}, which would be overwritten: name another one")
        found[name] = path
    return list(found)


def _bytes(path: Path) -> int | None:
    return path.stat().st_size if path.is_file() else None


def _results(shards: "_Shards", done: list[str], workers: int) -> Iterable[Any]:
    """A line for the journal, or an error, from each further shard as soon as there is one."""
    rest = [number for number, name in enumerate(shards.names) if name not in done]
    workers = min(workers, len(rest))
    options = {"worker_init_fn": _know_parent, "prefetch_factor": 1 if workers else None, "in_order": False}
    return each(shards, rest, workers, **options)


def _know_parent(worker: int) -> None:
    info = get_worker_info()
    assert info is not None
    info.dataset.parent = os.getppid()  # pyright: ignore[reportAttributeAccessIssue]


class _Shards(Dataset[Any]):
    def __init__(self, index: ShardIndex, names: list[str], out: Path, size: int, quality: int) -> None:
        self.index, self.names, self.out, self.size, self.quality = index, names, out, size, quality
        self.starts = [0, *accumulate(index.counts())]  # of each shard among the samples
        self.parent = 0  # of a worker

    def __getitem__(self, number: int) -> Any:
        try:
            return self._shrink(number)
        except (OSError, DataError) as error:  # raised here, it would come back with a traceback for its message
            return error

    def _shrink(self, number: int) -> dict[str, Any]:
        name = self.names[number]
        part = {"shard": name, "bytes": 0, "samples": 0, "shrunk": 0, "kept": 0, "undecodable": []}
        with atomic_write(self.out / name) as beside:
            # GNU's headers take any name as it is; PAX spends a kilobyte on each that is not ASCII
            with tarfile.open(beside, "w", format=tarfile.GNU_FORMAT, encoding="utf-8") as tar:
                for i in range(self.starts[number], self.starts[number + 1]):
                    if self.parent and os.getppid() != self.parent:
                        raise SystemExit  # the command was killed
                    self._write(tar, self.index[i], part)
            part["bytes"] = beside.stat().st_size
        return part

    def _write(self, tar: tarfile.TarFile, sample: Sample, part: dict[str, Any]) -> None:
        part["samples"] += 1
        for extension, (offset, size) in sample.members.items():
            data = sample.source.read(offset, size)  # `Sample.read` refuses members larger than training would read
            if extension == sample.image:
                data = self._image(data, sample.key, part)
            info = tarfile.TarInfo(f"{sample.key}.{extension}")  # its owner and time are 0
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))

    def _image(self, data: bytes, key: str, part: dict[str, Any]) -> bytes:
        try:
            small = shrink_image(data, self.size, self.quality)
        except ImageError as error:
            part["undecodable"].append([key, error.cause])
            return data
        part["kept" if small is data else "shrunk"] += 1
        return small
