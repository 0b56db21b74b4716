"""The lock of a run directory, which keeps a second run out."""

import errno
import fcntl
import json
import os
import platform
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dualenc.utils.text import print_message, reason

NAME = ".lock"
_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)  # of file systems without locks


class RunLock:
    """Lock of the operating system on a run directory. It ends with the process that holds it, even after SIGKILL.

    It is a lock of `flock`. A record lock would end as soon as any code of the process has read and closed the file.
    Processes that this one forks or spawns share the lock without a copy of the descriptor, because workers may outlive
    the process, and the lock with them.

    Args:
        root: the run directory.

    Attributes:
        refusal: why the folder cannot be used; empty if it can, and before `acquire`.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.path = Path(root) / NAME
        self.refusal = ""
        self._file: int | None = None
        self._is_parents = False  # whether the process that started this one holds the lock
        self._made_folder = False

    def acquire(self) -> None:
        """Take the lock, and create the run directory if it is missing; where that fails, set `refusal`.

        A second call does nothing. On a file system without locks, a warning is printed, and the folder can be used.
        """
        while self._file is None and not self.refusal and not self._is_parents:
            self._try_once()

    def _try_once(self) -> None:
        """Take the lock, set `refusal`, or neither if the file is gone, which the run that just ended has removed."""
        try:
            if not self.path.parent.exists():
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._made_folder = True
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            self.refusal = (
                f"trainer.default_root_dir {self.path.parent} cannot be written: {reason(error)}; name another folder"
            )
            return
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                why = f"is in use by {_holder(file)}: let that run end or stop it"
                if error.errno not in (errno.EAGAIN, errno.EACCES):
                    why = f"cannot be locked: {reason(error)}"
                self.refusal = f"{self.path.parent} {why}, or name another folder with --trainer.default_root_dir"
                os.close(file)
                return
            print_message(f"{self.path.parent} is on a file system without locks: nothing keeps a second run out of it")
        with suppress(OSError):
            if os.stat(self.path).st_ino == os.fstat(file).st_ino:
                self._file = file
                os.register_at_fork(after_in_child=self._leave_to_parent)
                self._describe()
                return
        os.close(file)

    def _describe(self) -> None:
        """Write who holds the lock into its file."""
        assert self._file is not None
        about = {
            "process": os.getpid(),
            "host": platform.node(),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        with suppress(OSError):  # a full disk: the lock holds without its text
            os.ftruncate(self._file, 0)
            os.pwrite(self._file, json.dumps(about).encode(), 0)

    def release(self) -> None:
        """Remove the file, which ends the lock, and the folder if it was made for it and nothing else is in it."""
        if self._file is not None:
            with suppress(OSError):
                self.path.unlink()
            os.close(self._file)
            self._file = None
            if self._made_folder:
                with suppress(OSError):
                    self.path.parent.rmdir()

    def _leave_to_parent(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file, self._is_parents = None, True

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for a process that is spawned, which has no copy of the descriptor."""
        return {**vars(self), "_file": None, "_is_parents": self._file is not None or self._is_parents}


def _holder(file: int) -> str:
    """Return the process that holds the lock as text, as it has described itself."""
    try:
        about = json.loads(os.pread(file, 1000, 0))
        return f"process {about['process']} on host {about['host']} since {about['since']}"
    except (OSError, ValueError, KeyError, TypeError):  # it is still empty, or the disk is full
        return "another process"
