"""Image refinement in JAX: RefineAnything's focus-and-refine on the Qwen-Image MMDiT, and refinement via
regeneration."""

__version__ = "0.1.0"
__all__ = ["RefineError", "Refiner", "Regenerator", "__version__"]


def __getattr__(name: str):
    # JAX takes a second to import; `refine-jax --help` and bad arguments need none of it.
    if name == "Refiner":
        from refine_jax.refine import Refiner

        return Refiner
    if name == "Regenerator":
        from refine_jax.regenerate import Regenerator

        return Regenerator
    if name == "RefineError":
        from refine_jax.errors import RefineError

        return RefineError
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
