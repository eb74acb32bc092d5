"""The doctor: what it finds on good and bad installations, its report and its exit status."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from lawcat_jax import doctor
from lawcat_jax.analysis import installation
from lawcat_jax.analysis.installation import Machine, device_problems
from lawcat_jax.analysis.packages import Problem, requirements, satisfies, version_problems

ROOT = pathlib.Path(__file__).parents[2]
WANTED = requirements((ROOT / "requirements.txt").read_text().splitlines()[1:])
JAX_WANTS = requirements(
    [
        "jaxlib<=0.10.2,>=0.10.2",
        'jaxlib==0.10.1; extra == "minimum-jaxlib"',
        'libtpu==0.0.42.*; extra == "tpu"',
        'jax-cuda12-plugin[with-cuda]<=0.10.2,>=0.10.2; extra == "cuda12"',
        'jax-cuda13-plugin[with-cuda]<=0.10.2,>=0.10.2; extra == "cuda13"',
    ]
)
GOOD = {name: "99" for name, _, _ in WANTED} | {"jax": "0.10.2", "jaxlib": "0.10.2", "flax": "0.12.8"}
CPU = {"platform": "cpu", "devices": []}


@pytest.mark.parametrize(
    ("version", "specifiers", "expected"),
    [
        ("0.10.2", ">=0.10.2,<0.13", True),
        ("0.13.0", ">=0.10.2,<0.13", False),
        ("0.12.0.1", "<=0.12.0.1,>=0.12.0.1", True),
        ("0.12.9", ">=0.12.8,!=0.12.9", False),
        ("0.0.42.1", "==0.0.42.*", True),
        ("0.0.5", "==0.0.42.*", False),
        ("5.0", ">=5", True),
        ("2.13.0+cpu", "==2.13", True),
        ("0.11.0.dev3", ">=0.11", True),
        ("1", "", True),
    ],
)
def test_satisfies(version, specifiers, expected):
    assert satisfies(version, specifiers) is expected


def test_requirements():
    assert requirements(["etils[epath]>=1.13", "# x", "tqdm", "a_b (>=1) ; extra == 'dev'"]) == [
        ("etils", ">=1.13", ""),
        ("tqdm", "", ""),
        ("a-b", ">=1", "dev"),
    ]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({}, None),
        ({"flax": "0.12.9"}, "flax 0.12.9 is not"),
        ({"flax": "0.12.11"}, "flax 0.12.11 is not"),
        ({"jax": "0.11.2", "jaxlib": "0.10.2"}, "flax 0.12.8 cannot import nnx with jax 0.11.2"),
        ({"jax": "0.10.0"}, "jax 0.10.0 is not"),
        ({"jax": "0.13", "flax": "0.12.10"}, "jax 0.13 is not"),
        ({"jaxlib": "0.10.1"}, "jaxlib 0.10.1 does not fit jax"),
        ({"grain": None}, "not installed: grain"),
        ({"jax-cuda13-plugin": "0.10.1", "jax-cuda13-pjrt": "0.10.1"}, "jax-cuda13-plugin 0.10.1 does not fit"),
        ({"jax-cuda13-plugin": "0.10.2"}, "jax-cuda13-pjrt missing"),
        ({"jax-cuda12-plugin": "0.10.2", "jax-cuda12-pjrt": "0.10.2"}, None),
        ({"libtpu": "0.0.40"}, "libtpu 0.0.40 does not fit"),
    ],
)
def test_version_problems(change, says):
    versions = {name: version for name, version in (GOOD | change).items() if version}
    problems = version_problems(versions, WANTED, JAX_WANTS, python=(3, 11), has_tpu=True)
    if says is None:
        assert problems == []
    else:
        (problem,) = problems
        assert says in problem.what
        assert problem.remedy.startswith("pip install")


def test_more_version_problems():
    both = {f"jax-cuda{n}-{part}": "0.10.2" for n in (12, 13) for part in ("plugin", "pjrt")}
    (problem,) = version_problems(GOOD | both, WANTED, JAX_WANTS)
    assert "both installed" in problem.what
    (problem,) = version_problems(GOOD, WANTED, JAX_WANTS, python=(3, 10))
    assert "Python 3.10" in problem.what
    # Without a TPU, libtpu only compiles ahead of time, but of another version's programs jaxlib may not read all.
    (problem,) = version_problems(GOOD | {"libtpu": "0.0.52"}, WANTED, JAX_WANTS)
    assert problem.remedy == "pip install 'jax[tpu]==0.10.2'"


@pytest.mark.parametrize(
    ("machine", "versions", "remedy"),
    [
        (Machine(("H100",), "580.1"), {}, "requirements-cuda.txt"),
        (Machine(("H100",), "535.1"), {}, "jax[cuda12]"),
        (Machine(("H100",), "535.1"), {"jax-cuda13-plugin": "0.10.2"}, "update the NVIDIA driver 535.1"),
        (Machine(("H100",), "580.1"), {"jax-cuda13-plugin": "0.10.2"}, "JAX_PLATFORMS=cuda"),
        (Machine(("NVIDIA 0x2330",), ""), {}, "install the NVIDIA driver"),
        (Machine(tpus=("v5e",)), {}, "requirements-tpu.txt"),
        (Machine(tpus=("v5e",)), {"libtpu": "0.0.42"}, "JAX_PLATFORMS=tpu"),
    ],
)
def test_cpu_jax_on_an_accelerator(machine, versions, remedy):
    ((problem,), notes) = device_problems(machine, CPU, versions, "")
    assert "jax runs on the CPU of a machine with 1" in problem.what
    assert remedy in problem.remedy
    assert notes == []
    problems, (note,) = device_problems(machine, CPU, versions, "cpu")
    assert problems == []
    assert "JAX_PLATFORMS=cpu" in note


def test_device_problems_else():
    assert device_problems(Machine(), CPU, {}, "") == ([], [])
    assert device_problems(Machine(("H100",), "580"), {"platform": "gpu"}, {}, "") == ([], [])
    ((problem,), _) = device_problems(Machine(tpus=("v5e",)), {"error": "jax did not answer"}, {}, "")
    assert problem.what == "jax did not answer"
    assert "all hosts" in problem.remedy
    error = "jax ended with status 1: Unknown flag in XLA_FLAGS: --xla_nonsense=1"
    for machine in (Machine(), Machine(("H100",), "580"), Machine(tpus=("v5e",))):  # and not of another process
        ((problem,), _) = device_problems(machine, {"error": error}, {}, "")
        assert problem.remedy == "mend or unset XLA_FLAGS and LIBTPU_INIT_ARGS"


def test_detect_machine(tmp_path, monkeypatch):
    for i, (vendor, device, kind) in enumerate(
        [
            ("0x1ae0", "0x0063", "0xff0000"),  # a v5e chip
            ("0x1ae0", "0x0042", "0x020000"),  # Google's network card
            ("0x10de", "0x2330", "0x030200"),  # an H100
            ("0x10de", "0x22a3", "0x068000"),  # an NVSwitch
        ]
    ):
        folder = tmp_path / f"sys/bus/pci/devices/{i}"
        folder.mkdir(parents=True)
        for name, text in (("vendor", vendor), ("device", device), ("class", kind)):
            (folder / name).write_text(text + "\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert installation.detect_machine(str(tmp_path)) == Machine(("NVIDIA 0x2330",), "", ("v5e",))
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'NVIDIA H100, 580.65.06'\necho 'NVIDIA H100, 580.65.06'\n")
    smi.chmod(0o755)
    assert installation.detect_machine(str(tmp_path)) == Machine(("NVIDIA H100",) * 2, "580.65.06", ("v5e",))
    smi.write_text("#!/bin/sh\nexit 9\n")
    assert installation.detect_machine(str(tmp_path)).driver == ""


def test_run_probe_survives_a_crash_and_a_hang(tmp_path, monkeypatch):
    python = tmp_path / "python"
    monkeypatch.setattr(sys, "executable", str(python))
    for script, says in (("echo boom >&2; kill -9 $$", "boom"), ("exec sleep 20", "did not answer within 0.5 s")):
        python.write_text(f"#!/bin/sh\n{script}\n")
        python.chmod(0o755)
        assert says in installation.run_probe(0.5)["error"]


def test_caches(tmp_path):
    (tmp_path / "file").write_text("")
    directories = {"good (A)": f"{tmp_path}/new/deep", "a file (B)": f"{tmp_path}/file"}
    (problem,) = installation.cache_problems(directories)
    assert "for a file (B) cannot be written" in problem.what
    assert problem.remedy.startswith("set B to")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]
    (problem,) = installation.cache_problems({"good (A)": str(tmp_path)}, least_free=2**70)
    assert "GiB left" in problem.what
    named = installation.cache_directories({"HF_HOME": "/x", "JAX_COMPILATION_CACHE_DIR": "gs://bucket/cache"})
    assert "/x" in named.values()
    assert "gs://bucket/cache" not in named.values()


def test_hf_token(tmp_path):
    assert installation.has_hf_token({"HF_TOKEN": "x"})
    assert not installation.has_hf_token({"HF_HOME": str(tmp_path)})
    (tmp_path / "token").write_text("hf_secret")
    assert installation.has_hf_token({"HF_HOME": str(tmp_path)})


def test_problems_set_the_exit_status(monkeypatch, capsys):
    monkeypatch.setattr(installation, "run_probe", lambda: {"error": "jax did not answer within 120 s"})
    monkeypatch.setattr(
        installation, "cache_problems", lambda directories: [Problem("the disk is full", "free some space")]
    )
    assert doctor.main([]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert "problem:   the disk is full -> free some space" in lines
    assert any(line.startswith("problem:   jax did not answer within 120 s -> ") for line in lines)
    assert lines[-1].endswith("problem(s)")


def test_this_installation():
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "HF_TOKEN": "hf_do_not_show"}
    command = [sys.executable, "-m", "lawcat_jax.doctor", "--json"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=100)
    report = json.loads(done.stdout)
    assert done.returncode == (0 if report["ok"] else 1)
    assert report["ok"] is not bool(report["problems"])
    assert "hf_do_not_show" not in done.stdout + done.stderr
    assert report["hf_token"] is True
    assert report["platform"] == "cpu"
    assert report["versions"]["jax"]
    kernels = {(row["operation"], row["case"]): row for row in report["kernels"]}
    row = kernels["gated_linear_attention", "d=64 bfloat16"]
    assert row["uses"] == "scan"
    assert "cuda" in row["not"]["pallas_triton"]
    text = installation.render(report)
    assert "kernel:    gated_linear_attention (d=64 bfloat16, d=128 bfloat16, d=32 float32): scan; not pallas" in text
