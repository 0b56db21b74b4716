"""The command that serves a model or an index: a plain function, parsed by `dualenc.cli.parser`."""

import math
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from dualenc.cli.common import UsageError

if TYPE_CHECKING:
    from dualenc.search.service.core import Service


def serve(
    source: str,
    model: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key_file: Path | None = None,
    max_batch: int = 32,
    wait_ms: float = 5,
    max_body: float = 16,
) -> None:
    """Serve an index with a page to search it, or a model, over HTTP.

    Args:
        source: folder of `dualenc build-search`; a model directory, run directory, text model,
            hf-hub:owner/name[@revision] or open_clip:ARCH/PRETRAINED; or a folder of `dualenc export --format onnx`,
            which is served without torch.
        model: the model of the index, if it was moved since the index was built.
        host: name or address of the interface to listen on; 0.0.0.0 for all, so that other machines reach the server.
        port: port to listen on; 0 for a free one.
        api_key_file: file with a key on each line: every request must have one of them, except for the page and
            /health.
        max_batch: texts and pictures of waiting requests that are embedded together.
        wait_ms: milliseconds for which a request waits for others.
        max_body: largest request in MiB.
    """
    _check(port, max_batch, wait_ms, max_body)
    if missing := [name for name in ("starlette", "uvicorn") if find_spec(name) is None]:
        raise UsageError(f"dualenc serve needs {' and '.join(missing)}: pip install 'dualenc[serve]'")
    from dualenc.search.service.core import MIB, Limits
    from dualenc.search.service.opening import open_service, read_keys
    from dualenc.search.service.server import address_of, bind, build_server, names_of, run

    keys = [] if api_key_file is None else read_keys(api_key_file)
    limits = Limits(max_batch=max_batch, wait_ms=wait_ms, max_body=round(max_body * MIB))
    with bind(host, port) as bound, open_service(source, limits, model) as service:
        hosts = names_of(host, bound)
        lines = _greeting(service, address_of(bound), bool(hosts), bool(keys))
        run(build_server(service, hosts, keys), bound, lambda: print("\n".join(lines), flush=True))
    print("stopped", flush=True)


def _check(port: int, max_batch: int, wait_ms: float, max_body: float) -> None:
    """Refuse numbers outside of their ranges."""
    ranges = {"port": (port, 0, 65535), "max-batch": (max_batch, 1, 4096), "wait-ms": (wait_ms, 0, 1000)}
    for name, (value, low, high) in {**ranges, "max-body": (max_body, 0.001, 1024)}.items():
        if not math.isfinite(value) or not low <= value <= high:
            raise UsageError(f"--{name} is {value:g}: it must be from {low:g} to {high:g}")


def _greeting(service: "Service", address: str, loopback: bool, keys: bool) -> list[str]:
    """Return what the command prints once the server listens."""
    engine, index = service.engine, service.index
    lines = [f"model {engine.name}, fingerprint {engine.fingerprint}, {engine.dims} dimensions"]
    if index is not None:
        lines.append(f"index {service.name}: {len(index):,} {'pictures' if index.kind == 'images' else 'texts'}")
        lines.append(f"open {address}")
    else:
        lines.append(f"listening on {address}: POST /v1/embeddings and /classify, GET /health")
    if keys:
        lines.append("a key of --api-key-file is needed: Authorization: Bearer KEY")
    elif loopback:
        lines.append("no key is needed; only programs of this machine reach the server")
    else:
        lines.append("no key is needed: all who reach this address can search and embed; --api-key-file asks for one")
    return [*lines, "Ctrl-C stops it"]
