"""Embeddings in bf16: what is computed in it, what stays fp32, and that results of two precisions never mix."""

import json
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from fits import fails
from helpers import WORDS, encode, smooth, tiny_embedder, tiny_tokenizer, write_benchmark, write_documents, write_shards
from safetensors.torch import load_file
from torch import nn

from dualenc import Embedder, ShardIndex, TextConfig, TextPredictor, load, load_text
from dualenc.cli import main
from dualenc.evaluation import EmbeddingCache, SetEmbedder
from dualenc.inference.open_clip import OpenClip, OpenClipTokenizer, OpenClipTransform
from dualenc.inference.text_tower import load_text_tower
from dualenc.models import TextModel

TEXTS = ["a cat", "", "two hats and boats", "the red dog sits on a blue mat under the green tree", "dog"]
NARROW = {"context_length": 20, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2}
BF16_STEP = 2**-8  # the relative spacing of its numbers


def of_open_clip(seed):
    """Return the parts of an embedder with a small model of open_clip."""
    torch.manual_seed(seed)
    vision = {"layers": 1, "width": 64, "patch_size": 16, "image_size": 32}
    model = OpenClip(open_clip.CLIP(32, vision, NARROW).eval(), "CLIP")
    tokenizer = OpenClipTokenizer(open_clip.SimpleTokenizer(context_length=20), model.trims)
    return model, tokenizer, OpenClipTransform(32, (0.5,) * 3, (0.5,) * 3, "bicubic", "shortest", 0)


def of_dualenc(seed):
    """Return the parts of a small embedder."""
    embedder = tiny_embedder(seed)
    return embedder.model, embedder.tokenizer, embedder.preprocess


def photos(seed, count=6):
    rng = np.random.default_rng(seed)
    return [encode(smooth(rng, 40, 33), "png") for _ in range(count)]


def computed_in(model, call):
    """Return the dtypes of the outputs of all linear layers during a call, and its result."""
    found = set()
    with ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, nn.Linear):
                hook = module.register_forward_hook(lambda *args: found.add(args[-1].dtype))
                stack.callback(hook.remove)
        out = call()
    return found, out


@pytest.mark.parametrize("parts", [of_dualenc, of_open_clip])
def test_towers_are_in_bf16_and_embeddings_in_fp32(parts, seed):
    model, *rest = parts(seed)
    exact, rounded = Embedder(model, *rest), Embedder(model, *rest, precision="bf16")
    for name, inputs in (("embed_images", photos(seed)), ("embed_texts", TEXTS)):
        wanted, plain = computed_in(model, lambda: getattr(exact, name)(inputs))  # noqa: B023
        assert wanted == {torch.float32}
        dtypes, found = computed_in(model, lambda: getattr(rounded, name)(inputs))  # noqa: B023
        assert dtypes == {torch.bfloat16}
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.norm(dim=1), torch.ones(len(inputs)), rtol=0, atol=1e-6)
        assert (found.bfloat16().float() != found).any()  # not rounded after they were normalized
        distance = (found - plain).norm(dim=1)
        assert 0 < distance.max() < 16 * BF16_STEP
        assert torch.equal(getattr(exact, name)(inputs), plain)  # fp32 afterwards is as before
    assert next(model.parameters()).dtype == torch.float32
    assert exact.fingerprint == rounded.fingerprint  # it is of the weights, which are the same


def test_fp32_is_the_default_of_loading(seed, tmp_path):
    tiny_embedder(seed).save(tmp_path / "model")
    spec, images = str(tmp_path / "model"), photos(seed)
    plain, rounded = load(spec, "cpu"), load(spec, "cpu", "bf16")
    assert (plain.precision, rounded.precision) == ("fp32", "bf16")
    assert torch.equal(load(spec, "cpu", "fp32").embed_images(images), plain.embed_images(images))
    assert not torch.equal(rounded.embed_images(images), plain.embed_images(images))
    for wrong in ("fp16", "bf16-mixed", None):
        with pytest.raises(ValueError, match="choose one of fp32, bf16"):
            load(spec, "cpu", wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="choose one of fp32, bf16"):
        load_text(spec, "cpu", "half")  # type: ignore[arg-type]


def save_text_model(path, seed):
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    config = TextConfig(tokenizer.vocab_size, width=32, layers=2, heads=2, context_length=tokenizer.context_length)
    TextPredictor(TextModel(config, {}).eval(), tokenizer).save(path)
    return str(path)


def test_vectors_of_text_models(seed, tmp_path):
    spec = save_text_model(tmp_path / "text", seed)
    plain, rounded = load_text(spec, "cpu"), load_text(spec, "cpu", "bf16")
    dtypes, found = computed_in(rounded.model, lambda: rounded.embed(TEXTS))
    assert dtypes == {torch.bfloat16}
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.norm(dim=1), torch.ones(len(TEXTS)), rtol=0, atol=1e-6)
    assert 0 < (found - plain.embed(TEXTS)).norm(dim=1).max() < 16 * BF16_STEP
    assert computed_in(plain.model, lambda: plain.embed(TEXTS))[0] == {torch.float32}
    (_, hidden), (_, exact) = rounded.embed_tokens(["a cat"])[0], plain.embed_tokens(["a cat"])[0]
    assert hidden.dtype == torch.float32
    assert 0 < (hidden - exact).norm() / exact.norm() < 16 * BF16_STEP
    tower = load_text_tower(spec, "cpu", "bf16")
    assert tower.precision == "bf16"
    assert torch.equal(tower.embed(TEXTS), found)


def test_the_cache_keeps_precisions_apart(seed, tmp_path):
    parts = of_dualenc(seed)
    made = {}
    for turn in range(2):
        for precision in ("fp32", "bf16"):
            embedder = Embedder(*parts, precision=precision)
            cache = EmbeddingCache(embedder, tmp_path / "cache")
            found = SetEmbedder(embedder, cache=cache).texts(TEXTS)
            assert cache.reused == (["captions"] if turn else [])
            assert torch.equal(found, made.setdefault(precision, found))
            assert torch.equal(found, embedder.embed_texts(TEXTS))
    assert not torch.equal(made["fp32"], made["bf16"])  # control


def changed_by_hand(kind, one, other):
    """Count the units whose first answer differs, straight from the files of two results."""
    if kind == "zeroshot":
        return {"images": int((one["0/answer"] != other["0/answer"]).sum())}
    names = {"captions": "0/best_by_text", "images": "0/best_by_image"}
    return {noun: sum(a[0] != b[0] for a, b in zip(one[x], other[x], strict=True)) for noun, x in names.items()}


@pytest.mark.parametrize("kind", ["zeroshot", "retrieval"])
def test_results_of_two_precisions(kind, seed, tmp_path, here, capsys):
    tiny_embedder(seed).save(tmp_path / "model")
    sort = {"zeroshot": "classification", "retrieval": "retrieval"}[kind]
    data = write_benchmark(tmp_path / "set", seed, sort, counts=(40,), classes=30)
    command = [kind, str(tmp_path / "model"), str(data), "--workers", "0"]
    table, items = tmp_path / "all.csv", {}
    for precision in ("fp32", "bf16"):
        more = ["--precision", precision] if precision == "bf16" else []
        out = tmp_path / precision
        main([*command, *more, "--out", str(out), "--csv", str(table)])
        assert ("precision: bf16" in capsys.readouterr().out) == (precision == "bf16")
        (result,) = json.loads((out / f"{kind}.json").read_text())
        assert result["precision"] == precision
        assert result["settings"].get("precision", "fp32") == precision
        items[precision] = load_file(out / f"{kind}.items.safetensors")
    scores = {"zeroshot": "0/confidence", "retrieval": "0/score_of_pair"}[kind]
    assert not torch.equal(items["fp32"][scores], items["bf16"][scores])  # control: no embedding was taken from fp32
    settings = {line.split(",")[table.read_text().splitlines()[0].split(",").index("settings")] for line in rows(table)}
    assert {"precision=bf16" in one for one in settings} == {True, False}
    main([*command, "--precision", "bf16", "--csv", str(table)])
    assert "0 results added, 1 found there" in capsys.readouterr().out
    wrong = fails(capsys, [*command, "--precision", "bf16", "--out", str(tmp_path / "fp32")])
    assert "precision fp32" in wrong
    main(["compare", str(tmp_path / "fp32"), str(tmp_path / "bf16"), "--out", str(tmp_path / "both")])
    printed = capsys.readouterr().out
    (compared,) = json.loads((tmp_path / "both" / "compare.json").read_text())
    assert compared["same_model"]
    assert compared["precision"] == "A fp32, B bf16"
    counts = changed_by_hand(kind, items["fp32"], items["bf16"])
    assert {noun: count for noun, (count, _) in compared["changed"].items()} == counts
    for noun, (count, total) in compared["changed"].items():
        assert f"{count} of {total} {noun}" in printed


def rows(table: Path) -> list[str]:
    return table.read_text().splitlines()[1:]


def test_texts_are_measured_in_bf16(seed, tmp_path, here, capsys):
    spec = save_text_model(tmp_path / "text", seed)
    rng = np.random.default_rng(seed)
    documents = [{"_id": f"d{i}", "title": "", "text": " ".join(rng.choice(WORDS, 6))} for i in range(12)]
    queries = [{"_id": f"q{i}", "text": " ".join(rng.choice(WORDS, 4))} for i in range(5)]
    folder = write_documents(tmp_path / "beir", documents, queries, [f"q{i}\td{i}\t1" for i in range(5)])
    main(["retrieval", spec, str(folder), "--precision", "bf16", "--out", str(tmp_path / "documents")])
    (result,) = json.loads((tmp_path / "documents" / "retrieval.json").read_text())
    assert result["precision"] == result["settings"]["precision"] == "bf16"


def test_embedded_shards_of_two_precisions(seed, tmp_path, capsys):
    tiny_embedder(seed).save(tmp_path / "model")
    model, shards = str(tmp_path / "model"), str(tmp_path / "shards")
    write_shards(tmp_path / "shards", [5], seed)
    command = ["embed", model, shards]
    for precision in ("fp32", "bf16"):
        main([*command, str(tmp_path / precision), "--workers", "0", "--precision", precision])
        assert json.loads((tmp_path / precision / "embed.json").read_text())["precision"] == precision
        (file,) = (tmp_path / precision).glob("*.safetensors")
        found = load_file(file)["image"]
        embedder = load(model, "cpu", precision)
        torch.testing.assert_close(found, embedder.embed_images(ShardIndex.build(shards)), rtol=0, atol=1e-6)
        assert found.dtype == torch.float32
    capsys.readouterr()
    assert "--precision fp32" in fails(capsys, [*command, str(tmp_path / "fp32"), "--precision", "bf16"])
    wrong = fails(capsys, [*command, str(tmp_path / "features"), "--features", "--precision", "bf16"])
    assert "leave out --precision" in wrong
    assert not (tmp_path / "features").exists()


def test_embedded_texts_of_two_precisions(seed, tmp_path, capsys):
    spec = save_text_model(tmp_path / "text", seed)
    (tmp_path / "a.txt").write_text("a cat\na dog\ntwo hats\n")
    command = ["embed", spec, str(tmp_path / "a.txt"), str(tmp_path / "out")]
    main([*command, "--precision", "bf16"])
    found = load_file(tmp_path / "out" / "a.txt.safetensors")["embeddings"]
    torch.testing.assert_close(found, load_text(spec, "cpu", "bf16").embed(["a cat", "a dog", "two hats"]))
    torch.testing.assert_close(F.normalize(found, dim=1), found)
    capsys.readouterr()
    assert "other options" in fails(capsys, command)
