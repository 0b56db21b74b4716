"""The command line as users see it: the files it writes, and one line for each mistake."""

import csv
import json
import subprocess
import sys
from pathlib import Path

import pytest
from fits import SHIPPED, SMALL, SMOKE, fails, fit
from helpers import encode, pixels, tiny_embedder, write_benchmark, write_choices, write_shards, write_tar
from servers import WebServer

from dualenc import DataError, ShardIndex, TextConfig
from dualenc.cli import main
from dualenc.models import HeadConfig
from dualenc.training import TextData


@pytest.fixture
def shards(tmp_path: Path, seed: int) -> Path:
    write_shards(tmp_path / "shards", [12, 12], seed)
    return tmp_path


def test_evaluating_commands_write_results(tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_embedder(seed).save(tmp_path / "model")
    kinds = {"zeroshot": "classification", "retrieval": "retrieval"}
    for command, kind in kinds.items():
        data = [str(write_benchmark(tmp_path / f"{kind}{i}", seed + i, kind)) for i in range(2)]
        main([command, str(tmp_path / "model"), *data, "--out", str(tmp_path / command), "--workers", "0"])
        results = json.loads((tmp_path / command / f"{command}.json").read_text())
        assert [result["dataset"] for result in results] == [f"{kind}0", f"{kind}1"]
        assert all(set(result) >= {"dataset", "model", "n", "complete", "metrics", "intervals"} for result in results)
        html = (tmp_path / command / "report.html").read_text().replace("<wbr>", "")
        printed = capsys.readouterr().out
        for name in results[0]["metrics"]:
            assert name in printed
            assert name in html
        assert "http:" not in html
        assert "https:" not in html


def test_secrets_stay_out_of_the_report(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch, web: WebServer
) -> None:
    tiny_embedder(seed).save(tmp_path / "model")
    write_benchmark(web.folder / "set", seed)
    url = f"{web.url}/set?X-Amz-Signature=SECRET"
    arguments = ["zeroshot", str(tmp_path / "model"), url, "--out", str(tmp_path / "out"), "--workers", "0"]
    monkeypatch.setattr(sys, "argv", ["dualenc", *arguments])
    main(arguments)
    for path in (tmp_path / "out").iterdir():
        assert b"SECRET" not in path.read_bytes(), path


def test_report_escapes_html(tmp_path: Path, seed: int) -> None:
    tiny_embedder(seed).save(tmp_path / "model")
    data = write_benchmark(tmp_path / "<script>alert(1)<", seed)
    main(["zeroshot", str(tmp_path / "model"), str(data), "--out", str(tmp_path / "out"), "--workers", "0"])
    assert "<script>" not in (tmp_path / "out" / "report.html").read_text()


def test_configs_are_listed_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    main(["configs"])
    listed = capsys.readouterr().out
    assert all(path.stem in listed for path in SHIPPED)
    main(["configs", "smoke"])
    assert capsys.readouterr().out == SMOKE.read_text()


@pytest.mark.slow
def test_help_and_version() -> None:
    for arguments in (["--help"], ["zeroshot", "--help"], ["fit", "--help"], ["--version"]):
        done = subprocess.run([sys.executable, "-m", "dualenc", *arguments], capture_output=True, text=True, check=True)
        assert "dualenc" in done.stdout


def test_unknown_commands_and_options_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "'train'" in fails(capsys, ["train"])
    assert "--nope" in fails(capsys, ["zeroshot", "model", "data", "--nope", "1"])
    assert "'nope'" in fails(capsys, ["configs", "nope"])
    assert "exists already" in fails(capsys, ["demo", str(tmp_path)])


def test_unknown_keys_are_named(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = shards / "wrong.yaml"
    wrong.write_text(SMOKE.read_text().replace("context_length", "context_lenght"))
    arguments = fit(shards)
    arguments[2] = str(wrong)
    assert "context_lenght" in fails(capsys, arguments)
    assert "no.yaml" in fails(capsys, ["fit", "--config", "no.yaml"])
    assert "batchsize" in fails(capsys, fit(shards, "--data.batchsize", "3"))


@pytest.mark.parametrize("data", ["a: 1\n".encode("utf-16"), "a: é\n".encode("latin-1"), b"a: \0\n"])
def test_configurations_that_are_not_utf8_are_named(
    tmp_path: Path, data: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "wrong.yaml").write_bytes(data)
    line = fails(capsys, ["fit", "--config", str(tmp_path / "wrong.yaml")])
    assert "wrong.yaml" in line
    assert "UTF-8" in line


def test_unknown_timm_models_are_named(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "vit_huge_patch99" in fails(capsys, fit(shards, "--model.image.name", "vit_huge_patch99"))
    assert "resnet18" in fails(capsys, fit(shards, "--model.image.name", "resnet18"))


def test_missing_shards_and_pipes_are_refused(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pattern = str(shards / "none-{00..03}.tar")
    assert "none-00.tar" in fails(capsys, fit(shards, "--data.train", pattern))
    assert "pipe:" in fails(capsys, fit(shards, "--data.train", "pipe:cat x.tar"))


def test_shards_without_images_or_captions_are_refused(
    tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    import numpy as np

    picture = encode(pixels(np.random.default_rng(seed)))
    write_tar(tmp_path / "text.tar", [{"__key__": "a", "txt": b"a cat"}])
    write_tar(tmp_path / "image.tar", [{"__key__": "a", "png": picture}])
    for name, what in (("text", "no images"), ("image", "no captions")):
        line = fails(capsys, fit(tmp_path, "--data.train", str(tmp_path / f"{name}.tar")))
        assert what in line
        assert f"{name}.tar" in line


def test_batch_larger_than_the_data_is_refused(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = fails(capsys, fit(shards, "--data.batch_size", "1000"))
    assert "1000" in line
    assert "larger than the data" in line


@pytest.mark.parametrize("size", ["1", "0", "-4"])
def test_batch_without_two_pairs_is_refused(shards: Path, capsys: pytest.CaptureFixture[str], size: str) -> None:
    line = fails(capsys, fit(shards, "--data.batch_size", size))
    assert f"data.batch_size {size}" in line


def test_contrastive_head_needs_two_pairs() -> None:
    def data(problem: str) -> None:
        heads = {"same": HeadConfig("embedding", problem=problem)}
        source = {"files": "no.jsonl", "pair": "other", **({"label": "score"} if problem == "cosine" else {})}
        TextData({"same": source}, TextConfig(100), heads, batch_size=1)

    data("cosine")
    with pytest.raises(DataError, match=r"data\.batch_size 1 .*model\.heads\.same"):
        data("negatives")


@pytest.mark.parametrize("root", ["file", "file/run", "/proc/run"])
def test_run_folder_that_cannot_be_made_is_named_before_the_data_are_read(
    shards: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, root: str
) -> None:
    def build(*args: object, **options: object) -> None:
        raise AssertionError("the shards are read")

    monkeypatch.setattr(ShardIndex, "build", build)
    (shards / "file").touch()
    line = fails(capsys, fit(shards, "--trainer.default_root_dir", str(shards / root)))
    assert "trainer.default_root_dir" in line
    assert str(shards / root) in line


def test_gradient_accumulation_is_refused(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "accumulate_grad_batches" in fails(capsys, fit(shards, "--trainer.accumulate_grad_batches", "2"))


def test_evaluation_sets_of_another_layout_are_refused(
    tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_embedder(seed).save(tmp_path / "model")
    (tmp_path / "empty").mkdir()
    line = fails(capsys, ["zeroshot", str(tmp_path / "model"), str(tmp_path / "empty")])
    assert "nshards.txt" in line
    data = write_benchmark(tmp_path / "set", seed, "retrieval")
    assert "dualenc retrieval" in fails(capsys, ["zeroshot", str(tmp_path / "model"), str(data)])


def test_incomplete_model_directories_are_refused(
    tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_benchmark(tmp_path / "set", seed)
    model = tmp_path / "model"
    tiny_embedder(seed).save(model)
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "format": 99}))
    assert "format 99" in fails(capsys, ["zeroshot", str(model), str(data)])
    (model / "model.safetensors").unlink()
    assert "model.safetensors" in fails(capsys, ["zeroshot", str(model), str(data)])
    assert "nowhere" in fails(capsys, ["zeroshot", "nowhere", str(data)])


def test_undecodable_image_is_failed_work(tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    """The status is 1 and the message names shard and key, also from a worker process."""
    tiny_embedder(seed).save(tmp_path / "model")
    data = write_benchmark(tmp_path / "set", seed, counts=(3,))
    write_tar(data / "test" / "0.tar", [{"__key__": "bad", "jpg": b"no jpeg", "cls": b"0"}])
    for workers in "01":
        line = fails(capsys, ["zeroshot", str(tmp_path / "model"), str(data), "--workers", workers], status=1)
        assert "'bad'" in line
        assert "0.tar" in line
    write_tar(tmp_path / "shards" / "0.tar", [{"__key__": f"{i}", "png": b"no png", "txt": b"a"} for i in range(64)])
    for workers in "01":
        line = fails(capsys, fit(tmp_path, "--data.val", "null", "--data.workers", workers), status=1)
        assert "0.tar" in line
        assert "cannot be decoded" in line
        for path in sorted((tmp_path / "run").rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()


def test_missing_checkpoints_are_named(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "https://example.org/x.ckpt" in fails(capsys, fit(shards, "--ckpt_path", "https://example.org/x.ckpt"))
    assert "gone.ckpt" in fails(capsys, fit(shards, "--ckpt_path", "gone.ckpt"))


def test_wrong_options_are_named(shards: Path, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_embedder(seed).save(shards / "model")
    data = str(write_benchmark(shards / "set", seed))
    zeroshot = ["zeroshot", str(shards / "model"), data]
    assert "--workers" in fails(capsys, [*zeroshot, "--workers", "-1"])
    (shards / "file").write_text("taken")
    assert "--out" in fails(capsys, [*zeroshot, "--out", str(shards / "file" / "out")])
    assert "max_steps" in fails(capsys, [*fit(shards), "--trainer.max_steps", "-1", "--data.val", "null"])
    rest = ["--config", str(SMOKE), *SMALL, "--data.train", str(shards / "shards")]
    assert "--ckpt_path" in fails(capsys, ["validate", *rest])
    assert "embed" in fails(capsys, ["predict", *rest])
    (shards / "wrong.ckpt").write_text("no checkpoint")
    assert "wrong.ckpt" in fails(capsys, fit(shards, "--ckpt_path", str(shards / "wrong.ckpt")))


def test_incomplete_results_are_failed_work_unless_allowed(
    tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_embedder(seed).save(tmp_path / "model")
    data = write_benchmark(tmp_path / "set", seed, counts=(9, 4))
    zeroshot = ["zeroshot", str(tmp_path / "model"), str(data), "--workers", "0", "--out", str(tmp_path / "out")]
    main(zeroshot)  # control
    (data / "test" / "1.tar").unlink()
    line = fails(capsys, zeroshot, status=1)
    assert "set is not complete" in line
    assert "1.tar" in line
    assert "--allow-partial" in line
    (result,) = json.loads((tmp_path / "out" / "zeroshot.json").read_text())  # the metrics are written nevertheless
    assert (result["n"], result["complete"], result["problems"][0]["count"]) == (9, False, 1)
    for option in ("--allow-partial", "--allow_partial"):
        main([*zeroshot, option])
        assert "1.tar" in capsys.readouterr().out
    assert "1.tar" in (tmp_path / "out" / "report.html").read_text()


def test_probe_choice_and_compare(tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(tmp_path / "model")
    tiny_embedder(seed).save(model)
    for split, count in (("train", 30), ("test", 20)):
        write_benchmark(tmp_path / "set", seed + len(split), counts=(count,), split=split, classes=3)
    data = str(tmp_path / "set")
    main(["probe", model, data, "--out", str(tmp_path / "probe"), "--workers", "0"])
    assert "linear_acc1" in capsys.readouterr().out
    within = ["retrieval", model, data, "--between", "image-image", "--workers", "0"]
    main([*within, "--out", str(tmp_path / "retrieval-image-image")])
    assert "image_image_retrieval_recall@1" in capsys.readouterr().out
    write_choices(tmp_path / "winoground", seed)
    main(["choice", model, str(tmp_path / "winoground"), "--out", str(tmp_path / "choice"), "--workers", "0"])
    assert "group_score" in capsys.readouterr().out
    metrics = {
        "probe": "linear_acc1",
        "choice": "group_score",
        "retrieval-image-image": "image_image_retrieval_recall@1",
    }
    for name, metric in metrics.items():
        out = tmp_path / name
        assert json.loads((out / f"{name}.json").read_text())[0]["complete"]
        main(["compare", str(out), str(out), "--out", str(tmp_path / f"both_{name}")])
        printed = capsys.readouterr().out
        assert metric in printed
        assert "A and B are the same model" in printed
        assert json.loads((tmp_path / f"both_{name}" / "compare.json").read_text())[0]["same_model"]
        assert metric in (tmp_path / f"both_{name}" / "report.html").read_text().replace("<wbr>", "")
    assert "cannot be both learned from and measured on" in fails(capsys, ["probe", model, data, "--train", "test"])
    assert "no split 'val'" in fails(capsys, ["probe", model, data, "--train", "val"])
    assert "dualenc zeroshot" in fails(capsys, ["retrieval", model, data])
    pairs = str(write_benchmark(tmp_path / "pairs", seed, "retrieval"))
    wrong = fails(capsys, ["retrieval", model, pairs, "--between", "image-image"])
    assert "name a set of another kind: classification" in wrong
    assert "dualenc retrieval" in fails(capsys, ["probe", model, pairs])
    assert "two evaluation sets are called 'set'" in fails(capsys, ["zeroshot", model, data, data])
    assert "does not hold results" in fails(capsys, ["compare", str(tmp_path / "probe"), str(tmp_path)])
    assert "ViT-B-23" in fails(capsys, ["zeroshot", "open_clip:ViT-B-23", data])


def test_results_of_something_else_are_not_replaced(
    tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same command again replaces its result; another command, model, set, prompt or page is kept."""
    for i, name in enumerate(("one", "two")):
        tiny_embedder(seed + i).save(tmp_path / name)
        write_benchmark(tmp_path / f"set_{name}", seed + i)
    one, two = (["zeroshot", str(tmp_path / "one"), str(tmp_path / f"set_{name}")] for name in ("one", "two"))
    out = ["--workers", "0", "--out", str(tmp_path / "out")]
    main([*one, *out])
    (tmp_path / "out" / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    for arguments, kept in (
        (two, "set_one"),
        (["zeroshot", str(tmp_path / "two"), one[2]], f"model {tmp_path}/one"),
        ([*one, "--models", str(tmp_path / "two")], f"without model {tmp_path}/two"),
        ([*one, "--templates", "simple"], "without options"),
        (["evaluate", *one[1:]], "dualenc zeroshot"),
        (["retrieval", *one[1:], "--between", "image-image"], "dualenc zeroshot"),
    ):
        line = fails(capsys, [*arguments, *out])
        assert kept in line
        assert "--out" in line
    assert "dualenc zeroshot" in fails(capsys, ["compare", *out[-1:] * 2, *out[-2:]])
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    main([*one, *out])
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "report.html").write_text("of a run")
    assert "report.html" in fails(capsys, [*one, *out[:-1], str(tmp_path / "run")])
    main(["compare", *out[-1:] * 2, "--out", str(tmp_path / "both")])
    main(["compare", *out[-1:] * 2, "--out", str(tmp_path / "both")])
    assert "prompts: A" not in capsys.readouterr().out
    main([*one, "--templates", "simple", *out[:-1], str(tmp_path / "simple")])
    capsys.readouterr()
    main(["compare", out[-1], str(tmp_path / "simple"), "--out", str(tmp_path / "prompts")])
    assert "B 7 templates of simple" in capsys.readouterr().out
    assert "B 7 templates of simple" in (tmp_path / "prompts" / "report.html").read_text()
    main([*two, *out[:-1], str(tmp_path / "second")])
    (tmp_path / "second" / "zeroshot.json").write_text("{")
    assert "second/zeroshot.json" in fails(capsys, [*two, *out[:-1], str(tmp_path / "second")])


def rows_of(table: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(table.read_text().splitlines()))


def test_several_models_and_sets_fill_one_table(tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    models, sets = [], []
    for i in range(2):
        tiny_embedder(seed + i).save(tmp_path / f"model{i}")
        models.append(str(tmp_path / f"model{i}"))
        sets.append(str(write_benchmark(tmp_path / f"set{i}", seed + i)))
    table = tmp_path / "tables" / "results.csv"
    wrong = ["zeroshot", models[0], sets[0], "--models", f"{tmp_path}/model9", "--csv", str(table), "--workers", "0"]
    assert "did you mean" in fails(capsys, wrong)
    assert not table.exists()  # nothing is measured before each model is known to be there
    rest = ["--csv", str(table), "--workers", "0"]
    main(["zeroshot", models[0], sets[0], *rest])
    first = table.read_text()
    main(["zeroshot", models[0], *sets, "--models", models[1], *rest, "--out", str(tmp_path / "out")])
    assert table.read_text().startswith(first)
    results = json.loads((tmp_path / "out" / "zeroshot.json").read_text())
    rows = {(row["model"], row["set"], row["metric"]): row for row in rows_of(table)}
    assert len(table.read_text().splitlines()) == 1 + len(rows)
    assert rows.keys() == {
        (model, f"set{i}", metric) for model in models for i in range(2) for metric in results[0]["metrics"]
    }
    for result in results:
        for metric, value in result["metrics"].items():
            row = rows[result["model"], result["dataset"], metric]
            assert float(row["value"]) == value
            bounds = [float(row[name]) for name in ("low", "high") if row[name]]
            assert bounds == result["intervals"].get(metric, [])
            assert (row["n"], row["split"], row["kind"]) == (str(result["n"]), "test", "classification")
    page = (tmp_path / "out" / "report.html").read_text().replace("<wbr>", "")
    assert all(f"{result['dataset']} ({result['model']})" in page for result in results)
    full = table.read_text()
    assert f"4 of 4: {models[1]} on set1" in capsys.readouterr().err
    main(["zeroshot", models[0], *sets, "--models", models[1], *rest])
    again = capsys.readouterr()
    assert table.read_text() == full
    assert "0 results added, 4 found there" in again.out
    assert again.out.count("mean_per_class_recall") == 4
    assert again.out.count("set0: prompts: ") == 1
    assert all(result["verdict"] in " ".join(again.out.split()) for result in results)
    (tmp_path / "set0" / "zeroshot_classification_templates.txt").write_text("the {c}\n")  # other prompts, other rows
    main(["zeroshot", *models[:1], *sets, *rest])
    assert "1 result added, 1 found there" in capsys.readouterr().out
    assert len(table.read_text().splitlines()) == len(full.splitlines()) + len(results[0]["metrics"])
    assert "several models" in fails(capsys, ["compare", str(tmp_path / "out"), str(tmp_path / "out")])
    for name in "ab":
        (tmp_path / "broken" / name).mkdir(parents=True)
        (tmp_path / "broken" / name / "1.png").write_bytes(b"no image")
    with pytest.raises(SystemExit):
        main(["zeroshot", models[0], sets[0], str(tmp_path / "broken"), "--workers", "0"])
    failed = capsys.readouterr()
    assert "no image can be decoded" in failed.err
    assert "mean_per_class_recall" in failed.out  # of the set before it
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    assert "other.csv" in fails(capsys, ["zeroshot", models[0], sets[0], "--csv", str(tmp_path / "other.csv")])


def test_incomplete_results_are_in_a_table_only_if_allowed(
    tmp_path: Path, seed: int, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_embedder(seed).save(tmp_path / "model")
    data = write_benchmark(tmp_path / "set", seed, counts=(9, 4))
    (data / "test" / "1.tar").unlink()
    command = ["zeroshot", str(tmp_path / "model"), str(data), "--workers", "0", "--csv", str(tmp_path / "x.csv")]
    fails(capsys, command, status=1)
    assert not (tmp_path / "x.csv").exists()
    main([*command, "--allow-partial"])
    assert {row["complete"] for row in rows_of(tmp_path / "x.csv")} == {"false"}
    before = (tmp_path / "x.csv").read_text()
    assert "1.tar" in fails(capsys, command, status=1)
    main([*command, "--allow-partial"])
    assert "0 results added, 1 found there" in capsys.readouterr().out
    assert (tmp_path / "x.csv").read_text() == before


def test_program_ends_after_failed_work(tmp_path: Path, seed: int) -> None:
    """Workers that still run must not keep Python from exiting."""
    tiny_embedder(seed).save(tmp_path / "model")
    data = write_benchmark(tmp_path / "set", seed, counts=(3,))
    write_tar(data / "test" / "0.tar", [{"__key__": "bad", "jpg": b"no jpeg", "cls": b"0"}])
    command = [sys.executable, "-m", "dualenc", "zeroshot", str(tmp_path / "model"), str(data), "--workers", "2"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert done.returncode == 1
    assert "'bad'" in done.stderr
