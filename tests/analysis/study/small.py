"""A study without models: its jobs are plans only, or programs of a few lines."""

from __future__ import annotations

import textwrap
from pathlib import Path

from lawcat_jax.analysis.study import Cells, Claim, Evaluation, Row, Study
from lawcat_jax.analysis.study.plan import Job
from lawcat_jax.config import AttentionConfig, Config, StageConfig

STUDY = Study(
    name="small",
    title="A small study",
    rows=(
        Row("teacher", "teacher", "teacher"),
        Row("lawcat", "LAWCAT", "reference"),
        Row("no_conv", "no convolution", "ablation", reference="lawcat", note="for tests only"),
        Row("shuffled", "states passed", "ablation", seeds=(0, 1), reference="lawcat"),
        Row("long", "LAWCAT, long", "headline", seeds=(0, 1)),
    ),
    evaluations=(
        Evaluation("passkey", ("passkey",), (128, 256), samples=50, groups=("headline", "ablation", "reference")),
        Evaluation("text", ("perplexity",), (128,), text="/home/me/books/test", rows=("teacher", "long")),
    ),
    claims=(Claim("It helps", "the paper", "lawcat", "no_conv", (Cells("passkey", (128, 256)),)),),
)


def get_config(variant: str) -> Config:
    """Configuration of a run of :data:`STUDY`."""
    name, _, seed = variant.partition("_seed")
    steps = 20 if name == "long" else 10
    config = Config(
        seed=int(seed),
        attention=AttentionConfig(conv="off" if name == "no_conv" else "on"),
        stage1=StageConfig(steps=steps, trainable=("^mixers/",)),
        stage2=StageConfig(steps=steps, trainable=("^lora/",)),
    )
    config.stage1.data.num_workers = 8
    if name == "shuffled":
        config.stage2.state_passing = "shuffled"
    return config


PROGRAM = textwrap.dedent(
    """
    import json, os, signal, sys, time
    from pathlib import Path
    name, folder, seconds, code = sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]), int(sys.argv[4])
    log = folder / "events"
    def note(event, **more):
        names = ("CUDA_VISIBLE_DEVICES", "XLA_PYTHON_CLIENT_MEM_FRACTION", "LAWCAT_JAX_COMPILATION_CACHE")
        values = {key: os.environ.get(key) for key in names}
        with log.open("a") as out:
            out.write(json.dumps({"job": name, "event": event, "time": time.monotonic(), **values, **more}) + "\\n")
    def stop(*_):
        (folder / (name + ".saved")).touch()
        note("stopped")
        sys.exit(75)
    signal.signal(signal.SIGTERM, stop)
    note("begin", resumed=(folder / (name + ".saved")).exists())
    end = time.monotonic() + (0.0 if (folder / (name + ".saved")).exists() else seconds)
    while time.monotonic() < end:
        time.sleep(0.01)
    print("a line of", name)
    if code:
        print("error: no luck with " + name)
        sys.exit(code)
    (folder / (name + ".done")).touch()
    note("end")
    """
)


def program(folder: Path, name: str, *, seconds: float = 0.0, code: int = 0, after: tuple[str, ...] = ()) -> Job:
    """A job that takes so long and ends with that code; :data:`PROGRAM` lies in a folder of PYTHONPATH as ``a_job.py``."""
    arguments = (name, str(folder), str(seconds), str(code))
    return Job(name, "evaluate", "a_job", arguments, (folder / f"{name}.done",), {"seconds": seconds}, after)
