"""Helpers that run `dualenc` in this process: configurations of the package made small, and commands that must fail."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers import ROOT, caption, tiny_embedder, tiny_tokenizer, write_benchmark, write_shards

from dualenc import TextConfig
from dualenc.cli import main
from dualenc.inference.text_model import TextPredictor
from dualenc.models import TextModel

SHIPPED = sorted((ROOT / "configs").glob("*.yaml"))
EVERY = [*SHIPPED, *sorted((ROOT / "tools" / "configs").glob("*.yaml"))]
TEXTS = [path for path in EVERY if "TextData" in path.read_text()]
CONFIGS = [path for path in EVERY if path not in TEXTS]
SMOKE = next(path for path in CONFIGS if path.stem == "smoke")
SMALL = [
    "--model.image.name", "vit_tiny_patch16_224", "--model.image.img_size", "32",
    "--model.image.overrides", '{"patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}',
    "--model.text.width", "32", "--model.text.layers", "2", "--model.text.heads", "2",
    "--model.text.vocab_size", "300", "--model.embed_dim", "32",
    "--model.optimizer.lr", "0.003", "--model.scheduler.warmup", "2",
    "--data.batch_size", "16", "--data.workers", "0", "--data.val", "0.25", "--run.monitor", "val/mrr",
    "--trainer.max_steps", "24", "--trainer.max_epochs", "-1",
    "--trainer.check_val_every_n_epoch", "1", "--trainer.log_every_n_steps", "1",
    "--trainer.accelerator", "cpu", "--trainer.devices", "1", "--trainer.num_nodes", "1", "--trainer.strategy", "auto",
]  # fmt: skip
TINY_TEXT = {"vocab_size": 120, "width": 32, "layers": 2, "heads": 2, "context_length": 24, "norm": "pre"}


def small_fit(config: Path, folder: Path, seed: int, *more: str) -> Path:
    """Run `dualenc fit` on a configuration made small and return the run directory."""
    captions = 3 if "json." in config.read_text() else 1
    write_shards(folder / "shards", [20, 15, 13], seed, captions=captions)
    sets = write_benchmark(folder / "set", seed, "retrieval")
    more = ("--data.micro_batch_size", "6", *more) if "micro_batch_size" in config.read_text() else more
    if "pretrained: " in config.read_text():
        return small_tuning(config, folder, seed, sets)
    evaluation = f'[{{"class_path": "dualenc.training.Evaluation", "init_args": {{"data": ["{sets}"]}}}}]'
    run = folder / "run"
    main([
        "fit", "--config", str(config), *SMALL, "--data.train", str(folder / "shards"), "--seed_everything", str(seed),
        "--trainer.callbacks", evaluation, "--trainer.default_root_dir", str(run), *more,
    ])  # fmt: skip
    return run


def small_tuning(config: Path, folder: Path, seed: int, sets: str) -> Path:
    """Fine-tune a small model, which defines the architecture, with the configuration's own callbacks."""
    tiny_embedder(seed).save(folder / "model")
    # The callback that is commented out is part of the run here.
    settings = yaml.safe_load(re.sub(r"(?m)^    # (?=- |  )", "    ", config.read_text()))
    (evaluation,) = [one for one in settings["trainer"]["callbacks"] if one["class_path"].endswith("Evaluation")]
    evaluation["init_args"]["data"] = [str(sets)]
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(settings))
    architecture = ("--model.image", "--model.text", "--model.embed_dim")
    pairs = zip(SMALL[::2], SMALL[1::2])
    small = [part for pair in pairs if not pair[0].startswith(architecture) for part in pair]
    main([
        "fit", "--config", str(path), *small, "--data.train", str(folder / "shards"), "--seed_everything", str(seed),
        "--model.pretrained", str(folder / "model"), "--trainer.default_root_dir", str(folder / "run"),
    ])  # fmt: skip
    with open(folder / "run" / "metrics.csv") as file:  # The model is evaluated before the first step too.
        assert "0" in {row["step"] for row in csv.DictReader(file) if row["metric"].startswith("set/")}
    return folder / "run"


def small_texts(config: Path, folder: Path, seed: int) -> Path:
    """Run `dualenc fit` on a text configuration made small and return the run directory."""
    settings = yaml.safe_load(config.read_text())
    model, data = settings["model"]["init_args"], settings["data"]["init_args"]
    size = {"vocab_size": 200, "width": 32, "layers": 2, "heads": 2, "mlp_width": 48}
    rng = np.random.default_rng(seed)
    if "text_from" in model:
        tokenizer = tiny_tokenizer(context_length=64)
        text = TextConfig(**{**size, "vocab_size": tokenizer.vocab_size}, context_length=64, types=2)
        TextPredictor(TextModel(text), tokenizer).save(folder / "pretrained")
        model["text_from"] = str(folder / "pretrained")
    else:
        model["text"] |= size
    heads = model.get("heads", {"rtd": {"kind": "rtd"}})
    for name, source in data["train"].items():
        head = heads[name]
        if head["kind"] == "token_classification":
            source["files"] = data["val"][name]["files"] = str(
                write_tags(folder / f"{name}.conll", head["labels"], rng)
            )
            continue
        if head["kind"] == "question_answering":
            head |= {"max_length": 48, "stride": 8}
            source["files"] = data["val"][name]["files"] = write_questions(folder / f"{name}.jsonl", rng)
            continue
        lines = []
        for number in range(64):
            label = head.get("labels", [""])[number % len(head.get("labels", [""]))]
            label = str(number % 5) if head.get("problem") == "regression" else label
            text = f"{caption(rng)} {caption(rng)} {label}"  # The text contains the label, so it can be learned.
            fields = {source.get("text", "text"): text, source.get("label", "label"): label}
            lines.append(fields | ({source["pair"]: caption(rng)} if "pair" in source else {}))
        path = folder / f"{name}.tsv"
        rows = ["\t".join(lines[0]), *("\t".join(line.values()) for line in lines)]
        path.write_text("\n".join(rows) + "\n")
        source["files"] = str(path)
        if isinstance(data["val"], dict):
            data["val"][name]["files"] = str(path)
    data |= {"batch_size": 16, "workers": 0, "val": data["val"] if isinstance(data["val"], dict) else 0.2}
    model["optimizer"]["init_args"]["lr"] = 0.003
    settings["seed_everything"] = seed
    settings["trainer"] |= {
        "max_epochs": -1, "max_steps": 32, "log_every_n_steps": 1, "accelerator": "cpu", "devices": 1,
        "default_root_dir": str(folder / "run"),
    }  # fmt: skip
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump(settings))
    main(["fit", "--config", str(path)])
    return folder / "run"


def write_tags(path: Path, labels: list[str], rng: np.random.Generator) -> Path:
    """Write captions as words with tags; each has an entity of every type, a word that is the type."""
    rows = [
        "\n".join([*(f"{word}\tO" for word in caption(rng).split()), *(f"{label}\tB-{label}" for label in labels)])
        for _ in range(64)
    ]
    path.write_text("\n\n".join(rows) + "\n")
    return path


def write_questions(path: Path, rng: np.random.Generator) -> str:
    """Write questions whose answer is a number in their context, so that it can be learned."""
    lines = []
    for number in range(64):
        before, answer = f"{caption(rng)} {caption(rng)} ", str(number % 5)
        about = {"question": caption(rng), "context": f"{before}{answer} {caption(rng)}"}
        lines.append(about | {"answers": [{"text": answer, "answer_start": len(before)}]})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def metrics(run: Path, name: str) -> list[float]:
    """Return the logged values of a metric in the order of the steps."""
    with open(run / "metrics.csv") as file:
        return [float(row["value"]) for row in csv.DictReader(file) if row["metric"] == name]


def fails(capsys: pytest.CaptureFixture[str], arguments: list[str], status: int = 2) -> str:
    """Run a command that must fail with a single line of error, and return that line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("dualenc: error: ")]
    assert caught.value.code == status, err
    assert len(lines) == 1, err
    assert err.rstrip().endswith(lines[0])
    assert "Traceback" not in out + err
    assert "Union subtypes" not in err
    return lines[0]


def fit(folder: Path, *more: str) -> list[str]:
    """Return the arguments of a small `dualenc fit` on the shards of a folder."""
    run = ["--trainer.default_root_dir", str(folder / "run"), "--data.train", str(folder / "shards")]
    return ["fit", "--config", str(SMOKE), *SMALL, *run, *more]
