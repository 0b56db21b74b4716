from dataclasses import replace

import pytest
import torch
import torch._dynamo
import torch._dynamo.testing
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from dualenc.models.attention import grouped_attention, grouped_attention_backward, padded_attention, ragged_attention
from dualenc.models.text_encoder import TextConfig, TextEncoder, rotary_angles, rotate
from dualenc.tokens import Tokens

EXACT = {"rtol": 1e-10, "atol": 1e-10}
VOCAB, CONTEXT, WIDTH, HEADS, MLP = 40, 16, 24, 3, 44

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


class Operations(TorchDispatchMode):
    """A mode that counts operations by name."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))

    def count(self, name):
        return self.names.count(name)


def build(dtype=torch.float64, **changes):
    """Build a small encoder with all parameters perturbed, since zero biases and unit LayerNorms hide mistakes."""
    settings = {"mlp_width": MLP, "context_length": CONTEXT, "layers": 2, "norm_eps": 1e-5, **changes}
    return perturb(TextEncoder(TextConfig(VOCAB, WIDTH, heads=HEADS, **settings)).to(dtype))


def perturb(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def ragged():
    """Draw lengths in random order, including the shortest, the longest and repeated ones."""
    lengths = [1, CONTEXT, 1, 5, 5, 5, *torch.randint(1, CONTEXT + 1, (4,)).tolist()]
    return [lengths[i] for i in torch.randperm(len(lengths))]


def draw(lengths, types=0):
    """Draw different texts without the padding id 0, and their segments."""
    texts = []
    for length in lengths:
        while (text := torch.randint(1, VOCAB, (length,)).tolist()) in texts:
            pass
        texts.append(text)
    return texts, [torch.randint(0, types, (n,)).tolist() for n in lengths] if types else None


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def per_text(q, k, v, offsets, causal=False, window=None):
    """Compute attention by its formula, one text at a time."""
    outs = []
    for start, end in zip(offsets.tolist(), offsets.tolist()[1:]):
        scores = torch.einsum("qhd,khd->hqk", q[start:end], k[start:end]) / q.shape[-1] ** 0.5
        for i in range(end - start):
            for j in range(end - start):
                if (causal and j > i) or (window is not None and abs(i - j) > window):
                    scores = scores.index_put(
                        (torch.arange(HEADS), *torch.tensor([[i], [j]])), scores.new_tensor(-1e30)
                    )
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[start:end]))
    return torch.cat(outs)


def offsets_of(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def heads(lengths, width=8, dtype=torch.float64, device="cpu"):
    return [torch.randn(sum(lengths), HEADS, width, dtype=dtype, device=device, requires_grad=True) for _ in "qkv"]


# The packed encoder against the padded one


FAMILIES = {
    "shared layers": {"layers": 5, "groups": 2, "group_size": 2, "embed_width": 10},
    "window": {"layers": 4, "window": 4, "global_every": 3},
    "modern": {
        "layers": 4, "positions": "rotary", "theta": 50.0, "local_theta": 7.0, "window": 6, "global_every": 2,
        "gated": True, "bias": False, "norm": "pre", "embed_norm": True,
    },
    "causal": {"causal": True, "norm": "pre", "pool": "last", "activation": "quick_gelu"},
    "offset": {"position_offset": 2, "types": 1},
}  # fmt: skip


@pytest.mark.parametrize(
    "changes",
    [*({"norm": norm, "pool": pool, "types": types} for norm in ("post", "pre") for pool in ("cls", "mean")
       for types in (0, 2)), *FAMILIES.values()],
    ids=lambda changes: " ".join(map(str, changes.values())),
)  # fmt: skip
def test_packed_equals_padded(changes):
    model, types = build(**changes), changes.get("types", 0)
    texts, segments = draw(ragged(), types)
    tokens = Tokens.pack(texts, segments)

    # The texts are padded by hand, so that a mistake in Tokens shows here too.
    ids = torch.zeros(len(texts), CONTEXT, dtype=torch.long)
    mask = torch.zeros(len(texts), CONTEXT, dtype=torch.bool)
    kinds = torch.zeros_like(ids) if types else None
    for i, text in enumerate(texts):
        ids[i, : len(text)], mask[i, : len(text)] = torch.tensor(text), True
        if kinds is not None:
            kinds[i, : len(text)] = torch.tensor(segments[i])

    packed, padded = model(tokens), model.forward_padded(ids, mask, kinds)
    by_text = [packed[tokens.offsets[r] : tokens.offsets[r + 1]] for r in tokens.rows]
    torch.testing.assert_close(torch.cat(by_text), padded[mask], **EXACT)
    pooled, oracle = model.pool(packed, tokens), model.pool_padded(padded, mask)
    torch.testing.assert_close(pooled, oracle, **EXACT)

    weight = torch.randn_like(pooled)
    # The hidden states contribute too: with cls pooling alone, the last layer has gradients of one query a text.
    spread = torch.randn_like(padded)
    spread_packed = torch.cat([spread[i, : len(texts[i])] for i in tokens.rows.argsort()])
    got = gradients(model, (pooled * weight).sum() + (packed * spread_packed).sum())
    want = gradients(model, (oracle * weight).sum() + (padded * spread)[mask].sum())
    for name in want:
        assert want[name].abs().max() > 1e-9, name
        torch.testing.assert_close(got[name], want[name], **EXACT, msg=lambda m, name=name: f"{name}: {m}")

    shifted = model.forward_padded(ids.roll(1, 0), mask.roll(1, 0), kinds)  # control: other texts
    assert (shifted[mask.roll(1, 0)] - padded[mask]).abs().max() > 1e-2


def test_padded_restores_the_texts():
    texts, segments = draw(ragged(), types=2)
    ids, mask, kinds = Tokens.pack(texts, segments).padded()
    assert [row[keep].tolist() for row, keep in zip(ids, mask)] == texts
    assert [row[keep].tolist() for row, keep in zip(kinds, mask)] == segments
    assert not ids[~mask].any()
    assert not kinds[~mask].any()


@pytest.mark.parametrize("texts", [[], [[3, 4], []]])
def test_texts_without_tokens_are_refused(texts):
    with pytest.raises(ValueError, match=r"no texts|\[1\]"):
        Tokens.pack(texts)


@pytest.mark.parametrize("pool", ["cls", "mean", "last"])
def test_pooled_vectors_are_in_the_callers_order(pool):
    model = build(pool=pool)
    texts, _ = draw(ragged())
    tokens = Tokens.pack(texts)
    hidden = torch.randn(len(tokens.ids), WIDTH, dtype=torch.float64)
    for i, vector in enumerate(model.pool(hidden, tokens)):
        row = int(tokens.rows[i])
        assert tokens.ids[tokens.offsets[row] : tokens.offsets[row + 1]].tolist() == texts[i]
        own = hidden[tokens.offsets[row] : tokens.offsets[row + 1]]
        want = {"cls": own[0], "last": own[-1], "mean": own.mean(0)}[pool]
        torch.testing.assert_close(vector, want, **EXACT)


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_an_embedding_does_not_depend_on_the_batch(pool):
    model = build(pool=pool, norm="pre", types=2)
    texts, segments = draw(ragged(), types=2)

    def embed(picks):
        tokens = Tokens.pack([texts[i] for i in picks], [segments[i] for i in picks])
        return model.pool(model(tokens), tokens)

    together = embed(range(len(texts)))
    order = torch.randperm(len(texts))
    torch.testing.assert_close(embed(order.tolist()), together[order], **EXACT)
    torch.testing.assert_close(torch.cat([embed([i]) for i in range(len(texts))]), together, **EXACT)
    assert torch.pdist(together).min() > 1e-3  # control: different texts differ


def test_nan_in_the_padding_embedding_changes_nothing():
    model = build(pool="mean")
    tokens = Tokens.pack(draw(ragged())[0])
    ids, mask, _ = tokens.padded()
    assert not mask.all()
    packed, padded = model(tokens), model.forward_padded(ids, mask)
    pooled = model.pool_padded(padded, mask)
    with torch.no_grad():
        model.embeddings.token_embeddings.weight[0] = torch.nan
    torch.testing.assert_close(model(tokens), packed, rtol=0, atol=0)
    torch.testing.assert_close(model.forward_padded(ids, mask)[mask], padded[mask], rtol=0, atol=0)
    torch.testing.assert_close(model.pool_padded(model.forward_padded(ids, mask), mask), pooled, rtol=0, atol=0)
    with torch.no_grad():  # control: an embedding that is used
        model.embeddings.token_embeddings.weight[tokens.ids[0]] = torch.nan
    assert model(tokens).isnan().any()


# FLOPs


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_flops_are_those_of_the_real_tokens(norm):
    layers, lengths = 2, ragged()
    model = build(norm=norm, layers=layers, pool="mean", types=2)
    tokens = Tokens.pack(*draw(lengths, types=2))

    linears = layers * 2 * sum(lengths) * (4 * WIDTH**2 + 2 * WIDTH * MLP)
    pairs = layers * WIDTH * sum(n**2 for n in lengths)
    with FlopCounterMode(display=False) as forward:
        hidden = model(tokens)
    assert forward.get_total_flops() == pytest.approx(linears + 4 * pairs, rel=0.002)
    with FlopCounterMode(display=False) as both:
        hidden = model(tokens)
        model.pool(hidden, tokens).sum().backward()
    assert both.get_total_flops() == pytest.approx(3 * linears + (4 + 10) * pairs, rel=0.002)

    with FlopCounterMode(display=False) as padded:  # control: the padded path computes the padding too
        model.forward_padded(*tokens.padded())
    assert padded.get_total_flops() > 1.1 * forward.get_total_flops()


def test_flop_formula_equals_sdpa_on_each_text():
    lengths = ragged()
    q, k, v = heads(lengths)
    with FlopCounterMode(display=False) as packed:
        out = grouped_attention(q, k, v, offsets_of(lengths))
        once = packed.get_total_flops()
        out.sum().backward()
    with FlopCounterMode(display=False) as alone:
        texts = zip(*(x[None].transpose(1, 2).split(lengths, dim=2) for x in (q, k, v)))  # (1, H, T, Dh) each
        outs = [F.scaled_dot_product_attention(*text) for text in texts]
        reference = alone.get_total_flops()
        sum(out.sum() for out in outs).backward()
    assert reference > 0
    assert once == reference
    assert packed.get_total_flops() == alone.get_total_flops()


# Attention

MASKS = [(False, None), (True, None), (False, 0), (False, 3), (True, 2), (False, CONTEXT - 1)]  # causal, window


@pytest.mark.parametrize("order", ["ascending", "descending", "mixed"])
@pytest.mark.parametrize("kind", ["grouped", "padded", "ragged"])
@pytest.mark.parametrize(("causal", "window"), MASKS)
def test_attention_equals_its_formula(kind, order, causal, window):
    lengths = ragged()
    lengths = lengths if order == "mixed" else sorted(lengths, reverse=order == "descending")
    offsets = offsets_of(lengths)
    # Views into one matrix, as in the encoder.
    qkv = torch.randn(sum(lengths), 3, HEADS, 8, dtype=torch.float64, requires_grad=True)
    q, k, v = qkv.unbind(1)
    attend = {
        "grouped": lambda: grouped_attention(q, k, v, offsets, causal, window),
        "padded": lambda: padded_attention(q, k, v, offsets, max(lengths), causal, window),
        "ragged": lambda: ragged_attention(q, k, v, offsets, max(lengths), causal=causal, window=window),
    }[kind]
    out, want = attend(), per_text(q, k, v, offsets, causal, window)
    torch.testing.assert_close(out, want, **EXACT)
    weight = torch.randn_like(out)
    (grad,), (grad_want,) = (torch.autograd.grad((x * weight).sum(), qkv) for x in (out, want))
    torch.testing.assert_close(grad, grad_want, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_in_lower_precision(dtype):
    """Forward and backward are about as near to float64 as SDPA on each text, or nearer."""
    lengths = ragged()
    offsets = offsets_of(lengths)
    q, k, v = heads(lengths, dtype=dtype)
    weight = torch.randn_like(q)

    def sdpa(q, k, v, offsets):
        texts = zip(*(x.transpose(0, 1).split(offsets.diff().tolist(), dim=1) for x in (q, k, v)))  # (H, T, Dh) each
        outs = [F.scaled_dot_product_attention(*(x[None] for x in text))[0] for text in texts]
        return torch.cat(outs, dim=1).transpose(0, 1)

    def output_and_grads(attend, dtype):
        inputs = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
        out = attend(*inputs, offsets)
        return [x.double() for x in (out, *torch.autograd.grad((out * weight.to(dtype)).sum(), inputs))]

    exact = output_and_grads(per_text, torch.float64)
    pairs = zip(output_and_grads(grouped_attention, dtype), output_and_grads(sdpa, dtype), exact, strict=True)
    for got, plain, want in pairs:
        # The ratio is 0.6 to 1.0. With sums in bf16 instead of fp32 it would be 1.4 to 1.9.
        assert (got - want).norm() <= 1.2 * (plain - want).norm()


@pytest.mark.parametrize("mask", [(False, None), (True, None), (False, 1)])
def test_gradcheck(mask):
    lengths = [1, 3, 3, 2]
    offsets = offsets_of(lengths)
    assert torch.autograd.gradcheck(lambda *qkv: grouped_attention(*qkv, offsets, *mask), heads(lengths, width=2))


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # opcheck's own
@pytest.mark.parametrize("contiguous", [True, False])
def test_opcheck(contiguous):
    lengths = [2, 3, 3, 1]
    q, k, v = heads(lengths, width=4)
    if not contiguous:
        q, k, v = (x.detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_() for x in (q, k, v))
    for mask in ((), (True, 1)):
        torch.library.opcheck(grouped_attention, (q, k, v, offsets_of(lengths), *mask))
        plain = [x.detach() for x in (torch.randn_like(q), q, k, v)]
        torch.library.opcheck(grouped_attention_backward, (*plain, offsets_of(lengths), *mask))


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("mask", [{}, {"causal": True}, {"window": 5}])
def test_varlen_attention_equals_padded_fp32(mask):
    lengths = [*ragged(), 77, 63]
    offsets = offsets_of(lengths).cuda()
    single = heads(lengths, width=64, dtype=torch.float32, device="cuda")
    with torch.no_grad():
        for x in single:
            x.copy_(x.bfloat16())  # Both start from the same numbers.
    half = [x.detach().bfloat16().requires_grad_() for x in single]
    weight = torch.randn_like(single[0]).bfloat16()

    want = padded_attention(*single, offsets, max(lengths), **mask)
    got = ragged_attention(*half, offsets, max(lengths), **mask)
    assert got.dtype == torch.bfloat16
    wants = (want, *torch.autograd.grad((want * weight.float()).sum(), single))
    gots = (got, *torch.autograd.grad((got * weight).sum(), half))
    for a, b in zip(gots, wants, strict=True):
        assert (a.float() - b).norm() / b.norm() < 1e-2  # bf16 has 8 bits: half a step is 2e-3
        torch.testing.assert_close(a.float(), b, rtol=2e-2, atol=2e-2 * b.abs().max().item())


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_encoder_on_cuda(pool):
    """fp32 (padded) and bf16 autocast (varlen) on the device equal float64 on the CPU."""
    model = build(pool=pool, types=2)
    tokens = Tokens.pack(*draw(ragged(), types=2))
    want = model.pool(model(tokens), tokens)
    weight = torch.randn_like(want)
    want_grads = gradients(model, (want * weight).sum())
    model, tokens, weight = model.float().cuda(), tokens.to("cuda"), weight.float().cuda()
    for enabled, tolerance in ((False, 1e-4), (True, 5e-2)):
        with torch.autocast("cuda", torch.bfloat16, enabled=enabled):
            out = model.pool(model(tokens), tokens)
        assert (out.double().cpu() - want).norm() / want.norm() < tolerance
        got = gradients(model, (out * weight).sum())
        for name, grad in want_grads.items():
            assert (got[name].double().cpu() - grad).norm() <= tolerance * grad.norm() + 1e-6, name


# torch.compile and gradient checkpointing


@pytest.mark.long
@pytest.mark.parametrize(
    "changes",
    [
        {"pool": "cls", "layers": 1},
        {"pool": "mean", "layers": 1},
        pytest.param({**FAMILIES["modern"], "layers": 2}, marks=pytest.mark.slow),
    ],
)
def test_compiles_to_one_graph(changes):
    torch._dynamo.reset()
    model = build(types=2, **changes)

    def embed(tokens):
        return model.pool(model(tokens), tokens)

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(embed, fullgraph=True, dynamic=True, backend=counter)
    compilations = []
    for lengths in (ragged(), ragged()[:5], [3, 7, 4, 4]):  # different counts, longest texts and groups
        tokens = Tokens.pack(*draw(lengths, types=2))
        want, got = embed(tokens), compiled(tokens)
        torch.testing.assert_close(got, want, **EXACT)
        weight = torch.randn_like(want)
        want_grads, got_grads = (gradients(model, (x * weight).sum()) for x in (want, got))
        for name in want_grads:
            torch.testing.assert_close(got_grads[name], want_grads[name], **EXACT)
        compilations.append(counter.frame_count)
    assert compilations[0] > 0
    assert compilations[-1] == compilations[0]  # Later batches reuse the graph of the first.
    explained = torch._dynamo.explain(embed)(tokens)
    assert (explained.graph_count, explained.graph_break_count) == (1, 0), explained.break_reasons
    torch._dynamo.reset()


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_gradient_checkpointing_is_bit_equal(norm, seed):
    model = build(torch.float32, norm=norm, dropout=0.2)
    tokens = Tokens.pack(draw(ragged())[0])

    def step(checkpointing):
        model.grad_checkpointing = checkpointing
        torch.manual_seed(seed)  # the same dropout
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
            out = model.pool(model(tokens), tokens)
        return out, gradients(model, out.square().sum()), sum(kept)

    plain, plain_grads, plain_kept = step(False)
    out, grads, kept = step(True)
    assert torch.equal(out, plain)
    for name in plain_grads:
        assert torch.equal(grads[name], plain_grads[name]), name
    assert kept < plain_kept / 2  # control


# Other implementations


def from_bert(bert):
    """Rename the tensors of transformers' BERT (parameters, or their gradients) as in `TextEncoder`."""
    ours = {f"embeddings.norm.{k}": bert[f"embeddings.LayerNorm.{k}"] for k in ("weight", "bias")}
    for name, theirs in {
        "token_embeddings": "word",
        "position_embeddings": "position",
        "segment_embeddings": "token_type",
    }.items():
        ours[f"embeddings.{name}.weight"] = bert[f"embeddings.{theirs}_embeddings.weight"]
    renames = {
        "attention.out": "attention.output.dense",
        "attention_norm": "attention.output.LayerNorm",
        "mlp.0": "intermediate.dense",
        "mlp.2": "output.dense",
        "mlp_norm": "output.LayerNorm",
    }
    for i in range(2):
        for kind in ("weight", "bias"):
            parts = [bert[f"encoder.layer.{i}.attention.self.{x}.{kind}"] for x in ("query", "key", "value")]
            ours[f"blocks.{i}.attention.qkv.{kind}"] = torch.cat(parts)
            for name, theirs in renames.items():
                ours[f"blocks.{i}.{name}.{kind}"] = bert[f"encoder.layer.{i}.{theirs}.{kind}"]
    return ours


@pytest.mark.parametrize(
    ("activation", "theirs"), [("gelu", "gelu"), ("gelu_tanh", "gelu_pytorch_tanh"), ("relu", "relu")]
)
def test_equals_bert_of_transformers(activation, theirs):
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        intermediate_size=MLP,
        max_position_embeddings=CONTEXT + 1,  # one more than the texts need, for the control
        type_vocab_size=2,
        hidden_act=theirs,
        attn_implementation="eager",
    )
    bert = perturb(BertModel(config, add_pooling_layer=False).double().eval())
    model = build(types=2, context_length=CONTEXT + 1, activation=activation, norm_eps=config.layer_norm_eps)
    model.load_state_dict(from_bert(dict(bert.named_parameters())))

    texts, segments = draw(ragged(), types=2)
    tokens = Tokens.pack(texts, segments)
    ids, mask, kinds = tokens.padded()
    want = bert(input_ids=ids, attention_mask=mask.long(), token_type_ids=kinds).last_hidden_state
    hidden = model(tokens)
    got = torch.cat([hidden[tokens.offsets[r] : tokens.offsets[r + 1]] for r in tokens.rows])
    torch.testing.assert_close(got, want[mask], **EXACT)

    weight = torch.randn_like(got)
    grads = gradients(model, (got * weight).sum())
    for name, grad in from_bert(gradients(bert, (want[mask] * weight).sum())).items():
        torch.testing.assert_close(grads[name], grad, **EXACT, msg=lambda m, name=name: f"{name}: {m}")

    positions = torch.arange(ids.shape[1]) + 1  # control: positions off by one
    other = bert(input_ids=ids, attention_mask=mask.long(), token_type_ids=kinds, position_ids=positions[None])
    assert (other.last_hidden_state[mask] - got).abs().max() > 1e-2


@pytest.mark.parametrize("norm", ["post", "pre"])
def test_equals_transformer_encoder_of_torch(norm):
    model = build(norm=norm)
    layer = torch.nn.TransformerEncoderLayer(
        WIDTH, HEADS, MLP, 0.0, F.gelu, layer_norm_eps=1e-5, batch_first=True, norm_first=norm == "pre"
    )
    last = torch.nn.LayerNorm(WIDTH) if norm == "pre" else None
    peer = torch.nn.TransformerEncoder(layer, 2, last, enable_nested_tensor=False).double()
    renames = {
        "attention.qkv.": "self_attn.in_proj_",
        "attention.out.": "self_attn.out_proj.",
        "attention_norm.": "norm1.",
        "mlp.0.": "linear1.",
        "mlp.2.": "linear2.",
        "mlp_norm.": "norm2.",
        "blocks.": "layers.",
    }
    state = {}
    for name, value in model.state_dict().items():
        for ours, theirs in renames.items():
            name = name.replace(ours, theirs)
        if not name.startswith("embeddings"):
            state[name] = value
    peer.load_state_dict(state)

    tokens = Tokens.pack(draw(ragged())[0])
    ids, mask, _ = tokens.padded()
    x = model.embeddings.token_embeddings.weight[ids] + model.embeddings.position_embeddings.weight[: ids.shape[1]]
    if norm == "post":
        x = F.layer_norm(x, (WIDTH,), model.embeddings.norm.weight, model.embeddings.norm.bias, 1e-5)
    want = peer(x, src_key_padding_mask=~mask)[mask]
    hidden = model(tokens)
    got = torch.cat([hidden[tokens.offsets[r] : tokens.offsets[r + 1]] for r in tokens.rows])
    torch.testing.assert_close(got, want, **EXACT)
    assert (peer(x)[mask] - got).abs().max() > 1e-3  # control: with attention to the padding


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"width": 30, "heads": 4}, r"text\.width 30 .* text\.heads 4"),
        ({"width": 12, "heads": 4, "positions": "rotary"}, "must be even for rotary"),
        ({"pool": "first"}, r"text\.pool 'first' is not one of cls, mean, last"),
        ({"groups": 13}, r"text\.groups 13 must lie between 1 and text\.layers 12"),
        ({"group_size": 2}, r"text\.group_size 2 must be 1"),
        ({"pad_to": 78}, r"text\.pad_to 78 .* context_length 77"),
        ({"window": -1}, r"text\.window"),
    ],
)
def test_wrong_configs_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        TextConfig(**wrong)


# Differences of the families


def test_rotary_positions_are_rotations_of_complex_numbers():
    x = torch.randn(7, HEADS, 8, dtype=torch.float64)
    positions = torch.randint(0, 50, (7,))
    pairs = torch.complex(x[..., :4], x[..., 4:])  # feature i with i + 4
    angles = positions[:, None].double() * 10.0 ** -(torch.arange(4) / 4).double()
    product = pairs * torch.polar(torch.ones_like(angles), angles)[:, None]
    got = rotate(x, rotary_angles(positions, 10.0, 8))
    torch.testing.assert_close(got, torch.cat([product.real, product.imag], -1), rtol=1e-4, atol=1e-5)
    # The score of two tokens depends only on their distance.
    q, k = torch.randn(2, 1, HEADS, 8, dtype=torch.float64)
    rotations = [[rotary_angles(torch.tensor([at]), 10.0, 8) for at in (a, a + 3)] for a in (0, 9)]
    first, later = ((rotate(q, one) * rotate(k, other)).sum(-1) for one, other in rotations)
    torch.testing.assert_close(first, later, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("local_theta", "thetas"), [(None, 1), (5.0, 2)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_angles_are_computed_once_a_forward(local_theta, thetas, checkpointing):
    """Neither each layer nor the recomputation in the backward pass computes them again."""
    model = build(layers=6, positions="rotary", window=4, global_every=3, local_theta=local_theta)
    model.grad_checkpointing = checkpointing
    tokens = Tokens.pack(draw(ragged())[0])
    with Operations() as seen:
        model.pool(model(tokens), tokens).sum().backward()
    assert seen.count("aten.cos.default") == seen.count("aten.sin.default") == thetas
    with Operations() as seen:
        model.forward_padded(*tokens.padded())
    assert seen.count("aten.cos.default") == thetas


def test_shared_layers_equal_copies_of_the_blocks():
    """ALBERT's groups equal an encoder with copies of their blocks."""
    settings = {"layers": 5, "embed_width": 10}
    model = build(groups=2, group_size=2, **settings)
    plain = build(layers=10, embed_width=10)
    schedule = [0, 1, 0, 1, 0, 1, 2, 3, 2, 3]  # layers 0 to 2 are the first group
    state = {name: x for name, x in model.state_dict().items() if not name.startswith("blocks")}
    for i, number in enumerate(schedule):
        state |= {f"blocks.{i}.{name}": x for name, x in model.blocks[number].state_dict().items()}
    plain.load_state_dict(state)
    tokens = Tokens.pack(draw(ragged())[0])
    torch.testing.assert_close(model(tokens), plain(tokens), **EXACT)
    assert len(model.blocks) == 4
    assert model.layers == 10


@pytest.mark.parametrize(
    ("name", "change"), [("window", 6), ("theta", 49.0), ("local_theta", 8.0), ("global_every", 3)]
)
def test_each_setting_of_windows_and_angles_has_an_effect(name, change):
    model = build(**FAMILIES["modern"])
    other = TextEncoder(replace(model.config, **{name: change + 2 if name == "window" else change})).double()
    other.load_state_dict(model.state_dict())
    tokens = Tokens.pack([draw([CONTEXT])[0][0]])
    assert (model(tokens) - other(tokens)).abs().max() > 1e-4


def test_a_single_segment_embedding_serves_all_segments():
    model = build(types=1)
    texts, segments = draw(ragged(), types=2)
    torch.testing.assert_close(model(Tokens.pack(texts, segments)), model(Tokens.pack(texts)), rtol=0, atol=0)


def test_a_text_longer_than_the_learned_positions_is_refused():
    text = draw([CONTEXT])[0][0] + [1]
    tokens = Tokens.pack([text])
    model = build()
    for run in (lambda: model(tokens), lambda: model.forward_padded(*tokens.padded())):
        with pytest.raises(ValueError, match=r"17 tokens.* 16 positions"):
            run()
    assert build(positions="rotary")(tokens).isfinite().all()  # Rotary positions are not limited.


def test_a_causal_encoder_does_not_depend_on_later_tokens():
    model = build(**FAMILIES["causal"])
    text = draw([CONTEXT])[0][0]
    whole, part = model(Tokens.pack([text])), model(Tokens.pack([text[:6]]))
    torch.testing.assert_close(whole[:6], part, **EXACT)
    bidirectional = build(norm="pre")
    whole, part = bidirectional(Tokens.pack([text])), bidirectional(Tokens.pack([text[:6]]))
    assert (whole[:6] - part).abs().max() > 1e-3  # control
