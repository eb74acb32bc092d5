"""Hostile inputs over every entry point; see ``driver.py`` for what is asserted and ``cases.py`` for the table."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import jax
import pytest
from absl import flags

from lawcat_jax import command_line
from lawcat_jax.config import Config, ConfigError
from lawcat_jax.errors import UserError
from tests.hostile.cases import all_cases
from tests.hostile.driver import ASSET, ROOT, Case, Commands, check
from tests.hostile.ops import OpCall, op_calls

CASES, OP_CALLS = all_cases(), list(op_calls())
FAST = [case for case in CASES if case.area == "config" and "override" not in case.name][::2]
FAST += [case for case in CASES if case.area == "launch"][::40]
FAST += [case for case in CASES if case.name in ("workdir holds thesis.tex", "row preferences")]


@pytest.fixture(scope="module")
def commands():
    running = Commands()
    yield running
    running.close()


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """``hf``: a Hugging Face directory; ``run`` and its ``config.py``: a finished run."""
    folder = tmp_path_factory.mktemp("models")
    shutil.copytree(ASSET, folder / "hf")
    shutil.copy(ROOT / "tests" / "runtime" / "tiny.py", folder / "config.py")
    command = [sys.executable, "-m", "lawcat_jax.train", "--config=config.py", "--workdir=run"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}
    subprocess.run(command, cwd=folder, env=environment, check=True, timeout=900)
    return folder


def test_the_table_is_large_enough():
    assert len(CASES) >= 300
    assert len({str(case) for case in CASES}) == len(CASES)
    areas = {"model", "run", "config", "data", "generation", "sizes", "environment", "launch"}
    assert {case.area for case in CASES} == areas
    assert len(OP_CALLS) >= 300


@pytest.mark.parametrize("case", FAST, ids=str)
def test_some_hostile_inputs(case, tmp_path, commands):
    check(case, tmp_path, tmp_path, commands)


@pytest.mark.slow
@pytest.mark.timeout(1200)  # the first of a process trains the run
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_hostile_input(case: Case, tmp_path, models, commands):
    check(case, tmp_path, models, commands)


def check_op(call: OpCall) -> None:
    """A ValueError of one line that begins with an argument's name, or arrays."""
    try:
        found = call.call()
    except ValueError as problem:
        told = str(problem)
        assert re.match(r"[a-z_]+( [A-Za-z]+| [qk] rows)?: ", told), told
        assert "\n" not in told
        assert len(told) < 500
    else:
        assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(found))


def test_some_hostile_arguments_of_the_ops():
    """Those that are refused without computing anything."""
    quick = [
        call for call in OP_CALLS if any(word in call.name for word in ("float64", "dtype float16", "object", "list"))
    ]
    assert len(quick) > 60
    for call in quick:
        check_op(call)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("call", OP_CALLS, ids=str)
def test_every_hostile_argument_of_the_ops(call: OpCall):
    check_op(call)


def leaves(kind: type, path: str = "config") -> list[str]:
    """Paths of all fields that a flag can set."""
    found = []
    for name, hint in typing.get_type_hints(kind).items():
        inner = [option for option in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(option)]
        if typing.get_origin(hint) is tuple or not inner:
            found.append(f"{path}.{name}")
        elif type(None) not in typing.get_args(hint):
            found += leaves(typing.cast(type, inner[0]), f"{path}.{name}")
    return found


VALUES = ("", "x", "-1", "nan", "inf", "1e999", "9" * 30, "None", "²", "\udcff", "(", "[]", "0", "1,2", "a\nb")


@pytest.mark.parametrize("field", [*leaves(Config), "config", "config.nothing", "config.stage1", "config.stage1.data"])
def test_every_field_with_values_of_every_kind(field, monkeypatch):
    """One line or a configuration, never anything else."""
    for value in VALUES:
        holder_flags = flags.FlagValues()
        argv = ["train", f"--config={ROOT / 'configs' / 'tiny.py'}", f"--{field}={value}"]
        monkeypatch.setattr(sys, "argv", argv)
        holder = command_line.define_config(flag_values=holder_flags)
        try:
            command_line.parse_flags(argv, holder_flags)
            assert isinstance(command_line.load_config(holder), Config)
        except (UserError, ConfigError) as problem:
            text = str(problem)
            assert len(text) > 10, (field, value)
            assert "Traceback" not in text
            assert "\n" not in text or text.startswith("invalid configuration:"), (field, value, text)
