"""The folder of a run, which may be in a bucket (``gs://bucket/run``; any scheme of etils epath).

Orbax writes checkpoints to a bucket by itself. Everything else (manifest, metrics, TensorBoard, the exported model,
reports) needs a file system that can append and rename: it is written to a local folder, from which process 0 uploads
what has changed.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import shutil
import socket
import sys
import tempfile
import time
from pathlib import Path

from etils import epath

from lawcat_jax.errors import UserError

# What a resumed run reads.
_NEEDED = ("manifest.json", "metrics.jsonl")
# What may lie in the folder of a run that has no manifest: what a start that failed, or a lost manifest, leaves; hidden files, what
# a new file system has, and output of the command that was sent there.
_OWN = re.compile(
    r"\..*|lost\+found|.*\.(log|out|err)|metrics\.jsonl|tensorboard|wandb|checkpoints|profile|tokenizer|eval"
    r"|(student|teacher)(\.damaged\d*)?"
)


class Workdir:
    """The folder of a run as a context manager. Write below ``local``; ``name`` is what the user called the folder, which
    differs from ``local`` for a bucket only. On leaving, the rest is uploaded and the local copy of a bucket removed.

    While it is open no other run can open it, on this machine or where it is shared with locks (NFS version 4, Lustre with
    ``flock``). A bucket has no locks: there it is the user who keeps two runs apart.

    Raises:
      UserError: it cannot be made, read, or (when left without another error) written; another run has it open; or it holds
        something else than a run.
    """

    def __init__(self, name: str, *, primary: bool = True, every_seconds: float = 120.0):
        self.name, self._primary, self._every = name.rstrip("/") or name, primary, every_seconds
        if "://" in name and not name.split("://", 1)[1].strip("/"):
            raise UserError(f"--workdir={name}: names no bucket")
        try:
            self._bucket = epath.Path(self.name) if "://" in name else None
        except Exception as problem:  # a scheme that neither etils nor fsspec knows
            raise UserError(f"--workdir={name}: cannot be opened ({_brief(problem)})") from problem
        self._sent: dict[Path, tuple[int, int]] = {}
        self._last = time.monotonic()
        self._lock: int | None = None
        if self._bucket is None:
            self.local = Path(name)
            try:
                self.local.mkdir(parents=True, exist_ok=True)
            except OSError as problem:
                raise UserError(f"--workdir={name}: cannot be created ({problem.strerror})") from problem
            if primary:
                _refuse_strangers(self.local, name)
                self._lock = lock(self.local, f"--workdir={name}")
            return
        self.local = Path(tempfile.mkdtemp(prefix="lawcat_jax-"))
        try:
            if primary and self._bucket.exists():
                _refuse_strangers(self._bucket, name)
            for file in _NEEDED:
                if (self._bucket / file).exists():
                    (self.local / file).write_bytes((self._bucket / file).read_bytes())
        except Exception as problem:  # of whatever library serves the scheme
            shutil.rmtree(self.local, ignore_errors=True)
            if isinstance(problem, UserError):
                raise
            hint = "; pip install gcsfs" if isinstance(problem, ImportError) and name.startswith("gs://") else ""
            raise UserError(f"--workdir={name}: cannot be read ({_brief(problem)}){hint}") from problem

    def child(self, name: str) -> str:
        """Path or address of something in the folder."""
        return f"{self.name}/{name}" if self._bucket is not None else str(self.local / name)

    def sync(self, *, now: bool = False) -> None:
        """Upload what has changed, if the last time was ``every_seconds`` ago or with ``now``. After a failure it is tried
        again later; only a failure on leaving the folder is an error.
        """
        if self._bucket is None or not self._primary or (not now and time.monotonic() - self._last < self._every):
            return
        try:
            self._upload()
        except Exception as problem:
            print(f"{self.name}: not uploaded, trying again later ({_brief(problem)})", file=sys.stderr, flush=True)
        self._last = time.monotonic()

    def _upload(self) -> None:
        assert self._bucket is not None  # sync() has asked
        # The manifest comes last: when it says "finished", all that it speaks of is there.
        files = [path for path in self.local.rglob("*") if path.is_file() and not path.name.startswith(".")]
        for path in sorted(files, key=lambda path: (path.name == "manifest.json", path)):
            status = path.stat()
            mark = (status.st_size, status.st_mtime_ns)
            if self._sent.get(path) == mark:
                continue
            target = self._bucket / path.relative_to(self.local).as_posix()
            target.parent.mkdir(parents=True, exist_ok=True)
            with path.open("rb") as source, target.open("wb") as out:
                shutil.copyfileobj(source, out, 16 << 20)
            self._sent[path] = mark

    def __enter__(self) -> Workdir:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if self._bucket is None:
            unlock(self._lock)
            self._lock = None
            return
        try:
            if self._primary:
                self._upload()
        except Exception as problem:
            text = f"--workdir={self.name}: cannot be written ({_brief(problem)}); what is missing there is in {self.local}"
            if kind is None:
                raise UserError(text) from problem
            print(text, file=sys.stderr, flush=True)
            return
        shutil.rmtree(self.local, ignore_errors=True)


def _refuse_strangers(folder: Path | epath.Path, name: str) -> None:
    """Refuse a folder without a manifest that holds what no run leaves."""
    try:
        found = sorted(path.name.rstrip("/") for path in folder.iterdir())
    except OSError as problem:
        raise UserError(f"--workdir={name}: cannot be read ({problem.strerror or problem})") from problem
    strangers = [each for each in found if not _OWN.fullmatch(each)]
    if strangers and "manifest.json" not in found:
        more = f" and {len(strangers) - 3} more" if len(strangers) > 3 else ""
        raise UserError(
            f"--workdir={name}: the folder holds no run, but {', '.join(strangers[:3])}{more}; name a new or an empty folder"
        )


def lock(folder: Path, what: str) -> int | None:
    """Keep other runs out of ``folder`` until :func:`unlock`, or until this process ends in whatever way.

    Returns what :func:`unlock` takes; None where the file system has no locks.

    Raises:
      UserError: another process has it; the message begins with ``what`` and names the process.
    """
    path = folder / ".lock"
    try:
        # Never removed: a process that has it open would hold a lock on a file that others no longer find.
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError:  # a folder that cannot be written: whoever writes to it says so
        return None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as problem:
        owner = os.read(handle, 200).decode(errors="replace").strip()
        os.close(handle)
        if problem.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            return None
        raise UserError(
            f"{what}: another run is at work in it ({owner or 'unknown process'}); wait for it, end it, or use another "
            "--workdir"
        ) from None
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
    except OSError:  # a full disk: the lock holds all the same
        pass
    return handle


def unlock(handle: int | None) -> None:
    """Let go of what :func:`lock` returned."""
    if handle is not None:
        os.close(handle)


def _brief(problem: Exception) -> str:
    return " ".join(str(problem).split())[:200] or type(problem).__name__
