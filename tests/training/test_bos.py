"""One switch for the bos token: data, manifest of an earlier version, exported student."""

from __future__ import annotations

import json

import pytest

from lawcat_jax.config import Config, DataConfig, EvalConfig
from lawcat_jax.data.pipeline import make_dataset
from lawcat_jax.data.tokenize import set_bos_rule
from lawcat_jax.errors import UserError
from lawcat_jax.tasks.registry import task_named
from lawcat_jax.training.identity import identity, refuse_another
from lawcat_jax.training.metrics import Manifest
from tests.data import tokenizers as small


def first_tokens(tokenizer, **options):
    data = DataConfig(passkey_words=0, num_samples=4, validation_samples=0, **options)
    batch = next(iter(make_dataset(data, tokenizer, seq_length=160, batch_size=2, seed=0)))
    return set(batch["tokens"][:, 0].tolist())


def test_training_data_follows_the_tokenizer():
    with_bos, without = small.byte_level(), small.byte_level_merged_digits()
    assert first_tokens(with_bos) == {with_bos.bos_token_id}
    assert first_tokens(with_bos, add_bos="never") != {with_bos.bos_token_id}
    assert first_tokens(without) != {without.bos_token_id}
    assert first_tokens(without, add_bos="always") == {without.bos_token_id}
    assert [DataConfig(add_bos=old).add_bos for old in (True, False)] == ["always", "never"]


def test_a_run_of_an_earlier_version_goes_on_with_its_tokens(tmp_path):
    """Twice resumed: its manifest says true, whatever the default of today."""
    Manifest.open(tmp_path, Config()).begin()
    file = tmp_path / "manifest.json"
    values = json.loads(file.read_text())
    for name in ("pretrain", "stage1", "stage2"):
        values["config"][name]["data"]["add_bos"] = name != "stage2"
    file.write_text(json.dumps(values))
    for _ in range(2):
        config = Config()
        Manifest.open(tmp_path, config).begin()
        assert (config.stage1.data.add_bos, config.stage2.data.add_bos) == ("always", "never")
    other = Config()
    other.stage1.data.add_bos = "never"
    with pytest.raises(UserError, match=r"config\.stage1\.data\.add_bos"):
        Manifest.open(tmp_path, other)
    Manifest.open(tmp_path / "new", Config()).begin()
    Manifest.open(tmp_path / "new", fresh := Config())
    assert fresh.stage1.data.add_bos == "auto"


def test_a_checkpoint_of_an_earlier_version_is_that_of_the_run_that_goes_on():
    """Its metadata says true or false, the resumed run always or never."""
    config, origin = Config(), {"model": {}, "dtype": "float32", "weights": None, "tokenizer": "a"}
    config.stage1.data.add_bos, config.stage2.data.add_bos = "always", "never"
    own = identity(config, origin, {})
    old = json.loads(json.dumps(own))
    old["config"]["stage1"]["data"]["add_bos"], old["config"]["stage2"]["data"]["add_bos"] = True, False
    refuse_another(old, own, "there")
    old["config"]["stage2"]["data"]["add_bos"] = True
    with pytest.raises(UserError, match=r"config\.stage2\.data\.add_bos"):
        refuse_another(old, own, "there")


@pytest.mark.parametrize(("name", "length"), [("passkey", 400), ("niah_single_1", 600)])
def test_prompts_of_an_evaluation_follow_the_rule(name, length):
    settings, tokenizer = EvalConfig(samples=1), small.byte_level()
    for rule, begins in (("always", True), ("never", False)):
        (sample,) = task_named(name).samples(set_bos_rule(tokenizer, rule), length, settings)
        assert (sample.prompt[0] == tokenizer.bos_token_id) == begins
