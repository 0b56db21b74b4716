"""Files of embeddings and image features: one safetensors file for each shard, written once and read by row."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dualenc.data.shards.sample import Sample, image_members
from dualenc.data.shards.shard import IMAGE_EXTENSIONS, Shard, hash_name
from dualenc.utils.errors import BadSample, DataError

FORMAT = 1
ABOUT = "embed.json"
BAD = "bad.jsonl"
KEY = "dualenc"  # key of a file's metadata, a JSON
TIMEOUT = 300.0  # seconds to wait for the next batch of images


class Features:
    """Image features that `dualenc embed --features` has written.

    Args:
        folder: the folder OUT of that command.
        image: the members that hold the images in this run; see `dualenc.data.shards.sample.image_members`.

    Attributes:
        made_by: fingerprint of the image tower and the preprocessing that made the features.
        model: name of the model that made the features, for display.

    Raises:
        DataError: If the folder does not hold image features, or those of other images.
    """

    def __init__(self, folder: str | os.PathLike[str], image: str | None = None) -> None:
        self.folder = Path(folder)
        about = read_about(self.folder)
        if about is None or about["what"] != "features":
            raise DataError(
                f"{self.folder} holds no image features: make them with dualenc embed MODEL SHARDS OUT --features"
            )
        images = image_members(image)
        if about["members"] != list(images):
            raise DataError(
                f"{self.folder} has features of the images .{', .'.join(about['members'])}, and data.image names "
                f".{', .'.join(images)}: set it to {';'.join(about['members'])}, or make other features by "
                "dualenc embed --image"
            )
        self._piece = hash_name("piece", images)
        self.made_by: str = about["made_by"]
        self.model: str = about["model"]
        self._inputs: dict[str, str] = about["inputs"]
        self._names = {digest: name for name, digest in self._inputs.items()}
        self._files: dict[str, EmbeddingFile] = {}  # by the URL of the shard

    def check(self, shards: Iterable[Shard]) -> None:
        """Check that there are features of all of these shards.

        Raises:
            DataError: If there are no features of a shard.
        """
        for shard in shards:
            name = self._name(shard)
            if name is None:
                raise DataError(
                    f"{self.folder} has no features of shard {shard}, or the shard has changed since: "
                    "make them with dualenc embed"
                )
            if not (self.folder / file_name(name)).is_file():
                raise _missing(self.folder / file_name(name))

    def read(self, shard: Shard, number: int, sample: Sample) -> tuple[Tensor, int]:
        """Read the features (D,) of a sample's image, and the hash of the image.

        Args:
            shard: the shard.
            number: number of the sample in the shard.
            sample: the sample, for the error.

        Raises:
            BadSample: If there are no features, because the image could not be used.
        """
        file = self._file(shard)
        if number in file.bad:
            raise BadSample(sample, *file.bad[number])
        return torch.from_numpy(file.rows("features")[number]), int(file.image_hashes[number])

    def _name(self, shard: Shard) -> str | None:
        """Return the name under which the features of a shard were made.

        If several shards have the same headers, the one of the same name is preferred.
        """
        name, digest = shard.facts["name"], shard.facts["digest"]
        return name if self._inputs.get(name) == digest else self._names.get(digest)

    def _file(self, shard: Shard) -> "EmbeddingFile":
        if shard.url not in self._files:
            digest, name = shard.facts["digest"], self._name(shard)
            assert name is not None  # `check` has ensured it.
            file = EmbeddingFile(self.folder / file_name(name))
            same = file.about["digest"] == digest and file.about["made_by"] == self.made_by
            if not same or len(file.image_hashes) != len(shard):
                raise damaged(file.path)
            # Shards with the same headers may hold other images, which the hashes show if the index has them.
            known = shard.arrays.get(self._piece, file.image_hashes)
            if ((file.image_hashes != known) & (file.image_hashes != 0)).any():
                raise DataError(f"{file.path} is of other images than {shard}: run dualenc embed into a new folder")
            self._files[shard.url] = file
        return self._files[shard.url]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}  # Each process maps the files by itself.


class EmbeddingFile:
    """The file of one shard, mapped into memory, so that only the rows in use are read.

    Args:
        path: path of the file.

    Attributes:
        about: metadata of the file.
        image_hashes: (n,) hashes of the images; see "piece" in `dualenc.data.shards.shard.DTYPES`.
        names: names of the tensors.
        bad: cause and detail of each bad sample, by its number in the shard.

    Raises:
        DataError: If the file is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = safe_open(path, "numpy")
            self.about = json.loads(self._file.metadata()[KEY])
            self.image_hashes = self._file.get_tensor("piece").view(np.uint64)  # (n,)
            self.names = self._file.keys()
            del self.about["keys"]  # A run has the files of all shards open, and does not need the keys.
            self.bad = {number: (cause, detail) for number, cause, detail in self.about["bad"]}
        except FileNotFoundError:
            raise _missing(path) from None
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise damaged(path) from None

    def rows(self, name: str) -> Any:
        """Return a tensor on disk, whose item `[i]` reads one row."""
        return self._file.get_slice(name)


def damaged(path: Path) -> DataError:
    """Return the error of a file that is damaged or belongs elsewhere."""
    return DataError(
        f"{path} is damaged or not of this folder: remove it, and run the same dualenc embed again to make it"
    )


def _missing(path: Path) -> DataError:
    return DataError(f"{path} is missing: run the same dualenc embed again to resume")


def file_name(shard: str) -> str:
    """Return the name of a shard's file."""
    return f"{shard.removesuffix('.tar')}.safetensors"


def read_about(folder: Path) -> dict[str, Any] | None:
    """Read `embed.json` of a folder; None if there is no such file.

    Raises:
        DataError: If the file is damaged, or of a newer format.
    """
    path = folder / ABOUT
    try:
        about = json.loads(path.read_text("utf-8"))
        if about["format"] > FORMAT:
            raise DataError(f"{path} has format {about['format']}, this dualenc reads up to {FORMAT}: upgrade dualenc")
        for name in dict(about["inputs"]):
            if os.path.basename(name) != name:
                raise ValueError
        _ = about["what"], about["made_by"], about["model"]
        return {"members": list(IMAGE_EXTENSIONS), **about}  # Older versions read these only, and did not say so.
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} was not written by dualenc embed: name another folder") from None
