"""Static analysis of the TPU kernels on a machine without a TPU: ``python -m kernels_pallas.benchmark --static``.

Each case is compiled ahead of time in a process of its own, with libtpu writing its final schedules. From them: VLIW
bundles a grid step and a chunk-head (128 tokens of one head), how busy each unit is, register spills, and VMEM.
Bundles times steps over the clock is the time of the core when every transfer hides; next to it stands the time that
the kernel's HBM bytes take.

The count is of the whole program of a step, including code that runs once (state initialisation), so it errs on the
slow side.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Chip(NamedTuple):
    """Topology to compile for, clock in GHz, HBM bandwidth in TB/s and tensor cores a device (None: no public
    figure)."""

    topology: str
    clock: float | None
    bandwidth: float | None
    cores: int


CHIPS = {
    "v5e": Chip("v5e:2x2", 1.5, 0.819, 1),
    "v5p": Chip("v5p:2x2x1", 1.75, 2.765, 2),
    "v6e": Chip("v6e:2x2", 1.75, 1.64, 1),
    "tpu7x": Chip("tpu7x:2x2x1", None, None, 1),
}


class Shape(NamedTuple):
    """Heads and sizes of one model layer."""

    heads: int
    kv_heads: int
    size: int


SHAPES = {"llama-3.2-1b": Shape(32, 8, 64), "mistral-7b": Shape(32, 8, 128), "ungrouped-128": Shape(32, 32, 128)}
MODES = ("forward", "gradient")


def environment(dump: str | None = None) -> dict[str, str]:
    """Environment of a process that compiles with libtpu on a CPU host, beside other such processes."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    if dump is not None:
        env["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
    return env


def compile_case(
    chip: str, shape: Shape, mode: str, *, batch: int, length: int, bound: float | None, dtype: str
) -> Any:
    """Compiles the op (or its gradient) for one device of ``chip``; returns the jax ``Compiled``. Needs libtpu."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies

    import kernels_pallas as kp

    devices = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip].topology).devices
    mesh = jax.sharding.Mesh(np.array(devices)[:1], ("x",))
    place = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    # The projections of a model produce [B, T, heads * size]: then the kernels' layout costs no copies.
    def struct(heads: int, kind: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((batch, length, heads * shape.size), kind, sharding=place)

    def attention(*arrays):
        arrays = [x.reshape(batch, length, -1, shape.size) for x in arrays]
        o, state = kp.gated_linear_attention(*arrays, gate_lower_bound=bound, implementation="pallas_tpu")
        return o.reshape(batch, length, -1), state

    def gradient(*arrays):
        *arrays, do = arrays
        return jax.vjp(lambda *x: attention(*x)[0], *arrays)[1](do)

    arrays = [struct(heads, dtype) for heads in (shape.heads, shape.heads, shape.kv_heads)]
    arrays.append(struct(shape.kv_heads, jnp.float32))
    if mode == "gradient":
        arrays.append(struct(shape.heads, dtype))
    with kp.lowering_for("tpu"):
        return jax.jit(gradient if mode == "gradient" else attention).lower(*arrays).compile()


def read_dump(folder: Path) -> list[dict[str, Any]]:
    """One record per Pallas kernel (name gla_*) found in a dump of libtpu: bundles, busy share per unit, spills, VMEM
    bytes."""
    records = []
    for path in sorted(folder.glob("*gla_*-final_hlo-static-per-bundle-utilization.txt")):
        lines = path.read_text().splitlines()
        units = [x.strip() for x in lines[1].split(",")]
        slots = [int(x) for x in lines[2].split()]
        rows = [[int(x) for x in line.split()] for line in lines[4:] if line.strip()]
        used = [sum(column) for column in zip(*rows, strict=True)]
        busy = {unit: total / (len(rows) * slot) for unit, total, slot in zip(units, used, slots, strict=True)}
        found = re.search(r"-([^-]*(gla_[a-z]+)[^-]*)-\d+-final_hlo", path.name)
        windows = {}
        for dump in folder.glob(f"*-{found[1]}-*-original.txt"):
            for name, size in re.findall(r"(#allocation\d+) \[.*?space=vmem, size = (0x[0-9a-f]+)", dump.read_text()):
                windows[name] = int(size, 16)
        records.append(
            {
                "kernel": found[2],
                "bundles": len(rows),
                "busy": {unit: round(share, 3) for unit, share in busy.items()},
                "spill_stores": used[units.index("VSTORE:SPILL")],
                "vmem_bytes": sum(windows.values()),
            }
        )
    return records


def kernel_bytes(shape: Shape, mode: str, chunk: int, *, itemsize: int = 2) -> dict[str, float]:
    """HBM bytes per token and query head that each kernel moves (states at both ends of the sequence not counted)."""
    share = shape.kv_heads / shape.heads
    row, kv = shape.size * itemsize, shape.size * share * (itemsize + 4)
    if mode == "forward":
        return {"gla_forward": 3 * row + kv}
    state = shape.size * shape.size * itemsize / chunk
    # gla_backward reads q, k, do, v, log_g and the states, and writes dq, dk, dv, dlog_g.
    return {"gla_forward": 3 * row + kv, "gla_states": row + kv + state, "gla_backward": 5 * row + 2 * kv + state}


def run_case(chip: str, name: str, mode: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Compiles one case in a subprocess and returns a record per kernel. Raises RuntimeError with the compiler's last
    lines."""
    from kernels_pallas.gla.tpu_plan import make_plan

    shape = SHAPES[name]
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", __spec__.name if __spec__ else __name__, "--worker", chip, name, mode]
        command += ["--batch", str(args.batch), "--length", str(args.length), "--bound", str(args.bound)]
        done = subprocess.run(command, env=environment(folder), capture_output=True, text=True, check=False)
        if done.returncode:
            tail = " | ".join(done.stderr.strip().splitlines()[-3:])
            raise RuntimeError(f"{chip} {name} {mode}: compilation failed: {tail}")
        records = read_dump(Path(folder))
    wanted = ("gla_forward",) if mode == "forward" else ("gla_states", "gla_backward")
    if not set(wanted) <= {record["kernel"] for record in records}:
        raise RuntimeError(f"{chip} {name} {mode}: libtpu wrote no schedule of {', '.join(wanted)}")

    import jax

    def like(heads, dtype="bfloat16"):
        return jax.ShapeDtypeStruct((args.batch, args.length, heads, shape.size), dtype)

    plan = make_plan(
        like(shape.heads), like(shape.kv_heads), like(shape.kv_heads, "float32"), args.bound, forward=mode == "forward"
    )
    moved = kernel_bytes(shape, mode, plan.chunk)
    token_heads = args.batch * args.length * shape.heads
    steps = plan.batch * plan.head_blocks * plan.chunks
    out = []
    for record in records:
        if record["kernel"] not in wanted:
            continue
        spec, traffic = CHIPS[chip], moved[record["kernel"]] * token_heads
        record |= {"chip": chip, "shape": name, "mode": mode, "chunk": plan.chunk, "heads_a_step": plan.heads_block}
        record["bundles_per_chunk_head"] = round(record["bundles"] * 128 / (plan.heads_block * plan.chunk), 1)
        record["hbm_bytes"] = int(traffic)
        record["core_ms"] = None if spec.clock is None else round(record["bundles"] * steps / spec.clock / 1e6, 3)
        record["hbm_ms"] = None if spec.bandwidth is None else round(traffic / spec.bandwidth / 1e9, 3)
        out.append(record)
    return out


def table(records: Sequence[dict[str, Any]]) -> str:
    """The records as a Markdown table."""
    columns = (
        "chip, shape, kernel, chunk, bundles a step, a chunk-head, MXU / VALU / XLU busy %, spills, VMEM MiB, HBM GB"
    )
    columns = [*columns.split(", "), "core ms", "HBM ms"]
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for r in records:
        busy = " / ".join(f"{100 * r['busy'][unit]:.0f}" for unit in ("MXU", "VALU", "XLU"))
        core, memory = ("–" if r[key] is None else f"{r[key]:.2f}" for key in ("core_ms", "hbm_ms"))
        cells = [r["chip"], r["shape"], r["kernel"], r["chunk"], r["bundles"], round(r["bundles_per_chunk_head"]), busy]
        cells += [r["spill_stores"], f"{r['vmem_bytes'] / 2**20:.1f}", f"{r['hbm_bytes'] / 1e9:.2f}", core, memory]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def _bound(text: str) -> float | None:
    return None if text.lower() == "none" else float(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m kernels_pallas.benchmark --static", description=__doc__)
    parser.add_argument("--chips", default="v5e,v5p,v6e,tpu7x", help=f"comma-separated, of {', '.join(CHIPS)}")
    parser.add_argument("--shapes", default="llama-3.2-1b,mistral-7b", help=f"comma-separated, of {', '.join(SHAPES)}")
    parser.add_argument("--modes", default=",".join(MODES), help="forward, gradient")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--length", type=int, default=32768, help="tokens of a sequence")
    parser.add_argument("--bound", type=_bound, default=-1.25, help="gate lower bound, or None")
    parser.add_argument("--json", type=Path, help="where to write the records")
    parser.add_argument("--worker", nargs=3, help=argparse.SUPPRESS)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Prints a Markdown table of all cases and writes JSON; 1 when a case does not compile. ``argv`` without
    ``--static``."""
    args = _parser().parse_args(argv)
    if args.worker:
        chip, name, mode = args.worker
        shape = SHAPES[name]
        compile_case(chip, shape, mode, batch=args.batch, length=args.length, bound=args.bound, dtype="bfloat16")
        return 0
    lists = {"--chips": (args.chips, CHIPS), "--shapes": (args.shapes, SHAPES), "--modes": (args.modes, MODES)}
    for option, (given, known) in lists.items():
        unknown = [x for x in given.split(",") if x not in known]
        if unknown:
            _parser().error(f"{option}: unknown {', '.join(unknown)}, choose from {', '.join(known)}")
    records, failures = [], []
    for chip in args.chips.split(","):
        for name in args.shapes.split(","):
            for mode in args.modes.split(","):
                try:
                    records += run_case(chip, name, mode, args)
                except RuntimeError as problem:
                    failures.append(str(problem))
    print(table(records))
    for problem in failures:
        print(f"error: {problem}", file=sys.stderr)
    if args.json:
        versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")}
        report = {"date": datetime.date.today().isoformat(), "versions": versions, "batch": args.batch}
        report |= {"length": args.length, "bound": args.bound, "records": records, "failures": failures}
        partial = args.json.with_name(args.json.name + ".tmp")
        partial.write_text(json.dumps(report, indent=1))
        partial.rename(args.json)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
