"""The data module of texts: stages, columns, tokenizers, labels, errors."""

import json
import random
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import WORDS, tiny_tokenizer

from dualenc.data import Tokenizer
from dualenc.models import TextConfig
from dualenc.models.heads import HeadConfig
from dualenc.training.text_data import TextData
from dualenc.utils.errors import DataError

TEXT = TextConfig(60, width=16, layers=1, heads=2, context_length=12)
HEADS = {
    "guess": HeadConfig("mlm"),
    "topic": HeadConfig("classification", ("0", "1", "2")),
    "stars": HeadConfig("classification", ("stars",), "regression"),
    "near": HeadConfig("embedding", problem="negatives"),
    "like": HeadConfig("embedding", problem="cosine"),
    "old": HeadConfig("pooler"),
}


def sentence(rng: random.Random, number: int) -> str:
    return " ".join([*rng.choices(WORDS, k=rng.randint(1, 14)), str(number)])


@pytest.fixture
def files(tmp_path: Path, seed: int) -> Path:
    rng = random.Random(seed)
    for name, count in (("train", 40), ("val", 12), ("test", 9)):
        rows = [
            [sentence(rng, n), sentence(rng, n), str(rng.randrange(3)), f"{rng.random():.3f}"] for n in range(count)
        ]
        lines = ["\t".join(row) for row in [["text", "other", "label", "score"], *rows]]
        (tmp_path / f"{name}.tsv").write_text("\n".join(lines))
        (tmp_path / f"{name}.txt").write_text("\n".join(sentence(rng, n) * 3 for n in range(count)))
    (tmp_path / "ask.tsv").write_text("text\nwhat\nwho\n")
    return tmp_path


def of(files: Path, name: str, **options) -> dict:
    """Return the sources of all heads."""
    table, plain = str(files / f"{name}.tsv"), str(files / f"{name}.txt")
    columns = name == "train"
    found = {
        "topic": {"files": table},
        "stars": {"files": table, **({"label": "score"} if columns else {})},
        "near": {"files": table, **({"pair": "other"} if columns else {})},
        "like": {"files": table, **({"pair": "other", "label": "score"} if columns else {})},
        "guess": {"files": plain},
    }
    for head, more in options.items():
        found[head] |= more
    return found


def attached(data: TextData, folder: Path, stage: str = "fit", checkpoint=None, world: int = 1) -> TextData:
    """Attach the data to a trainer that is about to begin."""
    module = SimpleNamespace(text_checkpoint=checkpoint)
    data.trainer = SimpleNamespace(
        default_root_dir=str(folder / "run"), state=SimpleNamespace(fn=stage), world_size=world, global_rank=0,
        lightning_module=module, limit_val_batches=1.0,
    )  # fmt: skip
    data.prepare_data()
    data.setup(stage)
    return data


def made(files: Path, stage: str = "fit", **options) -> TextData:
    options = {"train": of(files, "train"), "workers": 0, "batch_size": 8, **options}
    return attached(TextData(text=TEXT, heads=HEADS, **options), files, stage)


def test_all_stages(files: Path) -> None:
    fit = made(files, val=of(files, "val"), test=of(files, "test"), seed=3)
    sizes = {name: len(index) for name, index in (("train", fit.train_index), ("val", fit.val_index)) if index}
    assert sizes["train"] > 5 * 40 - 1
    assert sizes["val"] > 5 * 12 - 1
    for batch in fit.train_dataloader():
        assert len(batch.rows) == 8
    rows = torch.cat([batch.rows for batch in fit.val_dataloader()])
    assert rows.tolist() == list(range(sizes["val"]))
    assert (files / "run" / "tokenizer.json").exists()
    assert len(fit.sources) == 5
    test = made(files, "test", test=of(files, "test"))
    assert test.test_index is not None
    assert torch.cat([batch.rows for batch in test.test_dataloader()]).tolist() == list(range(len(test.test_index)))
    held_out = made(files, "test", val=of(files, "val"))
    assert len(list(held_out.test_dataloader())) == len(list(fit.val_dataloader()))
    predict = made(files, "predict", predict={"topic": {"files": str(files / "ask.tsv")}})
    (batch,) = predict.predict_dataloader()
    assert (batch.parts["topic"].labels, batch.masked) == (None, None)
    assert predict.predict_index is not None
    assert [predict.predict_index[row].key for row in batch.rows.tolist()] == ["line 2", "line 3"]


def test_columns_default_to_those_of_training(files: Path) -> None:
    data = made(files, val=of(files, "val", like={"label": "label"}))
    assert {head: (use.pair, use.label) for head, use in data.uses["val"].items()} == {
        "topic": (None, "label"),
        "stars": (None, "score"),
        "near": ("other", None),
        "like": ("other", "label"),
        "guess": (None, None),
    }


def test_no_validation(files: Path) -> None:
    data = made(files)
    assert data.trainer.limit_val_batches == 0
    assert data.val_index is None
    some = made(files, val={"topic": of(files, "val")["topic"]})
    assert some.trainer.limit_val_batches == 1.0
    assert {head for batch in some.val_dataloader() for head in batch.parts} == {"topic"}


def test_share_is_held_out_by_content(files: Path) -> None:
    """Every head holds out the same lines of a file, and no line is on both sides."""
    data = made(files, val=0.3)
    held = {head: {s.read()["text"] for s in index} for head, index in data._raw["val"].items()}
    rest = {head: {s.read()["text"] for s in index} for head, index in data._raw["train"].items()}
    assert held["topic"] == held["stars"] == held["near"]
    assert 2 <= len(held["topic"]) <= 26
    for head in held:
        assert not held[head] & rest[head]
        assert len(held[head]) + len(rest[head]) == 40
    again = made(files, "validate", val=0.3)
    assert again.val_index is not None
    assert data.val_index is not None
    assert again.val_index.fingerprint == data.val_index.fingerprint


def test_loader_resumes(files: Path, seed: int) -> None:
    for mix in ("together", "round_robin"):
        whole = [batch.tokens.ids.tolist() for batch in made(files, mix=mix, seed=seed).train_dataloader()]
        first = made(files, mix=mix, seed=seed).train_dataloader()
        passing = iter(first)
        seen = [next(passing).tokens.ids.tolist() for _ in range(5)]
        second = made(files, mix=mix, seed=seed).train_dataloader()
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert seen + [batch.tokens.ids.tolist() for batch in second] == whole
        heads = [set(batch.parts) for batch in made(files, mix=mix, seed=seed).train_dataloader()]
        assert (max(map(len, heads)) > 1) == (mix == "together")


def test_weights(files: Path) -> None:
    data = made(files, train=of(files, "train", topic={"weight": 0.5}, near={"weight": 2.0}), batch_size=2)
    assert data.train_index is not None
    counts = np.zeros(5)
    bounds = np.cumsum([0, *data.train_index.counts()])
    for batch in data.train_dataloader():
        np.add.at(counts, np.searchsorted(bounds, batch.rows.numpy(), "right") - 1, 1)
    # A last sample that does not fill a batch is left out.
    assert np.abs(counts[:4] - [20, 40, 80, 40]).sum() <= 1


def test_labels_of_training(files: Path) -> None:
    rows = [line.split("\t") for line in (files / "train.tsv").read_text().splitlines()[1:]]
    for data in (made(files), made(files, "test", val=of(files, "val"))):
        assert data.labels("topic").tolist() == [int(row[2]) for row in rows]
        torch.testing.assert_close(data.labels("stars"), torch.tensor([float(row[3]) for row in rows]))


class Checkpoint:
    spec = "somewhere"

    def tokenizer(self) -> Tokenizer:
        return tiny_tokenizer(9)


def test_which_tokenizer(files: Path) -> None:
    given = tiny_tokenizer(TEXT.context_length)
    given.save(files / "own.json")
    text = TextConfig(given.vocab_size, 16, 1, 2, context_length=12, pad_to=10, pad_id=4)
    options = {"train": of(files, "train"), "text": text, "heads": HEADS, "workers": 0, "batch_size": 8}
    named = attached(TextData(**options, tokenizer=str(files / "own.json")), files)
    assert named.tokenizer is not None
    assert len(named.tokenizer.encode(["a"])[0]) == 10
    found = attached(TextData(**options), files, checkpoint=Checkpoint())
    assert found.tokenizer is not None
    assert (found.tokenizer.context_length, found.tokenizer.pad_to, found.tokenizer.pad_id) == (9, 10, 4)
    assert not (files / "run").exists()
    trained = attached(TextData(**options), files)
    assert trained.tokenizer is not None
    assert trained.tokenizer.vocab_size <= text.vocab_size
    before = (files / "run" / "tokenizer.json").read_bytes()
    (files / "run" / "run.json").write_text("{}")  # a run that goes on keeps its own
    (files / "train.txt").write_text("zzz " * 100)
    attached(TextData(**options), files)
    assert (files / "run" / "tokenizer.json").read_bytes() == before
    with pytest.raises(DataError, match=r"own\.json has \d+ entries, the text encoder 20: set model\.text\.vocab_size"):
        attached(TextData(**{**options, "text": TextConfig(20, 16, 1, 2)}, tokenizer=str(files / "own.json")), files)


def test_other_files_on_another_rank(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dualenc.training.pair_data.all_gather_object", lambda value, world: [value, ["other"]])
    with pytest.raises(DataError, match="rank 1 finds other files than rank 0"):
        made(files)


def test_bad_lines_are_logged(files: Path) -> None:
    with open(files / "train.tsv", "a") as file:
        file.write("\nbroken")
    data = made(files, train={"topic": of(files, "train")["topic"]}, batch_size=41)
    (batch,) = data.train_dataloader()
    assert len(data.bad_sample_log) == 1
    assert json.loads((files / "run" / "bad_samples.jsonl").read_text())["key"] == "line 42"
    assert (batch.rows >= 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": {}}, "data.train is empty"),
        ({"train": {"x": {"files": "a.txt"}}}, "data.train.x names an unknown head: model.heads has guess, topic"),
        ({"train": {"old": {"files": "a.txt"}}}, "data.train.old: a head of kind pooler"),
        ({"train": {"near": {"files": "a.tsv"}}}, "data.train.near has no pair"),
        ({"train": {"guess": {"files": "a.tsv", "pair": "b"}}}, "data.train.guess.pair 'b'"),
        ({"train": {"guess": {"files": "no.txt"}}}, "data.train.guess: files 'no.txt' match no file"),
        ({"train": {"topic": {"files": "FILES/train.txt"}}}, "data.train.topic: .*train.txt has no column 'label'"),
        ({"val": 1.5}, "data.val 1.5 must lie between"),
        ({"val": {"topic": {"files": "FILES/ask.tsv"}}}, "data.val.topic: .*no column 'label', only 'text'"),
        ({"mix": "mixed"}, "data.mix 'mixed'"),
        ({"bad_samples": 2.0}, "data.bad_samples 2.0"),
        ({"batch_size": 4000}, "batch size 4000 is larger than the data"),
        ({"batch_size": 45, "mix": "round_robin"}, "data.train.topic gives 40 lines an epoch, fewer than data"),
        ({"mask": 1.0}, "data.mask 1.0: the share"),
        ({"stage": "test"}, "data.val is null: there is nothing to test"),
        ({"stage": "predict"}, "data.predict is null: there is nothing to predict"),
        ({"labels": ("0", "1", "3")}, r"train\.tsv line \d+: label '2' in column 'label' .* head 'topic'"),
        ({"heads": {"a": HeadConfig("mlm"), "b": HeadConfig("rtd")}}, "heads a and b read masked tokens"),
    ],
)  # fmt: skip
def test_errors_name_the_option(files: Path, options: dict, message: str) -> None:
    options = json.loads(json.dumps(options, default=vars).replace("FILES", str(files)))
    stage, labels = options.pop("stage", "fit"), tuple(options.pop("labels", ("0", "1", "2")))
    heads = {name: HeadConfig(head["kind"]) for name, head in options.pop("heads", {}).items()}
    heads = heads or {**HEADS, "topic": HeadConfig("classification", labels)}
    with pytest.raises(DataError, match=message):
        attached(
            TextData(**{"train": of(files, "train"), "text": TEXT, "heads": heads, "workers": 0, **options}),
            files,
            stage,
        ).train_dataloader()


def test_negatives_and_equal_texts(files: Path, seed: int) -> None:
    """Equal texts of a side have equal ids, and the negatives of all lines follow the pairs."""
    rng = random.Random(seed)
    passages = [f"{WORDS[n]} {n}" for n in range(3)]
    rows = [{"text": f"{n} {rng.choice(WORDS)}", "other": passages[n % 3], "more": None} for n in range(8)]
    rows[1]["more"], rows[2]["more"], rows[4]["more"] = [passages[0], "a dog"], "two dogs", []
    (files / "hard.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"files": str(files / "hard.jsonl"), "pair": "other", "negatives": "more"}
    data = made(files, train={"near": source}, val={"near": {"files": str(files / "val.tsv")}})
    (batch,) = data.train_dataloader()
    part, order = batch.parts["near"], batch.rows.tolist()
    texts = [rows[n]["text"] for n in order] + [rows[n]["other"] for n in order]
    for n in order:
        texts += {1: [passages[0], "a dog"], 2: ["two dogs"]}.get(n, [])
    assert data.tokenizer is not None
    assert torch.equal(batch.tokens.padded()[0], data.tokenizer(texts).padded()[0])
    assert part.negatives.tolist() == [16, 17, 18]
    same = part.ids[:, 1:] == part.ids[:, 1]
    assert same.tolist() == [[i % 3 == j % 3 for j in order] for i in order]
    assert len(part.ids[:, 0].unique()) == 8
    copies = [one in part.ids[:, 1].tolist() for one in part.negative_ids.tolist()]
    assert copies == [text in passages for text in texts[16:]]
    for batch in data.val_dataloader():  # only training reads negatives
        assert batch.parts["near"].negatives is None
    columns = [loader.dataset.facts()["columns"] for loader in (data.train_dataloader(), data.val_dataloader())]
    assert columns == [[["near", "text", "other", None, "more"]], [["near", "text", "other", None]]]


def test_bad_negatives(files: Path) -> None:
    table = {"files": str(files / "train.tsv"), "pair": "other"}
    for train, val, message in (
        ({"like": table | {"negatives": "label", "label": "score"}}, None, "data.train.like.negatives 'label': only"),
        ({"near": table | {"negatives": "no"}}, None, "has no column 'no'"),
        ({"near": table}, {"near": table | {"negatives": "label"}}, "data.val.near.negatives: only training"),
    ):
        with pytest.raises(DataError, match=message):
            made(files, train=train, val=val)
    more = [["c", 3], [""], {"a": 1}, 5, *["good"] * 20]
    lines = (json.dumps({"text": f"a {n}", "other": f"b {n}", "more": one}) + "\n" for n, one in enumerate(more))
    (files / "hard.jsonl").write_text("".join(lines))
    source = {"files": str(files / "hard.jsonl"), "pair": "other", "negatives": "more"}
    data = made(files, train={"near": source}, batch_size=24)
    list(data.train_dataloader())
    assert {record.key for record in data.bad_sample_log.known} == {f"line {n}" for n in range(1, 5)}
