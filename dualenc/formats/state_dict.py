"""Tensors of a checkpoint: files of several kinds behind one mapping, and one table of names, read both ways."""

import re
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dualenc.formats.format_1 import name_in_format_1
from dualenc.formats.huggingface.family import Family, Slot
from dualenc.models.text_encoder import TextConfig
from dualenc.utils.errors import ModelError
from dualenc.utils.files import read_json

SAFE = ("model.safetensors", "model.safetensors.index.json")
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
# Buffers that were once saved, and say nothing.
STALE = (r".*\bposition_ids", r".*\binv_freq", r".*\bembeddings\.token_type_ids")


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
    words = f"{family.token_embeddings}.weight"
    found = [name.removesuffix(words) for name in names if name == words or name.endswith(f".{words}")]
    if len(found) != 1:
        raise ModelError(f"{path} has {len(found) or 'no'} tensors {words}: it is no checkpoint of {family.name}")
    prefix = found[0]
    return prefix, prefix.removesuffix(family.prefix) if prefix.endswith(family.prefix) else ""


class Rule(NamedTuple):
    """What is joined of our tensors is what is joined of theirs, along the first dimension; read in both directions.

    Dimensions of length 1 at the front are as each side has them.

    Attributes:
        ours: names of ours.
        theirs: names of theirs, those that are written.
        transposed: whether theirs are the transposes.
        flat: whether theirs lack the dimensions of length 1 that ours have at the front.
        aliases: further names under which each of theirs may be read.
        copied: whether theirs are written under the aliases too.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    transposed: bool = False
    flat: bool = False
    aliases: tuple[tuple[str, ...], ...] = ()
    copied: bool = False


def own_rule(ours: str, theirs: str) -> Rule:
    """Return the rule of a tensor in a file of our own, which may be of format 1."""
    old = name_in_format_1(theirs)
    return Rule((ours,), (theirs,), aliases=((old,),) if old != theirs else ())


def family_rules(
    family: Family, text: TextConfig, slots: Mapping[str, Slot], ours: Collection[str], prefix: str, outer: str = ""
) -> dict[str, Rule]:
    """Return what each tensor of a `TextModel` is called by a family.

    Args:
        family: the family.
        text: the architecture.
        slots: the heads that have a slot of the family's; the tensors of others keep their own names.
        ours: names in the model's state.
        prefix: of the encoder's tensors.
        outer: of the heads' tensors.

    Returns:
        A rule for each of ours.
    """

    def theirs(module: str) -> str:
        return prefix + module[1:] if module.startswith(".") else outer + module

    rules: dict[str, Rule] = {}
    for name in ours:
        part, _, rest = name.partition(".")
        module, _, parameter = rest.rpartition(".")
        if part == "heads":
            head, _, inside = rest.partition(".")
            slot = slots.get(head)
            module, _, parameter = inside.rpartition(".")
            if slot is None:
                rules[name] = own_rule(name, name)
            elif inside in slot.parameters:
                first, *others = map(theirs, slot.parameters[inside])
                rules[name] = Rule((name,), (first,), aliases=(tuple(others),))
            else:
                rules[name] = Rule((name,), (f"{theirs(slot.modules[module])}.{parameter}",))
        elif module.startswith("blocks."):
            _, number, inside = module.split(".", 2)
            group, member = divmod(int(number), text.group_size)
            block = family.block.format(i=number, group=group, member=member)
            there = family.inside[inside]
            there = [there] if isinstance(there, str) else there
            rules[name] = Rule((name,), tuple(f"{prefix}{block}.{one}.{parameter}" for one in there))
        else:
            rules[name] = Rule((name,), (f"{prefix}{family.outside[module]}.{parameter}",))
    return rules


def of_tower(rules: Mapping[str, Rule]) -> list[Rule]:
    """Return the rules of a `TextModel`'s encoder with ours named as in the state of a `DualEncoder`."""
    return [rule._replace(ours=("text." + ours.removeprefix("encoder."),)) for ours, rule in rules.items()]


def read_state(
    weights: Mapping[str, Tensor],
    rules: Iterable[Rule],
    shapes: Mapping[str, Sequence[int]],
    where: str,
    ignored: Collection[str] = (),
) -> dict[str, Tensor]:
    """Return the state of a model from a checkpoint, in single precision; every tensor of both is accounted for.

    Args:
        weights: the checkpoint's.
        rules: for all of ours.
        shapes: of ours.
        where: the file, for errors.
        ignored: patterns of theirs that stand for nothing.

    Raises:
        ModelError: a tensor is missing, unknown, or of another shape, dimensions of length 1 at the front aside; or
            there are two of one, and they differ. Names the first ten.
    """
    state: dict[str, Tensor] = {}
    wrong: list[str] = []
    used: set[str] = set()
    for rule in rules:
        pieces, names = _pieces(weights, rule, used, wrong)
        if len(pieces) < len(rule.theirs):
            continue
        first, rows = shapes[rule.ours[0]], [shapes[name][0] for name in rule.ours]
        length, *rest = (sum(rows), *first[1:]) if len(rule.ours) > 1 else _core(first)
        share = (length // len(pieces), *rest)
        bad = [i for i, piece in enumerate(pieces) if _core(piece.shape) != _core(share)]
        if bad:
            found, fit = tuple(weights[names[bad[0]]].shape), share[::-1] if rule.transposed else share
            wrong.append(f"{names[bad[0]]} has shape {found} and not {fit}")
            continue
        shaped = [piece.reshape(share) for piece in pieces]
        whole = torch.cat(shaped) if len(shaped) > 1 else shaped[0]
        for name, part in zip(rule.ours, whole.split(rows) if len(rule.ours) > 1 else [whole], strict=True):
            state[name] = part.reshape(tuple(shapes[name])).to(torch.float32, copy=True).contiguous()
    _account(weights, used, wrong, where, ignored)
    return state


def _pieces(
    weights: Mapping[str, Tensor], rule: Rule, used: set[str], wrong: list[str]
) -> tuple[list[Tensor], list[str]]:
    """The tensors of a checkpoint that a rule names, and the names under which they are there."""
    pieces, names = [], []
    for i, first in enumerate(rule.theirs):
        there = [name for name in (first, *(rule.aliases[i] if rule.aliases else ())) if name in weights]
        used.update(there)
        if not there:
            wrong.append(f"{first} is missing")
            continue
        piece = weights[there[0]]
        wrong += [f"{name} differs from {there[0]}" for name in there[1:] if not torch.equal(weights[name], piece)]
        pieces.append(piece.T if rule.transposed else piece)
        names.append(there[0])
    return pieces, names


def _account(
    weights: Iterable[str], used: Collection[str], wrong: Sequence[str], where: str, ignored: Collection[str]
) -> None:
    known = [re.compile(pattern) for pattern in (*STALE, *ignored)]
    left = [f"{n} is unknown" for n in weights if n not in used and not any(p.fullmatch(n) for p in known)]
    if wrong := [*wrong, *left]:
        more = f", and {len(wrong) - 10} more" if len(wrong) > 10 else ""
        raise ModelError(f"{where} does not fit its config: {'; '.join(wrong[:10])}{more}")


def write_state(state: Mapping[str, Tensor], rules: Iterable[Rule]) -> dict[str, Tensor]:
    """Return a state under the names of others.

    Args:
        state: ours.
        rules: for all of it.
    """
    out: dict[str, Tensor] = {}
    for rule in rules:
        parts = [state[name].detach().cpu() for name in rule.ours]
        whole = torch.cat(parts) if len(parts) > 1 else parts[0]
        for i, (name, piece) in enumerate(zip(rule.theirs, whole.chunk(len(rule.theirs)), strict=True)):
            piece = piece.reshape([length for length in piece.shape if length != 1]) if rule.flat else piece
            piece = piece.T if rule.transposed else piece
            for there in (name, *(rule.aliases[i] if rule.copied and rule.aliases else ())):
                out[there] = piece.clone(memory_format=torch.contiguous_format)  # safetensors wants no shared memory
    return out


def _core(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape without the ones at its front."""
    start = next((i for i, length in enumerate(shape) if length != 1), len(shape))
    return tuple(shape[start:]) or (1,)
