"""Mistakes on the command line of train: one line, exit code 2, no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags

from lawcat_jax import command_line
from lawcat_jax.config import Config, ConfigError, DataConfig, StageConfig
from lawcat_jax.errors import UserError

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "configs" / "tiny.py")


@pytest.fixture
def parse(monkeypatch):
    """Parse as a fresh process would."""

    def run(*arguments: str) -> Config:
        values = flags.FlagValues()
        argv = ["train", *arguments]
        monkeypatch.setattr(sys, "argv", argv)
        holder = command_line.define_config(flag_values=values)
        command_line.parse_flags(argv, values)
        return command_line.load_config(holder)

    return run


def test_overrides_of_every_kind(parse):
    config = parse(
        f"--config={TINY}",
        "--config.stage1.learning_rate=1e-3",
        "--config.stage1.steps=7",
        "--config.eval.lengths=256,512",
        "--config.stage2.trainable=^lora/",
        "--config.attention.gate_lower_bound=None",
        "--config.attention.gate_half_life_max=64",
        "--config.attention.softmax_layers=(1,)",
        "--config.attention.implementation=scan",
        "--config.stage1.schedule=plateau",
        "--config.mesh.distributed=off",
        "--config.eval.tasks=perplexity,passkey",
        "--config.eval.text=book.txt",
        "--config.teacher.revision=main",
        "--config.teacher.architecture=build",
        "--config.teacher.architecture.head_dim=32",
        "--config.dry_run",
        "--noconfig.attention.normalize",
    )
    assert (config.stage1.learning_rate, config.stage1.steps) == (1e-3, 7)
    assert config.eval.lengths == (256, 512)
    assert config.stage2.trainable == ("^lora/",)
    assert config.attention.gate_lower_bound is None
    assert config.attention.gate_half_life_max == 64
    assert config.attention.softmax_layers == (1,)
    assert (config.attention.implementation, config.stage1.schedule) == ("scan", "plateau")
    assert (config.mesh.distributed, config.eval.tasks) == ("off", ("perplexity", "passkey"))
    assert config.teacher.revision == "main"
    assert config.teacher.architecture.head_dim == 32
    assert config.dry_run is True
    assert config.attention.normalize is False


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.stage1.foo=2", "unknown configuration field config.stage1.foo"),
        ("--config.stage3.steps=2", "unknown configuration field config.stage3.steps; did you mean 'stage2'?"),
        ("--config.stage1.learningrate=2", "unknown configuration field config.stage1.learningrate; did you mean"),
        ("--config.stage1.steps=abc", "config.stage1.steps=abc"),
        ("--config.stage1.steps=1.5", "config.stage1.steps=1.5"),
        ("--config.dry_run=maybe", "config.dry_run=maybe"),
        ("--config.stage1.steps=None", "config.stage1.steps: None is not a int"),
        ("--config.eval.lengths=a,b", "config.eval.lengths"),
        ("--config.stage1.schedule=linear", "'linear' is not one of 'cosine', 'constant', 'plateau'"),
        ("--config.stage1.schedule=None", "config.stage1.schedule: None is not one of 'cosine', 'constant', 'plateau'"),
        ("--config.attention.implementation=triton", "'triton' is not one of 'reference', 'scan', 'pallas_mosaic_gpu'"),
        ("--config.eval.tasks=passkey,poetry", "config.eval.tasks: 'poetry' is not one of 'passkey', 'niah_single_1'"),
        ("--config.lora.targets=q_proj,gate_proj", "config.lora.targets: 'gate_proj' is not one of 'q_proj', 'k_proj'"),
        ("--config.stage1.batch_size=-1", "config.stage1.batch_size: -1 must be at least 1"),
        ("--bogus=1", "bogus"),
    ],
)
def test_mistakes_are_one_line(parse, override, message):
    with pytest.raises((UserError, ConfigError)) as caught:
        parse(f"--config={TINY}", override)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("arguments", [(), ("--config=nowhere.py",), ("--config=nowhere.py", "--config.seed=1")])
def test_missing_config_file(parse, arguments):
    with pytest.raises(UserError, match="--config"):
        parse(*arguments)


def test_broken_config_file(parse, tmp_path):
    for text, message in (
        ("x = (", "never closed"),
        ("def get_config(): return 3", "must return"),
        ("x = 1", "get_config"),
        ("x = '\0'", "null bytes"),
        ("def get_config(): return open('nothing')", r"line 1 .*FileNotFoundError.*'nothing'"),
    ):
        (tmp_path / "c.py").write_text(text)
        with pytest.raises(UserError, match=message) as caught:
            parse(f"--config={tmp_path / 'c.py'}")
        assert str(caught.value).count(str(tmp_path / "c.py")) == 1  # names the file, and once


@pytest.mark.parametrize("name", [path.stem for path in sorted((ROOT / "configs").glob("*.py"))])
def test_every_experiment_file_is_valid(parse, name):
    parse(f"--config={ROOT / 'configs' / name}.py")


def test_a_tuple_of_one_name(parse):
    assert parse(f"--config={TINY}", "--config.lora.targets=q_proj").lora.targets == ("q_proj",)


def test_a_name_can_be_set_to_none(parse):
    assert parse(f"--config={TINY}", "--config.attention.implementation=None").attention.implementation is None


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("c.stage1.learningrate = 5", "StageConfig has no field 'learningrate'; did you mean 'learning_rate'?"),
        ("c.stage3 = StageConfig()", "Config has no field 'stage3'; did you mean 'stage2'?"),
        ("c.eval.xyz = 1", "EvalConfig has no field 'xyz'"),
        ("c.stage1 = StageConfig(batchsize=2)", "StageConfig has no field 'batchsize'; did you mean 'batch_size'?"),
    ],
)
@pytest.mark.parametrize("override", [(), ("--config.seed=1",)])
def test_misspelt_field_in_a_config_file(parse, tmp_path, line, message, override):
    file = tmp_path / "c.py"
    head = "from lawcat_jax.config import Config, StageConfig\ndef get_config():\n    c = Config()\n"
    file.write_text(f"{head}    {line}\n    return c\n")
    with pytest.raises(UserError) as caught:
        parse(f"--config={file}", *override)
    assert str(caught.value) == f"{file}, line 4 ({line}): {message}"


@pytest.mark.parametrize("name", [path.stem for path in sorted((ROOT / "configs").glob("*.py"))])
def test_an_override_of_one_stage_leaves_the_others_alone(parse, name):
    """The recipes give both stages one DataConfig."""
    before = parse(f"--config={ROOT / 'configs' / name}.py")
    after = parse(f"--config={ROOT / 'configs' / name}.py", "--config.stage2.data.num_samples=77777")
    assert after.stage2.data.num_samples == 77777
    assert after.stage1 == before.stage1
    assert after.pretrain == before.pretrain


@pytest.mark.parametrize("line", ["c.stage2.data = c.stage1.data", "c.stage2 = dataclasses.replace(c.stage1)"])
def test_fields_that_share_an_object_in_a_file(parse, tmp_path, line):
    file = tmp_path / "c.py"
    file.write_text(
        "import dataclasses\nfrom lawcat_jax.config import Config\n"
        f"def get_config():\n    c = Config()\n    {line}\n    return c\n"
    )
    config = parse(f"--config={file}", "--config.stage2.data.num_samples=77", "--config.stage1.data.num_workers=3")
    assert (config.stage2.data.num_samples, config.stage1.data.num_samples) == (77, DataConfig().num_samples)
    assert (config.stage2.data.num_workers, config.stage1.data.num_workers) == (0, 3)


def test_fields_that_share_an_object_in_python():
    data = DataConfig()
    config = Config(stage1=StageConfig(data=data), stage2=StageConfig(data=data))
    config.stage2.data.num_samples = 77
    assert config.stage1.data.num_samples == data.num_samples == DataConfig().num_samples


def test_exit_code_and_stderr():
    command = [sys.executable, "-m", "lawcat_jax.train", f"--config={TINY}", "--config.stage1.foo=1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ, timeout=60, check=False)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines() == [
        "error: unknown configuration field config.stage1.foo (docs/config.md lists all fields)"
    ]


def test_a_config_file_that_hangs(parse, tmp_path, monkeypatch):
    file = tmp_path / "c.py"
    file.write_text("def get_config():\n    while True:\n        pass\n")
    monkeypatch.setattr(command_line, "CONFIG_SECONDS", 0.3)
    with pytest.raises(UserError, match=r"c.py, line \d.*get_config\(\) has not returned after 0.3 s"):
        parse(f"--config={file}")


@pytest.mark.parametrize(
    ("line", "message"),
    [("return {}['a']", "KeyError: 'a'"), ("import nothing_there", "ModuleNotFoundError: No module named")],
)
def test_errors_of_a_config_file_name_it_and_its_line(parse, tmp_path, line, message):
    file = tmp_path / "c.py"
    file.write_text(f"def get_config():\n    {line}\n")
    with pytest.raises(UserError) as caught:
        parse(f"--config={file}")
    assert str(caught.value).startswith(f"{file}, line 2 ({line}): {message}")


def test_full_disk_behind_standard_output():
    command = f"{sys.executable} -m lawcat_jax.doctor --json > /dev/full"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert done.stderr.strip() == "error: standard output cannot be written (No space left on device)"


def test_sigterm_before_there_is_anything_to_save(tmp_path):
    """The signal comes while the command imports, opens and reads."""
    code = (
        "import os, signal, threading\n"
        "from lawcat_jax import command_line\n"
        "command_line.end_when_terminated()\n"
        "threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()\n"
        "try:\n"
        "    while True:\n"
        "        try:\n            import time; time.sleep(9)\n        except Exception:\n            pass\n"
        "finally:\n    print('cleaned', flush=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout) == (75, "cleaned\n")
    assert done.stderr.strip() == "interrupted; run the same command again to go on"


def test_a_host_that_does_not_answer_is_asked_once(monkeypatch):
    from lawcat_jax.runtime import network

    asked = []
    monkeypatch.setattr(network.urllib.request, "getproxies", dict)
    monkeypatch.setattr(network.socket, "create_connection", lambda *a, **k: asked.append(a) or 1 / 0)
    monkeypatch.setattr(network, "SECONDS", 0.2)
    monkeypatch.setattr(network.threading, "excepthook", lambda *_: None)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "https://hub.invalid")
    assert not network.hub_or_offline()
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    monkeypatch.delenv("HF_HUB_OFFLINE")
    assert not network.hub_or_offline()
    assert asked == [(("hub.invalid", 443),)]
    constants = sys.modules.get("huggingface_hub.constants")
    if constants is not None:
        constants.HF_HUB_OFFLINE = False
