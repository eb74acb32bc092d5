"""Tests run on the CPU, with eight simulated devices, unless the environment says otherwise."""

import gc
import os

# Thousands of traced programs live as long as the process: looking for garbage among them took a sixth of the time.
gc.set_threshold(100_000, 50, 100)

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["LAWCAT_JAX_COMPILATION_CACHE"] = "off"  # tests write nothing into the user's cache
# Threads of XLA's CPU client. An interpreted GPU kernel blocks one a warpgroup: with as many as cores it would wait for ever.
os.environ.setdefault("NPROC", "16")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = (os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8").strip()

_TESTS_BETWEEN_CLEARS = 300
_finished = 0


def pytest_runtest_teardown():
    """Compiled programs are kept for as long as the process lives; thousands of them exhaust its memory mappings."""
    global _finished
    _finished += 1
    if _finished % _TESTS_BETWEEN_CLEARS == 0:
        import jax

        jax.clear_caches()
