"""Helpers of several tests: small images, shards written by webdataset itself, tiny models, evaluation sets."""

import io
import json
import math
import random
import shutil
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import webdataset as wds
from lightning.pytorch import Callback
from PIL import Image
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from torch import Tensor

import dualenc.data.shards.shard as index_module
from dualenc.data import Augment, Preprocess, Tokenizer
from dualenc.inference.embedder import Embedder
from dualenc.losses import clip_loss
from dualenc.models import DualEncoder, ImageConfig, TextConfig
from dualenc.training.checkpoint import checkpoint_path

WORDS = [
    "a",
    "cat",
    "dog",
    "sits",
    "runs",
    "on",
    "the",
    "red",
    "blue",
    "mat",
    "tree",
    "with",
    "two",
    "hats",
    "and",
    "boats",
]
SIZE = 16
ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"  # real data next to the checkout, which may be missing
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="no shared/data next to the checkout")


def tokenizer_of(kind: Any, texts: Sequence[str], vocab_size: int, context_length: int) -> Tokenizer:
    """Train a tokenizer; a Unigram model (Kudo 2018), which dualenc only reads, is built of frequent substrings."""
    if kind != "unigram":
        return Tokenizer.train(texts, vocab_size, context_length, kind)
    space = normalizers.Replace(Regex(r"\s+"), " ")
    clean = normalizers.Sequence([normalizers.NFKC(), space, normalizers.Strip(), normalizers.Lowercase()])
    split = pre_tokenizers.Metaspace()
    words = [word for text in texts for word, _ in split.pre_tokenize_str(clean.normalize_str(text))]
    counts = Counter(
        word[i:j] for word in words for i in range(len(word)) for j in range(i + 1, min(len(word), i + 9) + 1)
    )
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    repeated = [piece for piece in counts if len(piece) == 1 or counts[piece] > 1]
    pieces = sorted(repeated, key=lambda piece: (len(piece) > 1, -len(piece) * counts[piece], piece))
    scores = [(piece, math.log(counts[piece] / counts.total())) for piece in pieces[: vocab_size - len(special)]]
    backend = Backend(models.Unigram([*((token, 0.0) for token in special), *scores], unk_id=1))
    backend.normalizer, backend.pre_tokenizer, backend.decoder = clean, split, decoders.Metaspace()  # type: ignore[assignment]
    backend.add_special_tokens(special)
    backend.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return Tokenizer(backend, context_length)


def pixels(rng: np.random.Generator, height: int = 8, width: int = 8, channels: int = 3) -> np.ndarray:
    """Return random noise (H, W, C) uint8."""
    return rng.integers(0, 256, (height, width, channels), dtype=np.uint8)


def smooth(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Return a smooth random image (H, W, 3) uint8, similar to a photo."""
    coarse = Image.fromarray(pixels(rng, 5, 5))
    return np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC))


def encode(image: np.ndarray | Image.Image, kind: str = "png", **options: Any) -> bytes:
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    file = io.BytesIO()
    image.save(file, kind.upper().replace("JPG", "JPEG"), **options)
    return file.getvalue()


def caption(rng: np.random.Generator) -> str:
    return " ".join(rng.choice(WORDS, int(rng.integers(1, 9))))


def write_tar(path: Path, samples: Sequence[Mapping[str, Any]], **options: Any) -> str:
    """Write a shard of samples `{"__key__": ..., extension: bytes}` with webdataset's own writer."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with wds.TarWriter(str(path), encoder=False, **options) as tar:
        for sample in samples:
            tar.write(dict(sample))
    return str(path)


def write_shards(folder: Path, layout: Sequence[int], seed: int, captions: int = 1) -> list[str]:
    """Write shards with `layout[i]` samples in shard i: `.png`, `.txt` and a `.json` with this many captions."""
    rng = np.random.default_rng(seed)
    paths, number = [], 0
    for i, count in enumerate(layout):
        samples = []
        for _ in range(count):
            texts = [f"{caption(rng)} {n}" for n in range(captions)]
            fields = {"captions": texts, "width": int(rng.integers(1, 500)), "number": number}
            samples.append({
                "__key__": f"{number:06d}",
                "png": encode(pixels(rng)),
                "txt": texts[0].encode(),
                "json": json.dumps(fields).encode(),
            })  # fmt: skip
            number += 1
        paths.append(write_tar(folder / f"part-{i:03d}.tar", samples))
    return paths


def write_texts(folder: Path, seed: int, count: int = 80) -> None:
    """Write text files: `plain.txt`; `labels.tsv`, whose label is a word of the text; `pairs.jsonl`, with a score."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plain.txt").write_text("".join(f"{caption(rng)} {n}\n" for n in range(count)))
    rows = [("good", "bad")[int(rng.integers(2))] for _ in range(count)]
    lines = [f"a {mood} {caption(rng)} {n}\t{mood}\n" for n, mood in enumerate(rows)]
    (folder / "labels.tsv").write_text("text\tlabel\n" + "".join(lines))
    with open(folder / "pairs.jsonl", "w") as file:
        for _ in range(count):
            fields = {"text": caption(rng), "other": caption(rng), "score": float(rng.uniform(0, 5))}
            file.write(json.dumps(fields) + "\n")


def write_documents(folder: Path, corpus: Any, queries: Any, qrels: Sequence[str], split: str = "dev") -> Path:
    """Write a folder in the layout of BEIR; a document or query that is a text is written unchanged."""
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    for name, lines in (("corpus", corpus), ("queries", queries)):
        text = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines]
        (folder / f"{name}.jsonl").write_text("\n".join(text) + "\n", "utf-8")
    lines = ["query-id\tcorpus-id\tscore", *qrels]
    (folder / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n", "utf-8")
    return folder


def tiny_tokenizer(context_length: int = 12) -> Tokenizer:
    return Tokenizer.train([" ".join(WORDS), "0 1 2 3 4 5 6 7 8 9 . photo of class"], 200, context_length)


def tiny_embedder(seed: int, **config: Any) -> Embedder:
    """Return a small dual encoder with random parameters: initial LayerNorms and zero biases would hide mistakes."""
    tokenizer = tiny_tokenizer()
    vit = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    generator = torch.Generator().manual_seed(seed)
    model = DualEncoder(
        ImageConfig("vit_tiny_patch16_224", SIZE, vit),
        TextConfig(tokenizer.vocab_size, width=16, layers=1, heads=2, context_length=tokenizer.context_length),
        embed_dim=8,
        **config,
    )
    with torch.no_grad():
        for parameter in model.image.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        for parameter in model.text.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    preprocess = Preprocess(SIZE, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25))
    return Embedder(model.eval(), tokenizer, preprocess)


def brute_force(queries: Tensor, candidates: Tensor, positives: Tensor) -> list[int]:
    """Compute ranks by their definition, pair by pair, in float64; a difference below 1e-12 is a tie and counts."""
    ranks = []
    for query, own in zip(queries.double(), positives.reshape(len(queries), -1).tolist(), strict=True):
        own = {i for i in own if i >= 0}
        scores = [math.fsum((query * candidate).tolist()) for candidate in candidates.double()]
        best = max(scores[i] for i in own)
        ranks.append(sum(score >= best - 1e-12 for i, score in enumerate(scores) if i not in own))
    return ranks


def unit(*shape: int) -> Tensor:
    """Return random rows of unit length, float64."""
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1)


class Shake:
    """A random transform that draws from torch's and from Python's generator."""

    def __init__(self, size: int = 8) -> None:
        self.crop = Augment(size, scale=(0.3, 1.0))

    def __call__(self, image: Tensor) -> Tensor:
        image = self.crop(image)
        return image.flip(-1) if random.random() < 0.5 else image


def write_benchmark(
    folder: Path,
    seed: int,
    kind: str = "classification",
    *,
    counts: Sequence[int] = (3, 4),
    classes: int = 6,
    split: str = "test",
) -> Path:
    """Write a set in the layout of CLIP_benchmark, with `counts[i]` samples in shard i."""
    rng = np.random.default_rng(seed)
    (folder / split).mkdir(parents=True, exist_ok=True)
    (folder / split / "nshards.txt").write_text(str(len(counts)))
    if kind != "classification":
        (folder / "dataset_type.txt").write_text(kind + "\n")
    if kind != "retrieval":
        (folder / "classnames.txt").write_text("\n".join(f"class {i}" for i in range(classes)) + "\n")
        (folder / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\nthe {c}\n")
    number = 0
    for i, count in enumerate(counts):
        samples = []
        for _ in range(count):
            sample: dict[str, Any] = {"__key__": f"s{number:05d}", "jpg": encode(smooth(rng, 20, 24), "jpeg")}
            if kind == "classification":
                sample["cls"] = str(number % classes).encode()
            elif kind == "multilabel":
                file = io.BytesIO()
                np.save(file, (rng.random(classes) < 0.4).astype(np.int64))
                sample["npy"] = file.getvalue()
            else:
                sample["txt"] = "\n".join(caption(rng) for _ in range(1 + number % 3)).encode()
            samples.append(sample)
            number += 1
        write_tar(folder / split / f"{i}.tar", samples)
    return folder


def write_choices(folder: Path, seed: int, count: int = 12) -> list[dict[str, Any]]:
    """Write a set in Winoground's layout, and return its lines."""
    rng = np.random.default_rng(seed)
    (folder / "images").mkdir(parents=True)
    lines = []
    for i in range(count):
        for j in range(2):
            (folder / "images" / f"ex_{i}_img_{j}.png").write_bytes(encode(smooth(rng, 20, 24)))
        lines.append({"id": i} | {f"image_{j}": f"ex_{i}_img_{j}" for j in range(2)})
        lines[-1] |= {f"caption_{j}": f"{caption(rng)} {i} {j}" for j in range(2)}
    (folder / "examples.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return lines


def forget_copies(cache: Path) -> None:
    """Remove the copies of remote shards from a cache, but not the indexes."""
    for thread in threading.enumerate():
        if thread.name == "prefetch":  # of a finished epoch; it may hold the lock of a copy that is removed here
            thread.join(30)
    shutil.rmtree(cache / "shards", ignore_errors=True)
    index_module._OPEN_FILES.clear()


class StopAt(Callback):
    """Callback that ends a run after a step with a checkpoint, as a stopped run does."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(checkpoint_path(Path(trainer.default_root_dir) / "checkpoints", self.step))
            raise KeyboardInterrupt


def upside_down_loss(
    image: Tensor, text: Tensor, scale: Tensor, bias: Tensor | None = None, *, group: Any = None
) -> Tensor:
    """Compute a loss from outside the package, which is always negative."""
    return -clip_loss(image, text, scale, group=group) - 1


def perturb(model: Any, size: float = 0.1) -> Any:
    """Change every parameter, in eval mode: initial LayerNorms and zero biases would hide mistakes."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * size)
    return model.eval()
