"""Conversion of a family's config to an architecture and back, and the slots of heads in a family's format."""

import dataclasses
import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dualenc.formats.huggingface.families import FAMILIES
from dualenc.formats.huggingface.family import ACTIVATION_NAMES, Config, Family, Slot, activation_name
from dualenc.models.heads import HeadConfig
from dualenc.models.text_encoder import TextConfig
from dualenc.utils.errors import ModelError, first_failure

WIDTHS = ("vocab_size", "width", "layers", "heads", "mlp_width", "context_length")


def family_of(config: Any, where: str) -> tuple[Family, Config]:
    """Return the family of a `config.json` of Hugging Face, and the part of it that describes the text encoder.

    Args:
        config: the parsed JSON.
        where: path of the file, for errors.

    Raises:
        ModelError: If dualenc does not read the family.
    """
    kind = config.get("model_type") if isinstance(config, dict) else None
    for family in FAMILIES.values():
        if kind == family.name:
            return family, config
        if kind is not None and kind == family.nested:
            inside = config.get("text_config_dict") or {}
            return family, {**(config.get("text_config") or {}), **inside}
    raise ModelError(f"{where}: model_type {kind!r} must be one of {', '.join(FAMILIES)}")


def text_config(family: Family, config: Config, where: str) -> TextConfig:
    """Return the architecture of a family's config.

    Args:
        family: the family.
        config: the parsed JSON.
        where: path of the file, for errors.

    Raises:
        ModelError: If a value cannot be computed or is not valid; the message names the key.
    """
    for key, known in family.refused.items():
        if (value := config.get(key, known[0])) not in known and value is not None:
            raise ModelError(f"{where}: {key} {json.dumps(value)} cannot be computed by dualenc")
    fields: Config = {**family.always, "pool": family.pool, "family": family.name}
    for name, (key, usual) in family.keys.items():
        value = config.get(key)
        value = usual if value is None else value
        if name == "activation":
            if value not in ACTIVATION_NAMES:
                raise ModelError(f"{where}: {key} {json.dumps(value)} cannot be computed by dualenc")
            value = ACTIVATION_NAMES[value]
        elif not isinstance(value, (int, float) if name == "norm_eps" else int) or isinstance(value, bool):
            raise ModelError(f"{where}: {key} must be a number, found {json.dumps(value)}")
        fields[name] = value
    if fields["types"] == 0 and "types" in family.keys:
        raise ModelError(f"{where}: type_vocab_size must be positive, found 0")
    if family.dropouts and isinstance(dropout := config.get(family.dropouts[0], 0.1), int | float):
        fields["dropout"] = float(dropout)
    # Checked before anything is built: thousands of layers take minutes even without memory.
    sizes = {family.keys[name][0]: fields[name] for name in WIDTHS}
    checks = [(size >= 1, f"{key} must be at least 1, found {size}") for key, size in sizes.items()]
    checks.append(
        (fields["layers"] <= 1000, f"{family.keys['layers'][0]} must be at most 1000, found {fields['layers']}")
    )
    if reason := first_failure(checks):
        raise ModelError(f"{where}: {reason}")
    try:
        if family.read is not None:
            family.read(config, fields)
        return TextConfig(**fields)
    except (ValueError, TypeError, ArithmeticError, AttributeError) as error:
        raise ModelError(f"{where}: {error}") from None


def family_config(family: Family, text: TextConfig) -> Config:
    """Return a family's `config.json` for an architecture that it expresses."""
    config: Config = {"model_type": family.name}
    for name, (key, usual) in family.keys.items():
        value = getattr(text, name)
        if name == "mlp_width":
            value = text.mlp_width or 4 * text.width
        config[key] = activation_name(text.activation, usual) if name == "activation" else value
    config |= dict.fromkeys(family.dropouts, text.dropout)
    config |= {key: known[0] for key, known in family.refused.items()}
    if "hidden_dropout_prob" in family.dropouts:
        config["attention_probs_dropout_prob"] = 0.0  # The encoder has no dropout there.
    if family.write is not None:
        family.write(text, config)
    return config


def fitted(text: TextConfig, names: Sequence[str]) -> tuple[Family, TextConfig] | None:
    """Return the first family that expresses an architecture, and the architecture as the family writes it.

    The architecture's own family is tried first. Where a family has segments and the encoder has none, the result has
    one segment, whose embedding `with_segment` adds as zeros.

    Args:
        text: the architecture.
        names: names of families.

    Returns:
        None if no family expresses it.
    """
    ordered = dict.fromkeys(name for name in (text.family, *names) if name in names)
    return next(((family, one) for family, one, differing in _attempts(text, ordered) if not differing), None)


def unlike(text: TextConfig, names: Collection[str]) -> str:
    """Return the shortest list of the fields by which an architecture differs from one of some families."""
    reasons = [f"{', '.join(differing)} ({family.name})" for family, _, differing in _attempts(text, names)]
    return min(reasons, key=len)


def _attempts(text: TextConfig, names: Collection[str | None]) -> Iterator[tuple[Family, TextConfig, list[str]]]:
    """Yield families, the architecture as each would have it, and the fields that it cannot have."""
    for family in (FAMILIES[str(name)] for name in names):
        one = dataclasses.replace(text, types=1) if not text.types and "types" in family.keys else text
        yield family, dataclasses.replace(one, family=family.name), _differing(family, one)


def with_segment(state: Mapping[str, Tensor], text: TextConfig) -> dict[str, Tensor]:
    """Return the state of a dual encoder whose text tower has the architecture that `fitted` returned."""
    name = "text.embeddings.segment_embeddings.weight"
    missing = text.types and name not in state
    width = text.embed_width or text.width
    return {**state, **({name: torch.zeros(text.types, width)} if missing else {})}


def expresses(family: Family, text: TextConfig) -> bool:
    """Return whether a family expresses exactly this architecture: written and read again it is the same."""
    return not _differing(family, text)


def _differing(family: Family, text: TextConfig) -> list[str]:
    """Return the fields of an architecture that change when it is written and read again, or why it cannot be."""
    try:
        again = text_config(family, family_config(family, text), "")
    except (ModelError, ArithmeticError, TypeError) as error:
        return [str(error).removeprefix(": ")]
    return differences(_plain(text), _plain(again))


def differences(text: TextConfig, other: TextConfig) -> list[str]:
    """Return the fields of an architecture, with their values, in which it differs from another one."""
    fields = {field.name: getattr(text, field.name) for field in dataclasses.fields(text)}
    return [f"{name} {value!r}" for name, value in fields.items() if value != getattr(other, name)]


def _plain(text: TextConfig) -> TextConfig:
    """Return an architecture in one normal form, without the fields that are not part of it."""
    plain = dataclasses.replace(
        text,
        mlp_width=text.mlp_width or 4 * text.width,
        embed_norm=text.normalizes_embeddings,
        global_every=min(text.global_every, text.layers),
        groups=None if text.groups == text.layers and text.group_size == 1 else text.groups,
        dropout=0.0,
        pool="cls",
        family=None,
        pad_id=0,
    )
    if plain.window is None or plain.global_every == 1:  # Every layer sees the whole text.
        plain = dataclasses.replace(plain, window=None, global_every=1, local_theta=None)
    else:
        local = plain.theta if plain.local_theta is None else plain.local_theta
        plain = dataclasses.replace(plain, window=(plain.window or 0) // 2 * 2, local_theta=local)
    return plain if plain.positions == "rotary" else dataclasses.replace(plain, theta=10000.0, local_theta=None)


def slots_of(family: Family, text: TextConfig, heads: Mapping[str, HeadConfig]) -> dict[str, Slot]:
    """Return the slots of the heads that have the family's own names, by head.

    If two heads would have the same names, the first has them; poolers and heads that are called as a pretraining head
    come after the others. Reading and writing use the same order.

    Args:
        family: the family.
        text: architecture of the encoder.
        heads: configurations of the heads by name.
    """

    def order(name: str) -> int:
        return max((slot.precedence(name) for slot in family.slots if slot.kind == heads[name].kind), default=0)

    slots: dict[str, Slot] = {}
    taken: set[str] = set()
    for name in sorted(heads, key=order):
        for slot in family.slots:
            if slot.misfit(name, text, heads[name]) is not None:
                continue
            # Two heads can share neither tensors nor keys of the config, such as the names of labels.
            parts = {*slot.modules.values(), *(names[0] for names in slot.parameters.values())}
            parts |= slot.settings(text, heads[name]).keys()
            if not parts & taken:
                slots[name] = slot
                taken |= parts
                break
    return slots


def no_place(family: Family, text: TextConfig, name: str, head: HeadConfig) -> str:
    """Return why a family's format does not hold a head that `slots_of` leaves out.

    Args:
        family: the family.
        text: architecture of the encoder.
        name: name of the head.
        head: configuration of the head.
    """
    misfits = [slot.misfit(name, text, head) for slot in family.slots if slot.kind == head.kind]
    if None in misfits:
        return "another head has its place"
    return str(misfits[-1]) if misfits else f"kind {head.kind!r}"


def choose_family(text: TextConfig, heads: Mapping[str, HeadConfig]) -> Family | None:
    """Return the family that a model is written as.

    It is the model's own family, or else of those that express the architecture the one with slots for most heads.

    Args:
        text: architecture of the encoder.
        heads: configurations of the heads by name.

    Returns:
        None if no family expresses the architecture.
    """
    own = FAMILIES.get(text.family or "")
    if own is not None and expresses(own, text):
        return own
    able = [family for family in FAMILIES.values() if expresses(family, text)]
    return max(able, key=lambda family: len(slots_of(family, text, heads)), default=None)
