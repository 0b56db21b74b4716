import json
import pickle

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from helpers import encode, smooth
from PIL import Image
from safetensors.torch import save_file

from dualenc import ModelError, load
from dualenc.data import decode_image
from dualenc.inference.interpolation import interpolate
from dualenc.inference.open_clip import OpenClip, OpenClipTokenizer, OpenClipTransform, check_name

VISION = {"layers": 1, "width": 64, "patch_size": 16, "image_size": 32}
TEXT = {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
TEXTS = ["a cat", "", "Two HATS, and 1,234 boats!", "the red dog sits on a blue mat under the green tree", "dog " * 40]


def perturbed(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def towers(**text):
    """Build a model with the layout of CLIP or with a separate text tower, and draw ids of texts."""
    return {
        "CLIP": lambda: open_clip.CLIP(16, VISION, {**TEXT, **text}),
        "CustomTextCLIP": lambda: open_clip.CustomTextCLIP(16, VISION, {**TEXT, **text}),
    }


@pytest.fixture
def folder(tmp_path, seed):
    """Write the folder of an open_clip model, and return it with the model."""
    model = perturbed(open_clip.CLIP(16, VISION, TEXT), seed)
    preprocess = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4], "interpolation": "bilinear", "resize_mode": "squash"}
    config = {"model_cfg": {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT}, "preprocess_cfg": preprocess}
    (tmp_path / "peer").mkdir()
    (tmp_path / "peer" / "open_clip_config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), tmp_path / "peer" / "open_clip_model.safetensors")
    return tmp_path / "peer", model


@pytest.mark.parametrize("name", towers())
def test_without_padding_as_with_it(name, seed):
    model = perturbed(towers()[name](), seed)
    tokenizer = open_clip.SimpleTokenizer(context_length=20)
    own, wrapped = OpenClipTokenizer(tokenizer, True), OpenClip(model, name)
    assert wrapped.trims
    expected = F.normalize(model.encode_text(tokenizer(TEXTS)), dim=-1)
    ids = own.encode(TEXTS)
    assert [len(row) for row in ids][:2] == [4, 2]
    assert len(ids[-1]) == 20
    for rows in ([0, 1, 2], [3], [4, 0], [0, 1, 2, 3, 4]):
        found = wrapped.encode_text(own.pack([ids[i] for i in rows]))
        assert (found - expected[rows]).abs().max() < 2e-6
    # The control: an id less, and the text is another one.
    assert (wrapped.encode_text(own.pack([ids[0][:-1]])) - expected[0]).abs().max() > 1e-2


@pytest.mark.parametrize(
    "different", [{"pool_type": "last"}, {"no_causal_mask": True}, {"embed_cls": True, "pad_id": 0}]
)
def test_towers_that_attend_to_padding_get_it(different, seed):
    model = perturbed(towers(**different)["CustomTextCLIP"](), seed)
    wrapped, tokenizer = OpenClip(model, "x"), open_clip.SimpleTokenizer(context_length=20)
    assert not wrapped.trims
    own = OpenClipTokenizer(tokenizer, wrapped.trims)
    found = wrapped.encode_text(own.pack(own.encode(TEXTS)))
    assert (found - F.normalize(model.encode_text(tokenizer(TEXTS)), dim=-1)).abs().max() < 2e-6
    if "embed_cls" not in different:  # the control: without its padding it gives something else
        wrapped.trims = True
        short = OpenClipTokenizer(tokenizer, True)
        if different == {"pool_type": "last"}:
            assert (wrapped.encode_text(short.pack(short.encode(TEXTS[:1]))) - found[:1]).abs().max() > 1e-2


def test_a_folder_of_open_clip_embeds_as_open_clip_does(folder, seed):
    path, _ = folder
    embedder = load(f"open_clip:local-dir:{path}", "cpu")
    peer, _, transform = open_clip.create_model_and_transforms(f"local-dir:{path}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{path}")
    with torch.no_grad():
        text = peer.eval().encode_text(tokenizer(TEXTS), normalize=True)
        assert (embedder.embed_texts(TEXTS, batch_size=2) - text).abs().max() < 2e-6
        rng = np.random.default_rng(seed)
        pictures = [Image.fromarray(smooth(rng, height, width)) for height, width in ((40, 33), (70, 20), (32, 32))]
        image = peer.encode_image(torch.stack([transform(picture) for picture in pictures]), normalize=True)
    tensors = [decode_image(encode(picture)) for picture in pictures]
    for given in (pictures, tensors, [embedder.preprocess(x) for x in tensors]):
        assert (embedder.embed_images(given, batch_size=2) - image).abs().max() < 2e-6
    assert (embedder.embed_images(tensors[2][None]) - image[2]).abs().max() < 2e-6  # a batch of bytes of the right size
    probabilities = embedder.classify(pictures, ["cat", "dog"])
    names = peer.encode_text(tokenizer(["a photo of a cat.", "a photo of a dog."]), normalize=True)
    expected = (peer.logit_scale.exp() * image @ names.T).softmax(1)
    assert (probabilities - expected).abs().max() < 1e-5


def test_a_model_with_a_bias_gives_open_clips_sigmoids(folder, seed):
    """open_clip's own logits of a SigLIP model, through its own sigmoid."""
    path, _ = folder
    config = json.loads((path / "open_clip_config.json").read_text())
    config["model_cfg"] |= {"init_logit_bias": -10.0, "init_logit_scale": 2.3}
    (path / "open_clip_config.json").write_text(json.dumps(config))
    peer = perturbed(open_clip.CLIP(16, VISION, TEXT, init_logit_bias=-10.0, init_logit_scale=2.3), seed)
    torch.nn.init.uniform_(peer.logit_bias, -3, 3)
    save_file(peer.state_dict(), path / "open_clip_model.safetensors")
    embedder = load(f"open_clip:local-dir:{path}", "cpu")
    images = torch.randn(3, 3, 32, 32)
    names = open_clip.get_tokenizer(f"local-dir:{path}")(["a photo of a cat.", "a photo of a dog."])
    with torch.no_grad():
        expected = peer.get_logits(images, names)[0].sigmoid()
    assert (embedder.classify(images, ["cat", "dog"]) - expected).abs().max() < 1e-5
    assert (embedder.classify(images, ["cat", "dog"], scores="softmax").sum(1) - 1).abs().max() < 1e-5
    assert "run by open_clip" in repr(embedder)


def test_figures_differ_from_open_clips_own_only_where_its_conversion_does_not_show_the_image(folder, seed):
    """The table of docs/evaluation.md: transparent, rotated and 16-bit images."""
    embedder = load(f"open_clip:local-dir:{folder[0]}", "cpu")
    transform = open_clip.create_model_and_transforms(f"local-dir:{folder[0]}")[2]
    rng = np.random.default_rng(seed)
    color = Image.fromarray(smooth(rng, 40, 33))
    transparent, rotated, exif = color.copy(), color.copy(), Image.Exif()
    transparent.putalpha(Image.fromarray(rng.integers(0, 256, (40, 33), dtype=np.uint8)))
    exif[0x0112] = 6
    rotated.info["exif"] = exif.tobytes()
    gray = np.asarray(color.convert("L"))
    wide = Image.fromarray(gray.astype(np.uint16) * 257)
    white = Image.alpha_composite(Image.new("RGBA", color.size, "white"), transparent).convert("RGB")
    shown = [color, white, color.transpose(Image.Transpose.ROTATE_270), Image.fromarray(gray)]
    expected = embedder.embed_images(torch.stack([transform(picture) for picture in shown]))
    pictures = [color, transparent, rotated, wide]
    assert (embedder.embed_images(pictures) - expected).abs().max() < 2e-6
    theirs = embedder.embed_images(torch.stack([transform(picture) for picture in pictures]))
    differences = (theirs - expected).abs().amax(1)
    assert differences[0] < 2e-6
    assert (differences[1:] > 1e-3).all()


def test_the_transform_is_its_settings(folder):
    embedder = load(f"open_clip:local-dir:{folder[0]}", "cpu")
    assert embedder.preprocess == OpenClipTransform((32, 32), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), "bilinear", "squash", 0)
    again = pickle.loads(pickle.dumps(embedder.preprocess))  # to workers
    image = torch.randint(256, (3, 20, 50), dtype=torch.uint8)
    assert torch.equal(again(image), embedder.preprocess(image))


@pytest.mark.long
def test_a_checkpoint_of_its_trainer(folder, tmp_path, seed):
    """The spec names an architecture and the file that the trainer wrote."""
    path, model = folder
    (tmp_path / "Tiny-7.json").write_text(json.dumps({"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT}))
    open_clip.add_model_config(tmp_path / "Tiny-7.json")
    state = {f"module.{name}": x for name, x in model.state_dict().items()}
    torch.save({"epoch": 3, "name": "run", "state_dict": state}, tmp_path / "epoch_3.pt")
    embedder = load(f"open_clip:Tiny-7/{tmp_path}/epoch_3.pt", "cpu")
    assert torch.equal(embedder.embed_texts(TEXTS), load(f"open_clip:local-dir:{path}", "cpu").embed_texts(TEXTS))
    assert embedder.preprocess.interpolation == "bicubic"  # open_clip's own, since the file says nothing of it
    assert embedder.embed_texts(TEXTS).shape == (5, 16)
    compiled = {f"model._orig_mod.{name}": x for name, x in model.state_dict().items()}
    torch.save({"best": np.float64(0.5), "model": compiled}, tmp_path / "compiled.pt")
    assert load(f"open_clip:Tiny-7/{tmp_path}/compiled.pt", "cpu").fingerprint == embedder.fingerprint
    random = load("open_clip:Tiny-7", "cpu")
    torch.rand(1)
    same = load("open_clip:Tiny-7", "cpu")
    assert torch.equal(random.embed_texts(TEXTS), same.embed_texts(TEXTS))
    assert random.fingerprint == same.fingerprint != embedder.fingerprint
    torch.save({"state_dict": state, "code": tiny_code}, tmp_path / "evil.pt")
    with pytest.raises(ModelError, match=r"evil\.pt cannot be read: .*tiny_code"):
        load(f"open_clip:Tiny-7/{tmp_path}/evil.pt", "cpu")
    del state["module.ln_final.weight"]
    torch.save({"state_dict": {**state, "module.odd": torch.ones(1)}}, tmp_path / "part.pt")
    with pytest.raises(ModelError, match=r"part\.pt: .*ln_final\.weight is missing; odd is unknown"):
        load(f"open_clip:Tiny-7/{tmp_path}/part.pt", "cpu")


def tiny_code():
    pass


def test_each_model_of_open_clip_is_accepted_or_sent_to_one_that_is():
    for architecture, tag in open_clip.list_pretrained():
        try:
            check_name(architecture, tag)
        except ValueError as error:
            check_name(*str(error).partition("write open_clip:")[2].split("/"))


def test_missing_architectures_and_weights_are_named(tmp_path):
    with pytest.raises(ModelError, match=r"'ViT-B-23'.* ViT-B-32"):
        load("open_clip:ViT-B-23")
    with pytest.raises(
        ModelError, match=r"'laion' must be a file, or weights that open_clip has for ViT-B-32: openai, "
    ):
        load("open_clip:ViT-B-32/laion")
    with pytest.raises(ModelError, match="write open_clip:ViT-B-32-quickgelu/openai"):
        load("open_clip:ViT-B-32/openai")  # it would compute something else than what was trained
    with pytest.raises(ModelError, match="open_clip cannot load local-dir:"):
        load(f"open_clip:local-dir:{tmp_path}")
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT}})
    )
    with pytest.raises(
        ModelError, match="could not be loaded"
    ):  # A folder without weights must not give a random model.
        load(f"open_clip:local-dir:{tmp_path}")


def test_models_of_open_clip_are_only_evaluated(folder, tmp_path):
    embedder = load(f"open_clip:local-dir:{folder[0]}", "cpu")
    with pytest.raises(ModelError, match="is a model of open_clip"):
        embedder.save(tmp_path / "model")
    with pytest.raises(ModelError, match="is a model of open_clip"):
        interpolate(embedder, embedder, 0.5)


def test_the_fingerprint_is_of_weights_transform_and_tokenizer(folder, seed):
    path, _ = folder
    embedder = load(f"open_clip:local-dir:{path}", "cpu")
    first = embedder.fingerprint
    assert first == load(f"open_clip:local-dir:{path}", "cpu").fingerprint
    with torch.no_grad():
        embedder.model.model.ln_final.bias[3] += 1e-3
    assert embedder.fingerprint != first
    config = json.loads((path / "open_clip_config.json").read_text())
    config["preprocess_cfg"]["mean"][0] = 0.51
    (path / "open_clip_config.json").write_text(json.dumps(config))
    assert load(f"open_clip:local-dir:{path}", "cpu").fingerprint != first
    config["preprocess_cfg"]["mean"][0] = 0.5
    (path / "open_clip_config.json").write_text(json.dumps(config))
    assert load(f"open_clip:local-dir:{path}", "cpu").fingerprint == first
    config["model_cfg"]["text_cfg"]["heads"] = 4  # which no weight shows
    (path / "open_clip_config.json").write_text(json.dumps(config))
    assert load(f"open_clip:local-dir:{path}", "cpu").fingerprint != first
    config["model_cfg"]["text_cfg"]["heads"] = 2
    config["model_cfg"]["quick_gelu"] = True
    (path / "open_clip_config.json").write_text(json.dumps(config))
    assert load(f"open_clip:local-dir:{path}", "cpu").fingerprint != first
