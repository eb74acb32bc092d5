"""A sweep over meshes: its rows, what is refused before anything runs, and what a row without numbers says."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from lawcat_jax.analysis.throughput import jax_side, meshes, prediction, records, run, sweep
from lawcat_jax.analysis.throughput.records import Measurement
from lawcat_jax.config import to_dict
from lawcat_jax.errors import UserError
from lawcat_jax.runtime import chips
from tests.analysis.throughput.small import MODEL, get_config

ROOT = Path(__file__).parents[3]
MESHES = "data=1;data=2;sequence=4;data=16"
DEVICES = [{"id": number, "kind": "NVIDIA H100 80GB HBM3"} for number in range(8)]


def jobs(text: str, programs: tuple[str, ...] = ("stage1", "stage2", "prefill"), **sizes) -> list[meshes.Job]:
    return meshes.jobs(meshes.parse(text), list(programs), get_config(), MODEL, **sizes)


def sizes(text: str, **options) -> list[tuple[str, int, int]]:
    return [(job.program, job.batch, job.length) for job in jobs(text, ("stage1", "prefill"), **options)]


def test_every_device_gets_as_many_tokens_as_on_the_first_mesh():
    found = sizes("data=1;fsdp=2,tensor=2;sequence=4", batch=3, length=48)
    assert found == [("stage1", 3, 48), ("prefill", 1, 48)] + [("stage1", 12, 48), ("prefill", 4, 48)] + [
        ("stage1", 12, 48), ("prefill", 1, 192)
    ]  # fmt: skip
    named = sizes("data=2,batch=4,prefill_length=32;sequence=4,prefill_length=64;data=4,length=96")
    assert named == [("stage1", 4, 24), ("prefill", 2, 32), ("stage1", 8, 24), ("prefill", 1, 64)] + [
        ("stage1", 8, 96), ("prefill", 4, 32)
    ]  # fmt: skip
    (job,) = jobs("fsdp=2,tensor=2", ("stage2",), batch=2)
    assert (job.config.mesh.data, job.config.mesh.fsdp, job.config.mesh.tensor) == (1, 2, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data=1;model=2", "--mesh_sweep: 'model=2' is not one of data, fsdp, tensor, sequence, batch"),
        ("", "--mesh_sweep: '' is not one of data"),
        ("data=-1", "--mesh_sweep: 'data=-1' must be a whole number of at least 1"),
        ("data=2;data=1", "--mesh_sweep: data=2 stands first and so must be the smallest"),
        ("tensor=1;fsdp=2,tensor=4", "--mesh_sweep: fsdp=2,tensor=4: config.mesh.tensor: 4 does not divide the 2 key-"),
        ("data=3", "--mesh_sweep: data=3: config.stage1.batch_size: 2 in 1 micro-batch(es) does not split over data x"),
        ("tensor=2,batch=3;data=3", "data=3: 3 of tensor=2,batch=3 become 4.5 here; give batch=... in this mesh"),
        ("sequence=5", "config.stage1.seq_length: config.mesh.sequence=5 does not divide 24"),
        ("sequence=4,prefill_length=30", "prefill_length: sequence=4 does not divide 30"),
    ],
)
def test_mistakes_are_one_line_before_anything_runs(text, message, monkeypatch):
    monkeypatch.setattr(sweep.installation, "run_probe", lambda: pytest.fail("something has run"))
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        sweep.sweep(get_config(), run.Options(), text, "auto")
    assert "\n" not in str(caught.value)


def test_other_mistakes(monkeypatch):
    with pytest.raises(UserError, match="--predict=h300: choose one of auto, none, v4"):
        sweep.sweep(get_config(), run.Options(), "data=1", "h300")
    with pytest.raises(UserError, match="--stages: prefill is measured by --mesh_sweep only"):
        run.benchmark(get_config(), run.Options(stages=["prefill"]))
    monkeypatch.setattr(sweep.installation, "run_probe", lambda: {"error": "jax finds no device: x"})
    with pytest.raises(UserError, match=r"jax finds no device: x; python -m lawcat_jax\.doctor says more"):
        sweep.sweep(get_config(), run.Options(), "data=1", "auto")


class Children:
    """In the place of ``run.run_child``: speeds by mesh and program, a prediction for all of them."""

    def __init__(self, stop_after: int = 100, cut: int = 0):
        self.calls, self._stop_after, self.cut = [], stop_after, cut

    def __call__(self, module, path, request, environment=None):
        config, (program,) = request.settings(), request.stages
        self.calls.append((module, request.devices, program))
        if len(self.calls) > self._stop_after:
            raise KeyboardInterrupt
        if module == "prediction":
            report = {"program": program, "peak_bytes": 4 * 2**30, "fits": True, "problem": "", "seconds": [0.1, 0.4]}
            Path(request.results).write_text(json.dumps({"reports": [report | {"mfu": [0.8, 0.2]}]}))
            return ""
        entry = Measurement("jax", program, "", request.batch[program], request.length[program], peak_bytes=5 * 2**30)
        if (request.devices, program) == (2, "prefill"):
            entry.problem = "out of memory: 9 GiB"
        else:
            down = (request.devices, program) == (4, "prefill")  # the link, after the first repeat
            entry.timed([0.5 if config.mesh.sequence > 1 else 0.25] * (1 if down else request.repeats - self.cut))
            entry.problem = "the link is down" if down else ""
        records.Results(request.results).put(entry)
        return "its process ended with status 1" if entry.problem else ""


def swept(tmp_path, monkeypatch, children, predict="auto", **options) -> sweep.Sweep:
    monkeypatch.setattr(run, "run_child", children)
    settings = run.Options(out=str(tmp_path), command="the command", **options)
    return sweep.Sweep(get_config(), settings, jobs(MESHES, ("stage1", "prefill")), DEVICES, predict)


def written(tmp_path) -> dict:
    return json.loads((tmp_path / "mesh_sweep.json").read_text())


def test_rows_with_and_without_numbers(tmp_path, monkeypatch, capsys):
    children = Children()
    assert swept(tmp_path, monkeypatch, children).run() == 1  # a prefill failed for which there are devices
    assert [call for call in children.calls if call[1] == 16] == [
        ("prediction", 16, "stage1"),
        ("prediction", 16, "prefill"),
    ]
    values = written(tmp_path)
    rows = {(row["text"], row["program"]): row for row in values["rows"]}
    assert values["machine"] == {"devices": 8, "kind": "NVIDIA H100 80GB HBM3"}
    assert rows["data=2", "prefill"]["problem"] == "not measured: out of memory: 9 GiB"
    assert rows["data=16", "stage1"]["problem"] == "not run: 16 devices, this machine has 8"
    assert rows["data=16", "stage1"]["predicted"]["peak_bytes"] == 4 * 2**30
    assert rows["data=1", "stage1"]["efficiency"] == 1
    assert rows["data=2", "stage1"]["efficiency"] == pytest.approx(1)
    assert rows["sequence=4", "stage1"]["efficiency"] == pytest.approx(0.5)
    assert rows["sequence=4", "prefill"]["against"] == "data=1"
    assert rows["sequence=4", "prefill"]["problem"] == "1 of 5 repeats: the link is down"
    assert rows["data=1", "stage1"]["ratios"] == {"bytes": 1.25, "seconds": [2.5, 0.625], "inside": True}
    assert rows["sequence=4", "stage1"]["ratios"]["inside"] is False
    text = (tmp_path / "mesh_sweep.md").read_text()
    assert "| sequence=4 | 4 | stage1 | 8 x 24 | 500.00 | 100 to 400 (1.25, OUTSIDE) | 384 | 50.0% | 100.0% |" in text
    assert "| 5 | - | 4 (1.25) |" in text
    assert "* data=16, prefill: not run: 16 devices, this machine has 8" in text
    assert "data=2, prefill: not measured: out of memory: 9 GiB" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mesh_sweep.json", "mesh_sweep.md"]


def test_an_interrupted_sweep_keeps_what_it_has(tmp_path, monkeypatch):
    with pytest.raises(KeyboardInterrupt):
        swept(tmp_path, monkeypatch, Children(stop_after=1)).run()
    first, second, *_ = written(tmp_path)["rows"]
    assert first["measured"]["ms"]["median"] == 250
    assert second["problem"] == "not run: the sweep has not come to it"
    assert "| data=1 | 1 | stage1 | 2 x 24 | 250.00 |" in (tmp_path / "mesh_sweep.md").read_text()


def test_predictions_for_other_devices_are_not_compared(tmp_path, monkeypatch):
    swept(tmp_path, monkeypatch, Children(), predict="h200").run()
    row = written(tmp_path)["rows"][0]
    assert row["predicted"]
    assert row["ratios"] == {}
    assert row["predicted_efficiency"] == 1
    swept(tmp_path, monkeypatch, Children(), predict="none").run()
    assert {row["prediction_problem"] for row in written(tmp_path)["rows"]} == {"not asked for"}


def test_no_time_left(tmp_path, monkeypatch):
    children = Children()
    assert swept(tmp_path, monkeypatch, children, seconds=1e-9).run() == 1
    assert children.calls == []
    assert written(tmp_path)["rows"][0]["problem"] == "not run: no time left of --seconds=1e-09"
    assert swept(tmp_path, monkeypatch, Children(cut=2), seconds=100).run() == 1
    assert written(tmp_path)["rows"][0]["problem"] == "3 of 5 repeats: no time left of --seconds=100"


def test_names_of_devices_and_slices():
    assert [prediction.chip_name(gpu.kind) for gpu in chips.GPUS.values()] == list(chips.GPUS)
    assert prediction.chip_name("TPU v5 lite") == "v5e"
    assert prediction.chip_name("cpu") is None
    cases = {("h200", 4): "h200:4", ("h100", 16): "h100:2x8", ("v5e", 8): "v5e:2x4", ("v5e", 1): "v5e:2x2"}
    cases |= {("v5p", 4): "v5p:2x2x1", ("v5p", 8): "v5p:2x2x2", ("tpu7x", 8): "tpu7x:2x2x1"}
    for (name, devices), topology in cases.items():
        assert prediction.topology_of(name, devices) == topology
        assert chips.chip_of(topology).name.startswith(name)  # a name that aot takes
    for name, devices in (("v5e", 6), ("h200", 9)):
        with pytest.raises(UserError):
            prediction.topology_of(name, devices)


@pytest.mark.slow
def test_prefill_is_measured_on_some_of_the_devices(tmp_path):
    (job,) = jobs("data=1", ("prefill",))
    path, results = tmp_path / "request.json", tmp_path / "results.json"
    request = records.Request(
        to_dict(job.config), ["prefill"], 1, 1, 1, None, str(results),
        devices=1, batch={"prefill": job.batch}, length={"prefill": job.length},
    )  # fmt: skip
    records.write_request(path, request)
    assert jax_side.main(str(path)) == 0
    _, (entry,) = records.read_results(results)
    assert (entry.devices, entry.mesh["data"], entry.batch, entry.length) == (1, 1, 1, 24)  # of 8
    assert entry.ms["median"] > 0
    assert entry.memory["arguments"] > 0


class InThisProcess:
    """In the place of ``subprocess.Popen``: a side that needs no process, since it refuses before it compiles."""

    def __init__(self, command, env=None):
        self._status = jax_side.main(command[-1])

    def wait(self, timeout=None):
        return self._status

    def poll(self):
        return self._status


@pytest.mark.skipif(jax.device_count() != 8, reason="needs 8 (simulated) devices")
@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"tensor": 4}, "config.mesh.tensor: 4 does not divide the 2 key-value heads of the model; choose one of 1, 2"),
        (
            {"data": 16},
            "config.mesh: data=16, fsdp=1, tensor=1, sequence=1 does not fit 8 device(s): their product is 16",
        ),
        ({"data": 8}, "config.stage1.batch_size: 2 in 1 micro-batch(es) does not split over data x fsdp = 8"),
    ],
)
def test_without_a_sweep_the_mesh_is_refused_as_well(axes, message, tmp_path, monkeypatch):
    monkeypatch.setattr(run.subprocess, "Popen", InThisProcess)
    config = get_config()
    config.mesh = dataclasses.replace(config.mesh, **axes)
    with pytest.raises(UserError, match=re.escape(message)):
        run.benchmark(config, run.Options(peer="none", out=str(tmp_path)))
    assert list(tmp_path.iterdir()) == []


SCALE = (ROOT / "docs/scale.md").read_text()
SWEEPS = re.findall(r"throughput --config=(configs\S+)((?:(?!--config).)*?)--mesh_sweep='(.*?)'", SCALE, re.DOTALL)


def test_sweeps_of_the_documentation_are_found():
    assert len(SWEEPS) == SCALE.count("--mesh_sweep='") > 0


@pytest.mark.parametrize(("file", "flags", "text"), SWEEPS, ids=[f"{file} {text}" for file, _, text in SWEEPS])
def test_sweeps_of_the_documentation(file, flags, text):
    """Their meshes, batches and lengths go together, on whichever machine."""
    path, _, variant = file.partition(":")
    config = runpy.run_path(str(ROOT / path))["get_config"](*filter(None, [variant]))
    sizes = {name: int(value) for name, value in re.findall(r"--(batch|length)=(\d+)", flags)}
    stages = re.search(r"--stages=(\w+)", flags)
    programs = [stages[1]] if stages else ["stage1", "stage2", "prefill"]
    found = meshes.jobs(meshes.parse(text), programs, config, config.teacher.architecture, **sizes)
    assert len(found) == len(programs) * len(text.split(";"))


@pytest.mark.slow
def test_the_command(tmp_path):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0",
    }
    command = [sys.executable, "-m", "lawcat_jax.throughput", "--config=tests/analysis/throughput/small.py"]
    command += ["--mesh_sweep=data=1;sequence=4;data=8", "--stages=stage2,prefill", f"--out={tmp_path}"]
    command += ["--steps=1", "--repeats=1", "--warmup=1"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = written(tmp_path)["rows"]
    assert [bool(row["measured"]) for row in rows] == [True] * 4 + [False] * 2
    assert rows[5]["problem"] == "not run: 8 devices, this machine has 4"
    assert {row["prediction_problem"] for row in rows} == {"aot has no figures of cpu"}
    assert rows[2]["efficiency"] > 0
