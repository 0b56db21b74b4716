"""The steps that compare values, waits and memory: parity with the CPU, losses, kernels, resume."""

import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from dualenc.data.prepare.scenes import write_scenes
from dualenc.losses import clip_loss, siglip_loss
from dualenc.models import DualEncoder, ImageConfig, TextConfig, TextEncoder
from dualenc.tokens import Tokens
from dualenc.training.step_memory import step_memory
from tools.bench.memory import allocator_memory, make_task, pair_batch
from tools.gpu_check.findings import Finding, Machine
from tools.soak import differences

SEED = 0
SMALL = ImageConfig("vit_tiny_patch16_224", 64, {"depth": 3})


def machine(quick: bool) -> Machine:
    """Return the machine: its device, and whether that computes."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = (torch.ones(2, device=device) + 1).sum().item()
    return Machine(device, found == 4.0, quick)


def facts() -> dict[str, Any]:
    """Return device, driver and versions."""
    found: dict[str, Any] = {"torch": torch.__version__, "Python": platform.python_version()}
    if not torch.cuda.is_available():
        return {"device": "no CUDA device", **found}
    about = torch.cuda.get_device_properties(0)
    found |= {"CUDA": torch.version.cuda, "cuDNN": torch.backends.cudnn.version()}
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        found["driver"] = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.split("\n")[0]
    except (OSError, subprocess.TimeoutExpired):
        found["driver"] = "not known"
    capability = ".".join(map(str, torch.cuda.get_device_capability()))
    return {"device": f"{about.name}, {about.total_memory / 2**30:.0f} GiB, capability {capability}", **found}


def device(on: Machine) -> list[Finding]:
    """Return whether there is a GPU that computes."""
    known = facts()["device"]
    if on.device == "cpu":
        return [Finding("device", "GPU", known, "a GPU", "not measured", "the steps run on the CPU")]
    verdict = "pass" if on.computes else "not measured"
    return [Finding("device", "1 + 1 on the device", known, "2", verdict, "" if on.computes else "it does not compute")]


def small_model() -> tuple[DualEncoder, Tensor, Tokens]:
    """Return a model with perturbed weights, images and captions, all from one seed."""
    torch.manual_seed(SEED)
    text = TextConfig(vocab_size=200, width=128, layers=3, heads=2, context_length=32, norm="pre", pool="mean")
    model = DualEncoder(SMALL, text, 64)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    lengths = torch.randint(3, 32, (32,)).tolist()
    return (
        model.eval(),
        torch.randn(32, 3, 64, 64),
        Tokens.pack([torch.randint(1, 200, (n,)).tolist() for n in lengths]),
    )


@torch.no_grad()
def forward(on: Machine) -> list[Finding]:
    """Compare embeddings of the device in fp32 and bf16 with those of the CPU in fp32."""
    model, images, tokens = small_model()
    wanted = model(images, tokens)
    model.to(on.device)
    found = []
    for name, half, most in (("fp32", False, 1e-4), ("bf16", True, 2e-2)):
        with torch.autocast(on.device, torch.bfloat16, enabled=half):
            got = model(images.to(on.device), tokens.to(on.device))
        error = max((a.float().cpu() - b).abs().max().item() for a, b in zip(got[:2], wanted[:2]))
        found.append(on.value("forward", f"largest error of an embedding in {name}, CPU fp32", error, ".1e", most))
    return found


def losses(on: Machine) -> list[Finding]:
    """Compare gradients of the losses in fp32 with float64 on the device, at the largest scale."""
    torch.manual_seed(SEED)
    pairs = 256 if on.quick else 4096
    found = []
    for loss in (clip_loss, siglip_loss):
        grads = []
        base = [F.normalize(torch.randn(pairs, 512, dtype=torch.float64), dim=1) for _ in range(2)]
        base[1] = F.normalize(base[0] + base[1] / 8, dim=1)
        for dtype in (torch.float32, torch.float64):
            inputs = [x.to(on.device, dtype).requires_grad_() for x in base]
            scale = torch.full((1,), 100.0, device=on.device, dtype=dtype)
            bias = torch.full((1,), -10.0, device=on.device, dtype=dtype) if loss is siglip_loss else None
            loss(*inputs, scale, bias).backward()
            grads.append([x.grad.double() for x in inputs])
        error = max(((a - b).norm() / b.norm()).item() for a, b in zip(*grads))
        what = f"{loss.__name__}, relative error of the gradient in fp32, float64, {pairs:,} pairs"
        found.append(on.value("losses", what, error, ".1e", 1e-5))
    return found


def attention_kernel(on: Machine) -> list[Finding]:
    """Name the kernels that packed texts take in bf16."""
    name = "attention kernel"
    if on.device == "cpu" or not on.computes:
        return [Finding(name, "kernels of packed attention", "", "flash", "not measured", "no GPU that computes")]
    text = TextConfig(vocab_size=200, width=512, layers=1, heads=8, norm="pre", pool="mean")
    encoder, tokens = TextEncoder(text).cuda(), Tokens.pack([[5] * n for n in range(5, 37)] * 16).to("cuda")
    with torch.autocast("cuda", torch.bfloat16):
        encoder(tokens)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            encoder(tokens)
            torch.cuda.synchronize()
    kernels = [event.key for event in profile.key_averages()]
    attends = [key for key in kernels if any(word in key.lower() for word in ("flash", "fmha", "attention", "cudnn"))]
    good = bool(attends) and all("flash" in key.lower() for key in attends)
    return [Finding(name, "kernels of packed attention", "; ".join(key[:80] for key in attends), "flash",
                    "pass" if good else "fail", f"of {len(kernels)} kernels of a layer")]  # fmt: skip


def waits(on: Machine) -> list[Finding]:
    """Train a step in which torch raises where the host would wait for the device."""
    name, what = "waits", "places where a training step waits for the device"
    if on.device == "cpu":
        return [Finding(name, what, "", "none", "not measured", "only a GPU is waited for")]
    text = TextConfig(vocab_size=200, width=128, layers=2, heads=2, norm="pre", pool="mean")
    task, _trainer = make_task(SMALL, text, 64, False, on.device)
    optimizer = task.configure_optimizers()["optimizer"]
    batch = tree_map(lambda x: x.cuda() if isinstance(x, Tensor) else x, pair_batch(64, 64, 20))
    for mode in ("default", "error"):  # The first step loads libraries and builds the optimizer's state.
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode(mode)
        try:
            with torch.autocast("cuda", torch.bfloat16):
                loss = task.training_step(batch, 0)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(task.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            task.after_optimizer_step()
        except RuntimeError as error:
            return [Finding(name, what, "at least one", "none", "fail", str(error).splitlines()[0][:200])]
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [Finding(name, what, "none", "none", "pass", "forward, loss, backward, clipping, AdamW")]


def resume(on: Machine) -> list[Finding]:
    """Kill a deterministic run, resume it, and compare it with an unbroken run, bit for bit."""
    name, what = "resume", "parts of a killed and resumed run that differ from the unbroken run"
    if not on.computes:
        return [Finding(name, what, "", "none", "not measured", "the device does not compute")]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_scenes(root / "scenes", train=600)
        config = Path(__file__).parents[2] / "configs" / "smoke.yaml"
        command = [
            sys.executable, "-m", "dualenc", "fit", "--config", str(config), "--data.train", str(root / "scenes"),
            "--trainer.max_epochs", "3", "--trainer.deterministic", "true", "--trainer.devices", "1",
            "--trainer.precision", "bf16-mixed" if on.device == "cuda" else "32-true", "--run.every_n_steps", "3",
            "--trainer.log_every_n_steps", "1", "--data.workers", "1", "--ckpt_path", "auto",
        ]  # fmt: skip
        environment = {**os.environ, "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
        whole, killed = root / "whole", root / "killed"
        with open(root / "log", "w") as log:
            options: dict[str, Any] = {"env": environment, "stdout": log, "stderr": log}
            subprocess.run([*command, "--trainer.default_root_dir", str(whole)], check=True, **options)
            command += ["--trainer.default_root_dir", str(killed)]
            process = subprocess.Popen(command, **options)
            while process.poll() is None and not list((killed / "checkpoints").glob("*.ckpt")):
                time.sleep(0.05)
            early = process.poll() is None
            process.send_signal(signal.SIGKILL)
            process.wait()
            subprocess.run(command, check=True, **options)
        found = differences(killed, whole, best=True)
    note = "killed after its first checkpoint" if early else "the run had ended before it could be killed"
    verdict = "fail" if found else "pass" if early else "not measured"
    return [Finding(name, what, ", ".join(found) or "none", "none", verdict, note)]


def memory(on: Machine) -> list[Finding]:
    """Compare the memory that a plan counts with the peak of torch's allocator."""
    name, image = "memory", "vit_tiny_patch16_224" if on.quick else "vit_base_patch32_clip_224"
    if on.device == "cpu":
        why = "torch's allocator counts memory of CUDA devices only"
        return [Finding(name, "peak of a step, counted / allocator", "", "0.95 to 1.05", "not measured", why)]
    pairs = 64 if on.quick else 256
    text = TextConfig(layers=2 if on.quick else 12, width=512, heads=8, norm="pre", pool="mean")
    found = []
    for checkpointing in (False, True):
        for precision in ("bf16-mixed", "32-true"):
            counted_task, _first = make_task(ImageConfig(image, 224), text, 512, checkpointing, "meta")
            batch = pair_batch(224, pairs, 20)
            counted = max(step_memory(counted_task, batch, precision)[1:])
            task, _second = make_task(ImageConfig(image, 224), text, 512, checkpointing, "cuda")
            allocator_memory(task, pair_batch(224, 8, 20), precision)  # loads libraries and their workspaces
            measured = max(allocator_memory(task, batch, precision)[1:])
            del task
            ratio = counted / measured
            note = f"{image}, {pairs} pairs, {measured / 1e9:.2f} GB by the allocator"
            what = f"peak of a step, counted / allocator, {precision}{', grad_checkpointing' * checkpointing}"
            if on.quick:  # Next to small activations the workspaces of libraries are large.
                found.append(Finding(name, what, f"{ratio:.3f}", "0.95 to 1.05", "not measured", "small sizes"))
            else:
                verdict = "pass" if 0.95 <= ratio <= 1.05 else "fail"
                found.append(Finding(name, what, f"{ratio:.3f}", "0.95 to 1.05", verdict, note))
    return found
