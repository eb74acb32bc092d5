"""The launchers: shellcheck, --help, --print, bad input, and what they do when processes or machines go away."""

import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(LAUNCH.glob("*.sh")) + [LAUNCH / "slurm.sbatch"]
COMMANDS = [script.name for script in SCRIPTS if script.name != "common.sh"]
TRAINING = ["--", "--config=configs/tiny.py", "--workdir=gs://bucket/run"]
TPU = ["--name=lawcat", "--zone=us-west4-a", "--type=v5litepod-16"]
GKE = ["--name=lawcat", "--topology=4x4", "--repo=https://example.com/lawcat.git"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A repository of its own, so that the launchers find a configuration and touch nothing else."""
    root = tmp_path_factory.mktemp("repository")
    shutil.copytree(LAUNCH, root / "launch")
    for folder in ("configs", "lawcat_jax"):
        (root / folder).mkdir()
    (root / "configs/tiny.py").write_text("")
    git = ["git", "-C", str(root), "-c", "user.name=test", "-c", "user.email=test@example.com"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "--quiet", "-m", "test"], check=True)
    return root


def environment(root, **extra):
    fake = root / "bin"
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "JAX", "PYTHON"))}
    return {**kept, "PATH": f"{fake}:{os.environ['PATH']}", **extra}


def call(root, script, *arguments, timeout=20, **extra):
    return subprocess.run(
        ["bash", str(root / "launch" / script), *arguments],
        cwd=root,
        env=environment(root, **extra),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def tool(root, name, text):
    """A stand-in for a program that the launchers call."""
    path = root / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!{sys.executable}\n{text}")
    path.chmod(0o755)
    return path


def shellcheck():
    beside = pathlib.Path(sys.executable).with_name("shellcheck")
    return str(beside) if beside.exists() else shutil.which("shellcheck")


@pytest.mark.skipif(shellcheck() is None, reason="shellcheck is not installed (requirements-dev.txt has it)")
def test_shellcheck():
    command = [shellcheck(), "--external-sources", *map(str, SCRIPTS), str(ROOT / ".ci/run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_help(root, name):
    done = call(root, name, "--help")
    assert done.returncode == 0, done.stderr
    assert f"launch/{name}" in done.stdout
    assert "--print" in done.stdout
    assert "#" not in done.stdout.replace("#if", "")
    assert "set -euo pipefail" in (LAUNCH / name).read_text()


BAD = [
    ("restart.sh", [], "no command"),
    ("restart.sh", ["--restarts=x", "--", "true"], "--restarts=x"),
    ("restart.sh", ["--wrong"], "--wrong"),
    ("multi_gpu.sh", [], "no training arguments"),
    ("multi_gpu.sh", ["--", "--config=configs/tiny.py"], "--workdir"),
    ("multi_gpu.sh", ["--", "--config=configs/none.py", "--workdir=x"], "configs/none.py"),
    ("multi_gpu.sh", ["--gpus=a", *TRAINING], "--gpus=a"),
    ("local_multiprocess.sh", ["--", "true"], "--processes is missing"),
    ("local_multiprocess.sh", ["--processes=0", "--", "true"], "--processes=0"),
    ("local_multiprocess.sh", ["--processes=2"], "no command"),
    ("local_multiprocess.sh", ["--processes=2", "--gpus=0,1,2", "--", "true"], "evenly"),
    ("local_multiprocess.sh", ["--processes=2", "--", "--config=configs/tiny.py"], "--workdir"),
    ("cloud_tpu.sh", TRAINING, "--name is missing"),
    ("cloud_tpu.sh", [*TPU, "--name=No", *TRAINING], "--name=No"),
    ("cloud_tpu.sh", [*TPU, "--zone=moon", *TRAINING], "--zone=moon"),
    ("cloud_tpu.sh", [*TPU, "--type=h100-8", *TRAINING], "--type=h100-8"),
    ("cloud_tpu.sh", [*TPU, "--", "--config=configs/tiny.py", "--workdir=runs/x"], "gs://BUCKET/RUN"),
    ("cloud_tpu.sh", [*TPU, "--repo=nonsense", *TRAINING], "--repo=nonsense"),
    ("cloud_tpu.sh", [*TPU, "--ref=a b; rm", *TRAINING], "--ref=a b; rm"),
    ("gke.sh", [*GKE, "--topology=4", *TRAINING], "--topology=4"),
    ("gke.sh", [*GKE, "--topology=3x1", "--chips-per-host=4", *TRAINING], "not a multiple"),
    ("gke.sh", ["--name=a", "--topology=4x4", *TRAINING], "--repo=URL"),
    ("gke.sh", [*GKE, "--", "--config=configs/tiny.py", "--workdir=/tmp/x"], "gs://BUCKET/RUN"),
    ("slurm.sbatch", ["--workdir=/shared/x"], "--config"),
    ("slurm.sbatch", ["--config=configs/none.py", "--workdir=/shared/x"], "configs/none.py"),
    ("slurm.sbatch", ["--config=configs/tiny.py"], "--workdir"),
    ("slurm.sbatch", ["--config=configs/tiny.py", "--workdir=/shared/x"], "sbatch"),
]


@pytest.mark.parametrize(("name", "arguments", "says"), BAD)
def test_bad_input_is_one_line(root, name, arguments, says):
    done = call(root, name, *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert says in done.stderr


def test_missing_tools_are_named(root):
    (root / "empty").mkdir(exist_ok=True)
    for name in ("bash", "dirname", "env"):
        link = root / "empty" / name
        link.exists() or link.symlink_to(shutil.which(name))
    for name, arguments, says in (
        ("cloud_tpu.sh", TPU, "gcloud"),
        ("gke.sh", GKE, "kubectl"),
        ("multi_gpu.sh", [], "nvidia-smi"),
    ):
        done = call(root, name, *arguments, *TRAINING, PATH=str(root / "empty"))
        assert done.returncode == 2
        assert f"{says} is not installed" in done.stderr


# --print


def test_print_cloud_tpu(root):
    done = call(root, "cloud_tpu.sh", *TPU, "--spot", "--delete", "--print", *TRAINING, "--config.seed=it's")
    assert done.returncode == 0, done.stderr
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == ["gcloud", "git", *["gcloud"] * 5]
    create, _, copy, unpack, install, train, delete = lines
    assert create[3:6] == ["queued-resources", "create", "lawcat"]
    options = {"--node-id=lawcat", "--accelerator-type=v5litepod-16", "--spot", "--zone=us-west4-a"}
    assert {*options, "--runtime-version=v2-alpha-tpuv5-lite"} <= set(create)
    assert copy[3:5] == ["tpu-vm", "scp"]
    for line in (copy, unpack, install, train):
        assert "--worker=all" in line
    assert any("requirements-tpu.txt" in part for part in install)
    remote = next(part for part in train if part.startswith("--command=")).removeprefix("--command=")
    words = shlex.split(remote)
    start = words.index("-m")
    assert words[start : start + 6] == [
        "-m",
        "lawcat_jax.train",
        *TRAINING[1:],
        "--config.seed=it's",
        "--config.mesh.distributed=on",
    ]
    assert "launch/restart.sh" in words
    assert delete[3:6] == ["queued-resources", "delete", "lawcat"]


def test_print_cloud_tpu_without_queue_deletes_nothing(root):
    done = call(
        root, "cloud_tpu.sh", *TPU, "--no-queue", "--repo=https://example.com/l.git", "--ref=v1", "--print", *TRAINING
    )
    assert done.returncode == 0, done.stderr
    assert "tpu-vm create lawcat" in done.stdout
    assert "queued" not in done.stdout
    assert "git\\ clone" in done.stdout
    assert "scp" not in done.stdout
    assert "delete" not in done.stdout
    assert "--spot" not in done.stdout


def test_print_gke(root):
    argument = "--config.teacher.source=it's & @NAME@: x"
    done = call(root, "gke.sh", *GKE, "--spot", "--print", *TRAINING, argument)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("# kubectl apply -f -\n")
    job = yaml.safe_load(done.stdout)["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["parallelism"] == job["completions"] == 4
    pod = job["template"]["spec"]
    assert pod["nodeSelector"]["cloud.google.com/gke-spot"] == "true"
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4"
    (container,) = pod["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["command"][3:] == ["train", *TRAINING[1:], argument, "--config.mesh.distributed=on"]
    assert "exec python -m lawcat_jax.train" in container["command"][2]
    assert "serviceAccountName" not in pod


def test_print_gke_one_host_and_own_image(root):
    options = ["--name=a", "--topology=2x2", "--image=example.com/lawcat:1", "--service-account=trainer", "--print"]
    done = call(root, "gke.sh", *options, *TRAINING)
    job = yaml.safe_load(done.stdout)["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    assert job["parallelism"] == 1
    assert pod["serviceAccountName"] == "trainer"
    assert "cloud.google.com/gke-spot" not in pod["nodeSelector"]
    assert pod["containers"][0]["command"][2] == 'cd /lawcat\nexec python -m lawcat_jax.train "$@"\n'
    assert pod["containers"][0]["command"][4:] == TRAINING[1:]
    # Every placeholder and every mark is gone.
    body = done.stdout.split("kind: JobSet")[1]
    assert not re.search("@[A-Z]", body)
    assert "#if" not in body


def test_print_the_others(root):
    done = call(root, "slurm.sbatch", "--print", *TRAINING[1:], PYTHON="python3")
    assert shlex.split(done.stdout) == [
        "srun",
        "--gpu-bind=none",
        "--kill-on-bad-exit=0",
        "python3",
        "-m",
        "lawcat_jax.train",
        *TRAINING[1:],
        "--config.mesh.distributed=on",
    ]
    done = call(root, "multi_gpu.sh", "--gpus=0,2", "--print", *TRAINING, PYTHON="python3")
    words = shlex.split(done.stdout)
    assert words[0].endswith("launch/restart.sh")
    assert "CUDA_VISIBLE_DEVICES=0,2" in words
    assert words[-5:] == ["python3", "-m", "lawcat_jax.train", *TRAINING[1:]]
    done = call(root, "restart.sh", "--print", "--", "python", "a b")
    assert done.stdout.splitlines()[-1] == "python a\\ b"
    done = call(
        root, "local_multiprocess.sh", "--processes=2", "--gpus=0,1,2,3", "--port=1234", "--print", "--", "true"
    )
    assert done.stdout.splitlines() == [
        f"env JAX_COORDINATOR_ADDRESS=127.0.0.1:1234 JAX_NUM_PROCESSES=2 JAX_PROCESS_ID={i} "
        f"CUDA_VISIBLE_DEVICES={gpus} true"
        for i, gpus in enumerate(("0\\,1", "2\\,3"))
    ]
    done = call(root, "local_multiprocess.sh", "--processes=2", "--cpu-devices=4", "--print", *TRAINING, PYTHON="py")
    assert "JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=4 py -m lawcat_jax.train --config=configs/tiny.py" in done.stdout


# Processes


def count_runs(path, statuses):
    """A command that ends with these statuses in turn."""
    code = f"""
import pathlib, sys
path = pathlib.Path({str(path)!r})
runs = len(path.read_text()) if path.exists() else 0
path.write_text("x" * (runs + 1))
sys.exit({statuses!r}[runs])
"""
    return [sys.executable, "-c", code]


@pytest.mark.parametrize(
    ("statuses", "status", "runs"), [([75, 75, 0], 0, 3), ([75, 3], 3, 2), ([2], 2, 1), ([75, 75, 75, 75], 75, 4)]
)
def test_restart(root, tmp_path, statuses, status, runs):
    command = count_runs(tmp_path / "runs", statuses)
    done = call(root, "restart.sh", "--delay=0", "--restarts=3", "--", *command)
    assert done.returncode == status
    assert len((tmp_path / "runs").read_text()) == runs


TRAINEE = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (os.write(1, b"saved\\n"), os._exit(75)))
print("ready", os.environ.get("JAX_PROCESS_ID"), os.environ.get("JAX_COORDINATOR_ADDRESS"), flush=True)
time.sleep(60)
"""


def start(root, *words):
    return subprocess.Popen(
        ["bash", *words], cwd=root, env=environment(root), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_restart_passes_sigterm_on_and_stops(root):
    process = start(root, "launch/restart.sh", "--delay=0", "--", sys.executable, "-c", TRAINEE)
    assert process.stdout.readline().startswith("ready")
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=10)
    assert (process.returncode, out.strip(), err) == (75, "saved", "")


def test_local_multiprocess_success(root):
    code = "import os; print(os.environ['JAX_PROCESS_ID'], os.environ['JAX_NUM_PROCESSES'])"
    done = call(root, "local_multiprocess.sh", "--processes=3", "--", sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == ["[0] 0 3", "[1] 1 3", "[2] 2 3"]


@pytest.mark.parametrize(("death", "status"), [("sys.exit(7)", 7), ("os.kill(os.getpid(), 9)", 137)])
def test_local_multiprocess_death_ends_the_others(root, tmp_path, death, status):
    code = f"""
import os, signal, sys, time
open({str(tmp_path)!r} + "/" + os.environ["JAX_PROCESS_ID"], "w").write(str(os.getpid()))
if os.environ["JAX_PROCESS_ID"] == "1":
    time.sleep(0.3)
    {death}
if os.environ["JAX_PROCESS_ID"] == "2":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # hangs in a collective
time.sleep(60)
"""
    began = time.monotonic()
    done = call(root, "local_multiprocess.sh", "--processes=3", "--grace=1", "--", sys.executable, "-c", code)
    assert time.monotonic() - began < 10
    assert done.returncode == status
    assert f"ended with status {status}" in done.stderr
    assert done.stderr.count("\n") == 1
    for file in tmp_path.iterdir():
        with pytest.raises(ProcessLookupError):
            os.kill(int(file.read_text()), 0)


def test_local_multiprocess_sigterm_saves(root):
    process = start(root, "launch/local_multiprocess.sh", "--processes=2", "--", sys.executable, "-c", TRAINEE)
    ready = [process.stdout.readline() for _ in range(2)]
    assert all("ready" in line for line in ready)
    assert len({line.split()[-1] for line in ready}) == 1
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=10)
    assert process.returncode == 75
    assert sorted(out.splitlines()) == ["[0] saved", "[1] saved"]


def test_multi_gpu_checks_the_gpus_and_restarts(root, tmp_path):
    tool(root, "nvidia-smi", "print('0\\n1')")
    python = tool(root, "trainer", "import sys\nprint(sys.argv[1:])\n")
    done = call(root, "multi_gpu.sh", "--gpus=0,3", *TRAINING, PYTHON=str(python))
    assert done.returncode == 2
    assert "there is no GPU 3 here, only 0 1" in done.stderr
    done = call(root, "multi_gpu.sh", "--gpus=1", *TRAINING, PYTHON=str(python))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(["-m", "lawcat_jax.train", *TRAINING[1:]])


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (1, False), (75, True)])
def test_slurm_requeues_what_was_saved(root, status, requeued):
    log = root / "scontrol.log"
    log.unlink(missing_ok=True)
    tool(root, "srun", f"import sys\nsys.exit({status})\n")
    tool(root, "scontrol", f"import sys\nopen({str(log)!r}, 'w').write(' '.join(sys.argv[1:]))\n")
    done = call(root, "slurm.sbatch", *TRAINING[1:], SLURM_JOB_ID="12", SLURM_SUBMIT_DIR=str(root))
    assert done.returncode == status
    assert log.exists() == requeued
    assert not requeued or log.read_text() == "requeue 12"


# Cloud TPU, against a gcloud that keeps the states of slices in a file

GCLOUD = """
import json, pathlib, sys
path = pathlib.Path({state!r})
world = json.loads(path.read_text())
words = sys.argv[1:]
world["log"].append(" ".join(words[2:5]))
verb = next(word for word in words if word in ("describe", "create", "delete", "ssh", "scp"))
name = words[words.index(verb) + 1]
status = 0
if verb == "describe":
    if name not in world["slices"]:
        print("ERROR: NOT_FOUND: Resource was not found", file=sys.stderr)
        status = 1
    else:
        print(world["slices"][name])
        if world["slices"][name] == "PROVISIONING":
            world["slices"][name] = "ACTIVE"
elif verb == "create":
    world["slices"][name] = "PROVISIONING"
elif verb == "delete":
    del world["slices"][name]
elif verb == "ssh" and any("lawcat_jax.train" in word for word in words):
    status, after = world["trainings"].pop(0)
    world["slices"][name] = after
path.write_text(json.dumps(world))
sys.exit(status)
"""


def cloud(root, tmp_path, trainings, *options, slices=None):
    state = tmp_path / "world.json"
    state.write_text(json.dumps({"log": [], "slices": slices or {}, "trainings": trainings}))
    tool(root, "gcloud", GCLOUD.format(state=str(state)))
    done = call(root, "cloud_tpu.sh", *TPU, "--poll=0", *options, *TRAINING)
    return done, json.loads(state.read_text())


def test_cloud_tpu_goes_on_after_a_preemption(root, tmp_path):
    done, world = cloud(root, tmp_path, [(255, "SUSPENDED"), (0, "ACTIVE")])
    assert done.returncode == 0, done.stderr
    assert world["slices"] == {"lawcat": "SUSPENDED", "lawcat-2": "ACTIVE"}
    assert not [line for line in world["log"] if "delete" in line]


def test_cloud_tpu_deletes_when_asked(root, tmp_path):
    done, world = cloud(root, tmp_path, [(1, "SUSPENDING"), (0, "ACTIVE")], "--delete")
    assert done.returncode == 0, done.stderr
    assert world["slices"] == {}
    assert world["log"].count("queued-resources delete lawcat") == 2


def test_cloud_tpu_attaches_and_reports_failure(root, tmp_path):
    done, world = cloud(root, tmp_path, [(1, "ACTIVE")], slices={"lawcat": "ACTIVE"})
    assert done.returncode == 1
    assert not [line for line in world["log"] if "create" in line]
    done, world = cloud(root, tmp_path, [(2, "ACTIVE")], slices={"lawcat": "ACTIVE"})
    assert done.returncode == 2


def test_cloud_tpu_says_what_gcloud_says(root):
    tool(root, "gcloud", "import sys\nprint('ERROR: no permission\\nmore', file=sys.stderr)\nsys.exit(1)")
    done = call(root, "cloud_tpu.sh", *TPU, *TRAINING)
    assert (done.returncode, done.stderr) == (2, "error: gcloud: ERROR: no permission\n")
