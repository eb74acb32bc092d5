"""Samples made in other processes: the same batches, and nothing left behind."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from lawcat_jax.config import DataConfig, MixtureSource
from lawcat_jax.data.pipeline import make_dataset
from lawcat_jax.data.sample_processes import SampleProcesses
from lawcat_jax.data.sources import GeneratedSource
from lawcat_jax.errors import UserError
from lawcat_jax.training.identity import refuse_other_config
from tests.data import tokenizers as small

MIXED = DataConfig(
    kind="mixture",
    mixture=(
        MixtureSource(kind="passkey", wording="varied", weight=0.5),
        MixtureSource(kind="niah", wording="varied", weight=0.5),
    ),
    num_samples=40,
)


def _iterator(data):
    return iter(make_dataset(data, small.byte_level(), seq_length=400, batch_size=4, seed=0))


def test_batches_do_not_depend_on_where_samples_are_made():
    here, apart = _iterator(MIXED), _iterator(dataclasses.replace(MIXED, num_processes=2))
    for _ in range(3):
        expected, found = next(here), next(apart)
        assert apart.get_state() == here.get_state()  # a run goes on with another number of processes
        assert expected.keys() == found.keys()
        assert all(np.array_equal(expected[name], found[name]) for name in expected)


def test_a_dead_worker_is_one_line_and_a_mistake_of_a_generator_its_own():
    data = DataConfig(passkey_words=60, num_samples=4)
    tokenizer = small.byte_level()
    source = GeneratedSource(data, tokenizer, seq_length=400, seed=0, split="train")
    short = GeneratedSource(data, tokenizer, seq_length=20, seed=0, split="train")
    processes = SampleProcesses(tokenizer, 1)
    remote = processes.of(source)
    assert np.array_equal(remote.document(1).tokens, source.document(1).tokens)
    with pytest.raises(UserError, match="seq_length 20 is too short"):
        processes.of(short).document(0)
    for worker in processes._pool._processes.values():
        os.kill(worker.pid, signal.SIGTERM)  # ignored: the run decides what to save
    assert np.array_equal(remote.document(2).tokens, source.document(2).tokens)
    for worker in processes._pool._processes.values():
        os.kill(worker.pid, signal.SIGKILL)
    with pytest.raises(UserError, match=r"data\.num_processes: one of the 1 processes"):
        remote.document(3)


def test_workers_and_processes_may_change_between_a_stop_and_its_resume():
    old = {"stage1": {"data": {"kind": "passkey", "num_workers": 4}}}
    refuse_other_config(old, {"stage1": {"data": {"kind": "passkey", "num_workers": 0, "num_processes": 8}}}, "runs/a")
    with pytest.raises(UserError, match=r"config\.stage1\.data\.kind"):
        refuse_other_config(old, {"stage1": {"data": {"kind": "niah", "num_workers": 4}}}, "runs/a")


@pytest.mark.slow
def test_workers_end_with_a_parent_that_was_killed(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        "from tests.data.test_sample_processes import *\n"
        "if __name__ == '__main__':\n"
        "    tokenizer = small.byte_level()\n"
        "    processes = SampleProcesses(tokenizer, 2)\n"
        "    data = DataConfig(passkey_words=60, num_samples=4)\n"
        "    processes.of(GeneratedSource(data, tokenizer, seq_length=400, seed=0, split='train')).document(0)\n"
        "    print(*processes._pool._processes, flush=True)\n"
        "    time.sleep(60)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": os.getcwd()}
    )
    workers = [int(word) for word in parent.stdout.readline().split()]
    assert workers
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 20
    while (alive := [pid for pid in workers if os.path.exists(f"/proc/{pid}")]) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not alive
