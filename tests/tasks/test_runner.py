"""Every task through the runner: oracles, resumption of an interrupted evaluation, several models side by side."""

from __future__ import annotations

import json
import os
import re
import typing
import zlib

import pytest

from lawcat_jax.config import EvalConfig, TaskName
from lawcat_jax.errors import UserError
from lawcat_jax.tasks import cells, figures, report
from lawcat_jax.tasks.cells import file_stamp
from lawcat_jax.tasks.registry import task_named, tasks
from lawcat_jax.tasks.runner import run_evaluation
from lawcat_jax.tasks.task import GenerationTask
from tests.data import tokenizers as small
from tests.data.texts import prose, write_babi
from tests.tasks.fakes import Oracle, constant, model

GENERATION = [name for name, task in tasks().items() if isinstance(task, GenerationTask)]


@pytest.fixture(autouse=True)
def _no_drawing(monkeypatch):
    """Files instead of pictures, which take most of the time; what is in them is tested elsewhere."""
    for name in ("plot_lengths", "plot_depths", "plot_family"):
        monkeypatch.setattr(report, name, lambda path, *_, **__: path.write_bytes(b"PNG"))


class Interrupted(Exception):
    pass


def interrupt_after(generate, calls):
    """The same answers, until it is killed."""
    left = [calls]

    def call(*arguments):
        if not left[0]:
            raise Interrupted
        left[0] -= 1
        return generate(*arguments)

    return call


def numbers(folder):
    """All that the JSON reports of a folder say, but for when."""
    return {
        path.name: {key: value for key, value in json.loads(path.read_text()).items() if key != "date"}
        for path in folder.glob("*.json")
    }


def test_the_configuration_lists_the_tasks_there_are():
    assert set(typing.get_args(TaskName)) == set(tasks())
    fields = EvalConfig.__dataclass_fields__
    assert all(set(task.settings) <= set(fields) for task in tasks().values())
    with pytest.raises(UserError, match=r"not one of .*passkey"):
        task_named("x")


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Where evaluations take their hay and their stories from, and the text whose perplexity is measured."""
    pytest.importorskip("wonderwords")
    folder = tmp_path_factory.mktemp("sources")
    (folder / "books.txt").write_text(prose(12_000))
    (folder / "babi").mkdir()
    return {
        "haystack": str(folder / "books.txt"),
        "babi": write_babi(folder / "babi"),
        "text": str(folder / "books.txt"),
    }


@pytest.mark.parametrize("name", GENERATION)
def test_an_oracle_scores_everything_and_a_constant_nothing(name, tmp_path, sources):
    tokenizer = small.byte_level()
    lengths = (300, 700) if name == "passkey" else (3000, 4500)  # this tokenizer spells most words by letters
    settings = EvalConfig(tasks=(name,), lengths=lengths, samples=3, batch_size=2, **sources)
    models = [
        model(tokenizer, Oracle(tokenizer), label="oracle"),
        model(tokenizer, constant(tokenizer), label="constant"),
    ]
    results = run_evaluation(settings, models, output=tmp_path, echo=lambda text: None)[name]
    assert [row.accuracy for row in results["oracle"].values()] == [1.0, 1.0]
    assert [row.accuracy for row in results["constant"].values()] == [0.0, 0.0]


@pytest.mark.parametrize("calls", [1, 2, 5])
def test_an_interrupted_evaluation_goes_on_and_gives_the_same_report(calls, tmp_path):
    tokenizer = small.byte_level()
    settings = EvalConfig(lengths=(250, 300, 400), samples=4, batch_size=2)

    def models(left):
        limited = interrupt_after(Oracle(tokenizer, reach=200), left)
        return [model(tokenizer, limited), model(tokenizer, limited, label="teacher")]

    quiet = {"echo": lambda text: None}
    straight = run_evaluation(settings, models(-1), output=tmp_path / "straight", **quiet)
    again = tmp_path / "again"
    with pytest.raises(Interrupted):
        run_evaluation(settings, models(calls), output=again, **quiet)
    finished = calls // 2  # two batches make a cell
    kept = list(again.glob("unfinished/*.json"))
    assert len(kept) == finished
    for cell in kept:
        cell.with_name(f".{cell.name}.abc123").write_text("{")  # as kill -9 leaves behind
    with pytest.raises(Interrupted):  # nothing that is finished is asked for again: it gets no further without calls
        run_evaluation(settings, models(11 - 2 * finished), output=again, **quiet)
    resumed = run_evaluation(settings, models(2), output=again, **quiet)
    assert resumed == straight
    assert numbers(again) == numbers(tmp_path / "straight")
    assert not (again / "unfinished").exists()


def test_an_interrupted_evaluation_of_several_tasks_goes_on(tmp_path, sources):
    tokenizer = small.byte_level()
    names = ("niah_single_1", "niah_single_2", "babilong_qa1", "babilong_qa2")
    settings = EvalConfig(tasks=names, lengths=(2500,), samples=3, batch_size=2, **sources)
    quiet = {"echo": lambda text: None}

    def models(left):
        return [model(tokenizer, interrupt_after(Oracle(tokenizer, reach=1200), left))]

    straight = run_evaluation(settings, models(-1), output=tmp_path / "straight", **quiet)
    again = tmp_path / "again"
    for _ in range(3):  # two batches a cell: each attempt finishes one and is killed in the next
        with pytest.raises(Interrupted):
            run_evaluation(settings, models(3), output=again, **quiet)
    assert run_evaluation(settings, models(-1), output=again, **quiet) == straight
    assert numbers(again) == numbers(tmp_path / "straight")
    assert {file.name for file in again.glob("*.md")} == {
        *(f"{name}.md" for name in names),
        "sniah_1-2.md",
        "babilong_qa1-qa2.md",
    }


def test_a_family_of_tasks_has_a_table(tmp_path, sources):
    tokenizer = small.byte_level()
    names = tuple(name for name in GENERATION if name.startswith("babilong"))
    settings = EvalConfig(tasks=names, lengths=(0, 2500), samples=3, batch_size=2, **sources)
    models = [model(tokenizer, Oracle(tokenizer)), model(tokenizer, constant(tokenizer), label="teacher")]
    lines = []
    results = run_evaluation(settings, models, output=tmp_path, echo=lines.append)
    assert all(results[name]["student"][0].mean_tokens < results[name]["student"][2500].mean_tokens for name in names)
    written = (tmp_path / "babilong.md").read_text()
    assert "| tokens | QA1 | QA2 | QA3 | QA4 | QA5 |" in written
    assert "| 0 | 100.0 % [44, 100] (n=3) |" in written
    assert "| 2500 | 0.0 % [0, 56] (n=3) |" in written
    assert "test facts in books, seed 42" in written
    assert any(text.startswith("BABILong, teacher") for text in lines)
    assert json.loads((tmp_path / "babilong_qa3.json").read_text())["seed"] == 42


@pytest.mark.parametrize(
    ("names", "changes", "message"),
    [
        (("niah_single_2",), {"haystack": ""}, "niah_single_2: name essays or books"),
        (("niah_single_3",), {"haystack": "/no/such"}, "'/no/such': no such file"),
        (("niah_single_3",), {"lengths": (100_000,)}, "too few for a prompt of 100000 tokens"),
        (("niah_single_1",), {"lengths": (3000, 100)}, "S-NIAH-1 at 100 tokens is too short for its frame"),
        (("babilong_qa1",), {"babi": ""}, "babilong_qa1: name the directory of bAbI"),
        (("babilong_qa1",), {"babi": "/no/such"}, "'/no/such' is not a directory"),
        (("babilong_qa1",), {"samples": 100}, "6 of 100 stories fit"),
        (("babilong_qa1",), {"lengths": (400,)}, "BABILong qa1 at 400 tokens: 0 of 1 stories"),
        (("perplexity_by_position",), {"lengths": (0,)}, "at least 1 token"),
        (("passkey",), {"lengths": (0,)}, "too short for its frame"),
    ],
)
def test_mistakes_show_before_anything_is_asked(names, changes, message, sources, tmp_path):
    settings = EvalConfig(**{"tasks": names, "lengths": (3000,), "samples": 3, **sources, **changes})
    with pytest.raises(UserError, match=re.escape(message)):
        run_evaluation(settings, [model(small.byte_level())], output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_other_settings_other_weights_and_damaged_files_are_not_taken_from_before(tmp_path):
    tokenizer = small.byte_level()
    settings = EvalConfig(lengths=(250, 300), samples=2, batch_size=2)
    quiet = {"output": tmp_path, "echo": lambda text: None}

    def interrupted():
        with pytest.raises(Interrupted):
            run_evaluation(settings, [model(tokenizer, interrupt_after(constant(tokenizer), 1))], **quiet)

    def answers(settings=settings, **fields):
        return run_evaluation(settings, [model(tokenizer, Oracle(tokenizer), **fields)], **quiet)["passkey"]["student"]

    interrupted()
    assert answers(fingerprint="other weights")[250].accuracy == 1.0
    assert answers(EvalConfig(lengths=(250, 300), samples=3, batch_size=2))[250].accuracy == 1.0
    assert list(tmp_path.glob("unfinished/*.json"))  # of the other evaluation, which may still go on
    assert answers()[250].accuracy == 0.0
    interrupted()
    (cell,) = tmp_path.glob("unfinished/*.json")
    cell.write_text('{"results": {"250": {"accur')
    assert answers()[250].accuracy == 1.0


def test_cells_of_another_version_are_measured_again(tmp_path, monkeypatch, capsys):
    tokenizer = small.byte_level()
    settings = EvalConfig(lengths=(250, 300, 350), samples=2, batch_size=2)
    quiet = {"output": tmp_path, "echo": lambda text: None}

    def interrupted():
        with pytest.raises(Interrupted):
            run_evaluation(settings, [model(tokenizer, interrupt_after(constant(tokenizer), 2))], **quiet)

    def finished():
        capsys.readouterr()
        found = run_evaluation(settings, [model(tokenizer, Oracle(tokenizer))], **quiet)["passkey"]["student"]
        return [found[length].accuracy for length in settings.lengths], capsys.readouterr().err

    interrupted()
    accuracies, said = finished()
    assert accuracies == [0.0, 0.0, 1.0]
    assert "another version" not in said
    interrupted()
    for cell in tmp_path.glob("unfinished/*.json"):  # as before versions were stated
        values = json.loads(cell.read_text())
        del values["results_version"]
        cell.write_text(json.dumps(values))
    accuracies, said = finished()
    assert accuracies == [1.0, 1.0, 1.0]
    assert said.count("2 of 3 lengths were measured by another version of this program") == 1
    with monkeypatch.context() as patch:
        patch.setattr(cells, "RESULTS_VERSION", cells.RESULTS_VERSION + 1)
        interrupted()
    accuracies, said = finished()
    assert accuracies == [1.0, 1.0, 1.0]
    assert "measured by another version" in said


def test_two_models_are_compared_in_one_table_and_figure(tmp_path):
    tokenizer = small.byte_level()
    lines = []
    settings = EvalConfig(lengths=(250, 300), samples=3)
    names = {"long": Oracle(tokenizer), "short": constant(tokenizer)}
    models = (model(tokenizer, generate, label=name, name=name) for name, generate in names.items())
    run_evaluation(settings, models, output=tmp_path, echo=lines.append)
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "passkey.md",
        "passkey.png",
        "passkey_depth.png",
        "passkey_long.json",
        "passkey_short.json",
    ]
    assert "| tokens | long | short |" in (tmp_path / "passkey.md").read_text()
    assert lines[0].splitlines()[1].split() == ["tokens", "long", "short"]
    assert json.loads((tmp_path / "passkey_short.json").read_text())["table"] == ["long", "short"]


def test_another_evaluation_does_not_replace_a_report(tmp_path):
    tokenizer = small.byte_level()

    def run(*, roles=("student", "teacher"), replace=False, **settings):
        models = [model(tokenizer, Oracle(tokenizer), label=role) for role in roles]
        settings = {"lengths": (250, 300), "samples": 2} | settings
        run_evaluation(EvalConfig(**settings), models, output=tmp_path, replace=replace, echo=lambda text: None)
        return {file.name for file in tmp_path.glob("*.json")}

    own = {"passkey.json", "passkey_teacher.json"}
    assert run() == own
    assert run() == own  # the same again
    first = (tmp_path / "passkey.json").read_bytes()
    found = run(roles=("student",))  # it would leave the teacher out of table and figure
    assert found == own | {"passkey_landmark_n2_250-300.json"}
    found = run(passkey_form="train", seed=7, samples=3, lengths=(250,))
    assert {"passkey_train_seed7_n3_250.json", "passkey_train_seed7_n3_250_teacher.json"} < found
    assert run(roles=("a", "b")) > {"passkey_landmark_n2_250-300_a.json", "passkey_landmark_n2_250-300_b.json"}
    assert (tmp_path / "passkey.json").read_bytes() == first
    run(samples=3, replace=True)
    assert (tmp_path / "passkey.json").read_bytes() != first


def test_a_report_of_other_weights_is_kept(tmp_path):
    """Two models of one name, as /a/student and /b/student have in the current folder; and the same one again."""
    tokenizer, said = small.byte_level(), []

    def run(weights, **settings):
        subject = model(tokenizer, Oracle(tokenizer), fingerprint=weights)
        options = {"output": tmp_path, "replace": False, "echo": said.append}
        run_evaluation(EvalConfig(lengths=(250,), samples=2, **settings), [subject], **options)
        return {file.name for file in tmp_path.glob("*.json")}

    assert run("first") == {"passkey.json"}
    before = (tmp_path / "passkey.json").read_bytes()
    assert json.loads(before)["weights"] == "first"
    files = run("second")
    assert files == {"passkey.json", "passkey_landmark_n2_250.json"}
    assert run("second") == files
    assert len(run("third")) == 3  # where a report with the same settings in its name is of the second
    assert len(run("third")) == 3
    assert (tmp_path / "passkey.json").read_bytes() == before
    assert re.fullmatch(r"wrote \S+\.json, \S+\.md, \S+\.png and \S+_depth\.png", said[1]), said[1]


def test_a_model_has_its_colour_by_its_name():
    alone = figures.looks(["mine"])["mine"]
    assert alone["color"] == figures._COLOURS[zlib.crc32(b"mine") % len(figures._COLOURS)]
    together = figures.looks(["mine", "mine (teacher)", "student", "teacher"])
    assert together["mine"]["color"] == together["mine (teacher)"]["color"]
    assert together["mine"]["linestyle"] != together["mine (teacher)"]["linestyle"]
    assert together["student"] == figures.looks(["teacher", "student"])["student"]
    assert figures.looks(["a", "b", "c"]) == dict(reversed(figures.looks(["c", "b", "a"]).items()))
    eight = figures.looks([f"model {number}" for number in range(8)])
    assert len({look["color"] for look in eight.values()}) == 8
    assert len(figures.looks([f"model {number}" for number in range(20)])) == 20


def test_a_result_that_is_no_number_is_an_error_and_no_report(tmp_path):
    subject = model(small.byte_level(), nll=lambda batch: (float("nan"), 10.0))
    (tmp_path / "a.txt").write_text("The sky is blue. " * 50)
    settings = EvalConfig(tasks=("perplexity",), lengths=(20,), samples=2, text=str(tmp_path / "a.txt"))
    with pytest.raises(UserError, match=r"^perplexity of student, tokens 20, is no number .*; no report is written$"):
        run_evaluation(settings, [subject], output=tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.json"))


def test_a_table_is_shown_before_its_files_are_written(tmp_path, monkeypatch):
    def full(*_):
        raise UserError("cannot write")

    monkeypatch.setattr(report, "write_document", full)
    tokenizer, said = small.byte_level(), []
    with pytest.raises(UserError, match="cannot write"):
        run_evaluation(
            EvalConfig(lengths=(250,), samples=2),
            [model(tokenizer, Oracle(tokenizer))],
            output=tmp_path,
            echo=said.append,
        )
    assert "100.0 %" in said[0]


def test_a_text_of_other_words_is_another_cell(tmp_path):
    """Where size and time of its file are the same."""
    file = tmp_path / "a.txt"
    file.write_text("The sky is blue.")
    before, stamp = file_stamp(str(file)), file.stat().st_mtime_ns
    file.write_text("The sky is grey.")
    os.utime(file, ns=(stamp, stamp))
    after = file_stamp(str(file))
    assert before != after == file_stamp(str(tmp_path))
    assert [name for name, _ in after] == ["a.txt"]
    assert file_stamp("hf:nobody/nothing") == []


@pytest.mark.parametrize("finished", [0, 1])
def test_a_text_that_changes_while_it_is_measured_ends_in_no_number(finished, tmp_path):
    """Neither in a table nor in a cell that a later run would take for the new text's."""
    text, tokenizer = tmp_path / "a.txt", small.byte_level()
    settings = EvalConfig(tasks=("perplexity",), text=str(text), lengths=(64, 128), samples=2, batch_size=2)

    def run(folder, change_at=None):
        calls = 0

        def nll(batch):  # depends on what is read
            nonlocal calls
            if calls == change_at:
                text.write_text("Grass is green, as it ever was. " * 110)
            calls += 1
            return float(batch["tokens"].sum()), float(batch["loss_weights"].sum())

        subject = [model(tokenizer, nll=nll)]
        return run_evaluation(settings, subject, output=tmp_path / folder, echo=lambda text: None)

    text.write_text("The sky is blue. " * 200)
    old = run("old")
    with pytest.raises(UserError, match="perplexity: files that it reads changed while it was measured"):
        run("changing", change_at=finished)
    assert len(list((tmp_path / "changing").rglob("*.json"))) == finished  # cells of the old text
    assert run("changing") == run("new") != old
