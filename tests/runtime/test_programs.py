"""Where compiled programs are kept, and that a second process finds them there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from lawcat_jax.runtime import programs

ROOT = Path(__file__).parents[2]
COMMAND = """
import sys
from lawcat_jax.command_line import run_main
def main(argv):
    assert "jax" not in sys.modules
    import jax, jax.numpy as jnp
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    hits = []
    jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
    jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((8, 8)))
    print("hits", sum("cache_hits" in event for event in hits))
run_main(main)
"""


def test_the_directory():
    here = programs.programs_directory({"XDG_CACHE_HOME": "/c"})
    assert str(here.parent) == "/c/lawcat_jax/programs"
    assert programs.programs_directory({"XDG_CACHE_HOME": "/c", programs.SWITCH: "/d"}).parent == Path("/d")
    assert programs.programs_directory({programs.SWITCH: "off"}) is None
    assert programs.programs_directory({programs.SWITCH: " OFF "}) is None
    assert programs.programs_directory({"JAX_COMPILATION_CACHE_DIR": "/e"}) is None  # jax's own variables decide
    assert programs.programs_directory({"JAX_ENABLE_COMPILATION_CACHE": "false"}) is None


def test_a_directory_that_cannot_be_written_changes_nothing(tmp_path, monkeypatch):
    import jax

    (tmp_path / "file").write_text("")
    monkeypatch.setenv(programs.SWITCH, str(tmp_path / "file" / "below"))
    before = jax.config.jax_compilation_cache_dir
    programs.keep_programs()
    assert jax.config.jax_compilation_cache_dir == before


@pytest.mark.slow
def test_a_second_process_reads_what_the_first_compiled(tmp_path):
    def run(switch):
        environment = {name: value for name, value in os.environ.items() if not name.startswith("JAX_COMPILATION")}
        environment |= {programs.SWITCH: switch, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
        command = [sys.executable, "-c", COMMAND]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True)
        return int(done.stdout.split("hits ")[1])

    assert run("off") == 0
    assert not list(tmp_path.iterdir())
    assert run(str(tmp_path)) == 0
    assert list(tmp_path.glob("*/jit*"))
    assert run(str(tmp_path)) > 0
