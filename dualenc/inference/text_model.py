"""The text predictor: labels, entities, answers, masked tokens and vectors; loading and saving of text models."""

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import torch
from safetensors.torch import save_file
from torch import Tensor

from dualenc.data.text.tokenizer import Tokenizer
from dualenc.formats.huggingface.architecture import choose_family, family_config, slots_of
from dualenc.formats.huggingface.family import Family
from dualenc.formats.huggingface.text_checkpoint import open_text, own_rules
from dualenc.formats.huggingface.tokenizers import tokenizer_config
from dualenc.formats.model_folder import TEXT_MODEL, check_tokenizer
from dualenc.formats.state_dict import write_state
from dualenc.inference.answering import find_answers
from dualenc.inference.embedder import fingerprint, parameters_of
from dualenc.inference.embedding import described_vectors, embedding_dim, facts_of_embedding, prompt_text
from dualenc.inference.filling import Filler, Filling
from dualenc.inference.precision import embedding
from dualenc.inference.tagging import TaggedEntity, tag_texts
from dualenc.models.heads import Examples, HeadConfig, TextModel
from dualenc.models.heads.vectors import shortened
from dualenc.models.text_encoder import TextConfig
from dualenc.models.tower import evaluating
from dualenc.report.card import Card, text_model_program, write_card
from dualenc.tokens import Tokens
from dualenc.utils.arguments import Precision, check_batch_size, check_precision, strings, usable_device
from dualenc.utils.files import FORMAT, atomic_folder, write_json
from dualenc.utils.text import millions, plural, quoted

FILES = (TEXT_MODEL, "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md")
# Tasks of heads, by their names on the hub -> an example of a call; {head} names one of several heads.
EXAMPLES = {
    "text-classification": 'classify(["a sentence"]{head})',
    "token-classification": 'tag(["Kim lives in Rome"]{head})',
    "question-answering": 'answer("Who lives in Rome?", "Kim lives in Rome."{head})',
    "fill-mask": 'fill("Kim lives in [MASK].")',
    "sentence-similarity": 'embed(["a sentence"])',
}
Texts = Sequence[str] | Sequence[tuple[str, str]]


class TextPredictor:
    """A text model with its tokenizer: labels, entities, answers, masked tokens, vectors.

    Args:
        model: encoder and heads.
        tokenizer: tokenizer whose ids fit the encoder's vocabulary.
        name: name for messages and the model card.
        precision: "bf16" for vectors (`embed`, `embed_tokens`) that are computed in bf16, then normalized and returned
            in fp32; heads are in fp32.

    Raises:
        ModelError: If model and tokenizer do not fit together.
        ValueError: If the precision is unknown.

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

    def __init__(
        self, model: TextModel, tokenizer: Tokenizer, name: str = "model", precision: Precision = "fp32"
    ) -> None:
        self.model, self.tokenizer, self.name = model, tokenizer, name
        check_precision(precision)
        self.precision: Precision = precision
        check_tokenizer(tokenizer, model.config)

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.model.parameters()).device

    @property
    def fingerprint(self) -> str:
        """A hash of architecture, weights and tokenizer, and of the settings of embeddings where there are any."""
        return fingerprint(self.model, None, self.tokenizer.fingerprint + described_vectors(self.model))

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
            "labels" whose score is at least the head's threshold, and "scores"; for a regression "value".

        Raises:
            ValueError: If there is no such head, or it must be named; or a text is not a string.
        """
        name = self._head("text-classification", head)
        logits = self.logits(texts, name, batch_size)
        return self.model.kinds[name].answers(Examples(logits, None, len(logits)))

    def logits(self, texts: Texts, head: str | None = None, batch_size: int = 64) -> Tensor:
        """Return the logits (N, C) of a classification head for N texts, in fp32 on the CPU; see `classify`."""
        name = self._head("text-classification", head)
        texts = _strings_or_pairs(texts)
        order: list[int] = []
        logits: list[Tensor] = []
        with evaluating(self.model):
            for part, tokens in self._batches(texts, batch_size):
                order += part
                logits.append(self.model(tokens, name).float().cpu())
        if not logits:
            return torch.empty(0, len(self.model.kinds[name].labels))
        return torch.cat(logits)[torch.tensor(order).argsort()]

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

    def answer(
        self,
        question: str | Sequence[str],
        context: str | Sequence[str],
        n: int = 1,
        head: str | None = None,
        no_answer: bool | None = None,
        batch_size: int = 32,
    ) -> list[Any]:
        """Find answers to questions in texts.

        Args:
            question: a question, or a list of them.
            context: the text with the answer, or a list with one text for each question.
            n: most answers of a question.
            head: name of the head; None where the model has one.
            no_answer: allow the empty answer; None for the setting of the head.
            batch_size: number of windows in a forward pass; a long text has several.

        Returns:
            The answers of a question, the best first, each a dict with "text", the characters "start" and "end" between
            which it stands in the context, and its "score", a share of all answers found; for lists such a list for
            each question. The empty answer has start and end 0.

        Raises:
            ValueError: If there is no such head, or it must be named; or a text is empty, is not a string, or is a
                question that leaves no room for its context.
        """
        name = self._head("question-answering", head)
        return find_answers(self.model, self.tokenizer, name, question, context, n, no_answer, batch_size)

    @overload
    def fill(
        self, texts: str, top_k: int = 5, *, targets: Sequence[str] | None = None, batch_size: int = 64
    ) -> list[list[Filling]]: ...
    @overload
    def fill(
        self, texts: list[str], top_k: int = 5, *, targets: Sequence[str] | None = None, batch_size: int = 64
    ) -> list[list[list[Filling]]]: ...
    def fill(self, texts: Any, top_k: int = 5, *, targets: Any = None, batch_size: int = 64) -> Any:
        """Return the likeliest tokens for each "[MASK]", or the tokenizer's own mask token, of texts.

        Args:
            texts: a text with one mask or more, or several such texts.
            top_k: number of guesses for each mask.
            targets: words to choose from, each of which must be one token; None for the whole vocabulary. A word is
                looked up as an entry of the vocabulary first ("Ġcat"), then as a text ("cat").
            batch_size: number of texts in a forward pass.

        Returns:
            For each mask, in order, its guesses, the likeliest first; for several texts, a list of these.

        Raises:
            ValueError: If a text has no mask or one past the longest text, a target is not one token, or the model
                lacks a head of kind "mlm" or a mask token.
        """
        filler = Filler(self.model, self._head("fill-mask", None), self.tokenizer, self.name)
        found = filler(strings(texts, "texts", one=True), top_k, targets, batch_size)
        return found[0] if isinstance(texts, str) else found

    def embed(
        self, texts: Sequence[str], batch_size: int = 256, *, prompt: str | None = None, dim: int | None = None
    ) -> Tensor:
        """Return vectors (N, D) of unit length, on the CPU: those of an embedding head, or else the encoder's pooling.

        An empty text has the tokens that the tokenizer puts around every text. If there are none, its vector is 0.

        Args:
            texts: N strings, or one.
            batch_size: number of texts in a forward pass.
            prompt: what to put before each text: the name of one of the model's prompts, or the text itself, which ends
                with white space or a colon; "" for nothing; None for the model's default.
            dim: number of dimensions to keep, the first ones, before the vectors are normalized again (Matryoshka,
                Kusupati et al. 2022); None for the model's default.

        Raises:
            ValueError: If there are no texts, or they are not strings.
            ModelError: If the model does not have the prompt or the dimensions.
        """
        texts = strings(texts, "texts", one=True)
        if not texts:
            raise ValueError("there are no texts to embed")
        before = prompt_text(self.model.vectors, prompt, self.name)
        out = torch.zeros(len(texts), embedding_dim(self.model.vectors, dim, self.model.embedding_width, self.name))
        with embedding(self.model, self.precision):
            for part, tokens in self._batches([before + text for text in texts], batch_size, without_tokens=True):
                out[part] = shortened(self.model.embed(self.model.encoder(tokens), tokens), out.shape[1]).float().cpu()
        return out

    def embed_tokens(self, texts: Sequence[str]) -> list[tuple[list[str], Tensor]]:
        """Return the tokens of each text, special tokens included, and their hidden states (T, D), on the CPU.

        No prompt is put before the texts.
        """
        texts = strings(texts, "texts", one=True)
        out: list[tuple[list[str], Tensor]] = [([], torch.empty(0, self.model.config.width))] * len(texts)
        with embedding(self.model, self.precision):
            for part, tokens in self._batches(texts, 64, without_tokens=True):
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
        program = text_model_program(calls=example_calls(self.model))
        return Card(self.name, library, summary, facts, [("dualenc", program)])

    def _head(self, task: str, name: str | None) -> str:
        """Return the name of the head for a task, see `Head.task`."""
        heads = self.model.heads_for(task)
        if name is None and len(heads) == 1:
            return heads[0]
        if name not in heads:
            what = f"no head {name!r} for {task}" if name is not None else f"{len(heads) or 'no'} heads for {task}"
            own = [f"{name} ({head.kind})" for name, head in self.model.head_configs.items()]
            hint = f"name one of {', '.join(heads)}" if heads else f"its heads: {', '.join(own) or 'none'}"
            raise ValueError(f"{self.name} has {what}: {hint}")
        return name

    def _batches(
        self, texts: Texts, batch_size: int, without_tokens: bool = False
    ) -> Iterator[tuple[list[int], Tokens]]:
        """Yield indices of texts in the caller's list, and their tokens, texts of similar lengths together.

        Args:
            texts: strings, or pairs of strings.
            batch_size: number of texts in a batch.
            without_tokens: leave out texts without tokens. Empty texts have none if the tokenizer puts none around a
                text.

        Raises:
            ValueError: If a text does not have tokens and is not left out.
        """
        check_batch_size(batch_size)
        types: list[list[int]] | None = None
        if len(texts) and not isinstance(texts[0], str):
            ids, types = self.tokenizer.encode_pairs([(one, other) for one, other in texts])
        else:
            ids = self.tokenizer.encode([str(text) for text in texts])
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        if empty := [i for i in order if not ids[i]]:
            if not without_tokens:
                shown = quoted(str(texts[empty[0]]))
                raise ValueError(f"text number {empty[0]} (from 0) does not have a token: {shown}")
            order = order[len(empty) :]
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            segments = None if types is None else [types[i] for i in part]
            yield part, Tokens.pack([ids[i] for i in part], segments).to(self.device)


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


def example_calls(model: TextModel) -> list[str]:
    """Return an example of a call for each task of the model's heads, or of `embed` if they have none."""
    calls = []
    for task in [task for task in EXAMPLES if model.heads_for(task)] or ["sentence-similarity"]:
        names = model.heads_for(task)
        calls.append(EXAMPLES[task].format(head=f", head={json.dumps(names[0])}" if len(names) > 1 else ""))
    return calls


def facts_of_text(predictor: TextPredictor) -> list[tuple[str, str]]:
    """Return facts about a text model as pairs of name and value, for display."""
    text = predictor.model.config
    heads = predictor.model.head_configs.items()
    return [
        ("parameters", millions(sum(p.numel() for p in predictor.model.parameters()))),
        ("text tower", f"{plural(text.layers, 'layer')} of width {text.width}"),
        ("longest text", f"{predictor.tokenizer.context_length} tokens of a vocabulary of {text.vocab_size:,}"),
        *((f"head {name}", f"{one.kind} {', '.join(one.labels)}".strip()) for name, one in heads),
        *facts_of_embedding(predictor.model),
    ]


def counts_positions(text: TextConfig, tokenizer: Tokenizer) -> bool:
    """Return whether transformers numbers the positions of a text as the encoder does.

    Where the first position is not 0, transformers counts the tokens that are not padding, and takes the number before
    the first position for the padding token.
    """
    return not text.position_offset or tokenizer.id_of("pad_token") == text.position_offset - 1


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


def load_text(
    spec: str | os.PathLike[str], device: str | torch.device | None = None, precision: Precision = "fp32"
) -> TextPredictor:
    """Load a text model.

    Args:
        spec: see `open_text`.
        device: device of the weights; None for CUDA where it is available, else the CPU.
        precision: see `TextPredictor`.

    Raises:
        ModelError: If the model cannot be read or computed; the message names the file and the key.
        ValueError: If the precision is unknown, or this machine lacks the device.

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
    check_precision(precision)
    device = usable_device(device)
    checkpoint = open_text(spec)
    return TextPredictor(checkpoint.model().to(device), checkpoint.tokenizer(), checkpoint.spec, precision)
