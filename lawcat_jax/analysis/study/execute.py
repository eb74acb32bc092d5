"""Commands side by side on the devices of one machine, as processes of their own, until all are done or time is up."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lawcat_jax.analysis.study.ledger import FAILED, FINISHED, INTERRUPTED, Ledger
from lawcat_jax.analysis.study.plan import Job
from lawcat_jax.errors import UserError
from lawcat_jax.files import read_json
from lawcat_jax.runtime.programs import SWITCH
from lawcat_jax.training.workdir import lock, unlock

EXIT_INTERRUPTED = os.EX_TEMPFAIL  # of a command that has saved and wants to be run again
GRACE_SECONDS = 40.0
"""What a child gets to save in, before it is killed."""
MEMORY_SHARE = 0.92
"""Of a device's memory, what all runs on it may take together; the rest is for CUDA's contexts."""
_POLL_SECONDS = 0.1
_LOCK_SECONDS = 90.0
_STOP = (-signal.SIGTERM, -signal.SIGKILL, -signal.SIGINT, 128 + signal.SIGTERM, EXIT_INTERRUPTED)


def _say(line: str) -> None:
    print(line, flush=True)


@dataclasses.dataclass(frozen=True)
class Slot:
    """A place for one job at a time: a share of a device, or (``device`` None) whatever jax finds."""

    device: str | None
    share: float = 1.0

    def environment(self, output: Path, environ: Mapping[str, str]) -> dict[str, str]:
        """The variables of a job in it. All jobs keep compiled programs in one folder, unless the user names another."""
        values = dict(environ)
        values.setdefault(SWITCH, str(output / "programs"))
        if self.device is not None:
            values["CUDA_VISIBLE_DEVICES"] = self.device
            values.pop("XLA_CLIENT_MEM_FRACTION", None)  # its newer name; jax refuses both together
            values["XLA_PYTHON_CLIENT_MEM_FRACTION"] = f"{MEMORY_SHARE * self.share:.3f}"
        return values


def make_slots(devices: Sequence[str], runs_per_device: int) -> list[Slot]:
    """The slots of the named devices, taken in turn, so that the first jobs are spread over all of them; without devices a
    single one.

    Raises:
      UserError: several runs on devices that are not named, or a device that is named twice.
    """
    if runs_per_device < 1:
        raise UserError(f"--runs_per_device={runs_per_device}: at least 1")
    if not devices:
        if runs_per_device > 1:
            raise UserError("--runs_per_device: name the devices that runs are to share (--devices=0,1)")
        return [Slot(None)]
    if len(set(devices)) < len(devices):
        raise UserError(f"--devices={','.join(devices)}: a device is named twice; see --runs_per_device")
    return [Slot(device, 1 / runs_per_device) for _ in range(runs_per_device) for device in devices]


@dataclasses.dataclass
class Outcome:
    """Names of jobs by what became of them; ``left`` are those that did not begin, or not end."""

    finished: list[str] = dataclasses.field(default_factory=list)
    failed: list[str] = dataclasses.field(default_factory=list)
    blocked: list[str] = dataclasses.field(default_factory=list)
    left: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class _Child:
    job: Job
    slot: Slot
    process: subprocess.Popen
    log: Path
    start: float


class Stop:
    """Why to stop, "" as long as there is no reason: a signal (SIGTERM, SIGINT), or that ``seconds`` have passed since
    ``start`` (of ``time.monotonic``). A context manager that has the signals while it is entered."""

    def __init__(self, start: float, seconds: float | None):
        self._end = None if seconds is None else start + seconds
        self._seconds = seconds
        self._signal = ""
        self._old: dict[int, Any] = {}

    def __enter__(self) -> Stop:
        if threading.current_thread() is threading.main_thread():
            self._old = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _note(self, number: int, _: Any) -> None:
        self._signal = signal.Signals(number).name

    @property
    def reason(self) -> str:
        """Why everything is to end now."""
        if not self._signal and self._end is not None and time.monotonic() >= self._end:
            return "time is up"
        return self._signal

    @property
    def soon(self) -> bool:
        """Whether so little time is left that nothing should begin: less than a minute, or a tenth of all of it."""
        if self._end is None or self._seconds is None:
            return bool(self.reason)
        return bool(self.reason) or time.monotonic() > self._end - min(60.0, 0.1 * self._seconds)


def execute(
    jobs: Sequence[Job],
    ledger: Ledger,
    slots: Sequence[Slot],
    *,
    output: Path,
    stop: Stop,
    held: int | None = None,
    echo: Callable[[str], None] = _say,
) -> Outcome:
    """Run the jobs that are not finished, each when what it waits for is, the first ones first; those that failed before
    come last.

    Whether an unfinished job may go on with what it finds, its own command decides; one that finished with other settings
    counts as failed. A job that fails holds up those that wait for it and no other. When ``stop`` has a reason, children are told to save
    and end (SIGTERM). One line is printed for each start and end. The output of a job goes to ``<output>/logs``. ``held``
    is what :func:`alone` gave.

    Raises:
      UserError: the folder cannot be written.
    """
    outcome = Outcome()
    to_do = {job.name for job in ledger.left(jobs)}
    waiting = [job for job in jobs if job.name in to_do]
    for job in [job for job in jobs if job.name not in to_do]:
        if changed := ledger.changed(job):
            outcome.failed.append(job.name)
            echo(
                f"{_clock()} refused  {job.name}: it finished with other settings ({_listed(changed)}); use another --output"
            )
        else:
            outcome.finished.append(job.name)
    waiting.sort(key=lambda job: ledger.status(job) == FAILED)
    children: list[_Child] = []
    free = list(slots)
    while waiting or children:
        for child in [child for child in children if child.process.poll() is not None]:
            children.remove(child)
            free.insert(0, child.slot)
            _ended(child, ledger, outcome, bool(stop.reason), echo)
        if reason := stop.reason:
            echo(f"{_clock()} {reason}: {len(children)} running job(s) save and end")
            for child in _end_all(children):
                _ended(child, ledger, outcome, True, echo)
            children = []
            break
        dead = {*outcome.failed, *outcome.blocked}
        for job in [job for job in waiting if dead.intersection(job.after)]:
            waiting.remove(job)
            outcome.blocked.append(job.name)
            dead.add(job.name)
        ready = [job for job in waiting if set(job.after) <= set(outcome.finished)]
        if stop.soon:
            ready = []
        while ready and free:
            job = ready.pop(0)
            waiting.remove(job)
            children.append(_start(job, free.pop(0), output, ledger, held, echo))
        if not children and (stop.soon or not ready):
            break
        time.sleep(_POLL_SECONDS)
    outcome.left += [job.name for job in waiting]
    return outcome


def _start(job: Job, slot: Slot, output: Path, ledger: Ledger, held: int | None, echo: Callable[[str], None]) -> _Child:
    log = output / "logs" / f"{job.name}.log"
    ledger.begin(job)
    try:
        _put_aside(job)
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as out:
            out.write(f"$ {job.text}\n".encode())
            out.flush()
            process = subprocess.Popen(
                job.command,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env=slot.environment(output, os.environ),
                start_new_session=True,  # Ctrl-C is for the study, which then ends its children
                pass_fds=() if held is None else (held,),
                preexec_fn=_end_with_parent,
            )
    except OSError as problem:
        raise UserError(f"{job.name} cannot be started: {problem.strerror or problem}") from problem
    where = "" if slot.device is None else f" on device {slot.device}"
    echo(f"{_clock()} start    {job.name}{where}")
    return _Child(job, slot, process, log, time.monotonic())


def _put_aside(job: Job) -> None:
    """A finished run whose folder came here without its model and without checkpoints, which are large, begins anew: the
    folder becomes ``<name>.incomplete``."""
    folder = job.workdir
    if folder is None or not (folder / "manifest.json").is_file() or (folder / "checkpoints").exists():
        return
    if all(path.exists() for path in job.products) or read_json(folder / "manifest.json").get("status") != FINISHED:
        return
    names = (folder.with_name(f"{folder.name}.incomplete{number or ''}") for number in itertools.count())
    folder.rename(next(name for name in names if not name.exists()))


def _ended(child: _Child, ledger: Ledger, outcome: Outcome, stopped: bool, echo: Callable[[str], None]) -> None:
    job, code = child.job, child.process.returncode
    minutes = (time.monotonic() - child.start) / 60
    told = f"{_clock()} {{}} {job.name} after {minutes:.1f} min"
    missing = [path for path in job.products if not path.exists()]
    if code == 0 and not missing:
        ledger.end(job, FINISHED, minutes)
        outcome.finished.append(job.name)
        echo(told.format("finished"))
    elif code == EXIT_INTERRUPTED or (stopped and code in _STOP):
        ledger.end(job, INTERRUPTED, minutes)
        outcome.left.append(job.name)
        echo(told.format("stopped "))
    else:
        ledger.end(job, FAILED, minutes)
        outcome.failed.append(job.name)
        why = f"exit code {code}: {_last_line(child.log)}" if code else f"{missing[0]} was not written"
        echo(f"{told.format('FAILED  ')}, {why} (all of it: {child.log})")


def _end_all(children: Sequence[_Child]) -> Iterator[_Child]:
    """Tell all to save and end; each is given back once it has ended."""
    for child in children:
        child.process.terminate()
    deadline = time.monotonic() + GRACE_SECONDS
    for child in children:
        try:
            child.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(child.process.pid, signal.SIGKILL)  # with the processes that prepare its data
            child.process.wait()
        yield child


@contextlib.contextmanager
def alone(output: Path, echo: Callable[[str], None] = _say) -> Iterator[int | None]:
    """The lock of a study's folder, created when missing. Children inherit it: after a study that was killed, it is free when
    they have saved, for which this waits.

    Raises:
      UserError: another study is at work in the folder, or it cannot be created.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        raise UserError(f"--output={output}: cannot be created ({problem.strerror})") from problem
    deadline, said = time.monotonic() + _LOCK_SECONDS, False
    while True:
        try:
            held = lock(output, f"--output={output}")
            break
        except UserError as problem:
            if time.monotonic() > deadline:
                raise UserError(str(problem).replace("--workdir", "--output")) from None
            if not said:
                echo(f"{_clock()} waiting for another study in {output}, or for what a killed one has left")
                said = True
            time.sleep(0.5)
    try:
        yield held
    finally:
        unlock(held)


def _end_with_parent() -> None:
    """In a child, before its program begins: SIGTERM when the study dies, however it does (Linux)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _last_line(log: Path) -> str:
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - 4096))
        lines = [line.strip() for line in stream.read().decode(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else "no output"


def _listed(items: Sequence[str]) -> str:
    return "; ".join(items[:4]) + ("; ..." if len(items) > 4 else "")


def _clock() -> str:
    return time.strftime("%H:%M:%S")
