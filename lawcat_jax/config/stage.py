"""One training stage and the data it reads."""

import dataclasses

from lawcat_jax.config.choices import (
    BabiTask,
    DataKind,
    Hay,
    LossDenominator,
    Remat,
    Schedule,
    SourceKind,
    ValidationWording,
    Wording,
)
from lawcat_jax.config.tree import Node, choice_problems


@dataclasses.dataclass
class MixtureSource(Node):
    """One source of a mixture, with its share and its loss weights."""

    kind: SourceKind = "text"
    """What the source holds."""
    weight: float = 1.0
    """[share, relative] Share of the mixture's samples."""
    source: str = ""
    """``text``, ``instruction``: where from, as in ``data.source``."""
    text_key: str = "text"
    """``text``: the field of a row that holds its text."""
    validation_source: str = ""
    """``text``, ``instruction``: what validation reads, written as ``source``."""
    wording: Wording = "paper"
    """Passkey and the other generated kinds: wording of training samples. ``varied`` samples fill ``seq_length``."""
    validation_wording: ValidationWording = ""
    """The same of validation samples."""
    hay: Hay = "noise"
    """``niah``, and ``passkey`` in the varied wording: what surrounds the needle."""
    hay_source: str = ""
    """Book text for ``hay`` and ``babilong``, written as ``source``."""
    babi_source: str = ""
    """``babilong``: directory of bAbI's en-10k files."""
    babi_tasks: tuple[BabiTask, ...] = ("qa1", "qa2", "qa3")
    """``babilong``: tasks to draw stories from; qa3 stories are simulated where there is no train file."""
    min_length_fraction: float = 1.0
    """[share] Below 1, lengths of generated samples are drawn between this share of the full length and all of it."""
    answer_weight: float = 1.0
    """[weight per token] Loss weight of answers."""
    prompt_weight: float = 0.0
    """[weight per token] Loss weight of what precedes an answer."""
    text_weight: float = 1.0
    """[weight per token] Loss weight of text."""


@dataclasses.dataclass
class DataConfig(Node):
    """One training stream: generated samples (paper section 4), instructions, text packed to the stage's ``seq_length``, or a
    mixture.

    The loss weights tokens: answers ``answer_weight``, the other tokens of samples with an answer ``prompt_weight`` (1 when
    ``answer_only`` is off), text tokens ``text_weight``.
    """

    kind: DataKind = "passkey"
    """What the stream holds."""
    source: str = ""
    """``text``: ``tfds:<name>[:split]``, ``hf:<name>[:config][:split]``, or a path, directory or glob of .txt, .jsonl
    and .parquet files."""
    text_key: str = "text"
    """``text``: the field of a row that holds its text."""
    passkey_words: int = 870
    """[words] Hay of a passkey sample (870 in the paper); 0 fills ``seq_length``."""
    passkey_fraction: float = 0.0
    """[share] ``text``: share of the sequences that are passkey samples instead."""
    min_length_fraction: float = 1.0
    """[share] Below 1, the length of each passkey sample is drawn between this share of the full length and all of
    it."""
    num_samples: int = 10_000
    """[sequences] Size of a passkey set, and how many sequences of a remote text are read (local text is read
    whole)."""
    wording: Wording = "paper"
    """Passkey and the other generated kinds: wording of training samples. ``varied`` samples fill ``seq_length``."""
    validation_wording: ValidationWording = ""
    """The same of validation samples."""
    hay: Hay = "noise"
    """``niah``, and ``passkey`` in the varied wording: what surrounds the needle."""
    hay_source: str = ""
    """Book text for ``hay`` and ``babilong``, written as ``source``."""
    babi_source: str = ""
    """``babilong``: directory of bAbI's en-10k files."""
    babi_tasks: tuple[BabiTask, ...] = ("qa1", "qa2", "qa3")
    """``babilong``: tasks to draw stories from; qa3 stories are simulated where there is no train file."""
    mixture: tuple[MixtureSource, ...] = ()
    """``mixture``: the sources. A pass has ``num_samples`` samples of all of them."""
    pack: bool = False
    """Put several short samples into one row and add ``segment_ids`` to the batch."""
    pieces: int = 0
    """[sequences] At least 2: make long samples and cut each into at most so many pieces of ``seq_length`` tokens, which
    follow each other in consecutive batches (states passed from step to step); 0 is off."""
    answer_only: bool = True
    """Passkey: only the answer counts in the loss of stage 2 and pretraining, but for ``prompt_weight``."""
    answer_weight: float = 1.0
    """[weight per token] Loss weight of answers."""
    prompt_weight: float = 0.0
    """[weight per token] Passkey: loss weight of the tokens in front of the answer when ``answer_only`` is on."""
    text_weight: float = 1.0
    """[weight per token] Loss weight of text."""
    validation_samples: int = 100
    """[sequences] Held out for validation, of a text the last ones unless ``validation_source`` is set; 0 is no
    validation."""
    validation_source: str = ""
    """Text for validation, written as ``source``."""
    num_workers: int = 0
    """[threads] Prepare batches ahead; 0 prepares them in the training loop."""
    add_bos: bool = True
    """Begin sequences with the beginning-of-sequence token, if the tokenizer has one."""


@dataclasses.dataclass
class StageConfig(Node):
    """One training stage: what is trained, on what, with which optimizer (AdamW), schedule, batch and length."""

    enabled: bool = True
    """Run this stage."""
    steps: int = 0
    """[optimizer steps] Length of the stage; 0 derives it from ``epochs`` and ``data.num_samples``."""
    epochs: float = 1.0
    """[passes over the data] Used when ``steps`` is 0."""
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
    kl_weight: float = 0.0
    """[1] Stage 2: weight of KL(teacher || student) of the logits, in nats, beside the cross entropy; above 0 the teacher
    runs too."""
    mse_weight: float = 1000.0
    """[1] Stage 1: factor on the mean squared error of the layers' outputs."""
    loss_denominator: LossDenominator = "valid"
    """Stage 1: tokens that the squared error is averaged over."""
    plateau_factor: float = 0.1
    """[ratio] ``plateau``: factor on the learning rate when the validation loss stops falling."""
    plateau_patience: int = 10
    """[validations] ``plateau``: validations without a better loss before the learning rate is lowered."""
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
    if stage.steps == 0 and stage.epochs * stage.data.num_samples < stage.batch_size:
        problems.append(f"{path}.epochs: {stage.epochs} of {stage.data.num_samples} samples make no batch")
    if stage.learning_rate <= 0:
        problems.append(f"{path}.learning_rate: {stage.learning_rate} must be positive")
    if not 0 <= stage.warmup_fraction <= 1:
        problems.append(f"{path}.warmup_fraction: {stage.warmup_fraction} is outside [0, 1]")
    if not stage.trainable:
        problems.append(f"{path}.trainable: names nothing to train")
    for name in (
        "clip_norm",
        "spike_factor",
        "kl_weight",
        "mse_weight",
        "weight_decay",
        "eval_every",
        "loss_chunk",
        "validation_length",
    ):
        if getattr(stage, name) < 0:
            problems.append(f"{path}.{name}: {getattr(stage, name)} must not be negative")
    problems += choice_problems(stage, path)
    return problems + _data_problems(stage.data, f"{path}.data")


def _data_problems(data: DataConfig, path: str) -> list[str]:
    problems = choice_problems(data, path) + _source_problems(data, path)
    for index, source in enumerate(data.mixture):
        name = f"{path}.mixture[{index}]"
        problems += choice_problems(source, name) + _source_problems(source, name)
        if source.weight < 0:
            problems.append(f"{name}.weight: {source.weight} must not be negative")
    if data.kind == "mixture" and not any(source.weight > 0 for source in data.mixture):
        problems.append(f"{path}.mixture: name at least one source with a positive weight for kind 'mixture'")
    if not 0 <= data.passkey_fraction <= 1:
        problems.append(f"{path}.passkey_fraction: {data.passkey_fraction} is outside [0, 1]")
    if data.num_samples < 1:
        problems.append(f"{path}.num_samples: {data.num_samples} must be at least 1")
    if data.pieces == 1 or (data.pieces and data.pack):
        problems.append(f"{path}.pieces: {data.pieces} must be 0 (off) or at least 2, and does not go with pack")
    for name in ("validation_samples", "passkey_words", "num_workers", "pieces"):
        if getattr(data, name) < 0:
            problems.append(f"{path}.{name}: {getattr(data, name)} must not be negative")
    return problems


def _source_problems(source: DataConfig | MixtureSource, path: str) -> list[str]:
    problems = []
    if source.kind in ("text", "instruction") and not source.source:
        problems.append(f"{path}.source: name a text source (tfds:..., hf:..., or a path) for kind {source.kind!r}")
    hay = source.kind == "niah" or (source.kind == "passkey" and source.wording != "paper")
    if not source.hay_source and (source.kind == "babilong" or (hay and source.hay != "noise")):
        problems.append(f"{path}.hay_source: name books (a path, hf:..., or tfds:...) for kind {source.kind!r}")
    if source.kind == "babilong" and not source.babi_tasks:
        problems.append(f"{path}.babi_tasks: name at least one task")
    if not 0 <= source.min_length_fraction <= 1:
        problems.append(f"{path}.min_length_fraction: {source.min_length_fraction} is outside [0, 1]")
    for name in ("answer_weight", "prompt_weight", "text_weight"):
        if getattr(source, name) < 0:
            problems.append(f"{path}.{name}: {getattr(source, name)} must not be negative")
    return problems
