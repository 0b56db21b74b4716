"""Readers of text checkpoints: Hugging Face's formats, sentence-transformers' folders, and dualenc's own."""

import dataclasses
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dualenc.data.text.tokenizer import Tokenizer
from dualenc.formats import format_1
from dualenc.formats.download import hub_folder
from dualenc.formats.huggingface.architecture import family_of, slots_of, text_config
from dualenc.formats.huggingface.family import Family, FoundHead, Slot
from dualenc.formats.huggingface.tokenizers import TOKENIZER_FILES, longest, padding_token, read_tokenizer
from dualenc.formats.model_folder import (
    CONFIG,
    MODULES,
    TEXT_MODEL,
    check_tokenizer,
    open_folder,
    other_content,
    spec_name,
)
from dualenc.formats.sentence_transformers import (
    ENCODER_SETTINGS,
    HEAD,
    SETTINGS,
    check_prompts,
    read_modules,
    read_sentence_folder,
)
from dualenc.formats.state_dict import PICKLED, SAFE, Rule, Weights, family_rules, own_rule, prefixes, read_state
from dualenc.models.dual_encoder import DualConfig
from dualenc.models.heads import HeadConfig, TextModel, make_head
from dualenc.models.text_encoder import TextConfig
from dualenc.utils.errors import ModelError, warn_once
from dualenc.utils.files import from_dict, read_json, take_format

CONFIGS = (TEXT_MODEL, CONFIG, MODULES, SETTINGS, *ENCODER_SETTINGS, "preprocess.json")
HEAD_CLASS = re.compile(r"(?:For[A-Z]\w*|LMHeadModel)$")  # end of the name of a class with a head


@dataclass(frozen=True)
class TextCheckpoint:
    """A text encoder on disk, of which only the configuration has been read.

    Attributes:
        spec: the spec that was opened.
        folder: folder of its files.
        config: architecture of the encoder.
        heads: configurations of its heads, by name.
        max_length: longest text in tokens that the checkpoint is meant for; at most `config.context_length`.
    """

    spec: str
    folder: Path
    config: TextConfig
    heads: dict[str, HeadConfig]
    max_length: int
    _state: Callable[[dict[str, tuple[int, ...]]], dict[str, Tensor]] = field(repr=False)
    _lowercase: bool = field(default=False, repr=False)
    _prompts: Mapping[str, str] = field(default_factory=dict, repr=False)

    def tokenizer(self) -> Tokenizer:
        """Return the tokenizer.

        Raises:
            ModelError: If there is no readable tokenizer, it has more entries than the encoder, or it splits a prompt
                differently than the library that wrote the prompt.
        """
        tokenizer = read_tokenizer(self.folder, self.config, self.max_length, self._lowercase)
        check_tokenizer(tokenizer, self.config, str(self.folder))
        check_prompts(self._prompts, tokenizer, str(self.folder))
        return tokenizer

    def model(self) -> TextModel:
        """Return encoder and heads with their weights, on the CPU, in single precision and eval mode.

        Raises:
            ModelError: If the tensors do not fit the configuration; the message names them.
        """
        with torch.device("meta"):  # saves the time of random initialization
            model = TextModel(self.config, self.heads)
        shapes = {name: tuple(x.shape) for name, x in model.state_dict().items()}
        model.load_state_dict(self._state(shapes), assign=True)
        return model.eval()


def open_text(spec: str | os.PathLike[str]) -> TextCheckpoint:
    """Read the configuration of a text checkpoint.

    Args:
        spec: a folder of Hugging Face's (BERT, RoBERTa, ALBERT, DistilBERT, ELECTRA, ModernBERT, or the text encoder of
            CLIP or SigLIP), of sentence-transformers, or of `TextPredictor.save`; a model directory, for its text
            tower; a run directory (its `best/`, or else `last/`); or `hf-hub:owner/name[@revision]`.

    Raises:
        ModelError: If the spec is something else, or dualenc cannot compute the checkpoint; the message names the file
            and the key.
    """
    name = spec_name(spec)
    found = open_folder(name, [*CONFIGS, *TOKENIZER_FILES, "model*.safetensors", SAFE[1]], "text checkpoint")
    kind = found.first("text_model", "sentence_transformers", "dual_encoder", "transformers")
    if name.startswith("hf-hub:"):
        _download_rest(name, found.path, kind == "sentence_transformers")
    match kind:
        case "text_model":
            return _own(name, found.path)
        case "sentence_transformers":
            return _sentence_transformer(name, found.path)
        case "dual_encoder":
            return _tower(name, found.path, found.config)
        case "transformers":
            return _foreign(name, found.path, found.config)
    other = other_content(found.path)
    why = f"it is {other}" if other else f"it has neither {CONFIG} nor {TEXT_MODEL}"
    raise ModelError(f"{found.path} cannot be read as a text checkpoint: {why}")


def _download_rest(spec: str, folder: Path, modules: bool) -> None:
    """Download the files that the first ones name, of the same commit; pickled weights only where there are no others.

    Args:
        spec: `hf-hub:owner/name[@revision]`.
        folder: what has been downloaded.
        modules: whether it is a folder of sentence-transformers, whose modules have folders of their own.
    """
    pinned, places = f"{spec.partition('@')[0]}@{folder.name}", [folder]
    if modules:
        found = read_modules(folder)
        names = (CONFIG, *ENCODER_SETTINGS, *TOKENIZER_FILES, "model*.safetensors", SAFE[1])
        inner = [inside.relative_to(folder).as_posix() for _, inside in found if inside != folder]
        hub_folder(pinned, [f"{place}/{name}" for place in inner for name in names])
        places = [inside for kind, inside in found if kind in ("Transformer", "Dense")]
    bare = [place.relative_to(folder) for place in places if not any((place / file).is_file() for file in SAFE)]
    if bare:
        hub_folder(pinned, [(place / name).as_posix() for place in bare for name in ("pytorch_model*.bin", PICKLED[1])])


def _own(spec: str, folder: Path) -> TextCheckpoint:
    """Open a folder of `TextPredictor.save`."""
    path = folder / TEXT_MODEL
    fields = read_json(path)
    written = take_format(fields, path)
    if set(fields) != {"text", "heads"} or not isinstance(fields["heads"], dict):
        raise ModelError(f"{path} must have the keys format, text and heads, found {', '.join(fields)}")
    text: TextConfig = from_dict(TextConfig, fields["text"], f"{path}: text")
    about = fields["heads"]
    if written == 1:
        about = {name: format_1.head_fields(head) for name, head in about.items()}
    heads: dict[str, HeadConfig] = {}
    for name, head in about.items():
        heads[name] = from_dict(HeadConfig, head, f"{path}: heads.{name}")
        try:
            make_head(heads[name])
        except ValueError as error:
            raise ModelError(f"{path}: heads.{name}: {error}") from None

    def state(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        config = folder / "config.json"  # exists if the tensors have a family's names
        family = family_of(read_json(config), str(config))[0] if config.is_file() else None
        rules = own_rules(family, text, heads, shapes)
        return _read(folder, rules, shapes, () if family is None else family.ignored)

    return TextCheckpoint(spec, folder, text, heads, longest(folder, text.context_length), state)


def own_rules(
    family: Family | None, text: TextConfig, heads: Mapping[str, HeadConfig], ours: Mapping[str, Any]
) -> list[Rule]:
    """Return the names under which `TextPredictor.save` writes the tensors of a model.

    Args:
        family: family whose names are used; None for the model's own names.
        text: architecture of the encoder.
        heads: configurations of the heads by name.
        ours: tensors of the model by name.
    """
    if family is None:
        return [own_rule(name, name) for name in ours]
    slots = slots_of(family, text, heads)
    # Hugging Face writes the encoder's prefix only where there is a head. Encoders of CLIP and SigLIP always had it
    # before transformers 5, which reads both.
    prefixed = any(slot.architecture for slot in slots.values()) or family.nested is not None
    rules = family_rules(family, text, slots, ours, family.prefix if prefixed else "")
    copied = {f"heads.{name}.{part}" for name, slot in slots.items() for part in slot.copied(heads[name])}
    return [rule._replace(copied=name in copied) for name, rule in rules.items()]


def _read(
    folder: Path,
    rules: Iterable[Rule],
    shapes: Mapping[str, tuple[int, ...]],
    ignored: tuple[str, ...] = (),
) -> dict[str, Tensor]:
    weights = Weights(folder)
    try:
        return read_state(weights, rules, shapes, str(weights.path), ignored)
    finally:
        weights.close()


def _tower(spec: str, folder: Path, config: Any) -> TextCheckpoint:
    """Open the text tower of a model directory."""
    path = folder / "config.json"
    take_format(config, path)
    text = from_dict(DualConfig, config, str(path)).text

    def state(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        rules = [own_rule(name, f"text.{name.removeprefix('encoder.')}") for name in shapes]
        return _read(folder, rules, shapes, (r"(?!text\.).*",))

    return TextCheckpoint(spec, folder, text, {}, longest(folder, text.context_length), state)


def _sentence_transformer(spec: str, folder: Path) -> TextCheckpoint:
    """Open a folder of sentence-transformers: an encoder, its pooling, and the layers and prompts of its vectors."""
    about = read_sentence_folder(folder)
    found = _foreign(spec, about.encoder, read_json(about.encoder / CONFIG))
    about.check_width(found.config.width)
    text, heads = dataclasses.replace(found.config, pool=about.pool), found.heads
    if about.vectors is not None:
        heads = {**heads, HEAD: HeadConfig("embedding", problem="negatives", embedding=about.vectors)}

    def state(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        dense = {name: shape for name, shape in shapes.items() if name.startswith(f"heads.{HEAD}.")}
        return found._state({name: x for name, x in shapes.items() if name not in dense}) | about.read_dense(dense)

    length = found.max_length if about.max_length is None else min(about.max_length, text.context_length)
    prompts = {} if about.vectors is None else about.vectors.prompts
    return TextCheckpoint(spec, about.encoder, text, heads, length, state, about.lowercase, prompts)


def _foreign(spec: str, folder: Path, config: Any) -> TextCheckpoint:
    """Open a folder of Hugging Face's; heads are found by their tensors."""
    path = folder / "config.json"
    family, inside = family_of(config, str(path))
    text = text_config(family, inside, str(path))
    if text.pad_to is not None and (pad_id := padding_token(folder)) is not None:
        text = dataclasses.replace(text, pad_id=pad_id)
    weights = Weights(folder)
    try:
        prefix, outer = prefixes(family, weights.keys(), weights.path)
        held = {name.removeprefix(outer) for name in weights if name.startswith(outer)}
        slots, unknown = _found_slots(family, weights, prefix, outer, config.get("architectures") or ())
        found = FoundHead(text, inside, path, weights, outer, f"{prefix}{family.token_embeddings}.weight")
        heads: dict[str, HeadConfig] = {}
        left_out: list[str] = []  # patterns of the tensors of heads that are left out
        for name, slot in [*slots.items()]:
            head = slot.read(found)
            if isinstance(head, HeadConfig):
                heads[name] = head
                continue
            warn_once(f"{path}: its head {name} is left out, the encoder is read: {head}")
            left_out += [f"{re.escape(outer + module)}\\..*" for module in slots.pop(name).modules.values()]
        if unknown and any(not name.startswith(prefix) for name in weights):
            warn_once(
                f"{path}: the head of {unknown} is left out, the encoder is read: dualenc does not have such a head"
            )
            left_out.append(f"(?!{re.escape(prefix)}).*")
    finally:
        weights.close()

    def state(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        rules = family_rules(family, text, slots, shapes, prefix, outer)
        unused: list[str] = []
        for name, slot in slots.items():
            stored, rest = slot.stored(heads[name], held)
            for parameter, theirs in stored.items():
                own = f"heads.{name}.{parameter}"
                rules[own] = Rule((own,), (outer + theirs,))
            unused += [outer + one for one in rest]
        return _read(folder, rules.values(), shapes, (*family.ignored, *map(re.escape, unused), *left_out))

    return TextCheckpoint(spec, folder, text, heads, longest(folder, text.context_length), state)


def _found_slots(
    family: Family, weights: Collection[str], prefix: str, outer: str, architectures: Iterable[Any]
) -> tuple[dict[str, Slot], str]:
    """Find the slots of the heads that a checkpoint has, by their tensors.

    The class that the config names decides where heads have tensors of the same names, such as "classifier".

    Args:
        family: the family.
        weights: names of the checkpoint's tensors.
        prefix: prefix of the encoder's tensors.
        outer: prefix of the heads' tensors.
        architectures: names of classes in the config.

    Returns:
        Slots by the name of the head; and the class of a head that dualenc lacks, or an empty text. Such a class hides
        all heads outside of the encoder, since its tensors may have the names of another head's.
    """
    known = {slot.architecture for slot in family.slots} - {""}
    named = {str(name): match[0] for name in architectures if (match := HEAD_CLASS.search(str(name)))}
    unknown = next((name for name, head in named.items() if head not in {*known, "ForPreTraining"}), "")

    def present(part: str) -> bool:
        return (prefix + part[1:] if part.startswith(".") else outer + part) in weights

    found: list[Slot] = []
    for slot in sorted(family.slots, key=lambda slot: slot.architecture not in named.values()):
        if not present(slot.marker) or (unknown and not slot.marker.startswith(".")):
            continue
        rivals = [other for other in family.slots if other.marker == slot.marker and other is not slot]
        whole = all(present(f"{module}.weight") for module in slot.modules.values())
        if slot.architecture not in named.values() and rivals and (not whole or any(one in found for one in rivals)):
            continue
        shared = any(set(slot.modules.values()) & set(other.modules.values()) for other in found)
        if not (slot.yields and shared):
            found.append(slot)
    return {slot.name: slot for slot in family.slots if slot in found}, unknown
