"""The generator's two jitted functions with the shapes of their arguments, to be compiled without weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from lawcat_jax import models
from lawcat_jax.config import AttentionConfig, Config, LoraConfig, ModelConfig
from lawcat_jax.inference import generation
from lawcat_jax.runtime import sharding


@dataclasses.dataclass
class Options:
    """Sizes of the generator's programs; 0 takes the default: the last stage's length, and one sequence for each
    ``data`` x ``fsdp`` shard. ``padded``: a prompt may end within the prefill, which rules out the kernels for whole rows.
    """

    prefill_length: int = 0
    prefill_batch: int = 0
    decode_batch: int = 0
    padded: bool = True


@dataclasses.dataclass
class Program:
    """A jitted function of :mod:`lawcat_jax.inference.generation` and its ``arguments``: ShapeDtypeStructs with
    shardings, first those of the parameters. ``batch`` sequences of ``length`` tokens.
    """

    function: Any
    arguments: tuple[Any, ...]
    static: dict[str, Any]
    batch: int
    length: int
    mesh: Mesh

    def trace(self) -> Any:
        """The function traced for the mesh."""
        with jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            return self.function.trace(*self.arguments, **self.static)


def architecture(config: Config) -> tuple[AttentionConfig, LoraConfig | None]:
    """What the student that ``config`` makes has beyond its teacher."""
    return config.attention, config.lora if config.stage2.enabled else None


def program(name: str, config: Config, model: ModelConfig, mesh: Mesh, options: Options, dtype: Any) -> Program:
    """The program ``name``, "prefill" (of whole prompts at once) or "decode", of the student on ``mesh``; ``dtype`` is
    that of the pretrained weights.
    """
    _, stage = config.last_stage()
    graphdef, shapes = models.abstract(model, *architecture(config), dtype=dtype)
    length = (options.prefill_length or stage.seq_length) if name == "prefill" else 1
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    batch = (options.prefill_batch if name == "prefill" else options.decode_batch) or rows
    room = options.prefill_length or stage.seq_length  # of the key-value buffer, where softmax layers are left
    cache, logits = jax.eval_shape(
        lambda params: generation.empty_cache(params, graphdef=graphdef, batch=batch, length=room), shapes
    )

    def placed(tree: Any) -> Any:
        shardings = sharding.shardings(tree, mesh)
        return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings)

    def whole(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.replicated(mesh))

    static = {"graphdef": graphdef, "as_teacher": False}
    params, cache, logits = placed(shapes), placed(cache), placed({"logits": logits})["logits"]
    if name == "prefill":
        lengths = whole(batch) if options.padded else None
        arguments = (params, cache, logits, whole(batch, length), lengths, whole(batch))
        return Program(generation.prefill_chunk, arguments, static, batch, length, mesh)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
    arguments = (params, cache, whole(batch), whole(), keys, {"temperature": whole(dtype=jnp.float32)}, None)
    return Program(generation.decode_step, arguments, static, batch, length, mesh)
