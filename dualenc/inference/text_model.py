"""The text predictor: labels, entities, masked tokens and vectors of texts; loading and saving of text models."""

import dataclasses
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tokenizers import Encoding
from tokenizers import Tokenizer as Backend
from torch import Tensor

from dualenc.data.text.tokenizer import Tokenizer
from dualenc.formats.huggingface.architecture import choose_family, family_config, slots_of
from dualenc.formats.huggingface.family import Family
from dualenc.formats.huggingface.text_checkpoint import open_text, own_rules
from dualenc.formats.huggingface.tokenizers import tokenizer_config
from dualenc.formats.model_folder import TEXT_MODEL, check_tokenizer
from dualenc.formats.state_dict import write_state
from dualenc.inference.embedder import fingerprint, parameters_of
from dualenc.inference.tagging import TaggedEntity, tag_texts
from dualenc.models.heads import Examples, HeadConfig, TextModel
from dualenc.models.text_encoder import TextConfig
from dualenc.models.tower import evaluating
from dualenc.report.card import Card, text_model_program, write_card
from dualenc.tokens import Tokens
from dualenc.utils.arguments import check_batch_size, shown_value, strings, usable_device
from dualenc.utils.files import FORMAT, atomic_folder, write_json
from dualenc.utils.text import millions, plural

FILES = (TEXT_MODEL, "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md")
MASK = "[MASK]"  # mask in a text to fill, whatever the tokenizer calls it
Texts = Sequence[str] | Sequence[tuple[str, str]]


class Filling(TypedDict):
    """A guess at a masked token."""

    token: str
    probability: float
    text: str  # with the token in its place; other masks stay


class TextPredictor:
    """A text model with its tokenizer: labels, entities, masked tokens, vectors.

    Args:
        model: encoder and heads.
        tokenizer: tokenizer whose ids fit the encoder's vocabulary.
        name: name for messages and the model card.

    Raises:
        ModelError: If model and tokenizer do not fit together.

    Example:
        >>> import dualenc
        >>> from dualenc.models import HeadConfig, TextModel
        >>> tokenizer = dualenc.Tokenizer.train(["a good film", "a bad film"], vocab_size=50, context_length=8)
        >>> config = dualenc.TextConfig(tokenizer.vocab_size, width=16, layers=1, heads=2, context_length=8)
        >>> model = TextModel(config, {"mood": HeadConfig("classification", ("good", "bad"))})
        >>> predictor = dualenc.TextPredictor(model.eval(), tokenizer)
        >>> sorted(predictor.classify(["a good film"])[0])
        ['label', 'score', 'scores']
        >>> predictor.embed(["a good film", "a bad film"]).shape
        torch.Size([2, 16])
    """

    def __init__(self, model: TextModel, tokenizer: Tokenizer, name: str = "model") -> None:
        self.model, self.tokenizer, self.name = model, tokenizer, name
        check_tokenizer(tokenizer, model.config)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.model.parameters()).device

    @property
    def fingerprint(self) -> str:
        """A hash of architecture, weights and tokenizer."""
        return fingerprint(self.model, None, self.tokenizer.fingerprint)

    def to(self, device: str | torch.device) -> "TextPredictor":
        """Move the weights to a device, and return this predictor.

        Raises:
            ValueError: If this machine does not have the device.
        """
        self.model.to(usable_device(device))
        return self

    def __repr__(self) -> str:
        text, heads = self.model.config, self.model.head_configs.items()
        about = [f"{plural(text.layers, 'layer')} of width {text.width}", *(f"head {k} ({v.kind})" for k, v in heads)]
        return f"TextPredictor({self.name}: {', '.join(about)}, {parameters_of(self.model)}, on {self.device})"

    def classify(self, texts: Texts, head: str | None = None, batch_size: int = 64) -> list[dict[str, Any]]:
        """Return the predictions of a classification head for N texts.

        Args:
            texts: strings, or one; or pairs of strings, which the head reads together.
            head: name of the head; None where the model has one.
            batch_size: number of texts in a forward pass.

        Returns:
            For one label a text "label", its "score" and the "scores" of all labels, which sum to 1; for several
            "labels" of a score of 0.5 or more, and "scores"; for a regression "value".

        Raises:
            ValueError: If there is no such head, or it must be named; or a text is not a string.
        """
        name = self._head("text-classification", head)
        kind = self.model.kinds[name]
        texts = _strings_or_pairs(texts)
        out: list[dict[str, Any]] = [{} for _ in texts]
        with evaluating(self.model):
            for part, tokens in self._batches(texts, batch_size):
                examples = Examples(self.model(tokens, name), None, len(part))
                for i, answer in zip(part, kind.answers(examples), strict=True):
                    out[i] = answer
        return out

    def tag(self, texts: Sequence[str], head: str | None = None, batch_size: int = 64) -> list[list[TaggedEntity]]:
        """Return the named entities of each of N texts, in order; see `tag_texts`.

        Args:
            texts: strings, or one. A text longer than the encoder's context is read in windows that overlap.
            head: name of the head of kind "token_classification"; None where the model has one.
            batch_size: number of texts in a forward pass.

        Returns:
            For each text its entities: "label", "start" and "end" (characters), "text" and "score".

        Raises:
            ValueError: If there is no such head, or it must be named; or a text is not a string.
        """
        name = self._head("token-classification", head)
        return tag_texts(self.model, self.tokenizer, name, strings(texts, "texts", one=True), batch_size)

    def fill(self, text: str, k: int = 5) -> list[list[Filling]]:
        """Return the likeliest tokens for each "[MASK]", or the tokenizer's own mask token, of a text.

        Args:
            text: text with one mask or more.
            k: number of guesses for each mask.

        Returns:
            For each mask, in order, its k guesses, the likeliest first.

        Raises:
            ValueError: If `text` is not one string, has no mask or one past the longest text, or the model lacks a head
                of kind "mlm".
        """
        name = self._head("fill-mask", None)
        if not isinstance(text, str):
            raise ValueError(f"text is {shown_value(text)}: pass one string with {MASK}")
        if not isinstance(k, int) or k < 1:
            raise ValueError(f"k is {shown_value(k)}: it must be a number of at least 1")
        mask_id = self.tokenizer.mask_id
        if mask_id is None:
            raise ValueError(f"the tokenizer of {self.name} does not have a mask token")
        token = self.tokenizer.backend.id_to_token(mask_id) or MASK
        segments = text.replace(token, MASK).split(MASK)
        if len(segments) < 2:
            raise ValueError(f"{text!r} does not contain {MASK}: write it in place of a word")
        ids = self._spliced(segments, mask_id, token)
        tokens = Tokens.pack([ids])
        positions = [i for i, one in enumerate(ids) if one == mask_id]
        if len(positions) < len(segments) - 1:
            raise ValueError(f"{text!r} is longer than {self.tokenizer.context_length} tokens, and a {MASK} is cut off")
        with evaluating(self.model):
            tokens = tokens.to(self.device)
            logits = self.model(tokens, name, torch.tensor(positions, device=self.device)).float().cpu()
        found = logits.softmax(-1)[:, : self.tokenizer.vocab_size].topk(min(k, self.tokenizer.vocab_size))
        return [
            [self._filling(segments, number, one, p) for one, p in zip(best.tolist(), values.tolist(), strict=True)]
            for number, (best, values) in enumerate(zip(found.indices, found.values, strict=True))
        ]

    def embed(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        """Return vectors (N, D) of unit length, on the CPU, by the pooling of an embedding head or else the encoder's.

        Args:
            texts: N strings, or one.
            batch_size: number of texts in a forward pass.

        Raises:
            ValueError: If there are no texts, or they are not strings.
        """
        texts = strings(texts, "texts", one=True)
        if not texts:
            raise ValueError("there are no texts to embed")
        out = torch.empty(len(texts), self.model.config.width)
        with evaluating(self.model):
            for part, tokens in self._batches(texts, batch_size):
                hidden = self.model.encoder(tokens)
                pooled = self.model.encoder.pool(hidden, tokens, self.model.embedding_pool)
                out[part] = F.normalize(pooled.float(), dim=-1).cpu()
        return out

    def embed_tokens(self, texts: Sequence[str]) -> list[tuple[list[str], Tensor]]:
        """Return the tokens of each text, special tokens included, and their vectors (T, D), on the CPU."""
        texts = strings(texts, "texts", one=True)
        out: list[tuple[list[str], Tensor]] = [([], torch.empty(0))] * len(texts)
        with evaluating(self.model):
            for part, tokens in self._batches(texts, 64):
                hidden = self.model.encoder(tokens).float().cpu()
                ids, offsets = tokens.ids.tolist(), tokens.offsets.tolist()
                for i, row in zip(part, tokens.rows.tolist(), strict=True):
                    start, stop = offsets[row], offsets[row + 1]
                    names = [self.tokenizer.backend.id_to_token(one) or str(one) for one in ids[start:stop]]
                    out[i] = names, hidden[start:stop].clone()
        return out

    def save(self, path: str | os.PathLike[str], weights: Mapping[str, Tensor] | None = None) -> None:
        """Write the model in its family's own format, which `transformers` reads too, and replace an older one.

        `dualenc.json` keeps what that format cannot express, and heads without a slot keep their own names in
        `model.safetensors`: the model that `load_text` reads is bit-equal.

        Args:
            path: name of the folder.
            weights: weights in place of the model's own, such as those gathered from several processes.

        Raises:
            ModelError: If something else is at the path.
        """
        text, heads = self.model.config, self.model.head_configs
        state = self.model.state_dict() if weights is None else weights
        family = choose_family(text, heads) if counts_positions(text, self.tokenizer) else None
        with atomic_folder(path, FILES) as folder:
            about = {name: dataclasses.asdict(head) for name, head in heads.items()}
            write_json(folder / TEXT_MODEL, {"format": FORMAT, "text": dataclasses.asdict(text), "heads": about})
            write_text_model(folder, family, text, heads, self.tokenizer, state)
            write_card(folder, self._card(family))

    def _card(self, family: Family | None) -> Card:
        text, heads = self.model.config, self.model.head_configs
        facts = facts_of_text(self)
        if family is None:
            library, summary = "dualenc", "A text encoder that transformers does not know: only dualenc reads it."
        else:
            library = "transformers"
            summary = f"A text encoder in the format of transformers ({family.name}); `{TEXT_MODEL}` is dualenc's."
            own = [name for name in heads if name not in slots_of(family, text, heads)]
            if own := [name for name in own if list(self.model.heads[name].parameters())]:
                facts.append(("heads that only dualenc reads", ", ".join(own)))
        return Card(self.name, library, summary, facts, [("dualenc", text_model_program())])

    def _head(self, task: str, name: str | None) -> str:
        """Return the name of the head for a task, see `Head.task`."""
        heads = self.model.heads_for(task)
        if name is None and len(heads) == 1:
            return heads[0]
        if name not in heads:
            what = f"no head {name!r} for {task}" if name is not None else f"{len(heads) or 'no'} heads for {task}"
            raise ValueError(f"{self.name} has {what}" + (f": name one of {', '.join(heads)}" if heads else ""))
        return name

    def _batches(self, texts: Texts, batch_size: int) -> Iterator[tuple[list[int], Tokens]]:
        """Yield indices of texts in the caller's list, and their tokens, texts of similar lengths together."""
        check_batch_size(batch_size)
        types: list[list[int]] | None = None
        if len(texts) and not isinstance(texts[0], str):
            ids, types = self.tokenizer.encode_pairs([(one, other) for one, other in texts])
        else:
            ids = self.tokenizer.encode([str(text) for text in texts])
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            segments = None if types is None else [types[i] for i in part]
            yield part, Tokens.pack([ids[i] for i in part], segments).to(self.device)

    def _spliced(self, segments: Sequence[str], mask_id: int, token: str) -> list[int]:
        """Return the ids of a text that has masks between its segments; a "[SEP]" inside a segment is plain text."""
        backend = Backend.from_str(self.tokenizer.backend.to_str())
        backend.no_truncation()
        backend.encode_special_tokens = False
        hidden = backend.encode(token, add_special_tokens=False)
        backend.encode_special_tokens = True
        added = backend.get_added_tokens_decoder()[mask_id]
        parts: list[Encoding] = []
        for i, segment in enumerate(segments):
            segment = segment.rstrip() if added.lstrip and i + 1 < len(segments) else segment
            segment = segment.lstrip() if added.rstrip and i else segment
            parts += [hidden] if i else []
            parts.append(backend.encode(segment, add_special_tokens=False))
        backend.enable_truncation(self.tokenizer.context_length)
        ids = backend.post_process(Encoding.merge(parts)).ids
        return ids + [self.tokenizer.pad_id] * ((self.tokenizer.pad_to or 0) - len(ids))

    def _filling(self, segments: Sequence[str], number: int, token_id: int, probability: float) -> Filling:
        """Return a guess for the mask between segments `number` and `number + 1`."""
        backend = self.tokenizer.backend
        token = backend.id_to_token(token_id) or ""
        before, after = MASK.join(segments[: number + 1]), MASK.join(segments[number + 1 :])
        word = backend.decode([token_id], skip_special_tokens=False).strip()
        if token.startswith("##"):  # continues the word before it
            before, word = before.rstrip(), token[2:]
        return {"token": token, "probability": probability, "text": before + word + after}


def _strings_or_pairs(texts: Any) -> Texts:
    """Return texts as a list of strings, or of pairs of strings.

    Raises:
        ValueError: If anything else is given.
    """
    texts = texts if isinstance(texts, str | bytes) or not isinstance(texts, Iterable) else list(texts)
    pairs = isinstance(texts, list) and bool(texts) and all(isinstance(text, list | tuple) for text in texts)
    if not pairs:
        if isinstance(texts, list) and any(isinstance(text, list | tuple) for text in texts):
            raise ValueError("texts must be all strings or all pairs of strings")
        return strings(texts, "texts", one=True)
    for text in texts:
        if len(text) != 2:
            raise ValueError(f"a pair of texts must be two strings, not {len(text)}")
    return [(one, other) for one, other in (strings(text, "the texts of a pair") for text in texts)]


def facts_of_text(predictor: TextPredictor) -> list[tuple[str, str]]:
    """Return facts about a text model as pairs of name and value, for display."""
    text = predictor.model.config
    heads = predictor.model.head_configs.items()
    return [
        ("parameters", millions(sum(p.numel() for p in predictor.model.parameters()))),
        ("text tower", f"{plural(text.layers, 'layer')} of width {text.width}"),
        ("longest text", f"{predictor.tokenizer.context_length} tokens of a vocabulary of {text.vocab_size:,}"),
        *((f"head {name}", f"{one.kind} {', '.join(one.labels)}".strip()) for name, one in heads),
    ]


def counts_positions(text: TextConfig, tokenizer: Tokenizer) -> bool:
    """Return whether transformers numbers the positions of a text as the encoder does.

    Where the first position is not 0, transformers counts the tokens that are not padding, and takes the number before
    the first position for the padding token.
    """
    padding = tokenizer.backend.id_to_token(text.position_offset - 1) if text.position_offset else "<pad>"
    return padding in ("<pad>", "[PAD]")


def write_text_model(
    folder: Path,
    family: Family | None,
    text: TextConfig,
    heads: Mapping[str, HeadConfig],
    tokenizer: Tokenizer,
    state: Mapping[str, Tensor],
) -> None:
    """Write config.json, where there is a family, model.safetensors, and the tokenizer's files.

    Args:
        folder: an existing folder.
        family: family of the format; None for a model whose tensors keep their own names.
        text: architecture of the encoder.
        heads: configurations of the heads by name.
        tokenizer: tokenizer of the model.
        state: tensors of a `TextModel` by name.
    """
    if family is not None:
        write_json(folder / "config.json", hub_config(family, text, heads, tokenizer))
    tensors = write_state(state, own_rules(family, text, heads, state))
    if family is not None and family.name == "siglip_text_model":
        # The format has a linear map after pooling, which the encoder lacks: the identity is written.
        head = {"weight": torch.eye(text.width), "bias": torch.zeros(text.width)}
        tensors |= {f"{family.prefix}head.{name}": x for name, x in head.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    tokenizer.save(folder / "tokenizer.json")
    write_json(folder / "tokenizer_config.json", tokenizer_config(tokenizer, text))


def hub_config(
    family: Family, text: TextConfig, heads: Mapping[str, HeadConfig], tokenizer: Tokenizer
) -> dict[str, Any]:
    """Return a family's `config.json`, heads and special tokens included.

    Args:
        family: the family.
        text: architecture of the encoder.
        heads: configurations of the heads by name.
        tokenizer: tokenizer whose opening and closing tokens are named.
    """
    slots = slots_of(family, text, heads)
    written = {slot.name: heads[name] for name, slot in slots.items()}
    named = {slot.name: slot.architecture for slot in slots.values()}
    first = next((architecture for architecture in named.values() if architecture), "Model")
    config = family_config(family, text)
    config |= {"architectures": [family.stem + ("ForPreTraining" if {"mlm", "nsp"} <= named.keys() else first)]}
    ids = tokenizer.backend.encode("").ids
    if len(ids) > 1:
        config |= {"bos_token_id": ids[0], "eos_token_id": ids[-1]}
    config["tie_word_embeddings"] = True
    for slot in family.slots:
        config |= slot.settings(text, written.get(slot.name))
    if family.name == "modernbert" and len(ids) > 1:
        config |= {"cls_token_id": ids[0], "sep_token_id": ids[-1]}
    return {**config, "dtype": "float32"}


def load_text(spec: str | os.PathLike[str], device: str | torch.device | None = None) -> TextPredictor:
    """Load a text model.

    Args:
        spec: see `open_text`.
        device: device of the weights; None for CUDA where it is available, else the CPU.

    Raises:
        ModelError: If the model cannot be read or computed; the message names the file and the key.

    Example:
        >>> import tempfile
        >>> import dualenc
        >>> from dualenc.models import HeadConfig, TextModel
        >>> tokenizer = dualenc.Tokenizer.train(["a good film", "a bad film"], vocab_size=50, context_length=8)
        >>> config = dualenc.TextConfig(tokenizer.vocab_size, width=16, layers=1, heads=2, context_length=8)
        >>> model = TextModel(config, {"mood": HeadConfig("classification", ("good", "bad"))})
        >>> predictor = dualenc.TextPredictor(model.eval(), tokenizer)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     predictor.save(f"{folder}/model")
        ...     loaded = dualenc.load_text(f"{folder}/model", "cpu")
        >>> loaded.classify(["a good film"]) == predictor.classify(["a good film"])
        True
    """
    device = usable_device(device)
    checkpoint = open_text(spec)
    return TextPredictor(checkpoint.model().to(device), checkpoint.tokenizer(), checkpoint.spec)
