"""What the environment holds: variables of jax and launchers, standard output, the home directory, devices of another kind."""

from __future__ import annotations

import dataclasses
import errno
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest

from lawcat_jax import models
from lawcat_jax.analysis import environment
from lawcat_jax.config import AttentionConfig, Config, ModelConfig
from lawcat_jax.data import text, token_cache
from lawcat_jax.errors import UserError
from lawcat_jax.runtime import sharding
from lawcat_jax.training import stages
from tests.data import tokenizers as small

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "name", ["JAX_NUM_CPU_DEVICES", "JAX_NUM_PROCESSES", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE"]
)
@pytest.mark.parametrize("value", ["x", "0", "-3", "²", "9" * 20, "1.5", " 2"])
def test_counts_that_cannot_be_are_refused_with_their_name(name, value):
    with pytest.raises(UserError, match=rf"^{name}={value!r}: must be a whole number of at least 1; mend or unset it$"):
        environment.prepare({name: value})


@pytest.mark.parametrize("name", ["JAX_PROCESS_ID", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK"])
def test_ranks_may_be_zero(name):
    environment.prepare({name: "0"})
    with pytest.raises(UserError, match=f"^{name}='first': must be a whole number of at least 0"):
        environment.prepare({name: "first"})


@pytest.mark.parametrize(("value", "named"), [("nonsense", "nonsense"), ("cpu,nonsense", "nonsense"), ("²", "²")])
def test_platforms_that_there_are_not(value, named):
    with pytest.raises(UserError, match=rf"^JAX_PLATFORMS='{value}': '{named}' is not one of cpu, cuda, tpu"):
        environment.prepare({"JAX_PLATFORMS": value})


def test_variables_that_would_break_a_command_are_set_right(capsys):
    values = {"JAX_ENABLE_X64": "1", "MPLBACKEND": "nonsense", "JAX_PLATFORMS": "cpu"}
    environment.prepare(values)
    assert values == {"MPLBACKEND": "Agg", "JAX_PLATFORMS": "cpu"}
    assert capsys.readouterr().err == "JAX_ENABLE_X64 is ignored: everything here is computed in 32 bits or less\n"
    environment.prepare({"JAX_ENABLE_X64": "0"})
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("tpus", "gpus", "chosen"), [(0, 0, "cpu"), (4, 0, None), (0, 1, None)])
def test_libtpu_is_not_asked_on_a_machine_without_accelerators(tpus, gpus, chosen, monkeypatch):
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: name == "libtpu")
    monkeypatch.setattr(environment, "detect_machine", lambda: SimpleNamespace(tpus=tpus, gpus=gpus))
    values: dict[str, str] = {}
    environment.prepare(values)
    assert values.get("JAX_PLATFORMS") == chosen


PRINTS = (
    "from lawcat_jax.command_line import run_main\n"
    "def main(argv):\n    for number in range(100_000):\n        print('line', number)\n"
    "run_main(main)\n"
)


def shell(command: str, **variables: str) -> subprocess.CompletedProcess:
    environ = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=environ, capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize(
    ("output", "status", "told"),
    [
        ("| head -1; exit ${PIPESTATUS[0]}", 141, ""),
        ("> /dev/full", 2, "error: standard output cannot be written (No space left on device)\n"),
    ],
)
def test_standard_output_that_is_closed_or_full(output, status, told, tmp_path):
    script = tmp_path / "prints.py"
    script.write_text(PRINTS)
    done = shell(f"{sys.executable} {script} {output}")
    assert (done.returncode, done.stderr) == (status, told)


@pytest.mark.skipif(os.getuid() != 0, reason="becomes a user without a home")
def test_no_home_directory(tmp_path):
    """A user that is in no list of users, without HOME: one line where a home is needed, nothing where it is not."""
    code = (
        "import os, pathlib, sys\n"
        "from lawcat_jax.command_line import run_main\n"
        "from lawcat_jax.data import token_cache\n"
        "os.environ.pop('HOME', None); os.environ.pop('XDG_CACHE_HOME', None)\n"
        "os.environ.pop('LAWCAT_JAX_COMPILATION_CACHE', None)\n"
        "os.setuid(54321)\n"
        "def main(argv):\n"
        "    if argv[1:] == ['cache']:\n"
        "        token_cache.directory()\n"
        "    if argv[1:] == ['home']:\n        pathlib.Path('~/x').expanduser()\n"
        "    print('done')\n"
        "run_main(main)\n"
    )
    script = tmp_path / "homeless.py"
    script.write_text(code)
    tmp_path.chmod(0o755)
    for word, status in (("", 0), ("cache", 2), ("home", 2)):
        done = shell(f"{sys.executable} - {word} < {script}")
        assert done.returncode == status, done.stderr
        assert done.stdout == ("" if status else "done\n")
        assert done.stderr.startswith("error: there is no home directory; set HOME") if status else not done.stderr
        assert done.stderr.count("\n") == (1 if status else 0)


MODEL = ModelConfig(vocab_size=64, hidden_size=32, num_layers=1, num_heads=2, num_kv_heads=1, head_dim=16, mlp_size=32)


@pytest.mark.parametrize(("name", "needed"), [("pallas_tpu", "tpu"), ("pallas_triton", "cuda")])
def test_an_implementation_for_another_kind_of_device(name, needed, capsys):
    """Refused where a run begins; a student that was trained with it is read with the best one that there is."""
    config = Config(attention=AttentionConfig(gate_rank=4, implementation=name))
    mesh = sharding.make_mesh(config.mesh, devices=jax.devices("cpu")[:1])
    with pytest.raises(
        UserError, match=f"^config.attention.implementation: '{name}' runs on {needed}, and the devices"
    ):
        stages.build("stage1", config, MODEL, mesh)
    config.attention.implementation = "scan"
    stages.build("stage1", config, MODEL, mesh)
    stored = AttentionConfig(implementation=name, gate_rank=4)
    assert models.for_this_machine(stored) == dataclasses.replace(stored, implementation=None)
    assert f"{name} runs on {needed}, this machine has cpu" in capsys.readouterr().err
    assert models.for_this_machine(None) is None
    assert models.for_this_machine(config.attention) is config.attention


def test_a_full_token_cache_is_named_and_costs_nothing_but_memory(tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setenv("LAWCAT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.txt").write_text("The sky is blue. " * 50)
    expected = text.load_tokens(str(tmp_path / "a.txt"), small.byte_level())
    monkeypatch.setenv("LAWCAT_CACHE", str(tmp_path / "full"))
    monkeypatch.setattr(token_cache, "write_tokens", full)
    found = text.load_tokens(str(tmp_path / "a.txt"), small.byte_level())
    assert (found == expected).all()
    said = capsys.readouterr().out
    assert said.startswith(f"token cache {tmp_path / 'full'}/")
    assert "cannot be used (No space left on device): the tokens of" in said
