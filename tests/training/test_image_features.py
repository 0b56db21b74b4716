"""Training from stored image features equals training from images, under a locked tower."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fits import SMALL, SMOKE, fails, metrics
from helpers import encode, pixels, tiny_embedder, tiny_tokenizer, write_benchmark, write_shards, write_tar
from safetensors.torch import load_file

from dualenc import ShardIndex, load
from dualenc.cli import main
from dualenc.data import BadSampleLog, Loader, PairDataset
from dualenc.data.image_features import Features
from dualenc.training.contrastive import ContrastiveTask
from dualenc.utils.errors import DataError


@pytest.fixture
def config(tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]) -> Path:
    """Write the configuration of a run with a locked tower and without augmentation, on three shards."""
    write_shards(tmp_path / "shards", [20, 15, 13], seed, captions=3)
    sets = {"data": [str(write_benchmark(tmp_path / "set", seed, "retrieval"))]}
    evaluation = [{"class_path": "dualenc.training.Evaluation", "init_args": sets}]
    options = [
        "--data.train", str(tmp_path / "shards"), "--data.captions", "json.captions", "--data.augment", "null",
        "--model.image_tuning.locked", "true", "--seed_everything", str(seed), "--trainer.max_steps", "10",
        "--trainer.callbacks", json.dumps(evaluation),
    ]  # fmt: skip
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(SMOKE), *SMALL, *options, "--print_config"])
    path = tmp_path / "run.yaml"
    path.write_text(capsys.readouterr().out)
    return path


def fit(config: Path, run: str, *more: str) -> Path:
    folder = config.parent / run
    main(["fit", "--config", str(config), "--trainer.default_root_dir", str(folder), *more])
    return folder


def embed(config: Path, *model: str) -> str:
    out = config.parent / "features"
    main(["embed", *(model or [str(config)]), str(config.parent / "shards"), str(out), "--features"])
    return str(out)


def stop_at(step: int) -> list[str]:
    return ["--trainer.callbacks", json.dumps([{"class_path": "helpers.StopAt", "init_args": {"step": step}}])]


def largest_difference(first: Path, second: Path) -> float:
    """Return the largest relative difference between the losses of two runs."""
    x, y = (np.array(metrics(run, "train/loss")) for run in (first, second))
    assert len(x) == len(y) == 10
    return float((abs(x - y) / abs(x)).max())


@pytest.mark.slow
@pytest.mark.parametrize("micro", ["null", "5"])
def test_run_from_features_equals_run_from_images(config: Path, micro: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ["--data.micro_batch_size", micro]
    from_images = fit(config, "from_images", *options)
    features = embed(config)
    embedded: list[int] = []
    real = ContrastiveTask._embed

    def spy(self: ContrastiveTask, images: Any, tokens: Any) -> Any:
        embedded.append(images.dim())
        return real(self, images, tokens)

    monkeypatch.setattr(ContrastiveTask, "_embed", spy)
    # Augmentation has no effect on features.
    from_features = fit(config, "from_features", *options, "--data.features", features, "--data.augment", "Augment")
    assert set(embedded) == {2}
    assert largest_difference(from_images, from_features) < 1e-6
    for name in ("val/loss", "val/mrr", "set/mrr"):
        assert metrics(from_features, name) == pytest.approx(metrics(from_images, name), rel=1e-5)
        assert metrics(from_images, name)
    first, second = (load_file(run / "last" / "model.safetensors") for run in (from_images, from_features))
    for name, x in first.items():
        torch.testing.assert_close(second[name], x, atol=1e-5, rtol=1e-4)
        assert torch.equal(second[name], x) or not name.startswith("image.")
    model = load(from_features)  # has the image tower, so it embeds images
    assert model.embed_images([torch.zeros(3, 40, 40, dtype=torch.uint8)]).shape == (1, 32)
    if micro != "null":
        return
    embedded.clear()
    root = ["--trainer.default_root_dir", str(from_features), "--ckpt_path", "last"]
    main(["validate", "--config", str(config), "--data.features", features, *root])
    assert set(embedded) == {4}  # images, since the checkpoint may have any image tower
    # Control: with augmentation the run differs.
    assert largest_difference(from_images, fit(config, "augmented", *options, "--data.augment", "Augment")) > 1e-3


@pytest.mark.slow
def test_stopped_run_resumes_bit_equal(config: Path, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    features = embed(config)
    from_features = ["--data.features", features, "--data.batch_size", "8"]
    uninterrupted = fit(config, "uninterrupted", *from_features)
    steps = json.loads((uninterrupted / "run.json").read_text())["train_pairs"] // 8  # an epoch has about four
    stop = 1 + seed % 2 * steps  # never the last step of an epoch, after which the run itself saves
    with pytest.raises(SystemExit):
        fit(config, "stopped", *from_features, *stop_at(stop))
    begun = ["fit", "--config", str(config), "--trainer.default_root_dir", str(config.parent / "stopped")]
    begun += ["--data.batch_size", "8"]
    assert "had data.features" in fails(capsys, [*begun, "--ckpt_path", "last"])
    resumed = fit(config, "stopped", *from_features, "--ckpt_path", "last")
    names = ["train/loss", "val/loss", "val/mrr"]
    assert [metrics(resumed, name) for name in names] == [metrics(uninterrupted, name) for name in names]
    first, second = (load_file(run / "last" / "model.safetensors") for run in (uninterrupted, resumed))
    assert all(torch.equal(x, second[name]) for name, x in first.items())

    # A run from images cannot resume with features: they may be of another tower.
    with pytest.raises(SystemExit):
        fit(config, "from_images", "--data.batch_size", "8", *stop_at(2))
    begun = ["fit", "--config", str(config), "--trainer.default_root_dir", str(config.parent / "from_images")]
    begun += [*from_features, "--ckpt_path", "last", "--run.accept_changes", "[features]"]
    assert "did not have these data.features" in fails(capsys, begun)


def test_features_that_do_not_fit_are_refused(
    config: Path, tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    features = embed(config)
    begin = ["fit", "--config", str(config), "--trainer.default_root_dir", str(tmp_path / "run")]
    begin += ["--data.features", features]
    assert "model.image_tuning.locked" in fails(capsys, [*begin, "--model.image_tuning.locked", "false"])
    for other in (
        ["--seed_everything", str(seed + 1)],
        ["--model.resize", "squash"],
        ["--model.image.overrides.num_heads", "4"],
    ):
        error = fails(capsys, [*begin, *other])
        assert str(features) in error
        assert str(config) in error
    text = config.read_text()
    for old, new, message in (
        ("seed_everything: \\d+", "seed_everything: true", "set it to a number"),
        ("embed_dim: 32", "embed_dims: 32", "embed_dims"),
        (
            "class_path: dualenc.training.ContrastiveTask",
            "class_path: dualenc.training.Nothing",
            "dualenc.training.Nothing",
        ),
        ("(?s)model:.*", "", "no section model"),
        ("(?s).*", "[", "line 1: a bracket is not closed"),
    ):
        (tmp_path / "wrong.yaml").write_text(re.sub(old, new, text, count=1))
        new_out = str(tmp_path / "new")
        error = fails(capsys, ["embed", str(tmp_path / "wrong.yaml"), str(tmp_path / "shards"), new_out, "--features"])
        assert str(tmp_path / "wrong.yaml") in error
        assert message in error
    more = tmp_path / "more"
    write_shards(more, [80], seed)
    assert f"no features of shard {more}" in fails(capsys, [*begin, "--data.train", str(more)])
    assert f"no features of shard {more}" in fails(capsys, [*begin, "--data.val", str(more)])
    assert "holds no image features" in fails(capsys, [*begin, "--data.features", str(tmp_path)])
    file = Path(features) / "part-001.safetensors"
    content = file.read_bytes()
    file.unlink()
    assert f"{file} is missing" in fails(capsys, begin)
    file.write_bytes(content[: len(content) // 2])
    assert f"{file} is damaged" in fails(capsys, begin, 1)
    assert not (tmp_path / "run" / "last").exists()


def test_features_of_a_model_directory(config: Path, tmp_path: Path) -> None:
    """Train a new text tower with the image tower of an earlier run; evaluation decodes images."""
    earlier = fit(config, "earlier", "--model.image_tuning.locked", "false", "--trainer.max_steps", "2")
    spec = str(earlier / "last")
    features = embed(config, spec)
    begin = ["--model.pretrained", spec, "--data.tokenizer", f"{spec}/tokenizer.json", "--seed_everything", "1"]
    run = fit(config, "run", *begin, "--data.features", features)
    before, after = (load_file(folder / "last" / "model.safetensors") for folder in (earlier, run))
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("image."))
    assert not torch.equal(before["image_projection.weight"], after["image_projection.weight"])
    # The configuration of this run starts with the same tower, so its features may be added to the folder.
    text = re.sub(r"pretrained: .*", f"pretrained: {spec}", config.read_text())
    (tmp_path / "run.yaml").write_text(text)
    main(["embed", str(tmp_path / "run.yaml"), str(tmp_path / "shards"), features, "--features"])


def test_features_do_not_depend_on_training_settings(config: Path, tmp_path: Path) -> None:
    """Embed with a configuration whose tower has patch dropout in training."""
    features = embed(config)
    text = config.read_text().replace("locked: true", "locked: false")
    (tmp_path / "other.yaml").write_text(text.replace("patch_dropout: 0.0", "patch_dropout: 0.5"))
    assert (tmp_path / "other.yaml").read_text().count("patch_dropout: 0.5") == 1
    main(["embed", str(tmp_path / "other.yaml"), str(tmp_path / "shards"), str(tmp_path / "again"), "--features"])
    for path in Path(features).glob("*.safetensors"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_from_features(tmp_path: Path, seed: int, workers: int) -> None:
    """Features are found for moved shards and any selection of samples, and bad samples are replaced as with images."""
    rng = np.random.default_rng(seed)
    broken = set(rng.choice(40, 6, replace=False).tolist())
    samples = [
        {
            "__key__": f"{i:03d}",
            "png": encode(pixels(rng), "png")[: 30 if i in broken else None],
            "txt": f"{i} cat".encode(),
        }
        for i in range(40)
    ]
    for i, (first, last) in enumerate([(0, 9), (9, 10), (10, 27), (27, 40)]):
        write_tar(tmp_path / "shards" / f"{i}.tar", samples[first:last])
    embedder = tiny_embedder(seed)
    embedder.save(tmp_path / "model")
    out = str(tmp_path / "out")
    main(["embed", str(tmp_path / "model"), str(tmp_path / "shards"), out, "--features", "--batch_size", "4"])
    (tmp_path / "shards").rename(tmp_path / "moved")
    order = [f"{tmp_path}/moved/{i}.tar" for i in (3, 0, 2)]
    index = ShardIndex.build(order).take(np.sort(rng.choice(39, 30, replace=False)))
    features = Features(out)
    features.check(index.parts)

    def batches(features: Features | None, train: bool, bad_sample_log: BadSampleLog) -> list[Any]:
        data = PairDataset(index, "txt", tiny_tokenizer(), embedder.preprocess, seed if train else None, features)
        loader = Loader(
            data,
            8,
            micro_batch_size=3,
            seed=seed,
            window=2,
            shuffle=train,
            workers=workers,
            bad_sample_log=bad_sample_log,
        )
        found = [micro_batch for batch in loader for micro_batch in batch]
        loader.close()
        return found

    for train in (True, False):
        logs = [BadSampleLog(len(index), tmp_path / f"{train}{i}.jsonl") for i in range(2)]
        images, rows = batches(None, train, logs[0]), batches(features, train, logs[1])
        assert len(images) == len(rows)
        assert any(micro_batch.bad for micro_batch in rows)
        for x, y in zip(images, rows):
            assert torch.equal(x.rows, y.rows)
            assert torch.equal(x.ids, y.ids)
            assert torch.equal(x.tokens.ids, y.tokens.ids)
            assert [tuple(bad) for bad in x.bad] == [tuple(bad) for bad in y.bad]
            with torch.no_grad():
                expected = embedder.model.image(embedder.preprocess.normalize(x.images))
            torch.testing.assert_close(y.images, expected, atol=1e-5, rtol=1e-5)
            assert y.images.dtype == torch.float32
        assert logs[0].log is not None
        assert logs[1].log is not None
        assert logs[0].log.path.read_text() == logs[1].log.path.read_text()


def test_features_of_other_images_are_refused(tmp_path: Path, seed: int) -> None:
    """Two shards with equal keys and tar headers, since their images have the same size, are told apart."""
    rng = np.random.default_rng(seed)
    for name in ("a", "b"):
        samples = [{"__key__": "0", "png": encode(pixels(rng), "png", compress_level=0), "txt": b"cat"}]
        write_tar(tmp_path / name / "0.tar", samples, mtime=0)
    tiny_embedder(seed).save(tmp_path / "model")
    main(["embed", str(tmp_path / "model"), str(tmp_path / "a"), str(tmp_path / "out"), "--features"])
    features = Features(tmp_path / "out")
    for name in ("a", "b"):
        index = ShardIndex.build(str(tmp_path / name), hashes=("piece",))
        data = PairDataset(index, "txt", tiny_tokenizer(), tiny_embedder(seed).preprocess, 0, features)
        if name == "a":
            assert data[0, 0, np.array([0])].images.shape == (1, 16)
        else:
            with pytest.raises(DataError, match="of other images than"):
                data[0, 0, np.array([0])]
