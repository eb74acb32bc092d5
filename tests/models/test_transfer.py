"""The stage-1 hook against a plain Python loop over layers, and the adapters."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lawcat_jax import models
from lawcat_jax.config import LoraConfig
from lawcat_jax.errors import UserError
from lawcat_jax.models.attention import softmax_attention
from lawcat_jax.models.rope import rotate
from lawcat_jax.training.attention_transfer import teacher_forced
from tests.models.helpers import LAWCAT, TINY, build, forward, jit, tokens

HYBRID = dataclasses.replace(LAWCAT, softmax_layers=(1,))


def layer_loss(index, teacher, student, mask):
    weight = mask[:, :, None].astype(jnp.float32)
    error = jnp.sum(weight * (student - teacher) ** 2)
    return {
        "error": error * (1.0 + index),
        "power": jnp.sum(weight * teacher**2),
        "per_token": jax.lax.stop_gradient(jnp.mean(student, axis=-1)),
    }


def test_teacher_forced_equals_monolithic_autodiff():
    graphdef, params = build(TINY, HYBRID)
    inputs, lengths = tokens(), np.array([9, 6], np.int32)
    mask = (np.arange(9) < lengths[:, None]) & (np.arange(9) != 2)

    def forced(unroll_layers, params):
        model = models.bind(graphdef, params)
        options = {"mask": mask, "lengths": lengths, "unroll_layers": unroll_layers}
        sums = teacher_forced(model, inputs, layer_loss=layer_loss, **options)
        return jnp.sum(sums["error"] ** 2), sums

    def monolithic(mixers):
        """Every layer in Python, the teacher's hidden states, one autodiff through all."""
        model = models.bind(graphdef, {**params, "mixers": mixers})
        context = model.context(inputs, lengths=jnp.asarray(lengths))
        layers, layer_params = nnx.split(model.layers)
        mixer_graph, mixer_params = nnx.split(model.mixers)
        x, total = model.embedded(inputs), 0.0
        for index in range(3):
            layer = nnx.merge(layers, jax.tree.map(lambda leaf, index=index: leaf[index], layer_params))
            h = layer.input_norm(x)
            q, k, v = layer.attention.qkv(h)
            turned = (rotate(array, context.cos, context.sin) for array in (q, k))
            teacher = softmax_attention(*turned, v)
            if index != 1:
                mixer = nnx.merge(mixer_graph, jax.tree.map(lambda leaf, n=index // 2: leaf[n], mixer_params))
                student, _ = mixer(h, q, k, v, context)
                flat = (o.reshape(2, 9, -1) for o in (teacher, student))
                total += layer_loss(index, *flat, jnp.asarray(mask))["error"] ** 2
            x = x + layer.attention.output(teacher)
            x = x + layer.mlp(layer.post_attention_norm(x))
        return total

    differentiated = jax.value_and_grad(forced, argnums=1, has_aux=True)
    (value, sums), gradients = jit(functools.partial(differentiated, False))(params)
    (again, _), unrolled_gradients = jit(functools.partial(differentiated, True))(params)
    np.testing.assert_allclose(again, value, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), unrolled_gradients, gradients)
    expected, expected_gradients = jit(jax.value_and_grad(monolithic))(params["mixers"])
    assert sums["power"].shape == (2,)
    assert sums["per_token"].shape == (2, 2, 9)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    for name, ours, theirs in zip(
        expected_gradients, jax.tree.leaves(gradients["mixers"]), jax.tree.leaves(expected_gradients), strict=False
    ):
        scale = np.abs(theirs).max()
        assert scale > 0, name
        np.testing.assert_allclose(ours, theirs, atol=2e-5 * scale, err_msg=name)
    others = jax.tree.leaves({name: value for name, value in gradients.items() if name != "mixers"})
    assert all(not np.any(leaf) for leaf in others)


def test_layer_loss_must_return_scalars():
    graphdef, params = build(TINY, LAWCAT)

    def loss(params):
        model = models.bind(graphdef, params)
        return jnp.sum(teacher_forced(model, tokens(), layer_loss=lambda index, teacher, student, mask: student))

    with pytest.raises(UserError, match="scalars"):
        jax.eval_shape(jax.grad(loss), params)
    plain, base = build()
    with pytest.raises(UserError, match="no linearised layers"):
        teacher_forced(models.bind(plain, base), tokens(), layer_loss=layer_loss)


def test_adapters_merge_and_leave_the_teacher_alone():
    lora = LoraConfig(rank=3, alpha=5.0, targets=("q_proj", "v_proj", "o_proj"))
    graphdef, params = build(TINY, HYBRID, lora)
    inputs = tokens()
    adapted = forward(params, inputs, graphdef=graphdef)
    without, _ = models.abstract(TINY, HYBRID)
    merged = models.merge_lora(params, lora, HYBRID)
    assert "lora" not in merged
    np.testing.assert_allclose(forward(merged, inputs, graphdef=without), adapted, atol=2e-4)
    plain = {name: value for name, value in params.items() if name != "lora"}
    assert np.abs(forward(plain, inputs, graphdef=without) - adapted).max() > 0.1
    teacher = forward(params, inputs, graphdef=graphdef, as_teacher=True)
    np.testing.assert_array_equal(teacher, forward(plain, inputs, graphdef=without, as_teacher=True))
    kernels = (tree["layers"]["attention"]["q_proj"]["kernel"] for tree in (params, merged))
    before, after = map(np.asarray, kernels)
    np.testing.assert_array_equal(before[1], after[1])  # the softmax layer of the hybrid
    with pytest.raises(UserError, match="nothing to merge"):
        models.merge_lora(merged, lora, HYBRID)


@pytest.mark.slow
def test_remat_dropout_and_hidden_states():
    lora = LoraConfig(rank=2, dropout=0.5)
    graphdef, params = build(dataclasses.replace(TINY, num_layers=2), LAWCAT, lora)
    inputs = tokens()

    def loss(lora_params, remat, key=None):
        model = models.bind(graphdef, {**params, "lora": lora_params})
        unrolled = remat == "unrolled"
        remat = "none" if unrolled else remat
        hidden = model(inputs, remat=remat, unroll_layers=unrolled, dropout_rng=key, return_hidden=True)
        return jnp.mean(jax.nn.log_softmax(model.head(hidden))[..., 0])

    gradient = jit(jax.grad(loss), static_argnums=1)
    reference = gradient(params["lora"], "none")
    for remat in ("layer", "dots", "unrolled"):
        other = gradient(params["lora"], remat)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), reference, other)
    value = jit(loss, static_argnums=1)
    first, second, again = (float(value(params["lora"], "none", jax.random.key(seed))) for seed in (0, 1, 0))
    assert first == again != second
    with pytest.raises(UserError, match="remat"):
        loss(params["lora"], "everything")
