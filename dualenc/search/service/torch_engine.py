"""The engine of models that torch runs: dual encoders, and text models."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from dualenc.data.images import decode_image
from dualenc.inference.embedder import Embedder
from dualenc.inference.text_model import TextPredictor
from dualenc.inference.text_tower import TextTower
from dualenc.search.service.engine import Engine, Scores


class TorchEngine(Engine):
    """A dual encoder or a text model, run by torch; see `Engine`.

    Args:
        model: the model.
        name: name of the model in answers.
    """

    def __init__(self, model: Embedder | TextPredictor, name: str) -> None:
        self.model, self.tower, self.name, self.fingerprint = model, TextTower(model), name, model.fingerprint
        self.images = isinstance(model, Embedder)
        if isinstance(model, Embedder):
            scale, bias = (None if x is None else float(x.detach()) for x in model.model.logits())
            self.scale, self.bias = scale, bias
            self.dims = model.model.embed_dim
        else:
            settings = model.model.vectors
            self.dims = min(settings.dim or model.model.embedding_width, model.model.embedding_width)
            heads = model.model.heads_for("text-classification")
            if len(heads) == 1 and model.model.head_configs[heads[0]].problem != "regression":
                self.labels = tuple(model.model.head_configs[heads[0]].labels)

    def prepare(self, data: bytes) -> Any:
        """See `Engine.prepare`."""
        assert isinstance(self.model, Embedder)
        return self.model.preprocess(decode_image(data))

    def embed_pictures(self, pictures: Sequence[Any]) -> np.ndarray:
        """See `Engine.embed_pictures`."""
        assert isinstance(self.model, Embedder)
        return self.model.embed_images(torch.stack(list(pictures)), numpy=True)

    def embed_texts(self, texts: Sequence[str], prompt: str | None = None) -> np.ndarray:
        """See `Engine.embed_texts`."""
        return self.tower.embed(texts, prompt).numpy()

    def count_tokens(self, texts: Sequence[str]) -> int:
        """See `Engine.count_tokens`."""
        before = self.tower.prompt()
        return sum(len(ids) for ids in self.model.tokenizer.encode([before + text for text in texts]))

    def label(self, texts: Sequence[str]) -> list[Scores]:
        """See `Engine.label`."""
        assert isinstance(self.model, TextPredictor)
        return [list(found["scores"].items()) for found in self.model.classify(list(texts))]
