"""Hostile inputs, made by rule: each file cut, flipped and emptied; each field given values of every wrong kind."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tests.hostile.driver import ASSET, EITHER, ROOT, Case
from tests.hostile.launch import launch_cases

WRONG: tuple[Any, ...] = (None, "x", -1, 0, 1.5, [], {}, [None], True, 10**30, float("inf"), "\ud800")
GENERATE = ["generate", "--prompt=The sky", "--max_new_tokens=2"]


def cut(part: int) -> Callable[[bytes], bytes]:
    """The first ``part`` eighths."""
    return lambda content: content[: len(content) * part // 8]


def flip(place: float, mask: int = 255) -> Callable[[bytes], bytes]:
    """One byte changed at a share of the length."""

    def change(content: bytes) -> bytes:
        changed = bytearray(content)
        if changed:
            changed[min(int(place * len(changed)), len(changed) - 1)] ^= mask
        return bytes(changed)

    return change


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    **{f"cut {part}/8": cut(part) for part in (1, 4, 7)},
    "empty": lambda content: b"",
    "zeros": lambda content: bytes(len(content)),
    "not UTF-8": lambda content: b"\xff\xfe" + content,
    "null": lambda content: b"null",
    "a list": lambda content: b"[]",
    "deep": lambda content: b"[" * 100_000,
    "twice": lambda content: content + content,
}


def copied(models: Path, folder: Path, what: str) -> Path:
    """A copy of one of the models, to be spoilt."""
    shutil.copytree(models / what, folder / what, symlinks=True)
    return folder / what


def damaged_file(what: str, file: str, change: Callable[[bytes], bytes], command: list[str]) -> Callable:
    """Arrange: ``file`` of a copied model changed."""

    def arrange(folder: Path, models: Path) -> list[str]:
        path = copied(models, folder, what) / file
        path.write_bytes(change(path.read_bytes()))
        return command

    return arrange


def special_file(what: str, file: str, kind: str, command: list[str]) -> Callable:
    """Arrange: something else in the place of ``file``."""

    def arrange(folder: Path, models: Path) -> list[str]:
        path = copied(models, folder, what) / file
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        if kind == "folder":
            path.mkdir()
        elif kind == "loop":
            path.symlink_to(path)
        elif kind == "dangling":
            path.symlink_to(folder / "nowhere")
        return command

    return arrange


def edited_json(what: str, file: str, keys: tuple[str, ...], value: Any, command: list[str]) -> Callable:
    """Arrange: one value of a JSON file replaced; ``...`` removes it."""

    def arrange(folder: Path, models: Path) -> list[str]:
        path = copied(models, folder, what) / file
        whole = values = json.loads(path.read_text())
        for key in keys[:-1]:
            values = values[key]
        if value is ...:
            del values[keys[-1]]
        else:
            values[keys[-1]] = value
        path.write_text(json.dumps(whole))
        return command

    return arrange


def short(value: Any) -> str:
    return ascii(value)[:20] if value is not ... else "missing"


def model_cases() -> Iterator[Case]:
    """Model directories of both kinds."""
    hf, run = [*GENERATE, "--checkpoint=hf"], [*GENERATE, "--checkpoint=run/student"]
    for file in ("config.json", "model.safetensors", "tokenizer.json", "generation_config.json"):
        for name, change in DAMAGE.items():
            yield Case("model", f"hf {file} {name}", damaged_file("hf", file, change, hf), EITHER)
        for kind in ("folder", "loop", "dangling", "gone"):
            yield Case("model", f"hf {file} {kind}", special_file("hf", file, kind, hf), EITHER)
    for place in np.linspace(0, 0.003, 16):  # the header
        yield Case("model", f"hf header {place:.5f}", damaged_file("hf", "model.safetensors", flip(place), hf), EITHER)
    for key in json.loads((ASSET / "config.json").read_text()):
        for value in (..., *WRONG):
            yield Case("model", f"hf {key}={short(value)}", edited_json("hf", "config.json", (key,), value, hf), EITHER)
    for name, change in DAMAGE.items():
        yield Case("model", f"model.json {name}", damaged_file("run", "student/model.json", change, run), EITHER)
    for group in ("model", "attention", "lora", "extra"):
        for value in (..., *WRONG):
            codes = (2,) if group == "model" else EITHER
            edit = edited_json("run", "student/model.json", (group,), value, run)
            yield Case("model", f"model.json {group}={short(value)}", edit, codes)
    for kind in ("folder", "loop", "gone"):
        yield Case("model", f"params {kind}", special_file("run", "student/params", kind, run))


def run_cases() -> Iterator[Case]:
    """A finished run, opened again; nothing may be trained or lost."""
    again = ["train", "--config=config.py", "--workdir=run"]

    def with_config(arrange: Callable) -> Callable:
        def arranged(folder: Path, models: Path) -> list[str]:
            shutil.copy(models / "config.py", folder / "config.py")
            return arrange(folder, models)

        return arranged

    for name, change in DAMAGE.items():
        yield Case("run", f"manifest {name}", with_config(damaged_file("run", "manifest.json", change, again)))
    for key in ("config", "status", "stages", "resumed"):
        for value in (None, "x", -1, [], {"a": 1}):
            codes = (2,) if key == "config" else EITHER
            if (key, value) == ("status", "x") or key == "status":
                continue  # an unfinished run goes on
            edit = edited_json("run", "manifest.json", (key,), value, again)
            yield Case("run", f"manifest {key}={short(value)}", with_config(edit), codes)
    for field, value in (("seed", 5), ("stage1.learning_rate", 0.5), ("stage2.batch_size", 4), ("lora.rank", 3)):
        command = [*again, f"--config.{field}={value}"]
        yield Case("run", f"other {field}", with_config(lambda f, m, c=command: (copied(m, f, "run"), c)[1]))
    for kind in ("loop", "dangling"):
        yield Case("run", f"manifest {kind}", with_config(special_file("run", "manifest.json", kind, again)), (2,))

    def a_file(folder: Path, models: Path) -> list[str]:
        (folder / "run").write_text("mine")
        return again

    yield Case("run", "workdir is a file", with_config(a_file))
    tiny = f"--config={ROOT / 'configs' / 'tiny.py'}"
    trained = ["train_tokenizer", "--input=a.txt", "--target=hf"]
    yield Case(
        "run", "tokenizer of a model", lambda f, m: (copied(m, f, "hf"), (f / "a.txt").write_text("a"), trained)[2]
    )
    for name in ("thesis.tex", "model.json", "config.json"):

        def of_others(folder: Path, models: Path, name: str = name) -> list[str]:
            (folder / "mine").mkdir()
            (folder / "mine" / name).write_text("{}")
            return ["train", tiny, "--workdir=mine"]

        yield Case("run", f"workdir holds {name}", of_others)
    for scheme in ("foo://bucket/run", "gs://", "://x", "\0"):
        command = ["train", "--config=config.py", f"--workdir={scheme}"]
        if scheme != "\0":
            yield Case("run", f"workdir {scheme}", with_config(lambda f, m, c=command: c))


CONFIG_FILES = {
    "KeyError": "def get_config():\n    return {}['a']\n",
    "ZeroDivisionError": "def get_config():\n    return 1 / 0\n",
    "exit": "import sys\ndef get_config():\n    sys.exit(3)\n",
    "exit at import": "raise SystemExit('enough')\n",
    "no get_config": "x = 1\n",
    "get_config is a number": "get_config = 3\n",
    "import": "import nothing_there\ndef get_config():\n    pass\n",
    "import from": "from lawcat_jax.config import Confg\n",
    "syntax": "def get_config(:\n",
    "tabs": "def get_config():\n\tx = 1\n        return x\n",
    "null bytes": "x = '\0'\n",
    "a number": "def get_config():\n    return 3\n",
    "a dict": "def get_config():\n    return {'seed': 1}\n",
    "another dataclass": "from lawcat_jax.config import StageConfig\ndef get_config():\n    return StageConfig()\n",
    "the class": "from lawcat_jax.config import Config\ndef get_config():\n    return Config\n",
    "a stage that is a dict": "from lawcat_jax.config import Config\ndef get_config():\n    return Config(stage1={})\n",
    "recursion": "def get_config():\n    return get_config()\n",
    "bare exception": "class Odd(Exception):\n    pass\ndef get_config():\n    raise Odd\n",
    "needs an argument": "def get_config(variant):\n    return None\n",
    "interrupt": "def get_config():\n    raise MemoryError\n",
}


def config_cases() -> Iterator[Case]:
    """Experiment files."""
    for name, text in CONFIG_FILES.items():
        for override in ([], ["--config.seed=1"]):

            def arrange(folder: Path, models: Path, text: str = text, override: list[str] = override) -> list[str]:
                (folder / "c.py").write_text(text)
                return ["train", "--config=c.py", "--workdir=out", "--config.dry_run", *override]

            yield Case("config", f"{name}{' with an override' * bool(override)}", arrange)
    for path in ("", "nowhere.py", ".", "/", "c.json", "/dev/null"):
        yield Case("config", f"path {path}", lambda f, m, p=path: ["train", f"--config={p}", "--workdir=out"])


ROWS: dict[str, Any] = {
    "a weight that is text": {"instruction": "a", "output": "b", "weight": "1"},
    "a list": {"instruction": ["a"], "output": "b"},
    "a number": {"instruction": "a", "input": 3, "output": "b"},
    "no output": {"instruction": "a", "output": None},
    "empty output": {"instruction": "a", "output": ""},
    "both forms": {"instruction": "a", "output": "b", "messages": [{"role": "assistant", "content": "b"}]},
    "preferences": {"instruction": "a", "output": "b", "chosen": "b", "rejected": "c"},
    "images": {"messages": [{"role": "assistant", "content": [{"type": "image", "url": "x"}]}]},
    "tools": {"messages": [{"role": "tool", "content": "4"}, {"role": "assistant", "content": "b"}]},
    "messages that are text": {"messages": "[]x"},
    "odd messages": {"messages": [3, [], None]},
    "chat without a template": {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
}


def instruction_cases() -> Iterator[Case]:
    """Rows of instruction data, in a dry run; the first row is a good one."""
    command = [
        "train", f"--config={ROOT / 'configs' / 'tiny.py'}", "--config.dry_run", "--config.stage1.data.kind=instruction",
        "--config.stage1.data.source=rows.jsonl", "--config.stage1.data.passkey_words=0", "--config.stage1.data.num_samples=10000",
    ]  # fmt: skip
    for name, row in ROWS.items():

        def arrange(folder: Path, models: Path, row: Any = row) -> list[str]:
            rows = [{"instruction": "Count", "output": "One."}, row]
            (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
            return command

        yield Case("data", f"row {name}", arrange, EITHER if name == "empty output" else (2,))


DATA_FILES: dict[str, bytes] = {
    "UTF-16.txt": "some text".encode("utf-16"),
    "UTF-16.jsonl": '{"text": "some text"}'.encode("utf-16"),
    "UTF-16 without a mark.txt": "some text".encode("utf-16-le"),
    "mark alone.txt": b"\xef\xbb\xbf",
    "mark alone.jsonl": b"\xef\xbb\xbf\n",
    "empty texts.jsonl": b'{"text": ""}\n{"text": " "}\n',
    "empty.txt": b"",
    "blank.txt": b" \n\n ",
    "short.txt": b"a few words",
    "binary.txt": bytes(range(256)) * 4,
    "empty.jsonl": b"",
    "broken.jsonl": b'{"text": "a"}\n{"text": \n',
    "numbers.jsonl": b"1\n2\n",
    "other field.jsonl": b'{"body": "a"}\n',
    "null text.jsonl": b'{"text": null}\n',
    "list text.jsonl": b'{"text": ["a"]}\n',
    "deep.jsonl": b'{"text": ' + b"[" * 100_000 + b"\n",
    "not UTF-8.jsonl": b'{"text": "\xff\xfe"}\n',
    "surrogate.jsonl": b'{"text": "\\ud800"}\n',
    "empty.parquet": b"",
    "broken.parquet": b"PAR1" + bytes(64) + b"PAR1",
    "text.parquet": b"PAR1 is what such a file begins with, and not what it is",
    "unknown.xyz": b"some text",
    "archive.gz": b"\x1f\x8b\x08\x00",
}


def data_cases() -> Iterator[Case]:
    """Texts of the perplexity task."""
    base = ["evaluate", "--checkpoint=asset:tiny_llama", "--tasks=perplexity", "--lengths=64", "--output=out"]
    for name, content in DATA_FILES.items():

        def arrange(folder: Path, models: Path, name: str = name, content: bytes = content) -> list[str]:
            (folder / name).write_bytes(content)
            return [*base, f"--text={name}"]

        yield Case("data", name, arrange, (2,) if name not in ("binary.txt",) else EITHER)
    for source in ("nowhere.txt", "*.nothing", ".", "tfds:", "tfds:nothing_there", "hf:", "hf:a:b:c:d", "hf:none/none"):
        yield Case("data", f"source {source}", lambda f, m, s=source: [*base, f"--text={s}"])


def generation_cases() -> Iterator[Case]:
    """Prompts and flags of generate, evaluate, convert and aot."""
    known = ["generate", "--checkpoint=asset:tiny_llama", "--max_new_tokens=2"]

    def fixed(*arguments: str) -> Callable:
        return lambda folder, models: list(arguments)

    for name, prompt in {
        "empty": "",
        "surrogates": "a\udcff\udcfeb",
        "controls": "\x01\x02\t",
        "emoji": "👩‍👩‍👧",
    }.items():
        yield Case("generation", f"prompt {name}", fixed(*known, f"--prompt={prompt}"), EITHER)
    for name, content in {"empty": b"", "not UTF-8": b"\xff\xfea", "null": b"\0", "long": b"word " * 3000}.items():
        yield Case("generation", f"stdin {name}", fixed(*known, "--prompt=-"), EITHER, stdin=content)
    for command in ("train", "convert", "evaluate", "generate", "aot", "throughput", "train_tokenizer"):
        yield Case("generation", f"help of {command}", fixed(command, "--help"), (0,))
    for flag in ("top_k", "top_p", "min_p", "repetition_penalty"):
        for value in ("x", "", "-1", "1e999", "nan", "²"):
            drawn = fixed(*known, "--prompt=a", "--temperature=1", f"--{flag}={value}")
            yield Case("generation", f"{flag}={value}", drawn)
    batch = [*known, "--input=rows.jsonl", "--output=out/answers.jsonl"]
    for name, content in {
        "empty": b"",
        "no JSON": b"{",
        "not UTF-8": b'{"prompt": "\xff\xfe"}',
        "a list": b"[1]",
        "neither": b"{}",
        "both": b'{"prompt": "a", "messages": []}',
        "a number": b'{"prompt": 3}',
        "odd turns": b'{"messages": [{"role": 1}]}',
        "no template": b'{"messages": [{"role": "user", "content": "a"}]}',
        "empty prompt": b'{"prompt": ""}\n{"prompt": "a"}',
        "too long": b'{"prompt": "' + b"word " * 3000 + b'"}',
        "deep": b"[" * 100_000,
    }.items():

        def arrange(folder: Path, models: Path, content: bytes = content) -> list[str]:
            (folder / "rows.jsonl").write_bytes(content)
            return batch

        yield Case("generation", f"rows {name}", arrange, EITHER if name == "empty prompt" else (2,))
    for name, more in {
        "input without output": ["--input=x"],
        "output without input": ["--output=x", "--prompt=a"],
        "input and prompt": ["--input=x", "--output=y", "--prompt=a"],
        "input not there": ["--input=x", "--output=y"],
        "chat without template": ["--chat", "--prompt=a"],
        "system without chat": ["--nochat", "--system=x", "--prompt=a"],
        "empty stop": ["--stop=", "--prompt=a"],
        "interactive and -": ["--interactive", "--prompt=-"],
    }.items():
        yield Case("generation", name, fixed(*known, *more))
    for flag in ("max_new_tokens", "seed", "temperature"):
        for value in ("x", "", "-1", "1e999", "nan", "inf", "9" * 30, "0x10", "²", "1_000_000_000_000_000"):
            codes = (
                EITHER
                if (flag, value) in {("seed", "-1"), ("seed", "0x10"), ("seed", "1_000_000_000_000_000")}
                else (2,)
            )
            codes = EITHER if (flag, value) == ("max_new_tokens", "0x10") else codes
            yield Case("generation", f"{flag}={value[:12]}", fixed(*known, "--prompt=a", f"--{flag}={value}"), codes)
    evaluate = ["evaluate", "--checkpoint=asset:tiny_llama", "--output=out", "--samples=1"]
    for flag in ("tasks", "lengths", "samples", "batch_size", "seed", "form"):
        for value in ("", "x", "-1", "1.5", "nan", "9" * 30, ",,", "²"):
            codes = EITHER if (flag, value) == ("seed", "-1") else (2,)
            arguments = [*evaluate, *(["--lengths=64"] if flag != "lengths" else []), f"--{flag}={value}"]
            yield Case("generation", f"evaluate {flag}={value[:12]}", fixed(*arguments), codes)
    for checkpoint in (
        "",
        ".",
        "/",
        "nowhere",
        "a/b",
        "a=",
        "=a",
        "asset:none",
        "package:none",
        "/dev/null",
        "~nobody/x",
    ):
        for command in (known[:1], evaluate[:1]):
            argv = [*command, f"--checkpoint={checkpoint}", *(["--prompt=a"] if command == ["generate"] else [])]
            yield Case("generation", f"{command[0]} of {checkpoint}", fixed(*argv))
    for flag in ("--nothing=1", "stray", "--source", "--target=out --dtype=x"):
        yield Case("generation", f"convert {flag}", fixed("convert", "--source=asset:tiny_llama", *flag.split()))


def size_cases() -> Iterator[Case]:
    """Sizes and topologies of the commands that compute nothing."""
    tiny = f"--config={ROOT / 'configs' / 'tiny.py'}"
    for topology in (
        "",
        "x",
        "v5e",
        "v5e:",
        "v5e:0x4",
        "v5e:-1x4",
        "v5e:4x²",
        "v5e:4x4x4x4",
        "h200:",
        "h200:²",
        "h200:0",
    ):
        yield Case("sizes", f"aot {topology}", lambda f, m, t=topology: ["aot", tiny, f"--topology={t}"])
    for value in ("x", "stage1,nothing", "²"):
        yield Case("sizes", f"aot stages {value}", lambda f, m, v=value: ["aot", tiny, f"--stages={v}"])
    for name in ("prefill_length", "prefill_batch", "decode_batch"):
        for value in ("-1", "x", "9" * 30, "²"):
            yield Case("sizes", f"aot {name}={value[:5]}", lambda f, m, n=name, v=value: ["aot", tiny, f"--{n}={v}"])


def environment_cases() -> Iterator[Case]:
    """Variables that jax and launchers read when they are imported."""

    def command(folder: Path, models: Path) -> list[str]:
        return ["generate", "--checkpoint=asset:tiny_llama", "--prompt=a", "--max_new_tokens=1"]

    for name, values in {
        "JAX_PLATFORMS": ("nonsense", "cpu,nonsense", "²"),
        "JAX_NUM_CPU_DEVICES": ("x", "0", "-3", "²", "9" * 20),
        "JAX_ENABLE_COMPILATION_CACHE": ("maybe",),
        "SLURM_STEP_NUM_TASKS": ("x", "²"),
        "OMPI_COMM_WORLD_SIZE": ("many",),
        "JAX_PROCESS_ID": ("first",),
    }.items():
        for value in values:
            yield Case("environment", f"{name}={value}", command, environment={name: value}, fresh=True)
    for name, value in (("JAX_ENABLE_X64", "1"), ("MPLBACKEND", "nonsense"), ("PYTHONIOENCODING", "ascii")):
        yield Case("environment", f"{name}={value}", command, (0,), environment={name: value}, fresh=True)


def header_cases() -> Iterator[Case]:
    """Headers of safetensors that contradict the file."""
    content = (ASSET / "model.safetensors").read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]

    def rewritten(change: Callable[[dict], None]) -> Callable[[bytes], bytes]:
        def make(_: bytes) -> bytes:
            values = json.loads(json.dumps(header))
            change(values)
            text = json.dumps(values).encode()
            return struct.pack("<Q", len(text)) + text + content[8 + length :]

        return make

    command = [*GENERATE, "--checkpoint=hf"]
    for name in names[:4]:
        for key in ("dtype", "shape", "data_offsets"):
            for value in (None, "x", -1, [], [-1, 5], [0, 10**15], {"a": 1}):
                change = rewritten(lambda values, n=name, k=key, v=value: values[n].update({k: v}))
                edit = damaged_file("hf", "model.safetensors", change, command)
                yield Case("model", f"header {name[-20:]} {key}={short(value)}", edit)
        gone = damaged_file("hf", "model.safetensors", rewritten(lambda values, n=name: values.pop(n)), command)
        yield Case("model", f"header without {name[-20:]}", gone)


def all_cases() -> list[Case]:
    """Every case, in a fixed order."""
    makers = (
        config_cases, run_cases, data_cases, instruction_cases, generation_cases, environment_cases, size_cases, model_cases, header_cases,
        launch_cases,
    )  # fmt: skip
    return [case for make in makers for case in make()]
