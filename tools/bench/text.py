"""Benchmark of the text encoder on packed captions, against padding and against open_clip's tower with transformers."""

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
# Other side -> the least factor by which packed text should be faster.
TARGETS = {TO_77: 6.0, TO_LONGEST: 1.3, PEER_77: 1.0, PEER_LONGEST: 1.0}


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
    """Measure the tokens per second, padding not counted, of forward, and of forward and backward.

    The encoder is BERT-base with random weights, the same for all sides, in fp32; on CUDA also in bf16 under autocast.

    Args:
        layers: layers of the encoder.
        width: width of the encoder, with 64 features per head.
        batch: captions in a batch.
        batches: batches in a round.
        device: "cpu" or "cuda".
        rounds: timed rounds of each side.
        cores: CPU cores of each side.
        out: folder for text-forward.json, text-training.json and their .md.
    """
    texts = captions(batch, batches)
    lengths = [len(ids) for captions_of_batch in texts for ids in captions_of_batch]
    longest = mean(max(map(len, captions_of_batch)) for captions_of_batch in texts)
    about_captions = (
        f"{batches} batches of {batch} captions of {mean(lengths):.1f} tokens on average ({min(lengths)} to "
        f"{max(lengths)}; the longest of a batch {longest:.1f} on average): 7 plus a negative binomial of mean 5 and "
        "variance 8, at most 40, seed 0."
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
                for side in (PACKED, *TARGETS)
            ]
            result = compare(name, "tokens", sides, TO_77, rounds, cores=cores)
            vectors = {
                side.name: torch.load(Path(folder) / f"{side.name}.pt", weights_only=True)
                for side in sides
                if not side.name.endswith("bf16")
            }
        differences = {side: float((vectors[PACKED] - x).abs().max()) for side, x in vectors.items() if side != PACKED}
        result.settings = {"layers": layers, "width": width, "batch": batch, "batches": batches, "device": device}
        result.facts["difference"] = differences
        result.notes = [
            f"{layers} layers of width {width}, no dropout, {'forward and backward' if backward else 'forward'}, on "
            f"{device}; {about_captions}",
            *(
                f"packed is {_speedup(result, side, ''):.2f} times as fast as {side} (target: {target:g})"
                for side, target in TARGETS.items()
            ),
            *(
                f"bf16: packed is {_speedup(result, side, ', bf16'):.2f} times as fast as {side}"
                for side in TARGETS
                if len(dtypes) > 1
            ),
            f"The vectors of the first batch differ by at most {max(differences.values()):.1e} in fp32.",
        ]
        result.write(out)


def _speedup(result: Result, side: str, dtype: str) -> float:
    """Return the rate of packed text divided by a side's, the median over rounds.

    Args:
        result: result of the benchmark.
        side: the other side.
        dtype: suffix of the sides' names, "" for fp32.
    """
    rates = zip(result.rates(PACKED + dtype), result.rates(side + dtype))
    return median(mine / other for mine, other in rates)


def captions(batch: int, batches: int) -> list[list[list[int]]]:
    """Draw token ids of captions with the lengths of COCO's, special tokens included: 12 on average, from 7 to 40.

    Returns:
        The ids of each caption of each batch.
    """
    rng = np.random.default_rng(0)
    more = rng.negative_binomial(25 / 3, 5 / 8, (batches, batch))  # mean 5, variance 8
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
    """Build the round of a side; the first round saves the vectors of the first batch in the folder.

    Args:
        side: name of the side.
        layers: layers of the encoder.
        width: width of the encoder.
        batch: captions in a batch.
        batches: batches in a round.
        backward: True to run backward too.
        device: "cpu" or "cuda".
        dtype: "fp32" or "bf16".
        folder: folder of the saved vectors.

    Returns:
        Function that runs a round and returns the number of tokens.
    """
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
    inputs = [tuple(x.to(device) for x in arguments) for arguments in inputs]
    gradient = torch.randn(batch, width).to(device)
    count = float(sum(len(ids) for captions_of_batch in texts for ids in captions_of_batch))
    name = side if dtype == "fp32" else f"{side}, {dtype}"

    def run() -> float:
        first = None
        for arguments in inputs:
            model.zero_grad()
            with torch.set_grad_enabled(backward), torch.autocast(device, torch.bfloat16, enabled=dtype == "bf16"):
                vectors = embed(*arguments)
            if backward:
                (vectors * gradient).sum().backward()
            first = vectors.detach().cpu() if first is None else first
        if device == "cuda":
            torch.cuda.synchronize()
        if not (path := Path(folder) / f"{name}.pt").exists():
            torch.save(first, path)
        return count

    return run


def _padded(texts: list[list[int]], length: int) -> Tensor:
    """Pad the ids of some texts with 0 to a length and stack them to (B, length)."""
    return torch.stack([F.pad(torch.tensor(ids), (0, length - len(ids))) for ids in texts])


def _ours(encoder: TextEncoder, side: str, texts: list[list[list[int]]]) -> tuple[Any, Any, list[Any]]:
    """Return our encoder, a function that embeds a batch, and the arguments of that function for each batch."""
    if side == PACKED:
        return encoder, lambda tokens: encoder.pool(encoder(tokens), tokens), [(Tokens.pack(ids),) for ids in texts]

    def embed(ids: Tensor) -> Tensor:
        mask = ids != 0
        return encoder.pool_padded(encoder.forward_padded(ids, mask), mask)

    return encoder, embed, [(_padded(ids, CONTEXT if side == TO_77 else max(map(len, ids))),) for ids in texts]


def _peer(encoder: TextEncoder, side: str, texts: list[list[list[int]]]) -> tuple[Any, Any, list[Any]]:
    """Return the same for open_clip's tower with transformers' BERT, which gets the weights of our encoder."""
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
        pooler = "cls_last_hidden_state_pooler"  # Like our encoder, this pooler omits BERT's dense layer.
        tower = HFTextEncoder(folder, config.width, pooler_type=pooler, pretrained=False).eval()
    tower.transformer.load_state_dict(_bert(encoder.state_dict()), strict=True)
    inputs = [(_padded(ids, CONTEXT if side == PEER_77 else max(map(len, ids))),) for ids in texts]
    return tower, tower, inputs


def _bert(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of our encoder to the names of transformers' BertModel."""
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
            for projection, weight in zip(("query", "key", "value"), x.chunk(3)):
                found[f"{layer}.attention.self.{projection}.{kind}"] = weight
        else:
            found[f"{layer}.{names[part]}.{kind}"] = x
    return found
