"""Pushes to a hub on this machine; connections to other hosts fail."""

import ast
import builtins
import json
import logging
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import tiny_embedder, tiny_tokenizer, write_benchmark
from huggingface_hub import ModelCard, constants
from huggingface_hub import _tree_cache as tree_cache
from huggingface_hub.utils import close_session, disable_progress_bars
from markdown_it import MarkdownIt
from safetensors.torch import load_file, save_file
from servers import Hub, Large, Repo, hub_server

from dualenc import ModelError, load, load_text
from dualenc.cli import main
from dualenc.formats.download import hub_folder
from dualenc.formats.model_folder import OWN_FILES
from dualenc.hub.card import SetResult, Subject, card, check_measured, read_measured
from dualenc.hub.push import open_subject, push, stage
from dualenc.inference.text_model import TextPredictor
from dualenc.interop.exporting import FORMATS
from dualenc.models import TextConfig
from dualenc.models.heads import HeadConfig, TextModel

# huggingface_hub calls its HTTP client in a deprecated way.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

TEXTS = ["a cat on the mat", "two boats", "a red tree with hats"]
REPO = "owner/model"
NASTY = "a|b `c` **d** <script>x</script> [l](http://u:p@h/?token=t)\n---\n# h ``` ~~~ $x$ &lt; \\"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    elsewhere = []
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "::1", "localhost"):
            elsewhere.append(address)
            raise OSError(f"a test went to {address}")
        connect(self, address)

    with hub_server() as server:
        monkeypatch.setattr(socket.socket, "connect", guarded)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        for name, value in {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": template,
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_TOKEN_PATH": str(tmp_path / "token"),
            "HF_STORED_TOKENS_PATH": str(tmp_path / "tokens"),
            "AGENT_HARNESSES_PATH": str(tmp_path / "harnesses.json"),
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_DISABLE_TELEMETRY": True,
            "HF_HUB_OFFLINE": False,
            "HF_HUB_ETAG_TIMEOUT": 5,
        }.items():
            monkeypatch.setattr(constants, name, value)
        monkeypatch.setenv("HF_TOKEN", "token-of-owner")
        monkeypatch.delenv("HF_OIDC_RESOURCE", raising=False)
        disable_progress_bars()
        close_session()
        yield server
    close_session()
    assert elsewhere == []


def stop(hub: Hub) -> None:
    hub.shutdown()
    hub.server_close()
    close_session()


def same(one: Any, other: Any) -> bool:
    return torch.equal(one.embed_texts(TEXTS), other.embed_texts(TEXTS))


# Fetching


def test_a_pushed_model_loads_to_the_bit_and_a_pin_stays(hub: Hub, tmp_path: Path, seed: int) -> None:
    first, second = tiny_embedder(seed), tiny_embedder(seed + 1)
    first.save(tmp_path / "model")
    pinned = push(tmp_path / "model", REPO)
    assert re.fullmatch(f"hf-hub:{REPO}@[0-9a-f]{{40}}", pinned.spec)
    assert pinned.url.endswith(pinned.spec.partition("@")[2])
    images = torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8)
    loaded = load(pinned.spec, "cpu")
    assert same(loaded, first)
    assert torch.equal(loaded.embed_images(images), first.embed_images(images))
    assert loaded.fingerprint == first.fingerprint

    second.save(tmp_path / "model")
    again = push(tmp_path / "model", REPO)
    assert again.spec != pinned.spec
    assert not same(first, second)
    shutil.rmtree(tmp_path / "cache")
    tree_cache._IN_MEMORY_TREE_CACHE.clear()
    assert same(load(pinned.spec, "cpu"), first)
    assert same(load(again.spec, "cpu"), second)
    assert same(load(f"hf-hub:{REPO}", "cpu"), second)
    commits = len(hub.repos[REPO].commits)
    assert push(tmp_path / "model", REPO).spec == again.spec  # nothing has changed
    assert len(hub.repos[REPO].commits) == commits

    asked = len(hub.log)
    assert same(load(pinned.spec, "cpu"), first)
    assert len(hub.log) == asked  # a cached pin does not ask the hub
    load(f"hf-hub:{REPO}", "cpu")
    assert len(hub.log) > asked
    stop(hub)
    assert same(load(pinned.spec, "cpu"), first)


def refuse(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    stop(hub)


def fail(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.status = 503


def hang(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.hang = 1.5
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.3)


def offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("out_of_reach", [refuse, fail, hang, offline])
def test_without_the_hub_a_branch_loads_its_cached_commit(
    hub: Hub, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch, caplog: Any, out_of_reach: Any
) -> None:
    embedder = tiny_embedder(seed)
    embedder.save(tmp_path / "model")
    commit = push(tmp_path / "model", REPO).spec.partition("@")[2]
    hub.repos[REPO].commit("old", {}, "another branch, of another commit")
    with caplog.at_level(logging.WARNING, "dualenc"):
        load(f"hf-hub:{REPO}", "cpu")
        assert not caplog.records  # the hub can be reached
        out_of_reach(hub, monkeypatch)
        assert same(load(f"hf-hub:{REPO}", "cpu"), embedder)
    (record,) = [record for record in caplog.records if record.name == "dualenc"]
    assert "the hub cannot be reached" in record.getMessage()
    assert commit in record.getMessage()
    assert "\n" not in record.getMessage()
    with caplog.at_level(logging.WARNING, "dualenc"):
        caplog.clear()
        assert same(load(f"hf-hub:{REPO}@{commit}", "cpu"), embedder)
        assert not caplog.records
    for spec in (f"hf-hub:{REPO}@old", f"hf-hub:{REPO}@{'0' * 40}", "hf-hub:owner/other"):
        with pytest.raises(ModelError, match=r"not all of its files are in the cache .* download it once"):
            load(spec, "cpu")


@pytest.mark.parametrize("pinned", [True, False])
def test_an_incomplete_snapshot_is_completed_or_refused(hub: Hub, tmp_path: Path, seed: int, pinned: bool) -> None:
    embedder = tiny_embedder(seed)
    embedder.save(tmp_path / "model")
    spec = push(tmp_path / "model", REPO).spec
    spec = spec if pinned else f"hf-hub:{REPO}"
    folder = hub_folder(spec, OWN_FILES)
    for forgotten in (False, True):  # True: another program downloaded the files, without a list of them
        (folder / "model.safetensors").unlink()
        if forgotten:
            shutil.rmtree(folder.parents[1] / "trees")
            tree_cache._IN_MEMORY_TREE_CACHE.clear()
        assert same(load(spec, "cpu"), embedder)
    (folder / "preprocess.json").unlink()
    stop(hub)
    with pytest.raises(ModelError, match="not all of its files are in the cache"):
        load(spec, "cpu")


def test_missing_repositories_and_revisions_give_one_line(
    hub: Hub, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_embedder(seed).save(tmp_path / "model")
    push(tmp_path / "model", REPO, private=True)
    load(f"hf-hub:{REPO}", "cpu")
    for spec, message in {
        "hf-hub:a/b/c": r"must be hf-hub:owner/name\[@revision\]",
        "hf-hub:owner/gone": "no such repository, or it is private: correct the name, or `hf auth login`",
        f"hf-hub:{REPO}@gone": "no revision 'gone'",
    }.items():
        with pytest.raises(ModelError, match=message) as error:
            load(spec, "cpu")
        assert "\n" not in str(error.value)
    hub.repos["owner/empty"] = Repo(private=False)
    with pytest.raises(ModelError, match="the repository does not have any of"):
        load("hf-hub:owner/empty", "cpu")
    monkeypatch.setenv("HF_TOKEN", "token-of-other")
    with pytest.raises(ModelError, match="it is private"):  # although it is in the cache
        load(f"hf-hub:{REPO}", "cpu")
    hub.status = 400
    with pytest.raises(ModelError, match="cannot be downloaded from the hub"):
        load(f"hf-hub:{REPO}", "cpu")


def test_terms_and_a_broken_cache_have_errors_of_their_own(
    hub: Hub, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny_embedder(seed).save(tmp_path / "model")
    spec = push(tmp_path / "model", REPO).spec
    hub.repos[REPO].gated = True
    with pytest.raises(ModelError, match="accept its terms on the hub"):
        load(f"hf-hub:{REPO}", "cpu")
    hub.repos[REPO].gated = False
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "cache"))
    for one in (spec, f"hf-hub:{REPO}"):
        with pytest.raises(ModelError, match=r"cannot be written to the cache .*file/cache \(.*HF_HUB_CACHE") as error:
            load(one, "cpu")
        assert "cannot be reached" not in str(error.value)
        assert "\n" not in str(error.value)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    load(spec, "cpu")  # the control


# Pushing


def tiny_text_model(seed: int) -> TextPredictor:
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    config = TextConfig(tokenizer.vocab_size, width=16, layers=1, heads=2, context_length=tokenizer.context_length)
    model = TextModel(config, {"mood": HeadConfig("classification", ("good", "bad|worse"))})
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return TextPredictor(model.eval(), tokenizer)


def test_text_models_and_branches(hub: Hub, tmp_path: Path, seed: int) -> None:
    predictor = tiny_text_model(seed)
    predictor.save(tmp_path / "model")
    pushed = push(tmp_path / "model", REPO, revision="try/one")
    assert torch.equal(load_text(pushed.spec, "cpu").embed(TEXTS), predictor.embed(TEXTS))
    assert torch.equal(load_text(f"hf-hub:{REPO}@try/one", "cpu").embed(TEXTS), predictor.embed(TEXTS))
    with pytest.raises(ModelError):
        load_text(f"hf-hub:{REPO}", "cpu")  # main is empty
    text = hub.repos[REPO].commits[hub.repos[REPO].branches["try/one"]]["README.md"].decode()
    assert f'dualenc.load_text("hf-hub:{REPO}@try/one")' in text
    assert "print(model.classify(" in text
    assert ModelCard(text).data.pipeline_tag == "text-classification"
    push(tmp_path / "model", REPO, revision="try/one", message="again")


def run_directory(folder: Path, seed: int) -> Path:
    """Write a run directory without training: models, record, metrics, and files that are not uploaded."""
    for name in ("best", "last"):
        tiny_embedder(seed).save(folder / name)
    (folder / "checkpoints").mkdir()
    for name in (
        "checkpoints/step-4.ckpt",
        "best/optimizer.pt",
        "best/.secret",
        "best/notes.txt",
        "skipped_steps.jsonl",
    ):
        (folder / name).write_text("not for others")
    config = {
        "data": {
            "class_path": "dualenc.training.PairData",
            "init_args": {"train": ["https://user:pass@host/a.tar?sig=abc", "b`.tar"], "val": None, "captions": "txt"},
        },
        "trainer": {"logger": {"api_key": "hush", "tokenizer": "kept", "name": "```\n</details>"}},
        "run": {"monitor": "val/mrr"},
    }
    record = {"train_pairs": 6000, "held_out_pairs": 20, "fingerprint": "f00", "step": 9, "config": config}
    (folder / "run.json").write_text(json.dumps(record))
    figures = [(4, "val/mrr", 0.5), (4, "val/loss", 2), (6, "val/mrr", 0.75), (6, "val/loss", 1.5), (6, "train/lr", 3)]
    figures += [(8, "val/mrr", 0.75), (8, "val/loss", 1.25), (9, "train/loss", 0.1)]
    lines = ["step,metric,value", *(f"{step},{name},{value}" for step, name, value in figures)]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_a_run_pushes_its_best_without_other_files(
    hub: Hub, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = run_directory(tmp_path / "run", seed)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    spec = push(folder, REPO).spec
    assert same(load(spec, "cpu"), load(folder / "best", "cpu"))
    assert not same(load(spec, "cpu"), load(folder / "last", "cpu"))
    there = hub.repos[REPO].commits[spec.partition("@")[2]]
    assert set(there) == {*OWN_FILES, "README.md", ".gitattributes"}
    assert isinstance(there["model.safetensors"], Large)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    text = there["README.md"].decode()
    assert "after step 6, without intervals" in text  # the first step with the largest value
    assert "| val/loss | 1.5 |" in text
    assert "train/lr" not in text
    assert "| training pairs | 6,000 |" in text
    for secret in ("user", "pass", "sig=abc", "hush", "not for others"):
        assert secret not in text
    for kept in ("https://host/a.tar", "tokenizer: kept"):
        assert kept in text
    for path in (folder / "best", folder / "last"):  # They belong to the run even if they are named directly.
        assert "## Configuration" in card(open_subject(path), REPO)
        monkeypatch.chdir(path)
        assert "## Configuration" in card(open_subject("."), REPO)
    shutil.rmtree(folder / "best")
    assert same(load(push(folder, REPO).spec, "cpu"), load(folder / "last", "cpu"))
    text = card(open_subject(folder), REPO)
    assert "after step 8, without intervals" in text
    assert "| val/loss | 1.25 |" in text


def test_the_card_has_metrics_with_intervals(hub: Hub, tmp_path: Path, seed: int) -> None:
    """The command measures the metrics; the hub's own parser reads the metadata."""
    embedder = tiny_embedder(seed)
    embedder.save(tmp_path / "model")
    data = write_benchmark(tmp_path / "set", seed, counts=(12, 12))
    pairs = write_benchmark(tmp_path / "pairs", seed, "retrieval", counts=(12,))
    for command, where in (("zeroshot", data), ("retrieval", pairs)):
        main([command, str(tmp_path / "model"), str(where), "--out", str(tmp_path / command), "--workers", "0"])
    results = [tmp_path / name / f"{name}.json" for name in ("zeroshot", "retrieval")]
    push(tmp_path / "model", REPO, results=results, license="apache-2.0")
    text = hub.repos[REPO].commits[hub.repos[REPO].branches["main"]]["README.md"].decode()
    found = ModelCard(text).data
    assert (found.license, found.library_name, found.pipeline_tag) == (
        "apache-2.0", "dualenc", "zero-shot-image-classification",
    )  # fmt: skip
    expected = [one for path in results for one in json.loads(path.read_text())]
    told = {(one.dataset_name, one.metric_type): one for one in found.eval_results}
    assert len(told) == sum(len(one["metrics"]) for one in expected)
    for one in expected:
        for metric, value in one["metrics"].items():
            assert told[one["dataset"], metric].metric_value == value
            args = told[one["dataset"], metric].metric_args
            assert args.get("interval_95") == one["intervals"].get(metric)
            assert args["n"] == one["n"]
            row = next(line for line in text.splitlines() if line.startswith(f"| {one['dataset']} ") and metric in line)
            assert f"| {value:.4g} |" in row
            if metric in one["intervals"]:
                assert "| {:.4g} to {:.4g} |".format(*one["intervals"][metric]) in row
    # The control: an altered metric gives another card.
    expected[0]["metrics"]["acc1"] += 0.01
    results[0].write_text(json.dumps([one for one in expected if one["kind"] == "classification"]))
    altered = [one for path in results for one in read_measured(path)]
    assert card(open_subject(tmp_path / "model"), REPO, altered, "apache-2.0") != text

    other = tmp_path / "other"
    tiny_embedder(seed + 1).save(other)
    with pytest.raises(ModelError, match=r"the result for set is of another model, .*model \(fingerprint"):
        push(other, REPO, results=results)
    tiny_embedder(seed + 1).save(tmp_path / "model")  # same name, other weights
    with pytest.raises(ModelError, match="of another model"):
        push(tmp_path / "model", REPO, results=results)
    embedder.save(tmp_path / "model")
    with pytest.raises(ModelError, match="two results for set"):
        push(tmp_path / "model", REPO, results=[*results, results[0]])


def measured(**changes: Any) -> dict[str, Any]:
    one = {
        "dataset": "set", "kind": "classification", "model": "runs/x", "fingerprint": "f", "n": 24, "complete": True,
        "problems": [], "metrics": {"acc1": 0.5}, "intervals": {"acc1": [0.25, 0.75]}, "split": "test",
    }  # fmt: skip
    return {key: value for key, value in {**one, **changes}.items() if value is not ...}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("nothing", "cannot be read"),
        ("[]", "does not hold a result"),
        ('{"findings": []}', "cannot be read"),
        (json.dumps([measured(fingerprint=...)]), "no 'fingerprint'.*or evaluate again"),
        (json.dumps([measured(metrics={"acc1": "high"})]), "cannot be read"),
        (json.dumps([measured(intervals={"acc1": [1]})]), "cannot be read"),
        (json.dumps([measured(dataset=3)]), "cannot be read"),
        (json.dumps([measured(metrics=None)]), "cannot be read"),
        (json.dumps([measured(n="many")]), "cannot be read"),
        (json.dumps([measured(n=float("inf"))]), "cannot be read"),
    ],
)
def test_damaged_results_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "r.json").write_text(content)
    with pytest.raises(ModelError, match=message) as error:
        read_measured(tmp_path / "r.json")
    assert str(tmp_path / "r.json") in str(error.value)
    with pytest.raises(ModelError, match="cannot be read"):
        read_measured(tmp_path)
    (tmp_path / "r.json").write_text(json.dumps([measured()]))
    assert read_measured(tmp_path / "r.json")[0].metrics == {"acc1": 0.5}  # the control


def test_text_of_users_is_escaped_on_the_card(tmp_path: Path) -> None:
    """A Markdown parser must find only the structure of the template on the card."""
    (tmp_path / "r.json").write_text(
        json.dumps([
            measured(
                dataset=NASTY, model=NASTY, kind=NASTY, split=NASTY, metrics={NASTY: 0.5, "_x_": float("nan")},
                intervals={NASTY: [0.1, 0.9]}, problems=[{"what": NASTY, "count": 1}], complete=False,
            )
        ])
    )  # fmt: skip

    def outline(text: str) -> list[str]:
        tokens = MarkdownIt("commonmark").enable("table").parse(text.partition("\n---\n")[2])
        inside = [child.type for token in tokens for child in token.children or ()]
        return [token.type for token in tokens] + [kind for kind in inside if kind != "text"]

    def links(text: str) -> list[str]:
        tokens = MarkdownIt("commonmark").enable("table").parse(text.partition("\n---\n")[2])
        inside = [child for token in tokens for child in token.children or () if child.type == "text"]
        return [child.content for child in inside if re.search("(?i)://|www[.]|@[a-z]", child.content)]

    nasty = subject_of("transformers", tmp_path, [("head", NASTY), (NASTY, 3)], [NASTY])
    plain = subject_of("transformers", tmp_path, [("head", "x"), ("y", 3)], ["z"])
    found = read_measured(tmp_path / "r.json")
    (tmp_path / "r.json").write_text(
        json.dumps(
            [measured(metrics={"a": 0.5, "b": 1}, intervals={"a": [0, 1]}, problems=[{"what": "x", "count": 1}])]
        )
    )
    text, calm = card(nasty, REPO, found), card(plain, REPO, read_measured(tmp_path / "r.json"))
    assert outline(re.sub(r"`\S+//\S+`", "l", text)) == outline(calm)
    assert "`[l](http://h/)`" in text
    assert links(text) == []  # nor text that a renderer turns into a link
    for link in (
        "https://a.b/_c_",
        "(www.a.b)",
        "WWW.a.b",
        "me@a.b",
        "mailto:me@a",
        "ftp://a",
        "x|https://a.b|`y",
        "@me",
    ):
        there = card(subject_of("onnx", tmp_path, [("x", f"a {link} b")]), REPO)
        assert outline(re.sub(r"(?i)`[^`|\n]*(//|www|me)[^`|\n]*`", "l", there)) == outline(
            card(subject_of("onnx", tmp_path, [("x", "y")]), REPO)
        )
        assert links(there) == []
        assert links(there.replace("`", "")) != []  # the control
    assert "| recall@5 |" in card(subject_of("onnx", tmp_path, [("x", "recall@5")]), REPO)
    assert ":p@" not in text
    assert "token=t" not in text
    front = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    assert front is not None
    about = yaml.safe_load(front[1])
    assert about["model-index"][0]["results"][0]["dataset"]["name"].startswith("a|b `c` **d** <script>")
    assert len(about["model-index"][0]["results"][0]["metrics"]) == 1  # a non-finite metric is left out
    assert "license" not in about
    assert "No license was given." in text
    assert "was incomplete" in text
    # The control: without escapes the outline differs.
    assert outline(re.sub(r"`\S+//\S+`", "l", text).replace("\\", "")) != outline(calm)


def test_a_hostile_configuration_stays_in_its_block(tmp_path: Path, seed: int) -> None:
    folder = run_directory(tmp_path / "run", seed)
    tokens = MarkdownIt("commonmark").enable("table").parse(card(open_subject(folder), REPO).partition("\n---\n")[2])
    blocks = [token.content for token in tokens if token.type == "fence" and token.info == "yaml"]
    assert yaml.safe_load(blocks[0])["train"] == ["https://host/a.tar", "b`.tar"]
    config = yaml.safe_load(blocks[1])
    assert config["trainer"]["logger"] == {"api_key": "...", "tokenizer": "kept", "name": "``` </details>"}
    assert config["run"] == {"monitor": "val/mrr"}
    assert [token.content.strip() for token in tokens if token.type == "html_block"] == [
        "<details><summary>Configuration of the training run</summary>", "</details>",
    ]  # fmt: skip


def subject_of(kind: str, folder: Path, facts: list[tuple[str, Any]], notes: Sequence[str] = ()) -> Subject:
    """Return an export to push, without its files."""
    chosen = FORMATS[kind]
    return Subject(
        title="An export", library=kind, folder=folder, run=None, facts=facts, fingerprint="f",
        task="zero-shot-image-classification", programs={kind: lambda source: chosen.snippet(source, images=True)},
        uploaded=chosen.uploaded, notes=notes, format=chosen,
    )  # fmt: skip


def export(folder: Path, kind: str) -> Path:
    """Write the files by which an export is known."""
    folder.mkdir()
    clip = {"embed_dim": 8, "vision_cfg": {"image_size": 16}, "text_cfg": {"width": 16, "hf_model_name": str(folder)}}
    own = {
        "open_clip": {"open_clip_config.json": {"model_cfg": clip}, "tokenizer.json": {}},
        "transformers": {
            "config.json": {"model_type": "clip", "vision_config": {"image_size": 16}},
            "text/config.json": {},
            "preprocessor_config.json": {},
            "text/tokenizer.json": {},
        },
        "sentence-transformers": {
            "modules.json": [],
            "config.json": {},
            "1_Pooling/config.json": {},
        },
        "onnx": {"onnx.json": {"embed_dim": 8, "opset": 20}, "preprocess.json": {}},
    }[kind]
    for name, content in own.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    name = {"open_clip": "open_clip_model.safetensors"}.get(kind, "model.safetensors")
    if kind == "onnx":
        (folder / "text.onnx").write_bytes(b"a graph")
    else:
        save_file({"x": torch.randn(3, 5)}, folder / name)
    about = {"format": kind, "fingerprint": "f00", "notes": ["the bias|es"], "dualenc": "1.0"}
    (folder / "export.json").write_text(json.dumps(about))
    (folder / "README.md").write_text("the exporter's\n")
    (folder / "training_args.bin").write_text("no")
    (folder / ".cache").mkdir()
    return folder


@pytest.mark.parametrize("kind", FORMATS)
def test_exports_are_pushed_with_their_files_only(hub: Hub, tmp_path: Path, kind: str) -> None:
    folder = export(tmp_path / "out", kind)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    commit = push(folder, REPO).spec.partition("@")[2]
    there = hub.repos[REPO].commits[commit]
    files = {path.relative_to(folder).as_posix() for path in before}
    assert set(there) == files - {"training_args.bin"} | {".gitattributes"}
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    text = there["README.md"].decode()
    assert ModelCard(text).data.library_name == kind
    assert REPO in text.partition("## How to load it")[2]
    assert "Changed by the export: the bias\\|es" in text
    assert "| fingerprint | f00 |" in text
    assert ("image_size 16" in text) == (kind in ("open_clip", "transformers"))
    assert "dualenc export" not in text.partition("## How to load it")[2]
    if kind == "open_clip":
        config = json.loads(there["open_clip_config.json"])
        assert config["model_cfg"]["text_cfg"] == {"width": 16, "hf_model_name": REPO}
        assert "| parameters | 0.0 M |" in text
        path = folder / "open_clip_config.json"
        path.write_text(path.read_text().replace(str(folder), "google-bert/bert-base"))
        stage(open_subject(folder), tmp_path / "stage", REPO)
        told = json.loads((tmp_path / "stage" / "open_clip_config.json").read_text())
        assert told["model_cfg"]["text_cfg"]["hf_model_name"] == "google-bert/bert-base"
    for path in folder.glob("*.safetensors"):
        path.unlink()
    (folder / "text.onnx").unlink(missing_ok=True)
    with pytest.raises(ModelError, match="does not have weights"):
        push(folder, REPO)


def test_names_in_an_open_clip_folder_become_the_repository(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files in the current directory have no effect."""
    folder = export(tmp_path / "out", "open_clip")
    path = folder / "open_clip_config.json"
    whole = json.loads(path.read_text())
    (tmp_path / "here" / "google-bert" / "bert-base").mkdir(parents=True)
    (tmp_path / "here" / "tokenizer.json").touch()
    monkeypatch.chdir(tmp_path / "here")

    def told(**names: Any) -> tuple[Any, ...]:
        whole["model_cfg"]["text_cfg"] = names
        path.write_text(json.dumps(whole))
        shutil.rmtree(tmp_path / "stage", ignore_errors=True)
        stage(open_subject(folder), tmp_path / "stage", REPO)
        config = json.loads((tmp_path / "stage" / "open_clip_config.json").read_text())
        return tuple(config["model_cfg"]["text_cfg"].values())

    assert told(hf_model_name="/gone/since", hf_tokenizer_name="tokenizer.json") == (REPO, REPO)
    assert told(hf_model_name="google-bert/bert-base", hf_tokenizer_name="") == ("google-bert/bert-base", "")
    assert told(hf_model_name="./gone", hf_tokenizer_name="vocab.txt") == (REPO, "vocab.txt")
    with pytest.raises(ModelError, match=r"--revision try: open_clip .* from main: leave --revision out"):
        push(folder, REPO, revision="try")
    assert hub.log == []
    push(folder, REPO, revision="main")
    assert "always loads the same files" not in card(open_subject(folder), REPO)
    told(hf_tokenizer_name="tokenizer.json")
    push(folder, REPO, revision="try")  # the tokenizer is of the branch
    assert "always loads the same files" in card(open_subject(folder), REPO)
    for wrong in (None, [], "x"):
        whole["model_cfg"]["text_cfg"] = wrong
        path.write_text(json.dumps(whole))
        with pytest.raises(ModelError, match="text_cfg must be objects"):
            push(folder, REPO)


def test_a_push_deletes_files_of_a_model_of_another_kind(hub: Hub, tmp_path: Path, seed: int) -> None:
    def there() -> set[str]:
        return set(hub.repos[REPO].commits[hub.repos[REPO].branches["main"]])

    push(export(tmp_path / "clip", "transformers"), REPO)
    own = {"notes/config.json": b"", "1_x/y/config.json": b"", "LICENSE": b"", "pytorch_model.bin": b"", ".x.onnx": b""}
    hub.repos[REPO].commit("main", {**own}, "by hand")
    kept = {*own, "README.md", ".gitattributes"}
    tiny_text_model(seed).save(tmp_path / "text")
    push(tmp_path / "text", REPO)
    assert "dualenc.json" in there()
    embedder = tiny_embedder(seed)
    embedder.save(tmp_path / "model")
    commits = len(hub.repos[REPO].commits)
    push(tmp_path / "model", REPO)
    assert len(hub.repos[REPO].commits) == commits + 1
    assert there() == {*OWN_FILES, *kept}
    assert same(load(f"hf-hub:{REPO}", "cpu"), embedder)
    push(export(tmp_path / "sentences", "sentence-transformers"), REPO)
    push(export(tmp_path / "graphs", "onnx"), REPO)
    assert there() == {"export.json", "onnx.json", "text.onnx", "preprocess.json", *kept}


@pytest.mark.parametrize("kind", FORMATS)
def test_folders_without_a_valid_export_json_are_refused(tmp_path: Path, kind: str) -> None:
    folder = export(tmp_path / "out", kind)
    open_subject(folder)  # the control
    for wrong in ({"format": kind}, {"format": [kind], "fingerprint": "f00"}, [], None):
        (folder / "export.json").write_text(json.dumps(wrong))
        with pytest.raises(ModelError, match=r"export\.json must name a format and a fingerprint: repeat the export"):
            open_subject(folder)
    (folder / "export.json").unlink()
    with pytest.raises(ModelError, match=r"out is not a model: .* import a model of another library first"):
        open_subject(folder)


def test_code_that_a_folder_names_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders come from strangers: a format that dualenc does not have must be named by the user."""
    (tmp_path / "trap.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'sprung')!r}).touch()\n")
    monkeypatch.syspath_prepend(tmp_path)
    folder = export(tmp_path / "out", "onnx")
    for name in ("trap", "trap.Format", "dualenc.interop.onnx.OnnxFormat"):
        (folder / "export.json").write_text(json.dumps({"format": name, "fingerprint": "f00"}))
        with pytest.raises(ModelError, match=rf"in the format '{name}', .* name the class .* with --format"):
            open_subject(folder)
    assert not (tmp_path / "sprung").exists()
    (folder / "export.json").write_text(json.dumps({"format": "transformers", "fingerprint": "f00"}))
    with pytest.raises(ModelError, match="in the format 'transformers', and --format names onnx"):
        open_subject(folder, "onnx")
    with pytest.raises(ModelError, match=r"trap.* cannot be imported"):  # the control: now the user names it
        open_subject(folder, "trap.Format")
    assert (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    "record",
    ["[]", "null", '{"config": "x"}', '{"config": {"run": "x"}}', '{"config": {"run": []}}', '{"config": []}', "7"],
)
def test_a_damaged_record_of_a_run_gives_one_line(tmp_path: Path, seed: int, record: str) -> None:
    folder = run_directory(tmp_path / "run", seed)
    (folder / "run.json").write_text(record)
    with pytest.raises(ModelError, match=r"run\.json is not the record of a run .* must be an object") as error:
        card(open_subject(folder), REPO)
    assert "\n" not in str(error.value)
    (folder / "metrics.csv").unlink()
    if "run" not in record:
        with pytest.raises(ModelError, match="is not the record of a run"):
            card(open_subject(folder), REPO)
    for calm in (
        '{"config": null}',
        "{}",
        '{"config": {"run": null, "data": {"init_args": "x"}}}',
        '{"config": {"data": 3}}',
    ):
        (folder / "run.json").write_text(calm)
        card(open_subject(folder), REPO)


def test_secrets_of_a_configuration_are_removed(tmp_path: Path, seed: int) -> None:
    names = (
        "apikey", "apiKey", "api_keys", "Authorization", "auth", "authToken", "passphrase", "pwd", "db.pwd", "passwd",
        "aws_access_key_id", "AWS_SECRET_ACCESS_KEY", "secretKey", "private-key", "key", "hf_token", "cookies", "pw",
    )  # fmt: skip
    hidden: dict[str, Any] = dict.fromkeys(names, "hush") | {
        "credentials": {"user": "hush", "pw": 3.25},
        "secrets": {"a": ["hush"]},
        "tokens": ["hush", {"b": "hush"}],
        "password": 3.25,
        "secret": 325325325325,
        "token": [3.25],
        "headers": {"Authorization": "Basic hush"},
        "more": ["Bearer hush", "authorization: Basic hush", "-H 'Authorization: hush'"],
    }
    kept = {
        "no_embed_class": True, "class_token": True, "reg_tokens": 4, "max_tokens": 77, "mask_tokens": 0.15,
        "pad_token": None, "tokenizer": "kept", "keys": "kept", "monkey": "kept", "author": "kept", "design": "kept",
        "global_pool": "token", "compass": "kept", "authors": ["kept"],
    }  # fmt: skip
    folder = run_directory(tmp_path / "run", seed)
    (folder / "run.json").write_text(json.dumps({"config": {"hidden": hidden, "model": kept}}))
    text = card(open_subject(folder), REPO)
    assert "hush" not in text
    assert "3.25" not in text
    assert "325325" not in text  # too long to occur in a fingerprint by chance
    block = next(token.content for token in MarkdownIt().parse(text) if token.info == "yaml")
    assert yaml.safe_load(block)["model"] == kept
    assert yaml.safe_load(block)["hidden"]["credentials"] == "..."
    hidden = {name.replace("e", "3"): "hush" for name in ("apikey", "secret")}  # the control
    (folder / "run.json").write_text(json.dumps({"config": {"hidden": hidden}}))
    assert "hush" in card(open_subject(folder), REPO)


def test_programs_on_the_card_define_all_their_names(tmp_path: Path, seed: int) -> None:
    def unknown(code: str) -> set[str]:
        tree = ast.parse(code)
        names = [node for node in ast.walk(tree) if isinstance(node, ast.Name)]
        imports = [
            one for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom) for one in node.names
        ]
        known = {*dir(builtins), *(one.asname or one.name for one in imports)}
        known |= {node.id for node in names if isinstance(node.ctx, ast.Store)}
        return {node.id for node in names} - known

    tiny_embedder(seed).save(tmp_path / "model")
    tiny_text_model(seed).save(tmp_path / "text")
    folders = [tmp_path / "model", tmp_path / "text", *(export(tmp_path / kind, kind) for kind in FORMATS)]
    (tmp_path / "onnx" / "image.onnx").write_bytes(b"a graph")
    found = 0
    for folder in folders:
        text = card(open_subject(folder), REPO, revision="try")
        blocks = [token.content for token in MarkdownIt().parse(text) if token.info == "python"]
        assert blocks
        for block in blocks:
            assert unknown(block) == set(), block
            assert ("image.onnx" in block) == ("onnx" in block and folder.name != "text")
            assert ("text.onnx" in block) == ("onnx" in block)
            assert ("AutoImageProcessor" in block) == ("transformers import AutoI" in block)
        assert text.count('revision="try"') + text.count(f"hf-hub:{REPO}@try") > 0
        found += len(blocks)
    assert found == 1 + 4 + 2 + 2 + 4
    assert unknown("x = torch.ones(3)") == {"torch"}  # the control


def test_results_of_an_export_are_those_of_the_exported_model() -> None:
    subject = subject_of("onnx", Path(), [])

    def of(mark: str, dataset: str) -> SetResult:
        return SetResult(dataset, "retrieval", "runs/x", mark, "", 3, (), {"mrr": 0.5}, {})

    check_measured(subject, [of("f", "a"), of("f", "b")])
    with pytest.raises(ModelError, match="the result for b is of another model"):
        check_measured(subject, [of("f", "a"), of("g", "b")])


def test_a_failed_push_gives_one_line(
    hub: Hub, tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    tiny_embedder(seed).save(tmp_path / "model")
    command = ["push", str(tmp_path / "model")]

    def refused(arguments: list[str], status: int, message: str) -> None:
        with pytest.raises(SystemExit) as error:
            main(arguments)
        said = capsys.readouterr().err.strip()
        assert error.value.code == status
        assert re.search(message, said), said
        assert "\n" not in said
        assert said.startswith("dualenc: error: ")

    for name in ("model", "owner/", "/model", "owner/a b", "owner/a/b", "https://x/y", "owner/a--b", "owner/.a"):
        refused([*command, name], 2, "must be owner/name")
    refused([*command, REPO, "--license", "my own!"], 2, "license 'my own!'")
    refused([*command, REPO, "--revision", "0" * 40], 2, "must be the name of a branch")
    refused(["push", str(tmp_path), REPO], 2, "is not a model: name a model directory")
    refused(["push", str(tmp_path / "gone"), REPO], 2, "is not a model")
    refused([*command, REPO, "--format", "onnx"], 2, "--format is for exports only")
    monkeypatch.delenv("HF_TOKEN")
    refused([*command, REPO], 2, "hf auth login")
    assert hub.log == []  # no request has been sent yet
    monkeypatch.setenv("HF_TOKEN", "token-of-nobody")
    refused([*command, REPO], 1, "does not accept this token for owner/model: run `hf auth login`")
    monkeypatch.setenv("HF_TOKEN", "token-of-other")
    refused([*command, REPO], 1, "may not write to owner/model: run `hf auth login`")
    monkeypatch.setenv("HF_TOKEN", "token-of-owner")
    refused([*command, REPO, "--license", "unheard-of"], 1, 'refuses the card .*"license" must be one of a list')
    assert not hub.repos  # a refused card does not create a repository
    main([*command, REPO])
    capsys.readouterr()
    refused([*command, REPO, "--revision", "try", "--license", "unheard-of"], 1, "must be one of a list")
    assert list(hub.repos.pop(REPO).branches) == ["main"]
    hub.objects.clear()
    hub.spoil = "loud"
    refused([*command, REPO], 1, "failed")
    hub.spoil = "quiet"
    refused([*command, REPO], 1, r"has another model\.safetensors at commit [0-9a-f]{40} than the one sent: push again")
    hub.spoil = ""
    hub.objects.clear()
    main([*command, REPO])
    url, spec = capsys.readouterr().out.split()
    assert url.startswith(hub.url)
    assert same(load(spec, "cpu"), load(tmp_path / "model", "cpu"))
    refused([*command, REPO, "--private"], 1, "exists and is public")
    main([*command, "owner/hidden", "--private"])
    assert hub.repos["owner/hidden"].private
    main([*command, "owner/hidden", "--private"])
    hub.status = 500
    refused([*command, REPO], 1, "failed")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    close_session()
    refused([*command, REPO], 1, "cannot be reached")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    stop(hub)
    refused([*command, REPO], 1, "cannot be reached")


def test_a_changed_weight_changes_the_fingerprint(hub: Hub, tmp_path: Path, seed: int) -> None:
    """Other weights have another fingerprint and another card."""
    tiny_embedder(seed).save(tmp_path / "model")
    before = open_subject(tmp_path / "model")
    weights = load_file(tmp_path / "model" / "model.safetensors")
    name = sorted(weights)[0]
    weights[name].view(-1)[0] += 1e-3
    save_file(weights, tmp_path / "model" / "model.safetensors")
    after = open_subject(tmp_path / "model")
    assert before.fingerprint != after.fingerprint
    assert card(before, REPO) != card(after, REPO)


@pytest.mark.slow
def test_the_command_in_a_process_of_its_own(hub: Hub, tmp_path: Path, seed: int) -> None:
    """The hub's address, the token and the cache come from the environment."""
    embedder = tiny_embedder(seed)
    embedder.save(tmp_path / "model")
    environment = {
        **os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": "token-of-owner", "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
    }  # fmt: skip

    def run(*command: str) -> str:
        done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        return done.stdout

    spec = run("-m", "dualenc", "push", str(tmp_path / "model"), REPO).split()[-1]
    code = "import sys, dualenc; print(dualenc.load(sys.argv[1], 'cpu').fingerprint)"
    assert run("-c", code, spec).strip() == embedder.fingerprint
    stop(hub)
    assert run("-c", code, spec).strip() == embedder.fingerprint
    environment["HF_HUB_OFFLINE"] = "1"
    assert run("-c", code, f"hf-hub:{REPO}@{spec.partition('@')[2]}").strip() == embedder.fingerprint


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "form", "more"),
    [
        ("bert, mean, mlp", "open_clip", "import torch\nx = model.encode_text(tokenizer(TEXTS), normalize=True)"),
        ("bert, mean, mlp", "sentence-transformers", "x = model.encode(TEXTS, convert_to_tensor=True)"),
        (
            "bert, mean, mlp",
            "onnx",
            "import numpy\nfound = tokenizer.encode_batch(TEXTS)\n"
            "made = {'ids': [one.ids for one in found], 'mask': [one.attention_mask for one in found]}\n"
            "kinds = {one.name: 'bool' if 'bool' in one.type else 'int64' for one in text.get_inputs()}\n"
            "x = text.run(None, {name: numpy.array(made[name], kind) for name, kind in kinds.items()})[0]\n"
            "assert image.get_inputs()",
        ),
        (
            "openai",
            "transformers",
            "import torch\nfound = tokenizer(TEXTS, padding=True, return_tensors='pt')\n"
            "x = model.get_text_features(**found)\nx = getattr(x, 'pooler_output', x)\n"
            "x = torch.nn.functional.normalize(x, dim=-1)\nassert processor",
        ),
    ],
    ids=["open_clip", "sentence-transformers", "onnx", "transformers"],
)  # fmt: skip
def test_programs_on_the_card_load_the_pushed_model(
    hub: Hub, tmp_path: Path, seed: int, source: str, form: Any, more: str
) -> None:
    from exchanges import of_open_clip

    from dualenc.interop.exporting import export as write
    from dualenc.interop.importing import import_model

    import_model(f"open_clip:local-dir:{of_open_clip(tmp_path / 'theirs', source)}").embedder.save(tmp_path / "ours")
    write(str(tmp_path / "ours"), tmp_path / "out", form)
    shutil.rmtree(tmp_path / "theirs")
    push((tmp_path / "out").rename(tmp_path / "moved"), REPO)
    (tmp_path / "moved").rename(tmp_path / "gone")
    text = hub.repos[REPO].commits[hub.repos[REPO].branches["main"]]["README.md"].decode()  # type: ignore[union-attr]
    (code,) = [token.content for token in MarkdownIt().parse(text) if token.info == "python"]
    environment = {
        **os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": "token-of-owner", "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1",
    }  # fmt: skip
    end = "import json\nprint(json.dumps(['the texts', x.tolist()]))"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nTEXTS = {TEXTS!r}\n{more}\n{end}"],
        env=environment, cwd=tmp_path / "gone", capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = torch.tensor(json.loads(done.stdout.splitlines()[-1])[1])
    torch.testing.assert_close(found, load(tmp_path / "ours", "cpu").embed_texts(TEXTS), atol=1e-4, rtol=0)
