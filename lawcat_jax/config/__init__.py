"""Typed run configuration: one tree of dataclasses describes a whole experiment.

A file in ``configs/`` returns a :class:`Config` from ``get_config()``; single fields are overridden on the command
line (``--config.stage1.learning_rate=1e-3``) by ``ml_collections.config_flags``. :meth:`Config.validate` finds every
problem and raises them together, each naming the field and the remedy. ``docs/config.md`` lists all fields; it is
generated from the docstrings in this package.

    choices    the named options, as Literal types: the only list of what a field may hold
    tree       what all config classes have in common: no unknown fields, type checks, JSON
    model      the architecture of the decoder
    attention  the token mixer that replaces softmax attention, and LoRA
    data       what a training stage reads
    stage      one training stage
    run        everything else, and Config itself
    recipe     data and stages that config files of several teachers have in common

Nothing here imports jax: a config is read and checked on any machine, at once. There is no ``from __future__ import
annotations`` in the files with dataclasses: config_flags needs the types of fields, not their names.
"""

from lawcat_jax.config.attention import AttentionConfig, LoraConfig, attention_problems, lora_problems
from lawcat_jax.config.choices import (
    BabiTask,
    Bos,
    Conv,
    DataKind,
    Distributed,
    Divergence,
    Dtype,
    Family,
    FeatureMap,
    GateKind,
    Hay,
    Implementation,
    Init,
    LayerProjection,
    LossDenominator,
    MixerKind,
    NormPosition,
    PasskeyForm,
    Progress,
    Projection,
    QkNorm,
    Remat,
    RopeKind,
    Schedule,
    SourceKind,
    StatePassing,
    TaskName,
    ValidationWording,
    WindowKind,
    Wording,
)
from lawcat_jax.config.data import DataConfig, MixtureSource
from lawcat_jax.config.model import ModelConfig, RopeScaling, model_problems
from lawcat_jax.config.run import CheckpointConfig, Config, EvalConfig, LogConfig, MeshConfig, TeacherConfig
from lawcat_jax.config.stage import StageConfig
from lawcat_jax.config.tree import ConfigError, Node, choice_problems, from_dict, to_dict, type_problems

__all__ = [
    "AttentionConfig",
    "BabiTask",
    "Bos",
    "CheckpointConfig",
    "Config",
    "ConfigError",
    "Conv",
    "DataConfig",
    "DataKind",
    "Distributed",
    "Divergence",
    "Dtype",
    "EvalConfig",
    "Family",
    "FeatureMap",
    "GateKind",
    "Hay",
    "Implementation",
    "Init",
    "LayerProjection",
    "LogConfig",
    "LoraConfig",
    "LossDenominator",
    "MeshConfig",
    "MixerKind",
    "MixtureSource",
    "ModelConfig",
    "Node",
    "NormPosition",
    "PasskeyForm",
    "Progress",
    "Projection",
    "QkNorm",
    "Remat",
    "RopeKind",
    "RopeScaling",
    "Schedule",
    "SourceKind",
    "StageConfig",
    "StatePassing",
    "TaskName",
    "TeacherConfig",
    "ValidationWording",
    "WindowKind",
    "Wording",
    "attention_problems",
    "choice_problems",
    "from_dict",
    "lora_problems",
    "model_problems",
    "to_dict",
    "type_problems",
]
