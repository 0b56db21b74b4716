"""The limit on open files, which an error of any library may come from."""

import errno
import os
import resource

_TEXTS = (os.strerror(errno.EMFILE), os.strerror(errno.ENFILE), "items of ancdata")  # the last one is multiprocessing's


def hits_file_limit(error: object) -> bool:
    """Return whether an error says that too many files are open; libraries wrap it in errors of many kinds."""
    return any(text in str(error) for text in _TEXTS)


def file_limit() -> str:
    """Return the limit on open files and the way to raise it, for messages."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return (
        f"the limit is {limit:,} files (ulimit -n): raise it with `ulimit -n {max(4096, 4 * limit)}`, in a container "
        "with `docker run --ulimit nofile=...`, or use fewer workers"
    )


def require_spare_files(number: int) -> None:
    """Raise if this process could not open `number` more files.

    Raises:
        OSError: With the error number EMFILE.
    """
    try:
        opened = len(os.listdir("/proc/self/fd"))
    except FileNotFoundError:  # not Linux
        return
    if opened + number > resource.getrlimit(resource.RLIMIT_NOFILE)[0]:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
