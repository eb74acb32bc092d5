"""Numbers of finished evaluations: pooled over seeds, judged by intervals, and written as tables that can be made again."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from lawcat_jax.analysis.study import Cells, Claim, Evaluation, report
from lawcat_jax.analysis.study.ledger import Ledger
from lawcat_jax.analysis.study.plan import evaluation_folder, make_plan
from lawcat_jax.analysis.study.results import collect, verdict
from lawcat_jax.analysis.study.run import page_text, published, write_results
from lawcat_jax.config import EvalConfig
from lawcat_jax.errors import UserError
from lawcat_jax.tasks.registry import task_named
from lawcat_jax.tasks.report import Measured, write_report
from lawcat_jax.tasks.results import Accuracy, Likelihood, newcombe_interval

from .small import STUDY, get_config

ROOT = Path(__file__).parents[3]
SHARES = {
    "lawcat_seed0": {128: 0.9, 256: 0.8},
    "no_conv_seed0": {128: 0.5, 256: 0.2},
    "long_seed0": {128: 1.0, 256: 0.9},
    "long_seed1": {128: 0.9, 256: 0.7},
}


def measured(folder: Path, plan, shares=SHARES) -> None:
    """Reports of evaluations as ``evaluate`` writes them, and a ledger that says that they, and their runs, finished."""
    ledger = Ledger(folder)

    def finished(name: str) -> None:
        ledger.begin(plan.job(name))
        ledger.end(plan.job(name), "finished", 1.5)

    for run in plan.runs:
        output = evaluation_folder(folder, run.name, "passkey")
        if run.name in shares:
            cells = {x: Accuracy(share, 50, float(x)) for x, share in shares[run.name].items()}
            write(output, "passkey", plan.study.evaluations[0].settings(), cells)
            finished(run.name)
            finished(f"{run.name}.passkey")
    write(
        evaluation_folder(folder, "teacher", "text"),
        "perplexity",
        plan.study.evaluations[1].settings(),
        {128: Likelihood(2.0, 1000, 8)},
    )
    finished("teacher.text")


def write(folder: Path, task: str, settings: EvalConfig, cells) -> None:
    write_report(
        task_named(task), settings, [Measured("student", "a run", "student", cells)], folder, echo=lambda _: None
    )


def make(folder: Path, study=STUDY):
    return make_plan(study, get_config, config="study.py", output=folder)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    folder = tmp_path_factory.mktemp("study")
    plan = make(folder)
    measured(folder, plan)
    return folder, plan, write_results(plan, folder)


def test_seeds_are_pooled_by_their_samples(done):
    _, _, results = done
    (measure,) = [m for m in results["measures"].values() if m["task"] == "passkey"]
    cell = measure["rows"]["long"]["pooled"]["256"]
    assert (cell["accuracy"], cell["n"], cell["seeds"]) == (pytest.approx(0.8), 100, 2)
    assert cell["interval"] == pytest.approx([0.7112, 0.8666], abs=2e-4)  # Wilson, 80 of 100
    assert measure["rows"]["long"]["seeds"]["1"]["256"]["accuracy"] == 0.7
    assert "shuffled" not in measure["rows"]


def test_a_claim_is_decided_by_all_its_cells_together(done):
    _, _, results = done
    (claim,) = results["claims"]
    assert (claim["hits_a"], claim["n_a"], claim["hits_b"], claim["n_b"]) == (85, 100, 35, 100)
    assert claim["interval"] == pytest.approx(newcombe_interval(85, 100, 35, 100), abs=1e-4)
    assert claim["verdict"] == "confirmed"


@pytest.mark.parametrize(
    ("low", "high", "expected", "is_"),
    [
        (0.01, 0.3, "above", "confirmed"),
        (0.01, 0.3, "below", "contradicted"),
        (-0.3, -0.01, "above", "contradicted"),
        (-0.3, -0.01, "below", "confirmed"),
        (-0.1, 0.2, "above", "not decided"),
        (0.0, 0.2, "above", "not decided"),
    ],
)
def test_verdicts(low, high, expected, is_):
    assert verdict(low, high, expected) == is_


def test_a_claim_without_one_of_its_cells_is_not_run(tmp_path):
    claims = (
        Claim("a", "b", "lawcat", "shuffled", (Cells("passkey", (128,)),)),
        Claim("a", "b", "lawcat", "no_conv", (Cells("passkey", (128, 512)),)),
        Claim("a", "b", "lawcat", "no_conv", (Cells("passkey", (128,), "train"),)),
        Claim("a", "b", "no_conv", "lawcat", (Cells("passkey", (128,)),)),
    )
    plan = make(tmp_path, dataclasses.replace(STUDY, claims=claims))
    measured(tmp_path, plan)
    found = collect(plan, Ledger(tmp_path).jobs, tmp_path)["claims"]
    assert [claim["verdict"] for claim in found] == ["not run", "not run", "not run", "contradicted"]


def test_a_claim_compares_rows_of_one_table(tmp_path):
    """One row is measured on easy text too, where the other is not."""
    evaluations = [
        Evaluation(name, ("niah_single_2",), (128,), haystack=name, rows=rows)
        for name, rows in (("easy", ("lawcat",)), ("hard", ("lawcat", "no_conv")))
    ]
    claim = Claim("a", "b", "lawcat", "no_conv", (Cells("niah_single_2", (128,)),))
    study = dataclasses.replace(STUDY, evaluations=tuple(evaluations), claims=(claim,))
    assert study.problems() == []
    plan, ledger = make(tmp_path, study), Ledger(tmp_path)
    for name, run, share in (("easy", "lawcat", 0.9), ("hard", "lawcat", 0.2), ("hard", "no_conv", 0.8)):
        settings = next(each.settings() for each in evaluations if each.name == name)
        folder = evaluation_folder(tmp_path, f"{run}_seed0", name)
        write(folder, "niah_single_2", settings, {128: Accuracy(share, 50, 128.0)})
        ledger.begin(plan.job(f"{run}_seed0.{name}"))
        ledger.end(plan.job(f"{run}_seed0.{name}"), "finished", 1.0)
    (judged,) = collect(plan, ledger.jobs, tmp_path)["claims"]
    assert (judged["hits_a"], judged["hits_b"], judged["verdict"]) == (10.0, 40.0, "contradicted")


def test_what_finished_with_other_settings_is_left_out(tmp_path, capsys):
    """Its numbers under the new settings' headings would be numbers of something else."""
    measured(tmp_path, make(tmp_path))
    (passkey, text) = STUDY.evaluations
    other = dataclasses.replace(
        STUDY, evaluations=(dataclasses.replace(passkey, passkey_form="train"), text), claims=()
    )
    results = write_results(make(tmp_path, other), tmp_path)
    assert "left out, as the study's file has other settings" in capsys.readouterr().out
    assert {row for m in results["measures"].values() for row in m["rows"]} == {"teacher"}

    def trained_otherwise(variant: str):
        config = get_config(variant)
        config.stage2.learning_rate *= 2 if variant == "no_conv_seed0" else 1
        return config

    plan = make_plan(STUDY, trained_otherwise, config="study.py", output=tmp_path)
    results = write_results(plan, tmp_path)
    assert "no_conv_seed0, no_conv_seed0.passkey" in capsys.readouterr().out
    assert {row for m in results["measures"].values() for row in m["rows"]} == {"teacher", "lawcat", "long"}
    assert {cost["run"] for cost in results["costs"]} == {"lawcat_seed0", "long_seed0", "long_seed1"}


def test_results_of_a_text_that_has_changed_are_left_out(tmp_path, capsys):
    text = tmp_path / "book.txt"
    text.write_text("It was a dark night. " * 50)
    evaluation = dataclasses.replace(STUDY.evaluations[1], text=str(text), rows=("teacher",))
    study = dataclasses.replace(STUDY, evaluations=(STUDY.evaluations[0], evaluation))
    plan = make(tmp_path / "out", study)
    measured(tmp_path / "out", plan)
    assert plan.job("teacher.text").sources == (str(text),)
    assert "perplexity: text book" in write_results(plan, tmp_path / "out")["measures"]
    capsys.readouterr()
    for there in (False, True):  # elsewhere, without the text, nothing is known to have changed
        text.write_text("Quite another book. " * 50) if there else text.unlink()
        found = write_results(plan, tmp_path / "out")["measures"]["perplexity: text book"]["rows"]
        assert set(found) == (set() if there else {"teacher"})
        assert ("left out" in capsys.readouterr().out) == there
    ledger = Ledger(tmp_path / "out")
    assert ledger.changed(plan.job("teacher.text")) == [f"the files of {text}"]


def test_costs_name_run_code_and_time(done):
    _, _, results = done
    costs = {cost["run"]: cost for cost in results["costs"]}
    assert set(costs) == set(SHARES)
    cost = costs["lawcat_seed0"]
    assert (cost["steps"], cost["tokens"], cost["minutes"], cost["evaluation_minutes"]) == (10, 81920, 1.5, 1.5)
    assert cost["after"][0].startswith("stage1_")
    assert set(cost["versions"]) == {"jax", "flax"}
    assert len(cost["commit"]) >= 40 or cost["commit"] == "unknown"
    assert cost["command"].startswith("python -m lawcat_jax.train --config=study.py:lawcat_seed0 ")


EXPECTED = """\
### Headline

**Passkey retrieval, evaluation wording (landmark)**

| student | steps, stage 1 + 2 | n | 128 | 256 |
| --- | --- | --- | --- | --- |
| LAWCAT, long | 20 + 20 | 100 | 95 [89, 98] | 80 [71, 87] |

**Perplexity, text books/test**

| student | steps, stage 1 + 2 | tokens | 128 |
| --- | --- | --- | --- |
| teacher | – | 1,000 | 7.39 |

### Ablations, beside LAWCAT

no convolution: for tests only.

**Passkey retrieval, evaluation wording (landmark)**

| student | steps, stage 1 + 2 | n | 128 | 256 |
| --- | --- | --- | --- | --- |
| LAWCAT | 10 + 10 | 50 | 90 [79, 96] | 80 [67, 89] |
| no convolution | 10 + 10 | 50 | 50 [37, 63] | 20 [11, 33] |

![Passkey retrieval, evaluation wording (landmark)](results/small_ablations_lawcat_passkey.png)

### Seeds

**LAWCAT, long, each seed alone: Passkey retrieval, evaluation wording (landmark)**

| seed | 128 | 256 |
| --- | --- | --- |
| 0 | 100 [93, 100] | 90 [79, 96] |
| 1 | 90 [79, 96] | 70 [56, 81] |

### Claims
"""


def test_tables(done):
    folder, _, results = done
    text = report.markdown(results, "results/")
    assert text.startswith(EXPECTED)
    assert "| It helps | the paper | LAWCAT above no convolution | passkey (landmark) at 128, 256 tokens | " in text
    assert "| 85 % of 100, 35 % of 100 | +50 [+37, +60] | confirmed |" in text
    assert text.endswith("\nNot run: states passed.\n")
    assert (folder / "small_ablations_lawcat_passkey.png").read_bytes().startswith(b"\x89PNG")
    assert "\n" + report.markdown(results) in (folder / "results.md").read_text()


def test_the_file_alone_makes_the_tables_again_and_says_nothing_of_this_machine(done):
    folder, plan, results = done
    again = json.loads((folder / "results.json").read_text())
    assert again == results
    assert report.markdown(again) == report.markdown(results)
    before = (folder / "results.json").read_bytes()
    write_results(plan, folder)
    assert (folder / "results.json").read_bytes() == before
    measures = json.dumps(results["measures"])
    assert "/home/me" not in measures


def test_many_rows_become_a_heat_map(tmp_path, done):
    _, _, results = done
    (measure,) = [m for m in results["measures"].values() if m["task"] == "passkey"]
    rows = [{**results["rows"][2], "name": f"row{i}", "title": f"row {i}"} for i in range(7)]
    many = {row["name"]: measure["rows"]["no_conv"] for row in rows} | {"lawcat": measure["rows"]["lawcat"]}
    more = {
        **results,
        "claims": [],
        "rows": [results["rows"][1], *rows],
        "measures": {"passkey": {**measure, "rows": many}},
    }
    names = report.draw(more, tmp_path)
    assert names == ["small_ablations_lawcat_passkey.png"]
    assert f"]({names[0]})" in report.markdown(more)
    assert (tmp_path / names[0]).stat().st_size > 10_000


def test_a_reference_without_anything_beside_it_is_no_table(tmp_path):
    plan = make(tmp_path)
    measured(tmp_path, plan, {"lawcat_seed0": SHARES["lawcat_seed0"]})
    text = report.markdown(collect(plan, Ledger(tmp_path).jobs, tmp_path))
    assert "### Ablations" not in text
    assert "Not run: no convolution; states passed; LAWCAT, long." in text


def test_nothing_run_is_said(tmp_path):
    results = write_results(make(tmp_path), tmp_path)
    assert report.markdown(results).endswith("Not run: teacher; LAWCAT; no convolution; states passed; LAWCAT, long.\n")
    assert results["claims"][0]["verdict"] == "not run"


def test_a_damaged_report_is_one_line(tmp_path):
    plan = make(tmp_path)
    measured(tmp_path, plan)
    (tmp_path / "eval/no_conv_seed0/passkey/passkey.json").write_text('{"results": 3}')
    with pytest.raises(UserError, match=r"passkey/passkey.json is damaged; remove .* and run the study again"):
        collect(plan, Ledger(tmp_path).jobs, tmp_path)


def test_a_page_gets_the_tables_between_its_marks(done):
    _, _, results = done
    page = "# Page\n\n<!-- study:begin results/small.json -->\nold\n<!-- study:end -->\nafter\n"
    new = report.filled(page, "results/small.json", page_text(results))
    assert new.startswith("# Page\n\n<!-- study:begin results/small.json -->\n\n### Headline")
    assert new.endswith("<!-- study:end -->\nafter\n")
    assert "old" not in new
    assert report.filled(new, "results/small.json", page_text(results)) == new
    with pytest.raises(UserError, match=r"results/other\.json -->' and '<!-- study:end -->'"):
        report.filled(page, "results/other.json", "")


PAGES = [page for page in sorted((ROOT / "docs").glob("*.md")) if report.blocks(page.read_text(encoding="utf-8"))]


def test_a_page_shows_the_study():
    assert [page.name for page in PAGES] == ["results.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tables_in_pages_are_those_of_the_numbers_beside_them(page):
    for name, text, made in published(page):
        assert text == made, f"{page} is not what {name} says; python -m lawcat_jax.study --report --page={page}"
        drawn = set(report.pictures(json.loads((page.parent / name).read_text())))
        there = {path.name for path in (page.parent / "results").glob(f"{Path(name).stem}_*.png")}
        assert drawn == there
