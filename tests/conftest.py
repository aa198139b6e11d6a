"""Settings for the whole suite, made before jax or torch is imported."""

import os
import shutil
import tempfile
from importlib.metadata import version

# The programs of the tests run for milliseconds and compile for seconds: LLVM is told to hurry, and the older emitters
# of fused loops, where this XLA still has them, give it a third of the work. What the compiled code computes stays
# within every tolerance.
# REFINE_JAX_TESTS_COMPILE=default (.ci/run, for comparisons with the references) leaves the compiler as users have it.
FLAGS = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
if tuple(map(int, version("jaxlib").split(".")[:2])) <= (0, 10):  # a flag that XLA does not know ends the process
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
if os.environ.get("REFINE_JAX_TESTS_COMPILE") == "default":
    FLAGS = []
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS]).strip()
# One thread each: workers of pytest-xdist share the machine, and torch and XLA would fight over its cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# What one test, worker or process that a test starts has compiled, the others load.
_CACHE = "JAX_COMPILATION_CACHE_DIR"
_made = None if _CACHE in os.environ else tempfile.mkdtemp(prefix="refine_jax_tests_")  # by the first process alone
if _made is not None:
    os.environ[_CACHE] = _made
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"


def pytest_unconfigure():
    if _made is not None:
        shutil.rmtree(_made, ignore_errors=True)
