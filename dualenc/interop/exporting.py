"""Models out: written in a format of others, loaded again by those in a process of their own, and compared.

What open_clip and transformers are given is written by the rules that theirs is read by.
"""

import dataclasses
import os
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import numpy as np
from safetensors.torch import save_file

from dualenc.data.images import Preprocess
from dualenc.data.text.tokenizer import Tokenizer
from dualenc.formats.huggingface import dual as hugging_face
from dualenc.formats.huggingface.architecture import (
    choose_family,
    family_of,
    fitted,
    no_place,
    slots_of,
    unlike,
    with_segment,
)
from dualenc.formats.huggingface.families import FAMILIES
from dualenc.formats.huggingface.tokenizers import tokenizer_config
from dualenc.formats.model_folder import CONFIG, EXPORT, OPEN_CLIP, TEXT_MODEL, detect, open_folder
from dualenc.formats.open_clip import config as open_clip
from dualenc.formats.open_clip.tokenizer import open_clip_tokenizer_config
from dualenc.formats.state_dict import write_state
from dualenc.inference.embedder import Embedder, facts_of, load
from dualenc.inference.text_model import TextPredictor, counts_positions, facts_of_text, hub_config, load_text
from dualenc.interop.onnx import FILES as ONNX_FILES
from dualenc.interop.onnx import describe_onnx, text_outputs, verify_text_onnx, write_onnx, write_text_onnx
from dualenc.interop.references import SHORT
from dualenc.interop.sentence_transformers import write_sentence_transformer
from dualenc.interop.verify import TEXTS, Inputs, Verified, make_inputs, outputs_of, random_ids, verify
from dualenc.models.heads import TextModel
from dualenc.models.tower import evaluating
from dualenc.report.card import Card, program, write_card
from dualenc.tokens import Tokens, padding_index
from dualenc.utils.errors import ModelError
from dualenc.utils.files import read_json, replaced_folder, write_json

Format = Literal["open_clip", "transformers", "sentence-transformers", "onnx"]
TOLERANCE = 1e-5
ONNX_TOLERANCE = 1e-4
# What a folder that was exported may hold: one with anything else is not replaced.
FILES = (
    "README.md", EXPORT, *ONNX_FILES, "config.json", TEXT_MODEL, "model.safetensors", "modules.json", OPEN_CLIP,
    "open_clip_model.safetensors", "preprocessor_config.json", "sentence_bert_config.json", "text",
    "tokenizer_config.json", "config_sentence_transformers.json", "1_Pooling",
    *(f"{i}_{kind}" for i in range(2, 6) for kind in ("Dense", "Normalize")),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        folder: where.
        verified: what was compared.
        notes: what is not as it was, in words.
    """

    folder: Path
    verified: list[Verified]
    notes: list[str]

    def lines(self) -> list[str]:
        """For the screen."""
        files = [path for path in self.folder.rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files) / 1e6
        lines = [f"{self.folder}: {len(files)} files, {size:,.1f} MB"]
        lines += [line for one in self.verified for line in one.lines()]
        return lines + [f"not as it was: {note}" for note in self.notes]


def open_model(spec: str) -> Embedder | TextPredictor:
    """A dual encoder or a text model of ours, or a text model that `dualenc.load_text` reads."""
    if spec.startswith("open_clip:"):
        raise ModelError(f"{spec} is a model of open_clip: dualenc import {spec} OUT makes it one of ours")
    found = open_folder(spec, [CONFIG, TEXT_MODEL])
    kind = found.first("text_model", "dual_encoder", "transformers")
    return load_text(spec, "cpu") if kind in ("text_model", "transformers") else load(spec, "cpu")


def export(
    spec: str, out: str | os.PathLike[str], form: Format, more: Callable[[Embedder], Inputs] = make_inputs
) -> Exported:
    """Writes a model in a format of others, and checks it with the library whose format it is.

    Args:
        spec: a model directory, run directory, text model, or hf-hub:owner/name[@revision].
        out: folder to write; one that was exported before is replaced.
        form: the format.
        more: what both sides are given, of a dual encoder.

    Raises:
        ModelError: the format has no such model; the library is not installed; or it makes something else of the
            inputs, by more than 1e-5, or 1e-4 in ONNX. Nothing is written.
    """
    _check_place(spec, Path(out))
    model = open_model(spec)
    with replaced_folder(out, FILES) as folder:
        if isinstance(model, TextPredictor):
            found = _export_text(model, folder, form)
        else:
            found = _export_dual(model, folder, form, Path(out), more)
        about = {"format": form, "fingerprint": model.fingerprint, "notes": found.notes, "dualenc": version("dualenc")}
        write_json(folder / EXPORT, about)
        write_card(folder, _card(model, form, found))
    return dataclasses.replace(found, folder=Path(out))


def _card(model: Embedder | TextPredictor, form: Format, found: Exported) -> Card:
    images = isinstance(model, Embedder) and form != "sentence-transformers"
    what = "A dual encoder of images and texts" if images else "A text encoder"
    facts = facts_of(model) if isinstance(model, Embedder) else facts_of_text(model)
    return Card(
        title=model.name,
        library=form,
        summary=f"{what} in the format of {form}.",
        facts=facts,
        programs=[(form, program(form, images))],
        notes=found.notes,
        more=describe_onnx(found.folder) if form == "onnx" else "",
        task="sentence-similarity" if form == "sentence-transformers" else None,
        images=images,
    )


def _check_place(spec: str, out: Path) -> None:
    """Refuses to write over a model of ours, whose files have the names of some that are exported."""
    found = detect(out)
    if (found.ours and found.path == out) or any(
        out.resolve() == (Path(spec) / inside).resolve() for inside in ("", "best", "last")
    ):
        raise ModelError(f"{out} is a model of dualenc, and an export would take its place: choose another path")


def _export_dual(
    model: Embedder, folder: Path, form: Format, out: Path, more: Callable[[Embedder], Inputs]
) -> Exported:
    inputs = more(model)
    ours, (tokenizer, _) = outputs_of(model, inputs), parts_of(model)
    notes: list[str] = []
    if form == "open_clip":
        write_open_clip(model, folder, str(folder))
        verified = [verify("open_clip", f"local-dir:{folder}", inputs, ours, TOLERANCE, tokenizer=tokenizer)]
        fields = read_json(folder / OPEN_CLIP)
        if "hf_tokenizer_name" in fields["model_cfg"]["text_cfg"]:
            notes.append(
                "open_clip cleans texts (blanks, entities, curly quotes) and takes the name of a special token in a "
                "text for the token: such texts may get other ids there"
            )
        if "hf_model_name" in fields["model_cfg"]["text_cfg"]:  # this folder, which is going to have another name
            fields["model_cfg"]["text_cfg"]["hf_model_name"] = str(out.resolve())
            write_json(folder / OPEN_CLIP, fields)
            notes.append(
                "open_clip finds the text encoder by the folder or repository that hf_model_name in "
                f"{OPEN_CLIP} names: change it where the folder is moved"
            )
    elif form == "transformers":
        notes = write_transformers(model, folder)
        without = {name: x for name, x in ours.items() if name != "bias" or not notes}
        verified = [verify("transformers", str(folder), inputs, without, TOLERANCE, tokenizer=tokenizer)]
        if (folder / "text" / "config.json").is_file():
            verified.append(verify_text(load_text(folder / "text", "cpu"), folder / "text"))
        else:
            notes.append("text/: of no family that transformers knows, only dualenc reads it")
    elif form == "sentence-transformers":
        write_sentence_transformer(model, folder)
        texts = {name: ours[name] for name in ("ids", "texts")}
        verified = [verify("sentence_transformers", str(folder), inputs, texts, TOLERANCE, tokenizer=tokenizer)]
    else:
        write_onnx(model, folder)
        verified = [verify("onnx", str(folder), inputs, ours, ONNX_TOLERANCE, tokenizer=tokenizer)]
    return Exported(folder, verified, notes)


def _export_text(model: TextPredictor, folder: Path, form: Format) -> Exported:
    if form == "open_clip":
        raise ModelError(f"{model.name} is a text model alone, and open_clip takes image and text together")
    if form == "onnx":
        write_text_onnx(model, folder)
        return Exported(folder, [verify_text_onnx(model, folder)], [])
    if form == "sentence-transformers":
        write_sentence_transformer(model, folder)
        inputs = Inputs(random_ids(model.tokenizer, model.model.config, np.random.default_rng(0)), list(TEXTS))
        ours = {name: x for name, x in text_outputs(model, inputs).items() if name in ("ids", "texts")}
        verified = verify("sentence_transformers", str(folder), inputs, ours, TOLERANCE, tokenizer=model.tokenizer)
        return Exported(folder, [verified], [])
    family = choose_family(model.model.config, model.model.head_configs)
    if family is None:
        reason = unlike(model.model.config, FAMILIES)
        raise ModelError(f"transformers has no text encoder like this one: {reason}; export to onnx")
    kept = slots_of(family, model.model.config, model.model.head_configs)
    notes = [
        f"head {name}: the format has no place for it ({no_place(family, model.model.config, name, head)})"
        for name, head in model.model.head_configs.items()
        if name not in kept
    ]
    encoder = TextModel(model.model.config, {name: model.model.head_configs[name] for name in kept})
    encoder.load_state_dict({name: x for name, x in model.model.state_dict().items() if name in encoder.state_dict()})
    model, inner = TextPredictor(encoder.eval(), model.tokenizer, model.name), folder / "text"
    model.save(inner)
    (inner / TEXT_MODEL).unlink()  # by which a folder is known as one of ours
    for path in inner.iterdir():
        path.rename(folder / path.name)
    inner.rmdir()
    if not (folder / "config.json").is_file():
        raise ModelError(f"transformers counts positions by another padding token than {model.name}: export to onnx")
    named = read_json(folder / "config.json")["architectures"]
    notes += [
        f"head {name}: read by {family.stem}{slot.architecture}, which was not compared"
        for name, slot in kept.items()
        if slot.architecture and f"{family.stem}{slot.architecture}" not in named
    ]
    return Exported(folder, [verify_text(model, folder)], notes)


def verify_text(model: TextPredictor, folder: Path) -> Verified:
    """Compares what transformers makes of a text model's folder: hidden states, and the head that its config names.

    They are compared by their asinh: to the tolerance where they are small, to a share of it where not.
    """
    text, heads = model.model.config, model.model.head_configs
    inputs = Inputs(random_ids(model.tokenizer, text, np.random.default_rng(0)), list(TEXTS))
    ours = {"hidden": text_outputs(model, inputs)["hidden"]}
    config = read_json(folder / "config.json")
    family, _ = family_of(config, str(folder / "config.json"))
    for name, slot in slots_of(family, text, heads).items():
        if slot.architecture in ("ForMaskedLM", "ForSequenceClassification") and any(
            architecture.endswith(slot.architecture) for architecture in config["architectures"]
        ):
            ours["logits"] = _logits(model, name, inputs)
    return verify("transformers_text", str(folder), inputs, ours, TOLERANCE, tokenizer=model.tokenizer)


def _logits(model: TextPredictor, name: str, inputs: Inputs) -> np.ndarray:
    types = None
    if model.model.config.types > 1:
        types = [[int(2 * i >= len(ids)) for i in range(len(ids))][:SHORT] for ids in inputs.ids]
    tokens = Tokens.pack([ids[:SHORT] for ids in inputs.ids], types).to(model.device)
    with evaluating(model.model):
        hidden = model.model.encoder(tokens)
        logits = model.model.head(name, hidden, tokens).asinh()
    if model.model.head_configs[name].kind == "mlm":
        index, mask = padding_index(tokens.offsets, tokens.max_len)
        logits = (logits[index] * mask[..., None])[tokens.rows]
    return logits.float().cpu().numpy()


def parts_of(embedder: Embedder) -> tuple[Tokenizer, Preprocess]:
    """The tokenizer and the preprocessing of a model of ours."""
    assert isinstance(embedder.tokenizer, Tokenizer)
    assert isinstance(embedder.preprocess, Preprocess)
    return embedder.tokenizer, embedder.preprocess


def write_open_clip(embedder: Embedder, folder: Path, name: str) -> None:
    """What `open_clip.create_model_and_transforms("local-dir:FOLDER")` loads.

    Args:
        embedder: the model.
        folder: empty.
        name: under which open_clip finds a text encoder of Hugging Face's: this folder, or a repository of the hub.

    Raises:
        ModelError: open_clip has no such model; says which part.
    """
    model, (tokenizer, preprocess) = embedder.dual_encoder, parts_of(embedder)
    ids = tokenizer.backend.encode("").ids
    model_cfg = open_clip.write_config(model.config, ids[-1] if ids else None, name)
    text_cfg, config = model_cfg["text_cfg"], model.config
    found = fitted(config.text, open_clip.HUGGING_FACE) if "hf_model_name" in text_cfg else None
    if found is not None:
        config = dataclasses.replace(config, text=found[1])
        write_json(folder / "config.json", hub_config(*found, {}, tokenizer))
    text_cfg |= open_clip_tokenizer_config(tokenizer, config.text)
    state = with_segment(model.state_dict(), config.text)
    if "timm_model_name" not in model_cfg["vision_cfg"]:
        state = open_clip.fold(state)
    save_file(write_state(state, open_clip.rules_of(model_cfg, config)), folder / "open_clip_model.safetensors")
    preprocess_cfg = {
        "size": preprocess.size,
        "mean": list(preprocess.mean),
        "std": list(preprocess.std),
        "interpolation": preprocess.interpolation,
        "resize_mode": preprocess.resize,
    }
    write_json(folder / OPEN_CLIP, {"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg})
    tokenizer.save(folder / "tokenizer.json")
    write_json(folder / "tokenizer_config.json", tokenizer_config(tokenizer, config.text))


def write_transformers(embedder: Embedder, folder: Path) -> list[str]:
    """What `AutoModel.from_pretrained(FOLDER)` loads, and the text tower alone in FOLDER/text.

    Args:
        embedder: the model.
        folder: empty.

    Returns:
        What is not kept, in words.

    Raises:
        ModelError: transformers has no such model; says which part.
    """
    model, (tokenizer, preprocess) = embedder.dual_encoder, parts_of(embedder)
    form = hugging_face.choose_format(model.config)
    if not counts_positions(form.text, tokenizer):
        raise ModelError(
            f"transformers counts positions by another padding token than {embedder.name}: export to open_clip or onnx"
        )
    config = dataclasses.replace(model.config, text=form.text)
    state, config = hugging_face.through_pooler(with_segment(model.state_dict(), form.text), form, config)
    tensors = write_state(state, hugging_face.rules_of(form, config))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    written = hugging_face.write_config(form, config)
    if ids := tokenizer.backend.encode("").ids:
        written["text_config"] |= {"bos_token_id": ids[0], "eos_token_id": ids[-1]}
    write_json(folder / "config.json", written)
    write_json(folder / "preprocessor_config.json", hugging_face.write_preprocess(preprocess))
    tokenizer.save(folder / "tokenizer.json")
    write_json(folder / "tokenizer_config.json", tokenizer_config(tokenizer, form.text))
    notes = ["logit_bias: the format has no place for it"] if config.logit_bias and form.kind != "siglip" else []
    if form.passes:
        notes.append(
            "the text's features pass through BERT's pooler nearly unchanged (times 2^-16 before its tanh, times 2^16 "
            "after): in float16 this loses digits, in bfloat16 and float32 it does not"
        )
    encoder = TextModel(model.config.text)
    encoder.encoder.load_state_dict(model.text.state_dict())
    TextPredictor(encoder.eval(), tokenizer, f"the text tower of {embedder.name}").save(folder / "text")
    return notes
