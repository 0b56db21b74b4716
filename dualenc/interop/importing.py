"""Import of models: each is read and compared with its own library before it is returned."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dualenc.inference.embedder import Embedder
from dualenc.inference.text_model import TextPredictor
from dualenc.interop import references
from dualenc.interop.inputs import UNCLEAN, Inputs, make_inputs, make_text_inputs, outputs_of, parts_of
from dualenc.interop.reading import DualCheckpoint, join, open_dual
from dualenc.interop.transformers import check_text
from dualenc.interop.verify import Check, Verified, verify
from dualenc.models.dual_encoder import MAX_SCALE, unit
from dualenc.models.heads import TextModel
from dualenc.models.tower import evaluating
from dualenc.utils.errors import ModelError

TOLERANCE = 2e-5


@dataclass(frozen=True)
class Imported:
    """Result of an import.

    Attributes:
        embedder: the model.
        verified: the comparisons with other libraries.
        notes: differences from the model that was imported.
    """

    embedder: Embedder
    verified: list[Verified]
    notes: list[str]

    def lines(self) -> list[str]:
        """Return a summary for the terminal."""
        lines = [line for one in self.verified for line in one.lines()]
        return lines + [f"changed by the import: {note}" for note in self.notes]


def import_model(
    spec: str,
    text: str | None = None,
    embed_dim: int = 512,
    seed: int = 0,
    draw: Callable[[Embedder], Inputs] = make_inputs,
) -> Imported:
    """Read a dual encoder of another library, and check it with that library.

    Args:
        spec: see `dualenc.interop.reading.open_dual`; or `timm:NAME[/FILE]` for an image tower to join with `text`.
        text: a text checkpoint to join with the image tower; see `dualenc.load_text`.
        embed_dim, seed: dimensions and random seed of the projections that join them.
        draw: makes the inputs that both libraries get.

    Raises:
        ModelError: If the model cannot be read or checked, or the outputs of the library differ.
    """
    if spec.startswith("timm:") != (text is not None):
        raise ModelError(
            f"{spec}: timm:NAME needs --text with a text tower to join, and other models do not take --text"
        )
    if text is not None:
        return _joined(join(spec, text, embed_dim, seed), text, draw)
    checkpoint = open_dual(spec)
    embedder = checkpoint.embedder()
    tokenizer, _ = parts_of(embedder)
    notes, logits = list(checkpoint.notes), embedder.dual_encoder.logits
    factor = logits.logit_scale.exp().item()
    logits.clamp_scale()
    inputs = draw(embedder)
    inputs = replace(inputs, texts=[*inputs.texts, *UNCLEAN])
    ours = outputs_of(embedder, inputs)
    if factor > MAX_SCALE * (1 + TOLERANCE) and ours["scale"].item() < factor:  # the scale of CLIP in half precision
        notes.append(f"the logit scale is {ours.pop('scale').item():.4g}, dualenc's largest, not {factor:.6g}")
    with checkpoint.readable_peers() as peers:
        verified = [verify(Check(one, model, inputs, ours, tokenizer), TOLERANCE) for one, model in peers]
    return Imported(embedder, verified, notes)


def _joined(checkpoint: DualCheckpoint, text: str, draw: Callable[[Embedder], Inputs]) -> Imported:
    """Check each tower with its own library; the projections above them are new."""
    embedder = checkpoint.embedder()
    tokenizer, _ = parts_of(embedder)
    inputs, verified = draw(embedder), []
    with checkpoint.readable_peers() as peers:
        for reference, model in peers:
            if reference is references.TIMM:
                with evaluating(embedder.model), torch.no_grad():
                    features = unit(embedder.dual_encoder.image(inputs.pixels)).numpy()
                check = Check(reference, model, inputs, {"features": features})
            else:
                encoder = TextModel(embedder.dual_encoder.config.text)
                encoder.encoder.load_state_dict(embedder.dual_encoder.text.state_dict())
                predictor = TextPredictor(encoder.eval(), tokenizer, text)
                check = check_text(predictor, Path(model), make_text_inputs(predictor))
            verified.append(verify(check, TOLERANCE))
    notes = ["the projections are random: train them before the embeddings mean anything"]
    return Imported(embedder, verified, [*notes, *checkpoint.notes])
