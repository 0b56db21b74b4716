"""Download of model files from the Hugging Face Hub into its cache."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

from dualenc.utils.errors import ModelError, warn_once
from dualenc.utils.text import one_line


def hub_folder(spec: str, patterns: Sequence[str]) -> Path:
    """Return a folder with the files of a model on the hub, downloading those that are not in the cache.

    If the revision is a commit hash and its files are in the cache, no request is made. The commit of a branch or tag
    is asked from the hub. If the hub cannot be reached, the last known commit is taken from the cache, and a warning
    names it.

    Args:
        spec: the model spec, `hf-hub:owner/name[@revision]`.
        patterns: glob patterns of the files' names.

    Raises:
        ModelError: If the hub does not have the files, if it cannot be reached and files are missing in the cache, or
            if the cache cannot be written.
    """
    from huggingface_hub import HfApi, constants, get_cached_repo_tree, snapshot_download
    from huggingface_hub.errors import CachedRepoTreeNotFoundError, HTTPError, LocalEntryNotFoundError

    name, _, revision = spec.removeprefix("hf-hub:").partition("@")
    pinned = bool(re.fullmatch("[0-9a-f]{40}", revision))
    download = partial(snapshot_download, name, revision=revision or None, allow_patterns=list(patterns))
    try:
        with _hub_errors_in_one_line(spec, revision):
            if pinned:
                with suppress(CachedRepoTreeNotFoundError, LocalEntryNotFoundError):
                    # Only the cached list of the repository's files shows whether the cache holds all of them.
                    get_cached_repo_tree(name, revision=revision)
                    return Path(download(local_files_only=True))
            # `snapshot_download` falls back to the cache silently if the hub does not answer, so ask the hub first.
            HfApi().model_info(name, revision=revision or None, timeout=constants.HF_HUB_ETAG_TIMEOUT)
            folder = Path(download())
    except (HTTPError, OSError) as error:
        folder = _from_cache(spec, download, error)
        if not pinned:
            warn_once(
                f"{spec}: the hub cannot be reached ({one_line(error)}); using its last known commit from the cache: "
                f"{folder.name}"
            )
    if not folder.is_dir():
        raise ModelError(
            f"{spec}: the repository does not have any of {', '.join(patterns)}, which a model of this kind needs: "
            "correct the name"
        )
    return folder


@contextmanager
def hub_or_cache(what: str) -> Iterator[None]:
    """Let another library load from the hub: where the hub cannot be reached, from its cache alone.

    Without this the hub's client asks for each file again and again, and prints a line each time.

    Args:
        what: weights or spec, for messages.

    Raises:
        ModelError: If the hub cannot be reached, and the files are not in the cache.
    """
    from huggingface_hub import constants, get_session
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except (HTTPError, OSError) as error:
        unreachable = one_line(error)
    else:
        yield
        return
    before, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, True
    try:
        yield
    except Exception as error:  # other libraries put errors of their own around those of the hub's client
        around: BaseException | None = error
        while around is not None and not isinstance(around, LocalEntryNotFoundError | OfflineModeIsEnabled):
            around = around.__cause__ or around.__context__
        if around is None:
            raise
        raise ModelError(
            f"{what}: not all of its files are in the cache {constants.HF_HUB_CACHE}, and the hub at "
            f"{constants.ENDPOINT} cannot be reached ({unreachable}): download it once with a connection"
        ) from None
    finally:
        constants.HF_HUB_OFFLINE = before


@contextmanager
def _hub_errors_in_one_line(spec: str, revision: str) -> Iterator[None]:
    """Turn the hub's refusals into a `ModelError` of one line."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        yield
    except HFValidationError as error:
        raise ModelError(f"{spec} must be hf-hub:owner/name[@revision] ({one_line(error)})") from None
    except RevisionNotFoundError:
        raise ModelError(f"{spec}: the repository has no revision {revision or 'main'!r}: correct it") from None
    except GatedRepoError:
        raise ModelError(f"{spec}: its files are gated: accept its terms on the hub, then `hf auth login`") from None
    except RepositoryNotFoundError:
        raise ModelError(
            f"{spec}: the hub has no such repository, or it is private: correct the name, or `hf auth login`"
        ) from None


def _from_cache(spec: str, download: Callable[..., str], error: Exception) -> Path:
    """Return the folder of the cached files if the error means that the hub cannot be reached.

    Raises:
        ModelError: If the error means something else, or not all files are in the cache.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError

    # An OSError with an errno comes from the disk: the hub's client raises its own OSErrors without one.
    from_network = isinstance(error, HTTPError | ConnectionError | TimeoutError | LocalEntryNotFoundError)
    if isinstance(error, OSError) and error.errno is not None and not from_network:
        raise _unwritable(spec, constants.HF_HUB_CACHE, error) from None
    # No answer at all counts like 503, "service unavailable".
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 503
    # Below 500 the hub answers and refuses, which the cache must not hide; 408 is a timeout, 429 asks to wait.
    if status < 500 and status not in (408, 429):
        raise ModelError(f"{spec} cannot be downloaded from the hub ({one_line(error)})") from None
    try:
        return Path(download(local_files_only=True))
    except LocalEntryNotFoundError:
        raise ModelError(
            f"{spec}: not all of its files are in the cache {constants.HF_HUB_CACHE}, and the hub at "
            f"{constants.ENDPOINT} cannot be reached ({one_line(error)}): download it once with a connection"
        ) from None
    except OSError as broken:
        raise _unwritable(spec, constants.HF_HUB_CACHE, broken) from None


def _unwritable(spec: str, cache: str, error: OSError) -> ModelError:
    """Return the error for a cache that the disk refuses to write."""
    return ModelError(
        f"{spec} cannot be written to the cache {cache} ({one_line(error)}): free space there, or set HF_HUB_CACHE to "
        "another folder"
    )
