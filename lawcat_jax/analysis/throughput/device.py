"""What the measurements need of the devices: random weights on them, and how many bytes were taken."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lawcat_jax import models
from lawcat_jax.config import AttentionConfig, LoraConfig, ModelConfig
from lawcat_jax.runtime import sharding
from lawcat_jax.training import optim


def random_params(
    model: ModelConfig, attention: AttentionConfig | None, lora: LoraConfig | None, mesh: Mesh, *, seed: int, dtype: Any
) -> optim.Params:
    """Parameters of a model on the mesh: the pretrained part random in ``dtype``, mixers and adapters freshly
    initialised in float32 as the trainer does.

    The pretrained part is a hash of each entry's index, which XLA computes in place: real random numbers would need
    several times the memory of a step for a moment, and the allocator's peak cannot be reset.
    """
    _, base = models.abstract(model, dtype=dtype)
    _, whole = models.abstract(model, attention, lora, dtype=dtype)
    added = {part: value for part, value in whole.items() if part not in base}
    draw = jax.jit(functools.partial(_hashed, base), out_shardings=sharding.shardings(base, mesh))
    initialise = jax.jit(
        lambda: models.init_params(model, attention, lora, seed=seed, base={}),
        out_shardings=sharding.shardings(added, mesh),
    )
    return draw() | initialise()


def _hashed(shapes: Any) -> Any:
    """Uniform numbers of standard deviation 0.02 for kernels and embeddings, ones for the scales of norms."""

    def one(number: int, name: str, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        if name.endswith("scale"):
            return jnp.ones(leaf.shape, leaf.dtype)
        index, stride = jnp.uint32(number * 0x9E3779B9 % 2**32), 1
        for axis in reversed(range(len(leaf.shape))):
            index = index + jax.lax.broadcasted_iota(jnp.uint32, leaf.shape, axis) * jnp.uint32(stride % 2**32)
            stride *= leaf.shape[axis]
        for factor in (0x7FEB352D, 0x846CA68B):
            index = (index ^ (index >> 16)) * jnp.uint32(factor)
        unit = ((index >> 8).astype(jnp.float32) + 0.5) * 2.0**-24
        return ((2 * unit - 1) * (0.02 * 3**0.5)).astype(leaf.dtype)

    leaves, treedef = jax.tree_util.tree_flatten_with_path(shapes)
    values = [one(number, sharding.path_name(path), leaf) for number, (path, leaf) in enumerate(leaves)]
    return jax.tree.unflatten(treedef, values)


def compiled_bytes(compiled: Any) -> dict[str, int]:
    """Bytes of one device by the compiler's account, by what they are for; nothing where it gives none."""
    analysis = compiled.memory_analysis()
    if analysis is None:
        return {}
    return {
        "arguments": analysis.argument_size_in_bytes,
        "temporaries": analysis.temp_size_in_bytes,
        "results": analysis.output_size_in_bytes - analysis.alias_size_in_bytes,
        "code": analysis.generated_code_size_in_bytes,
    }


def peak_bytes(devices: list[jax.Device]) -> int | None:  # pyright: ignore[reportInvalidTypeForm]  # a variable to pyright
    """Peak bytes of the fullest of this process's devices; None where the platform does not tell (CPUs)."""
    stats = [device.memory_stats() or {} for device in devices if device.process_index == jax.process_index()]
    return max((entry["peak_bytes_in_use"] for entry in stats if "peak_bytes_in_use" in entry), default=None)
