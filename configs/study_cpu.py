"""The study of configs/study_smollm2.py in small, on the embedded teacher of 0.9 M parameters: a few minutes on 2 cores.

Command: ``python -m lawcat_jax.study --config=configs/study_cpu.py``. It shows what a study does and is run by the slow
tests. Its numbers say nothing about the method: the students learn for seconds.

The teacher knows the passkey task within its context of 128 tokens. Students train on samples of 128 tokens; a row is
trained alone by ``python -m lawcat_jax.train --config=configs/study_cpu.py:no_conv_seed0``.
"""

from lawcat_jax.analysis.study import Cells, Claim, Evaluation, Row, Study
from lawcat_jax.config import (
    AttentionConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    EvalConfig,
    LogConfig,
    StageConfig,
    TeacherConfig,
)

LENGTH = 128
HEADLINE = (30, 40)
ABLATION = (12, 16)

ATTENTION = {
    "lawcat": AttentionConfig(gate_rank=16),
    "lolcats": AttentionConfig(kind="lolcats", window_size=16, tie_qk=False),
    "window_sinks": AttentionConfig(kind="window", window_size=28, sinks=4),
    "no_conv": AttentionConfig(gate_rank=16, conv="off"),
}


def get_config(variant: str = "lawcat_seed0") -> Config:
    """The configuration of a run: a row of the study and a seed."""
    name, _, seed = variant.partition("_seed")
    get_study().row(name)
    first, second = HEADLINE if name == "lawcat" else ABLATION
    data = DataConfig(kind="passkey", passkey_words=0, num_samples=20_000, validation_samples=16)
    trained = name != "window_sinks"  # which is the teacher with another attention
    stage = {
        "enabled": trained,
        "batch_size": 8,
        "seq_length": LENGTH,
        "clip_norm": 1.0,
        "learning_rate": 1e-2,
        "data": data,
    }
    return Config(
        seed=int(seed or 0),
        teacher=TeacherConfig(source="asset:tiny_llama"),
        attention=ATTENTION.get(name, ATTENTION["lawcat"]),
        stage1=StageConfig(steps=first, trainable=(r"^mixers/",), **stage),
        stage2=StageConfig(
            steps=second,
            trainable=(r"^lora/", r"^mixers/"),
            state_passing="shuffled" if name == "shuffled" else "off",
            **stage,
        ),
        checkpoint=CheckpointConfig(every_steps=5),
        log=LogConfig(tensorboard=False, diagnostics=False),
        eval=EvalConfig(lengths=(LENGTH, 2 * LENGTH), passkey_form="train"),
    )


def get_study() -> Study:
    """Rows, evaluations and claims."""
    lengths = (LENGTH, 2 * LENGTH)
    return Study(
        name="study_cpu",
        title="A study in small, on the embedded teacher",
        rows=(
            Row("teacher", "teacher", "teacher"),
            Row("lawcat_short", "LAWCAT, short", "reference"),
            Row("lolcats", "LoLCATs", "baseline", reference="lawcat_short"),
            Row("window_sinks", "window and sinks, not trained", "baseline", reference="lawcat_short"),
            Row("no_conv", "no convolution", "ablation", reference="lawcat_short"),
            Row("shuffled", "states passed between batches", "ablation", reference="lawcat_short"),
            Row("lawcat", "LAWCAT", "headline"),
        ),
        evaluations=(
            Evaluation(
                "passkey",
                ("passkey",),
                lengths,
                samples=20,
                batch_size=10,
                groups=("headline", "reference", "ablation", "baseline", "teacher"),
                passkey_form="train",
            ),
        ),
        claims=(
            Claim(
                "Convolution helps retrieval",
                "paper, Tables 1 and 2",
                "lawcat_short",
                "no_conv",
                (Cells("passkey", lengths, "train"),),
            ),
        ),
    )
