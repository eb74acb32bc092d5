"""The study: what of the method makes a SmolLM2-135M student retrieve beyond its training length, and against what.

Command, two GPUs with two runs each: ``python -m lawcat_jax.study --config=configs/study_smollm2.py --devices=0,1
--runs_per_device=2``; with ``--minutes=9`` it ends in time for a machine that is lent for ten minutes, and goes on when it
is run again. ``--list`` shows all runs. Data and teacher are those of configs/smollm2.py (LAWCAT_DATA); evaluation also
reads ``books/test`` there. S-NIAH needs ``pip install wonderwords``.

Each row is a change to configs/smollm2.py and is trained alone by its name and a seed: ``python -m lawcat_jax.train
--config=configs/study_smollm2.py:no_conv_seed1 --workdir=runs/no_conv``. Ablations and baselines have fewer steps than the
headline; the row that they are to be compared with has as many as they: ``lawcat_short`` with generated samples in the
wordings of a list, or ``composed``. Neither is taught to end after an answer, as ``composed_ends`` and the headline are. All
rows read 8 x 1,280 tokens a step, and no row trains on a longer sequence.

The window with sinks (``window_sinks``) has a cache as large as LAWCAT's state, 154,368 bytes a layer and sequence in
bfloat16: 9 heads hold 64 x 64 + 64 sums in float32 and the last 3 rows of q, 3 kv heads those of k, and a token in the cache
takes 2 x 3 x 64 numbers, 768 bytes. So it is 201 tokens: 4 sinks and a window of 197.
"""

import dataclasses
import os
import runpy
from pathlib import Path

from lawcat_jax.analysis.study import Cells, Claim, Evaluation, Row, Study
from lawcat_jax.config import AttentionConfig, Config, DataConfig

HEADLINE = (4000, 4000)  # steps of stage 1 and stage 2
ABLATION = (1000, 1000)
RANK = 32
DEAREST = (18, 19, 23, 17)
"""Layers whose replacement costs most on passkey samples of the held-out wording, the dearest first: as measured in docs/inspection.md."""
HYBRIDS = {f"hybrid{count}": DEAREST[:count] for count in (1, 2, 4)}
"""Row -> layers that keep softmax attention."""

_SMOLLM2 = runpy.run_path(str(Path(__file__).with_name("smollm2.py")))

ATTENTION = {
    "lolcats_terraced": AttentionConfig(kind="lolcats", window_size=64, window_kind="terraced", tie_qk=False),
    "lolcats_sliding": AttentionConfig(kind="lolcats", window_size=64, tie_qk=False),
    "window_sinks": AttentionConfig(kind="window", window_size=197, sinks=4),
    "window_sinks_untrained": AttentionConfig(kind="window", window_size=197, sinks=4),
    "no_conv": AttentionConfig(gate_rank=RANK, conv="off"),
    "plain_linear": AttentionConfig(gate_kind="none", conv="off"),
    "no_normalizer": AttentionConfig(gate_rank=RANK, normalize=False),
    "rope": AttentionConfig(gate_rank=RANK, rope_linear=True),
    "window": AttentionConfig(gate_rank=RANK, window_size=64),
    "rank16": AttentionConfig(gate_rank=16),
    "rank64": AttentionConfig(gate_rank=64),
    "rank_full": AttentionConfig(gate_rank=0),
    "untied": AttentionConfig(gate_rank=RANK, tie_qk=False),
    "gate_per_head": AttentionConfig(gate_rank=RANK, gate_kind="per_head"),
    **{name: AttentionConfig(gate_rank=RANK, softmax_layers=tuple(sorted(layers))) for name, layers in HYBRIDS.items()},
}

COMPOSED = (
    ("window", "with a window of 64"),
    ("rank64", "gate of rank 64"),
    ("rank16", "gate of rank 16"),
    ("no_conv", "no convolution"),
    ("no_normalizer", "no normaliser"),
    ("rope", "RoPE on the linear branch"),
    ("ends", "taught to end after an answer"),
    ("shuffled", "states of other rows at the start"),
    ("gate_per_head", "one gate a head"),
    ("untied", "maps of their own for q and k"),
    ("rank_full", "gate of full rank"),
    *((name, f"hybrid of {len(layers)}") for name, layers in HYBRIDS.items()),
)
"""Changes to the row ``composed``, whose runs differ less than those of ``lawcat_short`` do."""


def _softmax_layers(name: str) -> str:
    layers = ", ".join(map(str, sorted(HYBRIDS[name])))
    return f"softmax attention, and a cache that grows, in layer {layers}"


ROWS = (
    Row("lawcat", "LAWCAT, long", "headline", seeds=(0, 1, 2)),
    Row("lawcat_varied", "LAWCAT, long, wordings of a list", "headline", seeds=(0, 1, 2)),
    Row("lawcat_short", "LAWCAT", "reference", seeds=(0, 1)),
    Row("teacher", "teacher", "teacher"),
    Row("lolcats_terraced", "LoLCATs, terraced window", "baseline", reference="lawcat_short"),
    Row(
        "window_sinks_untrained", "softmax window of 197 and 4 sinks, not trained", "baseline", reference="lawcat_short"
    ),
    Row("window_sinks", "softmax window of 197 and 4 sinks", "baseline", reference="lawcat_short"),
    Row("no_conv", "no convolution", "ablation", reference="lawcat_short"),
    Row("plain_linear", "linear attention, neither gate nor convolution", "baseline", reference="lawcat_short"),
    Row("no_normalizer", "no normaliser", "ablation", reference="lawcat_short"),
    Row("rope", "RoPE on the linear branch", "ablation", reference="lawcat_short"),
    Row("lolcats_sliding", "LoLCATs, sliding window", "baseline", reference="lawcat_short"),
    Row("window", "with a window of 64", "ablation", reference="lawcat_short"),
    Row("passkey_only", "passkey data alone, in many wordings", "ablation", reference="lawcat_short"),
    Row("one_wording", "the same mixture, the paper's wording of each task", "ablation", reference="lawcat_short"),
    Row("composed", "LAWCAT, wordings composed of parts", "ablation", reference="lawcat_short"),
    *(
        Row(
            f"composed_{name}",
            f"composed wordings, {title}",
            "ablation",
            reference="composed",
            note=_softmax_layers(name) if name in HYBRIDS else "",
        )
        for name, title in COMPOSED
    ),
)


def get_config(variant: str = "lawcat_seed0") -> Config:
    """The configuration of a run: a row of the study that is trained, and a seed."""
    name, _, seed = variant.partition("_seed")
    if name not in [row.name for row in ROWS if row.group != "teacher"]:
        raise ValueError(f"unknown row {name!r}; --list of lawcat_jax.study shows all")
    config = _SMOLLM2["get_config"]()
    config.seed = int(seed or 0)
    config.stage1.steps, config.stage2.steps = HEADLINE if name.removesuffix("_varied") == "lawcat" else ABLATION
    changed = name.removeprefix("composed_")
    config.attention = ATTENTION.get(changed, AttentionConfig(gate_rank=RANK))
    if config.attention.kind == "window":  # without parameters of its own
        config.stage1.enabled, config.stage2.trainable = False, (r"^lora/",)
        config.stage2.enabled = name != "window_sinks_untrained"
    if name.startswith("composed"):
        config.stage1.data = config.stage2.data = _SMOLLM2["mixture"](end_weight=0.0)
    elif name != "lawcat":
        config.stage1.data = config.stage2.data = _SMOLLM2["mixture"](wording="varied", end_weight=0.0)
    if name == "passkey_only":
        _read(config, _passkey_only)
        config.stage2.kl_weight = 0.0  # the teacher is followed on text, and there is none
    if name == "one_wording":
        _read(config, _one_wording)
    if changed == "shuffled":
        config.stage2.state_passing = "shuffled"
    if changed == "ends":
        config.stage2.data = _SMOLLM2["mixture"]()
    return config


def _read(config: Config, change) -> None:
    config.stage1.data, config.stage2.data = change(config.stage1.data), change(config.stage2.data)


def _passkey_only(data: DataConfig) -> DataConfig:
    return dataclasses.replace(data, mixture=tuple(part for part in data.mixture if part.kind == "passkey"))


def _one_wording(data: DataConfig) -> DataConfig:
    def change(part):
        if part.kind == "text":
            return part
        own = (
            {"hay": "noise", "hay_source": ""} if part.kind == "passkey" else {}
        )  # the paper's passkey filler is its own
        return dataclasses.replace(part, wording="paper", **own)

    return dataclasses.replace(data, mixture=tuple(map(change, data.mixture)))


LENGTHS = (1024, 2048, 4096, 8192, 16384)
CONTEXT = (1024, 2048, 4096, 8192)  # the teacher has no more positions


def get_study() -> Study:
    """Rows, evaluations and claims."""
    folder = os.environ.get("LAWCAT_DATA", "data")
    sources = {"haystack": f"{folder}/books/test", "babi": f"{folder}/babi/en-10k"}
    niah = tuple(f"niah_single_{number}" for number in (1, 2, 3))
    babilong = tuple(f"babilong_qa{number}" for number in range(1, 6))
    text = {"text": f"{folder}/books/test", "samples": 8, "batch_size": 8}
    compared = ("reference", "ablation", "baseline")
    headline, teacher = {"groups": ("headline",)}, {"groups": ("teacher",)}
    return Study(
        name="study_smollm2",
        title="What makes a SmolLM2-135M student retrieve beyond its training length",
        rows=ROWS,
        evaluations=(
            Evaluation("passkey_short", ("passkey",), LENGTHS, samples=100, groups=compared),
            Evaluation(
                "passkey_train_short",
                ("passkey",),
                LENGTHS,
                samples=50,
                passkey_form="train",
                rows=("lawcat_short", "composed", "one_wording", "lolcats_terraced"),
            ),
            Evaluation("niah_short", niah[:1], LENGTHS, samples=50, haystack=sources["haystack"], groups=compared),
            Evaluation("passkey", ("passkey",), (*LENGTHS, 22528, 32768, 65536), samples=100, **headline),
            Evaluation("passkey_teacher", ("passkey",), CONTEXT, samples=100, **teacher),
            Evaluation("passkey_train", ("passkey",), CONTEXT, samples=100, passkey_form="train", **headline),
            Evaluation("niah", niah, (*LENGTHS, 32768), samples=100, haystack=sources["haystack"], **headline),
            Evaluation("babilong_qa1_to_3", babilong[:3], CONTEXT, samples=100, **sources, **headline),
            Evaluation("babilong_qa4_and_5", babilong[3:], CONTEXT, samples=100, **sources, **headline),
            Evaluation("babilong_long", babilong, (16384, 32768), samples=100, **sources, **headline),
            Evaluation(
                "babilong_ends",
                babilong[:3],
                CONTEXT,
                samples=100,
                **sources,
                rows=("composed_ends", "lawcat_short", "composed"),
            ),
            Evaluation("tasks_teacher", (*niah, *babilong), CONTEXT, samples=100, **sources, **teacher),
            Evaluation("perplexity", ("perplexity_by_position",), (32768,), position_block=4096, **text, **headline),
            Evaluation(
                "perplexity_teacher", ("perplexity_by_position",), (8192,), position_block=4096, **text, **teacher
            ),
        ),
        claims=_claims(),
    )


def _claims() -> tuple[Claim, ...]:
    def passkey(*lengths: int) -> tuple[Cells, ...]:
        return (Cells("passkey", lengths),)

    beyond = passkey(2048, 4096, 8192, 16384)
    qa = tuple(Cells(task, CONTEXT) for task in ("babilong_qa2", "babilong_qa3"))
    return (
        Claim("LAWCAT retrieves beyond its training length where LoLCATs does not", "paper, Table 1 and Figure 2",
              "lawcat_short", "lolcats_terraced", beyond),
        Claim("The same, LoLCATs with a sliding window", "paper, Table 1", "lawcat_short", "lolcats_sliding", beyond),
        Claim("LAWCAT retrieves beyond its training length where window and sinks do not", "this project",
              "lawcat_short", "window_sinks", beyond),
        Claim("The same, window and sinks without training", "arXiv 2309.17453", "lawcat_short", "window_sinks_untrained",
              beyond),
        Claim("Gate and convolution carry further than plain linear attention", "paper, section 3", "lawcat_short",
              "plain_linear", beyond),
        Claim("The convolution helps retrieval", "paper, Table 1", "lawcat_short", "no_conv", passkey(*LENGTHS)),
        Claim("The same, on composed wordings", "paper, Table 1", "composed", "composed_no_conv", passkey(*LENGTHS)),
        Claim("Without the normaliser retrieval fails beyond 1K", "paper, Table 2", "lawcat_short", "no_normalizer", beyond),
        Claim("The same, on composed wordings", "paper, Table 2", "composed", "composed_no_normalizer", beyond),
        Claim("RoPE on the linear branch harms beyond 3K", "paper, Table 5", "lawcat_short", "rope",
              passkey(4096, 8192, 16384)),
        Claim("The same, on composed wordings", "paper, Table 5", "composed", "composed_rope", passkey(4096, 8192, 16384)),
        Claim("A sliding window harms at long contexts", "paper, Table 6", "lawcat_short", "window", passkey(4096, 8192)),
        Claim("The same, on composed wordings", "paper, Table 6", "composed", "composed_window",
              passkey(4096, 8192, 16384)),
        Claim("A gate of rank 64 is worse than one of rank 32", "the paper, by a secondary source", "composed",
              "composed_rank64", passkey(*LENGTHS)),
        Claim("A gate of rank 16 is worse than one of rank 32", "the paper, by a secondary source", "composed",
              "composed_rank16", passkey(*LENGTHS)),
        Claim("The student beats its teacher in BABILong QA2 and QA3 within the teacher's context", "paper, Figure 3",
              "lawcat", "teacher", qa),
        Claim("A student that was taught to end passes BABILong's strict metric more often", "this project", "composed_ends",
              "composed", qa),
        Claim("States of other rows at the start carry further", "arXiv 2507.02782", "composed_shuffled", "composed",
              passkey(8192, 16384)),
        Claim("Several kinds of data carry further than passkeys alone", "this project", "lawcat_short", "passkey_only",
              beyond),
        Claim("Frames composed of parts help in a wording that was not trained on", "this project", "composed", "lawcat_short",
              passkey(*LENGTHS)),
    )  # fmt: skip
