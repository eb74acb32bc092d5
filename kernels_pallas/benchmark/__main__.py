"""``python -m kernels_pallas.benchmark --check --out DIR``; see the package for what is measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
from absl import app, flags

_CHECK = flags.DEFINE_bool("check", False, "Compare with the float64 recurrence instead of measuring time.")
_OUT = flags.DEFINE_string("out", "benchmark_results", "Folder for the results.")
_IMPLEMENTATION = flags.DEFINE_string("implementation", None, "Implementation to check; None: the one for this device.")
_MAX_LENGTH = flags.DEFINE_integer("max_length", 65536, "Longest sequence to check.")


def check(out: Path) -> int:
    from kernels_pallas.benchmark import checks
    from kernels_pallas.benchmark.timing import write_json

    implementation = _IMPLEMENTATION.value or {"gpu": "pallas_triton", "tpu": "pallas_tpu"}.get(
        jax.default_backend(), "scan"
    )
    results: list[dict[str, Any]] = []

    def report(result: dict[str, Any]) -> None:
        results.append(result)
        write_json(out / "checks.json", results)
        c = result["case"]
        what = (
            f"T={c['length']} H={c['heads']}/{c['value_heads']} {c['features']}x{c['values']} {c['dtype']} {c['gates']}"
        )
        if "error" in result:
            print("ERROR", what, result["error"].strip().splitlines()[-1][:300], flush=True)
        else:
            errors = " ".join(f"{n}={e:.1e}" for n, e in result["errors"].items())
            print("FAIL " + ",".join(result["failed"]) if result["failed"] else "ok", what, errors, flush=True)

    chosen = [case for case in checks.cases() if case.length <= _MAX_LENGTH.value]
    failures = checks.run(implementation, report, chosen=chosen)
    print(json.dumps({"implementation": implementation, "cases": len(results), "failures": failures}))
    return 1 if failures else 0


def main(argv: list[str]) -> int:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}")
    if _CHECK.value:
        return check(Path(_OUT.value))
    raise app.UsageError("nothing to do: pass --check")


if __name__ == "__main__":
    app.run(main)
