"""Passkey evaluation with made-up models: scoring rule, batching, reports."""

from __future__ import annotations

import io
import json
import re
import typing

import numpy as np
import pytest

from lawcat_jax import files
from lawcat_jax.config import EvalConfig, PasskeyForm
from lawcat_jax.data.passkey import PasskeySample, eval_samples, landmark_prompt
from lawcat_jax.data.tokenize import encode
from lawcat_jax.errors import UserError
from lawcat_jax.tasks import figures, passkey, report
from lawcat_jax.tasks.progress import ProgressLine
from lawcat_jax.tasks.registry import task_named
from lawcat_jax.tasks.results import Accuracy
from lawcat_jax.tasks.runner import measure, run_evaluation
from tests.data import tokenizers as small
from tests.tasks.fakes import Oracle, constant, model

PASSKEY = task_named("passkey")


def evaluate_passkey(generate, tokenizer, **settings):
    settings = EvalConfig(**settings)
    PASSKEY.check(settings, tokenizer)
    return measure(PASSKEY, model(tokenizer, generate), settings)


def sample_of(tokenizer, form):
    (sample,) = PASSKEY.samples(tokenizer, 300, EvalConfig(samples=1, passkey_form=form, seed=0))
    return sample


@pytest.mark.parametrize("form", ["landmark", "train"])
@pytest.mark.parametrize("name", list(small.ALL))
def test_a_perfect_model_scores_everything(form, name):
    tokenizer = small.ALL[name]()
    if name == "byte_level_merged_digits" and form == "train":
        pytest.skip("after a trailing space this vocabulary spells numbers differently than the oracle does")
    oracle = Oracle(tokenizer)
    results = evaluate_passkey(oracle, tokenizer, lengths=(500, 300), samples=7, batch_size=3, passkey_form=form)
    assert list(results) == [300, 500]
    assert all(result.accuracy == 1.0 and result.n == 7 for result in results.values())
    assert all(length - 25 < result.mean_tokens < length for length, result in results.items())
    assert [count for count, _, _ in oracle.calls] == [3, 3, 1] * 2
    assert all(max(lengths) - min(lengths) <= 8 for _, _, lengths in oracle.calls)
    wrong = evaluate_passkey(constant(tokenizer), tokenizer, lengths=(300,), samples=7, passkey_form=form)
    assert wrong[300].accuracy == 0.0


def test_a_model_with_a_short_reach_fails_at_length():
    tokenizer = small.byte_level()
    results = evaluate_passkey(Oracle(tokenizer, reach=200), tokenizer, lengths=(220, 3000), samples=20)
    assert results[220].accuracy > 0.6
    assert results[3000].accuracy < 0.4
    near, far = ([score for depth, score in results[3000].records if (depth > 0.95) == late] for late in (True, False))
    assert not any(far)  # what is out of its reach is out of reach in the records too
    assert all(near)


def test_the_scoring_rule_of_the_evaluation_wording():
    tokenizer = small.byte_level()
    sample = sample_of(tokenizer, "landmark")
    key = sample.answer
    assert sample.max_new_tokens == len(key) + 1
    good = encode(tokenizer, f" {key}")
    assert PASSKEY.score(sample, good, tokenizer)
    assert PASSKEY.score(sample, good + encode(tokenizer, ". More"), tokenizer)  # later tokens do not count
    # without the space the tail of len(answer) tokens starts one digit late, which the published rule rejects
    assert not PASSKEY.score(sample, encode(tokenizer, f"{key}."), tokenizer)
    assert not PASSKEY.score(sample, encode(tokenizer, f" {int(key) + 1}"), tokenizer)
    assert not PASSKEY.score(sample, [], tokenizer)


def test_the_scoring_rule_of_the_training_wording():
    tokenizer = small.byte_level()
    sample = sample_of(tokenizer, "train")
    (drawn,) = eval_samples(tokenizer, form="train", length=300, samples=1, seed=0)
    assert sample.prompt == drawn.prompt
    answer = drawn.tokens[drawn.answer_start : drawn.answer_end].tolist()
    assert sample.max_new_tokens == 5
    assert PASSKEY.score(sample, [*answer, tokenizer.eos_token_id], tokenizer)
    assert not PASSKEY.score(sample, answer[1:], tokenizer)


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
        [
            model(tokenizer, Oracle(tokenizer)),
            model(tokenizer, Oracle(tokenizer, reach=20), label="teacher", name="some/model (teacher)"),
        ],
        output=tmp_path / "eval",
        training_length=250,
        echo=lines.append,
    )
    assert results["passkey"]["student"][500].accuracy == 1.0
    assert json.loads(json.dumps(report.rows(results)))["passkey"]["student"]["500"]["n"] == 4
    assert sorted(file.name for file in (tmp_path / "eval").iterdir()) == [
        "passkey.json",
        "passkey.md",
        "passkey.png",
        "passkey_depth.png",
        "passkey_teacher.json",
    ]
    written = json.loads((tmp_path / "eval" / "passkey.json").read_text())
    assert (written["task"], written["model"], written["role"]) == ("passkey", "some/model", "student")
    assert (written["wording"], written["samples"]) == ("evaluation wording (landmark)", 4)
    assert written["seed"] == settings.seed
    assert {"date", "versions"} <= set(written)
    assert set(written["results"]) == {"250", "300", "500"}
    for row in written["results"].values():
        assert (row["accuracy"], row["n"]) == (1.0, 4)
        assert row["interval"] == [0.5101, 1.0]
        assert [score for _, score in row["records"]] == [1.0] * 4
    teacher = json.loads((tmp_path / "eval" / "passkey_teacher.json").read_text())
    assert teacher["model"] == "some/model (teacher)"
    assert (teacher["results"]["500"]["accuracy"], teacher["results"]["500"]["n"]) == (0.0, 4)
    markdown = (tmp_path / "eval" / "passkey.md").read_text()
    assert "| 500 | 100.0 % [51, 100] (n=4) | 0.0 % [0, 49] (n=4) |" in markdown
    assert "passkey_depth.png" in markdown
    table = lines[0].split("\n")
    assert "evaluation wording" in table[0]
    assert table[1].split() == ["tokens", "student", "teacher"]
    assert table[-1].split()[:3] == ["500", "100.0", "%"]
    assert len({len(line) for line in table[1:]}) == 1
    assert "passkey.json" in lines[1]


def test_plot_is_a_labelled_png(tmp_path, monkeypatch):
    from matplotlib.image import imread

    results = {
        "student": {length: Accuracy(0.9, 50, length) for length in (256, 512, 1024, 16384)},
        "teacher": {256: Accuracy(1.0, 50, 256)},
    }
    from matplotlib.figure import Figure

    drawn = []
    original = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: (drawn.append(self), original(self, *a, **k)))
    figures.plot_lengths(tmp_path / "p.png", PASSKEY, results, title="t", training_length=256)
    assert imread(tmp_path / "p.png").shape[0] > 400
    (axes,) = drawn[0].axes
    assert axes.get_xscale() == "log"
    assert axes.get_xlabel() == "context length (tokens)"
    assert axes.get_ylabel() == "accuracy (%)"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["student", "teacher"]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["256", "512", "1K", "16K"]
    assert [text.get_text() for text in axes.texts] == ["training length 256"]


def test_heat_map_has_a_panel_for_each_model(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: drawn.append(self))
    records = ((0.05, 1.0), (0.07, 0.0), (0.95, 1.0), (1.0, 1.0))
    results = {name: {256: Accuracy(0.75, 4, 250, records)} for name in ("student", "teacher")}
    assert figures.plot_depths(tmp_path / "p.png", PASSKEY, results, title="t")
    left, right, _ = drawn[0].axes
    assert [left.get_title(), right.get_title()] == ["student", "teacher"]
    assert left.get_images()[0].get_array().filled(-1).tolist() == [[50], [-1], [-1], [-1], [100]]
    assert [text.get_text() for text in left.texts] == ["50", "100"]
    without = {"student": {256: Accuracy(0.75, 4, 250)}}
    assert not figures.plot_depths(tmp_path / "none.png", PASSKEY, without, title="t")


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
        evaluate_passkey(oracle, tokenizer, lengths=(400, 20), samples=2)
    assert not oracle.calls  # nothing was generated before the bad length showed
    with pytest.raises(UserError, match="at least one length"):
        evaluate_passkey(oracle, tokenizer, lengths=())
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="not a directory"):
        run_evaluation(EvalConfig(), [], output=tmp_path / "file")
    with pytest.raises(UserError, match="cannot write"):
        report.write_document(tmp_path / "file" / "a.json", {"results": {}})
    with pytest.raises(UserError, match=r"not one of .*passkey"):
        run_evaluation(EvalConfig(tasks=("x",)), [], output=tmp_path / "o")

    with pytest.raises(UserError, match="two models are named 'student'"):
        run_evaluation(
            EvalConfig(lengths=(250,), samples=1), [model(tokenizer, oracle)] * 2, output=tmp_path / "o", write=False
        )


def test_depth_is_where_the_needle_stands():
    tokenizer = small.byte_level()
    for j in range(5):
        text, answer = landmark_prompt(1500, j)
        drawn = PasskeySample(np.zeros(0, np.int32), 0, 0, answer, text)
        before = len(text.split("\n")[1])
        assert passkey._depth(drawn, "landmark") == pytest.approx(before / 1500, abs=1e-3)
    depths = [s.meta["depth"] for s in PASSKEY.samples(tokenizer, 600, EvalConfig(samples=40, passkey_form="train"))]
    assert min(depths) < 0.2
    assert max(depths) > 0.8


def test_every_wording_has_a_name():
    assert set(typing.get_args(PasskeyForm)) == set(passkey._WORDINGS)


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
