"""Tensors of a checkpoint: one mapping over files of several kinds, and rules of names that are read both ways."""

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dualenc.formats.format_1 import name_in_format_1
from dualenc.formats.huggingface.family import Family, Slot
from dualenc.formats.pickled import read_pickled
from dualenc.models.text_encoder import TextConfig
from dualenc.utils.errors import ModelError, warn_once
from dualenc.utils.files import read_json

SAFE = ("model.safetensors", "model.safetensors.index.json")
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
# Parts of names that torch.compile, FSDP, DDP and Lightning add. Those of the first line mean nothing else anywhere in
# a name; the others are taken off where every name begins with them.
COMPILED = re.compile(r"\b(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
PREFIXES = ("module.", "model.")
COUNTER = "n_averaged"  # of torch's averaged models, next to their weights
# Buffers that earlier versions of transformers saved; their values follow from the config.
STALE = (r".*\bposition_ids", r".*\binv_freq", r".*\bembeddings\.token_type_ids")


class Weights(Mapping[str, Tensor]):
    """Mapping of the tensors in a checkpoint's files; a tensor is read on access.

    TensorFlow's names "gamma" and "beta" of LayerNorm's parameters become "weight" and "bias". What programs of
    training put around the weights is taken off and said in one line: the entries of a pickled file that hold them,
    see `read_pickled`, and what all names begin with.

    Args:
        folder: a folder with model.safetensors or pytorch_model.bin, in one file or in several with an index; or the
            path of such a file.

    Attributes:
        path: the file, or the index of several.
        taken_off: entries and parts of names that were taken off.

    Raises:
        ModelError: If the folder has no such file, or one cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self._stack = ExitStack()
        self._where: dict[str, tuple[Any, str]] = {}  # name -> (reader or dictionary of a file, name in the file)
        found = [folder / name for name in (*SAFE, *PICKLED) if (folder / name).is_file()]
        found = [folder] if folder.is_file() else found
        if not found:
            raise ModelError(f"{folder} holds no weights: neither {SAFE[0]} nor {PICKLED[0]}")
        self.path = found[0]
        self.taken_off: list[str] = []
        for path in self._files(found[0]):
            tensors = self._open(path)
            for name in tensors.keys():  # noqa: SIM118 (the reader of safetensors is not a mapping)
                self._where[re.sub(r"\bLayerNorm\.(gamma|beta)$", _current_name, name)] = tensors, name
        self._where = self._plain_names()
        if self.taken_off:
            warn_once(f"{self.path}: taken off around the weights: {', '.join(self.taken_off)}")

    def _plain_names(self) -> dict[str, tuple[Any, str]]:
        """Return the tensors by their names without what programs of training add."""
        found = {COMPILED.sub("", name): where for name, where in self._where.items()}
        if len(found) < len(self._where):  # two tensors would have one name
            return self._where
        self.taken_off += sorted({part for name in self._where for part in COMPILED.findall(name)})
        while prefix := next((x for x in PREFIXES if len(found) > 1 and all(map(_begins(x), found))), ""):
            found = {name.removeprefix(prefix): where for name, where in found.items() if name != COUNTER}
            self.taken_off.append(prefix)
        return found

    def _files(self, path: Path) -> list[Path]:
        if path.suffix != ".json":
            return [path]
        index = read_json(path)
        files = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(files, dict) or not all(isinstance(f, str) and Path(f).name == f for f in files.values()):
            raise ModelError(f"{path} has no weight_map from tensors to files of the same folder")
        paths = [path.parent / name for name in sorted(set(files.values()))]
        if missing := [file.name for file in paths if not file.is_file()]:
            raise ModelError(f"{path} names {missing[0]}, which is missing: download it too")
        return paths

    def _open(self, path: Path) -> Any:
        try:
            if path.suffix == ".safetensors":
                return self._stack.enter_context(safe_open(path, "pt"))
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{path} cannot be read ({(str(error).splitlines() or [''])[0]})") from None
        state, entries = read_pickled(path)
        self.taken_off += [entry for entry in entries if entry not in self.taken_off]
        return state

    def __getitem__(self, name: str) -> Tensor:
        tensors, stored = self._where[name]
        try:
            return tensors[stored] if isinstance(tensors, dict) else tensors.get_tensor(stored)
        except (SafetensorError, OSError, RuntimeError) as error:
            raise ModelError(f"{self.path}: {stored} cannot be read ({str(error).splitlines()[0]})") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def close(self) -> None:
        """Close the files."""
        self._stack.close()
        self._where.clear()


def _begins(prefix: str) -> Callable[[str], bool]:
    return lambda name: name.startswith(prefix) or name == COUNTER


@contextmanager
def plain_copy(path: Path, folder: Path | None = None, known: Collection[str] = ()) -> Iterator[Path]:
    """Give the path of weights that other libraries can read: a temporary copy, if something was taken off them.

    Args:
        path: the weights, see `Weights`.
        folder: folder that the other library reads the weights from; None if it reads the file alone.
        known: entries and parts of names that the other library takes off itself.

    Raises:
        ModelError: If the weights cannot be read.
    """
    with closing(Weights(path)) as weights, TemporaryDirectory(prefix="dualenc-weights-") as name:
        if set(weights.taken_off) <= set(known):
            yield folder or path
            return
        for file in folder.iterdir() if folder else ():
            if file.suffix not in (".safetensors", ".bin", ".pth") and not file.name.endswith(".index.json"):
                (Path(name) / file.name).symlink_to(file.resolve())
        copy = Path(name) / (SAFE[0] if folder else f"{path.stem}.safetensors")
        # safetensors refuses tensors that share memory.
        save_file({key: x.clone(memory_format=torch.contiguous_format) for key, x in weights.items()}, copy)
        yield Path(name) if folder else copy


def _current_name(match: re.Match[str]) -> str:
    return "LayerNorm.weight" if match[1] == "gamma" else "LayerNorm.bias"


def prefixes(family: Family, names: Collection[str], path: Path) -> tuple[str, str]:
    """Find the prefixes of the encoder's and the heads' tensors in a checkpoint.

    Args:
        family: the family of the text encoder.
        names: names of the checkpoint's tensors.
        path: file of the checkpoint, for errors.

    Returns:
        The prefix of the encoder's tensors and that of the heads' tensors.

    Raises:
        ModelError: If the checkpoint does not have exactly one tensor of token embeddings.
    """
    embeddings = f"{family.token_embeddings}.weight"
    found = [name.removesuffix(embeddings) for name in names if name == embeddings or name.endswith(f".{embeddings}")]
    if len(found) != 1:
        raise ModelError(
            f"{path} has {len(found) or 'no'} tensors {embeddings}, expected one: it is not a checkpoint of "
            f"{family.name}"
        )
    prefix = found[0]
    return prefix, prefix.removesuffix(family.prefix) if prefix.endswith(family.prefix) else ""


class Rule(NamedTuple):
    """Rule that a group of our tensors equals a group of another library's; used to read and to write.

    Each group is concatenated along the first dimension. Leading dimensions of length 1 may differ.

    Attributes:
        ours: names of our tensors.
        theirs: names of their tensors, under which they are written.
        transposed: True if their tensors are the transposes of ours.
        flat: True if their tensors lack the leading dimensions of length 1 that ours have.
        aliases: for each of `theirs`, further names under which it may be read.
        copied: True if their tensors are written under the aliases too.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    transposed: bool = False
    flat: bool = False
    aliases: tuple[tuple[str, ...], ...] = ()
    copied: bool = False


def own_rule(ours: str, theirs: str) -> Rule:
    """Return the rule of a tensor in a file that dualenc wrote, possibly in format 1."""
    old = name_in_format_1(theirs)
    return Rule((ours,), (theirs,), aliases=((old,),) if old != theirs else ())


def family_rules(
    family: Family, text: TextConfig, slots: Mapping[str, Slot], ours: Collection[str], prefix: str, outer: str = ""
) -> dict[str, Rule]:
    """Return the rules between the tensors of a `TextModel` and those of a family's checkpoint.

    Args:
        family: the family.
        text: the architecture.
        slots: slots of the family by name of the head; the tensors of other heads keep their names.
        ours: names of the tensors in the model's state.
        prefix: prefix of the encoder's tensors in the checkpoint.
        outer: prefix of the heads' tensors in the checkpoint.

    Returns:
        A rule for each of our names.
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
            modules = family.inside[inside]
            modules = [modules] if isinstance(modules, str) else modules
            rules[name] = Rule((name,), tuple(f"{prefix}{block}.{module}.{parameter}" for module in modules))
        else:
            rules[name] = Rule((name,), (f"{prefix}{family.outside[module]}.{parameter}",))
    return rules


def of_tower(rules: Mapping[str, Rule]) -> list[Rule]:
    """Return the rules of a `TextModel`'s encoder for the text tower of a `DualEncoder`."""
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
        weights: tensors of the checkpoint.
        rules: rules that cover all tensors of our model.
        shapes: shapes of our tensors.
        where: file of the checkpoint, for errors.
        ignored: patterns of the names in the checkpoint that are skipped.

    Raises:
        ModelError: If a tensor is missing, unknown or of another shape (leading dimensions of length 1 aside), or
            differs from its copy under another name; the message lists the first ten.
    """
    state: dict[str, Tensor] = {}
    wrong: list[str] = []
    used: set[str] = set()
    for rule in rules:
        tensors, names = _their_tensors(weights, rule, used, wrong)
        if len(tensors) < len(rule.theirs):
            continue
        first, rows = shapes[rule.ours[0]], [shapes[name][0] for name in rule.ours]
        length, *rest = (sum(rows), *first[1:]) if len(rule.ours) > 1 else _core(first)
        share = (length // len(tensors), *rest)  # shape of each of theirs
        bad = [i for i, tensor in enumerate(tensors) if _core(tensor.shape) != _core(share)]
        if bad:
            found, expected = tuple(weights[names[bad[0]]].shape), share[::-1] if rule.transposed else share
            wrong.append(f"{names[bad[0]]} has shape {found}, expected {expected}")
            continue
        shaped = [tensor.reshape(share) for tensor in tensors]
        whole = torch.cat(shaped) if len(shaped) > 1 else shaped[0]
        for name, part in zip(rule.ours, whole.split(rows) if len(rule.ours) > 1 else [whole], strict=True):
            state[name] = part.reshape(tuple(shapes[name])).to(torch.float32, copy=True).contiguous()
    _raise_if_wrong(weights, used, wrong, where, ignored)
    return state


def _their_tensors(
    weights: Mapping[str, Tensor], rule: Rule, used: set[str], wrong: list[str]
) -> tuple[list[Tensor], list[str]]:
    """Return the tensors of a checkpoint that a rule names, and the names under which they were found."""
    tensors, names = [], []
    for i, first in enumerate(rule.theirs):
        found = [name for name in (first, *(rule.aliases[i] if rule.aliases else ())) if name in weights]
        used.update(found)
        if not found:
            wrong.append(f"{first} is missing")
            continue
        tensor = weights[found[0]]
        wrong += [f"{name} differs from {found[0]}" for name in found[1:] if not torch.equal(weights[name], tensor)]
        tensors.append(tensor.T if rule.transposed else tensor)
        names.append(found[0])
    return tensors, names


def _raise_if_wrong(
    weights: Iterable[str], used: Collection[str], wrong: Sequence[str], where: str, ignored: Collection[str]
) -> None:
    """Raise a `ModelError` if there are faults, or tensors that neither a rule nor a pattern accounts for."""
    known = [re.compile(pattern) for pattern in (*STALE, *ignored)]
    left = [f"{n} is unknown" for n in weights if n not in used and not any(p.fullmatch(n) for p in known)]
    if count := len(wrong) + len(left):
        shown = [*wrong[: max(5, 10 - len(left))], *left[: max(5, 10 - len(wrong))]]  # names of both sides tell most
        more = f", and {count - len(shown)} more" if count > len(shown) else ""
        raise ModelError(f"{where} does not match its config: {'; '.join(shown)}{more}")


def write_state(state: Mapping[str, Tensor], rules: Iterable[Rule]) -> dict[str, Tensor]:
    """Return a state under another library's names.

    Args:
        state: state of our model.
        rules: rules that cover all of the state.
    """
    out: dict[str, Tensor] = {}
    for rule in rules:
        parts = [state[name].detach().cpu() for name in rule.ours]
        whole = torch.cat(parts) if len(parts) > 1 else parts[0]
        for i, (name, tensor) in enumerate(zip(rule.theirs, whole.chunk(len(rule.theirs)), strict=True)):
            tensor = tensor.reshape([length for length in tensor.shape if length != 1]) if rule.flat else tensor
            tensor = tensor.T if rule.transposed else tensor
            for written in (name, *(rule.aliases[i] if rule.copied and rule.aliases else ())):
                # safetensors refuses tensors that share memory.
                out[written] = tensor.clone(memory_format=torch.contiguous_format)
    return out


def _core(shape: Sequence[int]) -> tuple[int, ...]:
    """Return a shape without its leading dimensions of length 1."""
    start = next((i for i, length in enumerate(shape) if length != 1), len(shape))
    return tuple(shape[start:]) or (1,)
