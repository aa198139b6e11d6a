"""Settings for the whole suite, made before jax or torch is imported."""

import os

# The programs of the tests run for milliseconds and compile for seconds: LLVM is told to hurry, and the older emitters
# of fused loops give it a third of the work. What the compiled code computes stays within every tolerance.
os.environ["XLA_FLAGS"] = " ".join(
    [
        os.environ.get("XLA_FLAGS", ""),
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_use_fusion_emitters=false",
    ]
).strip()
# One thread each: workers of pytest-xdist share the machine, and torch and XLA would fight over its cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
