"""The export format of transformers: a joined model with its text tower alone, or a text model with its heads."""

import dataclasses
from pathlib import Path

import numpy as np
from safetensors.torch import save_file

from dualenc.formats.huggingface import dual as hugging_face
from dualenc.formats.huggingface.architecture import (
    choose_family,
    family_of,
    no_place,
    slots_of,
    unlike,
    with_segment,
)
from dualenc.formats.huggingface.families import FAMILIES
from dualenc.formats.huggingface.tokenizers import TOKENIZER_FILES, check_closing, tokenizer_config
from dualenc.formats.model_folder import CONFIG
from dualenc.formats.state_dict import write_state
from dualenc.inference.embedder import Embedder
from dualenc.inference.text_model import FILES as TEXT_FILES
from dualenc.inference.text_model import TextPredictor, counts_positions, load_text, write_text_model
from dualenc.interop import references
from dualenc.interop.export_format import ExportFormat, read_object
from dualenc.interop.inputs import Inputs, make_text_inputs, outputs_of, parts_of
from dualenc.interop.verify import Check
from dualenc.models.heads import TextModel
from dualenc.models.tower import evaluating
from dualenc.report.card import ModelSource
from dualenc.tokens import Tokens, padding_index
from dualenc.utils.errors import ModelError
from dualenc.utils.files import read_json, write_json

PROCESSOR = "preprocessor_config.json"
TEXT_TOWER = "text"  # folder of the text tower alone


class TransformersFormat(ExportFormat):
    """Format of `AutoModel.from_pretrained`, `AutoTokenizer` and `AutoImageProcessor`."""

    name = "transformers"
    files = (
        CONFIG, "model.safetensors", PROCESSOR, "tokenizer.json", "tokenizer_config.json",
        *(f"{TEXT_TOWER}/{name}" for name in TEXT_FILES),
    )  # fmt: skip
    uploaded = (
        CONFIG, "model*.safetensors", "model.safetensors.index.json", PROCESSOR, "processor_config.json",
        *TOKENIZER_FILES, *(f"{TEXT_TOWER}/{name}" for name in TEXT_FILES),
    )  # fmt: skip
    reference = references.TRANSFORMERS
    offered_for = ("dual encoder",)  # a text model of dualenc is a folder of transformers already

    def write(self, model: Embedder | TextPredictor, folder: Path) -> list[str]:
        """Write a dual encoder or a text model; see `ExportFormat.write`."""
        return _write_text(model, folder) if isinstance(model, TextPredictor) else write_transformers(model, folder)

    def checks(self, model: Embedder | TextPredictor, folder: Path, inputs: Inputs) -> list[Check]:
        """Return the comparison of all outputs that the format keeps, and that of the text tower alone."""
        if isinstance(model, TextPredictor):
            return [check_text(model, folder, inputs)]
        expected, (tokenizer, _) = outputs_of(model, inputs), parts_of(model)
        if hugging_face.choose_format(model.dual_encoder.config).kind != "siglip":
            expected.pop("bias", None)  # joined models have no place for it
        checks = [Check(self.reference, str(folder), inputs, expected, tokenizer)]
        text = folder / TEXT_TOWER
        if (text / CONFIG).is_file():
            tower = load_text(text, "cpu")
            checks.append(check_text(tower, text, make_text_inputs(tower)))
        return checks

    def snippet(self, source: ModelSource, images: bool) -> str:
        """Return a program that loads model, tokenizer and, for images, the processor."""
        names = ["AutoImageProcessor", "AutoModel", "AutoTokenizer"]
        lines = [
            f"from transformers import {', '.join(names if images else names[1:])}\n",
            f"model = AutoModel.from_pretrained({source.arguments})",
            f"tokenizer = AutoTokenizer.from_pretrained({source.arguments})",
        ]
        lines += [f"processor = AutoImageProcessor.from_pretrained({source.arguments})"] if images else []
        return "\n".join(lines)

    def task(self, folder: Path) -> str:
        """Return the pipeline tag of a joined model, or that of a text model."""
        return super().task(folder) if "vision_config" in self.settings(folder) else "feature-extraction"


def write_transformers(embedder: Embedder, folder: Path) -> list[str]:
    """Write a folder that `AutoModel.from_pretrained(FOLDER)` loads, and the text tower alone in FOLDER/text.

    Args:
        embedder: the dual encoder.
        folder: an empty folder.

    Returns:
        One note for each thing that the format does not keep.

    Raises:
        ModelError: If transformers cannot express a part of the model; the message names the part.
    """
    model, (tokenizer, preprocess) = embedder.dual_encoder, parts_of(embedder)
    form = hugging_face.choose_format(model.config)
    if not counts_positions(form.text, tokenizer):
        raise ModelError(f"transformers counts positions by another padding token than {embedder.name}")
    config = dataclasses.replace(model.config, text=form.text)
    state, config = hugging_face.add_identity_pooler(with_segment(model.state_dict(), form.text), form, config)
    tensors = write_state(state, hugging_face.rules_of(form, config))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    written = hugging_face.write_config(form, config)
    if ids := tokenizer.backend.encode("").ids:
        check_closing(form.family.name, ids[-1], tokenizer, form.text, f"{embedder.name} cannot go to transformers")
        written["text_config"] |= {"bos_token_id": ids[0], "eos_token_id": ids[-1]}
    write_json(folder / CONFIG, written)
    write_json(folder / PROCESSOR, hugging_face.write_preprocess(preprocess))
    tokenizer.save(folder / "tokenizer.json")
    write_json(folder / "tokenizer_config.json", tokenizer_config(tokenizer, form.text))
    encoder = TextModel(model.config.text)
    encoder.encoder.load_state_dict(model.text.state_dict())
    TextPredictor(encoder.eval(), tokenizer, f"the text tower of {embedder.name}").save(folder / TEXT_TOWER)
    notes = ["logit_bias: the format has no place for it"] if config.logit_bias and form.kind != "siglip" else []
    if form.identity_pooler:
        notes.append(
            "the text's features pass through BERT's pooler nearly unchanged (times 2^-16 before its tanh, times 2^16 "
            "after): in float16 this loses digits, in bfloat16 and float32 it does not"
        )
    if not (folder / TEXT_TOWER / CONFIG).is_file():
        notes.append("text/: of no family that transformers knows, only dualenc reads it")
    return notes


def _write_text(predictor: TextPredictor, folder: Path) -> list[str]:
    """Write a text model in the format of its family, with the heads that the family has, and return the notes."""
    model, tokenizer = predictor.model, predictor.tokenizer
    text, heads = model.config, model.head_configs
    family = choose_family(text, heads)
    if family is None:
        reason = unlike(text, FAMILIES)
        raise ModelError(f"transformers has no text encoder like this one: {reason}")
    if not counts_positions(text, tokenizer):
        raise ModelError(f"transformers counts positions by another padding token than {predictor.name}")
    closing = (tokenizer.backend.encode("").ids or [None])[-1]
    check_closing(family.name, closing, tokenizer, text, f"{predictor.name} cannot go to transformers")
    slots = slots_of(family, text, heads)
    kept = TextModel(text, {name: heads[name] for name in slots})
    kept.load_state_dict({name: x for name, x in model.state_dict().items() if name in kept.state_dict()})
    write_text_model(folder, family, text, kept.head_configs, tokenizer, kept.state_dict())
    named = read_json(folder / CONFIG)["architectures"]
    notes = [
        f"head {name}: the format has no place for it ({no_place(family, text, name, head)})"
        for name, head in heads.items()
        if name not in slots
    ]
    return notes + [
        f"head {name}: read by {family.stem}{slot.architecture}, which was not compared"
        for name, slot in slots.items()
        if slot.architecture and f"{family.stem}{slot.architecture}" not in named
    ]


def check_text(predictor: TextPredictor, folder: Path, inputs: Inputs) -> Check:
    """Return the comparison of a text model with its folder: hidden states, and the head that its config names.

    Values are compared by their asinh: a difference is absolute where they are small, relative where they are large.

    Args:
        predictor: the text model.
        folder: a folder of transformers.
        inputs: inputs for both.
    """
    text, heads = predictor.model.config, predictor.model.head_configs
    expected = {"hidden": outputs_of(predictor, inputs)["hidden"]}
    config = read_object(folder / CONFIG)
    family, _ = family_of(config, str(folder / CONFIG))
    for name, slot in slots_of(family, text, heads).items():
        if slot.architecture in references.COMPARED_HEADS and any(
            architecture.endswith(slot.architecture) for architecture in config["architectures"]
        ):
            expected["logits"] = _logits(predictor, name, inputs)
    return Check(references.TRANSFORMERS_TEXT, str(folder), inputs, expected, predictor.tokenizer)


def _logits(predictor: TextPredictor, name: str, inputs: Inputs) -> np.ndarray:
    """Compute the asinh of a head's logits for the first tokens of each text."""
    ids, types = ([row[: references.SHORT] for row in rows] for rows in (inputs.ids, inputs.types))
    tokens = Tokens.pack(ids, types or None).to(predictor.device)
    with evaluating(predictor.model):
        hidden = predictor.model.encoder(tokens)
        logits = predictor.model.head(name, hidden, tokens).asinh()
    if predictor.model.kinds[name].of_tokens:
        index, mask = padding_index(tokens.offsets, tokens.max_len)
        logits = (logits[index] * mask[..., None])[tokens.rows]
    return logits.float().cpu().numpy()
