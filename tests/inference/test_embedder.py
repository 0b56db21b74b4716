import dataclasses
import io
import json
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from helpers import SIZE, WORDS, encode, pixels, smooth, tiny_embedder, tiny_tokenizer, write_shards
from PIL import Image
from safetensors.torch import load_file, save_file

import dualenc
from dualenc import DataError, ModelError, Preprocess, ShardIndex, TextConfig, TextPredictor
from dualenc.data import ImageError, Loader, PairDataset, decode_image
from dualenc.formats.model_folder import OWN_FILES
from dualenc.inference.embedder import Embedder, load
from dualenc.models import TextModel
from dualenc.utils.errors import warn_once

TEXTS = ["a cat", "", "two hats and boats", "the red dog sits on a blue mat under the green tree", "dog", "a", "a dog"]


@pytest.fixture
def embedder(seed):
    return tiny_embedder(seed)


@pytest.fixture
def saved(embedder, tmp_path):
    embedder.save(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def photos(seed, tmp_path):
    """Write images of several sizes and formats."""
    rng, paths = np.random.default_rng(seed), []
    for i, (kind, shape) in enumerate(
        [("png", (20, 31)), ("jpeg", (40, 17)), ("webp", (16, 16)), ("png", (9, 9)), ("jpeg", (33, 50))]
    ):
        paths.append(tmp_path / f"{i}.{kind}")
        paths[-1].write_bytes(encode(smooth(rng, *shape), kind))
    return paths


@pytest.mark.parametrize("options", [{}, {"logit_bias": True}, {"projection": "mlp"}])
def test_save_and_load_gives_equal_bits(seed, tmp_path, photos, options):
    embedder = tiny_embedder(seed, **options)
    embedder.save(tmp_path / "deep" / "model")
    assert {path.name for path in (tmp_path / "deep" / "model").iterdir()} == {*OWN_FILES, "README.md"}
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["model"]  # nothing left over
    again = dualenc.load(tmp_path / "deep" / "model", device="cpu")
    assert again.model.config == embedder.model.config
    assert again.preprocess == embedder.preprocess
    assert not again.model.training
    assert torch.equal(again.embed_images(photos), embedder.embed_images(photos))
    assert torch.equal(again.embed_texts(TEXTS), embedder.embed_texts(TEXTS))
    assert torch.equal(again.classify(photos, ["cat", "dog"]), embedder.classify(photos, ["cat", "dog"]))
    other = tiny_embedder(seed + 1, **options)
    assert not torch.equal(other.embed_images(photos), embedder.embed_images(photos))  # the control


def test_a_saved_model_can_be_saved_over_and_saved_again(seed, saved, tmp_path):
    other = tiny_embedder(seed + 1)
    other.save(saved)
    again = load(saved, "cpu")
    assert torch.equal(again.embed_texts(TEXTS), other.embed_texts(TEXTS))
    again.save(tmp_path / "second")
    for name in ("config.json", "tokenizer.json", "preprocess.json", "model.safetensors"):
        assert (tmp_path / "second" / name).read_bytes() == (saved / name).read_bytes()
    (tmp_path / "empty").mkdir()
    again.save(tmp_path / "empty")
    assert load(tmp_path / "empty")


def test_settings_of_the_tokenizer_are_saved(embedder, saved, tmp_path):
    """They have no place in tokenizer.json, and the fingerprint of the model knows what changes ids."""
    assert not (saved / "tokenizer_config.json").exists()
    other = Embedder(
        embedder.dual_encoder,
        embedder.tokenizer.replace(roles={"mask_token": "[PAD]"}, split_special_tokens=False),
        embedder.preprocess,
    )
    for _ in range(2):  # The second time replaces a folder that has the file.
        other.save(tmp_path / "other")
    again = load(tmp_path / "other", "cpu")
    assert again.tokenizer.mask_id == embedder.tokenizer.special["[PAD]"]
    assert again.tokenizer.encode(["a [SEP]"])[0].count(3) == 2
    assert load(saved, "cpu").tokenizer.encode(["a [SEP]"])[0].count(3) == 1
    assert again.fingerprint == other.fingerprint != embedder.fingerprint


def test_the_config_has_format_2_and_older_keys_suffice(saved):
    fields = json.loads((saved / "config.json").read_text())
    assert fields["format"] == 2
    first = {"format", "image", "text", "embed_dim", "projection", "logit_bias"}
    assert set(fields) == {*first, "image_projection", "text_projection"}
    (saved / "config.json").write_text(json.dumps({key: fields[key] for key in first}))
    assert load(saved)  # as the first files were
    assert "library_name: dualenc" in (saved / "README.md").read_text()
    assert oct(saved.stat().st_mode & 0o777) == "0o755"


# Embedding


def test_embeddings_are_of_unit_length_and_equal_the_plain_computation(embedder, photos):
    images, texts = embedder.embed_images(photos), embedder.embed_texts(TEXTS)
    assert images.shape == (5, 8)
    assert texts.shape == (7, 8)
    for found in (images, texts):
        assert found.dtype == torch.float32
        assert not found.requires_grad
        assert torch.allclose(found.norm(dim=1), torch.ones(len(found)), atol=1e-6)
    with torch.no_grad():
        for i, path in enumerate(photos):
            pixel = embedder.preprocess(decode_image(path.read_bytes())).double() / 255
            mean, std = (
                torch.tensor(x).double().view(3, 1, 1) for x in (embedder.preprocess.mean, embedder.preprocess.std)
            )
            row = embedder.model.double().encode_image(((pixel - mean) / std)[None])[0]
            assert (row - images[i]).abs().max() < 1e-5
        for i, text in enumerate(TEXTS):
            row = embedder.model.double().encode_text(embedder.tokenizer([text]))[0]
            assert (row - texts[i]).abs().max() < 1e-5


def test_embeddings_of_texts_do_not_depend_on_the_batch(embedder):
    texts = TEXTS + WORDS
    whole = embedder.embed_texts(texts)
    for batch_size in (1, 2, 3, 100):
        assert (embedder.embed_texts(texts, batch_size=batch_size) - whole).abs().max() < 1e-6
    turn = torch.randperm(len(texts)).tolist()
    assert (embedder.embed_texts([texts[i] for i in turn], batch_size=4) - whole[turn]).abs().max() < 1e-6
    assert (whole[0] - whole[2]).abs().max() > 1e-3  # the control


class _Numbered(torch.utils.data.Dataset):
    """A data set whose items have numbers only: it neither iterates nor raises an IndexError at its end."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i % len(self.items)]


def test_images_in_every_form(embedder, photos):
    whole = embedder.embed_images(photos)
    tensors = [decode_image(path.read_bytes()) for path in photos]
    pictures = [Image.open(path) for path in photos]
    sized = torch.stack([embedder.preprocess(image) for image in tensors])
    forms = {
        "strings": [str(path) for path in photos],
        "Pillow": pictures,
        "tensors": tensors,
        "sized": list(sized),
        "one tensor": sized,
        "normalized": embedder.preprocess.normalize(sized),
        "generator": (path for path in photos),
        "mixed": [photos[0], pictures[1], tensors[2], sized[3], str(photos[4])],
        "batches": [sized[:2], sized[2:]],
        "loader": torch.utils.data.DataLoader(list(sized), 3),
        "arrays": [tensor.permute(1, 2, 0).numpy() for tensor in tensors],
        "one array": sized.permute(0, 2, 3, 1).numpy(),
        "array of strings": np.array([str(path) for path in photos]),
        "bytes": [path.read_bytes() for path in photos],
        "data set": _Numbered(tensors),
        "data set of batches": _Numbered([sized[:4], sized[4:]]),
        "batches between": [photos[0], sized[1:3], sized[:0], tensors[3], photos[4]],
    }
    for name, form in forms.items():
        for batch_size in (64, 2):
            if not (name == "generator" and batch_size == 2):
                assert (embedder.embed_images(form, batch_size) - whole).abs().max() < 1e-6, name
    for picture in pictures:
        picture.close()


def test_one_input(embedder, photos):
    whole = embedder.embed_images(photos)
    with Image.open(photos[1]) as picture, open(photos[1], "rb") as file:
        pixel = decode_image(photos[1].read_bytes())
        for one in (photos[1], str(photos[1]), picture, pixel, pixel.permute(1, 2, 0).numpy(), file):
            found = embedder.embed_images(one)
            assert found.shape == (1, 8)
            assert (found[0] - whole[1]).abs().max() < 1e-6
    assert (embedder.embed_texts("two hats")[0] - embedder.embed_texts(["two hats", "a"])[0]).abs().max() < 1e-6


def test_samples_of_an_index_and_batches_of_a_pair_loader(embedder, tmp_path, seed):
    index = ShardIndex.build(write_shards(tmp_path / "shards", [3, 4], seed))
    dataset = PairDataset(index, "txt", embedder.tokenizer, embedder.preprocess)
    whole = embedder.embed_images([decode_image(s.read("png")) for s in index])
    batches = list(Loader(dataset, 3, shuffle=False))
    for images in (batches, index):
        assert (embedder.embed_images(images) - whole).abs().max() < 1e-6
    for images in (batches[0], index[0]):
        assert (embedder.embed_images(images)[0] - whole[0]).abs().max() < 1e-6


def test_a_batch_of_another_height_is_resized(embedder, seed):
    """Both sides are compared, though the width is right already."""
    batch = torch.from_numpy(pixels(np.random.default_rng(seed), 40, SIZE)).permute(2, 0, 1)[None]
    assert (embedder.embed_images(batch) - embedder.embed_images(list(batch))).abs().max() < 1e-6
    assert embedder.embed_images(batch.transpose(2, 3)).shape == (1, 8)


def test_normalized_and_plain_images_together(embedder, photos):
    """The pixels of a path are normalized although a float tensor comes before it."""
    whole = embedder.embed_images(photos[:3])
    floats = embedder.preprocess.normalize(embedder.preprocess(decode_image(photos[1].read_bytes())))
    assert (embedder.embed_images([photos[0], floats, photos[2]]) - whole).abs().max() < 1e-6


def test_pillow_images_of_16_bits_and_of_no_range(embedder, seed):
    """Gray of 16 bits is scaled; where the range is not defined, the numbers are refused and nothing is guessed."""
    gray = pixels(np.random.default_rng(seed), 50, 40)[..., 0]
    expected = embedder.embed_images(Image.fromarray(gray))
    assert (embedder.embed_images(Image.fromarray(gray.astype(np.uint16) * 257)) - expected).abs().max() < 1e-6
    for values in (gray.astype(np.int32) * 257, gray.astype(np.float32), gray.astype(np.float32) / 255):
        image = Image.fromarray(values)
        assert image.mode in ("I", "F")
        with pytest.raises(ImageError, match=f"mode {image.mode}"):
            embedder.embed_images([image])
    for dtype in (torch.int32, torch.int64, torch.uint16, torch.bool):
        wide = torch.from_numpy(gray).to(dtype).expand(3, 50, 40)
        for images in (wide, [wide], wide[None], [wide[None]]):
            with pytest.raises(ValueError, match=str(dtype)):
                embedder.embed_images(images)


def test_no_inputs_are_refused(embedder):
    with pytest.raises(ValueError, match="no images"):
        embedder.embed_images([])
    with pytest.raises(ValueError, match="no texts"):
        embedder.embed_texts([])


def test_a_bad_picture_names_its_path(embedder, photos):
    photos[2].write_bytes(b"broken")
    with pytest.raises(ImageError, match=r"2\.webp: cannot be decoded"):
        embedder.embed_images(photos)
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        embedder.embed_images(["gone.png"])


WRONG_IMAGES = {
    "images cannot be None": None,
    "images cannot be 3": 3,
    "images cannot be of the type dict": {"a": "b"},
    "image 1: cannot be None": [np.zeros((4, 4), np.uint8), None],
    "image 0: cannot be of the type dict": [{"pixel_values": 0}],
    "is an array of float64": np.zeros((4, 4, 3)),
    "transpose": np.zeros((3, 5, 6), np.uint8),
    "labels": [(torch.zeros(2, 3, SIZE, SIZE, dtype=torch.uint8), torch.zeros(2))],
    "permute": torch.zeros(5, 6, 3, dtype=torch.uint8),
    "tensor of 5 x 6": torch.zeros(5, 6),
    "tensor of 1 x 5 x 6": torch.zeros(1, 5, 6, dtype=torch.uint8),
    "normalized images have 16 x 16": torch.zeros(3, 5, 6),
    "is a URL": "https://example.org/a.jpg",
    "no images": iter(()),
}


@pytest.mark.parametrize("match", WRONG_IMAGES)
def test_other_inputs_are_refused_in_one_line(embedder, match):
    with pytest.raises(ValueError, match=match) as error:
        embedder.embed_images(WRONG_IMAGES[match])
    assert "\n" not in str(error.value)


def test_float_images_that_look_like_plain_ones_are_mentioned(embedder, caplog):
    warn_once.cache_clear()
    embedder.embed_images(2 * torch.rand(3, SIZE, SIZE) - 1.5)
    assert not caplog.messages
    embedder.embed_images(torch.rand(3, SIZE, SIZE))
    assert "must be normalized" in caplog.text


def test_texts_that_are_not_strings_are_refused(embedder):
    for texts, match in (
        (None, "texts are None: pass a string or a list"),
        (7, "texts are 7"),
        (b"a", "of the type bytes"),
        (["a", None], "number 1 .from 0. is None"),
        ([["a"]], "of the type list"),
    ):
        with pytest.raises(ValueError, match=match):
            embedder.embed_texts(texts)
    for batch_size in (0, -1, None):
        for call in (embedder.embed_texts, embedder.embed_images):
            with pytest.raises(ValueError, match="batch_size"):
                call(["a"], batch_size)


def test_names_and_templates_that_would_be_misread_are_refused(embedder, photos):
    for names, templates, match in (
        ("dog", ["a {c}"], r"names of classes are the single string 'dog': pass a list, such as \['dog'\]"),
        (["dog"], "a {c}", "templates are the single string"),
        (["dog", "cat"], ["a photo of a {}."], r"does not have \{c\}.*: write 'a photo of a \{c\}\.'"),
        (["dog", "cat"], ["a {c}", "a photo"], r"'a photo' does not have \{c\}"),
        ([], ["a {c}"], "no names"),
        (["dog"], [], "no templates"),
        ([1], ["a {c}"], "names of classes must be strings"),
        (["dog"], [str.upper], "templates must be strings"),
    ):
        for call in (
            lambda names, templates: embedder.classify(photos, names, templates),
            lambda names, templates: dualenc.zero_shot_classifier(embedder, names, templates),
        ):
            with pytest.raises(ValueError, match=match):
                call(names, templates)


def test_scores_of_classes(seed, photos):
    """Only a model with a bias has a sigmoid by itself (SigLIP, Zhai et al. 2023, section 3.2)."""
    names = ["cat", "dog", "tree"]
    for biased in (False, True):
        embedder = tiny_embedder(seed, logit_bias=biased)
        cosine = embedder.classify(photos, names, scores="cosine")
        plain = embedder.embed_images(photos) @ embedder.embed_texts([f"a photo of a {name}." for name in names]).T
        assert (cosine - plain).abs().max() < 1e-6
        scale = embedder.model.logits.logit_scale.double().exp()
        softmax = (scale * cosine.double()).softmax(1)
        assert (embedder.classify(photos, names, scores="softmax") - softmax).abs().max() < 1e-5
        if biased:
            torch.nn.init.uniform_(embedder.model.logits.logit_bias, -2, 2)
            expected = 1 / (1 + (-scale * cosine.double() - embedder.model.logits.logit_bias.double()).exp())
            assert (embedder.classify(photos, names, scores="sigmoid") - expected).abs().max() < 1e-5
        else:
            expected = softmax
            with pytest.raises(ValueError, match="lacks the bias"):
                embedder.classify(photos, names, scores="sigmoid")
        assert (embedder.classify(photos, names) - expected).abs().max() < 1e-5
        with pytest.raises(ValueError, match="softmax, sigmoid, cosine"):
            embedder.classify(photos, names, scores="probability")


def test_arrays_in_place_of_tensors(embedder, photos):
    for found, expected in (
        (embedder.embed_images(photos, numpy=True), embedder.embed_images(photos)),
        (embedder.embed_texts(TEXTS, numpy=True), embedder.embed_texts(TEXTS)),
        (embedder.classify(photos, ["a", "b"], numpy=True), embedder.classify(photos, ["a", "b"])),
    ):
        assert isinstance(found, np.ndarray)
        assert found.dtype == np.float32
        assert np.array_equal(found, expected.numpy())


class _Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("terminal", [True, False])
def test_a_bar_only_where_it_is_wanted_and_seen(embedder, photos, monkeypatch, capsys, terminal):
    stream = _Terminal() if terminal else io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setenv("TERM", "xterm")
    embedder.classify(photos, ["a", "b"])
    assert stream.getvalue() == ""
    embedder.classify(photos, ["a", "b"], progress=True)
    embedder.embed_texts(TEXTS, progress=True)
    assert ("images" in stream.getvalue()) == ("texts" in stream.getvalue()) == terminal
    assert capsys.readouterr().out == ""


def test_to_and_repr(seed, tmp_path):
    embedder = tiny_embedder(seed)
    embedder.save(tmp_path / "m")
    loaded = load(tmp_path / "m", "cpu")
    count = sum(parameter.numel() for parameter in embedder.model.parameters())
    for part in (
        str(tmp_path / "m"),
        "vit_tiny_patch16_224",
        "16 x 16",
        "8 dimensions",
        f"{count:,} parameters",
        "on cpu",
    ):
        assert part in repr(loaded)
    assert "\n" not in repr(loaded)
    assert loaded.to("meta") is loaded
    assert loaded.device.type == "meta"
    assert "on meta" in repr(loaded)
    for device in ("gpu", "cuda:99", 3.5):
        for call in (embedder.to, lambda device: load(tmp_path / "m", device)):
            with pytest.raises(ValueError, match=r"cannot be used here.*: choose one of cpu") as error:
                call(device)
            assert "\n" not in str(error.value)


def test_classify(embedder, photos):
    found = embedder.classify(photos, ["cat", "dog", "tree"], ["a {c}", "the {c}"])
    assert found.shape == (5, 3)
    assert torch.allclose(found.sum(1), torch.ones(5), atol=1e-6)
    scale = embedder.model.logits.logit_scale.exp().item()
    assert scale == pytest.approx(1 / 0.07, rel=1e-5)
    classifier = dualenc.zero_shot_classifier(embedder, ["cat", "dog", "tree"], ["a {c}", "the {c}"])
    scores = scale * embedder.embed_images(photos).double() @ classifier.double().T
    assert (found - scores.softmax(1)).abs().max() < 1e-5
    assert embedder.classify(photos[0], ["cat"]).tolist() == [[1.0]]


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_of_the_model_is_restored(embedder, training):
    embedder.model.train(training)
    embedder.embed_texts(TEXTS)
    with pytest.raises(FileNotFoundError):
        embedder.embed_images(["gone.png"])
    assert embedder.model.training == training


def test_dropout_does_not_touch_embeddings(embedder, seed, tmp_path):
    config = dataclasses.replace(embedder.model.config.text, dropout=0.5)
    model = dualenc.DualEncoder(embedder.model.config.image, config, 8)
    dropping = Embedder(model.train(), embedder.tokenizer, embedder.preprocess)
    assert torch.equal(dropping.embed_texts(TEXTS), dropping.embed_texts(TEXTS))


def test_parts_that_do_not_fit_are_refused(embedder):
    model, tokenizer, preprocess = embedder.model, embedder.tokenizer, embedder.preprocess
    with pytest.raises(ModelError, match=r"preprocess\.json has size 32, but the image encoder takes 16"):
        Embedder(model, tokenizer, Preprocess(32))
    with pytest.raises(ModelError, match="gives 13 tokens, the model takes 12"):
        Embedder(model, tiny_tokenizer(13), preprocess)
    small = dataclasses.replace(model.config.text, vocab_size=tokenizer.vocab_size - 1)
    with pytest.raises(ModelError, match=f"tokenizer has {tokenizer.vocab_size} entries, the model's vocab_size"):
        Embedder(dualenc.DualEncoder(model.config.image, small, 8), tokenizer, preprocess)


# Model directories that cannot be used


@pytest.mark.parametrize("name", OWN_FILES)
def test_a_missing_file_is_named(saved, name):
    (saved / name).unlink()
    with pytest.raises(ModelError, match=rf"not a complete model directory: {name} missing"):
        load(saved)


def test_all_missing_files_are_named(tmp_path):
    with pytest.raises(ModelError, match=", ".join(OWN_FILES) + " missing"):
        load(tmp_path)
    with pytest.raises(ModelError, match=r"absent' must be a folder that exists, or hf-hub:"):
        load("absent")


def test_what_a_spec_names_instead_of_a_model(saved, tmp_path, seed):
    """Each message names what is there, and the way out."""
    write_shards(tmp_path / "shards", [2], seed)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text("{}")
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "export.json").write_text('{"format": "onnx"}')
    (tmp_path / "model.ckpt").write_bytes(b"x")
    text = TextPredictor(TextModel(tiny_embedder(seed).model.config.text).eval(), tiny_tokenizer())
    text.save(tmp_path / "text")
    for spec, match in (
        (tmp_path / "mode", f"did you mean {saved}"),
        (tmp_path / "model.ckpt", "is a file"),
        (tmp_path / "shards", "a folder of shards"),
        (tmp_path / "run", "a run without a model yet"),
        (tmp_path / "onnx", "an export to onnx"),
        (tmp_path, f"a folder of models: pass one of them, such as {saved}"),
        (None, "cannot be None"),
        (3, "cannot be 3"),
    ):
        for call in (load, dualenc.load_text):
            with pytest.raises(ModelError, match=match) as error:
                call(spec, "cpu")
            assert "\n" not in str(error.value)
    with pytest.raises(ModelError, match=r"text model.*dualenc\.load_text"):
        load(tmp_path / "text")


def change(path, **values):
    """Set keys of a JSON file; "a.b" is key b of object a, and `...` removes it."""
    fields = json.loads(path.read_text())
    for key, value in values.items():
        *folders, last = key.split("__")
        place = fields
        for folder in folders:
            place = place[folder]
        if value is ...:
            del place[last]
        else:
            place[last] = value
    path.write_text(json.dumps(fields))


CONFIGS = {
    "newer": ({"format": 3}, r"config\.json has format 3, dualenc .* reads up to 2: upgrade"),
    "no format": ({"format": ...}, r"config\.json does not have the key 'format'"),
    "format word": ({"format": "1"}, r"config\.json does not have the key 'format'"),
    "unknown": ({"color": 1}, r"config\.json has the unknown key 'color'"),
    "unknown inside": ({"text__rope": True}, r"config\.json: text has the unknown key 'rope'"),
    "missing": ({"embed_dim": ...}, r"config\.json has no key 'embed_dim'"),
    "missing inside": ({"text__width": ...}, r"config\.json: text has no key 'width'"),
    "word": ({"embed_dim": "8"}, r"config\.json: embed_dim must be int, not '8'"),
    "bool for int": ({"text__layers": True}, r"config\.json: text: layers must be int, not True"),
    "float for int": ({"text__layers": 1.0}, r"config\.json: text: layers must be int, not 1\.0"),
    "int for bool": ({"logit_bias": 1}, r"config\.json: logit_bias must be bool, not 1"),
    "null": ({"text__width": None}, r"config\.json: text: width must be int, not None"),
    "other word": ({"text__pool": "max"}, r"config\.json: text: pool must be .*'max'"),
    "no object": ({"text": []}, r"config\.json: text must be an object, not \[\]"),
    "list": ({"image__overrides": [1]}, r"config\.json: image: overrides must be"),
    "indivisible": ({"text__width": 17}, r"config\.json: text: text\.width 17 is not divisible"),
    "no model": ({"image__name": "vit_nonsense"}, r"config\.json: timm does not know a model 'vit_nonsense'"),
    "no vit": ({"image__name": "resnet18", "image__overrides": {}}, r"config\.json: .*vision transformer"),
    "argument": ({"image__overrides": {"nonsense": 1}}, r"config\.json: .*arguments"),
    "no heads": ({"text__heads": 0}, r"config\.json"),
    "negative width": ({"text__width": -16}, r"config\.json"),
    "negative embedding": ({"embed_dim": -8}, r"config\.json"),
    "no patches": ({"image__overrides": {"patch_size": 0}}, r"config\.json"),
}  # fmt: skip


def test_older_files_lack_what_came_later(saved):
    new = load(saved)
    path = saved / "config.json"
    fields = json.loads(path.read_text())
    fields["text"] = {name: value for name, value in fields["text"].items() if name in TextConfig.REQUIRED}
    assert len(fields["text"]) == 12
    path.write_text(json.dumps(fields))
    old = load(saved)
    assert old.dual_encoder.config == new.dual_encoder.config
    assert old.fingerprint == new.fingerprint


@pytest.mark.parametrize("case", CONFIGS)
def test_a_wrong_config_names_the_key(saved, case):
    load(saved)  # the control
    values, message = CONFIGS[case]
    change(saved / "config.json", **values)
    with pytest.raises(ModelError, match=message):
        load(saved)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"size": "16"}, r"preprocess\.json: size must be int"),
        ({"mean": [0.5, 0.5]}, r"preprocess\.json: mean must be"),
        ({"mean": [0.5, 0.5, "x"]}, r"preprocess\.json: mean must be"),
        ({"resize": "crop"}, r"preprocess\.json: resize must be"),
        ({"gamma": 1}, r"preprocess\.json has the unknown key 'gamma'"),
        ({"std": ...}, r"preprocess\.json has no key 'std'"),
        ({"size": 32}, r"preprocess\.json has size 32, .* 16"),
    ],
)
def test_a_wrong_preprocess_names_the_key(saved, values, message):
    change(saved / "preprocess.json", **values)
    with pytest.raises(ModelError, match=message):
        load(saved)


@pytest.mark.parametrize("name", ["config.json", "preprocess.json"])
@pytest.mark.parametrize("data", [b"", b"garbage", b"\xff\xfe", b"[]", b"1", b"null", b"[" * 100_000])
def test_garbage_in_json_names_the_file(saved, name, data):
    (saved / name).write_bytes(data)
    with pytest.raises(ModelError, match=name.replace(".", r"\.")):
        load(saved)


def test_garbage_in_the_tokenizer_names_the_file(saved):
    (saved / "tokenizer.json").write_bytes(b"garbage")
    with pytest.raises(DataError, match=r"tokenizer\.json is not a tokenizer"):
        load(saved)


@pytest.mark.parametrize("cut", [0, 4, 100, -1])
def test_garbage_weights_name_the_file(saved, cut):
    data = (saved / "model.safetensors").read_bytes()
    for broken in (data[:cut], b"\xff" * 64, pickle.dumps({"a": 1})):
        (saved / "model.safetensors").write_bytes(broken)
        with pytest.raises(ModelError, match=r"model\.safetensors cannot be read"):
            load(saved)


def test_weights_that_do_not_fit_name_the_tensor(saved):
    path = saved / "model.safetensors"
    state = load_file(path)
    name = "text_projection.weight"
    cases = [
        ({k: v for k, v in state.items() if k != name}, f"{name} is missing"),
        ({**state, "extra.weight": torch.zeros(2)}, "extra.weight is unknown"),
        ({**state, name: torch.zeros(3, 3)}, rf"{name} has shape \(3, 3\), expected \(8, 16\)"),
        ({}, r"is missing; .* and \d+ more"),
    ]
    for wrong, message in cases:
        save_file(wrong, path)
        with pytest.raises(ModelError, match=message) as error:
            load(saved)
        assert "model.safetensors" in str(error.value)
        assert "config.json" in str(error.value)
    save_file(state, path)
    load(saved)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("hacked",)


def test_a_config_cannot_name_other_files_or_downloads(saved, tmp_path, monkeypatch):
    """timm.create_model takes these; a stranger's config.json must not reach them."""
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": Bomb()}, tmp_path / "evil.pth")
    for override in (
        {"checkpoint_path": "evil.pth"},
        {"pretrained": True},
        {"pretrained_cfg_overlay": {"file": "evil.pth"}, "pretrained": True},
        {"pretrained_cfg": {"file": "evil.pth"}, "pretrained": True},
    ):
        change(
            saved / "config.json",
            image__overrides={"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, **override},
        )
        with pytest.raises(ModelError, match=r"config\.json: .*'(checkpoint_path|pretrained\w*)'"):
            load(saved)
    assert not (tmp_path / "hacked").exists()


# Paths


def test_save_refuses_a_path_that_is_taken(embedder, tmp_path):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "thesis.txt").write_text("mine")
    for name in ("file", "folder"):
        with pytest.raises(ModelError, match=f"{name} exists and is not a model directory"):
            embedder.save(tmp_path / name)
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "thesis.txt").read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_save_does_not_take_a_strangers_config_for_a_model_directory(embedder, tmp_path):
    """Many programs write a config.json; the folder around it must not be deleted."""
    folder = tmp_path / "bert"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "bert"}')
    (folder / "thesis.txt").write_text("mine")
    with pytest.raises(ModelError, match="is not a model directory"):
        embedder.save(folder)
    assert (folder / "thesis.txt").read_text() == "mine"


def test_a_failed_save_leaves_the_old_model(embedder, saved, seed, monkeypatch):
    before = {path.name: path.read_bytes() for path in saved.iterdir()}

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("dualenc.inference.embedder.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        tiny_embedder(seed + 1).save(saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert [path.name for path in saved.parent.iterdir()] == ["model"]


def test_a_run_directory_loads_its_best_or_else_its_last(seed, tmp_path):
    models = {name: tiny_embedder(seed + i) for i, name in enumerate(("best", "last"))}
    for name, model in models.items():
        model.save(tmp_path / "run" / name)
    assert torch.equal(load(tmp_path / "run").embed_texts(TEXTS), models["best"].embed_texts(TEXTS))
    shutil.rmtree(tmp_path / "run" / "best")
    assert torch.equal(load(str(tmp_path / "run")).embed_texts(TEXTS), models["last"].embed_texts(TEXTS))
