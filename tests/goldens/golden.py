"""The golden fixtures: files and numbers of the version before the modules of the package were moved.

`PYTHONPATH=tests:. python tests/goldens/golden.py OUT` wrote them, in the folder `files`, with the package of then.
They are never written again: `test_goldens.py` holds every later version to them. `numbers.json` is what that version
computed.

All paths are relative, so the working folder must be that of the files.
"""

import hashlib
import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers import caption, encode, smooth, write_benchmark, write_tar
from runs import Process, callbacks

import dualenc
from dualenc import Embedder, EpochPlan, ImageConfig, Preprocess, ShardIndex, TextConfig, Tokenizer
from dualenc.cli import main
from dualenc.data import Augment
from dualenc.models import DualEncoder

FILES = Path(__file__).parent / "files"
SEED = 20261129
TEXTS = ["a cat on the red mat", "two dogs", "", "the dog runs with two boats and a blue hat on the tree"]
LAYOUTS = {
    "one shard": ([37], 8, 4, None),
    "windows": ([13, 7, 0, 21, 5, 9, 30], 6, 2, None),
    "sources": ([20, 11, 16, 40, 3], 5, 3, [(2, 1.0), (1, 2.5), (2, 0.3)]),
}
WIDE = {"width": 16, "layers": 2, "heads": 2, "context_length": 12}
VIT = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}


def digest(array: np.ndarray) -> str:
    return hashlib.blake2b(np.ascontiguousarray(array).tobytes(), digest_size=8).hexdigest()


def pictures(folder: Path) -> list[Path]:
    return sorted((folder / "pictures").glob("*"))


# Inputs


def write_inputs(folder: Path) -> None:
    rng = np.random.default_rng(SEED)
    (folder / "pictures").mkdir(parents=True)
    for name, (height, width) in {"wide": (20, 50), "tall": (60, 24), "small": (9, 11)}.items():
        kind = "png" if name == "small" else "jpeg"
        (folder / "pictures" / f"{name}.{kind}").write_bytes(encode(smooth(rng, height, width), kind))
    number = 0
    for name, layout in {"shards": [16, 12, 9], "held_out": [8]}.items():
        for i, count in enumerate(layout):
            samples = []
            for _ in range(count):
                texts = [f"{caption(rng)} {n}" for n in range(3)]
                fields = {"captions": texts, "width": int(rng.integers(1, 500)), "number": number}
                samples.append({
                    "__key__": f"{number:06d}", "jpg": encode(smooth(rng, 12, 14), "jpeg"), "txt": texts[0].encode(),
                    "json": json.dumps(fields).encode(),
                })  # fmt: skip
                number += 1
            write_tar(folder / name / f"part-{i:03d}.tar", samples, mtime=0)
    for kind in ("classification", "retrieval"):
        write_benchmark(folder / "sets" / kind, SEED, kind, counts=(4, 3))
    (folder / "texts").mkdir()
    (folder / "texts" / "plain.txt").write_text("".join(f"{caption(rng)} {n}\n" for n in range(60)))
    moods = [("good", "bad")[int(rng.integers(2))] for _ in range(60)]
    lines = "".join(f"a {mood} {caption(rng)}\t{mood}\t{n % 5}\n" for n, mood in enumerate(moods))
    (folder / "texts" / "labels.tsv").write_text(f"text\tlabel\tstars\n{lines}")
    tags = ["|".join(tag for tag in ("x", "y") if rng.random() < 0.5) for _ in range(60)]
    lines = "".join(f"{caption(rng)} {tag}\t{tag}\n" for tag in tags)
    (folder / "texts" / "tags.tsv").write_text(f"text\tlabel\n{lines}")
    pairs = [{"text": caption(rng), "other": caption(rng), "label": float(rng.uniform(0, 5))} for _ in range(60)]
    (folder / "texts" / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    captions = [text for _ in range(200) if (text := caption(rng))]
    Tokenizer.train(captions, 80, 12).save(folder / "tokenizer.json")


# Models


def perturb(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def write_models(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(folder / "tokenizer.json", 12)
    vocabulary = tokenizer.vocab_size
    plain = ImageConfig("vit_tiny_patch16_224", 16, VIT)
    attention = ImageConfig("vit_base_patch16_siglip_224", 16, VIT)
    relative = ImageConfig("vit_relpos_small_patch16_224", 16, VIT)
    clip = ImageConfig("vit_base_patch32_clip_quickgelu_224", 16, VIT, norm_eps=1e-5)
    of_clip = {"causal": True, "pool": "last", "norm": "pre", "activation": "quick_gelu", "norm_eps": 1e-5}
    kinds: dict[str, tuple[ImageConfig, dict[str, Any], dict[str, Any]]] = {
        "pre": (relative, {"norm": "pre", "pool": "mean"}, {}),
        "bert": (plain, {"types": 2, "dropout": 0.1}, {"projection": "mlp"}),
        "clip": (clip, of_clip, {}),
        "siglip": (attention, {"norm": "pre", "pool": "last", "pad_to": 12, "pad_id": 0}, {"logit_bias": True}),
        "rotary": (plain, {"norm": "pre", "positions": "rotary", "gated": True, "bias": False, "window": 4}, {}),
        "albert": (plain, {"embed_width": 8, "groups": 1}, {}),
    }
    for name, (image, text, more) in kinds.items():
        torch.manual_seed(SEED)
        config = TextConfig(vocabulary, **WIDE, **text)
        own = Tokenizer.from_file(folder / "tokenizer.json", 12, config.pad_to, config.pad_id)
        model = perturb(DualEncoder(image, config, embed_dim=8, **more))
        preprocess = Preprocess(16, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.25), resize="squash" if more else "shortest")
        Embedder(model, own, preprocess, name).save(folder / "models" / name)


def write_text_models(folder: Path) -> None:
    import transformers as hf

    vocabulary = Tokenizer.from_file(folder / "tokenizer.json", 12).vocab_size
    wide = {"vocab_size": vocabulary, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24}
    bert = {**wide, "num_hidden_layers": 2, "max_position_embeddings": 12}
    roberta = {**bert, "max_position_embeddings": 14, "type_vocab_size": 1, "pad_token_id": 1}
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "cls_token_id": 2, "sep_token_id": 3}
    of_modern = {**wide, **ids, "num_hidden_layers": 3, "max_position_embeddings": 12, "local_attention": 4}
    distil = {"vocab_size": vocabulary, "dim": 16, "n_heads": 2, "n_layers": 2, "hidden_dim": 24}
    distil |= {"max_position_embeddings": 12}
    labels = {"id2label": {0: "good", 1: "bad", 2: "so so"}, "label2id": {"good": 0, "bad": 1, "so so": 2}}
    several = {**labels, "problem_type": "multi_label_classification"}
    number = {"num_labels": 1, "problem_type": "regression"}
    of_clip = {**bert, "bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    of_siglip = {**bert, "bos_token_id": None, "eos_token_id": 3, "pad_token_id": 0}
    families: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "bert": (hf.BertForPreTraining, hf.BertConfig, bert),
        "bert_labels": (hf.BertForSequenceClassification, hf.BertConfig, {**bert, **labels}),
        "roberta": (hf.RobertaForMaskedLM, hf.RobertaConfig, roberta),
        "roberta_several": (hf.RobertaForSequenceClassification, hf.RobertaConfig, {**roberta, **several}),
        "albert": (hf.AlbertForMaskedLM, hf.AlbertConfig, {**bert, "embedding_size": 8, "num_hidden_groups": 1}),
        "distilbert": (hf.DistilBertForSequenceClassification, hf.DistilBertConfig, {**distil, **number}),
        "electra": (hf.ElectraForPreTraining, hf.ElectraConfig, {**bert, "embedding_size": 8}),
        "modernbert": (hf.ModernBertForMaskedLM, hf.ModernBertConfig, of_modern),
        "clip": (hf.CLIPTextModel, hf.CLIPTextConfig, of_clip),
        "siglip": (hf.SiglipTextModel, hf.SiglipTextConfig, of_siglip),
    }
    for name, (kind, config, fields) in families.items():
        torch.manual_seed(SEED)
        there = folder / "theirs"
        perturb(kind(config(**fields))).save_pretrained(there)
        shutil.copy(folder / "tokenizer.json", there / "tokenizer.json")
        dualenc.load_text(there).save(folder / "texts_models" / name)
        shutil.rmtree(there)


# Runs


def settings(kind: str) -> dict[str, Any]:
    """The configuration of a run of 20 steps, or of 21 where an epoch ends there."""
    size = Tokenizer.from_file("tokenizer.json", 12).vocab_size
    text = {"vocab_size": size, **WIDE}
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.003, "weight_decay": 0.1}}
    scheduler = {"class_path": "dualenc.training.WarmupCosine", "init_args": {"warmup": 2}}
    common = {"optimizer": optimizer, "scheduler": scheduler}
    trainer = {"max_steps": 20, "log_every_n_steps": 1, "accelerator": "cpu", "gradient_clip_val": 1.0, "devices": 1}
    pairs = {"train": "shards", "val": "held_out", "captions": "json.captions", "tokenizer": "tokenizer.json"}
    pairs |= {"batch_size": 4, "workers": 0}
    image = {"name": "vit_tiny_patch16_224", "img_size": 16, "overrides": VIT}
    contrastive = {"image": image, "embed_dim": 8, "patch_dropout": 0.25, **common}
    sigmoid = {"loss": "dualenc.losses.siglip_loss", "logit_bias": True, "duplicates": "mask", "mlm_weight": 0.5}
    heads = {
        "words": {"kind": "mlm", "weight": 0.5},
        "mood": {"kind": "classification", "labels": ["good", "bad"]},
        "tags": {"kind": "classification", "labels": ["x", "y"], "problem": "multi_label", "activation": None},
        "stars": {"kind": "classification", "labels": ["stars"], "problem": "regression", "pool": "mean"},
        "near": {"kind": "embedding", "problem": "negatives", "pool": "mean"},
    }
    files = {
        "words": {"files": "texts/plain.txt"},
        "mood": {"files": "texts/labels.tsv"},
        "tags": {"files": "texts/tags.tsv"},
        "stars": {"files": "texts/labels.tsv", "label": "stars"},
        "near": {"files": "texts/pairs.jsonl", "pair": "other"},
    }
    texts = {"val": 0.2, "tokenizer": "tokenizer.json", "batch_size": 8, "workers": 0}
    model, data = {
        "clip": (("ContrastiveTask", {**contrastive, "text": {**text, "dropout": 0.1}}), ("PairData", pairs)),
        "siglip": (
            ("ContrastiveTask", {**contrastive, **sigmoid, "text": {**text, "norm": "pre", "pool": "mean"}}),
            ("PairData", {**pairs, "micro_batch_size": 2}),
        ),
        "text": (
            ("TextTask", {"heads": heads, "text": text, **common}),
            ("TextData", {"train": files, "mix": "round_robin", **texts}),
        ),
        "electra": (
            ("ReplacedTokenTask", {"text": {**text, "types": 2, "family": "electra"}, "generator_size": 0.5, **common}),
            ("TextData", {"train": {"rtd": {"files": "texts/plain.txt"}}, **texts}),
        ),
    }[kind]
    return {
        "seed_everything": SEED % 1000,
        "trainer": {**trainer, "default_root_dir": f"runs/{kind}"},
        "run": {"every_n_steps": 4, "monitor": "val/mrr" if kind in ("clip", "siglip") else "val/none"},
        "model": {"class_path": f"dualenc.training.{model[0]}", "init_args": model[1]},
        "data": {"class_path": f"dualenc.training.{data[0]}", "init_args": data[1]},
    }


def fit(kind: str, out: Path, *, kill: int | None = None, resume: bool = False) -> None:
    """A run in a process of its own, with one thread.

    Args:
        kind: see `settings`.
        out: gets `KIND.yaml`, `KIND.log`, `KIND_rows` and the run directory `KIND`.
        kill: the step after which the process is killed.
        resume: continues the run that is there.
    """
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{kind}.yaml").write_text(json.dumps(settings(kind)))
    added: list[tuple[str, dict[str, Any]]] = [("Rows", {"folder": str(out / f"{kind}_rows")})]
    added += [("dualenc.training.EMA", {"decay": 0.9})] if kind == "clip" else []
    added += [] if kill is None else [("Kill", {"step": kill})]
    arguments = ["fit", "--config", str(out / f"{kind}.yaml"), *callbacks(*added)]
    arguments += ["--trainer.default_root_dir", str(out / kind), *(["--ckpt_path", "auto"] if resume else [])]
    found = Process(arguments, out / f"{kind}.log").wait()
    assert found == (0 if kill is None else -9), (out / f"{kind}.log").read_text()


def checkpoints(kind: str) -> list[Path]:
    """Those of the run that was killed, by step."""
    return sorted(Path("runs", kind, "checkpoints").glob("*.ckpt"))


def numbers_of_run(out: Path, kind: str) -> dict[str, Any]:
    """What a run measured, but for times, and the samples of its steps."""
    lines = (out / kind / "metrics.csv").read_text().splitlines()[1:]
    metrics = [line.split(",") for line in lines if "per_second" not in line]
    rows = [json.loads(line) for line in (out / f"{kind}_rows" / "0.jsonl").read_text().splitlines()]
    return {"metrics": [[int(step), name, float(value)] for step, name, value in metrics], "rows": rows}


# Numbers


def outputs(folder: Path) -> Iterator[tuple[str, Any]]:
    """What the models say, by name: nested lists of floats, strings."""
    for path in sorted((folder / "models").iterdir()):
        yield f"models/{path.name}", of_model(path)
    for path in sorted((folder / "texts_models").iterdir()):
        yield f"texts_models/{path.name}", of_text_model(path)
    for name in ("runs/text", "runs/electra"):
        yield name, of_text_model(folder / name)


def of_model(path: Path) -> dict[str, Any]:
    embedder = dualenc.load(path, "cpu")
    images = pictures(path.parents[1])
    return {
        "fingerprint": embedder.fingerprint,
        "images": embedder.embed_images(images).tolist(),
        "texts": embedder.embed_texts(TEXTS).tolist(),
        "classes": embedder.classify(images, ["cat", "dog"], scores="softmax").tolist(),
    }


def of_text_model(path: Path) -> dict[str, Any]:
    model = dualenc.load_text(path, "cpu")
    found: dict[str, Any] = {"embed": model.embed(TEXTS).tolist()}
    kinds = {name: head.kind for name, head in model.model.head_configs.items()}
    found["heads"] = sorted(kinds)
    for name, kind in kinds.items():
        if kind == "classification":
            found[name] = [list(answer.values()) for answer in model.classify(TEXTS, name)]
        if kind == "mlm":
            found[name] = [
                [one["token"], one["probability"]]
                for guesses in model.fill("a cat [MASK] the [MASK]")
                for one in guesses
            ]
    return found


def plans() -> dict[str, Any]:
    found = {}
    for name, (counts, batch, window, sources) in LAYOUTS.items():
        for epoch in (0, 1, 5):
            plan = EpochPlan(counts, SEED, epoch, batch, window, sources)
            found[f"{name}, epoch {epoch}"] = [plan[k].tolist() for k in range(len(plan))]
    return found


def augmentations(folder: Path) -> dict[str, Any]:
    """Augmented pictures, as nested lists of uint8, and the pictures as they are decoded."""
    from dualenc.data import decode_image

    settings = {
        "usual": {},
        "all": {"scale": (0.3, 1.5), "flip": 0.5, "rotate": 20.0, "hue": 0.2},
    }
    found = {}
    for path in pictures(folder):
        picture = decode_image(path.read_bytes())
        found[f"{path.name}, decoded"] = picture.tolist()
        found[f"{path.name}, evaluation"] = Preprocess(8)(picture).tolist()
        for name, options in settings.items():
            torch.manual_seed(SEED)
            random.seed(SEED)
            found[f"{path.name}, {name}"] = Augment(8, **options)(picture).tolist()
    return found


def of_index(folder: Path) -> dict[str, Any]:
    index = ShardIndex.load(folder / "shards" / "dualenc.index")
    held = index.split(0.3)[1]
    return {
        "fingerprint": index.fingerprint,
        "keys": [index.key(i) for i in range(len(index))],
        "images": index.hashes("image").tolist(),
        "texts": index.hashes("text").tolist(),
        "held out": [held.key(i) for i in range(len(held))],
        "selected": [one.key for one in index.select("width >= 200 and number < 20")],
    }


def embeddings(folder: Path) -> Iterator[tuple[str, dict[str, np.ndarray], Any]]:
    """Every file of embeddings: its tensors and its metadata."""
    from safetensors import safe_open

    for path in sorted((folder / "embeddings").rglob("*.safetensors")):
        with safe_open(path, "numpy") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            yield str(path.relative_to(folder)), arrays, json.loads(file.metadata()["dualenc"])


def embed(out: Path) -> None:
    main(["embed", "models/bert", "shards", str(out / "pairs"), "--captions", "json.captions", "--workers", "0"])
    main(["embed", "models/pre", "held_out", str(out / "features"), "--features", "--workers", "0"])
    main(["embed", "texts_models/bert", "texts/labels.tsv", str(out / "texts")])
    main(["embed", "texts_models/bert", "texts/plain.txt", str(out / "tokens"), "--tokens"])


def evaluate(out: Path) -> None:
    main(["zeroshot", "models/bert", "sets/classification", "--out", str(out / "zeroshot"), "--workers", "0"])
    main(["retrieval", "models/bert", "sets/retrieval", "--out", str(out / "retrieval"), "--workers", "0"])


def write(folder: Path) -> None:
    """All of it, into an empty folder."""
    torch.set_num_threads(1)
    os.environ["DUALENC_CACHE"] = tempfile.mkdtemp()
    write_inputs(folder)
    os.chdir(folder)
    here = Path()
    main(["index", "shards", "--hash", "--workers", "0"])
    main(["index", "held_out", "--hash", "--workers", "0"])
    write_models(here)
    write_text_models(here)
    embed(Path("embeddings"))
    evaluate(Path("results"))
    numbers: dict[str, Any] = {"plans": plans(), "index": of_index(here), "runs": {}}
    for kind in ("clip", "siglip", "text", "electra"):
        fit(kind, Path("whole"))
        numbers["runs"][kind] = numbers_of_run(Path("whole"), kind)
    # Stopped by kill -9 after 10 steps, of which the last two are in no checkpoint.
    for kind in ("clip", "text", "electra"):
        fit(kind, Path("runs"), kill=10)
        for name in ("last", "last-generator"):  # as the whole run left them
            if kind != "clip" and (Path("whole") / kind / name).exists():
                shutil.copytree(Path("whole") / kind / name, Path("runs") / kind / name)
        for path in checkpoints(kind)[:-1]:
            path.unlink()
    shutil.rmtree("whole")
    for path in [*Path("runs").glob("*.log"), *Path("runs").glob("*.yaml")]:
        path.unlink()
    for path in Path("runs").glob("*_rows"):
        shutil.rmtree(path)
    for path in Path("runs").glob("*/run.json"):
        record = json.loads(path.read_text())
        path.write_text(json.dumps({**record, "machine": "a machine", "git": None}, indent=2) + "\n")
    for path in Path("results").glob("*/*.json"):
        results = json.loads(path.read_text())
        path.write_text(json.dumps([{**one, "data": os.path.relpath(one["data"])} for one in results], indent=2) + "\n")
    for path in here.rglob("report.html"):
        path.unlink()
    numbers["outputs"] = dict(outputs(here))
    numbers["augmentations"] = augmentations(here)
    (here / "numbers.json").write_text(json.dumps(numbers) + "\n")


if __name__ == "__main__":
    write(Path(sys.argv[1]).resolve())
