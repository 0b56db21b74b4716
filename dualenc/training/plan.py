"""The plan of a run before it begins: parameters, memory of a GPU, data workers, steps and time."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import SimpleNamespace
from typing import Any, NamedTuple

from torch.utils._pytree import tree_leaves

from dualenc.data.loading.epoch_plan import EpochPlan, RoundRobinPlan
from dualenc.data.workers import PREFETCH, SHARED_MEMORY, tensor_bytes, usable_cores
from dualenc.training.fake_batches import fake_batch
from dualenc.training.pair_data import PairData
from dualenc.training.step_memory import AUTOCAST, StepMemory, optimizer_memory, step_memory
from dualenc.utils.errors import DataError
from dualenc.utils.text import clock_time, millions, plural

GB, GIB = 1e9, 2**30
RESERVE = 2 * GIB  # bytes of a GPU that the plan leaves to CUDA, the workspaces of its kernels and fragmentation
COUNTED = 1 << 14  # samples of the largest step that is counted: blocks of scores grow with the square of the batch
KEPT_PER_DIMENSION = 32  # bytes of a micro-batched pair: two fp32 embeddings by micro-batch and whole, and gradients
TOWERS = {  # parts of the models that a task may have, and their names in the plan
    "image": "image tower",
    "text": "text tower",
    "encoder": "encoder",
    "generator": "generator",
    "discriminator": "discriminator",
}
PRECISIONS = (*AUTOCAST, "32-true", "32")


class PlanLine(NamedTuple):
    """PlanLine of the printed plan."""

    name: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class PlanOptions:
    """Settings of a run that the trainer holds, and what only the user knows.

    Attributes:
        precision: precision of the trainer.
        devices: number of ranks of a machine.
        nodes: number of machines.
        sharded: the strategy shards weights, gradients and optimizer state over the ranks (FSDP2).
        bucket_views: DDP keeps the gradients in its buckets (`gradient_as_bucket_view`).
        averaged: the run keeps a moving average of the weights.
        max_epochs: number of epochs; None for no limit.
        max_steps: number of steps; -1 for no limit.
        device_memory: memory of a GPU in GiB; None if it is not given.
        tokens: mean number of tokens of a text; None for the longest that the encoder takes.
        samples_per_second: rate of all ranks; None if it is not known.
    """

    precision: str = "32-true"
    devices: int = 1
    nodes: int = 1
    sharded: bool = False
    bucket_views: bool = False
    averaged: bool = False
    max_epochs: int | None = None
    max_steps: int = -1
    device_memory: float | None = None
    tokens: int | None = None
    samples_per_second: float | None = None

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"trainer.precision {self.precision}: a plan knows {', '.join(PRECISIONS)}")

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return self.devices * self.nodes


@dataclass
class Peak:
    """Peak memory of a step of one rank, linear in the samples that are embedded at a time.

    Attributes:
        steps: memory of a step for two numbers of samples.
        always: bytes that do not depend on the step: weights, optimizer state, averages, buckets.
        gradients: bytes of the gradients, which the trainer keeps during the next forward pass.
        extra: bytes of the parts of a larger batch that are on the GPU in the meantime.
    """

    steps: Mapping[int, StepMemory]
    always: int
    gradients: int
    extra: int = 0

    def _of(self, step: StepMemory) -> int:
        return self.always + self.extra + max(self.gradients + step.forward, step.backward)

    @cached_property
    def per_sample(self) -> float:
        """Bytes of one more sample."""
        (small, first), (large, second) = sorted(self.steps.items())
        return (self._of(second) - self._of(first)) / (large - small)

    def at(self, samples: int) -> int:
        """Return the peak in bytes with a number of samples."""
        large = max(self.steps)
        return round(self._of(self.steps[large]) + self.per_sample * (samples - large))

    def fitting(self, memory: float) -> int:
        """Return the largest number of samples whose peak is at most `memory` bytes; 0 or less if one is too much."""
        samples = int((memory - self.at(0)) // self.per_sample)
        return samples - 1 if self.at(samples) > memory else samples


@dataclass
class Plan:
    """Plan of a run.

    Args:
        task: `Task` of the run, whose parameters may be without content, on device "meta".
        data: data module of the run.
        options: the rest.

    Raises:
        ValueError: If the settings contradict each other, or a plan does not know them.
    """

    task: Any
    data: Any
    options: PlanOptions
    _trainer: Any = field(init=False)

    def __post_init__(self) -> None:
        if self.data.batch_size % self.options.ranks:
            raise DataError(
                f"data.batch_size {self.data.batch_size} must be a multiple of the {self.options.ranks} ranks"
            )
        if self.options.tokens is not None and not 0 < self.options.tokens <= self.task.text_config.context_length:
            raise ValueError(
                f"--tokens {self.options.tokens} must lie between 1 and model.text.context_length "
                f"{self.task.text_config.context_length}"
            )
        state = SimpleNamespace(fn="validate")  # for which the data train no tokenizer
        self._trainer = _OneRank(
            state=state, lightning_module=self.task, default_root_dir=".", datamodule=self.data
        )  # Lightning keeps a weak reference.
        self.task.trainer = self.data.trainer = self._trainer

    # Sizes

    @property
    def rank_batch(self) -> int:
        """Number of samples that a rank reads for a step."""
        return self.data.batch_size // self.options.ranks

    @property
    def micro_batch(self) -> int:
        """Number of samples that a rank embeds at a time."""
        asked = getattr(self.data, "micro_batch_size", None)
        if asked is None or asked >= self.rank_batch:
            return self.rank_batch
        return -(-self.rank_batch // -(-self.rank_batch // asked))  # Micro-batches are of nearly equal size.

    @property
    def tokens(self) -> int:
        """Number of tokens of a text."""
        return self.options.tokens or self.task.text_config.context_length

    def parameters(self) -> dict[str, int]:
        """Return the number of parameters by part."""
        counts: dict[str, int] = {}
        for name, parameter in self.task.named_parameters():
            names = name.split(".")
            part = names[1] if names[0] == "model" else names[0]
            part = TOWERS.get(part, "heads")
            counts[part] = counts.get(part, 0) + parameter.numel()
        return counts

    # Memory

    @cached_property
    def fixed(self) -> dict[str, int]:
        """Bytes of a rank that do not depend on the batch, by part."""
        share = self.options.ranks if self.options.sharded else 1
        own = list(self.task.parameters())
        weights = sum(p.numel() * p.element_size() for p in own)
        gradients = sum(p.numel() * p.element_size() for p in own if p.requires_grad)
        parts = {
            "weights": weights // share,
            "gradients": gradients // share,
            "optimizer state": optimizer_memory(self.task).state // share,
        }
        if self.options.averaged:
            parts["moving average"] = sum(4 * p.numel() for p in own) // share
        if self.options.sharded:
            # The weights of the block that computes and of the next one, and the gradient of the block before.
            whole = weights if self.micro_batch < self.rank_batch else 3 * self._largest_block()
            parts["gathered weights"] = whole
        elif self.options.ranks > 1 and not self.options.bucket_views:
            parts["DDP's buckets"] = gradients
        return parts

    def _largest_block(self) -> int:
        towers = [getattr(self.task.model, name, None) for name in TOWERS]
        blocks = [block for tower in towers if tower is not None for block in getattr(tower, "vit", tower).blocks]
        return max(sum(p.numel() * p.element_size() for p in block.parameters()) for block in blocks)

    def peak(self, samples: int, whole: bool) -> Peak:
        """Measure the peak of steps of `samples` and of twice as many.

        Args:
            samples: number of samples that are embedded at a time.
            whole: they are the whole batch of a rank; otherwise micro-batches of it.
        """
        fixed, count = self.fixed, 1 if whole else 2
        steps = {}
        for size in (samples, 2 * samples):
            batch = fake_batch(self.task, self.data, size, self.tokens)
            batch = batch if whole else [batch] * count
            steps[size] = step_memory(self.task, batch, self.options.precision)
        # The next batch is copied to the GPU in the meantime.
        extra = 0
        if whole:
            steps = {n: _with(step, step.inputs) for n, step in steps.items()}
        else:  # Two micro-batches are counted; of the others there are inputs and embeddings.
            extra = (self.of_sample + self.inputs_of_sample) * self.rank_batch
            steps = {n: _with(step, -count * n * self.of_sample) for n, step in steps.items()}
        gradients = fixed["gradients"]
        return Peak(steps, sum(fixed.values()) - gradients, gradients, extra)

    @cached_property
    def of_sample(self) -> int:
        """Bytes that a sample of a rank's batch takes on the GPU while other micro-batches are embedded."""
        return self.inputs_of_sample + KEPT_PER_DIMENSION * self.task.model.embed_dim

    @cached_property
    def inputs_of_sample(self) -> int:
        """Bytes of a sample's inputs."""
        return sum(x.nbytes for x in _tensors(fake_batch(self.task, self.data, 64, self.tokens))) // 64

    @cached_property
    def planned(self) -> Peak:
        """Peak with the sizes of the configuration."""
        return self.peak(self.micro_batch, self.micro_batch == self.rank_batch)

    # Text

    def sections(self) -> Iterator[tuple[str, list[PlanLine]]]:
        """Yield the sections of the printed plan: a title with its lines."""
        counts = self.parameters()
        trained = sum(p.numel() for p in self.task.parameters() if p.requires_grad)
        total = sum(counts.values())
        note = "" if trained == total else f"{millions(trained)} trained"
        lines = [PlanLine(name, millions(count)) for name, count in counts.items()]
        yield "Parameters", [*lines, PlanLine("together", millions(total), note)]
        yield f"Memory of a GPU, {self.options.precision}", list(self._memory_lines())
        yield "Data", list(self._data_lines())
        yield "Run", list(self._run_lines())

    def _memory_lines(self) -> Iterator[PlanLine]:
        peak, micro, batch = self.planned, self.micro_batch, self.rank_batch
        for name, size in self.fixed.items():
            yield PlanLine(name, _gb(size), self._fixed_note(name))
        noun = self.task.noun
        inputs = peak.extra or 2 * peak.steps[min(peak.steps)].inputs
        kept = ", with their embeddings," if micro < batch else ""
        yield PlanLine("batches", _gb(inputs), f"{batch:,} {noun}{kept} and the next ones, copied in the meantime")
        rest = peak.at(micro) - sum(self.fixed.values()) - inputs
        given = "" if self.options.tokens else ", the longest text; --tokens N for the mean"
        yield PlanLine(
            "activations",
            _gb(rest),
            f"{micro:,} {noun} of {self.tokens} tokens{given}; {peak.per_sample / 1e6:.3g} MB each",
        )
        yield PlanLine("peak", _gb(peak.at(micro)), "without CUDA itself, workspaces of kernels and fragmentation")
        if self.options.device_memory is not None:
            yield from self._fitting_lines(self.options.device_memory)

    def _fixed_note(self, name: str) -> str:
        if not self.options.sharded:
            return ""
        return "by arithmetic, not counted" if name == "gathered weights" else f"a share of {self.options.ranks}"

    def _fitting_lines(self, device_memory: float) -> Iterator[PlanLine]:
        """Yield the largest batch and micro-batch for a GPU."""
        free, micro, batch, noun = device_memory * GIB - RESERVE, self.micro_batch, self.rank_batch, self.task.noun
        left = f"{RESERVE / GIB:g} of {device_memory:g} GiB are left to CUDA, an assumption"
        fits = self.planned.at(micro) <= free
        yield PlanLine("fits", "yes" if fits else "no", left)
        most = self._largest(self.planned, micro == batch, free)
        if micro == batch:
            yield PlanLine("largest batch", f"{max(0, most):,}", f"{noun} of a rank, embedded in one piece")
        if micro == batch and (most >= batch or not isinstance(self.data, PairData)):
            return
        if micro == batch:  # Micro-batches are for a batch that does not fit.
            most = self._largest(self.peak(max(1, most // 4), whole=False), False, free)
        found = f"{min(most, batch):,}" if most > 0 else "none"
        way_out = "" if most > 0 else "; set model.grad_checkpointing, or use more ranks"
        yield PlanLine("largest micro-batch", found, f"data.micro_batch_size for {batch:,} {noun} of a rank{way_out}")

    def _largest(self, peak: Peak, whole: bool, free: float) -> int:
        """Return the largest number of samples that fits, counted again near it: a peak far from there is another one.

        Args:
            peak: peak of other numbers of samples.
            whole: see `peak`.
            free: bytes of a GPU that a step may take.
        """
        for _ in range(3):
            most, large = peak.fitting(free), max(peak.steps)
            if min(peak.steps) <= most <= large or most > large >= 2 * COUNTED:
                break
            peak = self.peak(min(max(1, most // 2), COUNTED), whole)
        return peak.fitting(free)

    def _data_lines(self) -> Iterator[PlanLine]:
        of_rank, micro, workers, devices = self.rank_batch, self.micro_batch, self.data.workers, self.options.devices
        cores = usable_cores()
        own = f"{workers} for each of {plural(devices, 'rank')} of a machine"
        yield PlanLine(
            "workers", f"{workers * devices:,}", f"{own}, a core each; this machine has {plural(cores, 'core')}"
        )
        if not isinstance(self.data, PairData) or self.data.features_path is not None or not workers:
            return
        size = tensor_bytes(self.data.augment) * micro
        held = 2 * -(-of_rank // micro)
        most, least = (size * (workers * ahead + held) * devices for ahead in (PREFETCH, 1))
        note = f"{PREFETCH} batches ahead of {size / 1e6:,.0f} MB for each worker; at least {_gb(least)}"
        yield PlanLine(SHARED_MEMORY, _gb(most), f"{note} (docker run --shm-size)")

    def _run_lines(self) -> Iterator[PlanLine]:
        """Yield the number of steps, the bytes that are read, and the time."""
        batch, noun = self.data.batch_size, self.task.noun
        yield PlanLine("batch", f"{batch:,}", f"{noun} of {plural(self.options.ranks, 'rank')}")
        steps, problem = None, ""
        try:
            steps, samples = self._epoch()
            yield PlanLine("steps of an epoch", f"{steps:,}", f"{samples:,} {noun}")
        except (DataError, ValueError) as error:
            problem = str(error)
        if steps is not None and isinstance(self.data, PairData) and self.data.train_index is not None:
            shards = self.data.train_index.parts
            size = sum(part.facts["size"] for part in shards)
            yield PlanLine("shards", _gb(size), f"{plural(len(shards), 'file')}, read once in an epoch")
        total = total_steps(steps, self.options.max_epochs, self.options.max_steps)
        if total is None:
            yield PlanLine("steps", "not known", problem or "set trainer.max_epochs or trainer.max_steps")
            return
        epochs = "" if steps is None else f"{total / steps:,.4g} epochs, "
        yield PlanLine("steps", f"{total:,}", f"{epochs}{total * batch:,} {noun}")
        if rate := self.options.samples_per_second:
            yield PlanLine("time", clock_time(total * batch / rate), f"at {rate:,.6g} {noun} a second, as given")

    def _epoch(self) -> tuple[int, int]:
        """Return the numbers of steps and of samples of an epoch.

        Raises:
            DataError: If the data are not there, or are counted only when the run begins.
        """
        data = self.data
        if isinstance(data, PairData):
            data.prepare_data()
            assert data.train_index is not None
            counts, sources = data.train_index.counts(), data._weights
            return len(EpochPlan(counts, data.seed, 0, data.batch_size, data.window, sources)), len(data.train_index)
        if any(head.masking is not None for head in data.heads.values()):
            raise DataError("plain text is cut into pieces, which are counted when the run begins")
        data._read("train")
        indexes = data._raw["train"]
        counts = [count for index in indexes.values() for count in index.counts()]
        weights = [(len(index.parts), data.given["train"][name].get("weight", 1.0)) for name, index in indexes.items()]
        plan = EpochPlan if data.mix == "together" else RoundRobinPlan
        return len(plan(counts, data.seed, 0, data.batch_size, sources=weights)), sum(counts)


class _OneRank(SimpleNamespace):
    """Stand-in for a trainer of one rank, with what a task and its data ask of it."""

    world_size = 1
    estimated_stepping_batches = 1


def total_steps(steps_of_epoch: int | None, max_epochs: int | None, max_steps: int) -> int | None:
    """Return the number of steps of a run; None if it is not known.

    Args:
        steps_of_epoch: number of steps of an epoch; None if it is not known.
        max_epochs: number of epochs; None or -1 for no limit.
        max_steps: number of steps; -1 for no limit.
    """
    limits = [max_steps] if max_steps > 0 else []
    if steps_of_epoch is not None and max_epochs is not None and max_epochs > 0:
        limits.append(steps_of_epoch * max_epochs)
    return min(limits, default=None)


def _with(step: StepMemory, size: int) -> StepMemory:
    return StepMemory(step.inputs, step.forward + size, step.backward + size)


def _tensors(batch: Any) -> list[Any]:
    return [x for x in tree_leaves(batch) if hasattr(x, "nbytes")]


def _gb(size: float) -> str:
    return f"{size / GB:,.2f} GB" if size >= GB / 10 else f"{size / 1e6:,.1f} MB"
