"""The text encoder on captions beside padding, and beside open_clip's tower around transformers' BERT."""

import os
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dualenc.models import TextConfig, TextEncoder
from dualenc.tokens import Tokens
from tools.bench.runner import Result, Side, compare

CONTEXT = 77
PACKED, TO_77, TO_LONGEST = "packed", "padded to 77", "padded to the longest"
PEER_77, PEER_LONGEST = "HFTextEncoder, to 77", "HFTextEncoder, to the longest"
# The least times as fast: what was asked for.
ASKED = {TO_77: 6.0, TO_LONGEST: 1.3, PEER_77: 1.0, PEER_LONGEST: 1.0}


def text(
    layers: int = 12,
    width: int = 768,
    batch: int = 64,
    batches: int = 4,
    device: str = "cpu",
    rounds: int = 5,
    cores: int = 2,
    out: Path = Path("runs/bench"),
) -> None:
    """Real tokens a second, forward, and forward and backward; BERT-base with random weights, the same for all sides.

    In fp32; on CUDA all of them in bf16 under autocast too.

    Args:
        layers: of the encoder.
        width: of the encoder, 64 for each head.
        batch: captions in a batch.
        batches: in a round.
        device: "cpu" or "cuda".
        rounds: timed on each side, in turns.
        cores: of the CPU.
        out: folder for text-forward.json, text-training.json and their .md.
    """
    texts = captions(batch, batches)
    lengths = [len(ids) for one in texts for ids in one]
    longest = mean(max(map(len, one)) for one in texts)
    tell = (
        f"{batches} batches of {batch} captions, of {mean(lengths):.1f} tokens in the mean ({min(lengths)} to "
        f"{max(lengths)}; the longest of a batch {longest:.1f} in the mean): 7 and a negative binomial of mean 5 and "
        "variance 8, 40 at most, seed 0."
    )
    dtypes = ("fp32", "bf16") if device == "cuda" else ("fp32",)
    for name, backward in (("text-forward", False), ("text-training", True)):
        with tempfile.TemporaryDirectory() as folder:
            sides = [
                Side(
                    side if dtype == "fp32" else f"{side}, {dtype}",
                    partial(make, side, layers, width, batch, batches, backward, device, dtype, folder),
                )
                for dtype in dtypes
                for side in (PACKED, *ASKED)
            ]
            result = compare(name, "tokens", sides, TO_77, rounds, cores=cores)
            answers = {
                side.name: torch.load(Path(folder) / f"{side.name}.pt", weights_only=True)
                for side in sides
                if not side.name.endswith("bf16")
            }
        apart = {side: float((answers[PACKED] - answers[side]).abs().max()) for side in answers if side != PACKED}
        result.settings = {"layers": layers, "width": width, "batch": batch, "batches": batches, "device": device}
        result.facts["difference"] = apart
        result.notes = [
            f"{layers} layers of width {width}, no dropout, {'forward and backward' if backward else 'forward'}, on "
            f"{device}; {tell}",
            *(
                f"packed is {_times(result, side, ''):.2f} times {side} (asked: {least:g})"
                for side, least in ASKED.items()
            ),
            *(
                f"bf16: packed is {_times(result, side, ', bf16'):.2f} times {side}"
                for side in ASKED
                if len(dtypes) > 1
            ),
            f"The vectors of the first batch's captions are at most {max(apart.values()):.1e} apart, in fp32.",
        ]
        result.write(out)


def _times(result: Result, side: str, dtype: str) -> float:
    """How many times as fast the packed encoder is, within each round."""
    rates = zip(result.rates(PACKED + dtype), result.rates(side + dtype))
    return median(mine / other for mine, other in rates)


def captions(batch: int, batches: int) -> list[list[list[int]]]:
    """Token ids of captions as long as those of COCO, special tokens included: a mean of 12, between 7 and 40."""
    rng = np.random.default_rng(0)
    more = rng.negative_binomial(25 / 3, 5 / 8, (batches, batch))  # of mean 5 and variance 8
    return [[rng.integers(1000, 30_000, n).tolist() for n in row] for row in np.minimum(7 + more, 40).tolist()]


def make(
    side: str,
    layers: int,
    width: int,
    batch: int,
    batches: int,
    backward: bool,
    device: str,
    dtype: str,
    folder: str,
) -> Callable[[], float]:
    """A side's round; the first one leaves the vectors of the first batch in the folder."""
    if device == "cpu":
        torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    config = TextConfig(width=width, layers=layers, heads=width // 64, context_length=512, types=2)
    encoder = TextEncoder(config).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    texts = captions(batch, batches)
    model, embed, inputs = (
        _peer(encoder, side, texts) if side in (PEER_77, PEER_LONGEST) else _ours(encoder, side, texts)
    )
    model.to(device)
    inputs = [tuple(x.to(device) for x in one) for one in inputs]
    toward = torch.randn(batch, width).to(device)
    count = float(sum(len(ids) for one in texts for ids in one))
    name = side if dtype == "fp32" else f"{side}, {dtype}"

    def run() -> float:
        first = None
        for one in inputs:
            model.zero_grad()
            with torch.set_grad_enabled(backward), torch.autocast(device, torch.bfloat16, enabled=dtype == "bf16"):
                vectors = embed(*one)
            if backward:
                (vectors * toward).sum().backward()
            first = vectors.detach().cpu() if first is None else first
        if device == "cuda":
            torch.cuda.synchronize()
        if not (path := Path(folder) / f"{name}.pt").exists():
            torch.save(first, path)
        return count

    return run


def _padded(texts: list[list[int]], length: int) -> Tensor:
    """(B, length), with 0 in the padding."""
    return torch.stack([F.pad(torch.tensor(ids), (0, length - len(ids))) for ids in texts])


def _ours(encoder: TextEncoder, side: str, texts: list[list[list[int]]]) -> tuple[Any, Any, list[Any]]:
    """The model, what embeds a batch, and the batches."""
    if side == PACKED:
        return encoder, lambda tokens: encoder.pool(encoder(tokens), tokens), [(Tokens.pack(one),) for one in texts]

    def embed(ids: Tensor) -> Tensor:
        mask = ids != 0
        return encoder.pool_padded(encoder.forward_padded(ids, mask), mask)

    return encoder, embed, [(_padded(one, CONTEXT if side == TO_77 else max(map(len, one))),) for one in texts]


def _peer(encoder: TextEncoder, side: str, texts: list[list[list[int]]]) -> tuple[Any, Any, list[Any]]:
    """open_clip's tower, of transformers' BERT with the weights of ours."""
    from open_clip.hf_model import HFTextEncoder
    from transformers import BertConfig

    config = encoder.config
    with tempfile.TemporaryDirectory() as folder:
        BertConfig(
            hidden_size=config.width,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            intermediate_size=4 * config.width,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ).save_pretrained(folder)
        pooler = "cls_last_hidden_state_pooler"  # without BERT's own dense layer, which ours has not either
        tower = HFTextEncoder(folder, config.width, pooler_type=pooler, pretrained=False).eval()
    tower.transformer.load_state_dict(_bert(encoder.state_dict()), strict=True)
    inputs = [(_padded(one, CONTEXT if side == PEER_77 else max(map(len, one))),) for one in texts]
    return tower, tower, inputs


def _bert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our weights under the names of transformers' BertModel."""
    names = {
        "embeddings.token_embeddings": "embeddings.word_embeddings",
        "embeddings.position_embeddings": "embeddings.position_embeddings",
        "embeddings.segment_embeddings": "embeddings.token_type_embeddings",
        "embeddings.norm": "embeddings.LayerNorm",
        "attention.out": "attention.output.dense",
        "attention_norm": "attention.output.LayerNorm",
        "mlp.0": "intermediate.dense",
        "mlp.2": "output.dense",
        "mlp_norm": "output.LayerNorm",
    }
    found = {}
    for name, x in state.items():
        module, _, kind = name.rpartition(".")
        if module in names:
            found[f"{names[module]}.{kind}"] = x
            continue
        _, number, part = module.split(".", 2)
        layer = f"encoder.layer.{number}"
        if part == "attention.qkv":
            for one, piece in zip(("query", "key", "value"), x.chunk(3)):
                found[f"{layer}.attention.self.{one}.{kind}"] = piece
        else:
            found[f"{layer}.{names[part]}.{kind}"] = x
    return found
