"""Embeddings and image features of whole shards: one safetensors file a shard, written once, read row by row."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dualenc.data.shards.index import Sample
from dualenc.data.shards.shard import Shard
from dualenc.utils.errors import BadSample, DataError

FORMAT = 1
ABOUT = "embed.json"
BAD = "bad.jsonl"
KEY = "dualenc"  # of the metadata, a JSON
TIMEOUT = 300.0  # seconds that the next pictures may take


# Reading


class Features:
    """Image features that `dualenc embed --features` has written.

    Args:
        folder: OUT of that command.

    Attributes:
        made_by: fingerprint of the image tower and the preprocessing that made them.
        model: what made them, for people.

    Raises:
        DataError: it is no such folder.
    """

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.folder = Path(folder)
        about = read_about(self.folder)
        if about is None or about["what"] != "features":
            raise DataError(f"{self.folder} holds no image features: dualenc embed MODEL SHARDS OUT --features")
        self.made_by: str = about["made_by"]
        self.model: str = about["model"]
        self._inputs: dict[str, str] = about["inputs"]
        self._names = {digest: name for name, digest in self._inputs.items()}
        self._files: dict[str, EmbeddingFile] = {}  # by the shard that they were looked up for

    def check(self, shards: Iterable[Shard]) -> None:
        """Looks whether there are features of all of these shards.

        Raises:
            DataError: there are none of one.
        """
        for shard in shards:
            name = self._name(shard)
            if name is None:
                raise DataError(
                    f"{self.folder} has no features of shard {shard}, or it has changed since: dualenc embed makes them"
                )
            if not (self.folder / file_name(name)).is_file():
                raise DataError(f"{self.folder / file_name(name)} is missing: the same dualenc embed again goes on")

    def row(self, shard: Shard, place: int, sample: Sample) -> tuple[Tensor, int]:
        """Features (D,) of a sample's image, and the hash of it.

        Args:
            shard: which.
            place: number of the sample in the shard.
            sample: the same one, for the error.

        Raises:
            BadSample: there are none, since the image could not be used.
        """
        file = self._file(shard)
        if place in file.bad:
            raise BadSample(sample, *file.bad[place])
        return torch.from_numpy(file.rows("features")[place]), int(file.piece[place])

    def _name(self, shard: Shard) -> str | None:
        """What the shard was called; where several have its headers, the one that is still called so."""
        name, digest = shard.facts["name"], shard.facts["digest"]
        return name if self._inputs.get(name) == digest else self._names.get(digest)

    def _file(self, shard: Shard) -> "EmbeddingFile":
        if shard.url not in self._files:
            digest, name = shard.facts["digest"], self._name(shard)
            assert name is not None  # see `check`
            file = EmbeddingFile(self.folder / file_name(name))
            if file.about["digest"] != digest or file.about["made_by"] != self.made_by or len(file.piece) != len(shard):
                raise damaged(file.path)
            # Where the index has them: shards of other images may have the same headers.
            known = shard.arrays.get("piece", file.piece)
            if ((file.piece != known) & (file.piece != 0)).any():
                raise DataError(f"{file.path} is of other images than {shard}: dualenc embed into a new folder")
            self._files[shard.url] = file
        return self._files[shard.url]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}  # each process maps its own


class EmbeddingFile:
    """The file of one shard, mapped into memory: what is not looked at is not read.

    Args:
        path: of the file.

    Attributes:
        about: what it says of itself.
        piece: (n,) hashes of the images; see `dualenc.data.shards.shard.DTYPES`.
        names: of its tensors.
        bad: number in the shard of each bad sample, with cause and detail.

    Raises:
        DataError: it is missing or damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = safe_open(path, "numpy")
            self.about = json.loads(self._file.metadata()[KEY])
            self.piece = self._file.get_tensor("piece").view(np.uint64)  # (n,)
            self.names = self._file.keys()
            del self.about["keys"]  # a run has all of its shards' files open
            self.bad = {place: (cause, detail) for place, cause, detail in self.about["bad"]}
        except FileNotFoundError:
            raise DataError(f"{path} is missing: the same dualenc embed again goes on") from None
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise damaged(path) from None

    def rows(self, name: str) -> Any:
        """A tensor of which `[i]` reads a row."""
        return self._file.get_slice(name)


def damaged(path: Path) -> DataError:
    """The error of a file that is not what it should be."""
    return DataError(f"{path} is damaged or not of this folder: remove it, and the same dualenc embed makes it anew")


def file_name(shard: str) -> str:
    """The name of a shard's file."""
    return f"{shard.removesuffix('.tar')}.safetensors"


def read_about(folder: Path) -> dict[str, Any] | None:
    """What OUT/embed.json says, None where there is none.

    Raises:
        DataError: it is damaged, or of another format.
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
        return about
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path} is not of dualenc embed: name another folder") from None


# Writing
