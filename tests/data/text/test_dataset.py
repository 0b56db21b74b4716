"""Batches of texts for one head or several: content, order, resuming."""

import json
import pickle
import random
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import models, normalizers, pre_tokenizers, processors
from transformers import BertTokenizerFast, RobertaTokenizerFast

from dualenc.data import BadSampleLog, Loader, Tokenizer
from dualenc.data.loading.epoch_plan import RoundRobinPlan
from dualenc.data.text.dataset import Needs, TextDataset, Use, all_labels, all_texts, label_of, texts_of
from dualenc.data.text.files import TextIndex
from dualenc.data.text.labels import ManyLabelsReader, NumberReader, OneLabelReader
from dualenc.data.text.masking import Masking
from dualenc.tokens import Tokens
from dualenc.utils.errors import BadSample, DataError

WORDS = ["playing", "outside", "a", "dog", "unbelievable", "cats", "re", "running", "!", "ok"]
PIECES = [
    "play",
    "##ing",
    "out",
    "##side",
    "a",
    "dog",
    "un",
    "##believ",
    "##able",
    "cat",
    "##s",
    "re",
    "run",
    "##n",
    "!",
]
VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *PIECES, *"0123456789", *(f"##{i}" for i in range(10))]
pytestmark = [
    pytest.mark.filterwarnings("ignore:This DataLoader will create"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]


@pytest.fixture(scope="module")
def vocab(tmp_path_factory):
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    path.write_text("\n".join(VOCAB) + "\n")
    return path


@pytest.fixture
def tokenizer(vocab):
    return Tokenizer.from_file(vocab, 16)


def sentence(rng, most=9):
    return " ".join(rng.choices(WORDS, k=rng.randint(1, most)))


LABELS = ("0", "1", "2")
MEANING = ("classification", "single_label", LABELS)
CLASS = Use("topic", "one", None, "y", Needs(OneLabelReader(LABELS), meaning=MEANING))
PAIR = Use("entails", "one", "two", "y", Needs(OneLabelReader(LABELS), meaning=MEANING))
NEAR = Use("near", "one", "two", needs=Needs(None, "apart"))
SCORE = Use("score", "one", "two", "number", Needs(NumberReader(), "apart"))
GUESS = Use("guess", needs=Needs(None, "none", (0.8, 0.1)))
USES = {use.head: use for use in (CLASS, PAIR, NEAR, SCORE, GUESS)}


def table(folder, name, rng, count):
    """Write rows, the first text of each different from all others; return them and their index."""
    rows = [[f"{sentence(rng)} {n}", sentence(rng), str(rng.randrange(3)), str(rng.random())] for n in range(count)]
    path = folder / f"{name}.tsv"
    path.write_text("\n".join("\t".join(row) for row in [["one", "two", "y", "number"], *rows]))
    return rows, TextIndex.build(str(path))


def plain(folder, rng, count):
    (folder / "guess.txt").write_text("\n".join(f"{sentence(rng)} {n}" for n in range(count)))
    return TextIndex.build(str(folder / "guess.txt"))


@pytest.fixture
def data(tmp_path, seed):
    """Files of several heads as one index, and the uses of their lines."""
    rng = random.Random(seed)
    names = ("topic", "entails", "near", "score")
    indexes = [table(tmp_path, name, rng, 14 + 5 * n)[1] for n, name in enumerate(names)]
    indexes.append(plain(tmp_path, rng, 31))
    return TextIndex.join(indexes), [(1, USES[name]) for name in (*names, "guess")]


def by_text(tokens):
    """Return ids and segments of each text, in the caller's order."""
    ids, mask, types = tokens.padded()
    types = torch.zeros_like(ids) if types is None else types
    return [(a[m].tolist(), b[m].tolist()) for a, m, b in zip(ids, mask, types, strict=True)]


def prints(batch):
    """Return the content of a batch as JSON."""
    masked = None if batch.masked is None else [x.tolist() for x in batch.masked]
    parts = {h: [None if x is None else (x.tolist(), str(x.dtype)) for x in p] for h, p in batch.parts.items()}
    return json.dumps([by_text(batch.tokens), batch.rows.tolist(), parts, masked, list(map(list, batch.bad))])


def make(data, tokenizer, batch=7, *, seed=0, whole_words=False, dataset_seed=0, uses=None, **options):
    index, own = data
    masking = Masking(tokenizer, 0.3)
    train = options.get("shuffle", True)
    dataset = TextDataset(index, uses or own, tokenizer, dataset_seed if train else None, masking, whole_words)
    weights = [(number, 1.0) for number, _ in own]
    return Loader(dataset, batch, seed=seed, sources=options.pop("sources", weights if train else None), **options)


# What a batch holds


def expected(sample, use, tokenizer):
    texts = texts_of(sample, use)
    if use.needs.pairs == "joined" and len(texts) > 1:
        item = tokenizer.backend.encode(*texts)
        return [(item.ids, item.type_ids)]
    return [(ids, [0] * len(ids)) for ids in tokenizer.encode(texts)]


@pytest.mark.parametrize("whole_words", [False, True])
def test_batch_has_the_texts_and_labels_of_its_lines(data, tokenizer, seed, whole_words):
    index, uses = data
    bounds = np.cumsum([0, *index.counts()])
    rng = np.random.default_rng(seed)
    loader = make(data, tokenizer, whole_words=whole_words)
    for _ in range(10):
        rows = rng.permutation(len(index))[: int(rng.integers(1, 40))]
        batch = loader.dataset[3, 100, rows]
        assert batch.rows.tolist() == rows.tolist()
        texts = by_text(batch.tokens)
        seen = []
        for head, part in batch.parts.items():
            use = USES[head]
            own = batch.rows[part.texts].tolist()
            seen += own
            assert [uses[np.searchsorted(bounds, row, "right") - 1][1] for row in own] == [use] * len(own)
            others = part.others.tolist() if part.others is not None else [None] * len(own)
            assert (part.others is not None) == (use.needs.pairs == "apart")
            for row, text, other in zip(own, part.texts.tolist(), others, strict=True):
                want = expected(index[row], use, tokenizer)
                assert [texts[i] for i in (text, other) if i is not None] == want
            if use.label is None:
                assert part.labels is None
                continue
            want = [index[row].read()[use.label] for row in own]
            got = part.labels
            assert got.dtype == (torch.float32 if use is SCORE else torch.int64)
            assert torch.equal(got, torch.tensor([float(x) for x in want], dtype=got.dtype))
        assert sorted(seen) == sorted(rows.tolist())
        assert batch.tokens.types is not None


def test_segments_only_where_pairs_are_joined(data, tokenizer, tmp_path, seed):
    _, uses = data
    without = [(n, CLASS if use is PAIR else use) for n, use in uses]
    assert make(data, tokenizer, uses=without).dataset[0, 0, np.arange(20)].tokens.types is None


def test_only_texts_of_the_guessing_head_are_masked(data, tokenizer, seed):
    index, _ = data
    first = len(index) - 31
    dataset = make(data, tokenizer, dataset_seed=seed).dataset
    rng = np.random.default_rng(seed)
    number = 0
    for turn in range(20):
        batch = dataset[0, 50 * turn, rng.permutation(len(index))[:50]]
        where = torch.repeat_interleave(torch.arange(len(batch.tokens.rows)), batch.tokens.offsets.diff())
        text = torch.empty_like(batch.tokens.rows)
        text[batch.tokens.rows] = torch.arange(len(text))
        own = set(batch.parts["guess"].texts.tolist())
        assert all((batch.rows[i] >= first) == (i in own) for i in range(50))
        assert set(text[where[batch.masked.masked_positions]].tolist()) <= own
        changed = batch.masked.ids != batch.tokens.ids
        assert set(torch.nonzero(changed)[:, 0].tolist()) <= set(batch.masked.masked_positions.tolist())
        assert torch.equal(batch.masked.labels, batch.tokens.ids[batch.masked.masked_positions])
        number += len(batch.masked.masked_positions)
    assert number > 100
    last = np.arange(first, len(index))
    hidden = [dataset[epoch, place, last].masked.ids.tolist() for epoch, place in ((0, 0), (0, 0), (1, 0), (0, 9))]
    assert hidden[0] == hidden[1]
    assert hidden[0] != hidden[2] != hidden[3] != hidden[0]
    assert dataset[0, 0, np.arange(14)].masked is None
    assert TextDataset(*data, tokenizer, 0)[0, 0, np.arange(len(index))].masked is None  # predicted, not guessed


def test_whole_words_in_batches(data, tokenizer, seed):
    """All tokens of a word are masked or none, wherever the text is in the batch."""
    index, _ = data
    dataset = make(data, tokenizer, dataset_seed=seed, whole_words=True).dataset
    words = 0
    for epoch in range(20):
        batch = dataset[epoch, 0, np.arange(len(index) - 40, len(index))]
        chosen = torch.zeros(len(batch.tokens.ids), dtype=torch.bool)
        chosen[batch.masked.masked_positions] = True
        for i in batch.parts["guess"].texts.tolist():
            row = int(batch.tokens.rows[i])
            here = chosen[batch.tokens.offsets[row] : batch.tokens.offsets[row + 1]].tolist()
            text = texts_of(index[int(batch.rows[i])], GUESS)[0]
            item = tokenizer.backend.encode(text)
            for word in set(item.word_ids) - {None}:
                flags = [flag for flag, w, t in zip(here, item.word_ids, item.tokens) if w == word and t != "[UNK]"]
                assert len(set(flags)) <= 1
                words += len(flags) > 1 and flags[0]
    assert words > 20


def test_held_out_texts_are_masked_alike_each_time(data, tokenizer):
    """Masks depend on the line, not on batches, ranks and epochs."""

    def hidden(size, world=1, passes=1):
        loaders = [make(data, tokenizer, size * world, shuffle=False, rank=r, world=world) for r in range(world)]
        found = {}
        for _ in range(passes):
            for batch in (batch for loader in loaders for batch in loader):
                if batch.masked is None:
                    continue
                texts = by_text(batch.tokens._replace(ids=batch.masked.ids))
                for i in batch.parts["guess"].texts.tolist():
                    found.setdefault(int(batch.rows[i]), set()).add(tuple(texts[i][0]))
        return found

    base = hidden(40)
    assert len(base) == 31
    assert base == hidden(3, passes=2) == hidden(4, world=3)
    assert all(len(x) == 1 for x in base.values())


def test_labels_of_several_kinds(tmp_path):
    several = Use("tags", "t", None, "y", Needs(ManyLabelsReader(("a", "b b", "c"))))
    rows = [["a", "c"], "b b|a", "", [], "c", 'a| "b'][:5]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"t": "x", "y": y}) + "\n" for y in rows))
    index = TextIndex.build(str(tmp_path / "a.jsonl"))
    want = [[1.0, 0.0, 1.0], [1.0, 1.0, 0.0], [0.0] * 3, [0.0] * 3, [0.0, 0.0, 1.0]]
    assert [label_of(sample, several, sample.read()) for sample in index] == want == all_labels(index, several)
    single = several._replace(needs=Needs(OneLabelReader(("1", "true", "x"))))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"t": "x", "y": y}) + "\n" for y in (1, True, " x ", "1")))
    assert all_labels(TextIndex.build(str(tmp_path / "b.jsonl")), single) == [0, 1, 2, 0]
    number = several._replace(needs=Needs(NumberReader()))
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"t": "x", "y": y}) + "\n" for y in (1, "-2.5", 1e3)))
    index = TextIndex.build(str(tmp_path / "c.jsonl"))
    assert [label_of(sample, number, sample.read()) for sample in index] == [1.0, -2.5, 1000.0]


@pytest.mark.parametrize("value", ["x", "", None, True, "nan", "inf", [1], {"a": 1}])
def test_invalid_number_is_a_bad_sample(tmp_path, value):
    (tmp_path / "a.jsonl").write_text(json.dumps({"t": "x", "y": value}))
    (sample,) = TextIndex.build(str(tmp_path / "a.jsonl"))
    use = Use("h", "t", None, "y", Needs(NumberReader()))
    with pytest.raises(BadSample, match="line 1: its column 'y' does not hold a number for head 'h'") as error:
        label_of(sample, use, sample.read())
    assert error.value.detail == repr(value)


@pytest.mark.parametrize(
    ("line", "cause"),
    [
        ({"t": "", "u": "x"}, "its column 't' holds no text"),
        ({"t": "x", "u": " "}, "its column 'u' holds no text"),
        ({"t": 3, "u": "x"}, "its column 't' holds no text"),
        ({"t": "x", "u": "\ufeff\u200b"}, "its column 'u' holds no text"),
        ({"t": "a\0", "u": "x"}, "its column 't' holds a text with NUL characters"),
        ({"t": "x"}, "it has no field 'u'"),
        ({"t": "\ud800", "u": "x"}, "its column 't' holds a text not UTF-8"),
    ],
)
def test_lines_without_text_are_bad_samples(tmp_path, line, cause):
    (tmp_path / "a.jsonl").write_text(json.dumps({"t": "x", "u": "y"}) + "\n" + json.dumps(line))
    index = TextIndex.build(str(tmp_path / "a.jsonl"))
    use = Use("h", "t", "u")
    with pytest.raises(BadSample, match=cause) as error:
        texts_of(index[1], use)
    assert error.value.cause == cause
    assert list(all_texts(index, use)) == ["x", "y"]


def test_unknown_label_is_refused(tmp_path):
    (tmp_path / "a.tsv").write_text("one\ty\nx\t0\nx\tmaybe\n")
    index = TextIndex.build(str(tmp_path / "a.tsv"))
    with pytest.raises(DataError, match=r"a\.tsv line 3: label 'maybe' in column 'y' .* head 'topic'.*0, 1, 2"):
        all_labels(index, CLASS)
    with pytest.raises(BadSample, match="does not hold a label for head 'topic'"):
        label_of(index[1], CLASS, index[1].read())


def test_bad_lines_are_replaced_from_their_source(tmp_path, tokenizer, seed):
    """Training replaces bad lines, measuring leaves them out; each is logged once."""
    (tmp_path / "a.tsv").write_text("one\ty\nx a\t0\nbroken\nx b\t1\nbroken\n")
    (tmp_path / "b.tsv").write_text("one\ty\nz\t2\n")
    index = TextIndex.build([str(tmp_path / "a.tsv"), str(tmp_path / "b.tsv")])
    uses = [(1, CLASS), (1, CLASS._replace(head="other"))]
    batch = TextDataset(index, uses, tokenizer, seed)[0, 0, np.arange(5)]
    assert batch.rows.tolist() == [0, 2, 2, 0, 4]
    assert batch.parts["topic"].labels.tolist() == [0, 1, 1, 0]
    assert [bad.key for bad in batch.bad] == ["line 3", "line 5"]
    bad_sample_log = BadSampleLog(5, tmp_path / "bad_samples.jsonl")
    (batch,) = Loader(TextDataset(index, uses, tokenizer), 5, shuffle=False, bad_sample_log=bad_sample_log)
    assert batch.rows.tolist() == [0, -1, 2, -1, 4]
    assert batch.parts["topic"].texts.tolist() == [0, 2]
    assert batch.parts["topic"].labels.tolist() == [0, 1]
    assert len(bad_sample_log) == 2
    (tmp_path / "c.tsv").write_text("one\ty\n" + "broken\n" * 3)
    with pytest.raises(DataError, match=r"consecutive samples .* columns .* header"):
        TextDataset(TextIndex.build(str(tmp_path / "c.tsv")), [(1, CLASS)], tokenizer)[0, 0, np.arange(1)]


def test_to_another_device(data, tokenizer):
    batch = make(data, tokenizer).dataset[0, 0, np.arange(len(data[0]))]
    moved = batch.to("meta")
    assert {moved.tokens.ids.device.type, moved.tokens.types.device.type, moved.masked.ids.device.type} == {"meta"}
    assert {x.device.type for part in moved.parts.values() for x in part if x is not None} == {"meta"}
    assert torch.equal(moved.rows, batch.rows)


# The order


@pytest.mark.parametrize("mix", ["together", "round_robin"])
def test_every_line_once_an_epoch(data, tokenizer, seed, mix):
    index, _ = data
    loader = make(data, tokenizer, 1, seed=seed, mix=mix)
    epochs = [[int(row) for batch in loader for row in batch.rows] for _ in range(3)]
    assert all(sorted(rows) == list(range(len(index))) for rows in epochs)
    assert epochs[0] != epochs[1]


@pytest.mark.long
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("mix", ["together", "round_robin"])
def test_resume_is_bit_equal(data, tokenizer, seed, mix, workers):
    rng = random.Random(seed)
    whole = make(data, tokenizer, seed=seed, mix=mix)
    epochs = [[prints(b) for b in whole] for _ in range(2)]
    stops = rng.sample(range(1, len(whole)), 2) if workers else range(1, len(whole))
    for stop in stops:
        first = make(data, tokenizer, seed=seed, mix=mix, workers=workers)
        passing = iter(first)
        seen = [prints(next(passing)) for _ in range(stop)]
        state = json.loads(json.dumps(first.state_dict()))
        passing.close()
        second = make(data, tokenizer, seed=seed, mix=mix, workers=workers)
        second.load_state_dict(state)
        assert seen + [prints(b) for b in second] == epochs[0]
        if stop == stops[0]:
            assert [prints(b) for b in second] == epochs[1]
            wrong = make(data, tokenizer, seed=seed, mix=mix)  # the control
            wrong.load_state_dict({**state, "batch": stop - 1})
            assert seen + [prints(b) for b in wrong] != epochs[0]
        second.close()


@pytest.mark.parametrize("mix", ["together", "round_robin"])
def test_global_batches_do_not_depend_on_ranks(data, tokenizer, seed, mix):
    alone = [b.rows.tolist() for b in make(data, tokenizer, 6, seed=seed, mix=mix)]
    ranks = [[b.rows.tolist() for b in make(data, tokenizer, 6, seed=seed, mix=mix, world=3, rank=r)] for r in range(3)]
    assert [[*a, *b, *c] for a, b, c in zip(*ranks, strict=True)] == alone


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("mix", {"mix": "round_robin"}),
        ("whole_words", {"whole_words": True}),
        (
            "columns",
            {"uses": [(n, u._replace(text="two") if u is CLASS else u) for n, u in zip([1] * 5, USES.values())]},
        ),
        ("sources", {"sources": [(5, 2.0)]}),
    ],
)
def test_state_of_another_run_is_refused(data, tokenizer, what, change):
    one, other = make(data, tokenizer), make(data, tokenizer, **change)
    for a, b in ((one, other), (other, one)):
        with pytest.raises(DataError, match=f"had {what} "):
            a.load_state_dict(b.state_dict())


def test_state_with_other_masking_tokenizer_or_files_is_refused(data, tokenizer, vocab):
    index, uses = data
    state = make(data, tokenizer).state_dict()
    longer = Tokenizer.from_file(vocab, 17)
    fewer = TextIndex([part.take(np.arange(len(part)) > 0) for part in index.parts])
    for what, changed in (
        ("mask", TextDataset(index, uses, tokenizer, 0, Masking(tokenizer, 0.2))),
        ("tokenizer", TextDataset(index, uses, longer, 0, Masking(longer, 0.3))),
        ("fingerprint", TextDataset(fewer, uses, tokenizer, 0, Masking(tokenizer, 0.3))),
    ):
        with pytest.raises(DataError, match=f"had {what} "):
            Loader(changed, 7, sources=[(1, 1.0)] * 5).load_state_dict(state)


sources = st.tuples(st.lists(st.integers(1, 30), min_size=1, max_size=3), st.sampled_from([1.0, 0.5, 2.3]))
layouts = st.lists(sources, min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(layouts, st.integers(0, 2**40), st.integers(1, 8))
def test_round_robin(layout, seed, batch):
    """Each batch has one source; over many epochs each line comes as often as its weight says, evenly spread."""
    counts = [n for files, _ in layout for n in files]
    sources = [(len(files), weight) for files, weight in layout]
    totals = [sum(files) for files, _ in layout]
    lengths = [round(weight * total) // batch for total, (_, weight) in zip(totals, sources)]
    if min(lengths) == 0:
        with pytest.raises(ValueError, match=r"source \d of .*, which has its own batches: batch size"):
            RoundRobinPlan(counts, seed, 0, batch, 2, sources)
        return
    bounds = np.cumsum([0, *totals])
    seen = Counter()
    for epoch in range(4):
        plan = RoundRobinPlan(counts, seed, epoch, batch, 2, sources)
        assert len(plan) == sum(lengths)
        batches = [plan[k] for k in range(len(plan))]
        again = RoundRobinPlan(counts, seed, epoch, batch, 2, sources)
        order = list(range(len(plan)))
        random.Random(seed).shuffle(order)
        assert all(np.array_equal(again[k], batches[k]) for k in order)
        of = [set((np.searchsorted(bounds, rows, "right") - 1).tolist()) for rows in batches]
        assert all(len(one) == 1 and len(rows) == batch for one, rows in zip(of, batches))
        turns = np.array([one.pop() for one in of])
        for source, length in enumerate(lengths):
            assert (turns == source).sum() == length
            for part in range(1, 5):  # of the first so many quarters, about as many
                near = (turns[: len(turns) * part // 4] == source).sum()
                assert abs(near - length * part / 4) <= len(lengths) + 1
        seen.update(np.concatenate(batches).tolist())
    for source, (a, b) in enumerate(pairwise(bounds)):
        times = [seen[row] for row in range(a, b)]
        assert max(times) - min(times) <= 1
        assert sum(times) == 4 * lengths[source] * batch
    with pytest.raises(IndexError):
        plan[len(plan)]


def test_round_robin_is_seeded(seed):
    def rows(seed, epoch):
        plan = RoundRobinPlan([40, 30], seed, epoch, 5, 64, [(1, 1.0), (1, 1.0)])
        return [plan[k].tolist() for k in range(len(plan))]

    assert rows(seed, 0) == rows(seed, 0)
    assert rows(seed, 0) != rows(seed + 1, 0) != rows(seed, 1) != rows(seed, 0)
    turns = {tuple(r[0] < 40 for r in rows(seed, epoch)) for epoch in range(8)}
    assert len(turns) > 2


# The tokenizer


def test_pairs_equal_bert(vocab, seed):
    rng = random.Random(seed)
    backend = Tokenizer.from_file(vocab, 500).backend
    peer = BertTokenizerFast(tokenizer_object=Backend.from_str(backend.to_str()), model_max_length=16)
    peer.backend_tokenizer.no_truncation()
    pairs = [(sentence(rng, 14), rng.choice([sentence(rng, 14), ""])) for _ in range(200)]
    want = peer([a for a, _ in pairs], [b for _, b in pairs], truncation="longest_first", max_length=16)
    ids, types = Tokenizer.from_file(vocab, 16).encode_pairs(pairs)
    assert ids == want["input_ids"]
    assert types == want["token_type_ids"]
    assert max(map(len, ids)) == 16
    assert {1} <= set(types[0])
    packed = Tokens.pack(ids, types)
    assert by_text(packed) == list(zip(ids, types))


def test_pairs_equal_roberta(seed, tmp_path):
    rng = random.Random(seed)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", *letters, "Ġd", "og", "<mask>"])}
    merges = [("Ġ", "d"), ("o", "g")]
    peer = RobertaTokenizerFast(vocab=vocab, merges=merges)
    peer.save_pretrained(tmp_path)
    pairs = [(sentence(rng, 5), sentence(rng, 5)) for _ in range(100)]
    want = peer([a for a, _ in pairs], [b for _, b in pairs], truncation="longest_first", max_length=40)
    ours = Tokenizer.from_file(tmp_path, 40)
    ids, types = ours.encode_pairs(pairs)
    assert ids == want["input_ids"]
    assert not any(map(any, types))
    assert ours.mask_id == vocab["<mask>"]
    assert Masking(ours, 0.5).mask == vocab["<mask>"]


def test_texts_are_padded(vocab, seed):
    rng = random.Random(seed)
    texts = [sentence(rng, 12) for _ in range(60)]
    plain = Tokenizer.from_file(vocab, 16)
    filled = Tokenizer.from_file(vocab, 16, 12, 7)
    want = [ids + [7] * (12 - len(ids)) for ids in plain.encode(texts)]
    assert filled.encode(texts) == want == pickle.loads(pickle.dumps(filled)).encode(texts)
    assert by_text(filled(texts)) == [(ids, [0] * len(ids)) for ids in want]
    assert {len(ids) for ids in want} > {12, 16}
    ids, types = filled.encode_pairs([("a dog", "ok")])
    assert (len(ids[0]), types[0][-1], ids[0][-1]) == (12, 0, 7)
    ids, words = filled.encode_words(["a dog"])
    assert (ids, words) == (filled.encode(["a dog"]), [[-1, 0, 1, -1] + [-1] * 8])
    assert len({plain.fingerprint, filled.fingerprint, Tokenizer.from_file(vocab, 16, 12).fingerprint}) == 3


def test_encode_words(tokenizer):
    ids, words = tokenizer.encode_words(["Unbelievable dog!", "xyz playing", ""])
    assert ids == tokenizer.encode(["Unbelievable dog!", "xyz playing", ""])
    assert words == [[-1, 0, 0, 0, 1, 2, -1], [-1, 0, 1, 1, -1], [-1, -1]]


def clip_like():
    """Return a tokenizer with lower case, `<|startoftext|>` and `<|endoftext|>`, words that end with `</w>`."""
    backend = Backend(
        models.BPE({"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2, "b</w>": 3, "a": 4, "b": 5, "ab</w>": 6},
                   [("a", "b</w>")], end_of_word_suffix="</w>", unk_token="<|endoftext|>")
    )  # fmt: skip
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<|startoftext|>", "<|endoftext|>"])
    backend.post_processor = processors.RobertaProcessing(("<|endoftext|>", 1), ("<|startoftext|>", 0), False, False)
    return backend


def siglip_like():
    """Return a tokenizer of unigram pieces with one closing token, which is also the padding."""
    backend = Backend(models.Unigram([("<unk>", 0.0), ("</s>", 0.0), ("▁a", -1.0), ("▁b", -1.0), ("▁", -3.0)], 0))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.add_special_tokens(["</s>"])
    backend.post_processor = processors.TemplateProcessing("$A </s>", "$A </s> $B </s>", [("</s>", 1)])
    return backend


def test_tokenizers_of_clip_and_siglip(tmp_path):
    clip_like().save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.from_file(tmp_path, 5)
    assert ours.encode(["A ab", "a b a b a b"]) == [[0, 2, 6, 1], [0, 2, 3, 2, 1]]
    assert ours.mask_id is None
    siglip_like().save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer.from_file(tmp_path, 5, 5, 1)
    assert ours.encode(["a b", "a b a b a b"]) == [[2, 3, 1, 1, 1], [2, 3, 2, 3, 1]]
    ours.save(tmp_path / "again.json")
    assert Tokenizer.from_file(tmp_path / "again.json", 9).encode(["a b a b a b"]) == [[2, 3, 2, 3, 2, 3, 1]]
