"""Files of models on the Hugging Face Hub, fetched into its cache."""

import logging
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache, partial
from pathlib import Path

from dualenc.utils.errors import ModelError
from dualenc.utils.text import one_line


def hub_folder(spec: str, patterns: Sequence[str]) -> Path:
    """The files of `hf-hub:owner/name[@revision]` that fit the patterns, fetched where they are not here yet.

    A commit hash that was fetched before is served from the cache, and the hub is not asked. A branch or tag is looked
    up; where the hub cannot be reached, the commit that it was last is taken, and a line of the log says which.

    Raises:
        ModelError: the hub has them not, or cannot be reached and not all of them are in the cache, or the cache cannot
            be written.
    """
    from huggingface_hub import HfApi, constants, get_cached_repo_tree, snapshot_download
    from huggingface_hub.errors import CachedRepoTreeNotFoundError, HTTPError, LocalEntryNotFoundError

    name, _, revision = spec.removeprefix("hf-hub:").partition("@")
    pinned = bool(re.fullmatch("[0-9a-f]{40}", revision))
    get = partial(snapshot_download, name, revision=revision or None, allow_patterns=list(patterns))
    try:
        with _refusals(spec, revision):
            if pinned:
                with suppress(CachedRepoTreeNotFoundError, LocalEntryNotFoundError):
                    get_cached_repo_tree(name, revision=revision)  # without it none can tell a part of them from all
                    return Path(get(local_files_only=True))
            # Asked here, since `snapshot_download` takes what is in the cache without a word where the hub is silent.
            HfApi().model_info(name, revision=revision or None, timeout=constants.HF_HUB_ETAG_TIMEOUT)
            folder = Path(get())
    except (HTTPError, OSError) as error:
        folder = _from_cache(spec, get, error)
        if not pinned:
            _warn(
                f"{spec}: the hub cannot be reached ({one_line(error)}); taken from the cache as it last was: "
                f"commit {folder.name}"
            )
    if not folder.is_dir():
        raise ModelError(f"{spec}: the repository has none of {', '.join(patterns)}: it is no model of this kind")
    return folder


@contextmanager
def _refusals(spec: str, revision: str) -> Iterator[None]:
    """Turns a refusal of the hub into one line."""
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
        raise ModelError(
            f"{spec}: it is for those who accepted its terms: accept its terms on the hub first, and `hf auth login`"
        ) from None
    except RepositoryNotFoundError:
        raise ModelError(
            f"{spec}: the hub has no such repository, or not for you: correct the name, or `hf auth login`"
        ) from None


def _from_cache(spec: str, get: Callable[..., str], error: Exception) -> Path:
    """The files as they are in the cache, where the error says that the hub is silent.

    Raises:
        ModelError: the error says something else, or not all files are there.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalEntryNotFoundError

    # What the hub's client says of the hub by an OSError of its own has no number.
    far = isinstance(error, HTTPError | ConnectionError | TimeoutError | LocalEntryNotFoundError)
    if isinstance(error, OSError) and error.errno is not None and not far:
        raise _unwritable(spec, constants.HF_HUB_CACHE, error) from None
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 503
    if status < 500 and status not in (408, 429):  # an answer, and no sign of a hub in trouble
        raise ModelError(f"{spec} cannot be had from the hub ({one_line(error)})") from None
    try:
        return Path(get(local_files_only=True))
    except LocalEntryNotFoundError:
        raise ModelError(
            f"{spec}: not all of its files are in the cache {constants.HF_HUB_CACHE}, and the hub at "
            f"{constants.ENDPOINT} cannot be reached ({one_line(error)}): fetch it once where it can be"
        ) from None
    except OSError as broken:
        raise _unwritable(spec, constants.HF_HUB_CACHE, broken) from None


def _unwritable(spec: str, cache: str, error: OSError) -> ModelError:
    return ModelError(
        f"{spec} cannot be written to the cache {cache} ({one_line(error)}): make room there, or name another by "
        "HF_HUB_CACHE"
    )


@cache
def _warn(line: str) -> None:
    """Once a process: a model is opened several times before it is loaded."""
    logging.getLogger("dualenc").warning("%s", line)
