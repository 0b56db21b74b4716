import hashlib
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import Shake, encode, pixels, tiny_tokenizer, write_shards, write_tar
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dualenc.data import EpochPlan, Loader, PairDataset, Preprocess, ShardIndex
from dualenc.data.pairs import captions_of, only_pairs
from dualenc.data.shards.index import Sample
from dualenc.utils.errors import DataError

TOKENIZER = tiny_tokenizer()
pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),  # more workers than this machine has cores
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),  # Python >= 3.12
]
layouts = st.lists(st.integers(0, 12), min_size=1, max_size=6).filter(lambda counts: sum(counts) > 0)
seeds = st.integers(0, 2**32)


def prints(batch):
    """Return for each pair of a batch: the hash of its pixels, its token ids, its number."""
    ids, mask, _ = batch.tokens.padded()
    assert len(batch.images) == len(ids) == len(batch.rows)
    return [
        (hashlib.sha256(image.numpy().tobytes()).hexdigest(), tuple(text[real].tolist()), int(row))
        for image, text, real, row in zip(batch.images, ids, mask, batch.rows, strict=True)
    ]


def make(index, batch, *, seed=0, captions="json.captions", transform=None, dataset_seed=None, **options):
    dataset = PairDataset(
        index, captions, TOKENIZER, transform or Shake(), seed if dataset_seed is None else dataset_seed
    )
    return Loader(dataset, batch, seed=seed, window=options.pop("window", 2), **options)


def global_batches(index, batch, world, **options):
    """Return the global batches of one epoch, joined from the parts of all ranks."""
    ranks = [list(make(index, batch, world=world, rank=rank, **options)) for rank in range(world)]
    assert len({len(batches) for batches in ranks}) == 1
    return [[pair for part in parts for pair in prints(part)] for parts in zip(*ranks, strict=True)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return shards by (layout, seed), each written once."""
    made = {}

    def shards(layout, seed=0):
        key = (tuple(layout), seed)
        if key not in made:
            folder = tmp_path_factory.mktemp("shards")
            made[key] = ShardIndex.build(write_shards(folder, layout, seed, captions=3))
        return made[key]

    return shards


@st.composite
def several(draw):
    """Draw a layout and its sources: no sources, or the shards cut anywhere with a weight for each part."""
    layout = draw(layouts)
    if draw(st.booleans()):
        return layout, None
    cut = draw(st.integers(1, len(layout)))
    weights = st.sampled_from([1.0, 2.0, 0.5, 1.3])
    sources = [(cut, draw(weights)), (len(layout) - cut, draw(weights))]
    assume(length(layout, sources))
    return layout, sources


def length(layout, sources):
    (cut, one), (_, two) = sources or [(0, 1), (0, 1)]
    return round(one * sum(layout[:cut])) + round(two * sum(layout[cut:]))


@pytest.mark.long
@settings(max_examples=20, deadline=None)
@given(several(), seeds, st.integers(2, 8), st.integers(1, 4), st.integers(1, 4))
def test_global_batches_do_not_depend_on_ranks(folders, several, seed, world, each, window):
    (layout, sources), batch = several, world * each
    assume(batch <= length(layout, sources))
    index = folders(layout)
    alone = global_batches(index, batch, 1, seed=seed, window=window, sources=sources)
    assert global_batches(index, batch, world, seed=seed, window=window, sources=sources) == alone
    rows = [row for pairs in alone for *_, row in pairs]
    assert len(rows) == length(layout, sources) // batch * batch
    if sources is None:
        assert len(rows) == len(set(rows))


@pytest.mark.long
@settings(max_examples=4, deadline=None)
@given(several(), seeds, st.integers(1, 3), st.integers(1, 3), st.integers(1, 3))
def test_global_batches_do_not_depend_on_workers(folders, several, seed, world, each, workers):
    (layout, sources), batch = several, world * each
    assume(batch <= length(layout, sources))
    index = folders(layout)
    alone = global_batches(index, batch, 1, seed=seed, sources=sources)
    assert global_batches(index, batch, world, seed=seed, sources=sources, workers=workers) == alone


@pytest.mark.long
@settings(max_examples=15, deadline=None)
@given(several(), seeds, st.integers(1, 6), st.data())
def test_a_resumed_loader_gives_the_remaining_batches(folders, several, seed, batch, data):
    layout, sources = several
    batch = min(batch, length(layout, sources))
    index = folders(layout)
    whole = make(index, batch, seed=seed, sources=sources)
    epochs = [[prints(b) for b in whole] for _ in range(2)]
    done = data.draw(st.integers(0, len(whole)))
    first = make(index, batch, seed=seed, sources=sources)
    passing = iter(first)
    seen = [prints(next(passing)) for _ in range(done)]
    state = json.loads(json.dumps(first.state_dict()))  # plain values, as in a checkpoint
    second = make(index, batch, seed=seed, sources=sources)
    second.load_state_dict(state)
    assert len(second) == len(whole)  # the full epoch, whatever the state
    rest = [prints(b) for b in second] if done < len(whole) else []
    assert seen + rest == epochs[0]
    assert [prints(b) for b in second] == epochs[1]
    if len(set(map(str, epochs[0]))) > 2 and 0 < done < len(
        whole
    ):  # the control: one step further, the remaining batches differ
        wrong = make(index, batch, seed=seed, sources=sources)
        wrong.load_state_dict({**state, "batch": done - 1})
        assert seen + [prints(b) for b in wrong] != epochs[0]


def test_resume_with_workers_reading_ahead(folders, seed):
    index = folders([9, 8, 7])
    whole = [prints(b) for b in make(index, 4, seed=seed)]
    first = make(index, 4, seed=seed, workers=2)
    passing = iter(first)
    seen = [prints(next(passing)) for _ in range(2)]
    second = make(index, 4, seed=seed, workers=1)
    second.load_state_dict(first.state_dict())
    del passing
    assert first.state_dict()["batch"] == 2
    assert seen + [prints(b) for b in second] == whole


def test_other_seeds_differ(folders, seed):
    """This is the control of the equalities above."""
    index = folders([12, 12, 5])
    base = global_batches(index, 4, 1, seed=seed)
    other = global_batches(index, 4, 1, seed=seed + 1)
    assert [r for b in base for *_, r in b] != [r for b in other for *_, r in b]
    same_order = global_batches(index, 4, 1, seed=seed, dataset_seed=seed + 1)
    assert [r for b in base for *_, r in b] == [r for b in same_order for *_, r in b]
    assert [pixel for b in base for pixel, *_ in b] != [pixel for b in same_order for pixel, *_ in b]
    assert [text for b in base for _, text, _ in b] != [text for b in same_order for _, text, _ in b]


def test_augmentation_changes_with_the_epoch(folders, seed):
    loader = make(folders([12]), 1, seed=seed)
    epochs = [{row: pixel for b in loader for pixel, _, row in prints(b)} for _ in range(2)]
    assert sum(epochs[0][row] != epochs[1][row] for row in range(12)) > 6


def test_augmentation_is_keyed_by_seed_epoch_and_position(folders, seed):
    index = folders([6])

    def pictures(seed, epoch, place):
        dataset = PairDataset(index, "json.captions", TOKENIZER, Shake(), seed)
        return [picture for picture, *_ in prints(dataset[epoch, place, np.full(12, 2)])]

    base = pictures(seed, 3, 10)
    assert len(set(base)) > 3  # the same sample at twelve positions
    assert pictures(seed, 3, 11)[:-1] == base[1:]
    for other in ((seed + 1, 3, 10), (seed, 4, 10), (seed, 3, 22)):
        assert pictures(*other) != base


@pytest.mark.parametrize("what", ["batch_size", "seed", "window", "sources", "fingerprint"])
def test_the_state_of_another_run_is_refused_by_name(folders, seed, what):
    index, other = folders([6, 6]), folders([6, 7])
    state = make(index, 3, seed=seed).state_dict()
    changed = {
        "batch_size": lambda: make(index, 4, seed=seed),
        "seed": lambda: make(index, 3, seed=seed + 1),
        "window": lambda: make(index, 3, seed=seed, window=3),
        "sources": lambda: make(index, 3, seed=seed, sources=[(2, 2.0)]),
        "fingerprint": lambda: make(other, 3, seed=seed),
    }[what]()
    with pytest.raises(DataError, match=f"had {what} "):
        changed.load_state_dict(state)
    assert changed.state_dict()["batch"] == 0


def test_state_is_equal_on_all_ranks(folders, seed):
    index = folders([9, 9])
    states = []
    for rank in range(3):
        loader = make(index, 6, seed=seed, world=3, rank=rank)
        next(iter(loader))
        states.append(loader.state_dict())
    assert states[0] == states[1] == states[2]
    assert states[0]["batch"] == 1


def test_global_generators_are_untouched(folders, seed):
    loader = make(folders([12, 3]), 4, seed=seed)
    torch.manual_seed(seed), random.seed(seed), np.random.seed(seed % 2**32)  # noqa: NPY002
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    for batch in loader:
        assert torch.equal(before[0], torch.get_rng_state())
        assert before[1] == random.getstate()
        del batch
    after = np.random.get_state()  # noqa: NPY002
    assert all(np.array_equal(a, b) for a, b in zip(before[2], after, strict=True))


def test_the_callers_generators_do_not_matter(folders, seed):
    loaders = [make(folders([12, 3]), 4, seed=seed) for _ in range(2)]
    torch.manual_seed(1), random.seed(1)
    first = [prints(b) for b in loaders[0]]
    torch.manual_seed(2), random.seed(2)
    assert first == [prints(b) for b in loaders[1]]


def test_each_caption_is_drawn_sometimes(folders, seed):
    index = folders([10])
    texts = {row: captions_of(index[row], "json.captions") for row in range(10)}
    expected = {row: [tuple(TOKENIZER([text]).ids.tolist()) for text in texts[row]] for row in texts}
    drawn = np.zeros((10, 3))
    loader, again = make(index, 2, seed=seed), make(index, 2, seed=seed)
    for _ in range(30):
        for batch, same in zip(loader, again, strict=True):
            assert prints(batch) == prints(same)
            for _, text, row in prints(batch):
                drawn[row, expected[row].index(text)] += 1
    assert drawn.sum() == 300
    assert (drawn > 0).sum() >= 29  # one in 30 never drawn in 30 epochs: 1.6e-4; two: 1e-8
    assert (np.abs(drawn.sum(0) - 100) < 45).all()  # 5.5 standard deviations


def test_without_a_seed_the_first_caption_is_used(folders):
    index = folders([5, 4])
    dataset = PairDataset(index, "json.captions", TOKENIZER, Preprocess(8), None)
    loader = Loader(dataset, 4, shuffle=False)
    pairs = [pair for b in loader for pair in prints(b)]
    assert [row for *_, row in pairs] == list(range(9))  # in order, with the tail
    first = [captions_of(sample, "json.captions")[0] for sample in index]
    assert [text for _, text, _ in pairs] == [tuple(TOKENIZER([text]).ids.tolist()) for text in first]


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("total", [8, 9, 10, 11, 13])
def test_unshuffled_every_pass_gives_every_sample_on_some_rank(folders, world, total):
    """A tail that leaves a rank without samples must not shift its position in the epoch."""
    index = folders([total])
    loaders = [make(index, 4 * world, shuffle=False, world=world, rank=rank) for rank in range(world)]
    for _ in range(3):
        rows = [row for loader in loaders for b in loader for *_, row in prints(b)]
        assert sorted(rows) == list(range(total))
        assert len({json.dumps(loader.state_dict()) for loader in loaders}) == 1


def test_an_unshuffled_pass_starts_at_the_beginning(folders):
    """A trainer's sanity check or limit ends a validation after a few batches; the next one is complete again."""
    loader = make(folders([10]), 4, shuffle=False)
    passing = iter(loader)
    next(passing), next(passing)
    del passing
    assert [row for b in loader for *_, row in prints(b)] == list(range(10))


def test_captions_from_txt_and_one_string_of_json(tmp_path, seed):
    rng = np.random.default_rng(seed)
    sample = {"png": encode(pixels(rng)), "txt": b" two hats \n", "json": b'{"one": "a cat"}'}
    index = ShardIndex.build(write_tar(tmp_path / "a.tar", [{"__key__": "x", **sample}]))
    assert captions_of(index[0], "txt") == ["two hats"]
    assert captions_of(index[0], "json.one") == ["a cat"]


@pytest.mark.parametrize(
    ("members", "source", "cause"),
    [
        ({"txt": b"\xff"}, "txt", "txt is not UTF-8"),
        ({"txt": b"a \0 cat"}, "txt", "txt has NUL"),
        ({"txt": b"\xff\xfea"}, "txt", "txt is not UTF-16"),
        ({"txt": b" \n"}, "txt", "no caption"),
        ({"json": b"{"}, "json.a", ".json cannot be read"),
        ({"json": b"\xff"}, "json.a", ".json is not UTF-8"),
        ({"json": b"1" * 5000}, "json.a", ".json cannot be read"),  # more digits than Python's int accepts
        ({"json": b"[" * 200_000}, "json.a", ".json cannot be read"),  # nested too deep
        ({"json": b"[]"}, "json.a", "no field 'a'"),
        ({"json": b'{"b": 1}'}, "json.a", "no field 'a'"),
        ({"json": b'{"a": []}'}, "json.a", "no caption"),
        ({"json": b'{"a": ["", null]}'}, "json.a", "no caption"),
        ({"json": b'{"a": ["x", 3]}'}, "json.a", "a caption not text"),
        ({"json": b'{"a": ["x", "a\\u0000"]}'}, "json.a", "a caption with NUL"),
        ({"json": b'{"a": null}'}, "json.a", "no caption"),
        ({"cls": b"1"}, "txt", "no .txt"),
    ],
)
def test_a_bad_caption_names_shard_and_key(tmp_path, members, source, cause):
    index = ShardIndex.build(write_tar(tmp_path / "bad.tar", [{"__key__": "fine/sample7", **members}]))
    with pytest.raises(DataError, match=cause) as error:
        captions_of(index[0], source)
    assert "bad.tar" in str(error.value)
    assert "fine/sample7" in str(error.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_sample_is_replaced_by_the_next_one_and_named(tmp_path, seed, workers):
    rng = np.random.default_rng(seed)
    samples = [{"__key__": f"k{i}", "png": encode(pixels(rng)), "txt": b"a cat"} for i in range(6)]
    samples[2]["png"] = samples[2]["png"][:60]
    samples[5]["txt"] = b" "
    index = ShardIndex.build(write_tar(tmp_path / "shard.tar", samples))
    loader = make(index, 2, captions="txt", seed=seed, workers=workers)
    batches = list(loader)
    order = np.concatenate([EpochPlan([6], seed, 0, 2, 2)[k] for k in range(3)]).tolist()
    rows = [row for b in batches for row in b.rows.tolist()]
    assert rows == [{2: 3, 5: 0}.get(row, row) for row in order]  # the first sample follows the last
    bad = {item.key: item for b in batches for item in b.bad}
    assert bad.keys() == {"k2", "k5"}
    assert bad["k2"].cause == ".png cannot be decoded"
    assert "truncated" in bad["k2"].detail
    assert bad["k5"].cause == "txt holds no caption, or only empty ones"
    assert bad["k2"].shard == index.shards[0]
    assert len(loader.bad_sample_log) == 2


def test_a_bad_sample_of_an_evaluation_is_marked(tmp_path, seed):
    rng = np.random.default_rng(seed)
    samples = [{"__key__": f"k{i}", "png": encode(pixels(rng)), "txt": b"a cat"} for i in range(5)]
    samples[3]["png"] = b"no picture"
    index = ShardIndex.build(write_tar(tmp_path / "shard.tar", samples))
    dataset = PairDataset(index, "txt", TOKENIZER, Preprocess(8))
    rows = [row for b in Loader(dataset, 2, shuffle=False) for row in b.rows.tolist()]
    assert rows == [0, 1, 2, -1, 4]


def test_samples_without_image_or_caption_are_named(tmp_path, seed):
    rng = np.random.default_rng(seed)
    picture = encode(pixels(rng))
    samples = [
        {"__key__": "both", "png": picture, "txt": b"a cat"},
        {"__key__": "image", "png": picture},
        {"__key__": "text", "txt": b"a dog"},
        {"__key__": "both2", "png": picture, "txt": b"a dog"},
    ]
    index = ShardIndex.build(write_tar(tmp_path / "a.tar", samples))
    pairs, without = only_pairs(index, "txt")
    assert [sample.key for sample in pairs] == ["both", "both2"]
    assert without == ["image", "text"]
    assert only_pairs(pairs, "txt") == (pairs, [])
    with pytest.raises(DataError, match=r"no captions among 4 samples; expected \.json"):
        only_pairs(index, "json.caption")
    with pytest.raises(DataError, match="'caption' must be 'auto', 'txt' or"):
        only_pairs(index, "caption")
    for taken, cause in (([2], "no images among 1"), ([1, 2], "no sample of 2 has an image and a caption")):
        with pytest.raises(DataError, match=cause):
            only_pairs(index.take(np.array(taken)), "txt")


def test_sizes_that_do_not_fit_are_refused(folders):
    index = folders([3, 2])
    with pytest.raises(DataError, match=r"batch size 6 .* 5 samples"):
        make(index, 6)
    with pytest.raises(DataError, match=r"batch_size 5 .* multiple of the 2 ranks"):
        make(index, 5, world=2)


def test_a_sample_equals_the_content_of_the_shard(folders):
    index = folders([2, 2])
    sample = index[3]
    assert isinstance(sample, Sample)
    assert sample.image == "png"
    assert "txt" in sample
    assert "cls" not in sample


def test_validation_gives_every_rank_a_part_of_every_batch(tmp_path: Path, seed: int) -> None:
    """A rank without a part would miss a collective that the others wait for."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(4, 30))
    index = ShardIndex.build(write_shards(tmp_path, [count], seed))
    dataset = PairDataset(index, "txt", tiny_tokenizer(), Preprocess(8))
    for world in (1, 2, 3, 4):
        for batch_size in (world, 4 * world, 12 * world):
            ranks = [list(Loader(dataset, batch_size, shuffle=False, rank=rank, world=world)) for rank in range(world)]
            assert len({len(batches) for batches in ranks}) == 1
            assert all(len(batch.rows) for batches in ranks for batch in batches)
            rows = [row for parts in zip(*ranks, strict=True) for batch in parts for row in batch.rows.tolist()]
            assert rows == list(range(count))
    with pytest.raises(DataError, match="fewer than"):
        Loader(dataset, 64, shuffle=False, world=32)
