"""Auxiliary losses of the contrastive task: values and gradients, over micro-batches and ranks too."""

import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from fits import SMOKE, metrics, small_fit
from helpers import SIZE, WORDS, tiny_tokenizer
from ranks import in_ranks

import dualenc
from dualenc.cli import main
from dualenc.data import Pairs
from dualenc.data.text.masking import Masking
from dualenc.losses import clip_loss
from dualenc.models import ImageConfig, TextConfig
from dualenc.training import ContrastiveTask, contrastive
from dualenc.training.auxiliary import AuxiliaryLoss, MaskedLanguageLoss

VIT = {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
WEIGHT = 0.7


def task_of(world=1):
    tokenizer = tiny_tokenizer()
    text = TextConfig(tokenizer.vocab_size, width=16, layers=2, heads=2, context_length=12)
    task = ContrastiveTask(
        ImageConfig("vit_tiny_patch16_224", SIZE, VIT), text, embed_dim=8, mlm_weight=WEIGHT
    ).double()
    task._trainer = SimpleNamespace(world_size=world)
    return task.train()


def piece_of(start, stop):
    """Return pairs start to stop of a batch, the same in any micro-batch."""
    tokenizer = tiny_tokenizer()
    texts = [" ".join((WORDS * 3)[i : i + 2 + i % 6]) for i in range(start, stop)]
    pictures = [torch.randint(256, (3, SIZE, SIZE), generator=torch.Generator().manual_seed(i)) for i in range(20)]
    tokens = tokenizer(texts)
    rows = torch.arange(start, stop)
    masked = Masking(tokenizer, 0.4)(tokens, (3, 0), start)
    return Pairs(torch.stack(pictures[start:stop]).to(torch.uint8), tokens, rows, rows[:, None].repeat(1, 2), masked)


def gradients(task, value):
    task.zero_grad()
    value.backward()
    return {name: p.grad.clone() for name, p in task.named_parameters()}


def by_hand(task, piece):
    """Compute the loss on padded texts."""
    images = task.preprocess.normalize(piece.images, torch.float64)
    contrastive = clip_loss(*task.model(images, piece.tokens))
    ids, mask, _ = piece.tokens._replace(ids=piece.masked.ids).padded()
    labels, _, _ = piece.tokens.padded()
    where = torch.zeros(len(piece.tokens.ids), dtype=torch.int64)
    where[piece.masked.masked_positions] = 1
    chosen, _, _ = piece.tokens._replace(ids=where).padded()
    logits = task.mlm(task.model.text.forward_padded(ids, mask), task.model.text.embeddings.token_embeddings.weight)
    return contrastive + WEIGHT * F.cross_entropy(logits[chosen.bool()].float(), labels[chosen.bool()])


def close(one, other):
    assert one.keys() == other.keys()
    for name in one:  # logits are compared in single precision
        torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-7, msg=lambda m, n=name: n + m)


@pytest.mark.parametrize("size", [20, 7])
def test_loss_is_the_sum_of_both(size, seed):
    torch.manual_seed(seed)
    task = task_of()
    want = by_hand(task, piece_of(0, 20))
    pieces = [piece_of(i, min(20, i + size)) for i in range(0, 20, size)]
    got = task.training_step(pieces if len(pieces) > 1 else pieces[0], 0)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    close(gradients(task, got), gradients(task, want))
    assert got - clip_loss(*task.model(*images_and_tokens(task, 0, 20))) > 0.1  # control


def images_and_tokens(task, start, stop):
    piece = piece_of(start, stop)
    return task.preprocess.normalize(piece.images, torch.float64), piece.tokens


def test_nothing_is_hidden(seed):
    """A batch of short captions may have no masked token: the loss is the contrastive one."""
    torch.manual_seed(seed)
    task, piece = task_of(), piece_of(0, 6)
    none = torch.zeros(0, dtype=torch.int64)
    piece = piece._replace(masked=piece.masked._replace(masked_positions=none, labels=none, ids=piece.tokens.ids))
    got = task.training_step(piece, 0)
    torch.testing.assert_close(got, clip_loss(*task.model(*images_and_tokens(task, 0, 6))))
    assert all(grad.isfinite().all() for grad in gradients(task, got).values())


class TextNorm(AuxiliaryLoss):
    """A second auxiliary loss: the squared norm of a learned map of the texts' vectors."""

    name = "text_norm"
    option = "model.text_norm_weight"

    def __init__(self):
        super().__init__(torch.nn.Linear(8, 1), 3.0)

    def compute(self, model, pieces, world):
        vectors = torch.cat([model.encode_text(piece.tokens) for piece in pieces])
        mean = self.module(vectors).square().mean()
        self.latest = mean.detach()
        return mean


def test_second_auxiliary_loss_is_one_object(seed, monkeypatch):
    torch.manual_seed(seed)
    monkeypatch.setattr(
        contrastive, "auxiliary_losses", lambda text, *_: [MaskedLanguageLoss(text, WEIGHT), TextNorm()]
    )
    task, piece = task_of(), piece_of(0, 20)
    added = task.text_norm(task.model.encode_text(piece.tokens)).square().mean()
    want = by_hand(task, piece) + 3 * added
    got = task.training_step(piece, 0)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
    close(gradients(task, got), gradients(task, want))
    assert {"mlm.bias", "mlm.dense.weight", "text_norm.weight", "text_norm.bias"} <= task.state_dict().keys()
    logged = task.extra_metrics()
    assert logged["train/text_norm_loss"] == pytest.approx(added.item())
    assert logged["train/mlm_loss"] > 0
    assert task.masked == MaskedLanguageLoss.masked


def test_wrong_use(tmp_path, seed, capsys):
    with pytest.raises(ValueError, match="mlm_weight -1"):
        ContrastiveTask(ImageConfig("vit_tiny_patch16_224", SIZE, VIT), TextConfig(50, 16, 1, 2), mlm_weight=-1)
    with pytest.raises(SystemExit):
        small_fit(SMOKE, tmp_path, seed, "--model.mlm_weight", "0.5", "--model.text_tuning.locked", "true")
    assert "model.text_tuning.locked" in capsys.readouterr().err
    task = task_of()
    task._trainer = SimpleNamespace(
        accumulate_grad_batches=1, precision="32-true", default_root_dir=".", datamodule=SimpleNamespace(mask=0.0)
    )
    with pytest.raises(ValueError, match=r"mask=0\.15 to PairData"):
        task.setup("fit")


def ranks(folder, rank, world):
    import torch.distributed as dist

    task = task_of(world)
    task.load_state_dict(torch.load(folder / "task.pt", weights_only=True))
    found = gradients(task, loss := task.training_step([piece_of(*span) for span in SPANS[rank]], 0))
    for grad in found.values():  # as DDP does
        dist.all_reduce(grad)
        grad /= world
    return {"loss": loss.detach(), **found}


SPANS = [[(0, 7), (7, 10)], [(10, 18), (18, 20)]]


@pytest.mark.slow
def test_over_ranks(tmp_path, seed):
    torch.manual_seed(seed)
    task = task_of()
    torch.save(task.state_dict(), tmp_path / "task.pt")
    want = by_hand(task, piece_of(0, 20))
    want = {"loss": want.detach(), **gradients(task, want)}
    for result in in_ranks(ranks, tmp_path, 2):
        close(result, want)


@pytest.mark.slow
def test_in_a_run(tmp_path, seed, capsys):
    """The head learns, is in checkpoints but not in the model directory, and a resumed run is bit-equal."""
    more = ["--model.mlm_weight", "0.5", "--data.micro_batch_size", "6"]
    whole = small_fit(SMOKE, tmp_path / "whole", seed, *more)
    guessed = metrics(whole, "train/mlm_loss")
    assert len(guessed) == 24
    assert sum(guessed[-4:]) < sum(guessed[:4])
    assert not any("mlm" in name for name in dualenc.load(whole / "last", "cpu").model.state_dict())
    part = tmp_path / "part"
    stop = json.dumps([{"class_path": "helpers.StopAt", "init_args": {"step": 5}}])
    base = ["fit", "--config", str(whole / "config.yaml"), "--trainer.default_root_dir", str(part)]
    with pytest.raises(SystemExit):
        main([*base, "--trainer.callbacks", stop])
    main([*base, "--ckpt_path", "last"])
    assert metrics(part, "train/mlm_loss") == guessed
    assert metrics(part, "train/loss") == metrics(whole, "train/loss")
