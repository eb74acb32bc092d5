"""lm-evaluation-harness through this project's decoder equals its own Hugging Face backend, request by request.

Models are random and tiny, tasks are files made here: nothing is downloaded.
"""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lawcat_jax.config import EvalConfig
from lawcat_jax.data.tokenize import decode
from lawcat_jax.errors import UserError
from lawcat_jax.inference.sampling import Sampling
from lawcat_jax.tasks.compare import split_tasks
from lawcat_jax.tasks.registry import task_named
from tests.checkpoints import hf_models, students
from tests.data import tokenizers as small
from tests.tasks import fakes

pytest.importorskip("lm_eval", reason="needs pip install lm_eval")

ROOT = Path(__file__).resolve().parents[2]
POSITIONS = 160
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
WORDS = (
    "the",
    "sky",
    "is",
    "blue",
    "and",
    "grass",
    "green",
    "here",
    "we",
    "go",
    "again",
    "of",
    "times",
    "worst",
    "best",
)


TASKS = {
    "choices": {
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "shots": {
        "output_type": "multiple_choice",
        "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{gold}}",
        "num_fewshot": 3,
        "fewshot_split": "train",
        "metric_list": [{"metric": "acc"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
    "until": {
        "output_type": "generate_until",
        "doc_to_text": "{{question}} ",
        "doc_to_target": "{{choices[0]}}",
        "generation_kwargs": {"until": ["e", "\n\n"], "max_gen_toks": 40, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
    "last_word": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{text}}",
        "doc_to_target": " {{choices[0]}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
}


def write_tasks(folder: Path) -> Path:
    """Task files and their data; some texts are longer than the teacher's context."""
    folder.mkdir()
    draw = random.Random(0)

    def words(count):
        return " ".join(draw.choice(WORDS) for _ in range(count))

    for split, count in (("train", 8), ("test", 10)):
        rows = [
            {
                "question": words(6 + 3 * number),
                "choices": [words(1), words(3), words(2)],
                "gold": number % 3,
                "text": words(12 * number + 3),
            }
            for number in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, task in TASKS.items():
        common = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {s: str(folder / f"{s}.jsonl") for s in ("train", "test")}},
            "test_split": "test",
            "metadata": {"version": 1.0},
        }
        (folder / f"{name}.yaml").write_text(json.dumps(common | task))  # JSON is YAML
    group = {"group": "both", "task": ["choices", "shots"], "aggregate_metric_list": [{"metric": "acc"}]}
    (folder / "both.yaml").write_text(json.dumps(group))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lm_eval")
    patch = pytest.MonkeyPatch()
    patch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    import datasets

    patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    write_tasks(folder / "tasks")
    tokenizer = small.byte_level()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder / "tokenizer")
    tokenizer.chat_template = None
    yield folder
    patch.undo()


def requests_of(model, name, folder, **options):
    """What the harness got for every request of a task."""
    from lawcat_jax.tasks.harness import evaluation

    loaded = evaluation.load(name, str(folder / "tasks"), options.pop("fewshot", None))
    found = evaluation.measure(loaded, model, **{"limit": None, "chat": False, **options})
    instances = loaded["tasks"][name].instances
    return [instance.resps[0] for instance in instances], found["results"][name]


def assert_same(ours, theirs):
    (our_requests, our_metrics), (their_requests, their_metrics) = ours, theirs
    assert len(our_requests) == len(their_requests) > 5
    assert any(our_requests)  # not empty texts only
    for mine, other in zip(our_requests, their_requests, strict=True):
        if isinstance(mine, str):
            assert mine == other
            continue
        totals = [x[0] if isinstance(x, tuple) else x for x in (mine, other)]
        assert abs(totals[0] - totals[1]) < 1e-4
        if isinstance(mine, tuple):
            assert mine[1] == other[1]
    for key, value in their_metrics.items():
        if isinstance(value, float):
            assert math.isclose(our_metrics[key], value, rel_tol=1e-4), key


def adapter(directory, folder, *, teacher=False, batch_size=3):
    from lawcat_jax.inference.loading import load_for_inference
    from lawcat_jax.tasks.decoder_model import decoder_models
    from lawcat_jax.tasks.harness.adapter import HarnessModel

    loaded = load_for_inference(str(directory), tokenizer=str(folder / "tokenizer"), dtype="float32")
    options = {"name": "m", "is_student": loaded.is_student, "teacher": teacher, "batch_size": batch_size}
    models = decoder_models(loaded.graphdef, loaded.params, loaded.tokenizer, **options)
    return HarnessModel(models[-1], seed=0)


def harness_own(directory, folder, **options):
    pytest.importorskip("torch")
    pytest.importorskip("accelerate", reason="the harness' Hugging Face backend needs accelerate")
    from lm_eval.models.huggingface import HFLM

    return HFLM(
        pretrained=str(directory),
        tokenizer=str(folder / "tokenizer"),
        device="cpu",
        dtype="float32",
        batch_size=3,
        **options,
    )


@pytest.fixture(scope="module")
def teacher(folder):
    """A random Llama: (its directory, the harness' own backend for it)."""
    pytest.importorskip("torch")
    directory = hf_models.make(
        folder / "teacher", vocab_size=420, max_position_embeddings=POSITIONS, bos_token_id=0, eos_token_id=1
    )
    return directory, harness_own(directory, folder), adapter(directory, folder)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("choices", {}),
        ("rolling", {}),
        *(pytest.param(name, {}, marks=pytest.mark.slow) for name in ("shots", "until", "last_word")),
        pytest.param("choices", {"fewshot": 5, "limit": 7}, marks=pytest.mark.slow),
        pytest.param("shots", {"chat": True}, marks=pytest.mark.slow),
        pytest.param("until", {"chat": True, "limit": 6}, marks=pytest.mark.slow),
    ],
)
def test_teachers_equal_the_harness_own_backend(teacher, folder, name, options):
    _, theirs, ours = teacher
    assert_same(requests_of(ours, name, folder, **options), requests_of(theirs, name, folder, **options))


@pytest.mark.slow
def test_stop_strings_end_answers_where_the_harness_own_backend_ends_them(teacher, folder):
    """Special tokens, what stands across them, and strings that its window of the last tokens misses too; answers made alone."""
    from lm_eval.api.instance import Instance

    directory = teacher[0]
    theirs = harness_own(directory, folder)
    theirs.batch_size_per_gpu = 1
    ours = adapter(directory, folder)
    tokenizer = ours.tokenizer
    prompts = ["The sky is blue. " * count for count in range(1, 7)]
    free = [ours._model.sample([ours.tok_encode(prompt)], 40, [1], Sampling(), None)[0] for prompt in prompts]
    common = max({token for answer in free for token in answer[3:]}, key=lambda t: sum(t in a[3:] for a in free))
    for one in (tokenizer, theirs.tokenizer):  # a token that is made is a special one
        one.add_special_tokens({"additional_special_tokens": [tokenizer.convert_ids_to_tokens(common)]})
    mark = tokenizer.decode([common])
    assert decode(tokenizer, [common]) == ""
    places = [(answer, answer.index(common)) for answer in free if common in answer[3:-1]]
    across = [tokenizer.decode(answer[at - 1 : at + 2]) for answer, at in places][:2]
    whole = [tokenizer.decode(answer[at - 3 : at + 3]) for answer, at in places][:1]
    found = 0
    for until in ([mark], across, whole, [mark + "e", "e" + mark], ["e", mark]):
        options = {"until": until, "max_gen_toks": 40, "do_sample": False}
        asked = [Instance("generate_until", {}, (prompt, dict(options)), 0) for prompt in prompts]
        answers = ours.generate_until(asked)
        assert answers == theirs.generate_until(asked, disable_tqdm=True)
        found += any(answer != decode(tokenizer, tokens) for answer, tokens in zip(answers, free, strict=True))
    assert found >= 3


@pytest.mark.slow
@pytest.mark.parametrize("kind", students.KINDS)
def test_exported_students_agree_in_the_harness_own_backend(folder, kind, tmp_path, monkeypatch):
    """A student under this adapter, and what ``convert --to=transformers`` wrote of it under the backend ``hf``."""
    import dataclasses

    transformers = pytest.importorskip("transformers")
    from lawcat_jax.checkpoints.conversion import convert

    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = dataclasses.replace(
        students.MODEL, vocab_size=420, max_position_embeddings=2048, bos_token_id=0, eos_token_ids=(1,)
    )
    source = students.write_student(tmp_path / "student", kind, model=model)
    convert(str(source), str(tmp_path / "exported"), to="transformers")
    theirs = harness_own(tmp_path / "exported", folder, trust_remote_code=True)
    ours = adapter(source, folder)
    for name in TASKS:
        assert_same(requests_of(ours, name, folder), requests_of(theirs, name, folder))


@pytest.mark.slow
def test_a_students_rolling_likelihood_is_one_pass(folder, tmp_path):
    """Texts longer than any chunk: the state is carried, and nothing is cut to the positions of the teacher."""
    import jax

    from lawcat_jax.checkpoints.logits import student_logits
    from lawcat_jax.checkpoints.model_dir import load_model
    from lawcat_jax.inference import likelihood
    from lawcat_jax.models import abstract

    bundle = load_model(students.write_student(tmp_path / "student"), dtype="float32")
    graphdef, _ = abstract(bundle.model, bundle.attention, bundle.lora)
    draw = np.random.default_rng(0)
    rows = [
        (draw.integers(0, 48, n).tolist(), draw.integers(0, 48, k).tolist()) for n, k in ((1, 150), (90, 2), (40, 70))
    ]
    rows += [(rows[1][0], [*rows[1][1][:-1], 5])]  # reads the same tokens
    seen = []
    found = likelihood.log_likelihoods(
        graphdef,
        bundle.params,
        rows,
        batch_size=2,
        prefill_chunk=32,
        progress=lambda *numbers: seen.append(numbers),
    )
    assert seen == [(1 + 1, 4), (4, 4)]
    whole = [[*context, *following] for context, following in rows]
    padded = np.asarray([[*tokens, *[0] * (160 - len(tokens))] for tokens in whole], np.int32)  # causal: harmless
    logits = student_logits(bundle, padded)
    for (context, following), row, (total, greedy) in zip(rows, logits, found, strict=True):
        chances = np.asarray(jax.nn.log_softmax(row[len(context) - 1 :][: len(following)]))
        assert abs(total - chances[np.arange(len(following)), following].sum()) < 1e-3
        assert greedy == (chances.argmax(-1) == following).all()
    best = int(chances[0].argmax())  # after the context of the last row
    pairs = [(context, [best]), (context, [(best + 1) % 48])]
    again = likelihood.log_likelihoods(graphdef, bundle.params, pairs, batch_size=2, prefill_chunk=32)
    assert [greedy for _, greedy in again] == [True, False]


def test_reports_and_going_on(folder, tmp_path):
    """Metrics of a known model, in the project's files; a finished task is not asked for again."""
    from lawcat_jax.tasks.runner import run_evaluation

    tokenizer = small.byte_level()
    asked = []

    def likelihoods(rows, progress=None):
        asked.append(len(rows))
        return [(-float(len(following)), False) for _, following in rows]

    settings = EvalConfig(
        tasks=(), lm_eval=("choices", "rolling"), lm_eval_tasks_dir=str(folder / "tasks"), lm_eval_limit=4
    )

    def models(second=likelihoods):
        yield fakes.model(tokenizer, likelihoods=likelihoods)
        yield fakes.model(tokenizer, likelihoods=second, label="teacher")

    def fails(*_):
        raise KeyboardInterrupt

    lines = []
    with pytest.raises(KeyboardInterrupt):
        run_evaluation(settings, models(fails), output=tmp_path / "out", echo=lines.append)
    assert asked == [12, 4]
    results = run_evaluation(settings, models(), output=tmp_path / "out", echo=lines.append)
    assert asked == [12, 4, 12, 4]  # the first model's were kept
    rows = [json.loads(line) for line in (folder / "tasks" / "test.jsonl").read_text().splitlines()][:4]
    shortest = [
        int(np.argmin([len(small.byte_level().encode(" " + c, add_special_tokens=False)) for c in row["choices"]]))
        for row in rows
    ]
    accuracy = np.mean([choice == row["gold"] for choice, row in zip(shortest, rows, strict=True)])
    metric = results["lm_eval:choices"]["student"]["acc"]
    assert (metric.value, metric.n) == (accuracy, 4)
    assert set(results["lm_eval:rolling"]["teacher"]) == {"word_perplexity", "bits_per_byte"}
    written = json.loads((tmp_path / "out" / "lm_eval_choices.json").read_text())
    assert written["results"]["acc"] == {"value": accuracy, "stderr": metric.stderr, "n": 4}
    assert written["versions"]["lm_eval"]
    assert written["samples"] == 4
    table = (tmp_path / "out" / "lm_eval_choices.md").read_text()
    assert f"| acc | {accuracy:.4f} ± {metric.stderr:.4f} |" in table
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        f"lm_eval_{name}{end}" for name in ("choices", "rolling") for end in (".json", "_teacher.json", ".md")
    }


def test_a_group_has_its_tasks_and_their_mean(folder):
    """The mean that the harness makes of two tasks, and the number of samples behind it."""

    def likelihoods(rows, progress=None):
        return [(-float(len(following)), False) for _, following in rows]

    settings = EvalConfig(tasks=(), lm_eval=("both",), lm_eval_tasks_dir=str(folder / "tasks"))
    found = task_named("lm_eval:both").measure(fakes.model(small.byte_level(), likelihoods=likelihoods), 0, settings)
    assert set(found) >= {"both acc", "choices acc", "choices acc_norm", "shots acc"}
    assert found["both acc"].value == pytest.approx((found["choices acc"].value + found["shots acc"].value) / 2)
    assert [found[name].n for name in ("both acc", "choices acc")] == [20, 10]


def test_mistakes_are_found_before_a_model_is_asked(folder, tmp_path):
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "bad.yaml").write_text("task: bad\ndataset_path: json\ntest_split: test\noutput_type: nothing\n")
    tokenizer = small.byte_level()

    def refused(name, message, **options):
        options = {"lm_eval_tasks_dir": str(tmp_path / "t"), **options}
        with pytest.raises(UserError, match=message) as caught:
            task_named(name).check(EvalConfig(**options), tokenizer)
        assert "\n" not in str(caught.value)

    refused("lm_eval:bad", "lm_eval:bad: its task file or data cannot be read")
    refused("lm_eval:x", "no such directory", lm_eval_tasks_dir="nowhere")
    refused("lm_eval:bad", "has no chat template", lm_eval_chat=True)
    assert split_tasks(["lm_eval:a", " b", "passkey", "c", ""]) == (("passkey",), ("a", "b", "c"))
    assert split_tasks(["b", "lm_eval:passkey"]) == (("b",), ("passkey",))
    short = fakes.model(tokenizer, positions=100, sample=fakes.unused, likelihoods=fakes.unused)
    with pytest.raises(UserError, match="asks for up to 256 new tokens"):
        harness_model(short)._generate(["a"], {})
    with pytest.raises(UserError, match="generation_kwargs num_beams"):
        harness_model(fakes.model(tokenizer))._generate(["a"], {"num_beams": 4})


def harness_model(model):
    from lawcat_jax.tasks.harness.adapter import HarnessModel

    return HarnessModel(model, seed=0)


@pytest.mark.slow
def test_the_command(folder, teacher, tmp_path):
    directory, theirs, _ = teacher
    command = [
        *(sys.executable, "-m", "lawcat_jax.evaluate", f"--checkpoint={directory}"),
        f"--tokenizer={folder / 'tokenizer'}",
        *("--tasks=lm_eval:choices,until", "--lm_eval_limit=6", f"--lm_eval_tasks_dir={folder / 'tasks'}"),
        "--output=out",
    ]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "metric" in done.stdout
    found = json.loads((tmp_path / "out" / "lm_eval_choices.json").read_text())["results"]
    _, metrics = requests_of(theirs, "choices", folder, limit=6)
    assert found["acc"]["value"] == metrics["acc,none"]
    assert found["acc_norm"]["value"] == metrics["acc_norm,none"]
