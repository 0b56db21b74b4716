"""Replaced-token detection: draws, labels, losses, shared embeddings."""

import pytest
import torch
import torch.nn.functional as F

from dualenc import TextConfig, Tokens
from dualenc.models import HeadConfig, TextModel
from dualenc.models.electra import ReplacedTokenModel, generator_config, replaced_token_losses

VOCAB = 30
TEXT = TextConfig(VOCAB, width=16, layers=2, heads=4, context_length=12, types=2, embed_width=10, dropout=0.0)


def build(size=0.5):
    model = ReplacedTokenModel(TEXT, generator_config(TEXT, size)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def draw():
    texts = [torch.randint(5, VOCAB, (n,)).tolist() for n in (3, 12, 5, 5, 8)]
    tokens = Tokens.pack(texts)
    places = torch.randperm(len(tokens.ids))[:9].sort().values
    ids = tokens.ids.clone()
    ids[places] = 4
    return tokens, ids, places


@pytest.mark.parametrize(("size", "heads", "width"), [(0.25, 1, 4), (0.5, 2, 8), (0.1, 1, 4), (1.0, 4, 16)])
def test_generator_is_narrower_and_equally_deep(size, heads, width):
    found = generator_config(TEXT, size)
    assert (found.heads, found.width, found.layers) == (heads, width, TEXT.layers)
    assert (found.embed_width or found.width) == 10
    assert found.mlp_width == round(size * 64)
    plain = generator_config(TextConfig(VOCAB, 16, 2, 4), size)  # embeddings of the discriminator's own width
    assert (plain.embed_width or plain.width) == 16
    with pytest.raises(ValueError, match="generator_size 0"):
        generator_config(TEXT, 0)


def test_losses_equal_the_paper():
    model = build()
    tokens, ids, places = draw()
    out = model(tokens, ids, places)
    labels = tokens.ids[places]
    guessed, judged = replaced_token_losses(out, labels)

    # Each encoder alone, by the padded path.
    def padded(encoder, ids):
        return encoder.forward_padded(*tokens._replace(ids=ids).padded()[:2])

    mask = tokens.padded()[1]
    order = tokens.rows.argsort()  # packed rows in the order of the padded ones
    spans = [torch.arange(int(tokens.offsets[r]), int(tokens.offsets[r + 1])) for r in tokens.rows.tolist()]
    back = torch.cat(spans)  # packed places, in the caller's order
    assert len(order) == len(spans)
    hidden = torch.empty(len(tokens.ids), model.generator.config.width, dtype=torch.float64)
    hidden[back] = padded(model.generator.encoder, ids)[mask]
    head = model.generator.heads["mlm"]
    words = model.discriminator.encoder.embeddings.token_embeddings.weight
    logits = F.linear(head.norm(F.gelu(head.dense(hidden[places]))), words, head.bias)
    torch.testing.assert_close(logits, out.guesses, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(
        -logits.log_softmax(-1).gather(1, labels[:, None]).sum(), guessed.double(), rtol=1e-5, atol=0
    )

    assert torch.equal(out.replaced, out.ids != tokens.ids)
    elsewhere = torch.ones_like(out.replaced)
    elsewhere[places] = False
    assert torch.equal(out.ids[elsewhere], tokens.ids[elsewhere])
    hidden = torch.empty(len(tokens.ids), TEXT.width, dtype=torch.float64)
    hidden[back] = padded(model.discriminator.encoder, out.ids)[mask]
    head = model.discriminator.heads["rtd"]
    says = head.out(F.gelu(head.dense(hidden)))[:, 0]
    torch.testing.assert_close(says, out.logits, rtol=1e-10, atol=1e-10)
    chance = torch.sigmoid(says)
    want = -torch.where(out.replaced, chance.log(), (1 - chance).log()).sum()
    torch.testing.assert_close(want, judged.double(), rtol=1e-5, atol=0)


@pytest.mark.long
def test_draws_follow_the_generators_softmax():
    model = build()
    tokens, ids, places = draw()
    counts = torch.zeros(len(places), VOCAB)
    rounds = 3000
    with torch.no_grad():
        guesses = model.generator.head("mlm", model.generator.encoder(tokens._replace(ids=ids))[places], tokens)
        model.discriminator.forward = lambda tokens, head: torch.zeros(len(tokens.ids))  # what it says is not asked
        for _ in range(rounds):
            drawn = model(tokens, ids, places).ids[places]
            counts[torch.arange(len(places)), drawn] += 1
    want = guesses.softmax(-1).float()
    spread = (want * (1 - want) / rounds).sqrt()
    assert ((counts / rounds - want).abs() < 5 * spread + 2e-3).all()
    assert (want.max(-1).values < 0.99).any()  # control: there is something to draw


def test_draw_of_the_original_token_counts_as_original():
    model = build()
    tokens, ids, places = draw()
    with torch.no_grad():  # a generator that is sure of the right word
        model.generator.heads["mlm"].bias.zero_()
        model.generator.heads["mlm"].bias[7] = 1e6
    tokens = tokens._replace(ids=torch.full_like(tokens.ids, 7))
    assert not model(tokens, ids, places).replaced.any()
    with torch.no_grad():
        model.generator.heads["mlm"].bias[8] = 2e6
    assert model(tokens, ids, places).replaced.nonzero()[:, 0].tolist() == places.tolist()  # control


def test_both_encoders_share_their_embeddings():
    model = build()
    own, other = model.generator.encoder.embeddings, model.discriminator.encoder.embeddings
    for name in ("token_embeddings", "position_embeddings", "segment_embeddings", "norm"):
        assert getattr(own, name) is getattr(other, name)
    assert own.projection is not other.projection
    copy = build()
    copy.load_state_dict(model.state_dict())
    assert (
        copy.generator.encoder.embeddings.token_embeddings.weight
        is copy.discriminator.encoder.embeddings.token_embeddings.weight
    )
    # Both losses train them; no gradient of the discriminator's passes the draw.
    tokens, ids, places = draw()
    guessed, judged = replaced_token_losses(model(tokens, ids, places), tokens.ids[places])
    (grad,) = torch.autograd.grad(
        judged, model.generator.heads["mlm"].dense.weight, allow_unused=True, retain_graph=True
    )
    assert grad is None
    for loss in (guessed, judged):
        assert torch.autograd.grad(loss, own.token_embeddings.weight, retain_graph=True)[0].any()


def test_join_of_two_saved_parts():
    model = build()
    parts = [TextModel(TEXT, {"rtd": HeadConfig("rtd")}), TextModel(model.generator.config, {"mlm": HeadConfig("mlm")})]
    for part, own in zip(parts, (model.discriminator, model.generator)):
        part.double().load_state_dict(own.state_dict())
    joined = ReplacedTokenModel.join(*(part.float() for part in parts))
    for name, x in model.state_dict().items():
        assert torch.equal(joined.state_dict()[name], x.float()), name
    with torch.no_grad():
        parts[1].encoder.embeddings.token_embeddings.weight[3] += 1
    with pytest.raises(ValueError, match=r"not trained together: embeddings\.token_embeddings\.weight"):
        ReplacedTokenModel.join(*parts)
    with pytest.raises(ValueError, match="vocab_size 31 is not 30"):
        ReplacedTokenModel(TEXT, TextConfig(31, width=16, layers=2, heads=4, context_length=12, types=2))
