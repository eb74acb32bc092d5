"""The device mesh, and the rules that say over which mesh axes each array is split.

Axes: ``data`` (batch only), ``fsdp`` (batch, and one dimension of every big matrix), ``tensor`` (heads and MLP),
``sequence`` (tokens). The same rules serve teacher, student, LoRA and optimizer state, since optimizer states
carry the path of their parameter.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from lawcat_jax.config import Config, MeshConfig, ModelConfig
from lawcat_jax.errors import UserError
from lawcat_jax.projections import PROJECTIONS

AXES = ("data", "fsdp", "tensor", "sequence")
BATCH_AXES = ("data", "fsdp")

P = PartitionSpec
T = TypeVar("T")
Rule = tuple[str, PartitionSpec]
"""(pattern searched in the '/'-joined path of an array, mesh axes of its dimensions)."""

# Leading dimension L or M: stacked layers. Token mixers bring their own rules, see add_rules.
RULES: tuple[Rule, ...] = (
    (r"embed/embedding$", P("tensor", "fsdp")),
    (r"lm_head/kernel$", P("fsdp", "tensor")),
    (r"norm/scale$", P()),
    *((rf"{row.path}/kernel$", P(None, *row.mesh_axes)) for row in PROJECTIONS),
    *((rf"{row.path}/bias$", P(None, row.mesh_axes[1])) for row in PROJECTIONS),
    *((rf"lora/{row.name}/a$", P(None, row.mesh_axes[0])) for row in PROJECTIONS if row.lora),
    *((rf"lora/{row.name}/b$", P(None, None, row.mesh_axes[1])) for row in PROJECTIONS if row.lora),
    # Decoding caches: sequences over the batch's axes, heads over tensor.
    (r"(^|/)(position|tokens|lengths|logits)$", P(BATCH_AXES)),  # those of state passing as well
    (r"^softmax/[kv]$", P(None, BATCH_AXES, None, "tensor")),
)


_added: dict[str, PartitionSpec] = {}


def add_rules(rules: Iterable[Rule]) -> None:
    """Rules for arrays that are defined elsewhere, tried after :data:`RULES`; ``lawcat_jax.models`` adds those of its
    token mixers when it is imported.

    Raises:
      ValueError: a pattern that was added before with other axes.
    """
    for pattern, spec in rules:
        if _added.setdefault(pattern, spec) != spec:
            raise ValueError(f"sharding rule {pattern!r}: added as {_added[pattern]} before, and now as {spec}")


def common_rows(config: Config) -> int:
    """The largest number of ways in which the micro-batches of all stages can be split by sequences."""
    return math.gcd(*(stage.batch_size // stage.grad_accum for _, stage in config.stages()))


def axis_sizes(config: MeshConfig, devices: int, *, rows: int = 0) -> dict[str, int]:
    """Devices along each of :data:`AXES` on ``devices`` in all; -1 takes the rest.

    With ``rows`` (sequences of a micro-batch) a ``data`` or ``fsdp`` of -1 takes no more than the sequences can be
    split over; what is left multiplies ``tensor``.

    Raises:
      UserError: the axis sizes do not multiply to the number of devices.
    """
    sizes = {axis: getattr(config, axis) for axis in AXES}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if devices % fixed or (-1 not in sizes.values() and fixed != devices):
        described = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
        wanted = f"their product, {fixed}, must divide it" if -1 in sizes.values() else f"their product is {fixed}"
        raise UserError(
            f"config.mesh: {described} does not fit {devices} device(s): {wanted}; -1 in one axis takes the rest"
        )
    rest = devices // fixed
    free = next((axis for axis in BATCH_AXES if sizes[axis] == -1), None)
    if rows and free is not None:
        other = config.data if free == "fsdp" else config.fsdp
        taken = math.gcd(rest, rows // other) if rows % other == 0 else rest
        sizes["tensor"] *= rest // taken
        rest = taken
    return {axis: rest if size == -1 else size for axis, size in sizes.items()}


def make_mesh(
    config: MeshConfig,
    devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm]  # a variable to pyright
    *,
    rows: int = 0,
) -> Mesh:
    """Mesh over ``devices`` (default: all) with axes :data:`AXES` of Auto type, as large as :func:`axis_sizes` says.

    Raises:
      UserError: the axis sizes do not multiply to the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = tuple(axis_sizes(config, len(devices), rows=rows).values())
    # Auto, since the default (Explicit) asks for shardings in the types of every intermediate array.
    kinds = (AxisType.Auto,) * len(AXES)
    try:
        return jax.make_mesh(shape, AXES, axis_types=kinds, devices=devices)
    except NotImplementedError:  # a 4x4 torus as 8 x 2, say: some axis of the torus has to serve two of the mesh
        array = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        return Mesh(array, AXES, axis_types=kinds)


def check_mesh(
    config: Config, model: ModelConfig, mesh: Mesh | AbstractMesh, stages: Iterable[str] | None = None
) -> None:
    """Refuse a mesh over which ``config`` cannot be split, or whose axes would split nothing; compiles nothing.

    Args:
      config: of the run; a ``tensor`` axis that it leaves at 1 may have grown, and is not checked (see
        :func:`axis_sizes`).
      model: the teacher's shape.
      mesh: of :func:`make_mesh`, or its sizes alone.
      stages: those that will run; default: all enabled ones.

    Raises:
      UserError: a batch that ``data`` x ``fsdp`` does not divide, a length that ``sequence`` does not divide, or a
        ``tensor`` that does not divide the key-value heads.
    """
    heads, parts = mesh.shape["tensor"], mesh.shape["sequence"]
    if config.mesh.tensor != 1 and model.num_kv_heads % heads:
        fitting = ", ".join(str(size) for size in range(1, model.num_kv_heads + 1) if model.num_kv_heads % size == 0)
        raise UserError(
            f"config.mesh.tensor: {heads} does not divide the {model.num_kv_heads} key-value heads of the model; "
            f"choose one of {fitting}"
        )
    for name, stage in config.stages():
        if stages is not None and name not in stages:
            continue
        check_batch(stage.batch_size, stage.grad_accum, mesh, f"config.{name}")
        if stage.seq_length % parts:
            raise UserError(
                f"config.{name}.seq_length: config.mesh.sequence={parts} does not divide {stage.seq_length}"
            )


def spec_for(path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    """Axes of one array. A dimension that an axis does not divide stays whole.

    Raises:
      KeyError: no rule for ``path`` (a new parameter needs a line in :data:`RULES`, or in the table of its mixer).
    """
    if math.prod(shape) <= 1:  # scalars: counters, learning rate scales
        return P()
    for pattern, spec in (*RULES, *_added.items()):
        if re.search(pattern, path):
            axes = [*spec, *[None] * (len(shape) - len(spec))][: len(shape)]
            fits = [
                axis if axis and size % _axis_size(axis, mesh) == 0 else None
                for axis, size in zip(axes, shape, strict=True)
            ]
            while fits and fits[-1] is None:
                fits.pop()
            return P(*fits)
    raise KeyError(
        f"no sharding rule for parameter {path!r}: add one to lawcat_jax/runtime/sharding.py, or to parameter_rules or "
        "state_rules of its token mixer"
    )


def _axis_size(axis: str | tuple[str, ...], mesh: Mesh | AbstractMesh) -> int:
    return math.prod(mesh.shape[name] for name in ((axis,) if isinstance(axis, str) else axis))


def shardings(tree: Any, mesh: Mesh) -> Any:
    """NamedSharding of every leaf of a tree of arrays or ShapeDtypeStructs (parameters, optimizer state, cache)."""

    def one(path: tuple, leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, spec_for(path_name(path), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(one, tree)


def path_name(path: tuple) -> str:
    """'/'-joined key path."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def on_mesh(function: Callable[..., T], mesh: Mesh) -> Callable[..., T]:
    """``function`` traced with ``mesh`` in context: token mixers find there how to split their kernels
    (:mod:`lawcat_jax.models.parallel`), and kernels the platform that they are compiled for.
    """

    @functools.wraps(function)
    def traced(*args: Any, **kwargs: Any) -> T:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args, **kwargs)

    return traced


def mesh_of(params: Any) -> contextlib.AbstractContextManager:
    """Context with the mesh that parameters lie on, for functions jitted without one; nothing on a single device."""
    found = getattr(getattr(jax.tree.leaves(params)[0], "sharding", None), "mesh", None)
    if found is None or found.size == 1:
        return contextlib.nullcontext()
    return jax.sharding.use_abstract_mesh(getattr(found, "abstract_mesh", found))


def batch_shards(params: Any) -> int:
    """Over how many devices the mesh that parameters lie on splits the rows of a batch; 1 without a mesh."""
    found = getattr(getattr(jax.tree.leaves(params)[0], "sharding", None), "mesh", None)
    return 1 if found is None else math.prod(found.shape.get(axis, 1) for axis in BATCH_AXES)


def constrain(tree: T) -> T:
    """A tree of arrays, inside jit, split over the mesh in context as the rules say; the same tree without a mesh."""
    found = jax.sharding.get_abstract_mesh()
    if found.empty or found.size == 1:
        return tree

    def one(path: tuple, leaf: jax.Array) -> jax.Array:
        return jax.lax.with_sharding_constraint(leaf, spec_for(path_name(path), leaf.shape, found))

    return jax.tree_util.tree_map_with_path(one, tree)


def spread(params: T) -> T:
    """Parameters copied to every accelerator, so that batches are split over all of them. On a single one, and on CPU
    devices, which share their cores, the same parameters."""
    if jax.default_backend() == "cpu" or jax.device_count() == 1:
        return params
    return jax.device_put(params, replicated(make_mesh(MeshConfig(data=-1, fsdp=1))))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """How a batch lies on the mesh: its rows split over data x fsdp."""
    return NamedSharding(mesh, P(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, P())


def check_batch(batch_size: int, grad_accum: int, mesh: Mesh | AbstractMesh, where: str) -> None:
    """Refuse a batch that the devices cannot share evenly.

    Raises:
      UserError: with the sizes.
    """
    rows = math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    if (batch_size // grad_accum) % rows:
        raise UserError(
            f"{where}.batch_size: {batch_size} in {grad_accum} micro-batch(es) does not split over data x fsdp = {rows}"
        )


def data_shard(mesh: Mesh, process: int | None = None) -> tuple[int, int]:
    """(number, count): which part of every batch ``process`` (default: this one) loads, of how many.

    Processes that hold the same rows, because ``tensor`` or ``sequence`` reaches over hosts, load the same part.

    Raises:
      UserError: processes that share some of their rows, but not all.
    """
    process = jax.process_index() if process is None else process
    held: dict[int, set[int]] = {}
    for index, device in np.ndenumerate(mesh.devices):
        held.setdefault(device.process_index, set()).add(index[0] * mesh.devices.shape[1] + index[1])
    parts = sorted({tuple(sorted(rows)) for rows in held.values()})
    if sum(map(len, parts)) != len(set().union(*parts)) or len({len(rows) for rows in parts}) != 1:
        raise UserError(
            "config.mesh: data x fsdp splits the batch so that processes share some of their rows but not all; choose "
            "sizes whose product is a multiple or a divisor of the number of hosts"
        )
    return parts.index(tuple(sorted(held[process]))), len(parts)


def place_batch(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """This process's rows of a batch (see :func:`data_shard`), numpy arrays by name, as arrays over all processes."""
    sharding, (_, parts) = batch_sharding(mesh), data_shard(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, value, (value.shape[0] * parts, *value.shape[1:]))
        for name, value in batch.items()
    }
