"""The timed steps: training steps next to open_clip's, packed texts, large losses, compilation, the loader."""

import inspect
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import FlopCounterMode

from dualenc.data import Augment, Loader, PairDataset, ShardIndex, Tokenizer
from dualenc.data.prepare.scenes import write_scenes
from dualenc.data.workers import usable_cores
from dualenc.losses import clip_loss
from dualenc.models import ImageConfig, TextConfig, TextEncoder
from dualenc.tokens import Tokens
from dualenc.training import ContrastiveTask
from tools.bench.memory import make_task, pair_batch
from tools.bench.text import captions
from tools.gpu_check.findings import Finding, Machine

# Dense products in bf16 a second, of the makers' data sheets.
PEAK_FLOPS = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "GH200": 989e12, "B200": 2250e12, "A100": 312e12}
GOALS = {"ViT-B-32": ("vit_base_patch32_clip_224", 1.8, None), "ViT-B-16": ("vit_base_patch16_clip_224", 1.25, 0.5)}
CONTEXT = 77  # tokens of open_clip's padded captions

Side = Callable[[], Any]


def seconds(on: Machine, sides: dict[str, Side], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each round of each side, which take turns; two rounds before that are not counted."""
    found: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 2):
        for name, side in sides.items():
            _synchronize(on)
            begin = time.perf_counter()
            side()
            _synchronize(on)
            if number > 1:
                found[name].append(time.perf_counter() - begin)
    return found


def _synchronize(on: Machine) -> None:
    if on.device == "cuda":
        torch.cuda.synchronize()


def _on(device: str, batch: Any) -> Any:
    return tree_map(lambda x: x.to(device) if isinstance(x, Tensor) else x, batch)


def clip_text(quick: bool) -> TextConfig:
    """Return the architecture of CLIP's text tower."""
    return TextConfig(49408, 512, 2 if quick else 12, 8, context_length=CONTEXT, norm="pre", causal=True, pool="last")


def batch_of(pairs: int, size: int) -> tuple[Any, Tensor]:
    """Return pairs with captions of the lengths of COCO, and the captions padded to `CONTEXT`."""
    texts = [ids for batch in captions(pairs, 1) for ids in batch]
    padded = torch.zeros(pairs, CONTEXT, dtype=torch.int64)
    for row, ids in zip(padded, texts):
        row[: len(ids)] = torch.tensor(ids)
        row[len(ids) - 1] = 49407  # the largest id, at which open_clip takes the vector of a text
    return pair_batch(size, pairs, 2)._replace(tokens=Tokens.pack(texts)), padded


def our_step(on: Machine, task: ContrastiveTask, batch: Any) -> Side:
    """Return a training step: forward, loss, backward, clipping, AdamW."""
    optimizer = task.configure_optimizers()["optimizer"]

    def step() -> None:
        with torch.autocast(on.device, torch.bfloat16):
            loss = task.training_step(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(task.parameters(), 1.0)
        optimizer.step()
        task.after_optimizer_step()

    return step


def open_clip_step(on: Machine, name: str, quick: bool, images: Tensor, texts: Tensor) -> Side:
    """Return a training step as open_clip's trainer takes it with `--precision amp_bf16 --grad-clip-norm 1`."""
    import open_clip
    from open_clip.loss import ClipLoss

    vision = {"image_size": 64, "layers": 2, "width": 192, "patch_size": 16, "head_width": 64}
    text = {"context_length": CONTEXT, "vocab_size": 49408, "width": 512, "heads": 8, "layers": 2}
    model: Any = open_clip.CLIP(512, vision, text) if quick else open_clip.create_model(name)  # type: ignore[arg-type]
    model = model.to(on.device).train()
    loss_of = ClipLoss()
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": others, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.2}]
    optimizer = torch.optim.AdamW(groups, lr=5e-4, betas=(0.9, 0.98), eps=1e-6)

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(on.device, torch.bfloat16):
            image, of_text, scale = model(images, texts)
            loss = loss_of(image, of_text, scale)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, 4.6052)

    return step


def training_step(on: Machine) -> list[Finding]:
    """Compare training steps with those of open_clip, in turns, and compute the share of the peak FLOPs."""
    found = []
    pairs, rounds = (8, 1) if on.quick or on.device == "cpu" else (512, 20)
    small = on.quick or on.device == "cpu"
    for name, (image, goal, least_mfu) in GOALS.items():
        config = ImageConfig("vit_tiny_patch16_224", 64, {"depth": 2}) if small else ImageConfig(image)
        task, _trainer = make_task(config, clip_text(small), 512, False, on.device)
        batch, padded = batch_of(pairs, config.img_size)
        batch = _on(on.device, batch)
        sides = {"ours": our_step(on, task, batch)}
        why = ""
        try:
            images = torch.zeros(pairs, 3, config.img_size, config.img_size, device=on.device)
            sides["open_clip"] = open_clip_step(on, name, small, images, padded.to(on.device))
        except ImportError as error:
            why = f"open_clip cannot be imported: {error}"
        flops = None
        # The kernels of packed attention have no FLOP formula in some versions of torch.
        with suppress(Exception), FlopCounterMode(display=False) as counter:
            sides["ours"]()
            flops = counter.get_total_flops()
        times = {side: statistics.median(values) for side, values in seconds(on, sides, rounds).items()}
        what = f"{name}, {pairs} pairs, bf16"
        found.append(on.speed("training step", f"{what}: pairs/s", pairs / times["ours"], ",.0f", None))
        if "open_clip" in times:
            ratio, note = times["open_clip"] / times["ours"], f"{pairs / times['open_clip']:,.0f} pairs/s of open_clip"
            found.append(on.speed("training step", f"{what}: open_clip's seconds / ours", ratio, ".2f", goal, note))
        else:
            found.append(Finding("training step", f"{what}: open_clip's seconds / ours", "", f"at least {goal}",
                                 "not measured", why))  # fmt: skip
        found.append(_mfu(on, what, flops, times["ours"], least_mfu))
        del task, sides
    return found


def _mfu(on: Machine, what: str, flops: float | None, took: float, least: float | None) -> Finding:
    known = torch.cuda.get_device_name() if on.device == "cuda" else "a CPU"
    peak = next((value for name, value in PEAK_FLOPS.items() if name in known), None)
    if not flops or peak is None:
        why = f"the peak of {known} is not listed" if flops else "torch cannot count the FLOPs of a step"
        expected = "" if least is None else f"at least {least}"
        return Finding("training step", f"{what}: MFU", "", expected, "not measured", why)
    note = f"{flops / 1e12:.2f} TFLOP a step, peak {peak / 1e12:.0f} TFLOP/s"
    return on.speed("training step", f"{what}: MFU", flops / took / peak, ".3f", least, note)


def packed_texts(on: Machine) -> list[Finding]:
    """Compare the text tower on packed captions with the same weights on padded ones, forward and backward."""
    small = on.quick or on.device == "cpu"
    pairs = 16 if small else 1024
    encoder = TextEncoder(clip_text(small)).to(on.device)
    batch, padded = batch_of(pairs, 16)
    tokens, ids = _on(on.device, batch.tokens), padded.to(on.device)
    mask = ids > 0

    def step(packed: bool) -> None:
        with torch.autocast(on.device, torch.bfloat16):
            out = encoder(tokens) if packed else encoder.forward_padded(ids, mask)
        out.float().sum().backward()

    sides = {"packed": lambda: step(True), "padded": lambda: step(False)}
    times = {side: statistics.median(values) for side, values in seconds(on, sides, 1 if small else 20).items()}
    what = f"padded seconds / packed, {pairs} captions of COCO's lengths, {CONTEXT} positions, forward and backward"
    note = f"{pairs / times['packed']:,.0f} captions/s packed"
    return [on.speed("packed texts", what, times["padded"] / times["packed"], ".2f", 2.0, note)]


def large_losses(on: Machine) -> list[Finding]:
    """Time the loss of large batches, forward and backward, and measure its memory."""
    small = on.quick or on.device == "cpu"
    found = []
    for size in (1024, 2048) if small else (32_768, 131_072):
        image, text = (F.normalize(torch.randn(size, 512, device=on.device), dim=1).requires_grad_() for _ in range(2))
        scale = torch.full((1,), 100.0, device=on.device)
        run = lambda: clip_loss(image, text, scale).backward()  # noqa: B023, E731
        (times,) = seconds(on, {"loss": run}, 1 if small else 5).values()
        what = f"clip_loss of {size:,} pairs, E 512, fp32"
        found.append(on.speed("large losses", f"{what}: pairs/s", size / statistics.median(times), ",.0f", None,
                              f"{1e3 * statistics.median(times):.1f} ms"))  # fmt: skip
        if on.device == "cpu":
            found.append(Finding("large losses", f"{what}: memory", "", "", "not measured", "no CUDA device"))
            continue
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        used = (torch.cuda.max_memory_allocated() - before) / 1e9
        most = 1.0 + 5 * 4 * 512 * size / 1e9  # blocks of scores, and some arrays of the size of the embeddings
        verdict = "pass" if used <= most else "fail"
        found.append(Finding("large losses", f"{what}: memory", f"{used:.2f} GB", f"at most {most:.2f} GB", verdict))
    return found


def compiled(on: Machine) -> list[Finding]:
    """Compare a compiled training step with the plain one, in turns."""
    name, what = "compile", "ViT-B/32: plain seconds / compiled"
    if "compile" not in inspect.signature(ContrastiveTask).parameters:
        return [Finding(name, what, "", "more than 1", "not measured", "this version has no model.compile")]
    if on.device == "cpu" or not on.computes:
        return [Finding(name, what, "", "more than 1", "not measured", "no GPU that computes")]
    pairs = 64 if on.quick else 512
    image = ImageConfig("vit_base_patch32_clip_224")
    sides, trainers, begin = {}, [], 0.0
    batch = _on(on.device, batch_of(pairs, 224)[0])
    for side, options in (("plain", {}), ("compiled", {"compile": True})):
        with torch.device(on.device):
            task = ContrastiveTask(image, clip_text(False), 512, **options)  # type: ignore[arg-type]
        trainers.append(type("Trainer", (), {"world_size": 1, "estimated_stepping_batches": 1})())
        task.trainer = trainers[-1]
        task.configure_model()  # which compiles the blocks
        sides[side] = our_step(on, task, batch)
        begin = time.perf_counter()
        sides[side]()
        _synchronize(on)
    start = time.perf_counter() - begin
    times = {side: statistics.median(values) for side, values in seconds(on, sides, 3 if on.quick else 20).items()}
    note = f"the first compiled step took {start:.0f} s"
    return [on.speed(name, f"{what}, {pairs} pairs", times["plain"] / times["compiled"], ".2f", 1.0, note)]


def loader(on: Machine) -> list[Finding]:
    """Measure the loader on drawn scenes, with as many workers as there are cores."""
    small = on.quick or on.device == "cpu"
    cores = usable_cores()
    with tempfile.TemporaryDirectory() as folder:
        write_scenes(Path(folder), train=400 if small else 4_000)
        index = ShardIndex.build(folder)
        texts = [sample.read("txt").decode() for sample in (index[i] for i in range(100))]
        pairs = PairDataset(index, "auto", Tokenizer.train(texts, 128, 24), Augment(224), seed=0)
        source = Loader(pairs, 64, workers=cores)
        try:
            rates = []
            for _ in range(2):
                begin = time.perf_counter()
                count = sum(len(batch.rows) for batch in source)
                rates.append(count / (time.perf_counter() - begin))
        finally:
            source.close()
    what = f"loader with {cores} workers: images/s of a core, scenes of 64 pixels enlarged to 224"
    return [on.speed("loader", what, rates[-1] / cores, ",.0f", None, f"{rates[-1]:,.0f} images/s of {cores} cores")]
