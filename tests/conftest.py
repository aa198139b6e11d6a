"""Settings for the whole suite, made before jax or torch is imported."""

import gc
import os
from importlib.metadata import version

# The programs of the tests run for milliseconds and compile for seconds: LLVM is told to hurry, and where this XLA has
# them, the older emitters of fused loops give it a third of the work, which it does in one piece (the other worker has
# the other core). What the compiled code computes stays within every tolerance.
# REFINE_JAX_TESTS_COMPILE=default (.ci/run, for comparisons with the references) leaves the compiler as users have it.
FLAGS = ["--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"]
if tuple(map(int, version("jaxlib").split(".")[:2])) <= (0, 10):  # a flag that XLA does not know ends the process
    FLAGS += ["--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]
if os.environ.get("REFINE_JAX_TESTS_COMPILE") == "default":
    FLAGS = []
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS]).strip()
# One thread each: workers of pytest-xdist share the machine, and torch and XLA would fight over its cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tracing makes many objects that live on: looking through them all again and again takes a tenth of its time.
gc.set_threshold(200_000, 20, 50)

# Tests of whole processes and devices, a minute each: they come first, so that no worker ends with one while the other
# has nothing left to do.
_LONG = ("test_parallel", "test_processes", "test_aot", "test_batch")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.module.__name__.rpartition(".")[2] not in _LONG)
