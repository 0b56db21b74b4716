"""Fuzzing of the reading code with mutated shards and images: `python tools/fuzz.py --seconds 600`.

A mutated tar must give the samples that Python's own `tarfile` finds in it, byte for byte, or an error that names the
shard. A mutated image must decode as it does with Pillow, or give a cause. Any other exception is a failure, and so are
a crash, a hang and unbounded memory. `--seed` and `--case` reproduce a failure.
"""

import argparse
import io
import multiprocessing
import os
import resource
import signal
import tarfile
import tempfile
import time
import traceback
import warnings
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from dualenc.data import ImageError, ShardIndex, decode_image
from dualenc.data.image_notes import find_notes
from dualenc.data.images import to_tensor
from dualenc.utils.errors import DataError

CASES = 200  # Cases that one process runs.
warnings.simplefilter("ignore")  # Pillow warns about broken images.
SECONDS = 10  # Time limit of a case.
# Bytes that a process may use beyond those at its start; the largest image allowed takes 400 MB, three times over.
MEMORY = 3 << 30

Image.MAX_IMAGE_PIXELS = None


def picture(rng: np.random.Generator) -> tuple[str, bytes]:
    """Generate a small valid image of a random format and mode.

    Returns:
        The extension and the bytes of the file.
    """
    height, width = (int(n) for n in rng.integers(1, 70, 2))
    coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)).resize((width, height))
    kind = str(rng.choice(["jpg", "png", "webp"]))
    mode = str(
        rng.choice(
            {"jpg": ["RGB", "L", "CMYK"], "png": ["RGB", "L", "P", "RGBA", "LA", "1", "I;16"]}.get(
                kind, ["RGB", "RGBA"]
            )
        )
    )
    if mode == "I;16":
        image = Image.fromarray(rng.integers(0, 65536, (height, width), dtype=np.uint16))
    else:
        image = coarse.convert(mode)
    options: dict[str, Any] = {}
    if kind == "jpg":
        options = {"quality": int(rng.integers(20, 100)), "progressive": bool(rng.integers(2))}
    if kind == "webp":
        options = {"lossless": bool(rng.integers(2))}
    if rng.random() < 0.3:
        exif = Image.Exif()
        exif[0x0112] = int(rng.integers(1, 9))
        options["exif"] = exif
    if rng.random() < 0.3:
        options["icc_profile"] = rng.bytes(int(rng.integers(1, 200)))
    file = io.BytesIO()
    image.save(file, {"jpg": "JPEG"}.get(kind, kind.upper()), **options)
    return kind, file.getvalue()


def shard(rng: np.random.Generator) -> bytes:
    """Generate a small valid shard of a random tar format; the members of a sample may be apart."""
    members = []
    for i in range(int(rng.integers(1, 6))):
        key = str(rng.choice([f"{i:04d}", f"folder/{i}", f"{'long' * 40}{i}", f"é猫{i}", f"../{i}"]))
        kind, data = picture(rng)
        members += [(f"{key}.{kind}", data), (f"{key}.txt", b"a cat " * int(rng.integers(1, 4)))]
        if rng.random() < 0.5:
            members.append((f"{key}.json", b'{"caption": "a dog"}'))
    if rng.random() < 0.3:
        members = [members[i] for i in rng.permutation(len(members))]
    file = io.BytesIO()
    tar_format = [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT][int(rng.integers(2))]
    with tarfile.open(fileobj=file, mode="w", format=tar_format) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file.getvalue()


def mutate(rng: np.random.Generator, data: bytes, headers: bool = False) -> bytes:
    """Apply one to five random changes: flipped bits, other bytes, deletions, repeats.

    Args:
        rng: generator of the changes.
        data: bytes of the file.
        headers: True to change fields of tar headers too, with or without a correct checksum.
    """
    out = bytearray(data)
    for _ in range(int(rng.choice([1, 1, 1, 2, 5]))):
        if not out:
            break
        at = int(rng.integers(len(out)))
        length = int(rng.choice([1, 4, 16, 512, 3000]))
        match int(rng.integers(8 if headers else 6)):
            case 0:
                out[at] ^= 1 << int(rng.integers(8))
            case 1:
                out[at : at + length] = rng.bytes(len(out[at : at + length]))
            case 2:
                del out[at:]
            case 3:
                del out[at : at + length]
            case 4:
                out[at:at] = out[at : at + length]
            case 5:
                out[at : at + 4] = bytes([[0, 0xFF, 0x7F, 0x80][int(rng.integers(4))]]) * 4
            case _:
                at = at // 512 * 512  # The start of a block, which is often a header.
                field = [(0, 100), (100, 8), (124, 12), (148, 8), (156, 1), (257, 8), (345, 155)][int(rng.integers(7))]
                position = at + field[0] + int(rng.integers(field[1]))
                if position < len(out) and at + 512 <= len(out):
                    out[position] = int(rng.choice([0, 32, 48, 55, 57, 83, 103, 120, 128, 255, int(rng.integers(256))]))
                    if rng.random() < 0.7:  # With a wrong checksum, nothing but the checksum would be tested.
                        out[at + 148 : at + 156] = b" " * 8
                        out[at + 148 : at + 156] = b"%06o\0 " % sum(out[at : at + 512])
    return bytes(out)


def by_tarfile(data: bytes) -> dict[str, dict[str, bytes]]:
    """Return the samples that `tarfile` finds before its first error: key -> extension -> bytes."""
    found: dict[str, dict[str, bytes]] = {}
    with (
        suppress(tarfile.ReadError),
        tarfile.open(fileobj=io.BytesIO(data), mode="r:", errors="surrogateescape") as tar,
    ):
        for info in tar:
            block, name = data[info.offset_data - 512 : info.offset_data], info.name
            # GNU tar stores times in this field, which tarfile takes for a folder and puts before the name.
            if block[257:265] == b"ustar  \0" and block[345]:
                prefix = block[345:500].partition(b"\0")[0].decode("utf-8", "surrogateescape")
                name = name.removeprefix(f"{prefix}/")
            folder, slash, base = name.rpartition("/")
            stem, dot, extension = base.partition(".")
            top, inside, _ = name.partition("/")
            if not info.isreg() or not stem or not dot or (top.startswith("__") and top.endswith("__") and inside):
                continue
            file = tar.extractfile(info)
            assert file is not None
            found.setdefault(folder + slash + stem, {})[extension.lower()] = file.read()
    return found


def try_tar(rng: np.random.Generator, folder: Path) -> tuple[str, bytes]:
    """Compare the samples of a mutated shard with those of `tarfile`; return the outcome and the shard."""
    data = mutate(rng, shard(rng), headers=True)
    path = folder / f"{rng.integers(1 << 60)}.tar"
    path.write_bytes(data)
    try:
        index = ShardIndex.build(path, rescan=True)
        ours = {sample.key: {name: sample.read(name) for name in sample.members} for sample in index}
    except DataError as error:
        if path.name not in str(error):
            raise AssertionError(f"the error does not name the shard: {error}") from error
        return "named: " + str(error).partition(path.name)[2].strip(" :")[:28], data
    finally:
        path.unlink()
        (folder / "dualenc.index").unlink(missing_ok=True)
    theirs = by_tarfile(data)
    if ours == theirs:
        return "the samples that tarfile finds", data
    # tarfile stops at a header with a broken field even if no sample needs the field (mode, owner).
    if all(members.items() <= ours.get(key, {}).items() for key, members in theirs.items()):
        return "the samples that tarfile finds, and those after the header at which it stops", data
    raise AssertionError(f"samples differ from tarfile's: {sorted(ours)} against {sorted(theirs)}")


def try_picture(rng: np.random.Generator, _: Path) -> tuple[str, bytes]:
    """Compare the pixels of a mutated image with those of Pillow; return the outcome and the file."""
    data = mutate(rng, picture(rng)[1])
    try:
        ours = decode_image(data)
    except ImageError as error:
        return f"named: {error.cause}", data
    if ours.dtype.is_floating_point or ours.dim() != 3 or ours.shape[0] != 3:
        raise AssertionError(f"decoded to {ours.dtype} {tuple(ours.shape)}, expected integers (3, H, W)")
    try:
        with Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP")) as image:
            theirs = to_tensor(image)
    except Exception as error:
        if find_notes(data)[0]:  # Pillow checks notes too.
            return "decoded without a note that Pillow may have refused", data
        raise AssertionError(f"Pillow cannot decode a file that dualenc decodes: {error}") from error
    if ours.shape != theirs.shape or float((ours.float() - theirs.float()).abs().mean()) > 1:
        raise AssertionError("the pixels differ from Pillow's")
    return "the same pixels as Pillow's", data


def run(seed: int, start: int, folder: str, results: "multiprocessing.Queue[tuple[int, str, str]]") -> None:
    """Run `CASES` cases in this process and report each to the parent before and after, so that a crash has a number.

    Args:
        seed: seed of all cases.
        start: number of the first case.
        folder: folder for shards and for the cache.
        results: queue of the case's number, the outcome and the traceback of a failure.
    """
    os.environ["DUALENC_CACHE"] = folder
    began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    for case in range(start, start + CASES):
        results.put((case, "begun", ""))
        rng = np.random.default_rng((seed, case))
        signal.alarm(SECONDS)
        try:
            outcome, _ = [try_tar, try_picture][case % 2](rng, Path(folder))
        except Exception:
            outcome = "FAILED"
            results.put((case, outcome, traceback.format_exc()))
            continue
        finally:
            signal.alarm(0)
        if (used := resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - began) > MEMORY:
            results.put((case, "FAILED", f"{used / 1e9:.1f} GB"))
            return
        results.put((case, outcome, ""))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=int.from_bytes(os.urandom(4), "little"))
    parser.add_argument("--case", type=int, help="run only the case with this number, in this process")
    arguments = parser.parse_args()
    if arguments.case is not None:
        with tempfile.TemporaryDirectory() as folder:
            rng = np.random.default_rng((arguments.seed, arguments.case))
            print([try_tar, try_picture][arguments.case % 2](rng, Path(folder))[0])
        return
    print(f"seed {arguments.seed}", flush=True)
    context = multiprocessing.get_context("fork")
    outcomes, failures, start, deadline = Counter(), [], 0, time.monotonic() + arguments.seconds
    while time.monotonic() < deadline:
        with tempfile.TemporaryDirectory() as folder:
            results = context.Queue()
            process = context.Process(target=run, args=(arguments.seed, start, folder, results))
            process.start()
            begun = None
            while process.is_alive() or not results.empty():
                try:
                    case, outcome, message = results.get(timeout=0.2)
                except Exception:  # Nothing arrived within the timeout.
                    continue
                if outcome == "begun":
                    begun = case
                    continue
                begun = None
                outcomes[("tar", "picture")[case % 2], outcome] += 1
                if outcome == "FAILED":
                    failures.append((case, message))
            process.join()
            if begun is not None or process.exitcode:
                outcomes["process", f"exit status {process.exitcode}"] += 1
                failures.append(
                    (begun, f"the process ended with status {process.exitcode}; a hang gives -{signal.SIGALRM.value}")
                )
        start += CASES
    print(f"{sum(outcomes.values()):,} mutants in {arguments.seconds:.0f} s")
    for (kind, outcome), count in sorted(outcomes.items(), key=lambda item: (item[0][0], -item[1])):
        print(f"{count:10,}  {kind}: {outcome}")
    for case, message in failures[:20]:
        print(f"\nFAILED --seed {arguments.seed} --case {case}\n{message}")
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main()
