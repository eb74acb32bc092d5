"""What a study's table turns into: jobs, what they share, and what is refused before anything runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from lawcat_jax import models
from lawcat_jax.analysis.study import Cells, Claim, Evaluation, Row
from lawcat_jax.analysis.study.plan import make_plan, run_facts
from lawcat_jax.analysis.study.table import load_study
from lawcat_jax.config import Config, DataConfig
from lawcat_jax.errors import UserError
from lawcat_jax.training.identity import differences

from .small import STUDY, get_config

ROOT = Path(__file__).parents[3]
OUT = Path("runs/small")


def plan(study=STUDY, configs=get_config, **options):
    return make_plan(study, configs, config="study.py", output=OUT, **options)


def test_one_stage_1_serves_all_runs_that_have_it_in_common():
    jobs = {job.name: job for job in plan().jobs}
    stages = [job for job in jobs.values() if job.does == "stage1"]
    assert len(stages) == 1  # of lawcat and shuffled with seed 0; seed 1, no_conv and long are alone
    (stage1,) = stages
    assert {job.name for job in jobs.values() if stage1.name in job.after} == {"lawcat_seed0", "shuffled_seed0"}
    shared, alone = jobs["shuffled_seed0"], jobs["shuffled_seed1"]
    assert f"--config.teacher.source=runs/small/runs/{stage1.name}/student" in shared.arguments
    assert "--config.stage1.enabled=False" in shared.arguments
    assert "--config.stage2.enabled=False" in stage1.arguments
    assert not any(
        "teacher.source" in text or "enabled=False" in text for text in alone.arguments if "eval" not in text
    )
    assert (stage1.steps, shared.steps, alone.steps) == (10, 10, 20)
    assert alone.tokens == 20 * 8 * 1024


def test_every_job_stands_behind_what_it_waits_for():
    done: set[str] = set()
    for job in plan().jobs:
        assert set(job.after) <= done, job.name
        done.add(job.name)
    names = [job.name for job in plan().jobs]
    assert len(names) == len(set(names))
    assert names.index("lawcat_seed0.passkey") < names.index(
        "no_conv_seed0"
    )  # a row is measured before the next begins


def test_a_row_is_measured_by_the_evaluations_that_name_it():
    names = {job.name for job in plan().jobs if job.does == "evaluate"}
    assert "teacher.text" in names
    assert "teacher.passkey" not in names
    assert {"long_seed0.text", "long_seed1.text", "long_seed0.passkey"} <= names
    assert "lawcat_seed0.text" not in names
    job = plan().job("teacher.text")
    assert "--checkpoint=asset:tiny_llama" in job.arguments
    assert "--text=/home/me/books/test" in job.arguments
    assert job.products == (OUT / "eval/teacher/text/perplexity.json",)


def test_a_gguf_teacher_is_converted_once():
    def configs(variant: str) -> Config:
        config = get_config(variant)
        config.teacher.source = "package:some_model"
        return config

    jobs = plan(configs=configs).jobs
    assert [job.name for job in jobs if job.does == "convert"] == ["teacher"]
    assert all(job.after for job in jobs[1:])
    assert "--config.teacher.source=runs/small/teacher" in plan(configs=configs).job("no_conv_seed0").arguments
    assert "--checkpoint=runs/small/teacher" in plan(configs=configs).job("teacher.text").arguments


def test_threads_are_set_where_a_run_has_some_and_do_not_make_it_another_run():
    with_three = plan(workers=3)
    assert "--config.stage1.data.num_workers=3" in with_three.job("no_conv_seed0").arguments
    assert not any("stage2.data.num_workers" in text for text in with_three.job("no_conv_seed0").arguments)
    a, b = get_config("no_conv_seed0"), get_config("no_conv_seed0")
    b.stage1.data.num_workers = 3
    assert differences(run_facts(a), run_facts(b), {}, "config") == []
    b.stage1.data.num_samples += 1
    assert len(differences(run_facts(a), run_facts(b), {}, "config")) == 1


def test_only_takes_rows_and_runs_with_all_that_they_wait_for():
    assert {job.name.partition("_")[0] for job in plan().needed(["shuffled_seed0"])} == {"stage1", "shuffled"}
    assert not any("seed1" in job.name for job in plan().needed(["shuffled_seed0"]))
    assert {job.row for job in plan().needed(["no_conv"])} == {"no_conv"}
    assert plan().needed([]) == plan().jobs
    with pytest.raises(UserError, match=r"no row 'no_cnv'; did you mean 'no_conv'\?"):
        plan().needed(["no_cnv"])


def test_rows_are_compared_at_the_same_steps_only():
    study = dataclasses.replace(STUDY, rows=(*STUDY.rows[:4], dataclasses.replace(STUDY.rows[4], reference="lawcat")))
    with pytest.raises(
        UserError, match="'long' has 20 steps of 8192 tokens in stage 2, its reference 'lawcat' 10 of 8192"
    ):
        plan(study)


def test_students_of_two_teachers_are_no_study():
    def configs(variant: str) -> Config:
        config = get_config(variant)
        config.teacher.source = "models/other" if variant == "long_seed1" else config.teacher.source
        return config

    with pytest.raises(UserError, match="long_seed1 has another teacher than lawcat_seed0"):
        plan(configs=configs)


def niah(name: str, haystack: str, *rows: str, samples: int = 50) -> Evaluation:
    return Evaluation(name, ("niah_single_2",), (128,), samples=samples, haystack=haystack, rows=rows)


def test_steps_that_only_a_text_tells_are_refused():
    def configs(variant: str) -> Config:
        config = get_config(variant)
        config.stage2.steps, config.stage2.data = 0, DataConfig(kind="text", source="books")
        return config

    with pytest.raises(UserError, match=r"lawcat_seed0: stage2\.steps is 0, .* so state them"):
        plan(configs=configs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rows": (*STUDY.rows, STUDY.rows[1])}, "row 'lawcat' is there twice"),
        ({"rows": (Row("a", "a", "ablation"),)}, "name the reference of this ablation"),
        ({"rows": (Row("a", "a", "other"),)}, "'other' is not one of 'headline'"),
        ({"rows": (Row("a_seed1", "a", "headline"),)}, "a name is small letters"),
        ({"rows": (Row("a", "a", "headline", seeds=()),)}, "name at least one seed"),
        ({"claims": (Claim("x", "y", "lawcat", "nobody", ()),)}, "claim 'x': no row 'nobody'"),
        (
            {
                "claims": (Claim("x", "y", "lawcat", "long", (Cells("passkey", (128, 512)),)),),
                "evaluations": STUDY.evaluations,
            },
            "claim 'x': row 'long' is not measured by passkey at [512] tokens",
        ),
        (
            {
                "claims": (Claim("x", "y", "long", "lawcat", (Cells("passkey", (128,), "train"),)),),
                "evaluations": STUDY.evaluations,
            },
            "claim 'x': row 'long' is not measured by passkey at [128] tokens",
        ),
        (
            {
                "claims": (Claim("x", "y", "long", "teacher", (Cells("perplexity", (128,)),)),),
                "evaluations": STUDY.evaluations,
            },
            "claim 'x': perplexity has no right answers to count",
        ),
        ({"evaluations": (Evaluation("e", ("passkey",), (), rows=("lawcat",)),)}, "name at least one length"),
        ({"evaluations": (Evaluation("e", ("passkey",), (8,), rows=("nobody",)),)}, "evaluation 'e': no row 'nobody'"),
        ({"evaluations": (Evaluation("e", ("perplexity",), (8,)),)}, "name a text"),
        (
            {"evaluations": (niah("a", "/x/pg/books", "lawcat"), niah("b", "/y/pg/books", "long"))},
            "'a' and 'b' measure niah_single_2, haystack pg/books, with another haystack: they would stand in one table",
        ),
        (
            {
                "evaluations": tuple(
                    Evaluation(x, ("perplexity",), (8,), text=f"/{x}/a.txt", rows=("long",)) for x in "ab"
                )
            },
            "'a' and 'b' measure perplexity, text a, with another text",
        ),
        (
            {"evaluations": (niah("a", "books", "lawcat", "long"), niah("b", "books", "long", samples=9))},
            "of row 'long' at [128] tokens: only one of the numbers would stay",
        ),
        (
            {
                "evaluations": (niah("a", "books", "lawcat"), niah("b", "essays", "long")),
                "claims": (Claim("x", "y", "lawcat", "long", (Cells("niah_single_2", (128,)),)),),
            },
            "'lawcat' and 'long' are measured by niah_single_2 in different tables (haystack books; haystack essays)",
        ),
    ],
)
def test_problems_of_a_table(changes, message):
    problems = dataclasses.replace(STUDY, **{"evaluations": (), "claims": (), **changes}).problems()
    assert any(message in problem for problem in problems), problems
    assert STUDY.problems() == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = (", "SyntaxError"),
        ("x = 1\nraise OSError('gone')", "line 2: OSError: gone"),
        ("def get_study(): pass", "no get_config"),
        ("def get_study(): pass\ndef get_config(v): pass", "must return a lawcat_jax.analysis.study.Study"),
    ],
)
def test_a_file_that_is_no_study_is_one_line(tmp_path, text, message):
    (tmp_path / "s.py").write_text(text)
    with pytest.raises(UserError, match=message) as problem:
        load_study(str(tmp_path / "s.py"))
    assert "\n" not in str(problem.value)
    with pytest.raises(UserError, match="no such file"):
        load_study(str(tmp_path / "t.py"))


# What each row of the real study changes, beside its reference.
CHANGES = {
    "lolcats_terraced": {"attention.kind", "attention.window_size", "attention.window_kind", "attention.tie_qk"},
    "lolcats_sliding": {"attention.kind", "attention.window_size", "attention.tie_qk"},
    "window_sinks": {
        *("attention.kind", "attention.window_size", "attention.sinks"),
        *("stage1.enabled", "stage2.trainable"),
    },
    "window_sinks_untrained": {
        *("attention.kind", "attention.window_size", "attention.sinks"),
        *("stage1.enabled", "stage2.trainable", "stage2.enabled"),
    },
    "no_conv": {"attention.conv"},
    "plain_linear": {"attention.gate_kind", "attention.conv"},
    "no_normalizer": {"attention.normalize"},
    "rope": {"attention.rope_linear"},
    "window": {"attention.window_size"},
    "composed": {f"{stage}.data.mixture[{part}].wording" for stage in ("stage1", "stage2") for part in (1, 2, 3)},
    "composed_window": {"attention.window_size"},
    "composed_rank16": {"attention.gate_rank"},
    "composed_rank64": {"attention.gate_rank"},
    "composed_rank_full": {"attention.gate_rank"},
    "composed_no_conv": {"attention.conv"},
    "composed_no_normalizer": {"attention.normalize"},
    "composed_rope": {"attention.rope_linear"},
    "composed_untied": {"attention.tie_qk"},
    "composed_gate_per_head": {"attention.gate_kind"},
    **{f"composed_hybrid{count}": {"attention.softmax_layers"} for count in (1, 2, 4)},
    "composed_shuffled": {"stage2.state_passing"},
    "composed_ends": {f"stage2.data.mixture[{part}].end_weight" for part in (1, 2, 3)},
    "one_wording": {
        f"{stage}.data.mixture[{part}].{name}"
        for stage in ("stage1", "stage2")
        for part, name in ((1, "wording"), (1, "hay"), (1, "hay_source"), (2, "wording"), (3, "wording"))
    },
    "passkey_only": {"stage1.data.mixture", "stage2.data.mixture", "stage2.kl_weight"},
}


def test_the_real_study_changes_what_its_rows_say_and_trains_on_nothing_longer():
    study, configs = load_study(str(ROOT / "configs/study_smollm2.py"))
    real = plan(study, configs)  # reads and checks every configuration
    found = {}
    for row in study.rows:
        if row.reference:
            reference, changed = (run_facts(configs(f"{name}_seed0")) for name in (row.reference, row.name))
            changed = differences(reference, changed, {}, "config")
            found[row.name] = {line.partition(":")[0].removeprefix("config.") for line in changed}
    assert found == CHANGES
    for run in real.runs:
        if run.config is not None:
            assert all(stage.seq_length <= 1300 and not stage.data.pieces for _, stage in run.config.stages())
    (stage1,) = [job.name for job in real.jobs if job.does == "stage1"]
    assert [job.name for job in real.jobs if stage1 in job.after] == [
        "composed_seed0",
        "composed_ends_seed0",
        "composed_shuffled_seed0",
    ]
    # The headline is the shipped recipe and nothing else.
    _, recipe = load_recipe()
    assert differences(run_facts(recipe), run_facts(configs("lawcat_seed0")), {}, "config") == []


def test_the_window_with_sinks_has_a_cache_as_large_as_the_state():
    """In bytes, of activations in bfloat16."""
    _, configs = load_study(str(ROOT / "configs/study_smollm2.py"))

    def size(name):
        config = configs(f"{name}_seed0")
        graphdef, shapes = models.abstract(config.teacher.architecture, config.attention, dtype=jnp.bfloat16)
        state = jax.eval_shape(lambda params: models.bind(graphdef, params).init_recurrent(1)["linear"], shapes)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))

    assert size("window_sinks") == size("window_sinks_untrained") == size("lawcat_short") == 30 * 154_368


def load_recipe():
    import runpy

    module = runpy.run_path(str(ROOT / "configs/smollm2.py"))
    return module, module["get_config"]()
