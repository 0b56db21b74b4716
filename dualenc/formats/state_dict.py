"""Tensors of a checkpoint: files of several kinds behind one mapping, and the names that a family gives them."""

import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dualenc.formats.huggingface.families import Family, Slot
from dualenc.models.text_encoder import TextConfig
from dualenc.utils.errors import ModelError
from dualenc.utils.files import read_json

SAFE = ("model.safetensors", "model.safetensors.index.json")
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
# Buffers that were once saved, and say nothing.
STALE = (r".*\bposition_ids", r".*\binv_freq", r".*\bembeddings\.token_type_ids")
Names = dict[str, list[tuple[str, ...]]]


class Weights(Mapping[str, Tensor]):
    """The tensors of a checkpoint's files, read when asked for.

    LayerNorm's "gamma" and "beta", as TensorFlow had them, are "weight" and "bias" here.

    Args:
        folder: with model.safetensors or pytorch_model.bin, whole or in several files with an index; or the file.

    Raises:
        ModelError: there is none of them, or one cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._stack = ExitStack()
        self._where: dict[str, tuple[Any, str]] = {}  # name -> (a file's reader or dictionary, its name there)
        found = [folder / name for name in (*SAFE, *PICKLED) if (folder / name).is_file()]
        found = [folder] if folder.is_file() else found
        if not found:
            raise ModelError(f"{folder} holds no weights: neither {SAFE[0]} nor {PICKLED[0]}")
        self.path = found[0]
        for path in self._files(found[0]):
            tensors = self._open(path)
            for name in tensors.keys():  # noqa: SIM118 (safetensors' reader is no mapping)
                self._where[re.sub(r"\bLayerNorm\.(gamma|beta)$", _modern, name)] = tensors, name

    def _files(self, path: Path) -> list[Path]:
        if path.suffix != ".json":
            return [path]
        index = read_json(path)
        files = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(files, dict) or not all(isinstance(f, str) and Path(f).name == f for f in files.values()):
            raise ModelError(f"{path} has no weight_map of tensors to files beside it")
        paths = [path.parent / name for name in sorted(set(files.values()))]
        if missing := [file.name for file in paths if not file.is_file()]:
            raise ModelError(f"{path} names {missing[0]}, which is not there")
        return paths

    def _open(self, path: Path) -> Any:
        try:
            if path.suffix == ".safetensors":
                return self._stack.enter_context(safe_open(path, "pt"))
            with warnings.catch_warnings(action="ignore"):  # torch warns of TorchScript before it refuses it
                try:
                    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                except RuntimeError:  # files older than torch 1.6 cannot be mapped
                    state = torch.load(path, map_location="cpu", weights_only=True)
        except (SafetensorError, OSError, RuntimeError, UnpicklingError, EOFError, ValueError) as error:
            if "TorchScript" in str(error):
                raise ModelError(
                    f"{path} is a TorchScript archive, which holds code: save the tensors alone, by "
                    "torch.save(torch.jit.load(FILE, 'cpu').state_dict(), OUT)"
                ) from None
            raise ModelError(f"{path} cannot be read ({(str(error).splitlines() or [''])[0]})") from None
        if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):  # beside an optimizer's
            state = state["state_dict"]
        if not isinstance(state, dict) or not all(isinstance(x, Tensor) for x in state.values()):
            raise ModelError(f"{path} holds more than tensors by name: save it as safetensors with what wrote it")
        return state

    def __getitem__(self, name: str) -> Tensor:
        tensors, there = self._where[name]
        try:
            return tensors[there] if isinstance(tensors, dict) else tensors.get_tensor(there)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise ModelError(f"{self.path}: {there} cannot be read ({str(error).splitlines()[0]})") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def rows(self, name: str) -> int:
        """Length of a tensor's first dimension, without reading it."""
        tensors, there = self._where[name]
        shape = tensors[there].shape if isinstance(tensors, dict) else tensors.get_slice(there).get_shape()
        return shape[0] if shape else 0

    def close(self) -> None:
        """Lets go of the files."""
        self._stack.close()
        self._where.clear()


def _modern(match: re.Match[str]) -> str:
    return "LayerNorm.weight" if match[1] == "gamma" else "LayerNorm.bias"


def prefixes(family: Family, names: Collection[str], path: Path) -> tuple[str, str]:
    """What the tensors of the encoder, and of the heads, begin with in a checkpoint.

    Raises:
        ModelError: there is no word embedding, or more than one.
    """
    words = f"{family.words}.weight"
    found = [name.removesuffix(words) for name in names if name == words or name.endswith(f".{words}")]
    if len(found) != 1:
        raise ModelError(f"{path} has {len(found) or 'no'} tensors {words}: it is no checkpoint of {family.name}")
    prefix = found[0]
    return prefix, prefix.removesuffix(family.prefix) if prefix.endswith(family.prefix) else ""


def family_names(
    family: Family, text: TextConfig, places: Mapping[str, Slot], ours: Collection[str], prefix: str, outer: str = ""
) -> Names:
    """What each tensor of a `TextModel` is called by a family.

    Args:
        family: the family.
        text: the architecture.
        places: the heads that have a slot of the family's; the tensors of others keep their own names.
        ours: names in the model's state.
        prefix: of the encoder's tensors.
        outer: of the heads' tensors.

    Returns:
        For each of ours the tensors that are joined to it, each by all names that it may have.
    """

    def theirs(module: str) -> str:
        return prefix + module[1:] if module.startswith(".") else outer + module

    names: Names = {}
    for name in ours:
        part, _, rest = name.partition(".")
        module, _, parameter = rest.rpartition(".")
        if part == "heads":
            head, _, inside = rest.partition(".")
            slot = places.get(head)
            module, _, parameter = inside.rpartition(".")
            if slot is None:
                names[name] = [(name,)]
            elif inside in slot.parameters:
                names[name] = [tuple(map(theirs, slot.parameters[inside]))]
            else:
                names[name] = [(f"{theirs(slot.modules[module])}.{parameter}",)]
        elif module.startswith("blocks."):
            _, number, inside = module.split(".", 2)
            group, member = divmod(int(number), text.group_size)
            block = family.block.format(i=number, group=group, member=member)
            there = family.inside[inside]
            there = [there] if isinstance(there, str) else there
            names[name] = [(f"{prefix}{block}.{one}.{parameter}",) for one in there]
        else:
            names[name] = [(f"{prefix}{family.outside[module]}.{parameter}",)]
    return names


def read_state(
    weights: Weights, names: Names, shapes: Mapping[str, Sequence[int]], ignored: Sequence[str] = ()
) -> dict[str, Tensor]:
    """The state of a model from a checkpoint, in single precision; every tensor of both is accounted for.

    Args:
        weights: the checkpoint's.
        names: see `family_names`.
        shapes: of the model's tensors.
        ignored: patterns of tensors that the model has no use for.

    Raises:
        ModelError: a tensor is missing, unknown, or of another shape; or there are two of one, and they differ.
    """
    state: dict[str, Tensor] = {}
    wrong: list[str] = []
    used: set[str] = set()
    for name, parts in names.items():
        pieces = []
        for alternatives in parts:
            there = [one for one in alternatives if one in weights]
            used.update(there)
            if not there:
                wrong.append(f"{alternatives[0]} is missing")
                continue
            piece = weights[there[0]]
            shape = (shapes[name][0] // len(parts), *shapes[name][1:])
            if tuple(piece.shape) != shape:
                wrong.append(f"{there[0]} has shape {tuple(piece.shape)} and not {shape}")
                continue
            wrong += [f"{one} differs from {there[0]}" for one in there[1:] if not torch.equal(weights[one], piece)]
            pieces.append(piece)
        if len(pieces) == len(parts):
            state[name] = (torch.cat(pieces) if len(pieces) > 1 else pieces[0]).to(torch.float32, copy=True)
    account(weights, used, wrong, str(weights.path), ignored)
    return state


def account(
    weights: Iterable[str], used: Collection[str], wrong: Sequence[str], where: str, ignored: Collection[str] = ()
) -> None:
    """Closes the account of a checkpoint's tensors.

    Args:
        weights: their names.
        used: those that a model took.
        wrong: what is amiss so far.
        where: the file, for the error.
        ignored: patterns of names that stand for nothing.

    Raises:
        ModelError: something is amiss, or a tensor is left; names the first ten.
    """
    known = [re.compile(pattern) for pattern in (*STALE, *ignored)]
    left = [f"{n} is unknown" for n in weights if n not in used and not any(p.fullmatch(n) for p in known)]
    if wrong := [*wrong, *left]:
        more = f", and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        raise ModelError(f"{where} does not fit its config: {'; '.join(wrong[:10])}{more}")


def split_state(state: Mapping[str, Tensor], names: Names, copies: Collection[str] = ()) -> dict[str, Tensor]:
    """A model's state under a family's names.

    Args:
        state: the model's.
        names: see `family_names`; the first of each is taken.
        copies: of ours, those that are written under all of their names.
    """
    out: dict[str, Tensor] = {}
    for name, x in state.items():
        parts = names[name]
        for alternatives, piece in zip(parts, x.detach().cpu().chunk(len(parts)), strict=True):
            for there in alternatives if name in copies else alternatives[:1]:
                out[there] = piece.clone(memory_format=torch.contiguous_format)  # safetensors wants no shared memory
    return out
