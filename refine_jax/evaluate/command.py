"""`refine-jax evaluate`: which evaluation, and whose option is whose."""

import argparse

from refine_jax.errors import RefineError
from refine_jax.evaluate import heldout, pairs, small_world

_SETS = {"heldout": heldout, "world": small_world, "pairs": pairs}
# Their options, besides --set, --output and --quiet.
_MODEL = ("model", "lora", "dtype", "quantize", "batch", "count")
_OPTIONS = {
    "heldout": (*_MODEL, "judges", "seeds", "margin", "quick", "vae_only", "write_recipe"),
    "world": (*_MODEL, "rounds", "initial", "editing", "seed"),
    "pairs": ("data", "results", "feather"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of all evaluations; `run` takes what they parse to."""
    parser.add_argument(
        "--set",
        choices=_SETS,
        default="heldout",
        help="refined words and logos, pictures of the small world, or results of refine-jax batch on your own pairs"
        " (default: %(default)s)",
    )
    for evaluation in _SETS.values():
        evaluation.add_arguments(parser)
    parser.set_defaults(left_out=vars(parser.parse_args([])))


def run(args: argparse.Namespace) -> None:
    """Do what the options ask. Raises `RefineError` for one that belongs to another set."""
    known = ("set", "output", "quiet", *_OPTIONS[args.set])
    for name, value in args.left_out.items():
        if name not in known and getattr(args, name) != value:
            raise RefineError(f"--{name.replace('_', '-')}: is not of --set {args.set}; leave it out")
    _SETS[args.set].run(args)
