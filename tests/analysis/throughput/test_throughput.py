"""The command: one run of its real processes, and what it says when something is missing."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lawcat_jax.analysis.throughput import records, report, run
from lawcat_jax.analysis.throughput.records import Measurement
from lawcat_jax.config import Config
from lawcat_jax.errors import UserError
from tests.analysis.throughput.small import MODEL, get_config

ROOT = Path(__file__).parents[3]


@pytest.mark.slow
def test_the_command_measures_both_sides(tmp_path):
    pytest.importorskip("torch")
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "OMP_NUM_THREADS": "1",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0",
    }
    flags = ["--stages=stage1", "--batch=4", "--length=16", "--steps=1", "--repeats=2", "--warmup=1"]
    command = [sys.executable, "-m", "lawcat_jax.throughput", "--config=tests/analysis/throughput/small.py", *flags]
    command += ["--gla=reference", "--normalisers=widened", f"--out={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "target" not in done.stdout  # the reference is no competitor
    values = json.loads((tmp_path / "throughput.json").read_text())
    ours, peer = values["measurements"]
    assert (ours["side"], ours["devices"], ours["mesh"]["data"], ours["batch"]) == ("jax", 2, 2, 4)
    assert (peer["side"], peer["devices"], peer["batch"]) == ("torch", 1, 2)  # a device's share
    assert ours["trainable"] == peer["trainable"] > 0
    for entry in (ours, peer):
        assert 0 < entry["ms"]["least"] <= entry["ms"]["median"] <= entry["ms"]["most"]
        assert entry["tokens_per_second"] == pytest.approx(entry["batch"] * 16e3 / entry["ms"]["median"])
        assert entry["losses"][0] > 0
    assert ours["memory"]["arguments"] > 0
    assert ours["notes"]["skipped_steps"] == 0
    assert values["comparisons"]["stage1"]["ratio"] > 0
    assert values["versions"]["jax"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["jax_stage1.json", "throughput.json", "torch.json"]


def settled(**changes) -> tuple[Config, run.Options]:
    config, options = get_config(), run.Options(stages=["stage1", "stage2"], **changes)
    run.check(options, config)
    run.settle(config, options, MODEL)
    return config, options


def test_what_there_is_no_time_for_is_recorded(tmp_path, capsys):
    config, options = settled(seconds=1e-6, gla="reference", out=str(tmp_path))
    assert run.Benchmark(config, options).run() == 1
    values = json.loads((tmp_path / "throughput.json").read_text())
    assert [entry["problem"] for entry in values["measurements"]] == ["no time left of --seconds=1e-06"] * 4
    said = capsys.readouterr().out
    for stage in ("stage1", "stage2"):
        assert f"{stage} jax not measured: no time left of --seconds=1e-06" in said
        assert f"{stage} torch not measured: no time left of --seconds=1e-06" in said


@pytest.mark.parametrize(("child", "why"), [("", "no time left of --seconds=60"), ("it was killed", "it was killed")])
def test_what_was_measured_in_part_says_so(child, why, tmp_path, monkeypatch, capsys):
    def half(self, side, name, request):
        entry = Measurement(side, request.stages[0], "form", 2, 24, trainable=7)
        entry.timed([0.1, 0.2] if side == "jax" else [0.1] * 5)
        records.Results(request.results).put(entry)
        return child

    monkeypatch.setattr(run.Benchmark, "_child", half)
    monkeypatch.setattr(run, "_missing", lambda gla: "")
    config, options = settled(out=str(tmp_path), seconds=60)
    assert run.Benchmark(config, options).run() == 0
    said = capsys.readouterr().out
    for stage in ("stage1", "stage2"):
        assert f"{stage} jax (form): 2 of 5 repeats: {why}" in said
    assert ("stage1 torch (form): forms of the peer may be missing: it was killed" in said) == bool(child)
    assert "stage2 torch not measured: " in said


def test_a_peer_that_is_not_installed_is_one_line(tmp_path, monkeypatch, capsys):
    def ours(self, side, name, request):
        entry = Measurement(side, request.stages[0], "", 2, 24, trainable=7)
        entry.timed([0.1])
        records.Results(request.results).put(entry)
        return ""

    monkeypatch.setattr(run.Benchmark, "_child", ours)
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None if name == "fla" else object())
    config, options = settled(out=str(tmp_path))
    assert run.Benchmark(config, options).run() == 0
    output = capsys.readouterr()
    reason = "flash-linear-attention not installed (pip install flash-linear-attention)"
    assert f"stage2: torch not measured: {reason}" in output.out
    assert output.err.splitlines() == [f"torch: {reason}"]


def test_a_process_that_dies_leaves_its_reason(tmp_path, monkeypatch):
    def dies(command, env=None):
        return process([sys.executable, "-c", "raise SystemExit(3)"])

    process = subprocess.Popen
    monkeypatch.setattr(run.subprocess, "Popen", dies)
    config, options = settled(out=str(tmp_path), peer="none")
    assert run.Benchmark(config, options).run() == 1
    values = json.loads((tmp_path / "throughput.json").read_text())
    assert {entry["problem"] for entry in values["measurements"]} == {"its process ended with status 3"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"stages": ["stage3"]}, "--stages: 'stage3' is not one of this configuration's, stage1, stage2"),
        ({"stages": []}, "--config: it enables neither stage1 nor stage2"),
        ({"steps": 0}, "--steps=0: must be at least 1"),
        ({"peer": "tf"}, "--peer=tf: choose one of torch, none"),
        ({"normalisers": ("x",)}, "--normalisers: unknown 'x', known: padded, widened, second_call"),
    ],
)
def test_mistakes(changes, message):
    with pytest.raises(UserError, match=re.escape(message)):
        run.check(run.Options(**{"stages": ["stage1"], **changes}), get_config())


def entry(side: str, ms: float, variant: str = "", **changes) -> Measurement:
    made = Measurement(side, "stage1", variant, 8, 1024, device="NVIDIA H200", trainable=5, **changes)
    if ms:
        made.timed([ms / 1e3] * 3)
    return made


def test_the_fastest_peer_counts_and_devices_count():
    fla = {"notes": {"gla": "fla"}}
    found = [entry("jax", 10, devices=2), entry("torch", 30, "slow", **fla), entry("torch", 12, "fast", **fla)]
    assert report.comparisons(found) == {"stage1": {"ratio": pytest.approx(0.6), "variant": "fast", "target": 1.5}}
    assert "0.60 times the tokens/s a device of PyTorch (fast); target 1.5: missed" in report.text(found, {}, "")
    found[2].trainable = 6
    assert report.comparisons(found)["stage1"] == {"problem": "not comparable: 5 trainable parameters here, 6 there"}


def test_utilisation_of_both_sides_is_counted_alike():
    config, _ = settled()
    ours, peer = entry("jax", 10, mfu=0.25), entry("torch", 10)
    report.add_utilization([ours, peer], config)
    assert ours.mfu == 0.25
    assert 0 < peer.mfu < 1
