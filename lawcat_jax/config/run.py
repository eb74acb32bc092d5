"""A whole run: the teacher, the stages, devices, checkpoints, logging and evaluation."""

import dataclasses
from collections.abc import Iterator

from lawcat_jax.config.attention import AttentionConfig, LoraConfig, attention_problems, lora_problems
from lawcat_jax.config.choices import Distributed, Dtype, PasskeyForm, Progress, TaskName
from lawcat_jax.config.data import suffix_problems
from lawcat_jax.config.model import ModelConfig, model_problems
from lawcat_jax.config.stage import StageConfig, stage_problems
from lawcat_jax.config.tree import ConfigError, Node, choice_problems, limit_problems, type_problems, unshare


@dataclasses.dataclass
class TeacherConfig(Node):
    """Where the pretrained weights come from."""

    source: str = "asset:tiny_llama"
    """Hugging Face directory or hub id, a directory written by ``lawcat_jax.convert``, or ``asset:tiny_llama``, the
    embedded teacher. To train a student on: its directory, or its small file."""
    base: str | None = None
    """Where ``source`` is a student's small file: the teacher that it belongs to; None is the one that the file names."""
    revision: str | None = None
    """Branch, tag or commit of a hub repository."""
    dtype: Dtype = "auto"
    """Number format of the frozen weights; what is trained is float32, and so is all of a teacher in pretraining."""
    architecture: ModelConfig | None = None
    """Shape of the model where there are no weights to read it from: a teacher trained from scratch
    (``pretrain.enabled``), and dry runs, ``aot`` and ``throughput`` without the teacher's files."""
    tokenizer: str | None = None
    """Tokenizer directory or hub id; None is that of ``source``."""


@dataclasses.dataclass
class MeshConfig(Node):
    """Devices along each axis of the mesh. Their product is the number of devices; -1, in one axis at most, takes what
    the others leave. The batch is split over ``data`` and ``fsdp`` together."""

    data: int = 1
    """[devices] Split the batch only: every device of the axis has all weights."""
    fsdp: int = -1
    """[devices] Split the batch and one dimension of every large matrix."""
    tensor: int = 1
    """[devices] Split heads and the MLP."""
    sequence: int = 1
    """[devices] Split the tokens of a sequence."""
    distributed: Distributed = "auto"
    """Start ``jax.distributed``, for runs of several processes."""
    heartbeat_seconds: int = 30
    """[seconds] A process that has sent no heartbeat for so long counts as dead, and the others end."""


@dataclasses.dataclass
class CheckpointConfig(Node):
    """Checkpoints of a run. A save happens at whichever of the two intervals is due first."""

    every_steps: int = 500
    """[optimizer steps] Between saves; 0 is off."""
    every_minutes: float = 0.0
    """[minutes] Between saves; 0 is off."""
    keep: int = 2
    """[checkpoints] Kept of a stage; older ones are deleted."""
    directory: str = ""
    """Where they go, which may be a bucket path; empty is ``<workdir>/checkpoints``."""


@dataclasses.dataclass
class LogConfig(Node):
    """Metrics, progress and profiles."""

    every_steps: int = 10
    """[optimizer steps] Between rows of metrics."""
    tensorboard: bool = True
    """Write ``<workdir>/tensorboard`` beside ``metrics.jsonl``."""
    wandb: bool = False
    """Also send metrics to Weights & Biases."""
    progress: Progress = "auto"
    """How progress is shown on the terminal."""
    profile_start: int = -1
    """[optimizer steps] First step of a profiler trace, written to ``<workdir>/profile``; -1 is off."""
    profile_steps: int = 5
    """[optimizer steps] Length of the trace."""
    diagnostics: bool = True
    """At the end of a stage, write statistics of gates, denominators and convolutions for every layer."""


_SOURCES = (
    ("text", "a text (tfds:..., hf:..., or a path)", ("perplexity",)),
    ("haystack", "essays or books (tfds:..., hf:..., or a path)", ("niah_single_2", "niah_single_3", "babilong")),
    ("babi", "the directory of bAbI's en-10k files", ("babilong",)),
)
"""(field of EvalConfig, what it names, starts of the names of the tasks that need it)."""


_EVAL_LIMITS = {"lengths": 2**26, "samples": 10**7, "batch_size": 2**20}


def seed_problems(seed: int, path: str) -> list[str]:
    """A seed that does not fit into 64 bits."""
    return [] if -(2**63) <= seed < 2**63 else [f"{path}: {seed} does not fit into 64 bits"]


@dataclasses.dataclass
class EvalConfig(Node):
    """Evaluation at the end of a run, and the defaults of ``lawcat_jax.evaluate`` for the model it makes."""

    enabled: bool = True
    """Evaluate when training is done."""
    tasks: tuple[TaskName, ...] = ("passkey",)
    """What is evaluated."""
    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384)
    """[tokens] Lengths of the prompts or texts; 0 asks for a prompt without hay, which only BABILong has."""
    samples: int = 50
    """[samples] Of each length."""
    batch_size: int = 10
    """[sequences] Evaluated together."""
    passkey_form: PasskeyForm = "landmark"
    """Wording of the passkey task."""
    teacher: bool = True
    """Evaluate the teacher beside the student."""
    seed: int = 1_000_003
    """[1] Of the passkey samples in the wording ``train``; they never coincide with training samples."""
    text: str = ""
    """Text whose perplexity is measured, written as ``data.source`` of a stage."""
    text_key: str = "text"
    """The field of a row that holds its text, also of the haystack."""
    position_block: int = 1024
    """[tokens] Size of the blocks of positions in ``perplexity_by_position``, which is measured at the largest length."""
    haystack: str = ""
    """Essays or books around the needles of ``niah_single_2`` and ``_3`` and the facts of ``babilong_*``, written as
    ``data.source`` of a stage; ``tfds:pg19:test`` is BABILong's."""
    babi: str = ""
    """Directory of bAbI's en-10k files, whose test stories ``babilong_*`` asks about."""
    sample_seed: int = 42
    """[1] Of the samples of ``niah_single_*`` and ``babilong_*``; 42 is RULER's."""
    prefill_chunk: int = 0
    """[tokens] Of each prompt that are read at a time; 0 chooses by the lengths of the prompts."""
    lm_eval: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness, by its names for them; needs the package ``lm_eval``."""
    lm_eval_tasks_dir: str = ""
    """Directory with task files (YAML) for lm-evaluation-harness, beside its own."""
    lm_eval_fewshot: int | None = None
    """[examples] Before each question of ``lm_eval``; None leaves it to the task."""
    lm_eval_limit: int | None = None
    """[samples] Of each task of ``lm_eval``, the first ones; None is all."""
    lm_eval_chat: bool = False
    """Write the prompts of ``lm_eval`` in the form of the model's chat template."""

    @property
    def task_names(self) -> list[str]:
        """What is evaluated, in order, each once; tasks of lm-evaluation-harness as ``lm_eval:<name>``."""
        return list(dict.fromkeys([*self.tasks, *(f"lm_eval:{name}" for name in self.lm_eval)]))

    def problems(self, path: str = "config.eval") -> list[str]:
        """Values that cannot be, one line each; types are taken as right."""
        problems = choice_problems(self, path)
        if self.samples < 1 or self.batch_size < 1 or self.position_block < 1:
            problems.append(f"{path}: samples, batch_size and position_block must be at least 1")
        if any(n < 0 for n in self.lengths) or self.prefill_chunk < 0:
            problems.append(f"{path}: lengths and prefill_chunk must not be negative")
        if not self.lengths:
            problems.append(f"{path}.lengths: name at least one length")
        if not self.task_names and self.enabled:
            problems.append(f"{path}.tasks: name at least one task, or set {path}.enabled to False")
        if (self.lm_eval_fewshot or 0) < 0 or (self.lm_eval_limit is not None and self.lm_eval_limit < 1):
            problems.append(f"{path}: lm_eval_fewshot must not be negative, and lm_eval_limit at least 1")
        if not all(self.lm_eval):
            problems.append(f"{path}.lm_eval: a task without a name")
        problems += limit_problems(self, path, _EVAL_LIMITS) + seed_problems(self.seed, f"{path}.seed")
        problems += seed_problems(self.sample_seed, f"{path}.sample_seed")
        if self.batch_size * max(self.lengths, default=0) > 2**31 - 1:
            problems.append(
                f"{path}.batch_size: {self.batch_size} prompts of {max(self.lengths)} tokens are more than 2^31 tokens"
            )
        if any(task.startswith("perplexity") for task in self.tasks):
            problems += suffix_problems(self.text, f"{path}.text")
        for field, kind, tasks in _SOURCES:
            asking = [task for task in self.tasks if task.startswith(tasks)]
            if asking and not getattr(self, field) and (field != "haystack" or any(self.lengths)):
                problems.append(f"{path}.{field}: name {kind} for {', '.join(asking)}")
        return problems


@dataclasses.dataclass
class Config(Node):
    """A whole run: pretraining of a teacher, or attention transfer (stage 1) and LoRA finetuning (stage 2).

    Fields do not share objects: where both stages are given one ``data``, the second gets a copy, when the config is
    built and again when a config file is read. So an override of one stage's data leaves the other's alone.
    """

    seed: int = 0
    """[1] Of initial values, data order and dropout."""
    workdir: str = ""
    """Folder of the run; empty is ``runs/<name of the config file>``. ``--workdir`` takes precedence."""
    dry_run: bool = False
    """Print shapes, data and memory, and train nothing."""
    max_bad_steps: int = 10
    """[optimizer steps] Stop after so many bad steps (not finite, or a spike) in a row."""
    teacher: TeacherConfig = dataclasses.field(default_factory=TeacherConfig)
    """Where the pretrained weights come from."""
    attention: AttentionConfig = dataclasses.field(default_factory=AttentionConfig)
    """What replaces softmax attention."""
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    """Adapters of stage 2."""
    pretrain: StageConfig = dataclasses.field(default_factory=lambda: StageConfig(enabled=False))
    """Training of a teacher from scratch, in a run of its own."""
    stage1: StageConfig = dataclasses.field(
        default_factory=lambda: StageConfig(learning_rate=1e-2, trainable=(r"^mixers/",))
    )
    """Attention transfer: fit each new layer to the outputs of the softmax attention it replaces."""
    stage2: StageConfig = dataclasses.field(
        default_factory=lambda: StageConfig(learning_rate=1e-4, trainable=(r"^lora/",))
    )
    """Finetuning of the whole model on next tokens."""
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    """How devices are used."""
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    """When a run is saved."""
    log: LogConfig = dataclasses.field(default_factory=LogConfig)
    """What a run writes and shows."""
    eval: EvalConfig = dataclasses.field(default_factory=EvalConfig)
    """Evaluation at the end."""

    def __post_init__(self) -> None:
        unshare(self)

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

    def last_stage(self) -> tuple[str, StageConfig]:
        """The enabled stage that runs last; of a student that is not trained "none", and ``stage2`` for its lengths and its
        use of the BOS token."""
        return self.stages()[-1] if self.stages() else ("none", self.stage2)


def _range_problems(c: Config) -> Iterator[str]:
    yield from attention_problems(c.attention)
    if c.teacher.architecture is not None:
        yield from model_problems(c.teacher.architecture, "config.teacher.architecture")
    yield from choice_problems(c.teacher, "config.teacher")
    if c.pretrain.enabled and c.teacher.architecture is None:
        yield "config.teacher.architecture: pretraining needs one"
    if c.pretrain.enabled and (c.stage1.enabled or c.stage2.enabled):
        yield "config.pretrain.enabled: pretrain in a run of its own (disable stage1 and stage2)"
    if not c.stages() and c.attention.kind != "window":  # which is a student without training as well
        yield "config: no stage is enabled"
    if c.stage1.enabled and c.attention.kind == "window":
        yield (
            "config.stage1.enabled: attention transfer trains the token mixers, and attention.kind 'window' has no "
            "parameters; set it to False"
        )
    for name, stage in c.stages():
        yield from stage_problems(stage, f"config.{name}")
    yield from lora_problems(c.lora)
    yield from seed_problems(c.seed, "config.seed")
    if c.max_bad_steps < 1:
        yield f"config.max_bad_steps: {c.max_bad_steps} must be at least 1"
    axes = dataclasses.asdict(c.mesh)
    if axes.pop("heartbeat_seconds") < 5:
        yield f"config.mesh.heartbeat_seconds: {c.mesh.heartbeat_seconds} must be at least 5"
    axes.pop("distributed")
    if sum(size == -1 for size in axes.values()) > 1:
        yield "config.mesh: at most one axis may be -1"
    for name, size in axes.items():
        if size != -1 and size < 1:
            yield f"config.mesh.{name}: {size} must be at least 1, or -1 for the rest"
        if size > 2**20:
            yield f"config.mesh.{name}: {size} is more than can be run (at most {2**20})"
    yield from choice_problems(c.mesh, "config.mesh")
    if c.checkpoint.every_steps < 0 or c.checkpoint.every_minutes < 0:
        yield "config.checkpoint: intervals must not be negative"
    if c.checkpoint.keep < 1:
        yield f"config.checkpoint.keep: {c.checkpoint.keep} must be at least 1"
    if c.log.every_steps < 1:
        yield f"config.log.every_steps: {c.log.every_steps} must be at least 1"
    yield from choice_problems(c.log, "config.log")
    yield from c.eval.problems()
