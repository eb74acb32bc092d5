"""Checks of the toys of CONTRIBUTING.md, run by ``test_contributing.py`` in a copy of the project that has them.

``python -m tests.recipe_checks family mixer ...`` prints {recipe: "ok" or a traceback} as its last line.
"""

from __future__ import annotations

import contextlib
import json
import sys
import traceback
from pathlib import Path

import jax
import numpy as np
import pytest
from absl import flags

import lawcat_jax
from lawcat_jax import models
from lawcat_jax.analysis import config_reference
from lawcat_jax.checkpoints.hf.config_map import model_config_from_hf, model_config_to_hf
from lawcat_jax.checkpoints.hf.mapping import base_shapes, flatten
from lawcat_jax.checkpoints.logits import teacher_logits
from lawcat_jax.checkpoints.model_dir import load_model
from lawcat_jax.config import AttentionConfig, Config, StageConfig
from lawcat_jax.models import flops, mixers
from lawcat_jax.runtime import sharding

ROOT = Path(__file__).parents[1]
OUT = ROOT / "out"
TINY_LLAMA = ROOT / "lawcat_jax" / "assets" / "tiny_llama"


def family() -> None:
    """The embedded Llama under the toy's names: same logits, and the fields of its own come back."""
    from safetensors.numpy import load_file, save_file

    values = json.loads((TINY_LLAMA / "config.json").read_text())
    stated = {**values, "model_type": "toy", "architectures": ["ToyForCausalLM"]}
    del stated["rms_norm_eps"]
    for normed in (False, True):
        config = model_config_from_hf({**stated, "use_qk_norm": normed})
        assert (config.family, config.qk_norm, config.rms_norm_eps) == ("toy", "head" if normed else "none", 1e-5)
        written = model_config_to_hf(config, "float32")
        assert (written["use_qk_norm"], written["architectures"]) == (normed, ["ToyForCausalLM"])
        assert model_config_from_hf(written) == config
        assert any("q_norm" in path for path in base_shapes(config)) == normed

    toy = OUT / "toy_llama"
    toy.mkdir(parents=True)
    (toy / "config.json").write_text(json.dumps({**stated, "rms_norm_eps": values["rms_norm_eps"]}))
    tensors = load_file(TINY_LLAMA / "model.safetensors")
    renamed = {name.replace("self_attn.o_proj", "self_attn.out_proj"): tensor for name, tensor in tensors.items()}
    assert renamed.keys() != tensors.keys()
    save_file(renamed, toy / "model.safetensors")
    tokens = np.arange(20, dtype=np.int32).reshape(2, 10)
    llama, same = (teacher_logits(load_model(path, dtype="float32"), tokens) for path in (TINY_LLAMA, toy))
    assert np.ptp(llama) > 1
    np.testing.assert_array_equal(same, llama)


def mixer() -> None:
    """Decoding equals the whole forward pass, one step of attention transfer changes it, and it is split and counted."""
    from lawcat_jax.training import attention_transfer, optim, step
    from tests.models.helpers import TINY, tokens
    from tests.models.test_cache import ONE_LAYER, VARIANTS, check_parity

    attention = AttentionConfig(kind="toy")
    assert VARIANTS["toy"] == attention
    check_parity(ONE_LAYER, attention, splits=(3,))

    graphdef, _ = models.abstract(TINY, attention)
    params = models.init_params(TINY, attention, seed=0)
    stage = StageConfig(learning_rate=1e-2, trainable=("^mixers/",), warmup_fraction=0)
    trainable, frozen = optim.split(params, stage.trainable, "trainable")
    before = jax.tree.map(np.asarray, trainable)
    batch = {"tokens": tokens(), "mask": np.ones((2, 9), bool), "lengths": np.full(2, 9, np.int32)}
    train = jax.jit(step.make_train_step(attention_transfer.make_loss(graphdef, stage), stage, steps=10))
    state, metrics = train(step.init_state(trainable, stage), frozen, batch, jax.random.key(0))
    assert metrics["loss"] > 0
    assert np.isfinite(metrics["loss"])
    for path, leaf in flatten(state.params):
        assert (leaf != dict(flatten(before))[path]).all(), path

    kind = mixers.mixer_class(attention)
    mesh = jax.make_mesh((1, 1, 4, 2), sharding.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 4)
    placed = sharding.shardings({"mixers": params["mixers"]}, mesh)["mixers"]
    assert placed["decay"].spec[1:] == ("tensor",)
    config = Config(attention=attention)
    config.stage2.enabled = False
    layers = TINY.num_layers * (2 * flops.layer_weights(TINY) + kind.flops_per_token(TINY, attention))
    assert flops.model_flops("prefill", config, TINY, 8) == layers


def task() -> None:
    """``evaluate --tasks=toy`` leaves a report."""
    from lawcat_jax import evaluate

    arguments = ["--checkpoint=asset:tiny_llama", "--tasks=toy", "--lengths=64", "--samples=2", f"--output={OUT}/eval"]
    flags.FLAGS(["evaluate", *arguments])
    evaluate.main(["evaluate"])
    report = json.loads((OUT / "eval" / "toy.json").read_text())
    assert report["task"] == "toy"
    (row,) = report["results"].values()
    assert row["n"] == 2
    assert "First number" in (OUT / "eval" / "toy.md").read_text()
    assert (OUT / "eval" / "toy.png").stat().st_size > 1000


def backend() -> None:
    """One shape of the shared contract test, and a call that it refuses."""
    import kernels_pallas as kp
    from kernels_pallas.testing.cases import make_case
    from tests.kernels.test_toy import TestToy

    TestToy().check(make_case(batch=2, length=33, heads=4, value_heads=2, gate_heads=2, K=16, V=16))
    q = jax.ShapeDtypeStruct((1, 4097, 1, 16), np.float32)
    assert kp.implementation_for(q, q, q, q) != "toy"
    with pytest.raises(ValueError, match="T must be at most 4096, got 4097"):
        kp.implementation_for(q, q, q, q, implementation="toy")
    AttentionConfig(implementation="toy")


CHECKS = {check.__name__: check for check in (family, mixer, task, backend)}


def outcome(name: str) -> str:
    try:
        with contextlib.redirect_stdout(sys.stderr):
            CHECKS[name]()
    except Exception:
        return traceback.format_exc()
    return "ok"


def main() -> None:
    assert Path(lawcat_jax.__file__).is_relative_to(ROOT)
    assert "toy" in config_reference.reference()
    (ROOT / "docs" / "config.md").write_text(config_reference.reference(), encoding="utf-8")
    print(json.dumps({name: outcome(name) for name in sys.argv[1:]}))


if __name__ == "__main__":
    main()
