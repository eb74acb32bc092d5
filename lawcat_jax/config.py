"""Typed run configuration: one dataclass tree describes a whole experiment.

A file in ``configs/`` returns a :class:`Config` from ``get_config()``; ``ml_collections.config_flags``
overrides single fields (``--config.stage1.learning_rate=1e-3``). :meth:`Config.validate` collects every
problem and raises them together, each naming the field and the remedy.

Nothing here imports jax: a config can be read and checked on any machine. There is no
``from __future__ import annotations`` either: config_flags needs the field types, not their names.
"""

import dataclasses
import math
import types
import typing
from typing import Any

Dtype = str  # "float32" | "bfloat16" | "auto" (bfloat16 on accelerators, float32 on CPU)

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3", "olmo2", "phi3")
"""Model families, each described in the file of its name in ``lawcat_jax/checkpoints/hf/families``."""

_LINEAR_FEATURE_MAPS = ("softmax_dim", "half_softmax", "exp_dim", "relu", "pos_elu")


class ConfigError(ValueError):
    """A configuration that cannot run. The message lists every problem found, one per line."""


@dataclasses.dataclass
class RopeScaling:
    """Rotary frequency scaling, with the field names of Hugging Face's ``rope_parameters``.

    ``kind`` is ``none``, ``linear``, ``dynamic``, ``yarn``, ``longrope`` or ``llama3``. The other fields count only for
    the kinds that have them: ``low_freq_factor`` and ``high_freq_factor`` for llama3; ``beta_fast``, ``beta_slow`` and
    ``truncate`` for yarn; ``short_factor`` and ``long_factor`` (one number for each rotated pair) for longrope;
    ``attention_factor``, which multiplies cosines and sines, for yarn and longrope.
    """

    kind: str = "none"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    short_factor: tuple[float, ...] = ()
    long_factor: tuple[float, ...] = ()


@dataclasses.dataclass
class ModelConfig:
    """Architecture of the decoder: the facts that a Hugging Face ``config.json`` states.

    Sizes follow the paper's notation: D = ``hidden_size``, H = ``num_heads``, Hkv = ``num_kv_heads``,
    d = ``head_dim``. ``sliding_window`` is the softmax window in tokens, the current one included
    (Mistral 0.1), or None; the layers in ``full_attention_layers`` have none. The layers in ``nope_layers`` rotate
    nothing (SmolLM3). ``partial_rotary_factor`` is the share of each head that is rotated.
    ``projection_biases`` names the projections with a bias. ``qk_norm`` is ``none``, ``head`` (an RMS norm over every
    head of q and k, Qwen3) or ``projection`` (over all heads of a token together, OLMo 2). ``norm_position`` says
    whether a layer's norms stand ``before`` attention and MLP or ``after`` them (OLMo 2).
    """

    family: str = "llama"  # one of FAMILIES; decides how a checkpoint is read from and written to Hugging Face
    vocab_size: int = 32000
    hidden_size: int = 4096
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int = 32
    head_dim: int = 128
    mlp_size: int = 11008
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = dataclasses.field(default_factory=RopeScaling)
    max_position_embeddings: int = 4096
    tie_embeddings: bool = False
    sliding_window: int | None = None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    full_attention_layers: tuple[int, ...] = ()
    nope_layers: tuple[int, ...] = ()
    partial_rotary_factor: float = 1.0
    projection_biases: tuple[str, ...] = ()
    qk_norm: str = "none"
    norm_position: str = "before"

    def window(self, layer: int) -> int | None:
        """The softmax window of one layer in tokens, or None for all tokens."""
        return None if layer in self.full_attention_layers else self.sliding_window

    @property
    def rotary_dim(self) -> int:
        """How many dimensions of each head are rotated."""
        return int(self.head_dim * self.partial_rotary_factor)


@dataclasses.dataclass
class AttentionConfig:
    """The token mixer that replaces softmax attention (paper section 3; switches of the ablations).

    ``kind`` is ``lawcat`` or ``lolcats`` (the baseline). ``conv`` is ``on``, ``off``, ``stacked`` (two
    convolutions) or ``shared`` (the same taps for q and k). ``gate_kind`` is ``per_dim``, ``per_head`` or
    ``none``. ``gate_rank`` 0 means one full D -> Hkv*K matrix. ``gate_half_life`` sets the initial gate
    bias: a single half-life in tokens (16 is the paper's start), or with ``gate_half_life_max`` a geometric
    spread over heads from the one to the other. ``window_size`` > 0 adds a softmax window over
    the last tokens, ``sinks`` the first tokens. ``softmax_layers`` keep softmax attention.
    """

    kind: str = "lawcat"
    conv: str = "on"
    conv_size: int = 4
    feature_map: str = "softmax_dim"
    feature_dim: int = 0  # f; 0 means head_dim // 2, so that K = 2 f = d
    tie_qk: bool = True
    normalize: bool = True
    rope_linear: bool = False
    window_size: int = 0
    affine_window: bool = False
    sinks: int = 0
    gate_kind: str = "per_dim"
    gate_rank: int = 32
    gate_normalizer: float = 16.0
    gate_lower_bound: float | None = -1.25
    gate_half_life: float = 16.0
    gate_half_life_max: float | None = None
    softmax_layers: tuple[int, ...] = ()
    output_gate: bool = False
    init: str = "identity"  # "identity" | "xavier" | "normal" | "kaiming_feature_map"
    implementation: str | None = None  # of kernels_pallas ops; None = best for the device


@dataclasses.dataclass
class LoraConfig:
    """Low-rank adapters on the projections of every linearised layer (paper section 3.3)."""

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclasses.dataclass
class TeacherConfig:
    """Where the pretrained weights come from.

    ``source`` is a Hugging Face directory or hub id, a directory written by ``lawcat_jax.convert``, or
    ``asset:tiny_llama`` for the embedded teacher. ``architecture`` and ``tokenizer`` are used only when a
    teacher is trained from scratch (``pretrain.enabled``).
    """

    source: str = "asset:tiny_llama"
    revision: str | None = None
    dtype: Dtype = "auto"
    architecture: ModelConfig | None = None
    tokenizer: str | None = None  # tokenizer directory or hub id; None = that of ``source``


@dataclasses.dataclass
class DataConfig:
    """One training stream. ``kind`` is ``passkey`` or ``text``.

    ``passkey`` builds the paper's retrieval samples; ``passkey_words`` is the hay in words (870 in the
    paper), 0 fills the stage's ``seq_length``. ``min_length_fraction`` < 1 draws the length of every sample
    uniformly between that share of the full length and the full length.
    ``text`` reads ``source``: ``tfds:<name>[:split]``, ``hf:<name>[:config][:split]``, or a local path or
    glob (.txt, .jsonl, .parquet) with the text in ``text_key``; documents are packed to ``seq_length``.
    ``passkey_fraction`` mixes that share of passkey samples into text (used to pretrain the tiny teacher).

    Loss weights: answer tokens 1; the other tokens of a passkey sample ``prompt_weight`` (1 when ``answer_only``
    is off); text tokens ``text_weight``. ``num_samples`` is the size of a passkey set, and how many sequences of
    a remote text source are read (local text is read whole). Without ``validation_source`` the last
    ``validation_samples`` sequences of a text are held out (0: no validation). ``num_workers`` threads prepare
    batches ahead.
    """

    kind: str = "passkey"
    source: str = ""
    text_key: str = "text"
    passkey_words: int = 870
    passkey_fraction: float = 0.0
    min_length_fraction: float = 1.0
    num_samples: int = 10_000
    answer_only: bool = True
    prompt_weight: float = 0.0
    text_weight: float = 1.0
    validation_samples: int = 100
    validation_source: str = ""
    num_workers: int = 0
    add_bos: bool = True


@dataclasses.dataclass
class StageConfig:
    """One training stage, with its own trainable set, optimizer, schedule, batch and length.

    ``batch_size`` is global (sequences an optimizer step); ``grad_accum`` divides it into that many
    micro-batches. ``steps`` 0 derives the steps from ``epochs`` and ``data.num_samples``. ``trainable`` are
    regular expressions searched in '/'-joined parameter paths. ``kl_weight`` adds KL(teacher || student)
    of the logits, in nats, to the cross entropy. ``schedule`` is ``cosine``, ``constant`` or ``plateau``.
    ``unroll_layers`` compiles the layers one after another instead of as a loop: compilation takes 3 to 4 times
    as long, and no layer's weights or activations are copied out of or into stacked arrays. It pays on GPUs with
    memory to spare, together with ``remat`` ``none``.
    """

    enabled: bool = True
    steps: int = 0
    epochs: float = 1.0
    batch_size: int = 8
    seq_length: int = 1024
    grad_accum: int = 1
    learning_rate: float = 1e-3
    schedule: str = "cosine"
    warmup_fraction: float = 0.01
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    clip_norm: float = 0.0  # 0 = off
    spike_factor: float = 0.0  # skip steps whose gradient norm exceeds so many times its running mean; 0 = off
    gate_lr_multiplier: float = 1.0
    trainable: tuple[str, ...] = (".*",)
    kl_weight: float = 0.0
    mse_weight: float = 1000.0
    loss_denominator: str = "valid"  # "valid" | "all" (the authors' code)
    plateau_factor: float = 0.1
    plateau_patience: int = 10
    eval_every: int = 0  # validation loss every so many steps; 0 = at the end only
    validation_length: int = 0  # tokens of the validation samples; 0 = seq_length. Longer ones select for length
    keep_best: bool = True  # restore the parameters of the best validation loss at the end of the stage
    remat: str = "none"  # "none" | "layer" | "dots"
    unroll_layers: bool = False
    loss_chunk: int = 0  # vocabulary cross entropy in chunks of so many tokens; 0 = at once
    data: DataConfig = dataclasses.field(default_factory=DataConfig)


@dataclasses.dataclass
class MeshConfig:
    """Devices per mesh axis; -1 (at most once) takes the rest. Batch is split over data x fsdp.

    With several processes, one that sends no heartbeat for ``heartbeat_seconds`` counts as dead, and all end.
    """

    data: int = 1
    fsdp: int = -1
    tensor: int = 1
    sequence: int = 1
    distributed: str = "auto"  # "auto" | "on" | "off": jax.distributed.initialize
    heartbeat_seconds: int = 30


@dataclasses.dataclass
class CheckpointConfig:
    """Orbax checkpoints of a run. A save happens at whichever of the two intervals is due first."""

    every_steps: int = 500
    every_minutes: float = 0.0  # 0 = off
    keep: int = 2
    directory: str = ""  # default: <workdir>/checkpoints; may be a bucket path


@dataclasses.dataclass
class LogConfig:
    """Metrics and progress. ``every_steps`` is the metrics interval in optimizer steps."""

    every_steps: int = 10
    tensorboard: bool = True
    wandb: bool = False
    progress: str = "auto"  # "auto" | "bar" | "lines" | "off"
    profile_start: int = -1  # first step of a profiler window, -1 = off
    profile_steps: int = 5
    diagnostics: bool = True  # gate, denominator and convolution statistics of every layer


@dataclasses.dataclass
class EvalConfig:
    """Evaluation at the end of a run, and the defaults of ``lawcat_jax.evaluate``.

    ``passkey_form`` is ``train`` (the wording of the training samples) or ``landmark`` (the paper's
    evaluation prompt, method of Landmark attention and LongLoRA). ``lengths`` are tokens. ``text`` is what
    perplexity is measured on (a source as in :class:`DataConfig`).
    """

    enabled: bool = True
    tasks: tuple[str, ...] = ("passkey",)
    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384)
    samples: int = 50
    batch_size: int = 10
    passkey_form: str = "landmark"
    teacher: bool = True  # also evaluate the teacher
    seed: int = 1_000_003  # of the form "train"; disjoint from the training samples by construction
    text: str = ""
    text_key: str = "text"

    def problems(self, path: str = "config.eval") -> list[str]:
        """Range problems."""
        problems = []
        for task in self.tasks:
            problems += _one_of(f"{path}.tasks", task, ("passkey", "perplexity"))
        problems += _one_of(f"{path}.passkey_form", self.passkey_form, ("train", "landmark"))
        if self.samples < 1 or self.batch_size < 1 or any(n < 1 for n in self.lengths):
            problems.append(f"{path}: samples, batch_size and every length must be at least 1")
        if not self.lengths:
            problems.append(f"{path}.lengths: name at least one length")
        if "perplexity" in self.tasks and not self.text:
            problems.append(f"{path}.text: name a text (tfds:..., hf:..., or a path) for the perplexity task")
        return problems


@dataclasses.dataclass
class Config:
    """A whole run: pretraining of a teacher, or attention transfer (stage 1) and LoRA finetuning (stage 2)."""

    seed: int = 0
    workdir: str = ""
    dry_run: bool = False
    max_bad_steps: int = 10  # stop after so many bad steps (not finite, or a spike) in a row
    teacher: TeacherConfig = dataclasses.field(default_factory=TeacherConfig)
    attention: AttentionConfig = dataclasses.field(default_factory=AttentionConfig)
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    pretrain: StageConfig = dataclasses.field(default_factory=lambda: StageConfig(enabled=False))
    stage1: StageConfig = dataclasses.field(
        default_factory=lambda: StageConfig(learning_rate=1e-2, trainable=(r"^mixers/",))
    )
    stage2: StageConfig = dataclasses.field(
        default_factory=lambda: StageConfig(learning_rate=1e-4, trainable=(r"^lora/",))
    )
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)

    def validate(self) -> None:
        """Check types, ranges and combinations.

        Raises:
          ConfigError: with every problem found, one per line, each naming the field.
        """
        problems = type_problems(self, "config")
        if not problems:  # range checks assume right types
            problems = list(_range_problems(self))
        if problems:
            separator = " " if len(problems) == 1 else "\n  "
            raise ConfigError("invalid configuration:" + separator + separator.join(problems))

    def stages(self) -> list[tuple[str, StageConfig]]:
        """Enabled stages in the order they run."""
        named = [("pretrain", self.pretrain), ("stage1", self.stage1), ("stage2", self.stage2)]
        return [(name, stage) for name, stage in named if stage.enabled]


def _matches(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_matches(value, option) for option in typing.get_args(hint))
    if hint is type(None):
        return value is None
    if origin is tuple:
        item = typing.get_args(hint)[0]
        return isinstance(value, tuple | list) and all(_matches(element, item) for element in value)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def type_problems(node: Any, path: str) -> list[str]:
    """Every field of the dataclass tree ``node`` whose value does not have its annotated type."""
    problems = []
    hints = typing.get_type_hints(type(node))
    for field in dataclasses.fields(node):
        value, hint, name = getattr(node, field.name), hints[field.name], f"{path}.{field.name}"
        if dataclasses.is_dataclass(value):
            problems += type_problems(value, name)
        elif not _matches(value, hint):
            wanted = getattr(hint, "__name__", str(hint)) if typing.get_origin(hint) is None else str(hint)
            problems.append(f"{name}: {value!r} is not a {wanted}")
    return problems


def _one_of(name: str, value: Any, options: tuple) -> list[str]:
    return [] if value in options else [f"{name}: {value!r} is not one of {', '.join(map(repr, options))}"]


def model_problems(m: ModelConfig, path: str = "model") -> list[str]:
    """Range problems of an architecture."""
    problems = []
    for name in ("vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_size"):
        if getattr(m, name) < 1:
            problems.append(f"{path}.{name}: {getattr(m, name)} must be at least 1")
    if not problems and m.num_heads % m.num_kv_heads:
        problems.append(f"{path}.num_kv_heads: {m.num_kv_heads} does not divide num_heads {m.num_heads}")
    if m.head_dim % 2:
        problems.append(f"{path}.head_dim: {m.head_dim} must be even (rotary embedding)")
    problems += _one_of(f"{path}.family", m.family, FAMILIES)
    problems += _rope_problems(m, path)
    problems += _one_of(f"{path}.qk_norm", m.qk_norm, ("none", "head", "projection"))
    problems += _one_of(f"{path}.norm_position", m.norm_position, ("before", "after"))
    projections = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    for name in m.projection_biases:
        problems += _one_of(f"{path}.projection_biases", name, projections)
    for name in ("full_attention_layers", "nope_layers"):
        odd = [layer for layer in getattr(m, name) if not 0 <= layer < m.num_layers]
        problems += [
            f"{path}.{name}: layer {n} does not exist, the model has layers 0 to {m.num_layers - 1}" for n in odd
        ]
    if m.sliding_window is not None and m.sliding_window < 1:
        problems.append(f"{path}.sliding_window: {m.sliding_window} must be at least 1, or None")
    return problems


def _rope_problems(m: ModelConfig, path: str) -> list[str]:
    scaling, where = m.rope_scaling, f"{path}.rope_scaling"
    problems = _one_of(f"{where}.kind", scaling.kind, ("none", "linear", "dynamic", "yarn", "longrope", "llama3"))
    if not 0 < m.partial_rotary_factor <= 1 or m.rotary_dim % 2:
        problems.append(
            f"{path}.partial_rotary_factor: {m.partial_rotary_factor} of head_dim {m.head_dim} should be an even number "
            "of dimensions, at least 2"
        )
    if scaling.kind == "dynamic" and m.rotary_dim == 2:
        problems.append(f"{where}.kind: 'dynamic' needs more than 2 rotated dimensions a head")
    if scaling.kind == "longrope":
        for name in ("short_factor", "long_factor"):
            numbers = getattr(scaling, name)
            if len(numbers) != m.rotary_dim // 2 or min(numbers, default=0) <= 0:
                problems.append(f"{where}.{name}: should be {m.rotary_dim // 2} positive numbers, one a rotated pair")
    return problems


def attention_problems(a: AttentionConfig, path: str = "config.attention") -> list[str]:
    """Range problems of a token mixer."""
    problems = _one_of(f"{path}.kind", a.kind, ("lawcat", "lolcats"))
    problems += _one_of(f"{path}.conv", a.conv, ("on", "off", "stacked", "shared"))
    problems += _one_of(f"{path}.feature_map", a.feature_map, _LINEAR_FEATURE_MAPS)
    problems += _one_of(f"{path}.gate_kind", a.gate_kind, ("per_dim", "per_head", "none"))
    problems += _one_of(f"{path}.init", a.init, ("identity", "xavier", "normal", "kaiming_feature_map"))
    if a.conv_size < 1:
        problems.append(f"{path}.conv_size: {a.conv_size} must be at least 1")
    for name in ("feature_dim", "window_size", "sinks", "gate_rank"):
        if getattr(a, name) < 0:
            problems.append(f"{path}.{name}: {getattr(a, name)} must not be negative")
    if a.gate_normalizer <= 0:
        problems.append(f"{path}.gate_normalizer: {a.gate_normalizer} must be positive")
    if a.gate_lower_bound is not None and a.gate_lower_bound >= 0:
        problems.append(f"{path}.gate_lower_bound: {a.gate_lower_bound} must be negative, or None for no bound")
    if a.gate_half_life <= 0:
        problems.append(f"{path}.gate_half_life: {a.gate_half_life} must be positive (tokens)")
    if a.gate_half_life_max is not None and a.gate_half_life_max < a.gate_half_life:
        problems.append(f"{path}.gate_half_life_max: {a.gate_half_life_max} is below gate_half_life {a.gate_half_life}")
    return problems


def _stage_problems(stage: StageConfig, path: str) -> list[str]:
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
    problems += _one_of(f"{path}.schedule", stage.schedule, ("cosine", "constant", "plateau"))
    problems += _one_of(f"{path}.remat", stage.remat, ("none", "layer", "dots"))
    problems += _one_of(f"{path}.loss_denominator", stage.loss_denominator, ("valid", "all"))
    data = stage.data
    problems += _one_of(f"{path}.data.kind", data.kind, ("passkey", "text"))
    if data.kind == "text" and not data.source:
        problems.append(f"{path}.data.source: name a text source (tfds:..., hf:..., or a path) for kind 'text'")
    for name in ("passkey_fraction", "min_length_fraction"):
        if not 0 <= getattr(data, name) <= 1:
            problems.append(f"{path}.data.{name}: {getattr(data, name)} is outside [0, 1]")
    if data.num_samples < 1:
        problems.append(f"{path}.data.num_samples: {data.num_samples} must be at least 1")
    for name in ("validation_samples", "passkey_words", "prompt_weight", "text_weight", "num_workers"):
        if getattr(data, name) < 0:
            problems.append(f"{path}.data.{name}: {getattr(data, name)} must not be negative")
    return problems


def _range_problems(c: Config):
    yield from attention_problems(c.attention)
    if c.teacher.architecture is not None:
        yield from model_problems(c.teacher.architecture, "config.teacher.architecture")
    yield from _one_of("config.teacher.dtype", c.teacher.dtype, ("auto", "float32", "bfloat16"))
    if c.pretrain.enabled and c.teacher.architecture is None:
        yield "config.teacher.architecture: pretraining needs one"
    if c.pretrain.enabled and (c.stage1.enabled or c.stage2.enabled):
        yield "config.pretrain.enabled: pretrain in a run of its own (disable stage1 and stage2)"
    if not c.stages():
        yield "config: no stage is enabled"
    for name, stage in c.stages():
        yield from _stage_problems(stage, f"config.{name}")
    if c.lora.rank < 1:
        yield f"config.lora.rank: {c.lora.rank} must be at least 1"
    if not 0 <= c.lora.dropout < 1:
        yield f"config.lora.dropout: {c.lora.dropout} is outside [0, 1)"
    known = ("q_proj", "k_proj", "v_proj", "o_proj")
    for target in c.lora.targets:
        yield from _one_of("config.lora.targets", target, known)
    axes = dataclasses.asdict(c.mesh)
    if axes.pop("heartbeat_seconds") < 5:
        yield f"config.mesh.heartbeat_seconds: {c.mesh.heartbeat_seconds} must be at least 5"
    axes.pop("distributed")
    if sum(size == -1 for size in axes.values()) > 1:
        yield "config.mesh: at most one axis may be -1"
    for name, size in axes.items():
        if size != -1 and size < 1:
            yield f"config.mesh.{name}: {size} must be at least 1, or -1 for the rest"
    yield from _one_of("config.mesh.distributed", c.mesh.distributed, ("auto", "on", "off"))
    if c.checkpoint.every_steps < 0 or c.checkpoint.every_minutes < 0:
        yield "config.checkpoint: intervals must not be negative"
    if c.checkpoint.keep < 1:
        yield f"config.checkpoint.keep: {c.checkpoint.keep} must be at least 1"
    if c.log.every_steps < 1:
        yield f"config.log.every_steps: {c.log.every_steps} must be at least 1"
    yield from _one_of("config.log.progress", c.log.progress, ("auto", "bar", "lines", "off"))
    yield from c.eval.problems()


def from_dict(kind: type, values: dict, path: str = "config") -> Any:
    """Rebuild a dataclass tree from plain JSON values.

    Raises:
      ConfigError: for fields that ``kind`` does not have.
    """
    hints = typing.get_type_hints(kind)
    fields = {field.name for field in dataclasses.fields(kind)}
    unknown = sorted(set(values) - fields)
    if unknown:
        raise ConfigError(f"{path}: unknown field(s) {', '.join(unknown)}; known: {', '.join(sorted(fields))}")
    out = {}
    for name, value in values.items():
        options = [hint for hint in (typing.get_args(hints[name]) or (hints[name],)) if dataclasses.is_dataclass(hint)]
        if options and isinstance(value, dict):
            value = from_dict(options[0], value, f"{path}.{name}")
        elif typing.get_origin(hints[name]) is tuple and isinstance(value, list):
            value = tuple(value)
        out[name] = value
    return kind(**out)


def to_dict(node: Any) -> dict:
    """Plain JSON values of a dataclass tree (the inverse of :func:`from_dict`)."""
    return dataclasses.asdict(node)
