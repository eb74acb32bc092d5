"""Numbers that cannot be: each is refused before anything runs, with the field's name."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from lawcat_jax.config import Config, ConfigError, DataConfig, MixtureSource, ModelConfig, StageConfig

CONFIGS = Path(__file__).parents[1] / "configs"

BAD = [
    ("stage1.b1", 1.0),
    ("stage1.b2", -0.1),
    ("stage2.b2", float("nan")),
    ("stage1.plateau_factor", 0.0),
    ("stage1.plateau_factor", -2.0),
    ("stage1.plateau_factor", 1.0),
    ("stage1.plateau_patience", -1),
    ("stage1.gate_lr_multiplier", 0.0),
    ("stage1.gate_lr_multiplier", -1.0),
    ("stage1.trainable", ("(",)),
    ("stage1.steps", 2**31),
    ("stage1.batch_size", 2**21),
    ("stage1.seq_length", 10**12),
    ("stage1.epochs", -1.0),
    ("stage1.data.num_samples", 10**12),
    ("stage1.data.num_workers", 10**6),
    ("stage1.data.validation_samples", 10**12),
    ("stage2.data.answer_weight", 0.0),
    ("attention.sinks", 4),
    ("attention.softmax_layers", (-1,)),
    ("lora.alpha", 0.0),
    ("lora.targets", ()),
    ("seed", 2**64),
    ("max_bad_steps", 0),
    ("mesh.data", 10**9),
    ("eval.lengths", (10**12,)),
    ("eval.samples", 10**12),
    ("eval.tasks", ()),
    ("eval.seed", -(2**64)),
    ("teacher.architecture.rope_theta", 0.0),
    ("teacher.architecture.rms_norm_eps", -1e-5),
    ("teacher.architecture.rope_scaling.factor", -2.0),
    ("teacher.architecture.rope_scaling.beta_fast", 0.0),
    ("teacher.architecture.bos_token_id", -1),
    ("teacher.architecture.eos_token_ids", (2, -1)),
    ("teacher.architecture.pad_token_id", -1),
    ("teacher.architecture.num_layers", 10**9),
    ("teacher.architecture.max_position_embeddings", 0),
]


def good() -> Config:
    config = Config(stage1=StageConfig(trainable=("^mixers/",)), stage2=StageConfig(trainable=("^lora/",)))
    config.teacher.architecture = ModelConfig()
    return config


def test_the_defaults_and_all_recipes_are_accepted():
    good().validate()
    for file in sorted(CONFIGS.glob("*.py")):
        spec = importlib.util.spec_from_file_location(file.stem, file)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.get_config().validate()


@pytest.mark.parametrize(("field", "value"), BAD)
def test_refused_with_the_name_of_the_field(field, value):
    config = good()
    *path, last = field.split(".")
    node = config
    for name in path:
        node = getattr(node, name)
    setattr(node, last, value)
    with pytest.raises(ConfigError) as caught:
        config.validate()
    assert f"config.{field}: " in str(caught.value)


def test_streams_in_which_no_token_counts_are_refused():
    for data, name in (
        (DataConfig(kind="text", source="a.txt", text_weight=0.0), "data.text_weight"),
        (DataConfig(kind="instruction", source="a.jsonl", answer_weight=0.0), "data.answer_weight"),
        (
            DataConfig(kind="mixture", mixture=(MixtureSource(kind="text", source="a.txt", text_weight=0.0),)),
            r"data.mixture\[0\].text_weight",
        ),
    ):
        config = good()
        config.stage2.data = data
        with pytest.raises(ConfigError, match=f"config.stage2.{name}"):
            config.validate()


def test_a_file_with_an_unknown_suffix_is_refused_before_anything_runs(tmp_path):
    (tmp_path / "a.csv").write_text("a,b")
    (tmp_path / "a.md").write_text("a text")
    for change, name in (
        (
            lambda c: setattr(c.stage2, "data", DataConfig(kind="text", source=str(tmp_path / "a.csv"))),
            "stage2.data.source",
        ),
        (
            lambda c: setattr(c.stage1, "data", DataConfig(kind="instruction", source=str(tmp_path / "a.md"))),
            "stage1.data",
        ),
        (lambda c: c.eval.__init__(tasks=("perplexity",), text=str(tmp_path / "a.csv")), "eval.text"),
    ):
        config = good()
        change(config)
        with pytest.raises(ConfigError, match=rf"config\.{name}.*unknown suffix"):
            config.validate()
    config = good()
    config.stage2.data = DataConfig(kind="text", source=str(tmp_path / "a.md"))
    config.validate()


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (
            DataConfig(source="books/*.txt"),
            r"data\.source: 'books/\*\.txt' is not read by kind 'passkey', only by 'text'",
        ),
        (DataConfig(hay="books", hay_source="b"), r"data\.hay: 'books' .* where the wording is not 'paper'"),
        (DataConfig(hay_source="b", wording="varied"), r"data\.hay_source: 'b' .* with hay 'books' or 'mixed'"),
        (DataConfig(kind="niah", hay_source="b"), r"data\.hay_source: 'b' is not read by kind 'niah'"),
        (DataConfig(kind="niah", babi_source="b"), r"data\.babi_source: 'b' .* only by 'babilong'"),
        (DataConfig(kind="text", source="t", wording="varied"), r"data\.wording: .* 'text' with a passkey_fraction"),
        (DataConfig(kind="instruction", source="t", text_key="body"), r"data\.text_key: 'body' .* only by 'text'"),
        (DataConfig(mixture=(MixtureSource(kind="niah"),)), r"data\.mixture: 1 source\(s\) .* only by 'mixture'"),
        (
            DataConfig(kind="mixture", wording="varied", mixture=(MixtureSource(kind="niah"),)),
            r"data\.wording: .* a mixture's sources have their own",
        ),
        (
            DataConfig(kind="mixture", mixture=(MixtureSource(kind="passkey", source="t"),)),
            r"data\.mixture\[0\]\.source: 't' is not read by kind 'passkey'",
        ),
    ],
)
def test_a_field_that_the_kind_of_data_does_not_read_is_refused(data, told):
    config = good()
    config.stage1.data = data
    with pytest.raises(ConfigError, match=rf"config\.stage1\.{told}"):
        config.validate()


def test_passkeys_among_text_read_what_passkey_samples_read():
    config = good()
    config.stage2.data = DataConfig(
        kind="text", source="t", passkey_fraction=0.5, wording="varied", hay="mixed", hay_source="b", answer_weight=2.0
    )
    config.validate()
    config.stage2.data.hay_source = ""
    with pytest.raises(ConfigError, match="hay_source: name books"):
        config.validate()
