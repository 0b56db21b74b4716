"""The texts that a tokenizer is trained on: all of few, and of many an even share, whoever reads them."""

import random
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fits import fit
from helpers import write_shards

from dualenc.cli import main
from dualenc.data import ShardIndex, Tokenizer
from dualenc.data.pairs import all_captions
from dualenc.data.text import training_texts
from dualenc.data.text.training_texts import draw_texts, spread_samples
from dualenc.models import TextConfig
from dualenc.models.heads import HeadConfig
from dualenc.training import pair_data, text_data
from dualenc.training.text_data import TextData


def test_every_range_of_samples_has_its_share(seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(50):
        size, most = rng.randint(1, 500), rng.randint(1, 100)
        rows = list(spread_samples(range(size), most, seed))
        assert len(rows) == min(size, most)
        assert rows == sorted(set(rows))
        if size > most:  # each range of size / most samples, cut to whole numbers, has one
            edges = [size * i // most for i in range(most + 1)]
            assert all(start <= row < stop for row, (start, stop) in zip(rows, pairwise(edges), strict=True))
        assert rows == list(spread_samples(range(size), most, seed))
    assert list(spread_samples(range(1000), 10, seed)) != list(spread_samples(range(1000), 10, seed + 1))


def test_every_text_has_the_same_chance() -> None:
    """Over fixed seeds, so that chance decides nothing: the count of a text is binomial, 6 deviations are the bound."""
    rounds, size, most = 4000, 30, 7
    counts = Counter(text for seed in range(rounds) for text in draw_texts(map(str, range(size)), most, seed))
    share = most / size
    assert sum(counts.values()) == rounds * most
    deviation = (rounds * share * (1 - share)) ** 0.5
    assert all(abs(counts[str(i)] - rounds * share) < 6 * deviation for i in range(size)), counts


def test_few_texts_are_all_taken_and_many_are_not_kept(seed: int) -> None:
    texts = [f"text {i}" for i in range(10)]
    assert draw_texts(iter(texts), 10, seed) == draw_texts(iter(texts), 11, seed) == texts
    assert draw_texts([], 3, seed) == []
    drawn = draw_texts(map(str, range(100_000)), 50, seed)
    assert len(set(drawn)) == 50
    assert drawn == draw_texts(map(str, range(100_000)), 50, seed)
    assert max(map(int, drawn)) > 50_000


class Trained:
    """Recorder of the texts with which tokenizers are trained, and of the samples that are read for them.

    Attributes:
        texts: texts of each training.
        read: number of samples that were read.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.texts: list[list[str]] = []
        self.read = 0
        train, spread = Tokenizer.train, training_texts.spread_samples

        def record(texts: Iterable[str], *args: Any) -> Tokenizer:
            self.texts.append(list(texts))
            return train(self.texts[-1], *args)

        def count(index: Any, most: int, seed: int) -> Iterator[Any]:
            for sample in spread(index, most, seed):
                self.read += 1
                yield sample

        monkeypatch.setattr(Tokenizer, "train", record)
        for module in (training_texts, pair_data, text_data):
            monkeypatch.setattr(module, "spread_samples", count)

    def bound(self, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Lower the bound."""
        for module in (training_texts, pair_data, text_data):
            monkeypatch.setattr(module, "MAX_TEXTS", most)


def test_a_run_trains_on_all_captions_or_on_as_many_as_the_bound(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = Trained(monkeypatch)
    write_shards(tmp_path / "shards", [12, 8], seed, captions=3)
    run = [*fit(tmp_path), "--trainer.max_steps", "1", "--data.val", "null", "--seed_everything", str(seed)]
    main(run)
    assert trained.texts == [list(all_captions(ShardIndex.build(str(tmp_path / "shards")), "auto"))]
    assert len(trained.texts[0]) == 60
    trained.bound(10, monkeypatch)
    for workers in ("0", "2"):
        main([*run, "--data.workers", workers, "--trainer.default_root_dir", str(tmp_path / workers)])
    assert trained.texts[1] == trained.texts[2]
    assert len(trained.texts[1]) == 10
    assert set(trained.texts[1]) <= set(trained.texts[0])
    assert trained.read == 20 + 10 + 10


def test_the_command_trains_on_as_many_captions_as_the_bound(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = Trained(monkeypatch)
    write_shards(tmp_path / "shards", [12, 8], seed, captions=3)
    main(["tokenizer", str(tmp_path / "shards"), str(tmp_path / "all.json"), "--vocab_size", "200"])
    assert "60 captions, with" in capsys.readouterr().out
    trained.bound(10, monkeypatch)
    main(["tokenizer", str(tmp_path / "shards"), str(tmp_path / "some.json"), "--vocab_size", "200"])
    assert "10 captions, drawn from 20 samples, with" in capsys.readouterr().out
    assert [len(texts) for texts in trained.texts] == [60, 10]
    assert set(trained.texts[1]) <= set(trained.texts[0])


def test_each_head_of_a_text_task_has_its_share(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    trained = Trained(monkeypatch)
    heads = {"guess": HeadConfig("mlm"), "topic": HeadConfig("classification", ("0", "1"))}
    (tmp_path / "guess.txt").write_text("".join(f"guess {i}\n" for i in range(11)))
    (tmp_path / "topic.tsv").write_text("text\tlabel\n" + "".join(f"topic {i}\t{i % 2}\n" for i in range(37)))
    sources: dict[str, Any] = {
        "guess": {"files": str(tmp_path / "guess.txt")},
        "topic": {"files": str(tmp_path / "topic.tsv")},
    }
    for most, shares in ((48, (11, 37)), (12, (3, 10))):  # rounded up
        trained.bound(most, monkeypatch)
        data = TextData(sources, TextConfig(60, width=16, layers=1, heads=2, context_length=12), heads, seed=seed)
        data.trainer = SimpleNamespace(
            default_root_dir=str(tmp_path / str(most)), state=SimpleNamespace(fn="fit"), lightning_module=None
        )
        data.prepare_data()
        assert trained.read == sum(shares)
        assert len(trained.texts[-1]) == most
        assert len(set(trained.texts[-1])) == most
        assert {text.split()[0] for text in trained.texts[-1]} == set(heads)
        trained.read = 0
