"""The sharding manifests: which mesh axes split each array of the Llama-3.2-1B and the Qwen3-8B run.

``python -m tests.golden.sharding`` writes ``sharding_<config>.json`` anew; commit them with the change that made them
differ.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType

from lawcat_jax import models
from lawcat_jax.config import Config
from lawcat_jax.inference import generation
from lawcat_jax.runtime import sharding
from lawcat_jax.training import stages

ROOT = Path(__file__).resolve().parents[2]
MANIFESTS = {name: Path(__file__).with_name(f"sharding_{name}.json") for name in ("llama1b", "qwen3_8b")}
SHAPE = (2, 4, 2, 2)
"""data, fsdp, tensor, sequence: every axis splits something."""


def load_config(name: str) -> Config:
    """``configs/<name>.py``."""
    spec = importlib.util.spec_from_file_location(f"configs_{name}", ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def _specs(tree: Any) -> dict[str, str]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {sharding.path_name(path): _text(leaf.shape, leaf.sharding.spec) for path, leaf in leaves}


def _text(shape: tuple[int, ...], spec: Any) -> str:
    axes = [axis if isinstance(axis, str) else "*".join(axis) if axis else "-" for axis in spec]
    axes += ["-"] * (len(shape) - len(axes))
    return " ".join(f"{size}:{axis}" for size, axis in zip(shape, axes, strict=True)) or "scalar"


def manifest(name: str) -> dict[str, dict[str, str]]:
    """Of ``configs/<name>.py``: part -> path -> "size:axes" of every dimension ("-": whole)."""
    mesh = AbstractMesh(SHAPE, sharding.AXES, axis_types=(AxisType.Auto,) * len(sharding.AXES))
    config = load_config(name)
    model = config.teacher.architecture
    out: dict[str, dict[str, str]] = {}
    for stage, _ in config.stages():
        built = stages.build(stage, config, model, mesh, dtype="bfloat16")
        out |= {f"{stage}/state": _specs(built.state), f"{stage}/frozen": _specs(built.frozen)}
        out[f"{stage}/batch"] = _specs(built.batch)
    graphdef, shapes = models.abstract(model, config.attention, config.lora)
    cache, _ = jax.eval_shape(
        lambda params: generation.empty_cache(params, graphdef=graphdef, batch=16, length=1), shapes
    )
    placed = sharding.shardings(cache, mesh)
    out["cache"] = _specs(jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), cache, placed))
    return out


if __name__ == "__main__":
    for name, file in MANIFESTS.items():
        temporary = file.with_suffix(".tmp")
        temporary.write_text(json.dumps(manifest(name), indent=1) + "\n", encoding="utf-8")
        temporary.replace(file)
        print(file)
