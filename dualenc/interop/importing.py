"""Models in: read, compared with what their own library makes of the same inputs, and only then given out."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dualenc.data.text.tokenizer import Tokenizer
from dualenc.inference.embedder import Embedder
from dualenc.inference.text_model import TextPredictor
from dualenc.interop.exporting import verify_text
from dualenc.interop.reading import DualCheckpoint, join, open_dual
from dualenc.interop.verify import UNCLEAN, Inputs, Verified, make_inputs, outputs_of, verify
from dualenc.models.dual_encoder import MAX_SCALE, unit
from dualenc.models.heads import TextModel
from dualenc.models.tower import evaluating
from dualenc.utils.errors import ModelError

TOLERANCE = 2e-5


@dataclass(frozen=True)
class Imported:
    """A model of another library as one of ours.

    Attributes:
        embedder: the model.
        verified: what was compared.
        notes: what is not as it was, in words.
    """

    embedder: Embedder
    verified: list[Verified]
    notes: list[str]

    def lines(self) -> list[str]:
        """For the screen."""
        lines = [line for one in self.verified for line in one.lines()]
        return lines + [f"not as it was: {note}" for note in self.notes]


def import_model(
    spec: str,
    text: str | None = None,
    embed_dim: int = 512,
    seed: int = 0,
    more: Callable[[Embedder], Inputs] = make_inputs,
) -> Imported:
    """Reads a dual encoder of another library, and checks it with that library.

    Args:
        spec: see `dualenc.interop.reading.open_dual`; or `timm:NAME[/FILE]` for an image tower to be joined
            with a text.
        text: a text checkpoint, see `dualenc.load_text`, to be joined with that tower.
        embed_dim, seed: of the projections that join them.
        more: what both sides are given.

    Raises:
        ModelError: it cannot be read, or not be checked; or the library makes something else of the inputs.
    """
    if spec.startswith("timm:") != (text is not None):
        raise ModelError(f"{spec}: timm:NAME is joined with the text tower that --text names, others have their own")
    if text is not None:
        return _joined(join(spec, text, embed_dim, seed), text, more)
    checkpoint = open_dual(spec)
    embedder = checkpoint.embedder()
    assert isinstance(embedder.tokenizer, Tokenizer)
    notes, logits = list(checkpoint.notes), embedder.dual_encoder.logits
    factor = logits.logit_scale.exp().item()
    logits.clamp_scale()
    inputs = more(embedder)
    inputs = replace(inputs, texts=[*inputs.texts, *UNCLEAN])
    ours = outputs_of(embedder, inputs)
    if factor > MAX_SCALE * (1 + TOLERANCE) and ours["scale"].item() < factor:  # as CLIP's own is in half precision
        notes.append(f"the temperature's factor is {ours.pop('scale').item():.4g}, dualenc's largest, not {factor:.6g}")
    verified = [
        verify(library, model, inputs, ours, TOLERANCE, tokenizer=embedder.tokenizer)
        for library, model in checkpoint.peers
    ]
    return Imported(embedder, verified, notes)


def _joined(checkpoint: DualCheckpoint, text: str, more: Callable[[Embedder], Inputs]) -> Imported:
    """Each tower by itself: what is above them is nobody's yet."""
    embedder = checkpoint.embedder()
    inputs, verified = more(embedder), []
    for library, model in checkpoint.peers:
        if library == "timm":
            with evaluating(embedder.model), torch.no_grad():
                features = unit(embedder.dual_encoder.image(inputs.pixels)).numpy()
            verified.append(verify(library, model, inputs, {"features": features}, TOLERANCE))
        else:
            encoder = TextModel(embedder.dual_encoder.config.text)
            encoder.encoder.load_state_dict(embedder.dual_encoder.text.state_dict())
            assert isinstance(embedder.tokenizer, Tokenizer)
            verified.append(verify_text(TextPredictor(encoder.eval(), embedder.tokenizer, text), Path(model)))
    notes = ["the projections are random: train them before the embeddings mean anything"]
    return Imported(embedder, verified, [*notes, *checkpoint.notes])
