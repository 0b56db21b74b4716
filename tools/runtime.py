"""Torch's CUDA build without a device: builds `tests/cuda/runtime.c`, and reads the log of what it was asked to do.

The runtime is preloaded into a new process, see `environment`. Kernels do nothing there: no value is right, and no time
on the device passes. What the host launches, waits for, copies and sends to other ranks is as on a device.
"""

import ctypes
import os
import platform
import re
import shutil
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

SOURCE = Path(__file__).parents[1] / "tests" / "cuda" / "runtime.c"
EVENTS = 1 << 20  # of the log, as in the source
LAUNCHES = ("kernel", "product", "fill")
# Words of CUDA's headers that mean something to its own compiler only.
WORDS = ("CUDARTAPI", "__device_builtin__", "__device_builtin_texture_type__", "__device_builtin_surface_type__")
# By NCCL's numbers.
DTYPES = ("int8", "uint8", "int32", "uint32", "int64", "uint64", "float16", "float32", "float64", "bfloat16")


def reason_against() -> str | None:
    """Return why the runtime cannot be built or run here; None where it can."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return "a CUDA runtime without a device is built on Linux on x86-64 only"
    if torch.version.cuda is None:
        return "this torch is not built for CUDA"
    if missing := [name for name in ("gcc", "nm") if shutil.which(name) is None]:
        return f"no {missing[0]} to build a CUDA runtime with"
    if _headers() is None:
        return "no headers of CUDA next to torch, from its package nvidia-cuda-runtime"
    return None


def _headers() -> Path | None:
    """Return the folder of CUDA's headers in the site packages."""
    site = Path(torch.__file__).parents[1]
    return next((path.parent for path in sorted(site.glob("nvidia/*/include/driver_types.h"))), None)


def build(folder: Path) -> Path:
    """Build the runtime in a folder, which is created, and return the path of the library.

    Raises:
        RuntimeError: If gcc fails; the message has its errors.
    """
    (folder / "crt").mkdir(parents=True, exist_ok=True)
    words = [f"#define {word}\n" for word in WORDS]
    words += [f"#define {word}(n) __attribute__((aligned(n)))\n" for word in ("__align__", "__builtin_align__")]
    (folder / "crt" / "host_defines.h").write_text("".join(words))
    own = r"(?m)^(?:int|unsigned|void|void \*\*|const char \*)\s?((?:__cuda|cuda|cublas|nccl|cu)[A-Z]\w*)\("
    wanted = _wanted() - set(re.findall(own, SOURCE.read_text()))
    products = re.compile(r"cublas.*([Gg]em[mv]|Dot|dot|[Tt]rsm|Matmul$)")
    lines = [f"{'PRODUCT' if products.match(name) else 'NOTHING'}({name})\n" for name in sorted(wanted)]
    (folder / "missing.h").write_text("".join(lines))
    library = folder / "runtime.so"
    # Torch asks for the driver's library by this name.
    major, minor = str(torch.version.cuda).split(".")[:2]
    version = f"-DCUDART_VERSION={1000 * int(major) + 10 * int(minor)}"
    command = ["gcc", "-O1", "-shared", "-fPIC", "-w", version, f"-I{folder}", f"-I{_headers()}"]
    command += ["-Wl,-soname,libcuda.so.1"]
    run = subprocess.run([*command, str(SOURCE), "-o", str(library)], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"gcc cannot build {SOURCE}:\n{run.stderr}")
    return library


def _wanted() -> set[str]:
    """Return the functions of CUDA, its driver, cuBLAS and NCCL that torch's libraries ask for."""
    wanted = set()
    for path in sorted((Path(torch.__file__).parent / "lib").glob("*.so")):
        symbols = subprocess.run(["nm", "-D", "--undefined-only", path], capture_output=True, text=True).stdout
        names = {line.split()[-1].partition("@")[0] for line in symbols.splitlines() if line.strip()}
        wanted |= {name for name in names if re.match(r"(__cuda|cuda|cublas|nccl|cu)[A-Z]", name)}
    return wanted


def environment(library: Path, devices: int = 1, capability: int = 90) -> dict[str, str]:
    """Return the environment of a process that runs on the runtime.

    Args:
        library: path that `build` has returned.
        devices: number of devices.
        capability: compute capability of the devices, 90 for 9.0.
    """
    own = {"RUNTIME_DEVICES": str(devices), "RUNTIME_CAPABILITY": str(capability), "LD_PRELOAD": str(library)}
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **own}


def prepare_torch() -> None:
    """Make torch use nothing that asks the device for more than the runtime has; call it before anything is run.

    cuDNN is not used. A convolution whose patches do not overlap is one product here, where cuDNN has one kernel.
    """
    torch.backends.cudnn.enabled = False
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.nn.Conv2d.forward = _convolution  # type: ignore[method-assign]


def _convolution(conv: torch.nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    (batch, channels, height, width), (size, _) = x.shape, conv.kernel_size
    rows, columns = height // size, width // size
    patches = x.reshape(batch, channels, rows, size, columns, size).permute(0, 2, 4, 1, 3, 5).flatten(3)
    return torch.nn.functional.linear(patches, conv.weight.flatten(1), conv.bias).permute(0, 3, 1, 2)


class _Event(ctypes.Structure):
    _fields_ = [
        ("kind", ctypes.c_char_p),
        ("what", ctypes.c_void_p),
        ("size", ctypes.c_size_t),
        ("type", ctypes.c_long),
    ]


@dataclass(frozen=True)
class Asked:
    """The calls of the runtime since `clear` that cost time.

    Attributes:
        kernels: number of launches by the name of the kernel, which is mangled, or of the product.
        waits: number of waits of the host by their reason. A wait for an event that was recorded before `clear` is
            none: the host waits for what it has asked for earlier.
        copies: number of copies by their direction.
        collectives: collectives in their order, such as "all_reduce float32 4", with their bytes.
    """

    kernels: dict[str, int]
    waits: dict[str, int]
    copies: dict[str, int]
    collectives: list[str]

    @property
    def launches(self) -> int:
        """Number of launches."""
        return sum(self.kernels.values())


def clear() -> None:
    """Clear the log."""
    _library().runtime_clear()


def asked() -> Asked:
    """Return what the runtime was asked to do since `clear`.

    Raises:
        OverflowError: If that is more than the log has room for.
    """
    library = _library()
    if (count := library.runtime_written()) > EVENTS:
        raise OverflowError(f"{count:,} events do not fit the log of {EVENTS:,}")
    kernels, waits, copies = Counter(), Counter(), Counter()
    collectives, recorded = [], set()
    for event in library.runtime_events()[:count]:
        kind = event.kind.decode()
        if kind == "record":
            recorded.add(event.what)
        elif kind == "event" and event.what in recorded:
            waits["event"] += 1
        elif kind == "kernel":
            kernels[_kernel(event.what)] += 1
        elif kind != "event":
            name = ctypes.string_at(event.what).decode()
            if kind == "collective":
                collectives.append(f"{name} {DTYPES[event.type]} {event.size}")
            else:
                {"wait": waits, "copy": copies}.get(kind, kernels)[name] += 1
    return Asked(dict(kernels), dict(waits), dict(copies), collectives)


@cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(None)  # It is preloaded.
    library.runtime_events.restype = ctypes.POINTER(_Event)
    library.runtime_written.restype = ctypes.c_long
    library.runtime_kernel.restype = ctypes.c_char_p
    library.runtime_kernel.argtypes = [ctypes.c_void_p]
    return library


@cache
def _kernel(host: int) -> str:
    return _library().runtime_kernel(host).decode()
