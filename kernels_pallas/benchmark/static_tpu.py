"""Static analysis of the TPU kernels on a machine without a TPU: ``python -m kernels_pallas.benchmark --static``.

Each case is compiled ahead of time in a process of its own, with libtpu writing its final schedules. From them: VLIW
bundles a grid step and a chunk-head (128 tokens of one head; for decoding, one token of one head), how busy each unit
is, register spills, and VMEM. Bundles times steps over the clock is the time of the core when every transfer hides; next
to it stands the time that the kernel's HBM bytes take.

The count is of the whole program of a step, including code that runs once (state initialisation) or rarely (scores that
need their maximum subtracted), so it errs on the slow side.

"xla_front" and "xla_decode" are what prefill and decoding replace: convolution, features and gates as XLA compiles them
(gla_forward comes on top), and the whole decoding step without kernels. Their core time is the sum of the compiler's own
estimates for the operations, their bytes the compiler's count.
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
MODES = ("forward", "gradient", "prefill", "decode")
XLA_MODES = ("front", "xla_decode")
KERNELS = {
    "forward": ("gla_forward",),
    "gradient": ("gla_states", "gla_backward"),
    "prefill": ("lawcat_prefill",),
    "decode": ("lawcat_decode",),
}
TAPS = 4


def environment(dump: str | None = None) -> dict[str, str]:
    """Environment of a process that compiles with libtpu on a CPU host, beside other such processes."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    if dump is not None:
        env["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
    return env


def _one_device(chip: str) -> Any:
    """Sharding on one device of the chip's topology. Needs libtpu."""
    import jax
    import numpy as np
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chip].topology).devices
    return jax.sharding.NamedSharding(jax.sharding.Mesh(np.array(devices)[:1], ("x",)), jax.sharding.PartitionSpec())


def compile_case(
    chip: str,
    shape: Shape,
    mode: str,
    *,
    batch: int,
    length: int,
    bound: float | None,
    dtype: str,
    carried: bool = False,
    normalize: bool = True,
    padded: bool = False,
    packed: bool = False,
) -> Any:
    """An operation compiled for one device of ``chip``, as jax's ``Compiled``. Needs libtpu.

    ``mode``: "forward" and "gradient" of gated_linear_attention (``normalize`` as there), "prefill" of lawcat_attention
    (``carried``: from a state), "decode" (one token from a state, in place), or XLA's version of parts of the last two:
    "front", "xla_decode". ``padded``: the layer with lengths; ``packed``: gated_linear_attention with segment_ids.
    """
    import jax
    import jax.numpy as jnp

    import kernels_pallas as kp
    from kernels_pallas.lawcat_attention import xla

    place = _one_device(chip)
    length = 1 if mode in ("decode", "xla_decode") else length

    def array(dims: tuple[int, ...], kind: Any = "float32") -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(dims, kind, sharding=place)

    # The projections of a model produce [B, T, heads * size]: then the kernels' layout costs no copies.
    def struct(heads: int, kind: Any) -> jax.ShapeDtypeStruct:
        return array((batch, length, heads * shape.size), kind)

    def split(x):
        return x.reshape(*x.shape[:2], -1, shape.size)

    def attention(*arrays):
        ids = None
        if packed:
            *arrays, ids = arrays
        options = {
            "gate_lower_bound": bound,
            "normalize": normalize,
            "implementation": "pallas_tpu",
            "segment_ids": ids,
        }
        o, state = kp.gated_linear_attention(*(split(x) for x in arrays), **options)
        return o.reshape(batch, length, -1), state

    def gradient(do, *arrays):
        *arrays, ids = arrays if packed else (*arrays, None)
        last = () if ids is None else (ids,)
        return jax.vjp(lambda *x: attention(*x, *last)[0], *arrays)[1](do)

    def layer(state, arrays, parameters, lengths=None):
        state, tails = state or (None, None)
        o, *state = kp.lawcat_attention(
            *(split(x) for x in arrays),
            *parameters,
            initial_state=state,
            conv_state=tails,
            gate_lower_bound=bound,
            lengths=lengths,
            implementation="scan" if mode == "xla_decode" else "pallas_tpu",
        )
        return o.reshape(batch, length, -1), state

    def front(arrays, parameters):
        q, k, _, logits = (split(x) for x in arrays)
        q, k, log_g = xla.prepare(q, k, logits, *parameters, conv_state=None, valid=None, gate_normalizer=16.0)
        return [x.reshape(batch, length, -1) for x in (q, k, log_g)]

    heads, kv_heads, size = shape
    with kp.lowering_for("tpu"):
        if mode in ("forward", "gradient"):
            arrays = [struct(heads, dtype), struct(heads, dtype), struct(kv_heads, dtype), struct(kv_heads, "float32")]
            if packed:
                arrays.append(array((batch, length), "int32"))
            if mode == "gradient":
                return jax.jit(gradient).lower(struct(heads, dtype), *arrays).compile()
            return jax.jit(attention).lower(*arrays).compile()
        arrays = [struct(heads, dtype), struct(kv_heads, dtype), struct(kv_heads, dtype), struct(kv_heads, jnp.float32)]
        taps = array((heads, TAPS, size))
        parameters = [taps, taps, array((heads, size, size // 2))]
        if mode == "front":
            return jax.jit(front).lower(arrays, parameters).compile()
        state = None
        if carried or length == 1:
            tails = [array((batch, TAPS - 1, n, size), dtype) for n in (heads, kv_heads)]
            state = [array((batch, heads, size, size)), array((batch, heads, size))], tails
        lengths = (array((batch,), "int32"),) if padded else ()
        return jax.jit(layer, donate_argnums=0).lower(state, arrays, parameters, *lengths).compile()


def read_dump(folder: Path) -> list[dict[str, Any]]:
    """One record per Pallas kernel (name gla_* or lawcat_*) found in a dump of libtpu: bundles, busy share per unit, spills, VMEM
    bytes."""
    records = []
    for path in sorted(folder.glob("*-final_hlo-static-per-bundle-utilization.txt")):
        found = re.search(r"-([^-]*((?:gla|lawcat)_[a-z]+)[^-]*)-\d+-final_hlo", path.name)
        if found is None:
            continue
        lines = path.read_text().splitlines()
        units = [x.strip() for x in lines[1].split(",")]
        slots = [int(x) for x in lines[2].split()]
        rows = [[int(x) for x in line.split()] for line in lines[4:] if line.strip()]
        used = [sum(column) for column in zip(*rows, strict=True)]
        busy = {unit: total / (len(rows) * slot) for unit, total, slot in zip(units, used, slots, strict=True)}
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


def kernel_bytes(shape: Shape, mode: str, chunk: int, *, itemsize: int = 2, batch: int = 1) -> dict[str, float]:
    """HBM bytes per token and query head that each kernel moves (states at both ends of the sequence not counted, except
    in decoding)."""
    share = shape.kv_heads / shape.heads
    row, kv = shape.size * itemsize, shape.size * share * (itemsize + 4)
    if mode == "forward":
        return {"gla_forward": 3 * row + kv}
    if mode == "prefill":
        return {"lawcat_prefill": 2 * row + shape.size * share * (2 * itemsize + 4)}
    if mode == "decode":
        # Tiles in HBM are 128 lanes wide. The parameters are read once for all sequences.
        lanes = max(shape.size, 128)
        state = 2 * 4 * (shape.size * lanes + lanes)
        parameters = 4 * lanes * (shape.size // 2 + 2 * TAPS)
        rows = 2 * row + shape.size * share * (2 * itemsize + 4) + (TAPS - 1) * row * (1 + share)
        return {"lawcat_decode": state + rows + parameters / batch}
    state = shape.size * shape.size * itemsize / chunk
    # gla_backward reads q, k, do, v, log_g and the states, and writes dq, dk, dv, dlog_g.
    return {"gla_forward": 3 * row + kv, "gla_states": row + kv + state, "gla_backward": 5 * row + 2 * kv + state}


def _times(record: dict[str, Any], chip: str, traffic: float, cycles: float) -> None:
    spec = CHIPS[chip]
    record["hbm_bytes"] = int(traffic)
    record["core_ms"] = None if spec.clock is None else round(cycles / spec.clock / 1e6, 4)
    record["hbm_ms"] = None if spec.bandwidth is None else round(traffic / spec.bandwidth / 1e9, 4)


def xla_record(chip: str, name: str, mode: str, compiled: Any) -> dict[str, Any]:
    """Bytes and estimated cycles of the operations in XLA's entry computation."""
    cost = compiled.cost_analysis()
    entry = compiled.as_text()
    entry = entry[entry.index("\nENTRY ") :]
    cycles = sum(int(x) for x in re.findall(r'"estimated_cycles":"(\d+)"', entry))
    record = {"kernel": f"xla_{mode.removeprefix('xla_')}", "chip": chip, "shape": name, "mode": mode}
    _times(record, chip, cost["bytes accessed"], cycles)
    return record


def _grid(shape: Shape, mode: str, batch: int, length: int, bound: float | None) -> dict[str, int]:
    """Tokens of a chunk, heads of a grid step, and number of grid steps of a mode's kernels."""
    import jax

    from kernels_pallas.gated_linear_attention.tpu_decode import make_step
    from kernels_pallas.gated_linear_attention.tpu_plan import make_plan

    if mode == "decode":
        widths = (shape.size,)
        step = make_step(batch, shape.heads, shape.size, shape.size, (1, shape.heads // shape.kv_heads), widths)
        steps = -(-batch // step.batch_block) * (shape.heads // step.heads_block)
        return {"chunk": 1, "heads_a_step": step.heads_block * step.batch_block, "steps": steps}

    def like(heads, dtype="bfloat16"):
        return jax.ShapeDtypeStruct((batch, length, heads, shape.size), dtype)

    gates = like(shape.kv_heads, "float32")
    plan = make_plan(like(shape.heads), like(shape.kv_heads), gates, bound, forward=mode != "gradient")
    steps = plan.batch * plan.head_blocks * plan.chunks
    return {"chunk": plan.chunk, "heads_a_step": plan.heads_block, "steps": steps}


def run_case(chip: str, name: str, mode: str, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Compiles one case in a subprocess and returns a record per kernel. Raises RuntimeError with the compiler's last
    lines."""
    shape = SHAPES[name]
    batch = args.decode_batch if mode in ("decode", "xla_decode") else args.batch
    length = 1 if mode in ("decode", "xla_decode") else args.length
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", __spec__.name if __spec__ else __name__, "--worker", chip, name, mode]
        command += ["--batch", str(batch), "--length", str(length), "--bound", str(args.bound)]
        done = subprocess.run(command, env=environment(folder), capture_output=True, text=True, check=False)
        if done.returncode:
            tail = " | ".join(done.stderr.strip().splitlines()[-3:])
            raise RuntimeError(f"{chip} {name} {mode}: compilation failed: {tail}")
        if mode in XLA_MODES:
            return [json.loads(done.stdout.splitlines()[-1]) | {"batch": batch, "length": length}]
        records = read_dump(Path(folder))
    wanted = KERNELS[mode]
    if not set(wanted) <= {record["kernel"] for record in records}:
        raise RuntimeError(f"{chip} {name} {mode}: libtpu wrote no schedule of {', '.join(wanted)}")

    grid = _grid(shape, mode, batch, length, args.bound)
    moved = kernel_bytes(shape, mode, grid["chunk"], batch=batch)
    out = []
    for record in records:
        if record["kernel"] not in wanted:
            continue
        record |= {"chip": chip, "shape": name, "mode": mode, "batch": batch, "length": length} | grid
        a_head = 1 if mode == "decode" else grid["chunk"] / 128
        record["bundles_per_chunk_head"] = round(record["bundles"] / (grid["heads_a_step"] * a_head), 1)
        traffic = moved[record["kernel"]] * batch * length * shape.heads
        _times(record, chip, traffic, record["bundles"] * grid["steps"])
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
        cells = [r["chip"], r["shape"], r["kernel"]]
        if "bundles" in r:
            busy = " / ".join(f"{100 * r['busy'][unit]:.0f}" for unit in ("MXU", "VALU", "XLU"))
            cells += [r["chunk"], r["bundles"], round(r["bundles_per_chunk_head"]), busy, r["spill_stores"]]
            cells.append(f"{r['vmem_bytes'] / 2**20:.1f}")
        else:
            cells += ["–"] * 6
        digits = 4 if r["length"] == 1 else 2
        core, memory = ("–" if r[key] is None else f"{r[key]:.{digits}f}" for key in ("core_ms", "hbm_ms"))
        cells += [f"{r['hbm_bytes'] / 1e9:.{digits}f}", core, memory]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def _bound(text: str) -> float | None:
    return None if text.lower() == "none" else float(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m kernels_pallas.benchmark --static", description=__doc__)
    parser.add_argument("--chips", default="v5e,v5p,v6e,tpu7x", help=f"comma-separated, of {', '.join(CHIPS)}")
    parser.add_argument("--shapes", default="llama-3.2-1b,mistral-7b", help=f"comma-separated, of {', '.join(SHAPES)}")
    parser.add_argument("--modes", default=",".join(MODES), help=f"of {', '.join(MODES + XLA_MODES)}")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--decode_batch", type=int, default=64, help="sequences of a decoding step")
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
        sizes = {"batch": args.batch, "length": args.length, "bound": args.bound, "dtype": "bfloat16"}
        compiled = compile_case(chip, shape, mode, **sizes)
        if mode in XLA_MODES:
            print(json.dumps(xla_record(chip, name, mode, compiled)))
        return 0
    lists = {
        "--chips": (args.chips, CHIPS),
        "--shapes": (args.shapes, SHAPES),
        "--modes": (args.modes, MODES + XLA_MODES),
    }
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
        report |= {"decode_batch": args.decode_batch}
        report |= {"length": args.length, "bound": args.bound, "records": records, "failures": failures}
        partial = args.json.with_name(args.json.name + ".tmp")
        partial.write_text(json.dumps(report, indent=1))
        partial.rename(args.json)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
