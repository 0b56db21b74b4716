"""Tensors of dual encoders under others' names: one table of rules, read in both directions."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dualenc.formats.state_dict import Names, account


class Rule(NamedTuple):
    """What is joined of ours is what is joined of theirs, along the first dimension.

    Dimensions of length 1 at the front are as each side has them.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    transposed: bool = False


def of_names(names: Names, prefix: str) -> list[Rule]:
    """Rules of what `family_names` says of a text encoder.

    Args:
        names: ours, as in the state of a `TextModel`, to theirs.
        prefix: in place of ours' "encoder.".
    """
    return [
        Rule((prefix + ours.removeprefix("encoder."),), tuple(one[0] for one in parts)) for ours, parts in names.items()
    ]


def read_rules(
    weights: Mapping[str, Tensor],
    rules: Iterable[Rule],
    shapes: Mapping[str, Sequence[int]],
    where: str,
    ignored: Collection[str] = (),
) -> dict[str, Tensor]:
    """The state of a model from tensors of other names, in single precision; every tensor of both is accounted for.

    Args:
        weights: theirs.
        rules: for all of ours.
        shapes: of ours.
        where: the file, for errors.
        ignored: patterns of theirs that stand for nothing.

    Raises:
        ModelError: tensors are missing, unknown, or of another shape; names the first ten.
    """
    state: dict[str, Tensor] = {}
    wrong: list[str] = []
    used: set[str] = set()
    for rule in rules:
        used.update(rule.theirs)
        if missing := [name for name in rule.theirs if name not in weights]:
            wrong += [f"{name} is missing" for name in missing]
            continue
        pieces = [weights[name] for name in rule.theirs]
        pieces = [piece.T for piece in pieces] if rule.transposed else pieces
        first, rows = shapes[rule.ours[0]], [shapes[name][0] for name in rule.ours]
        length, *rest = (sum(rows), *first[1:]) if len(rule.ours) > 1 else _core(first)
        share = (length // len(pieces), *rest)
        bad = [i for i, piece in enumerate(pieces) if _core(piece.shape) != _core(share)]
        if bad:
            found, fit = tuple(weights[rule.theirs[bad[0]]].shape), share[::-1] if rule.transposed else share
            wrong.append(f"{rule.theirs[bad[0]]} has shape {found} and not {fit}")
            continue
        whole = torch.cat([piece.reshape(share) for piece in pieces])
        for name, part in zip(rule.ours, whole.split(rows) if len(rule.ours) > 1 else [whole], strict=True):
            state[name] = part.reshape(tuple(shapes[name])).to(torch.float32, copy=True).contiguous()
    account(weights, used, wrong, where, ignored)
    return state


def write_rules(state: Mapping[str, Tensor], rules: Iterable[Rule], flat: Collection[str] = ()) -> dict[str, Tensor]:
    """A state under the names of others.

    Args:
        state: ours.
        rules: for all of it.
        flat: of theirs, those without the dimensions of length 1 that ours have at the front.
    """
    out: dict[str, Tensor] = {}
    for rule in rules:
        parts = [state[name].detach().cpu() for name in rule.ours]
        whole = torch.cat(parts) if len(parts) > 1 else parts[0]
        for name, piece in zip(rule.theirs, whole.chunk(len(rule.theirs)), strict=True):
            piece = piece.reshape([length for length in piece.shape if length != 1]) if name in flat else piece
            piece = piece.T if rule.transposed else piece
            out[name] = piece.clone(memory_format=torch.contiguous_format)
    return out


def _core(shape: Sequence[int]) -> tuple[int, ...]:
    """A shape without the ones at its front."""
    start = next((i for i, length in enumerate(shape) if length != 1), len(shape))
    return tuple(shape[start:]) or (1,)
