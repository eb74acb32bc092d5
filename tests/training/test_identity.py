"""A run goes on with nothing else than what it began with, is alone in its folder, and does not end well with nothing."""

from __future__ import annotations

import hashlib
import json
import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from training_doubles import STEPS, Run

from lawcat_jax.config import Config, DataConfig, MixtureSource, StageConfig, TeacherConfig, to_dict
from lawcat_jax.data import conversations, haystack, text
from lawcat_jax.data import sources as data_sources
from lawcat_jax.errors import UserError
from lawcat_jax.training import inputs
from lawcat_jax.training import run as run_module
from lawcat_jax.training.identity import refuse_another, refuse_other_config, unrecorded
from lawcat_jax.training.loop import InterruptedRunError, TrainingError
from lawcat_jax.training.workdir import Workdir
from tests.data import tokenizers as small

ROOT = Path(__file__).parents[2]
TEACHER = {
    "model": {"rope_theta": 1e4},
    "dtype": "float32",
    "weights": "a",
    "weights_hash": "h",
    "tokenizer": "b",
    "chat_template": "t",
}
FILES = {"stage1": {"books/*.txt": [["a.txt", 70, "da"], ["b.txt", 80, "db"]]}}
OWN = {"config": {"seed": 0, "stage1": {"learning_rate": 0.1}}, "teacher": TEACHER, "data": FILES}


@pytest.fixture(scope="module")
def begun(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("begun")
    with pytest.raises(InterruptedRunError):
        Run(folder, stop_after=2, options={"identity": OWN}).go()
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": {**OWN["config"], "seed": 1}}, "another configuration (config.seed: 0 there, 1 here)"),
        ({"teacher": {**TEACHER, "weights": "x"}}, "another teacher (its weights have changed)"),
        ({"teacher": {**TEACHER, "weights_hash": "x"}}, "another teacher (its weights have changed)"),
        ({"teacher": {**TEACHER, "tokenizer": "x"}}, "another teacher (the tokenizer has changed)"),
        (
            {"data": {"stage1": {"books/*.txt": [["a.txt", 70, "da"], ["b.txt", 81, "db"]]}}},
            "began with other data: files or rows of books/*.txt have other names or contents now",
        ),
        (
            {"data": {"stage1": {"books/*.txt": [["a.txt", 70, "da"], ["b.txt", 80, "shuffled"]]}}},
            "began with other data: files or rows of books/*.txt have other names or contents now",
        ),
        ({"teacher": {**TEACHER, "chat_template": "x"}}, "another teacher (the tokenizer's chat template has changed)"),
        ({"teacher": {**TEACHER, "model": {"rope_theta": 5e5}}}, "rope_theta: 10000.0 there, 500000.0 here"),
    ],
)
def test_checkpoint_of_another_run_is_refused(begun, changes, message):
    before = sorted(path.name for path in begun.rglob("*"))
    with pytest.raises(UserError) as caught:
        Run(begun, options={"identity": OWN | changes}).go()
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in begun.rglob("*")) == before


def remote(monkeypatch, tmp_path, **sources: list[str]) -> None:
    """Stands in for hubs: {name of a source: its texts, or as rows its answers}."""
    monkeypatch.setenv("LAWCAT_CACHE", str(tmp_path / "cache"))
    haystack.load_haystack.cache_clear()
    data_sources._remote_conversations.cache_clear()
    known = {f"hf:{name}": texts for name, texts in sources.items()}
    rows = {
        name: [(f"row {i}", {"instruction": "Count", "output": text}) for i, text in enumerate(texts)]
        for name, texts in known.items()
    }
    monkeypatch.setattr(text, "documents", lambda source, key="text": iter(known[source]))
    monkeypatch.setattr(haystack, "read_documents", lambda source, key="text": iter(known[source]))
    monkeypatch.setattr(conversations, "rows", lambda source: iter(rows[source]))


PLACES = {
    "text": {"kind": "text", "source": "hf:a", "validation_source": "hf:b"},
    "instruction": {"kind": "instruction", "source": "hf:a", "validation_source": "hf:b"},
    "hay": {"kind": "niah", "hay": "books", "hay_source": "hf:a"},
    "mixture": {"kind": "mixture", "mixture": (MixtureSource(kind="text", source="hf:a"),)},
}


@pytest.mark.parametrize("place", PLACES)
def test_what_is_read_of_hubs_is_part_of_a_run(place, tmp_path, monkeypatch):
    """By what it holds now, in whatever version: a changed one is refused, the same one goes on."""
    data = DataConfig(**PLACES[place], num_samples=4, validation_samples=2)
    config = Config(stage1=StageConfig(data=data, seq_length=16), stage2=StageConfig(enabled=False))

    def identity(folder: str, **sources: list[str]) -> dict:
        with monkeypatch.context() as patch:
            remote(patch, tmp_path / folder, **sources)
            return {**OWN, "data": inputs.data_read(config, small.byte_level())}

    books = {"a": ["The sky is blue. Here we go. " * 9] * 3, "b": ["There and back again. " * 9] * 3}
    begun = identity("0", **books)
    assert set(begun["data"]["stage1"]) == ({"hf:a", "hf:b"} if place in ("text", "instruction") else {"hf:a"})
    refuse_another(begun, identity("1", **books), "there")
    for name in begun["data"]["stage1"]:
        other = books | {name[3:]: ["The sky is grey. Here we go. " * 9] * 3}
        with pytest.raises(UserError, match=f"files or rows of {name} have other names or contents now"):
            refuse_another(begun, identity(f"2{name}", **other), "there")
    earlier = {**begun, "data": {"stage1": {}}}  # of a version that did not record it
    refuse_another(earlier, begun, "there")
    assert unrecorded(earlier, begun) == list(begun["data"]["stage1"])
    assert unrecorded(begun, begun) == unrecorded({"data": None}, begun) == []


def test_runs_that_read_other_line_ends_are_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"One.\r\nTwo.\n")
    (tmp_path / "b.txt").write_bytes(b"One.\nTwo.\n")
    source = f"{tmp_path}/*.txt"
    config = Config(stage1=StageConfig(data=DataConfig(kind="text", source=source)), stage2=StageConfig(enabled=False))
    own = {**OWN, "data": inputs.data_read(config, small.byte_level())}
    first, second = own["data"]["stage1"][source]
    assert second == ["b.txt", 10, hashlib.sha256(b"One.\nTwo.\n").hexdigest()[:32]]
    plain = [first[0], first[1], hashlib.sha256(b"One.\r\nTwo.\n").hexdigest()[:32]]
    with pytest.raises(
        UserError, match=r"of an earlier version, which read the carriage returns of .*txt as line feeds"
    ):
        refuse_another({**OWN, "data": {"stage1": {source: [plain, second]}}}, own, "there")
    with pytest.raises(UserError, match="have other names or contents now"):
        refuse_another({**OWN, "data": {"stage1": {source: [[*plain[:2], "x"], second]}}}, own, "there")
    refuse_another(own, own, "there")


def test_a_stream_that_opens_no_source_needs_none(tmp_path):
    data = DataConfig(kind="text", source="hf:none", passkey_fraction=1.0)
    config = Config(stage1=StageConfig(data=data), stage2=StageConfig(enabled=False))
    assert inputs.data_read(config, None) == {"stage1": {}}


def test_files_of_the_data_are_part_of_a_run(tmp_path, monkeypatch):
    for name, words in (("a.txt", "one"), ("b.txt", "two words")):
        (tmp_path / name).write_text(words)
    part = MixtureSource(kind="niah", hay="books", hay_source=str(tmp_path / "a.txt"))
    config = Config(
        stage1=StageConfig(data=DataConfig(kind="text", source=f"{tmp_path}/*.txt")),
        stage2=StageConfig(data=DataConfig(kind="mixture", mixture=(part,))),
    )
    one, two = (hashlib.sha256(words).hexdigest()[:32] for words in (b"one", b"two words"))
    assert inputs.data_read(config, None) == {
        "stage1": {f"{tmp_path}/*.txt": [["a.txt", 3, one], ["b.txt", 9, two]]},
        "stage2": {str(tmp_path / "a.txt"): [["a.txt", 3, one]]},
    }


def test_the_chat_template_is_part_of_a_run_on_conversations():
    named = Config(teacher=TeacherConfig(source="asset:tiny_llama"))
    teacher, chat = inputs.open_teacher(named), DataConfig(kind="instruction", source="rows.jsonl")
    plain, mixed = StageConfig(), StageConfig(data=DataConfig(kind="mixture", mixture=(MixtureSource("instruction"),)))
    _, tokenizer = inputs.tokenizer_of(named, teacher, teacher.model)

    def origin(template: str | None, **stages: StageConfig) -> dict:
        tokenizer.chat_template = template
        return inputs._origin(Config(**stages), teacher.model, tokenizer, {"weights": "a"})

    for stage in (StageConfig(data=chat), mixed):
        found = [origin(template, stage2=stage) for template in (None, "{{ a }}", "{{ b }}")]
        assert len({one.pop("chat_template") for one in found}) == 3
        assert found[0] == found[1] == found[2] == origin("{{ a }}", stage2=plain)


def test_sources_of_a_mixture_are_compared_field_by_field():
    """One that a later version brought counts as its default."""
    parts = (MixtureSource(kind="text", source="a"), MixtureSource(kind="instruction", source="b"))
    config = Config(stage2=StageConfig(data=DataConfig(kind="mixture", mixture=parts)))
    new = json.loads(json.dumps(to_dict(config)))
    old = json.loads(json.dumps(new))
    sources = old["stage2"]["data"]["mixture"]
    for source in sources:
        del source["chat_date"]
    refuse_other_config(old, new, "there")
    sources[1]["weight"] = 7.0
    with pytest.raises(UserError, match=r"config\.stage2\.data\.mixture\[1\]\.weight: 7\.0 there, 1\.0 here\)"):
        refuse_other_config(old, new, "there")
    sources.pop()
    with pytest.raises(UserError, match=r"config\.stage2\.data\.mixture: "):
        refuse_other_config(old, new, "there")


def test_a_stage_of_another_length_is_refused(begun):
    """As after a change of the text whose passes its steps are."""
    with pytest.raises(UserError, match=r"at step 2 is of a stage of 12 steps, which now has 20: its data is longer"):
        Run(begun, steps=20, options={"identity": OWN}).go()


def test_runs_of_earlier_versions_are_compared_by_what_they_recorded():
    unknown = ("weights_hash", "chat_template")
    files = {"stage1": {"books/*.txt": [["a.txt", 70], ["b.txt", 80]]}}
    old = {**OWN, "data": files, "teacher": {name: value for name, value in TEACHER.items() if name not in unknown}}
    refuse_another(old, OWN, "there")
    for one in ([["a.txt", 70, "da"], ["b.txt", 81, "db"]], [["a.txt", 70, "da"]]):
        with pytest.raises(UserError, match="other names or contents"):
            refuse_another(old, {**OWN, "data": {"stage1": {"books/*.txt": one}}}, "there")
    with pytest.raises(UserError, match="its weights have changed"):
        refuse_another(old, {**OWN, "teacher": {**TEACHER, "weights": "x"}}, "there")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_weights_are_compared_in_one_number_format(begun, dtype):
    teacher = {**TEACHER, "dtype": dtype, "weights": "a" if dtype == "float32" else "c"}
    run = Run(begun, options={"identity": {**OWN, "teacher": teacher}})
    run.stage.train_step = lambda state, batch: 1 / 0
    with pytest.raises(ZeroDivisionError):
        run.go()


def test_only_one_run_in_a_workdir(tmp_path):
    with Workdir(str(tmp_path)):
        with pytest.raises(UserError, match=r"another run is at work in it \(process \d+ on "):
            Workdir(str(tmp_path))
        Workdir(str(tmp_path), primary=False)
    with Workdir(str(tmp_path)):
        pass


def test_a_killed_run_lets_go_of_its_workdir(tmp_path):
    code = "import sys, time; from lawcat_jax.training.workdir import Workdir\n"
    code += "w = Workdir(sys.argv[1]); print(1, flush=True); time.sleep(99)"
    child = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, cwd=ROOT)
    assert child.stdout.readline() == b"1\n"
    with pytest.raises(UserError, match=f"process {child.pid} on"):
        Workdir(str(tmp_path))
    child.send_signal(signal.SIGKILL)
    child.wait(timeout=30)
    child.stdout.close()
    with Workdir(str(tmp_path)):
        pass


def test_a_stage_whose_steps_were_all_bad_fails(tmp_path):
    run = Run(tmp_path, poison=tuple(range(STEPS)), max_bad_steps=99)
    with pytest.raises(TrainingError, match=f"all {STEPS} steps were bad"):
        run.go()
    with pytest.raises(TrainingError, match=f"all {STEPS} steps were bad"):  # and is not finished afterwards either
        Run(tmp_path, poison=tuple(range(STEPS)), max_bad_steps=99).go()


@pytest.mark.parametrize(("poison", "fails"), [((1, 3, 5, 7, 8, 10, 11), True), ((1, 3, 5, 7, 8, 10), False)])
def test_a_stage_fails_when_more_than_half_of_its_steps_were_bad(tmp_path, poison, fails):
    run = Run(tmp_path, poison=poison, max_bad_steps=99)
    if fails:
        with pytest.raises(TrainingError, match=r"most steps were bad .* \(7 of 12 steps bad\)"):
            run.go()
    else:
        run.go()
        assert run.loop.summary["bad_steps"] == 6


def test_the_last_line_of_a_run_tells_of_bad_steps():
    summaries = {"stage1": {"steps": 9, "bad_steps": 0}, "stage2": {"steps": 12, "bad_steps": 5}, "old": {}}
    assert run_module._bad_steps(summaries) == " (bad steps, which were skipped: 5 of 12 in stage2)"
    assert run_module._bad_steps({"stage1": {"steps": 9, "bad_steps": 0}}) == ""


@pytest.mark.parametrize("last", [math.nan, math.inf])
def test_a_stage_whose_last_validation_is_not_finite_fails(tmp_path, last):
    config = StageConfig(trainable=("^mixers/",), eval_every=6)
    with pytest.raises(TrainingError, match=f"the last validation loss is {last}"):
        Run(tmp_path, config=config, losses=[1.0, last]).go()


def test_parameters_that_overflow_in_the_last_step_fail(tmp_path):
    config = StageConfig(trainable=("^mixers/",), learning_rate=1e38, warmup_fraction=0.0, lr_multipliers=("conv=99",))
    run = Run(tmp_path, config=config, steps=1)
    run.stage.evaluate = None
    with pytest.raises(TrainingError, match="trained parameters are not finite"):
        run.go()


def test_bad_steps_and_the_kept_checkpoint_are_told(tmp_path, capsys):
    config = StageConfig(trainable=("^mixers/",), eval_every=4)
    run = Run(tmp_path, config=config, poison=(3, 7), losses=[3.0, 1.0, 2.0])
    run.go()
    expected = {"steps": STEPS, "bad_steps": 2, "kept_step": 8, "validation_loss": 1.0}
    assert run.loop.summary == expected
    assert (
        "finished 12 steps, 2 of them bad; kept the parameters of step 8, validation loss 1.0000"
        in capsys.readouterr().out
    )
    again = Run(tmp_path, config=config)
    again.go()
    assert again.loop.summary == expected


def edits(meta: dict) -> dict[str, str]:
    """Metadata as a file may hold it after an accident or an editor."""
    text = json.dumps(meta)
    contents = {f"cut at {part}/7": text[: len(text) * part // 7] for part in range(7)}
    contents |= {f"all {value}": value for value in ("null", "[]", "3", '"x"', "[" * 100_000)}
    for name, value in meta.items():
        contents[f"without {name}"] = json.dumps({key: item for key, item in meta.items() if key != name})
        for other in (None, "x", -1, [], {"a": 1}):
            if other != value:
                contents[f"{name} {other!r}"] = json.dumps({**meta, name: other})
    contents["another place in the data"] = json.dumps({**meta, "iterator": {"index": 3}})
    return contents


@pytest.fixture(scope="module")
def two_saves(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    with pytest.raises(InterruptedRunError):
        Run(folder, stop_after=8).go()
    return folder


@pytest.mark.parametrize("part", [0, *(pytest.param(part, marks=pytest.mark.slow) for part in range(1, 12))])
def test_metadata_of_any_content_is_damage(two_saves, tmp_path, part, capfd):
    """A twelfth of the edits each. Only a checkpoint that is exactly what was saved is used."""
    run = Run(two_saves)
    path = run.directory / "8" / "meta" / "metadata"
    before = path.read_text()
    try:
        for name, text in list(edits(json.loads(before)).items())[part::12]:
            path.write_text(text)
            found = Run(two_saves, options={"identity": OWN})
            used = []
            found.stage.train_step = lambda state, batch, used=used: used.append(int(state.step)) or 1 / 0
            with pytest.raises(ZeroDivisionError):
                found.go()
            assert used == [5], name
            said = capfd.readouterr()
            assert len((said.out + said.err).strip().splitlines()) <= 2, said
            (run.directory / "8.damaged").rename(run.directory / "8")
    finally:
        path.write_text(before)
