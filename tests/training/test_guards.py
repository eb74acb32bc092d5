"""When a step is skipped, when a checkpoint is written and how many are kept, and what utilisation is reported."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_doubles import STEPS, Run

from lawcat_jax import models
from lawcat_jax.config import AttentionConfig, Config, ConfigError, LogConfig, ModelConfig, StageConfig
from lawcat_jax.errors import UserError
from lawcat_jax.models import flops
from lawcat_jax.training import checkpoint, loop, optim
from lawcat_jax.training.loop import TrainingError
from lawcat_jax.training.metrics import MetricsWriter
from lawcat_jax.training.utilization import peak_flops, utilization


def lines(workdir: Path, name: str) -> list:
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [record[name] for record in records if name in record]


def guarded(factor: float) -> StageConfig:
    return StageConfig(learning_rate=0.05, trainable=("^mixers/",), spike_factor=factor, warmup_fraction=0)


@pytest.mark.parametrize(("factor", "skipped"), [(0.0, 0), (10.0, 2)])
def test_spikes_are_skipped_and_counted(tmp_path, factor, skipped):
    run = Run(tmp_path, config=guarded(factor), steps=16, spikes=(13, 14))
    run.go()
    totals = lines(tmp_path, "bad_total")
    assert totals[12] == 0
    assert totals[-1] == skipped
    assert int(run.loop._state.opt_state[0].count) == 16 - skipped


def test_guard_waits_for_the_warm_up(tmp_path):
    Run(tmp_path, config=guarded(10.0), steps=STEPS, spikes=(3,)).go()
    assert lines(tmp_path, "bad_total")[-1] == 0


def test_spikes_without_end_stop_the_run(tmp_path):
    with pytest.raises(TrainingError, match=r"3 bad steps in a row.*gradient norm .* is a spike"):
        Run(tmp_path, config=guarded(10.0), steps=20, spikes=tuple(range(12, 20))).go()


def test_negative_factor_is_refused():
    with pytest.raises(ConfigError, match=r"config.stage1.spike_factor: -1.0 must not be negative"):
        Config(stage1=StageConfig(spike_factor=-1.0)).validate()


def saved(run: Run) -> list[int]:
    return sorted(int(path.name) for path in run.directory.iterdir() if path.name.isdigit())


@pytest.mark.parametrize("keep", [1, 3])
def test_keeps_the_newest(tmp_path, keep):
    run = Run(tmp_path, every_steps=2, keep=keep)
    run.go()
    assert saved(run) == list(range(2, STEPS + 1, 2))[-keep:]


def test_saves_by_time(tmp_path, monkeypatch):
    """A clock of the loop's own: a minute passes during every third step."""
    clock = {"now": 0.0}
    monkeypatch.setattr(loop.time, "monotonic", lambda: clock["now"])
    run = Run(tmp_path, every_steps=0, every_minutes=1.0, keep=9)
    inner = run.stage.train_step

    def step(state, batch):
        clock["now"] += 60.0 if run.batches.index % 3 == 0 else 0.0
        return inner(state, batch)

    run.stage.train_step = step
    run.go()
    assert saved(run) == [3, 6, 9, 12]


def test_best_parameters_outlive_their_checkpoint(tmp_path):
    """The best validation loss was at step 4, whose checkpoint is gone; a resumed run still returns its parameters."""
    config = StageConfig(trainable=("^mixers/",), eval_every=4)
    at_4 = Run(tmp_path / "a", config=config, losses=[1.0], stop_after=4)
    with pytest.raises(loop.InterruptedRunError):
        at_4.go()
    best = jax.device_get(at_4.loop._state.params)
    options = {"config": config, "every_steps": 2, "keep": 1}
    with pytest.raises(loop.InterruptedRunError):
        Run(tmp_path / "b", losses=[1.0, 3.0], stop_after=11, **options).go()
    resumed = Run(tmp_path / "b", losses=[2.0], **options)
    result = resumed.go()
    assert saved(resumed) == [STEPS]
    jax.tree.map(np.testing.assert_array_equal, result, best)


MODEL = ModelConfig(
    vocab_size=96, hidden_size=64, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=16, mlp_size=128,
    max_position_embeddings=64,
)  # fmt: skip


def counted(function, *arguments) -> float:
    """What XLA counts for the compiled function (elementwise operations included, loops' bodies once)."""
    analysis = jax.jit(function).lower(*arguments).compile().cost_analysis()
    return float((analysis[0] if isinstance(analysis, list) else analysis)["flops"])


def test_formula_agrees_with_xla_on_the_teacher():
    length, batch = 48, 2
    graphdef, shapes = models.abstract(MODEL)
    tokens = jax.ShapeDtypeStruct((batch, length), jnp.int32)
    found = counted(lambda params, tokens: models.bind(graphdef, params)(tokens), shapes, tokens) / (batch * length)
    expected = flops.model_flops("pretrain", Config(), MODEL, length) / 3
    # The unfused product forms the masked half of the scores, too.
    expected += 4 * MODEL.num_heads * MODEL.head_dim * length - flops.softmax_attention(MODEL, length)
    assert found == pytest.approx(expected, rel=0.05)


def test_formula_agrees_with_xla_on_the_student():
    """One decoded token: there the recurrence is what the formula counts."""
    attention = AttentionConfig(gate_rank=8)
    model = dataclasses.replace(MODEL, hidden_size=128, mlp_size=256)
    graphdef, shapes = models.abstract(model, attention)
    cache = jax.eval_shape(lambda: models.bind(graphdef, models.init_params(model, attention, seed=0)).init_cache(2, 8))
    token = jax.ShapeDtypeStruct((2,), jnp.int32)
    found = counted(lambda p, t, c: models.bind(graphdef, p).decode(t, c), shapes, token, cache) / 2
    config = Config(attention=attention)
    config.stage2.enabled = False
    assert found == pytest.approx(flops.model_flops("decode", config, model, 8), rel=0.08)


def test_gradients_of_matrices_that_train_count():
    def operations(*trainable):
        config = Config()
        config.stage2.trainable = trainable
        return flops.model_flops("stage2", config, MODEL, 48)

    lora = operations("^lora/")
    hidden, keys = MODEL.hidden_size, MODEL.num_kv_heads * MODEL.head_dim
    assert operations("^lora/", "^layers/attention/v_proj") - lora == 2 * hidden * keys
    everything = 2 * (flops.layer_weights(MODEL) + hidden * MODEL.vocab_size)
    assert operations(".*") - lora == everything
    _, shapes = models.abstract(MODEL)
    patterns = ("mlp/down", "q_proj", "embed|lm_head")
    trained, _ = optim.split(shapes, patterns, "here")
    matrices = {path: value.size for path, value in optim.flatten(trained).items()}
    if not MODEL.tie_embeddings:  # an embedding that is looked up is no product
        matrices.pop("embed/embedding", None)
    assert flops.trained_weights(MODEL, patterns) == sum(matrices.values())


def test_utilization():
    assert peak_flops("NVIDIA H200") == 989e12
    assert [peak_flops(kind) for kind in ("TPU v5 lite", "TPU v5p", "TPU v5", "TPU v6 lite")] == [
        197e12,
        459e12,
        459e12,
        918e12,
    ]
    kinds = (
        "L4",
        "L40",
        "L40S",
        "H100 80GB HBM3",
        "H100 PCIe",
        "H100 NVL",
        "H200 NVL",
        "A100-SXM4-80GB",
        "GH200 480GB",
    )
    assert [peak_flops(f"NVIDIA {kind}") for kind in kinds] == [
        121e12,
        181e12,
        362e12,
        989e12,
        756e12,
        835.5e12,
        835.5e12,
        312e12,
        989e12,
    ]
    assert [peak_flops(kind) for kind in ("cpu", "NVIDIA L400", "NVIDIA H100 80GB HBM3 MIG 1g.10gb")] == [None] * 3
    assert utilization("stage1", Config(), MODEL, jax.devices("cpu"))(1e6) is None

    class Device:
        device_kind = "NVIDIA H200"

    config = Config()
    per_token = flops.model_flops("stage2", config, MODEL, config.stage2.seq_length)
    assert utilization("stage2", config, MODEL, [Device(), Device()])(1e6) == pytest.approx(1e6 * per_token / 1978e12)


def test_utilization_is_logged_with_the_speed(tmp_path):
    run = Run(tmp_path)
    run.stage.utilization = lambda speed: None
    run.go()
    assert lines(tmp_path, "mfu") == [None] * len(lines(tmp_path, "tokens_per_second"))
    assert lines(tmp_path, "tokens_per_second")


def test_a_checkpoint_folder_that_cannot_be_written_ends_the_run_at_once(tmp_path, monkeypatch):
    """A mount that has become read-only: orbax' threads would wait for minutes for what they could not write."""

    def read_only(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    run = Run(tmp_path, every_steps=2)
    monkeypatch.setattr(checkpoint.tempfile, "TemporaryFile", read_only)
    started = time.monotonic()
    with pytest.raises(
        UserError, match=rf"^checkpoint in {run.directory} could not be written: .*Read-only file system"
    ):
        run.go()
    assert time.monotonic() - started < 60


def test_results_of_an_evaluation_reach_the_other_writers(tmp_path):
    writer = MetricsWriter(tmp_path, LogConfig(tensorboard=False))
    curves, logged = [], []
    writer._tensorboard = SimpleNamespace(add_scalar=lambda *point: curves.append(point), close=lambda: None)
    writer._wandb = SimpleNamespace(log=logged.append, finish=lambda: None)
    row = {"accuracy": 0.5, "interval": [0.4, 0.6]}
    writer.write_results({"passkey": {"student": {256: row, 128: row}}})
    writer.write_results({"passkey": {"student": {128: row}}})  # again: the file has the last ones only
    writer.close()
    assert curves[0] == ("eval/passkey/student/accuracy", 0.5, 128)
    assert ("eval/passkey/student/interval/1", 0.6, 256) in curves
    assert logged[0]["eval/passkey/student/accuracy"] == 0.5
    assert logged[0]["eval/step"] == 128
    assert lines(tmp_path, "step") == [128]
