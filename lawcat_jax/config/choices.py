"""The named options of the configuration, each list written here once.

A field that holds a name has one of these ``Literal`` types; validation reads the options from the type, and
``tests/test_choices.py`` compares them with the tables where they are implemented.
"""

from typing import Literal

Family = Literal["llama", "mistral", "qwen2", "qwen3", "smollm3", "olmo2", "phi3"]
"""Model family: which Hugging Face architecture a checkpoint is read as and written back to. Each is described in the
file of its name in ``lawcat_jax/checkpoints/hf/families``."""

RopeKind = Literal["none", "linear", "dynamic", "yarn", "longrope", "llama3"]
"""Scaling of the rotary frequencies, by transformers' names; ``llama3`` is that of Llama 3.1 and later."""

QkNorm = Literal["none", "head", "projection"]
"""RMS norm of q and k before the rotary embedding: none, over each head (Qwen3), or over all heads of a token together
(OLMo 2)."""

NormPosition = Literal["before", "after"]
"""Where the norms of a layer stand: before attention and MLP, or behind them (OLMo 2)."""

LayerProjection = Literal["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
"""Matrix of a decoder layer."""

Dtype = Literal["auto", "float32", "bfloat16"]
"""Number format; ``auto`` is bfloat16 on accelerators and float32 on CPU."""

MixerKind = Literal["lawcat", "lolcats", "window"]
"""Token mixer that replaces softmax attention: the paper's layer, the LoLCATs baseline, or softmax over a window and the
first tokens alone (StreamingLLM), which has nothing to train in stage 1."""

Conv = Literal["on", "off", "stacked", "shared"]
"""Causal convolution on q and k: one each, none, two in a row, or the same taps for q and k."""

FeatureMap = Literal["softmax_dim", "half_softmax", "exp_dim", "relu", "pos_elu"]
"""Non-negative function of the scores u^T Phi of q or k. Two-sided maps (``softmax_dim``, ``exp_dim``) give 2 f features
from f scores, the others f."""

GateKind = Literal["per_dim", "per_head", "none"]
"""Forget gate: one per kv head and feature, one per kv head, or none."""

WindowKind = Literal["sliding", "terraced"]
"""Softmax window of a token: the last w tokens, or its own block of w tokens up to itself and the whole block before
(w + 1 to 2 w tokens), as in LoLCATs' fast kernels."""

Init = Literal["identity", "xavier", "normal", "kaiming_feature_map"]
"""Initial values of taps and gate matrices, or (``kaiming_feature_map``) of feature maps; feature maps are the identity
otherwise, as in the authors' code. ``identity`` is the paper's."""

Implementation = Literal["reference", "scan", "pallas_mosaic_gpu", "pallas_triton", "pallas_tpu"]
"""Backend of the ops in ``kernels_pallas``."""

Projection = Literal["q_proj", "k_proj", "v_proj", "o_proj"]
"""Matrix of an attention layer that can carry a LoRA adapter."""

DataKind = Literal["passkey", "text", "niah", "babilong", "instruction", "mixture"]
"""What a stage is trained on: generated passkey samples, text packed to the stage's length, needles that belong to a name
(S-NIAH), bAbI stories in book text (BABILong), instructions with answers, or several of these."""

SourceKind = Literal["passkey", "text", "niah", "babilong", "instruction"]
"""What one source of a mixture holds."""

Wording = Literal["paper", "varied", "composed"]
"""Wording of generated training samples: the paper's single one, many templates and kinds of keys, or these put together from
more parts (needles stated twice, any question with any lead, filler drawn by sentences), so that hardly two frames are alike."""

ValidationWording = Literal["", "paper", "varied", "composed", "selection"]
"""Wording of generated validation samples; ``selection`` is never trained on. ``""`` is ``paper`` where the training
wording is ``paper``, else ``selection``."""

Hay = Literal["noise", "books", "mixed"]
"""What surrounds a needle: repeated filler sentences, book text, or either, half the samples each."""

BabiTask = Literal["qa1", "qa2", "qa3", "qa4", "qa5"]
"""bAbI task: one, two or three supporting facts, relations of two or three arguments."""

Schedule = Literal["cosine", "constant", "plateau"]
"""Learning rate after the warm-up: down to 0, constant, or lowered when the validation loss stops falling."""

Divergence = Literal["forward", "reverse"]
"""KL divergence of student and teacher: KL(teacher || student), or KL(student || teacher)."""

StatePassing = Literal["off", "shuffled", "pieces"]
"""Recurrent state at the start of a training sequence: empty, the last state of a random row of the batch before, or of the
same row where that held the piece before of the same sample."""

Remat = Literal["none", "layer", "dots"]
"""Activations computed again in the backward pass: none, all of a layer, or all but matrix products."""

LossDenominator = Literal["valid", "all"]
"""What attention transfer divides its squared errors by: valid tokens, or padding too (the authors' code)."""

Distributed = Literal["auto", "on", "off"]
"""Whether ``jax.distributed`` is started; ``auto`` does when the environment describes several processes."""

Progress = Literal["auto", "bar", "lines", "off"]
"""Progress display; ``auto`` is a bar on a terminal and lines elsewhere."""

TaskName = Literal[
    "passkey",
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "babilong_qa1",
    "babilong_qa2",
    "babilong_qa3",
    "babilong_qa4",
    "babilong_qa5",
    "perplexity",
    "perplexity_by_position",
]
"""Evaluation task: passkey retrieval, RULER's S-NIAH, BABILong, or perplexity of text, whole or by position."""

PasskeyForm = Literal["train", "landmark"]
"""Wording of passkey prompts: that of the training samples, or the evaluation prompt of the paper (from Landmark
attention and LongLoRA)."""

Bos = Literal["auto", "always", "never"]
"""Beginning-of-sequence token in front of a text: where the tokenizer itself puts one, wherever there is such a token, or
nowhere. A text that begins with it gets no second one."""

TEXT_SUFFIXES = (".txt", ".md", ".jsonl", ".parquet")
"""What local text files may be called; instruction data is in files of the last two."""
