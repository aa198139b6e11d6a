"""Image refinement in JAX: RefineAnything's focus-and-refine on the Qwen-Image MMDiT, and refinement via regeneration."""

__version__ = "0.1.0"
