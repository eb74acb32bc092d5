"""A run of both stages, export and evaluation that is as small as it can be: the ``--config`` file of ``test_kills.py``."""

import tiny

from lawcat_jax.config import Config, EvalConfig


def get_config() -> Config:
    """The experiment: every step is saved."""
    config = tiny.get_config()
    for stage in (config.stage1, config.stage2):
        stage.steps, stage.batch_size, stage.eval_every, stage.data.validation_samples = 3, 2, 2, 2
    config.checkpoint.every_steps = 1
    options = {"passkey_form": "train", "samples": 2, "batch_size": 2, "teacher": True}
    config.eval = EvalConfig(lengths=(96, 112), **options)
    return config
