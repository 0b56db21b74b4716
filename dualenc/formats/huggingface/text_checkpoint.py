"""Text checkpoints, whoever wrote them: Hugging Face's formats, sentence-transformers' folders, and our own."""

import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dualenc.data.text.tokenizer import Tokenizer
from dualenc.formats import format_1
from dualenc.formats.download import hub_folder
from dualenc.formats.huggingface.architecture import family_of, slots_of, text_config
from dualenc.formats.huggingface.family import ACTIVATION_NAMES, PROBLEMS, Family, Slot
from dualenc.formats.huggingface.tokenizers import TOKENIZER_FILES, longest, padding_token, read_tokenizer
from dualenc.formats.model_folder import CONFIG, MODULES, TEXT_MODEL, check_tokenizer, open_folder
from dualenc.formats.state_dict import PICKLED, SAFE, Rule, Weights, family_rules, own_rule, prefixes, read_state
from dualenc.models.dual_encoder import DualConfig
from dualenc.models.heads import HeadConfig, TextModel
from dualenc.models.text_encoder import Pool, TextConfig
from dualenc.utils.errors import ModelError
from dualenc.utils.files import from_dict, read_json, take_format

CONFIGS = (TEXT_MODEL, CONFIG, MODULES, "1_Pooling/config.json", "sentence_bert_config.json", "preprocess.json")
# Heads of Hugging Face's that a TextModel has not; by its tensors one could be taken for another.
UNKNOWN_HEADS = ("ForTokenClassification", "ForQuestionAnswering", "ForMultipleChoice", "ForCausalLM", "LMHeadModel")
# Of sentence-transformers' config of pooling, as it was and as it is.
POOLING: dict[str, Pool] = {
    "cls_token": "cls",
    "cls": "cls",
    "mean_tokens": "mean",
    "mean": "mean",
    "lasttoken": "last",
}


@dataclass(frozen=True)
class TextCheckpoint:
    """A text encoder on disk, of which only the configuration has been read.

    Attributes:
        spec: as it was asked for.
        folder: where its files are.
        config: the architecture.
        heads: those it has, by name.
        max_length: longest text in tokens that it is meant for; at most `config.context_length`.
    """

    spec: str
    folder: Path
    config: TextConfig
    heads: dict[str, HeadConfig]
    max_length: int
    _state: Callable[[dict[str, tuple[int, ...]]], dict[str, Tensor]] = field(repr=False)
    _lowercase: bool = field(default=False, repr=False)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer.

        Raises:
            ModelError: there is none that can be read, or it has more entries than the encoder.
        """
        tokenizer = read_tokenizer(self.folder, self.config, self.max_length, self._lowercase)
        check_tokenizer(tokenizer, self.config, str(self.folder))
        return tokenizer

    def model(self) -> TextModel:
        """Encoder and heads with their weights, on the CPU, in single precision and eval mode.

        Raises:
            ModelError: the tensors are not those of the configuration; names them.
        """
        with torch.device("meta"):  # no random weights that nobody wants
            model = TextModel(self.config, self.heads)
        shapes = {name: tuple(x.shape) for name, x in model.state_dict().items()}
        model.load_state_dict(self._state(shapes), assign=True)
        return model.eval()


def open_text(spec: str | os.PathLike[str]) -> TextCheckpoint:
    """Reads the configuration of a text checkpoint.

    Args:
        spec: a folder of Hugging Face's (BERT, RoBERTa, ALBERT, DistilBERT, ELECTRA, ModernBERT, or the text encoder of
            CLIP or SigLIP), of sentence-transformers, or of `TextPredictor.save`; a model directory, whose text tower
            is meant; a run directory (its `best/`, or else `last/`); or `hf-hub:owner/name[@revision]`.

    Raises:
        ModelError: it is none of these, or says what dualenc cannot compute; names the file and the key.
    """
    name = os.fspath(spec)
    found = open_folder(name, [*CONFIGS, *TOKENIZER_FILES, "model*.safetensors", SAFE[1]], "text checkpoint")
    if name.startswith("hf-hub:") and not any((found.path / file).is_file() for file in SAFE):
        # Pickled weights only where there are no others; of the commit that the other files are of.
        hub_folder(f"{name.partition('@')[0]}@{found.path.name}", ["pytorch_model*.bin", PICKLED[1]])
    match found.first("text_model", "sentence_transformers", "dual_encoder", "transformers"):
        case "text_model":
            return _own(name, found.path)
        case "sentence_transformers":
            return _sentence_transformer(name, found.path)
        case "dual_encoder":
            return _tower(name, found.path, found.config)
        case "transformers":
            return _foreign(name, found.path, found.config)
    raise ModelError(f"{found.path} is no text checkpoint: it has neither {CONFIG} nor {TEXT_MODEL}")


def _own(spec: str, folder: Path) -> TextCheckpoint:
    """What `TextPredictor.save` wrote."""
    path = folder / TEXT_MODEL
    fields = read_json(path)
    written = take_format(fields, path)
    if set(fields) != {"text", "heads"} or not isinstance(fields["heads"], dict):
        raise ModelError(f"{path} must have the keys format, text and heads, not {', '.join(fields)}")
    text: TextConfig = from_dict(TextConfig, fields["text"], f"{path}: text")
    about = fields["heads"]
    if written == 1:
        about = {name: format_1.head_fields(head) for name, head in about.items()}
    heads = {name: from_dict(HeadConfig, head, f"{path}: heads.{name}") for name, head in about.items()}

    def state(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        config = folder / "config.json"  # only where a family's names were taken
        family = family_of(read_json(config), str(config))[0] if config.is_file() else None
        rules = own_rules(family, text, heads, shapes)
        return _read(folder, rules, shapes, () if family is None else family.ignored)

    return TextCheckpoint(spec, folder, text, heads, longest(folder, text.context_length), state)


def own_rules(
    family: Family | None, text: TextConfig, heads: Mapping[str, HeadConfig], ours: Mapping[str, Any]
) -> list[Rule]:
    """The names under which `TextPredictor.save` writes the tensors of a model.

    Args:
        family: whose names; absent, the model's own.
        text, heads: of the model.
        ours: its tensors by name.
    """
    if family is None:
        return [own_rule(name, name) for name in ours]
    slots = slots_of(family, text, heads)
    # As Hugging Face does: the encoder's own prefix where there is a head beside it. Those of CLIP and SigLIP had it
    # always before transformers 5, which reads both.
    beside = any(slot.architecture for slot in slots.values()) or family.nested is not None
    rules = family_rules(family, text, slots, ours, family.prefix if beside else "")
    # A decoder of its own has a bias of its own, which Hugging Face writes twice.
    untied = {f"heads.{name}.bias" for name, head in heads.items() if head.kind == "mlm" and not head.tied}
    return [rule._replace(copied=name in untied) for name, rule in rules.items()]


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
    """The text tower of a model directory."""
    path = folder / "config.json"
    take_format(config, path)
    text = from_dict(DualConfig, config, str(path)).text

    def state(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        rules = [own_rule(name, f"text.{name.removeprefix('encoder.')}") for name in shapes]
        return _read(folder, rules, shapes, (r"(?!text\.).*",))

    return TextCheckpoint(spec, folder, text, {}, longest(folder, text.context_length), state)


def _sentence_transformer(spec: str, folder: Path) -> TextCheckpoint:
    """A folder of sentence-transformers: an encoder and how to pool."""
    path = folder / "modules.json"
    modules = read_json(path)
    try:
        parts = {str(module["type"]).rpartition(".")[2]: folder / str(module["path"]) for module in modules}
    except (TypeError, KeyError):
        raise ModelError(f"{path} is no list of modules with type and path") from None
    if unknown := sorted(set(parts) - {"Transformer", "Pooling", "Normalize"}):
        raise ModelError(f"{path}: the module {unknown[0]} is none that dualenc computes")
    if "Transformer" not in parts or any(
        folder.resolve() not in (p.resolve(), *p.resolve().parents) for p in parts.values()
    ):
        raise ModelError(f"{path} names no Transformer in this folder")
    inside = parts["Transformer"]
    if not (inside / "config.json").is_file():
        raise ModelError(f"{inside / 'config.json'} does not exist, which {path} speaks of")
    found = _foreign(spec, inside, read_json(inside / "config.json"))
    about = inside / "sentence_bert_config.json"
    fields = read_json(about) if about.is_file() else {}
    fields = fields if isinstance(fields, dict) else {}
    length = fields.get("max_seq_length")
    length = min(length, found.max_length) if isinstance(length, int) and length > 0 else found.max_length
    text = found.config
    if "Pooling" in parts:
        text = dataclasses.replace(text, pool=_pooling(parts["Pooling"] / "config.json"))
    lowercase = bool(fields.get("do_lower_case"))
    return dataclasses.replace(found, config=text, max_length=length, _lowercase=lowercase)


def _pooling(path: Path) -> Pool:
    config = read_json(path)
    if not isinstance(config, dict):
        raise ModelError(f"{path} must be an object")
    chosen = [key.removeprefix("pooling_mode_") for key, on in config.items() if key.startswith("pooling_mode_") and on]
    if isinstance(mode := config.get("pooling_mode"), str):
        chosen = [mode]
    if len(chosen) != 1 or chosen[0] not in POOLING:
        raise ModelError(f"{path}: pooling by {' and '.join(chosen) or 'nothing'} is none that dualenc computes")
    return POOLING[chosen[0]]


def _foreign(spec: str, folder: Path, config: Any) -> TextCheckpoint:
    """A folder of Hugging Face's: heads are found by their tensors."""
    path = folder / "config.json"
    family, inside = family_of(config, str(path))
    text = text_config(family, inside, str(path))
    if text.pad_to is not None and (pad_id := padding_token(folder)) is not None:
        text = dataclasses.replace(text, pad_id=pad_id)
    for name in config.get("architectures") or ():
        if str(name).endswith(UNKNOWN_HEADS):
            raise ModelError(f"{path}: architectures {name}: dualenc has no such head")
    weights = Weights(folder)
    try:
        prefix, outer = prefixes(family, weights.keys(), weights.path)
        slots: dict[str, Slot] = {}
        for slot in family.slots:
            marker = prefix + slot.marker[1:] if slot.marker.startswith(".") else outer + slot.marker
            pooled = any(set(slot.modules.values()) & set(other.modules.values()) for other in slots.values())
            if marker in weights and not (slot.kind == "pooler" and pooled):
                slots[slot.name] = slot
        heads = {name: _head(slot, family, text, inside, weights, prefix, outer, path) for name, slot in slots.items()}
        held = set(weights)
    finally:
        weights.close()

    def state(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        rules = family_rules(family, text, slots, shapes, prefix, outer)
        spare = []  # written, and of no use
        for name, slot in slots.items():
            if slot.kind != "mlm":
                continue
            words, bias = slot.parameters["output_embeddings"], slot.parameters["bias"]
            if heads[name].tied:
                spare.append(outer + words[0])  # the word embedding once more
            elif outer + bias[-1] in held:  # what is not tied has its own bias too
                own = f"heads.{name}.bias"
                rules[own] = Rule((own,), (outer + bias[-1],))
                spare += [outer + one for one in bias[:-1]]
        return _read(folder, rules.values(), shapes, (*family.ignored, *map(re.escape, spare)))

    return TextCheckpoint(spec, folder, text, heads, longest(folder, text.context_length), state)


def _head(
    slot: Slot, family: Family, text: TextConfig, config: Any, weights: Weights, prefix: str, outer: str, path: Path
) -> HeadConfig:
    activation = slot.activation
    if family.name == "modernbert":
        activation = ACTIVATION_NAMES[config.get("classifier_activation", "gelu")]
    if slot.kind == "mlm":
        if activation not in (None, text.activation):
            raise ModelError(
                f"{path}: the encoder's activation is {text.activation}, that of its masked-language-model head "
                f"{activation}: dualenc has one for both"
            )
        decoder, words = outer + slot.parameters["output_embeddings"][0], f"{prefix}{family.token_embeddings}.weight"
        tied = decoder not in weights or torch.equal(weights[decoder], weights[words])
        return HeadConfig("mlm", tied=tied)
    if slot.kind == "rtd":
        return HeadConfig("rtd")
    if slot.kind == "pooler":
        return HeadConfig("pooler", pool="cls", activation=activation)
    pool = config.get("classifier_pooling", "cls") if family.name == "modernbert" else "cls"
    labels, problem = slot.labels, "single_label"
    if not labels:
        outputs = weights.rows(f"{outer}{slot.modules['out']}.weight")
        labels, problem = _labels(config, outputs, path)
    try:
        return HeadConfig("classification", labels, problem, pool, activation, slot.norm)  # type: ignore[arg-type]
    except ValueError as error:
        raise ModelError(f"{path}: id2label, problem_type: {error}") from None


def _labels(config: Any, outputs: int, path: Path) -> tuple[tuple[str, ...], str]:
    """Labels of a classification in the order of its logits, and what it is about."""
    given = config.get("id2label") or {str(i): f"LABEL_{i}" for i in range(outputs)}
    try:
        labels = tuple(str(label) for _, label in sorted((int(i), label) for i, label in given.items()))
    except (AttributeError, TypeError, ValueError):
        raise ModelError(f"{path}: id2label must lead from numbers to labels, not {given!r}") from None
    if len(labels) != outputs:
        raise ModelError(f"{path}: id2label has {len(labels)} labels, the head {outputs}")
    named = {theirs: ours for ours, theirs in PROBLEMS.items()}
    kind = config.get("problem_type") or PROBLEMS["regression" if outputs == 1 else "single_label"]
    if kind not in named:
        raise ModelError(f"{path}: problem_type {kind!r} is none of {', '.join(named)}")
    return labels, named[kind]
