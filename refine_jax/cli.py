"""The command line: a thin door to each room. Bad input ends with one line on standard error and exit code 2."""

import argparse
import os
import sys
from pathlib import Path

from refine_jax import __version__
from refine_jax.errors import RefineError


def _box(text: str) -> tuple[int, ...]:
    try:
        values = tuple(int(v) for v in text.split(","))
    except ValueError:
        values = ()
    if len(values) != 4:
        raise argparse.ArgumentTypeError(f"{text!r}: give four whole numbers x1,y1,x2,y2")
    return values


def _positive(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a whole number of at least 1")
    return value


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="refine-jax", description="Image refinement in JAX.")
    parser.add_argument("--version", action="version", version=f"refine-jax {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    refine = commands.add_parser(
        "refine",
        help="restore the detail inside a region of a picture",
        description="Restore the detail inside a region and leave every other pixel as it is. With no arguments: the "
        "bundled example on the bundled model.",
    )
    refine.add_argument("--image", metavar="F", help="picture to refine (default: the bundled example)")
    region = refine.add_mutually_exclusive_group()
    region.add_argument("--mask", metavar="F", help="picture of the region: non-zero is refined")
    region.add_argument("--box", metavar="X1,Y1,X2,Y2", type=_box, action="append", help="region as a box; repeatable")
    refine.add_argument("--prompt", metavar="T", help="instruction, such as: Refine the text 'OPEN'")
    refine.add_argument("--negative-prompt", metavar="T", help="what guidance moves away from (with --true-cfg above 1)")
    refine.add_argument("--reference", metavar="F", help="picture that shows how the region should look")
    refine.add_argument("--model", metavar="tiny|FOLDER", default="tiny", help="model (default: %(default)s)")
    refine.add_argument("--steps", metavar="N", type=_positive, help="denoising steps (default: the model's)")
    refine.add_argument("--true-cfg", metavar="S", type=float, help="true CFG scale; 1 is off (default: the model's)")
    refine.add_argument("--seed", metavar="N", type=int, default=0, help="seed of the noise (default: %(default)s)")
    refine.add_argument("--margin", metavar="PX", type=float, help="margin around the region, in pixels of a 1024x1024 picture")
    refine.add_argument("--no-focus", action="store_true", help="refine the whole picture instead of a crop")
    refine.add_argument("--feather", choices=("released", "paper"), default="released", help="how the edge is blended")
    refine.add_argument("--output", metavar="F", help="where to write (default: refined.png)")
    refine.add_argument("--compare", metavar="F", help="also write a before/after picture, zoomed on the region")
    refine.add_argument("--quiet", action="store_true", help="no progress")

    train = commands.add_parser(
        "train",
        help="train a model from a configuration",
        description="Run or continue a configuration in a work folder. --config.KEY=VALUE overrides a key.",
    )
    train.add_argument("--config", required=True, metavar="F", help="configuration file, such as configs/tiny.py")
    train.add_argument("--workdir", required=True, metavar="DIR", help="checkpoints, metrics and the finished model")
    train.add_argument("--quiet", action="store_true", help="no progress bar")
    return parser


def _refine(args: argparse.Namespace) -> None:
    from refine_jax import examples
    from refine_jax.images import check_output, read_picture, save_picture

    given = [args.image, args.mask or args.box, args.prompt]
    if any(given) and not all(given):
        missing = [n for n, v in zip(("--image", "--mask or --box", "--prompt"), given) if not v]
        raise RefineError(f"refine: {' and '.join(missing)} missing; give all of --image, --mask or --box, --prompt, or none")
    request = examples.sign() if not any(given) else None
    image = args.image or request.image
    output = args.output or "refined.png"
    for path in filter(None, (output, args.compare)):
        check_output(path)
    picture = read_picture(image)
    regions = args.mask or args.box or request.region
    reference = args.reference or (request.reference if request else None)

    from refine_jax.refine import Refiner

    refiner = Refiner.load(args.model)
    result = refiner.refine(
        image,
        regions,
        args.prompt or request.prompt,
        reference=reference,
        negative_prompt=args.negative_prompt,
        steps=args.steps,
        true_cfg_scale=args.true_cfg,
        seed=args.seed,
        margin=args.margin,
        focus=not args.no_focus,
        feather=args.feather,
        progress=not args.quiet,
    )
    save_picture(result, output)
    print(f"wrote {output} ({result.width}x{result.height})")
    compare = args.compare or ("refined_compare.png" if request and not args.output else None)
    if compare:
        from refine_jax.compare import before_after

        save_picture(before_after(picture, result, regions, reference), compare)
        print(f"wrote {compare} (before, after)")


def _train(args: argparse.Namespace, overrides: dict[str, str]) -> None:
    from refine_jax.train import load_config, train

    folder = train(load_config(args.config, overrides), Path(args.workdir), progress=not args.quiet)
    print(f"wrote {folder}")


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for bad input, 130 when interrupted."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    overrides = {}
    for item in rest:
        name, equals, value = item.removeprefix("--config.").partition("=")
        if args.command != "train" or not item.startswith("--config.") or not equals:
            parser.error(f"unrecognized argument: {item}")
        overrides[name] = value
    try:
        if args.command == "refine":
            _refine(args)
        elif args.command == "train":
            _train(args, overrides)
    except RefineError as error:
        print(f"refine-jax: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("refine-jax: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
