"""One training stage."""

import dataclasses
import math
import re

from lawcat_jax.config.choices import Divergence, LossDenominator, Remat, Schedule, StatePassing
from lawcat_jax.config.data import DataConfig, data_problems, is_counted, weight_problems
from lawcat_jax.config.tree import Node, choice_problems, limit_problems


@dataclasses.dataclass
class StageConfig(Node):
    """One training stage: what is trained, on what, with which optimizer (AdamW), schedule, batch and length."""

    enabled: bool = True
    """Run this stage."""
    steps: int = 0
    """[optimizer steps] Length of the stage; 0 derives it from ``epochs``."""
    epochs: float = 1.0
    """[passes over the data] Used when ``steps`` is 0. A pass over text or instructions has the sequences that there are,
    one over generated samples or a mixture ``data.num_samples``."""
    batch_size: int = 8
    """[sequences] In one optimizer step, over all devices."""
    seq_length: int = 1024
    """[tokens] Length of a training sequence."""
    grad_accum: int = 1
    """[micro-batches] Parts that ``batch_size`` is computed in; divides it, and changes memory but not the result."""
    learning_rate: float = 1e-3
    """[1] Peak learning rate."""
    schedule: Schedule = "cosine"
    """Learning rate after the warm-up."""
    warmup_fraction: float = 0.01
    """[share] Share of the steps in which the learning rate rises linearly."""
    warmup_from_zero: bool = False
    """The first step has rate 0 and each reaches what otherwise the one before does (the authors' code)."""
    weight_decay: float = 0.0
    """[1] AdamW's decay of matrices; scales and biases do not decay."""
    b1: float = 0.9
    """[1] Adam's decay of the mean of gradients."""
    b2: float = 0.999
    """[1] Adam's decay of the mean of squared gradients."""
    clip_norm: float = 0.0
    """[gradient norm] Largest global norm of a gradient; 0 is no clipping."""
    spike_factor: float = 0.0
    """[ratio] Skip steps whose gradient norm exceeds so many times its running mean; 0 skips none."""
    gate_lr_multiplier: float = 1.0
    """[ratio] Factor on the updates of the gate."""
    trainable: tuple[str, ...] = (".*",)
    """Regular expressions searched in parameter paths such as ``mixers/conv_q`` or ``lora/q_proj/a``; what matches is
    trained."""
    lr_multipliers: tuple[str, ...] = ()
    """``<regular expression>=<factor>`` on the learning rate of the parameters in whose path it is found; the first that
    fits counts, before ``gate_lr_multiplier``."""
    ema_decay: float = 0.0
    """[ratio] Decay of a moving average of the trained parameters, which is then what is validated and kept; 0 is off. So that
    the average does not hold on to the first parameters, the decay after n good steps is at most (1 + n) / (10 + n): 0.99 and more
    are the same in stages of fewer than 890 steps."""
    kl_weight: float = 0.0
    """[1] Stage 2: weight of the divergence of the student's logits from the teacher's, in nats, beside the cross entropy;
    above 0 the teacher runs too."""
    kl_weight_end: float | None = None
    """[1] Stage 2: what ``kl_weight`` has become at the end of the stage, linearly; None keeps it."""
    kl_temperature: float = 1.0
    """[1] Stage 2: both logits are divided by it in the divergence, which is multiplied by its square."""
    kl_direction: Divergence = "forward"
    """Stage 2: which of the two distributions the divergence is weighted by."""
    teacher_logits: str = ""
    """Stage 2: folder of the teacher's logits that ``lawcat_jax.teacher_logits`` has written, which the divergence takes
    instead of running the teacher; empty runs it."""
    state_passing: StatePassing = "off"
    """Stage 2: recurrent state that the rows of a batch begin with (``lawcat_jax/training/state_passing.py``)."""
    state_reset: float = 0.1
    """[share] With ``state_passing``: rows that begin with an empty state all the same."""
    state_gradient: int = 0
    """[boundaries] With ``state_passing``: 1 lets the gradient reach into the batch before, which is run again; 0 stops it
    at the boundary."""
    mse_weight: float = 1000.0
    """[1] Stage 1: factor on the mean squared error of the layers' outputs."""
    loss_denominator: LossDenominator = "valid"
    """Stage 1: tokens that the squared error is averaged over."""
    plateau_factor: float = 0.1
    """[ratio] ``plateau``: factor on the learning rate when the validation loss stops falling."""
    plateau_patience: int = 10
    """[validations] ``plateau``: validations without a better loss before the learning rate is lowered."""
    plateau_threshold: float = 1e-4
    """[share] ``plateau``: a validation loss counts as better when it is lower than the best by more than this share
    of it."""
    plateau_min_lr: float = 1e-5
    """[1] ``plateau``: learning rate below which it is not lowered."""
    eval_every: int = 0
    """[optimizer steps] Between validations; 0 validates at the end only."""
    validation_length: int = 0
    """[tokens] Length of the validation samples; 0 is ``seq_length``. Longer ones select for length."""
    keep_best: bool = True
    """End the stage with the parameters of its best validation."""
    remat: Remat = "none"
    """Activations computed again in the backward pass, to save memory."""
    unroll_layers: bool = False
    """Compile the layers one after another instead of as a loop: 3 to 4 times the compile time, no copies into and out
    of stacked arrays. Pays on GPUs with memory to spare, with ``remat`` ``none``."""
    loss_chunk: int = 0
    """[tokens] Cross entropy over the vocabulary is computed for so many tokens at a time; 0 is all at once."""
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    """What the stage reads."""


# Tokens, steps and samples are counted in int32 on the devices; the others are what no host has room for.
_LIMITS = {
    "batch_size": 2**20,
    "seq_length": 2**26,
    "grad_accum": 2**20,
    "steps": 2**31 - 1,
    "validation_length": 2**26,
}
_LIMITS |= {"plateau_patience": 2**31 - 1, "eval_every": 2**31 - 1, "loss_chunk": 2**31 - 1}


def stage_problems(stage: StageConfig, path: str) -> list[str]:
    """Values of a stage and its data that cannot be, one line each; types are taken as right."""
    problems = []
    for name in ("batch_size", "seq_length", "grad_accum"):
        if getattr(stage, name) < 1:
            problems.append(f"{path}.{name}: {getattr(stage, name)} must be at least 1")
    if stage.grad_accum >= 1 and stage.batch_size % max(stage.grad_accum, 1):
        problems.append(f"{path}.grad_accum: {stage.grad_accum} does not divide batch_size {stage.batch_size}")
    if stage.steps < 0:
        problems.append(f"{path}.steps: {stage.steps} must not be negative (0 = from epochs)")
    if stage.steps == 0 and stage.epochs <= 0:
        problems.append(f"{path}.epochs: {stage.epochs} must be positive where steps is 0")
    elif stage.steps == 0 and not is_counted(stage.data) and stage.epochs * stage.data.num_samples < stage.batch_size:
        problems.append(f"{path}.epochs: {stage.epochs} of {stage.data.num_samples} samples make no batch")
    if stage.learning_rate <= 0:
        problems.append(f"{path}.learning_rate: {stage.learning_rate} must be positive")
    if not 0 <= stage.warmup_fraction <= 1:
        problems.append(f"{path}.warmup_fraction: {stage.warmup_fraction} is outside [0, 1]")
    if not stage.trainable:
        problems.append(f"{path}.trainable: names nothing to train")
    for pattern in stage.trainable:
        try:
            re.compile(pattern)
        except re.error as problem:
            problems.append(f"{path}.trainable: {pattern!r} is not a regular expression ({problem})")
    for name in ("b1", "b2"):
        if not 0 <= getattr(stage, name) < 1:
            problems.append(f"{path}.{name}: {getattr(stage, name)} is outside [0, 1)")
    if not 0 < stage.plateau_factor < 1:
        problems.append(f"{path}.plateau_factor: {stage.plateau_factor} is outside (0, 1)")
    if stage.plateau_patience < 0:
        problems.append(f"{path}.plateau_patience: {stage.plateau_patience} must not be negative")
    if stage.gate_lr_multiplier <= 0:
        problems.append(
            f"{path}.gate_lr_multiplier: {stage.gate_lr_multiplier} must be positive (what is not in trainable is frozen)"
        )
    problems += limit_problems(stage, path, _LIMITS)
    if stage.batch_size * max(stage.seq_length, stage.validation_length) > 2**31 - 1:
        problems.append(
            f"{path}.batch_size: {stage.batch_size} sequences of {max(stage.seq_length, stage.validation_length)} tokens "
            "are more than 2^31 tokens in a step"
        )
    if stage.steps == 0 and stage.epochs * stage.data.num_samples / max(stage.batch_size, 1) > 2**31 - 1:
        problems.append(f"{path}.epochs: {stage.epochs} are more than 2^31 steps")
    if not path.endswith("stage1"):  # attention transfer looks at every token
        problems += weight_problems(stage.data, f"{path}.data")
    for name in (
        "clip_norm",
        "spike_factor",
        "kl_weight",
        "mse_weight",
        "weight_decay",
        "eval_every",
        "loss_chunk",
        "validation_length",
        "kl_weight_end",
        "plateau_threshold",
        "plateau_min_lr",
    ):
        if (getattr(stage, name) or 0) < 0:
            problems.append(f"{path}.{name}: {getattr(stage, name)} must not be negative")
    for name in ("state_reset", "state_gradient"):
        if not 0 <= getattr(stage, name) <= 1:
            problems.append(f"{path}.{name}: {getattr(stage, name)} is outside [0, 1]")
    if not 0 <= stage.ema_decay < 1:
        problems.append(f"{path}.ema_decay: {stage.ema_decay} is outside [0, 1)")
    if stage.kl_temperature <= 0:
        problems.append(f"{path}.kl_temperature: {stage.kl_temperature} must be positive")
    if stage.teacher_logits:
        problems += _stored_logits_problems(stage, path)
    if stage.state_passing != "off" and not path.endswith("stage2"):
        problems.append(f"{path}.state_passing: only stage 2 runs the student alone; set it to 'off'")
    if stage.state_passing != "off" and stage.data.pack:
        problems.append(f"{path}.data.pack: packed rows begin with an empty state; set state_passing to 'off'")
    alone = stage.data.pieces and path.endswith("stage2")  # a question without its needle
    if (stage.state_passing == "pieces" and not stage.data.pieces) or (alone and stage.state_passing != "pieces"):
        problems.append(
            f"{path}.state_passing: 'pieces' and data.pieces (at least 2) go together; it is "
            f"{stage.state_passing!r} with data.pieces {stage.data.pieces}"
        )
    problems += _multiplier_problems(stage.lr_multipliers, f"{path}.lr_multipliers")
    problems += choice_problems(stage, path)
    return problems + data_problems(stage.data, f"{path}.data")


def _stored_logits_problems(stage: StageConfig, path: str) -> list[str]:
    problems, name = [], f"{path}.teacher_logits"
    if not path.endswith("stage2") or max(stage.kl_weight, stage.kl_weight_end or 0) <= 0:
        problems.append(f"{name}: only the divergence of stage 2 reads them; set kl_weight there, or leave it empty")
    if stage.kl_temperature != 1:
        problems.append(
            f"{name}: only the largest logits are stored, which fix no other temperature; set kl_temperature=1"
        )
    if stage.data.pieces:
        problems.append(f"{name}: with data.pieces no two runs need see the same rows; leave one of the two out")
    return problems


def _multiplier_problems(items: tuple[str, ...], path: str) -> list[str]:
    problems = []
    for item in items:
        pattern, _, factor = item.rpartition("=")
        try:
            re.compile(pattern)
            good = bool(pattern) and math.isfinite(float(factor)) and float(factor) >= 0
        except (re.error, ValueError):
            good = False
        if not good:
            problems.append(f"{path}: {item!r} is not <regular expression>=<factor of at least 0>")
    return problems
