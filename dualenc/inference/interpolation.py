"""Interpolation between the weights of two models of one architecture."""

import copy

import torch

from dualenc.inference.embedder import Embedder, difference
from dualenc.utils.errors import ModelError


def interpolate(first: Embedder, second: Embedder, alpha: float) -> Embedder:
    """Interpolate the weights of two models: (1 - alpha) * first + alpha * second (Wortsman et al. 2022, section 3).

    Args:
        first: the first model, whose architecture, tokenizer and preprocessing the result has.
        second: a model that differs from it in weights and dropout only, such as the first after fine-tuning.
        alpha: weight of the second model; 0 and 1 give the weights of the first and the second to the bit.

    Raises:
        ModelError: If the models differ in more, or alpha is not between 0 and 1.
    """
    if not 0 <= alpha <= 1:
        raise ModelError(f"alpha {alpha} must lie between 0 and 1")
    found = difference(first, second, apart=["text.dropout"])
    if not found and first.tokenizer.fingerprint != second.tokenizer.fingerprint:
        found = "their tokenizers"
    if found:
        raise ModelError(
            f"{first.name} and {second.name} differ: {found}; only models of one architecture can be interpolated"
        )
    others, weights = second.dual_encoder.state_dict(), {}
    for name, x in first.dual_encoder.state_dict().items():
        y = others[name].to(x.device)
        if not x.is_floating_point():
            if not torch.equal(x, y):
                raise ModelError(f"{first.name} and {second.name} differ: {name}, which is not a weight")
            weights[name] = x
        elif alpha in (0, 1):  # The weighted sum would lose the sign of a zero.
            weights[name] = y if alpha else x
        else:
            weights[name] = ((1 - alpha) * x.double() + alpha * y.double()).to(x.dtype)
    model = copy.deepcopy(first.dual_encoder)
    model.load_state_dict(weights)
    name = f"{1 - alpha:g} {first.name} + {alpha:g} {second.name}"
    return Embedder(model, first.tokenizer, first.preprocess, name=name)
