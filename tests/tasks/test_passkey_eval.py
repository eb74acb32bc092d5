"""Passkey evaluation with made-up models: scoring rule, batching, reports."""

from __future__ import annotations

import io
import json
import re

import numpy as np
import pytest

from lawcat_jax import files
from lawcat_jax.config import EvalConfig
from lawcat_jax.data.passkey import eval_samples
from lawcat_jax.data.tokenize import decode, encode
from lawcat_jax.errors import UserError
from lawcat_jax.tasks import report
from lawcat_jax.tasks.passkey import LengthResult, evaluate_passkey, is_hit, new_tokens
from lawcat_jax.tasks.runner import ProgressLine, run_evaluation
from tests.data import tokenizers as small


class Oracle:
    """Reads the key off the prompt, as a perfect model would; with a reach, only from that many last tokens."""

    def __init__(self, tokenizer, reach=None):
        self.tokenizer, self.reach, self.calls = tokenizer, reach, []

    def __call__(self, prompts, max_new_tokens):
        self.calls.append((len(prompts), max_new_tokens, {len(prompt) for prompt in prompts}))
        outputs = []
        for prompt in prompts:
            text = decode(self.tokenizer, prompt if self.reach is None else prompt[-self.reach :])
            found = re.search(r"The pass key is (\d+)\. Remember", text)
            answer = found.group(1) if found else "00000"
            continued = encode(self.tokenizer, decode(self.tokenizer, prompt).rstrip(" ") + f" {answer}. Yes, it is")
            start = len(encode(self.tokenizer, decode(self.tokenizer, prompt)))
            outputs.append(continued[start:][:max_new_tokens])
        return outputs


@pytest.mark.parametrize("form", ["landmark", "train"])
@pytest.mark.parametrize("name", list(small.ALL))
def test_a_perfect_model_scores_everything(form, name):
    tokenizer = small.ALL[name]()
    if name == "byte_level_merged_digits" and form == "train":
        pytest.skip("after a trailing space this vocabulary spells numbers differently than the oracle does")
    oracle = Oracle(tokenizer)
    results = evaluate_passkey(oracle, tokenizer, lengths=[500, 300], samples=7, batch_size=3, form=form)
    assert list(results) == [300, 500]
    assert all(result.accuracy == 1.0 and result.n == 7 for result in results.values())
    assert all(length - 25 < result.mean_tokens < length for length, result in results.items())
    assert [count for count, _, _ in oracle.calls] == [3, 3, 1] * 2
    assert all(max(lengths) - min(lengths) <= 8 for _, _, lengths in oracle.calls)


def test_a_model_with_a_short_reach_fails_at_length():
    tokenizer = small.byte_level()
    results = evaluate_passkey(Oracle(tokenizer, reach=200), tokenizer, lengths=[220, 3000], samples=20)
    assert results[220].accuracy > 0.6
    assert results[3000].accuracy < 0.4


def test_the_scoring_rule_of_the_evaluation_wording():
    tokenizer = small.byte_level()
    (sample,) = eval_samples(tokenizer, form="landmark", length=300, samples=1, seed=0)
    key = sample.answer
    assert new_tokens(sample, tokenizer, "landmark") == len(key) + 1
    good = encode(tokenizer, f" {key}")
    assert is_hit(sample, good, tokenizer, "landmark")
    assert is_hit(sample, good + encode(tokenizer, ". More"), tokenizer, "landmark")  # later tokens do not count
    # without the space the tail of len(answer) tokens starts one digit late, which the published rule rejects
    assert not is_hit(sample, encode(tokenizer, f"{key}."), tokenizer, "landmark")
    assert not is_hit(sample, encode(tokenizer, f" {int(key) + 1}"), tokenizer, "landmark")
    assert not is_hit(sample, [], tokenizer, "landmark")


def test_the_scoring_rule_of_the_training_wording():
    tokenizer = small.byte_level()
    (sample,) = eval_samples(tokenizer, form="train", length=300, samples=1, seed=0)
    answer = sample.tokens[sample.answer_start : sample.answer_end].tolist()
    assert new_tokens(sample, tokenizer, "train") == 5
    assert is_hit(sample, [*answer, tokenizer.eos_token_id], tokenizer, "train")
    assert not is_hit(sample, answer[1:], tokenizer, "train")


def test_evaluation_samples_do_not_occur_in_training():
    from lawcat_jax.config import DataConfig
    from lawcat_jax.data.pipeline import Samples

    tokenizer = small.byte_level()
    data = DataConfig(passkey_words=0, num_samples=100)
    train = Samples(data, tokenizer, seq_length=250, seed=EvalConfig().seed, split="train")
    seen = {train[i]["tokens"].tobytes() for i in range(100)}
    for sample in eval_samples(tokenizer, form="train", length=250, samples=50, seed=EvalConfig().seed):
        padded = np.full(250, tokenizer.pad_token_id, np.int32)
        padded[: len(sample.tokens)] = sample.tokens
        assert padded.tobytes() not in seen


def test_reports_are_written_whole(tmp_path):
    tokenizer = small.byte_level()
    lines = []
    settings = EvalConfig(lengths=(250, 300, 500), samples=4, batch_size=2)
    results = run_evaluation(
        settings,
        tokenizer,
        model="some/model",
        output=tmp_path / "eval",
        generators={"student": Oracle(tokenizer), "teacher": Oracle(tokenizer, reach=20)},
        training_length=250,
        echo=lines.append,
    )
    assert results["passkey"]["student"][500].accuracy == 1.0
    assert sorted(file.name for file in (tmp_path / "eval").iterdir()) == [
        "passkey.json",
        "passkey.png",
        "passkey_teacher.json",
    ]
    written = json.loads((tmp_path / "eval" / "passkey.json").read_text())
    assert written == {
        "task": "passkey",
        "model": "some/model",
        "results": {str(length): {"accuracy": 1.0, "n": 4} for length in (250, 300, 500)},
    }
    teacher = json.loads((tmp_path / "eval" / "passkey_teacher.json").read_text())
    assert teacher["model"] == "some/model (teacher)"
    assert teacher["results"]["500"] == {"accuracy": 0.0, "n": 4}
    table = lines[0].split("\n")
    assert "evaluation wording" in table[0]
    assert table[1].split() == ["tokens", "student", "teacher"]
    assert table[-1].split()[:3] == ["500", "100.0", "%"]
    assert len({len(line) for line in table[1:]}) == 1
    assert "passkey.json" in lines[1]


def test_plot_is_a_labelled_png(tmp_path, monkeypatch):
    from matplotlib.image import imread

    results = {
        "student": {length: LengthResult(0.9, 50, length) for length in (256, 512, 1024, 16384)},
        "teacher": {256: LengthResult(1.0, 50, 256)},
    }
    from matplotlib.figure import Figure

    drawn = []
    original = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), original(self, *a, **k)))
    report.plot_passkey(tmp_path / "p.png", results, training_length=256)
    assert imread(tmp_path / "p.png").shape[0] > 400
    (axes,) = drawn[0].axes
    assert axes.get_xscale() == "log"
    assert axes.get_xlabel() == "context length (tokens)"
    assert axes.get_ylabel() == "accuracy (%)"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["student", "teacher"]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["256", "512", "1K", "16K"]
    assert [text.get_text() for text in axes.texts] == ["training length 256"]


def test_a_failing_write_leaves_the_old_report(tmp_path):
    target = tmp_path / "a.json"
    target.write_text("old")

    def fail():
        with files.atomic_file(target) as out:
            out.write("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_bad_requests(tmp_path):
    tokenizer = small.byte_level()
    oracle = Oracle(tokenizer)
    with pytest.raises(UserError, match="minimum is"):
        evaluate_passkey(oracle, tokenizer, lengths=[400, 20], samples=2)
    assert not oracle.calls  # nothing was generated before the bad length showed
    with pytest.raises(UserError, match="at least one length"):
        evaluate_passkey(oracle, tokenizer, lengths=[])
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="not a directory"):
        run_evaluation(EvalConfig(), tokenizer, model="m", output=tmp_path / "file", generators={})
    with pytest.raises(UserError, match="cannot write"):
        report.write_passkey_json(tmp_path / "file" / "a.json", "m", {})
    with pytest.raises(UserError, match="not one of passkey"):
        run_evaluation(EvalConfig(tasks=("x",)), tokenizer, model="m", output=tmp_path / "o", generators={})


def test_progress_lines():
    out = io.StringIO()
    progress = ProgressLine("passkey student", (256, 512), 10, out)
    for length in (256, 512):
        progress(length, 5, 10, 4)
        progress(length, 10, 10, 9)
    lines = out.getvalue().splitlines()
    assert len(lines) == 2
    assert re.fullmatch(r"passkey student: 256 tokens, 10/10 samples, 90 % correct, 0:00 elapsed, 0:00 left", lines[0])


def test_config_checks_of_the_evaluation():
    assert not EvalConfig().problems()
    assert any("text" in problem for problem in EvalConfig(tasks=("perplexity",)).problems())
    assert any("lengths" in problem for problem in EvalConfig(lengths=()).problems())
