"""The text task: several heads, ranks, resuming, predictions, pretrained weights."""

import html
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from fits import SMOKE, TINY_TEXT, metrics, small_fit
from helpers import WORDS, tiny_tokenizer, write_texts
from ranks import in_ranks
from runs import callbacks, run
from safetensors.torch import load_file

import dualenc
from dualenc.cli import main
from dualenc.data.text.dataset import Part, Texts, token_hashes
from dualenc.data.text.masking import Masking
from dualenc.formats.huggingface.text_checkpoint import open_text
from dualenc.losses import clip_loss
from dualenc.models import HeadConfig, TextConfig, TextModel
from dualenc.models.heads import LoadedHeads
from dualenc.models.heads.embedding import NEGATIVES
from dualenc.models.heads.vectors import DenseConfig, EmbeddingConfig
from dualenc.training import TextTask

HEADS = {
    "words": HeadConfig("mlm", weight=0.5),
    "one": HeadConfig("classification", labels=("a", "b", "c")),
    "multi_label": HeadConfig("classification", labels=("x", "y"), problem="multi_label", activation=None, weight=2.0),
    "number": HeadConfig("classification", labels=("n",), problem="regression", pool="mean"),
    "near": HeadConfig("embedding", problem="cosine", scale=5.0, pool="mean"),
}
BATCH = 20  # four texts a head, and the second texts of pairs after them


def config(**changes):
    return TextConfig(tiny_tokenizer().vocab_size, width=16, layers=2, heads=2, context_length=12, **changes)


def task_of(heads=HEADS, world=1):
    task = TextTask(heads, config()).double()
    with torch.no_grad():
        for parameter in task.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    task._trainer = SimpleNamespace(world_size=world)
    return task.train()


def sentence(number):
    return " ".join((WORDS * 3)[number : number + 2 + number % 6])


def piece_of(start, stop, heads=HEADS):
    """Return samples start to stop of a batch; sample i belongs to head i modulo the number of heads."""
    names = list(heads)
    own = list(range(start, stop))
    apart = [i for i in own if heads[names[i % len(names)]].kind == "embedding"]
    tokenizer = tiny_tokenizer()
    tokens = tokenizer([sentence(i) for i in own] + [sentence(i + 5) for i in apart])
    parts = {}
    for name, head in heads.items():
        mine = [i for i in own if names[i % len(names)] == name]
        if not mine:
            continue
        others = torch.tensor([len(own) + apart.index(i) for i in mine]) if head.kind == "embedding" else None
        labels = {
            "single_label": torch.tensor([i % 3 for i in mine]),
            "multi_label": torch.tensor([[i % 2, (i // 2) % 2] for i in mine]).double(),
            "regression": torch.tensor([i / 7 for i in mine], dtype=torch.float64),
            "cosine": torch.tensor([i % 6 for i in mine], dtype=torch.float64),
            "negatives": None,
        }[head.problem]
        parts[name] = Part(torch.tensor(mine) - start, others, None if head.kind == "mlm" else labels)
    masked = None
    if any(heads[name].kind == "mlm" for name in parts):
        hidden = {int(i): start + int(i) for i in parts["words"].texts}
        masked = Masking(tokenizer, 0.5)(tokens, (3, 0), numbers=hidden)
    return Texts(tokens, torch.arange(start, stop), parts, masked)


def gradients(task, value):
    task.zero_grad()
    value.backward()
    return {name: p.grad.clone() for name, p in task.named_parameters()}


def by_hand(task, batch):
    """Compute the loss on padded texts, one head after the other."""
    model, tokens = task.model, batch.tokens
    masked = batch.masked
    ids, mask, _ = tokens._replace(ids=masked.ids).padded()
    hidden = model.encoder.forward_padded(ids, mask)
    where = torch.zeros(len(tokens.ids), dtype=torch.int64)
    where[masked.masked_positions] = 1
    chosen = tokens._replace(ids=where).padded()[0].bool()
    words = model.encoder.embeddings.token_embeddings.weight
    logits = model.heads["words"](hidden[chosen], words)
    total = 0.5 * F.cross_entropy(logits.float(), tokens.padded()[0][chosen])
    first, mean = hidden[:, 0], (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    part = batch.parts["one"]
    total = total + F.cross_entropy(model.heads["one"](first[part.texts]).float(), part.labels)
    part = batch.parts["multi_label"]
    chance = model.heads["multi_label"](first[part.texts]).sigmoid()
    total = total - 2 * torch.where(part.labels.bool(), chance, 1 - chance).log().mean()
    part = batch.parts["number"]
    total = total + (model.heads["number"](mean[part.texts])[:, 0] - part.labels).square().mean()
    part = batch.parts["near"]
    cosine = F.cosine_similarity(mean[part.texts], mean[part.others])
    return total + (cosine - part.labels / 5).square().mean()


def close(one, other):
    assert one.keys() == other.keys()
    for name in one:  # logits are compared in single precision
        torch.testing.assert_close(
            one[name].double(), other[name].double(), rtol=1e-5, atol=1e-6, msg=lambda m, n=name: n + m
        )


def test_loss_is_the_weighted_sum_over_the_heads(seed):
    task, batch = task_of(), piece_of(0, BATCH)
    want = by_hand(task, batch)
    got = task.training_step(batch, 0)
    torch.testing.assert_close(got.double(), want.double(), rtol=1e-5, atol=0)
    close(gradients(task, got), gradients(task, want))
    for name in HEADS:  # each counts
        rest = batch._replace(parts={key: part for key, part in batch.parts.items() if key != name})
        assert abs(task.training_step(rest, 0) - got) > 1e-4, name


def test_other_texts_of_the_batch_are_negatives(seed):
    heads = {"near": HeadConfig("embedding", problem="negatives")}
    task, batch = task_of(heads), piece_of(0, 6, heads)
    vectors = F.normalize(task.model.encoder.pool(task.model.encoder(batch.tokens), batch.tokens), dim=-1)
    want = clip_loss(vectors[:6], vectors[6:], torch.tensor(NEGATIVES, dtype=torch.float64))
    torch.testing.assert_close(task.training_step(batch, 0).double(), want.double(), rtol=1e-5, atol=0)


def hard_batch(start, stop):
    """Return pairs start to stop, of three passages with several questions each, and the texts of the batch.

    Pair i has i % 3 negatives, some of which are copies of passages.
    """
    own = range(start, stop)
    negatives = [sentence(k % 3 + 20 if k % 2 else k + 40) for i in own for k in range(i, i + i % 3)]
    texts = [*(sentence(i) for i in own), *(sentence(i % 3 + 20) for i in own), *negatives]
    tokens = tiny_tokenizer()(texts)
    hashes, count = token_hashes(tokens), len(own)
    ids = torch.stack([hashes[:count], hashes[count : 2 * count]], 1)
    first, second, extra = torch.arange(len(texts)).split([count, count, len(negatives)])
    part = Part(first, second, None, ids=ids, negatives=extra, negative_ids=hashes[extra])
    return Texts(tokens, torch.arange(start, stop), {"near": part}, None), texts


def hard_loss(task, texts, count):
    """Compute the loss by its definition, one pair at a time, from texts as strings."""
    ids, mask, _ = tiny_tokenizer()(texts).padded()
    vectors = F.normalize(task.model.encoder.forward_padded(ids, mask)[:, 0], dim=-1)
    first, second = texts[:count], texts[count:]
    score = NEGATIVES * vectors[:count] @ vectors[count:].T
    total = 0.0
    for i in range(count):
        own = {second[j] for j in range(count) if first[j] == first[i]}
        rivals = [j for j in range(len(second)) if j == i or second[j] not in own]
        queries = [j for j in range(count) if j == i or (second[j] != second[i] and first[j] != first[i])]
        total = total - score[i, rivals].log_softmax(0)[rivals.index(i)]
        total = total - score[queries, i].log_softmax(0)[queries.index(i)]
    return total / (2 * count)


HARD = {"near": HeadConfig("embedding", problem="negatives")}


def test_equal_passages_are_masked_and_hard_negatives_count(seed):
    task = task_of(HARD)
    batch, texts = hard_batch(0, 9)
    got, want = task.training_step(batch, 0), hard_loss(task, texts, 9)
    torch.testing.assert_close(got.double(), want, rtol=1e-6, atol=0)
    close(gradients(task, got), gradients(task, want))
    part = batch.parts["near"]
    for less in (part._replace(ids=None, negative_ids=None), part._replace(negatives=None)):  # controls
        assert abs(task.training_step(batch._replace(parts={"near": less}), 0) - want) > 1e-4


def hard_ranks(folder, rank, world):
    import torch.distributed as dist

    task = task_of(HARD, world)
    task.load_state_dict(torch.load(folder / "task.pt", weights_only=True))
    loss = task.training_step(hard_batch(5 * rank, 5 * rank + 5)[0], 0)
    found = gradients(task, loss)
    for grad in found.values():  # as DDP does
        dist.all_reduce(grad)
        grad /= world
    return {"loss": loss.detach(), **found}


@pytest.mark.slow
def test_hard_negatives_over_ranks(tmp_path, seed):
    """The ranks have other numbers of negatives; a passage of one rank is masked on the other."""
    task = task_of(HARD)
    torch.save(task.state_dict(), tmp_path / "task.pt")
    loss = task.training_step(hard_batch(0, 10)[0], 0)
    want = {"loss": loss.detach(), **gradients(task, loss)}
    for result in in_ranks(hard_ranks, tmp_path, 2):
        close(result, want)


def ranks(folder, rank, world):
    import torch.distributed as dist

    task = task_of(world=world)
    task.load_state_dict(torch.load(folder / "task.pt", weights_only=True))
    task.train()
    loss = task.training_step(piece_of(*SPANS[rank]), 0)
    found = gradients(task, loss + 0 * sum(p.sum() for p in task.parameters()))
    for grad in found.values():  # as DDP does
        dist.all_reduce(grad)
        grad /= world
    return {"loss": loss.detach(), **found}


SPANS = [(0, 13), (13, BATCH)]  # of some heads one rank has more, and the other other texts


@pytest.mark.slow
def test_over_ranks(tmp_path, seed):
    task = task_of()
    torch.save(task.state_dict(), tmp_path / "task.pt")
    want = by_hand(task, piece_of(0, BATCH))
    want = {"loss": want.detach(), **gradients(task, want)}
    for result in in_ranks(ranks, tmp_path, 2):
        close(result, want)


# Runs.


def fit(folder: Path, data: Path, seed: int, *more: str, text=None, heads=None, start=main, **options) -> Path:
    """Run the task on the files of `write_texts`; return the run directory."""
    heads = heads or {
        "words": {"kind": "mlm"},
        "mood": {"kind": "classification", "labels": ["bad", "good"], "activation": None},
    }
    files = {
        "words": {"files": str(data / "plain.txt")},
        "mood": {"files": str(data / "labels.tsv")},
        "near": {"files": str(data / "pairs.jsonl"), "pair": "other", "label": "score"},
    }
    sources = {name: files[name.split()[-1]] for name in heads}
    settings = {
        "seed_everything": seed,
        "trainer": {
            "max_epochs": 2, "default_root_dir": str(folder), "log_every_n_steps": 1, "accelerator": "cpu",
        },
        "run": {"monitor": "val/mood/accuracy", "every_n_steps": 2},
        "model": {"class_path": "dualenc.training.TextTask", "init_args": {
            "heads": heads, **({"text": text or TINY_TEXT} if "text_from" not in options else {}), **options,
            "scheduler": {"class_path": "dualenc.training.WarmupCosine", "init_args": {"warmup": 2}},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.003}},
        }},
        "data": {"class_path": "dualenc.training.TextData", "init_args": {
            "train": sources, "val": 0.2, "batch_size": 8, "workers": 0,
        }},
    }  # fmt: skip
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_suffix(".yaml")
    path.write_text(json.dumps(settings))
    start(["fit", "--config", str(path), *more])
    return folder


@pytest.mark.parametrize("mix", ["together", pytest.param("round_robin", marks=pytest.mark.slow)])
def test_resumed_run_is_bit_equal(tmp_path, seed, mix):
    write_texts(tmp_path, seed)
    dropout = {**TINY_TEXT, "dropout": 0.1}
    more = ("--data.mix", mix)
    whole = fit(tmp_path / "whole", tmp_path, seed, *more, text=dropout)
    stop = json.dumps([{"class_path": "helpers.StopAt", "init_args": {"step": 5}}])
    part = tmp_path / "part"
    with pytest.raises(SystemExit):
        fit(part, tmp_path, seed, *more, "--trainer.callbacks", stop, text=dropout)
    fit(part, tmp_path, seed, *more, "--ckpt_path", "last", text=dropout)
    for name in ("train/loss", "val/words/loss", "val/mood/accuracy", "train/grad_norm"):
        assert metrics(part, name) == metrics(whole, name)
    one, other = (load_file(run / "last" / "model.safetensors") for run in (part, whole))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    changed = fit(tmp_path / "changed", tmp_path, seed + 1, *more, text=dropout)
    assert metrics(changed, "train/loss") != metrics(whole, "train/loss")  # control


@pytest.mark.slow
def test_hard_negatives_and_balanced_classes_resume_bit_equal(tmp_path, seed):
    write_texts(tmp_path, seed)
    lines = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    for i, line in enumerate(lines):
        line["hard"] = [lines[(i + k) % 20]["other"] for k in range(1, 1 + i % 3)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    heads = {
        "near": {"kind": "embedding", "problem": "negatives"},
        "mood": {"kind": "classification", "labels": ["bad", "good"], "class_weights": "balanced"},
    }
    more = "--run.monitor", "val/near/mean_recall@1", "--data.train.near.negatives", "hard"
    whole = fit(tmp_path / "whole", tmp_path, seed, *more, heads=heads)
    stop = json.dumps([{"class_path": "helpers.StopAt", "init_args": {"step": 5}}])
    part = tmp_path / "part"
    with pytest.raises(SystemExit):
        fit(part, tmp_path, seed, *more, "--trainer.callbacks", stop, heads=heads)
    fit(part, tmp_path, seed, *more, "--ckpt_path", "last", heads=heads)
    for name in ("train/loss", "train/near/loss", "train/mood/loss", "val/near/mean_recall@1"):
        assert metrics(part, name) == metrics(whole, name)
    other = {**heads, "mood": {**heads["mood"], "class_weights": [1.0, 9.0]}}
    changed = fit(tmp_path / "changed", tmp_path, seed, *more[:2], heads=other)
    for name in ("train/near/loss", "train/mood/loss"):  # control
        assert metrics(changed, name) != metrics(whole, name)


@pytest.mark.slow
@pytest.mark.parametrize("mix", ["together", "round_robin"])
def test_two_ranks_equal_one(tmp_path, seed, mix):
    """Logs are close to those of one rank, and bit-equal after one of two ranks was killed."""
    write_texts(tmp_path, seed)
    files: list[str] = []
    fit(tmp_path / "x", tmp_path, seed, "--data.mix", mix, start=files.extend)
    assert run(files, tmp_path / "one") == [0], (tmp_path / "one" / "log-0").read_text()
    assert run(files, tmp_path / "two", 2) == [0, 0], (tmp_path / "two" / "log-0").read_text()
    kill = callbacks(("Kill", {"step": 7, "rank": 1}))
    assert run([*files, *kill], tmp_path / "part", 2)[1] == -9
    assert run([*files, "--ckpt_path", "auto"], tmp_path / "part", 2) == [0, 0]
    for name in ("train/loss", "train/grad_norm", "val/words/loss", "val/mood/loss"):
        whole = metrics(tmp_path / "two" / "run", name)
        assert whole == metrics(tmp_path / "part" / "run", name), name
        assert whole == pytest.approx(metrics(tmp_path / "one" / "run", name), rel=1e-3), name


@pytest.mark.slow
def test_one_encoder_through_contrastive_and_text_tasks(tmp_path, seed, capsys):
    """Contrastive, then masked tokens and a classification, then contrastive again: the loaded tower is bit-equal."""
    pairs = small_fit(SMOKE, tmp_path / "pairs", seed)
    tower = dualenc.load(pairs / "last", "cpu").dual_encoder.text
    write_texts(tmp_path, seed)
    texts = fit(tmp_path / "texts", tmp_path, seed, "--trainer.max_epochs", "8", text_from=str(pairs / "last"))
    begun = open_text(str(pairs / "last")).model().encoder.state_dict()
    assert begun.keys() == tower.state_dict().keys()
    assert all(torch.equal(begun[name], x) for name, x in tower.state_dict().items())
    predictor = dualenc.load_text(texts / "last", "cpu")
    assert predictor.model.config == tower.config
    assert metrics(texts, "val/mood/accuracy")[-1] > 0.8 > max(metrics(texts, "val/mood/baseline_accuracy"))
    good, bad = predictor.classify(["a good red dog", "a bad red dog"])
    assert (good["label"], bad["label"]) == ("good", "bad")
    (found,) = predictor.fill(f"{WORDS[0]} [MASK]", top_k=3)
    assert len(found) == 3
    vectors = predictor.embed(["a good red dog", "a bad red dog"])
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(2))
    predictor.save(tmp_path / "saved")
    again = dualenc.load_text(tmp_path / "saved", "cpu")
    for name, x in predictor.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], x), name
    assert torch.equal(again.embed(["a good red dog", "a bad red dog"]), vectors)

    still = ["--trainer.max_steps", "1", "--model.optimizer.lr", "0.0"]
    back = small_fit(SMOKE, tmp_path / "back", seed, "--model.text_from", str(texts / "last"), *still)
    model = dualenc.load(back / "last", "cpu")
    assert model.tokenizer.fingerprint == predictor.tokenizer.fingerprint
    for name, x in predictor.model.encoder.state_dict().items():
        assert torch.equal(model.dual_encoder.text.state_dict()[name], x), name


@pytest.mark.long
def test_a_contrastive_run_says_which_heads_of_a_text_model_it_leaves_out(tmp_path, seed, capsys):
    about = EmbeddingConfig((DenseConfig(5),), {"query": "query: "})
    heads = {"near": HeadConfig("embedding", problem="negatives", embedding=about), "mood": HeadConfig("mlm")}
    tokenizer, still = tiny_tokenizer(), ["--trainer.max_steps", "1"]
    for name, chosen in (("with", heads), ("without", {})):
        text = TextConfig(tokenizer.vocab_size, width=16, layers=1, heads=2, context_length=12)
        dualenc.TextPredictor(TextModel(text, chosen).eval(), tokenizer).save(tmp_path / name)
        capsys.readouterr()
        small_fit(SMOKE, tmp_path / f"{name} run", seed, "--model.text_from", str(tmp_path / name), *still)
        said = capsys.readouterr().err
        assert f"weights of {tmp_path / name}: the text tower" in said
        left_out = "left out: head near (embedding, dense layers, prompts), head mood (mlm)"
        assert (left_out in said) == (name == "with")
        assert ("left out" in said) == (name == "with")


def test_predictions(tmp_path, seed, capsys):
    write_texts(tmp_path, seed)
    run = fit(tmp_path / "run", tmp_path, seed)
    (tmp_path / "new.jsonl").write_text("".join(json.dumps({"text": sentence(i)}) + "\n" for i in range(11)))
    asked = json.dumps({"mood": {"files": str(tmp_path / "new.jsonl")}})
    main(["predict", "--config", str(run / "config.yaml"), "--ckpt_path", "last", "--data.predict", asked])
    assert "11 predictions are in" in capsys.readouterr().err
    lines = [json.loads(line) for line in (run / "predictions.jsonl").read_text().splitlines()]
    assert [line["line"] for line in lines] == [f"line {i + 1}" for i in range(11)]
    want = dualenc.load_text(run / "last", "cpu").classify([sentence(i) for i in range(11)])
    for line, answer in zip(lines, want, strict=True):
        assert line["label"] == answer["label"]
        assert line["score"] == pytest.approx(answer["score"], abs=1e-5)
    asked = json.dumps({"words": {"files": str(tmp_path / "new.jsonl")}})
    with pytest.raises(SystemExit) as status:
        main(["predict", "--config", str(run / "config.yaml"), "--ckpt_path", "last", "--data.predict", asked])
    assert status.value.code == 2
    assert "data.predict.words: a head of kind mlm" in capsys.readouterr().err
    assert len((run / "predictions.jsonl").read_text().splitlines()) == 11  # those of before stay


def test_an_mlm_head_is_tested_with_its_baseline(tmp_path, seed, capsys):
    write_texts(tmp_path, seed)
    heads = {"words": {"kind": "mlm"}}
    monitor = ("--run.monitor", "val/words/accuracy")
    run = fit(tmp_path / "run", tmp_path, seed, *monitor, heads=heads, scored_tokens=60)
    main(["test", "--config", str(run / "config.yaml"), "--ckpt_path", "last"])
    said = dict(line.split() for line in capsys.readouterr().out.splitlines())
    for name in ("pseudo_perplexity", "baseline_pseudo_perplexity"):
        assert 1 < float(said[f"test/words/{name}"]) < 130, name


def test_report_shows_confusions_and_texts(tmp_path, seed):
    """The report's matrix counts every held-out text under its label, and shows mistakes with their texts, escaped."""
    write_texts(tmp_path, seed)
    lines = (tmp_path / "labels.tsv").read_text().splitlines()
    evil = [line.replace("\t", f" <img src={n}> & it\t") if n else line for n, line in enumerate(lines)]
    (tmp_path / "labels.tsv").write_text("\n".join(evil) + "\n")
    heads = {"mood": {"kind": "classification", "labels": ["bad", "good"], "activation": None}}
    page = (fit(tmp_path / "run", tmp_path, seed, heads=heads) / "report.html").read_text("utf-8")
    section = page[page.index('<h2 id="set-1">mood') :]
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    rows = re.findall(r'<tr><th title="(\w+)">\w+</th>(.*?)</tr>', section[section.index("<thead>") :])
    counts = {name: [int(n or 0) for n in re.findall(r"<td[^>]*>(\d*)</td>", row)] for name, row in rows}
    order = re.findall(r'<th title="(\w+)">', section[section.index("<thead>") : section.index("</thead>")])
    assert order == ["bad", "good"]
    assert sum(map(sum, counts.values())) == record["held_out_texts"]
    wrong = sum(row[1 - order.index(name)] for name, row in counts.items())
    texts = {html.escape(line.split("\t")[0], quote=True): line.split("\t")[1] for line in evil[1:]}
    shown = re.findall(r"<figure><q>(.*?)</q><figcaption><b>(\w+)</b> predicted as <b>(\w+)</b>", section)
    assert len(shown) == min(8, wrong)
    for text, truth, predicted in shown:
        assert texts[text] == truth != predicted
    assert "<img" not in section
    assert "the most frequent training label" in section


def test_batches_without_masked_tokens_or_good_samples(seed):
    heads = {"words": HEADS["words"]}
    task, batch = task_of(heads), piece_of(0, 4, heads)
    none = torch.zeros(0, dtype=torch.int64)
    batch = batch._replace(masked=batch.masked._replace(ids=batch.tokens.ids, masked_positions=none, labels=none))
    for empty in (batch, batch._replace(parts={}, masked=None)):
        loss = task.training_step(empty, 0)
        assert loss == 0
    loss = task.training_step(batch, 0)
    assert not any(grad.any() for grad in gradients(task, loss).values())


@pytest.mark.slow
def test_predictions_use_the_averaged_weights(tmp_path, seed):
    """Predictions equal those of `last/`, which has the average where there is one."""
    write_texts(tmp_path, seed)
    average = json.dumps([{"class_path": "dualenc.training.EMA", "init_args": {"decay": 0.99}}])
    run = fit(tmp_path / "run", tmp_path, seed, "--trainer.callbacks", average)
    (tmp_path / "new.txt").write_text("a good cat\na bad cat\n")
    asked = json.dumps({"mood": {"files": str(tmp_path / "new.txt")}})
    main(["predict", "--config", str(run / "config.yaml"), "--ckpt_path", "last", "--data.predict", asked])
    got = [json.loads(line)["score"] for line in (run / "predictions.jsonl").read_text().splitlines()]
    want = dualenc.load_text(run / "last", "cpu").classify(["a good cat", "a bad cat"])
    assert got == pytest.approx([answer["score"] for answer in want], abs=1e-6)


def test_resume_refuses_other_labels(tmp_path, seed, capsys):
    write_texts(tmp_path, seed)
    labels = {"mood": {"kind": "classification", "labels": ["bad", "good"]}}
    run = fit(tmp_path / "run", tmp_path, seed, heads=labels)
    turned = json.dumps({"mood": {"kind": "classification", "labels": ["good", "bad"]}})
    for command in ("fit", "validate"):
        with pytest.raises(SystemExit):
            main([command, "--config", str(run / "config.yaml"), "--ckpt_path", "last", "--model.heads", turned])
        assert "labels" in capsys.readouterr().err.splitlines()[-1]
    main(["validate", "--config", str(run / "config.yaml"), "--ckpt_path", "last"])  # control


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ({}, "names no head"),
        ({"type": HeadConfig("mlm")}, r"model\.heads\.type: a head cannot be called"),
        ({"a": HeadConfig("rtd")}, "rtd, which TextTask cannot train: use ReplacedTokenTask"),
        ({"a": HeadConfig("mlm"), "b": HeadConfig("mlm")}, "a and b read masked tokens"),
    ],
)
def test_invalid_heads_are_refused(heads, message):
    with pytest.raises(ValueError, match=message):
        TextTask(heads, config())


def test_wrong_use(tmp_path, seed, capsys):
    write_texts(tmp_path, seed)

    def error(*more, **options):
        with pytest.raises(SystemExit) as status:
            fit(tmp_path / f"run{len(list(tmp_path.iterdir()))}", tmp_path, seed, *more, **options)
        assert status.value.code == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
        return line

    labels = {"mood": {"kind": "classification", "labels": ["bad", "fine"]}}
    assert "'good'" in (line := error(heads=labels)) and "model.heads.mood.labels" in line  # noqa: PT018
    assert "run.monitor val/words/perplexity" in error("--run.monitor", "val/words/perplexity")
    locked = {"near": {"kind": "embedding", "problem": "cosine", "scale": 5.0}}
    assert "nothing to train" in error("--model.tuning.locked", "true", heads=locked)
    more = json.dumps({"mood": {"files": str(tmp_path / "labels.tsv")}})
    assert "data.val.mood: data.train has no files" in error("--data.train", json.dumps(
        {"words": {"files": str(tmp_path / "plain.txt")}}), "--data.val", more)  # fmt: skip
    spread = json.dumps({"class_path": "lightning.pytorch.strategies.ModelParallelStrategy"})
    assert "use trainer.strategy ddp" in error("--trainer.strategy", spread)
    assert "2 or more labels" in error(heads={"mood": {"kind": "classification", "labels": ["bad"]}})
    (tmp_path / "empty").mkdir()
    assert str(tmp_path / "empty") in error(text_from=str(tmp_path / "empty"))
    (tmp_path / "labels.tsv").write_text("")
    assert "labels.tsv" in error()


def test_head_with_a_space_in_its_name_is_reported_as_loaded(tmp_path, seed, capsys):
    write_texts(tmp_path, seed)
    heads = {"film mood": {"kind": "classification", "labels": ["bad", "good"]}}
    more = ("--run.monitor", "val/film mood/accuracy", "--trainer.max_steps", "1")
    first = fit(tmp_path / "first", tmp_path, seed, *more, heads=heads)
    capsys.readouterr()
    fit(tmp_path / "second", tmp_path, seed, *more, heads=heads, text_from=str(first / "last"))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("weights of")]
    assert "head film mood" in line
    assert "random" not in line
    other = {"film mood": {"kind": "classification", "labels": ["bad", "good"], "activation": None}}  # control
    fit(tmp_path / "third", tmp_path, seed, *more, heads=other, text_from=str(first / "last"))
    assert "random at first: head film mood" in capsys.readouterr().err


def test_load_pretrained_copies_heads_that_fit(seed):
    two = HeadConfig("classification", labels=("a", "b"))
    given = TextModel(config(), {"words": HeadConfig("mlm"), "pooler": HeadConfig("pooler"), "one": two})
    with torch.no_grad():
        for parameter in given.parameters():
            parameter.add_(torch.randn_like(parameter))
    apart = TextModel(config(), {"guess": HeadConfig("mlm", tied=False)})
    assert apart.load_pretrained(given) == LoadedHeads(whole=("guess",))
    assert torch.equal(apart.heads["guess"].output_embeddings, given.encoder.embeddings.token_embeddings.weight)
    joined = TextModel(config(), {"words": HeadConfig("mlm")})
    assert joined.load_pretrained(apart) == LoadedHeads(whole=("words",))
    assert torch.equal(joined.heads["words"].dense.weight, given.heads["words"].dense.weight)
    mine = TextModel(config(), {
        "guess": HeadConfig("mlm", weight=2.0), "one": two,
        "two": HeadConfig("classification", labels=("c", "d", "e")),
        "flat": HeadConfig("classification", labels=("a", "b"), activation=None),
    })  # fmt: skip
    before = {name: x.clone() for name, x in mine.state_dict().items()}
    assert mine.load_pretrained(given) == LoadedHeads(("guess", "one"), ("two",), ("flat",))
    after, theirs = mine.state_dict(), given.state_dict()
    for name, x in after.items():
        if name.startswith("encoder."):
            assert torch.equal(x, theirs[name])
        elif name.startswith(("heads.guess", "heads.one")):
            assert torch.equal(x, theirs[name.replace("guess", "words")])
        elif name.startswith("heads.two.dense"):
            assert torch.equal(x, theirs[name.replace("two", "pooler")])
        else:
            assert torch.equal(x, before[name]), name
