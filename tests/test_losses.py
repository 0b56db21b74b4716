import pytest
import torch
import torch.nn.functional as F
from ranks import in_ranks
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import dualenc.losses as losses
from dualenc.losses import clip_loss, siglip_loss
from tools.bench.precision import EXACT, KINDS, embeddings, error

BATCH, DIM, FEATURES = 12, 8, 6
LOSSES = {"clip": clip_loss, "siglip": siglip_loss}


def reference(name):
    from open_clip.loss import ClipLoss, SigLipLoss

    return {"clip": ClipLoss, "siglip": SigLipLoss}[name]()


def inputs(dtype=torch.float64, count=BATCH):
    image, text = (F.normalize(torch.randn(count, DIM, dtype=dtype), dim=1) for _ in range(2))
    scale, bias = 5 + 10 * torch.rand(1, dtype=dtype), -5 * torch.rand(1, dtype=dtype)
    return [x.requires_grad_() for x in (image, text, scale, bias)]


def evaluate(loss, arguments, autocast=False):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):  # only the forward pass, as torch recommends
        value = loss(*arguments)
    return [value.detach(), *torch.autograd.grad(value, arguments, materialize_grads=True)]


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("name", LOSSES)
def test_equals_open_clip(name, shape):
    image, text, scale, bias = inputs()
    arguments = [image, text, *(x.detach().reshape(shape).requires_grad_() for x in (scale, bias))]
    got, want = evaluate(LOSSES[name], arguments), evaluate(reference(name), arguments)
    assert got[0].shape == ()
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)
    assert abs(evaluate(LOSSES[name], [image, text.roll(1, 0), *arguments[2:]])[0] - want[0]) > 1e-4  # control


@pytest.mark.parametrize("name", LOSSES)
def test_single_precision(name):
    arguments = inputs(torch.float32, count=64)
    exact = [x.detach().double().requires_grad_() for x in arguments]
    for x, y in zip(evaluate(LOSSES[name], arguments), evaluate(reference(name), exact), strict=True):
        assert x.dtype == torch.float32
        # The softmax does not depend on the bias: its gradient is only rounding error, about 0.
        assert (x.double() - y).norm() <= 1e-5 * y.norm() + 1e-6


@pytest.mark.parametrize("name", LOSSES)
def test_autocast_changes_nothing(name):
    arguments = inputs(torch.float32)
    want = evaluate(LOSSES[name], arguments)
    got = evaluate(LOSSES[name], arguments, autocast=True)
    plain = evaluate(reference(name), arguments, autocast=True)
    assert all(map(torch.equal, got, want))
    assert not any(map(torch.equal, plain[:3], want[:3]))  # control: autocast is active


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_embeddings_are_promoted(name):
    image, text, scale, bias = inputs(torch.float32)
    half = [x.detach().bfloat16() for x in (image, text)]
    got = LOSSES[name](*half, scale, bias)
    assert got.dtype == torch.float32
    assert torch.equal(got, LOSSES[name](*(x.float() for x in half), scale, bias))


def test_clip_loss_ignores_the_bias():
    image, text, scale, bias = inputs()
    assert torch.equal(clip_loss(image, text, scale, bias), clip_loss(image, text, scale))


def test_siglip_needs_a_bias():
    image, text, scale, _ = inputs()
    with pytest.raises(ValueError, match="logit_bias"):
        siglip_loss(image, text, scale)


def dense(name, image, text, scale, bias, ids=None, duplicates="ignore"):
    """Compute the loss by its definition, with all scores in one matrix."""
    logits = scale * image @ text.T
    own = torch.eye(len(image), dtype=torch.bool)
    shared = own if ids is None else (ids[:, None] == ids[None]).any(-1)
    target = shared if duplicates == "positive" else own
    masked = shared & ~own if duplicates == "mask" else torch.zeros_like(own)
    if name == "siglip":
        return -F.logsigmoid((2 * target.double() - 1) * (logits + bias))[~masked].sum() / len(image)
    logits = logits.masked_fill(masked, -torch.inf)
    target = target.double()
    rows = -((target / target.sum(1, keepdim=True)) * logits.log_softmax(1).masked_fill(masked, 0)).sum()
    columns = -((target / target.sum(0)) * logits.log_softmax(0).masked_fill(masked, 0)).sum()
    return (rows + columns) / (2 * len(image))


def draw_ids(count):
    """Draw ids of which some are equal: of images, of texts, and of both."""
    ids = torch.randint(-(2**62), 2**62, (count, 2))
    for column in (0, 1):
        chosen = torch.randperm(count)[: max(2, count // 3)]
        ids[chosen, column] = ids[chosen[torch.randint(len(chosen), (len(chosen),))], column]
    ids[1] = ids[0]
    return ids


def close(got, want):
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


@pytest.fixture
def small_blocks(monkeypatch):
    """Lower the number of scores in a block, so that small batches have several blocks, the last one smaller."""
    monkeypatch.setattr(losses, "CPU_SCORES", 5 * 33 + 1)


@pytest.mark.parametrize("count", [1, 2, 5, 32, 33])
@pytest.mark.parametrize("duplicates", ["ignore", "mask", "positive"])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.usefixtures("small_blocks")
def test_equals_the_dense_matrix(name, duplicates, count):
    arguments, ids = inputs(count=count), draw_ids(max(count, 2))[:count]
    got = evaluate(lambda *x: LOSSES[name](*x, ids=ids, duplicates=duplicates), arguments)
    want = evaluate(lambda *x: dense(name, *x, ids, duplicates), arguments)
    close(got, want)
    with torch.no_grad():
        close([LOSSES[name](*arguments, ids=ids, duplicates=duplicates)], want[:1])
        if count > 5:  # controls: another treatment of duplicates, another order
            other = "mask" if duplicates == "positive" else "positive"
            assert abs(LOSSES[name](*arguments, ids=ids, duplicates=other) - want[0]) > 1e-6
            image, text, scale, bias = arguments
            rolled = LOSSES[name](image, text.roll(1, 0), scale, bias, ids=ids, duplicates=duplicates)
            assert abs(rolled - want[0]) > 1e-6


@pytest.mark.parametrize("name", LOSSES)
def test_all_pairs_are_duplicates(name):
    """With "mask" no negatives remain."""
    arguments, ids = inputs(), torch.zeros(BATCH, 2, dtype=torch.int64)
    for duplicates in ("mask", "positive"):
        got = evaluate(lambda *x, how=duplicates: LOSSES[name](*x, ids=ids, duplicates=how), arguments)
        close(got, evaluate(lambda *x, how=duplicates: dense(name, *x, ids, how), arguments))
    if name == "clip":
        assert clip_loss(*arguments, ids=ids, duplicates="mask") == 0


@pytest.mark.long
@pytest.mark.parametrize("duplicates", ["ignore", "mask", "positive"])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.usefixtures("small_blocks")
def test_gradients_equal_finite_differences(name, duplicates):
    """The batch has several blocks. The inputs are not of unit length, since the losses do not depend on it."""
    ids = draw_ids(40)
    arguments = [
        (0.3 * torch.randn(shape, dtype=torch.float64)).requires_grad_() for shape in ((40, 3), (40, 3), (1,), ())
    ]
    assert torch.autograd.gradcheck(lambda *x: LOSSES[name](*x, ids=ids, duplicates=duplicates), arguments)


def test_wrong_use_of_duplicates():
    arguments = inputs()
    with pytest.raises(ValueError, match="'masked' is not one of ignore, mask, positive"):
        clip_loss(*arguments, ids=draw_ids(BATCH), duplicates="masked")
    with pytest.raises(ValueError, match="needs the ids"):
        siglip_loss(*arguments, duplicates="mask")


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_at_the_largest_scale(name, kind):
    """fp32 gradients at scale 100 are near float64. For "told apart" log softmax loses all digits. The remaining error
    is the rounding of the scores, which differ little for near duplicates, however the loss is computed."""
    inputs = [*embeddings(kind, 1024, 512), torch.tensor([100.0]), torch.tensor([-10.0])]
    limit = {"unrelated": 1e-5, "told apart": 2e-5, "near duplicates": 1e-4}[kind]
    assert error(LOSSES[name], EXACT[name], inputs) < limit
    if kind == "told apart" and name == "clip":
        assert error(reference(name), EXACT[name], inputs) > 100 * limit


class Largest(TorchDispatchMode):
    """A mode that measures the largest output of any operation, in elements."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            self.elements = max(self.elements, x.numel() if isinstance(x, torch.Tensor) else 0)
        return out


@pytest.mark.long
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("duplicates", ["ignore", "mask", "positive"])
@pytest.mark.parametrize("name", LOSSES)
def test_no_tensor_holds_all_scores(name, duplicates, gradients):
    count = 6000
    arguments, ids = inputs(torch.float32, count), draw_ids(count)

    def largest(loss):
        with torch.set_grad_enabled(gradients), Largest() as seen:
            value = loss(*arguments)
            if gradients:
                value.backward()
        return seen.elements

    assert largest(lambda *x: LOSSES[name](*x, ids=ids, duplicates=duplicates)) <= count * count / 8
    if duplicates == "ignore":
        assert largest(reference(name)) == count * count  # control


class Products(TorchDispatchMode):
    """A mode that counts the products of matrices."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += "mm" in func.__name__
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("duplicates", ["ignore", "mask", "positive"])
@pytest.mark.parametrize(("scores", "blocks"), [(32 * 41, 1), (32 * 41 - 1, 2), (8 * 41, 4)])
def test_scores_of_one_block_are_computed_once(monkeypatch, duplicates, scores, blocks):
    """They are kept for the backward pass, which may run again; those of several blocks are not kept."""
    monkeypatch.setattr(losses, "CPU_SCORES", scores)
    (image, text, scale, _), ids = inputs(count=32), draw_ids(32)
    negatives, own = draw_negatives(32, 9, ids)
    leaves, kept = [image, text, scale, negatives], []
    more = {"ids": ids, "duplicates": duplicates, "negatives": negatives, "negative_ids": own}
    with Products() as products, torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        loss = clip_loss(image, text, scale, **more)
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert products.count == (3 if blocks == 1 else 4 * blocks)
    assert (max(x.untyped_storage().nbytes() for x in kept) == 8 * 32 * 41) == (blocks == 1)
    assert all(map(torch.equal, torch.autograd.grad(loss, leaves), first))
    close([loss, *first], evaluate(lambda *x: loop(*x, ids, own, duplicates), leaves))


@pytest.mark.parametrize("name", LOSSES)
def test_any_dtype_of_the_scale_and_any_layout(name):
    image, text, scale, bias = inputs(torch.float32)
    want = evaluate(LOSSES[name], [image, text, scale, bias])
    transposed = [x.detach().T.contiguous().T.requires_grad_() for x in (image, text)]
    double = [x.detach().double().requires_grad_() for x in (scale, bias)]
    for x, y in zip(evaluate(LOSSES[name], [*transposed, *double]), want, strict=True):
        torch.testing.assert_close(x.float(), y, rtol=1e-5, atol=1e-6)


class Towers(nn.Module):
    """Two small towers, with the scale and an optional bias as parameters."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.image = nn.Sequential(nn.Linear(FEATURES, 10), nn.GELU(), nn.Linear(10, DIM))
        self.text = nn.Linear(FEATURES, DIM)
        self.scale = nn.Parameter(torch.tensor([7.0]))
        self.bias = nn.Parameter(torch.tensor([-3.0])) if bias else None

    def forward(self, x, y):
        # Views, as from a model: DDP must find these parameters used in the forward pass.
        bias = None if self.bias is None else self.bias.view(1)
        return F.normalize(self.image(x), dim=1), F.normalize(self.text(y), dim=1), self.scale.view(1), bias


CASES = [(name, how) for name in LOSSES for how in ("ignore", "mask", "positive")]


def losses_of_rank(folder, rank, world):
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    losses.CPU_SCORES = 5 * 96  # several blocks for each rank
    largest = 0
    saved, results = torch.load(folder / "inputs.pt", weights_only=True), {}
    x, y, ids = (saved[key].chunk(world)[rank] for key in ("x", "y", "ids"))
    for name, duplicates in CASES:
        for grouped in (True, False):
            model = Towers(name == "siglip").double()
            model.load_state_dict(saved[name])
            model = DistributedDataParallel(model)
            group = dist.group.WORLD if grouped else None
            with Largest() as seen:
                value = LOSSES[name](*model(x, y), group=group, ids=ids, duplicates=duplicates)
                value.backward()
            largest = max(largest, seen.elements)
            grads = {key: parameter.grad for key, parameter in model.module.named_parameters()}
            results[f"{name} {duplicates} {'grouped' if grouped else 'alone'}"] = {"loss": value.detach(), **grads}
    return {"largest": largest, **results}


@pytest.mark.long
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_split_batch_equals_whole_batch(world, tmp_path):
    count = 96  # 48 or 24 on each rank, where the last block is smaller
    x, y = torch.randn(2, count, FEATURES, dtype=torch.float64)
    models, ids = {name: Towers(name == "siglip").double() for name in LOSSES}, draw_ids(count)
    with torch.no_grad():
        for model in models.values():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    states = {name: model.state_dict() for name, model in models.items()}
    torch.save({"x": x, "y": y, "ids": ids, **states}, tmp_path / "inputs.pt")
    results = in_ranks(losses_of_rank, tmp_path, world)

    for name, duplicates in CASES:
        model = models[name]
        model.zero_grad()
        image, text, scale, bias = model(x, y)
        value = dense(name, image, text, scale, bias, ids, duplicates)  # one process, the whole batch
        if duplicates == "ignore":
            torch.testing.assert_close(value, reference(name)(image, text, scale, bias), rtol=1e-10, atol=1e-10)
        value.backward()
        want = {"loss": value.detach(), **{key: parameter.grad for key, parameter in model.named_parameters()}}
        assert want["scale"].abs() > 1e-6
        for result in results:
            got = result[f"{name} {duplicates} grouped"]
            assert got.keys() == want.keys()
            for key in want:
                label = f"{name} {duplicates} {key}: "
                torch.testing.assert_close(
                    got[key], want[key], rtol=1e-10, atol=1e-10, msg=lambda m, label=label: label + m
                )
            alone = result[f"{name} {duplicates} alone"]  # control: the losses of single ranks
            for key in want:
                assert (alone[key] - want[key]).abs().max() > 1e-6, f"{name} {key}"
            assert result["largest"] <= count * count / 4


def collectives_of_rank(folder, rank, world):
    import torch.distributed as dist

    seen = []

    def record(name):
        function = getattr(dist, name)

        def recorded(out, *args, **kwargs):
            seen.append([name, str(out.dtype), out.numel()])
            return function(out, *args, **kwargs)

        return recorded

    for name in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor"):
        setattr(dist, name, record(name))
    image, text, ids, scale = torch.load(folder / "inputs.pt", weights_only=True)
    leaves = [x.chunk(world)[rank].clone().requires_grad_() for x in (image, text)]
    clip_loss(*leaves, scale, group=dist.group.WORLD).backward()
    values = []
    for some in (ids, torch.zeros_like(ids)):
        more = {"ids": some.chunk(world)[rank], "duplicates": "mask"}
        values.append(clip_loss(*leaves, scale, group=dist.group.WORLD, **more).detach())
    return {"seen": seen, "masked": values}


@pytest.mark.long
def test_terms_of_the_columns_are_reduced_not_gathered(tmp_path):
    """The memory of the float64 terms does not grow with the number of ranks."""
    (image, text, scale, _), ids = inputs(torch.float32, 24), torch.arange(48).view(24, 2)
    ids[:8, 0] = -1  # All pairs of the first rank share an image: their columns have no other score on that rank.
    torch.save([x.detach() for x in (image, text, ids, scale)], tmp_path / "inputs.pt")
    found = in_ranks(collectives_of_rank, tmp_path, 3)
    double = [one for one in found[0]["seen"] if one[1] == "torch.float64"]
    assert double
    assert {name for name, _, _ in double} == {"all_reduce"}
    assert max(size for _, _, size in double) <= 4 * 24
    want = dense("clip", image.double(), text.double(), scale.double(), None, ids, "mask")
    for rank in found:
        torch.testing.assert_close(rank["masked"][0].double(), want, rtol=1e-5, atol=1e-6)
        assert rank["masked"][1] == 0  # No column has another score on any rank.


# Hard negatives


def loop(image, text, scale, negatives, ids, negative_ids, duplicates):
    """Compute the loss with negatives by its definition, one row and one column at a time."""
    count, total, treated = len(image), 0.0, duplicates != "ignore"
    ids, negative_ids = ids.tolist(), negative_ids.tolist()
    own_texts = {}
    for one, other in ids:
        own_texts.setdefault(one, set()).add(other)

    def losses(query, scores, number):
        shares = [j for j in range(count) if any(a == b for a, b in zip(ids[j], ids[number]))] if treated else [number]
        positives = shares if duplicates == "positive" else [number]
        kept = [scores[j] for j in range(count) if j in positives or j not in shares]
        return torch.logsumexp(torch.stack([*kept, *query]), 0) - sum(scores[j] for j in positives) / len(positives)

    for i in range(count):
        kept = [j for j in range(len(negatives)) if not treated or negative_ids[j] not in own_texts[ids[i][0]]]
        more = [scale.squeeze() * image[i] @ negatives[j] for j in kept]
        total = total + losses(more, [scale.squeeze() * image[i] @ other for other in text], i)
        total = total + losses([], [scale.squeeze() * other @ text[i] for other in image], i)
    return total / (2 * count)


def draw_negatives(count, number, ids):
    """Draw negatives, some of which equal a text of the batch, and others each other."""
    negatives = F.normalize(torch.randn(number, DIM, dtype=torch.float64), dim=1).requires_grad_()
    own = torch.randint(-(2**62), 2**62, (number,))
    copies = torch.rand(number) < 0.4
    own[copies] = ids[torch.randint(count, (int(copies.sum()),)), 1]
    own[number // 2 : number // 2 + 2] = own[0].clone() if number else 0
    return negatives, own


@pytest.mark.parametrize("number", [0, 1, 9])
@pytest.mark.parametrize("duplicates", ["ignore", "mask", "positive"])
@pytest.mark.usefixtures("small_blocks")
def test_negatives_equal_the_plain_computation(duplicates, number):
    count = 12
    image, text, scale, _ = inputs(count=count)
    ids = draw_ids(count)
    negatives, own = draw_negatives(count, number, ids)
    if number:
        own[0] = ids[0, 1]  # the text of the first pair
    arguments = [image, text, scale, negatives]

    def ours(image, text, scale, negatives):
        return clip_loss(image, text, scale, ids=ids, duplicates=duplicates, negatives=negatives, negative_ids=own)

    got = evaluate(ours, arguments)
    close(got, evaluate(lambda *x: loop(*x, ids, own, duplicates), arguments))
    if number:  # controls: without negatives, and with copies of texts among the negatives
        without = clip_loss(image, text, scale, ids=ids, duplicates=duplicates)
        assert (number == 1 and duplicates != "ignore") or abs(without - got[0]) > 1e-6
        other = loop(*arguments, ids, torch.arange(number), duplicates)
        assert duplicates == "ignore" or abs(other - got[0]) > 1e-8
    else:
        assert torch.equal(got[0], clip_loss(image, text, scale, ids=ids, duplicates=duplicates))


def test_negatives_need_ids_where_duplicates_are_treated():
    image, text, scale, _ = inputs()
    with pytest.raises(ValueError, match="negative_ids"):
        clip_loss(image, text, scale, ids=draw_ids(BATCH), duplicates="mask", negatives=text)


def negatives_of_rank(folder, rank, world):
    import torch.distributed as dist

    losses.CPU_SCORES = 5 * 33
    saved = torch.load(folder / "inputs.pt", weights_only=True)
    image, text, ids = (saved[key].chunk(world)[rank] for key in ("image", "text", "ids"))
    negatives, own = (saved[key].split(saved["counts"])[rank] for key in ("negatives", "own"))
    leaves = [x.clone().requires_grad_() for x in (image, text, saved["scale"], negatives)]
    value = clip_loss(
        *leaves[:3], group=dist.group.WORLD, ids=ids, duplicates="mask", negatives=leaves[3], negative_ids=own
    )
    return [value.detach(), *torch.autograd.grad(value, leaves)]


@pytest.mark.parametrize("counts", [[5, 2], [0, 7], [0, 0]])
def test_negatives_of_several_ranks_equal_one_process(counts, tmp_path):
    """The ranks have different numbers of negatives, and one of them may have none."""
    count = 12
    image, text, scale, _ = inputs(count=count)
    ids = draw_ids(count)
    negatives, own = draw_negatives(count, sum(counts), ids)
    named = {"image": image, "text": text, "scale": scale, "ids": ids, "negatives": negatives, "own": own}
    torch.save({**{k: x.detach() for k, x in named.items()}, "counts": counts}, tmp_path / "inputs.pt")
    found = in_ranks(negatives_of_rank, tmp_path, 2)
    whole = evaluate(lambda *x: loop(*x, ids, own, "mask"), [image, text, scale, negatives])
    for name, want, *parts in zip(["loss", "image", "text", "scale", "negatives"], whole, *found, strict=True):
        # DDP averages the gradients over the ranks.
        got = sum(parts) / 2 if name in ("loss", "scale") else torch.cat(parts) / 2
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")
