"""What is measured: operations, shapes, and the bytes each operation has to move."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import kernels_pallas as kp
from kernels_pallas.benchmark import jax_peers
from kernels_pallas.gated_linear_attention import block_sizes
from kernels_pallas.gated_linear_attention.block_sizes import BlockSizes
from kernels_pallas.lawcat_attention.api import kernel_for

BOUND = -1.25


class Model(NamedTuple):
    name: str
    heads: int
    kv_heads: int
    d: int


MODELS = {
    model.name: model
    for model in (
        Model("llama-3.2-1b", 32, 8, 64),
        Model("mistral-7b", 32, 8, 128),
        Model("smollm2", 9, 3, 64),  # SmolLM2-135M
        Model("d256", 8, 1, 256),  # as in Gemma
    )
}
SHAPES = ((32, 1024), (16, 2048), (8, 4096), (1, 32768), (1, 1024), (4, 8192), (2, 16384), (1, 65536))
"""Batch x tokens, in the order in which a time budget is spent."""

DECODE_BATCHES = (64, 1, 16)

DOCUMENT = 487
"""Tokens of a document in the operations of packed rows."""

ROWS_OPERATIONS = (
    "forward packed",
    "forward+backward packed",
    "prefill padded",
    "prefill packed",
    "layer gradient",
    "layer gradient padded",
    "layer gradient packed",
)
"""Measured when asked for. "padded": the layer with ``lengths``, from T down to T / 2; "packed": ``segment_ids`` that change every
``DOCUMENT`` tokens. "layer gradient": outputs and all gradients of the layer."""


@dataclasses.dataclass(frozen=True)
class Job:
    """One measurement of this project's kernels."""

    model: Model
    operation: str
    batch: int
    length: int
    label: str = "pallas"
    sizes: tuple[tuple[str, BlockSizes], ...] = ()

    @property
    def row(self) -> tuple[str, str, int, int]:
        return self.model.name, self.operation, self.batch, self.length

    @property
    def base(self) -> str:
        """The operation, whatever its rows hold."""
        return self.operation.removesuffix(" padded").removesuffix(" packed")

    @property
    def is_peer(self) -> bool:
        """Whether the attention is another library's."""
        return self.label in jax_peers.PEERS

    @property
    def implementation(self) -> str | None:
        """What ``implementation=None`` takes on this GPU, unless the label names another."""
        return {"pallas": None, "xla scan": "scan"}.get(self.label, "pallas_triton")

    def served(self) -> str:
        """The implementation that serves the call on the platform at hand: "pallas_mosaic_gpu", "scan" ...; of a layer that no
        kernel takes whole, that of its attention, after "parts, ". What it names for a gradient is what the forward pass takes.
        """
        if self.is_peer:
            return "jla"
        rows = row_inputs(self)
        options = {"gate_lower_bound": BOUND, "segments": "segment_ids" in rows, "implementation": self.implementation}
        if self.base in ("forward", "forward+backward"):
            return kp.implementation_for(*attention_inputs(self.model, self.batch, self.length), **options)
        arrays = layer_inputs(self.model, self.batch, self.length, False)
        name = kernel_for(**arrays, **options, lengths="lengths" in rows)
        if name is not None:
            return name
        q = arrays["q"]  # features have the shape of q: two halves of d / 2
        return f"parts, {kp.implementation_for(q, q, arrays['v'], arrays['gate_logits'], **options)}"


def struct(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def attention_inputs(model: Model, batch: int, length: int) -> tuple[Any, ...]:
    """q, k, v, log_g of all heads, each its own (as fla's chunk_gla takes them), bfloat16."""
    return tuple(struct(batch, length, model.heads, model.d) for _ in range(4))


def layer_inputs(model: Model, batch: int, length: int, state: bool) -> dict[str, Any]:
    """Raw projections and parameters of lawcat_attention; gate logits in float32 as the model makes them."""
    H, Hkv, d = model.heads, model.kv_heads, model.d
    arrays: dict[str, Any] = {
        "q": struct(batch, length, H, d),
        "k": struct(batch, length, Hkv, d),
        "v": struct(batch, length, Hkv, d),
        "gate_logits": struct(batch, length, Hkv, d, dtype=jnp.float32),
        "conv_q": struct(H, 4, d, dtype=jnp.float32),
        "conv_k": struct(H, 4, d, dtype=jnp.float32),
        "phi": struct(H, d, d // 2, dtype=jnp.float32),
    }
    if state:
        f32 = jnp.float32
        arrays["initial_state"] = (struct(batch, H, d, d, dtype=f32), struct(batch, H, d, dtype=f32))
        arrays["conv_state"] = (struct(batch, 3, H, d), struct(batch, 3, Hkv, d))
    return arrays


def forward(implementation: str | None, rows, q, k, v, log_g):
    return kp.gated_linear_attention(q, k, v, log_g, **rows, gate_lower_bound=BOUND, implementation=implementation)[0]


def peer_forward(label: str, rows, q, k, v, log_g):
    del rows  # no peer is compared where rows are padded or packed
    return jax_peers.PEERS[label](q, k, v, log_g)


def gradient(attention: Callable[..., jax.Array], rows, q, k, v, log_g, do):
    _, pullback = jax.vjp(functools.partial(attention, rows), q, k, v, log_g)
    return pullback(do)


def layer(implementation: str | None, rows, arrays):
    return kp.lawcat_attention(**arrays, **rows, gate_lower_bound=BOUND, implementation=implementation)


def layer_gradient(implementation: str | None, rows, arrays, do):
    o, pullback = jax.vjp(lambda x: layer(implementation, rows, x)[0], arrays)
    return o, pullback(do)


def row_inputs(job: Job) -> dict[str, Any]:
    """What an operation of padded or packed rows has beside its arrays."""
    if job.operation.endswith(" padded"):
        return {"lengths": struct(job.batch, dtype=jnp.int32)}
    if job.operation.endswith(" packed"):
        return {"segment_ids": struct(job.batch, job.length, dtype=jnp.int32)}
    return {}


DECODE_STEPS = 64
"""Decoding is measured as a loop of this many steps in one program: one step is shorter than its dispatch."""


def decode(implementation: str | None, arrays, state):
    """Steps that depend on each other through the state and the convolution rows, as in generation."""

    def step(_, carry):
        state, tails, _ = carry
        inputs = arrays | {"conv_state": tails}
        o, state, tails = kp.lawcat_attention(
            **inputs, initial_state=state, gate_lower_bound=BOUND, implementation=implementation
        )
        return state, tails, o

    o = jnp.zeros((*arrays["q"].shape[:3], arrays["v"].shape[3]), arrays["v"].dtype)
    return jax.lax.fori_loop(0, DECODE_STEPS, step, (state, arrays["conv_state"], o))


def compile_job(job: Job) -> tuple[Any, tuple[Any, ...], dict[str, float]]:
    """(compiled function, argument shapes, memory in bytes); thread-safe, touches no device memory."""
    function, shapes = program(job)
    with block_sizes.override(**dict(job.sizes)):
        compiled = jax.jit(function).lower(*shapes).compile()
    try:
        stats = compiled.memory_analysis()
        memory = {name: getattr(stats, f"{name}_size_in_bytes") for name in ("argument", "output", "temp")}
    except Exception:
        memory = {}
    return compiled, shapes, memory


def program(job: Job) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """(function, shapes of its arguments)."""
    shapes: tuple[Any, ...]
    rows = row_inputs(job)
    if job.base in ("forward", "forward+backward"):
        attention = (
            functools.partial(peer_forward, job.label)
            if job.is_peer
            else functools.partial(forward, job.implementation)
        )
        shapes = attention_inputs(job.model, job.batch, job.length)
        if job.base == "forward":
            return attention, (rows, *shapes)
        return functools.partial(gradient, attention), (rows, *shapes, shapes[0])
    if job.base in ("prefill", "layer gradient"):
        arrays = layer_inputs(job.model, job.batch, job.length, False)
        function, shapes = layer, (rows, arrays)
        if job.base == "layer gradient":
            function, shapes = layer_gradient, (*shapes, arrays["q"])
    else:
        arrays = layer_inputs(job.model, job.batch, 1, True)
        state = arrays.pop("initial_state")
        function, shapes = decode, (arrays, state)
    return functools.partial(function, job.implementation), shapes


@functools.lru_cache(maxsize=64)
def _pool(kind: str, size: int, width: int, dtype: Any, slot: int) -> jax.Array:
    """Random [size / width, width], drawn once and reshaped for every batch x length."""

    @jax.jit
    def draw():
        x = jax.random.normal(jax.random.key(slot), (size // width, width))
        if kind == "features":
            x = jax.nn.softmax(x, axis=-1)
        elif kind == "gates":
            x = jax.nn.log_sigmoid(x) / 16
        return x.astype(dtype)

    return draw()


def arguments(job: Job, shapes: tuple[Any, ...]) -> tuple[Any, ...]:
    """Random arguments on the device; no two share memory. q, k of the plain operation are features, log_g gates."""
    rows, rest = (shapes[0], shapes[1:]) if job.base != "decode" else (None, shapes)
    leaves, tree = jax.tree.flatten(rest)
    kinds = ["normal"] * len(leaves)
    if job.base in ("forward", "forward+backward"):
        kinds[:4] = ["features", "features", "normal", "gates"]
    arrays = [
        _pool(kind, x.size, x.shape[-1], x.dtype, slot).reshape(x.shape)
        for slot, (kind, x) in enumerate(zip(kinds, leaves, strict=True))
    ]
    rest = jax.tree.unflatten(tree, arrays)
    if rows is None:
        return rest
    values = {
        "lengths": jnp.linspace(job.length, job.length // 2, job.batch).astype(jnp.int32),
        "segment_ids": jnp.broadcast_to(jnp.arange(job.length, dtype=jnp.int32) // DOCUMENT, (job.batch, job.length)),
    }
    return ({name: values[name] for name in rows}, *rest)


def floor_bytes(job: Job) -> float:
    """Bytes that any implementation moves: every input read once, every output written once."""
    H, Hkv, d, tokens = job.model.heads, job.model.kv_heads, job.model.d, job.batch * job.length
    tile = tokens * d * 2
    if job.base == "forward":
        return 5.0 * H * tile
    if job.base == "forward+backward":
        return (5 + 9) * H * tile
    state = job.batch * H * (d * d + d) * 4
    layer_bytes = 2 * H * tile + 2 * Hkv * tile + 2 * Hkv * tile
    if job.base == "layer gradient":  # q, k, v, gate logits twice, o, its cotangent, and the gradients of the four
        return float(2 * layer_bytes + H * tile + 4 * Hkv * tile)
    return float(layer_bytes + (2 * state if job.operation == "decode" else state))


def jobs(
    models: list[str], operations: list[str], quick: bool, shapes: Sequence[tuple[int, int]] | None = None
) -> Iterator[Job]:
    """The kernels' jobs, the most telling first. ``shapes``: batch x tokens, instead of the usual ones."""
    chosen = shapes
    shapes = chosen or (SHAPES[:4] if quick else SHAPES)
    for batch, length in shapes:
        for name in models:
            for operation in operations:
                if operation == "decode" or ("backward" in operation and length > 32768):
                    continue
                yield Job(MODELS[name], operation, batch, length)
    if "decode" in operations:
        for name in models:
            for batch in DECODE_BATCHES[: 2 if quick else None]:
                yield Job(MODELS[name], "decode", batch, 1)
    if not quick and chosen is None and "forward" in operations:
        for label in ("pallas_triton", "xla scan"):
            for name in models:
                for batch, length in SHAPES[:4]:
                    yield Job(MODELS[name], "forward", batch, length, label)


def variants(models: list[str]) -> Iterator[Job]:
    """Block sizes worth trying, on the first shape."""
    batch, length = SHAPES[0]
    for name in models:
        model = MODELS[name]
        options = [("forward", BlockSizes(64, 64, 4, stages)) for stages in ((1, 2) if model.d <= 64 else (1, 3))]
        options += [("forward", BlockSizes(32, 64, 4, 2))]
        if model.d > 64:
            options += [("forward", BlockSizes(64, 128, 4, 2))]
        for operation, s in options:
            label = f"C{s.chunk} BV{s.block_v} w{s.num_warps} s{s.num_stages}"
            yield Job(model, operation, batch, length, label, ((operation, s),))
