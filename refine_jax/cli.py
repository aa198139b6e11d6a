"""The command line: a thin door to each room. Bad input ends with one line on standard error and exit code 2."""

import argparse
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

from refine_jax import __version__, distributed
from refine_jax.errors import Preempted, RefineError, out_of_memory
from refine_jax.limits import DTYPES


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


def _size(text: str) -> tuple[int, int]:
    try:
        width, height = (int(side) for side in text.lower().split("x"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: give WIDTHxHEIGHT in pixels") from None
    return width, height


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, like every other error."""

    def error(self, message: str) -> NoReturn:
        raise RefineError(f"{message}; see {self.prog} --help")


def _parser(command: str | None) -> argparse.ArgumentParser:
    """The parser; the options whose modules take seconds to import (evaluate, data) only where `command` asks."""
    parser = _Parser(prog="refine-jax", description="Image refinement in JAX.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"refine-jax {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    refine = commands.add_parser(
        "refine",
        allow_abbrev=False,
        help="restore the detail inside a region of a picture",
        description="Restore the detail inside a region and leave every other pixel as it is. With no arguments: the "
        "bundled example on the bundled model.",
    )
    refine.add_argument("--image", metavar="F", help="picture to refine (default: the bundled example)")
    region = refine.add_mutually_exclusive_group()
    region.add_argument("--mask", metavar="F", help="picture of the region: non-zero is refined")
    region.add_argument("--box", metavar="X1,Y1,X2,Y2", type=_box, action="append", help="region as a box; repeatable")
    refine.add_argument("--prompt", metavar="T", help="instruction, such as: Refine the text 'OPEN'")
    refine.add_argument(
        "--negative-prompt", metavar="T", help="what guidance moves away from (with --true-cfg above 1)"
    )
    refine.add_argument("--reference", metavar="F", help="picture that shows how the region should look")
    refine.add_argument(
        "--model", metavar="tiny|FOLDER|OWNER/NAME", default="tiny", help="model (default: %(default)s)"
    )
    refine.add_argument(
        "--lora", metavar="F[:WEIGHT]", action="append", default=[], help="LoRA weights, any dialect; repeatable"
    )
    refine.add_argument("--merge-lora", action="store_true", help="add the adapters to the weights once")
    refine.add_argument(
        "--scheduler",
        choices=("released", "checkpoint"),
        help="noise schedule (default: released, for a converted model)",
    )
    refine.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 for weights stored so, else float32")
    refine.add_argument("--quantize", choices=("int8",), help="keep large matrices in 8 bits")
    refine.add_argument("--steps", metavar="N", type=_positive, help="denoising steps (default: the model's)")
    refine.add_argument("--true-cfg", metavar="S", type=float, help="true CFG scale; 1 is off (default: the model's)")
    refine.add_argument("--seed", metavar="N", type=int, default=0, help="seed of the noise (default: %(default)s)")
    refine.add_argument(
        "--margin", metavar="PX", type=float, help="margin around the region, in pixels of a 1024x1024 picture"
    )
    refine.add_argument("--no-focus", action="store_true", help="refine the whole picture instead of a crop")
    refine.add_argument("--feather", choices=("released", "paper"), default="released", help="how the edge is blended")
    refine.add_argument("--output", metavar="F", help="where to write (default: refined.png)")
    refine.add_argument("--compare", metavar="F", help="also write a before/after picture, zoomed on the region")
    refine.add_argument("--quiet", action="store_true", help="no progress")

    regenerate = commands.add_parser(
        "regenerate",
        allow_abbrev=False,
        help="paint a whole picture anew so that it shows what its prompt says",
        description="Refinement via regeneration: the picture is made anew from its prompt and what the model sees of "
        "it; nothing is kept by force. With no arguments: the bundled example on the bundled model.",
    )
    regenerate.add_argument("--image", metavar="F", help="picture to regenerate (default: the bundled example)")
    regenerate.add_argument("--compare", metavar="F", help="also write the picture and the result side by side")
    regenerate.add_argument("--rounds", metavar="N", type=int, default=1, help="repeat so often (default: %(default)s)")
    regenerate.add_argument("--image-cfg", metavar="S", type=float, help="guidance by the context without the picture")
    generate = commands.add_parser(
        "generate",
        allow_abbrev=False,
        help="paint a picture from text alone",
        description="Paint what the prompt says: the initial picture that `refine-jax regenerate` improves.",
    )
    generate.add_argument("--size", metavar="WxH", type=_size, help="in pixels (default: the model's largest square)")
    for painting, output in ((regenerate, "regenerated.png"), (generate, "generated.png")):
        painting.add_argument(
            "--prompt", metavar="T", required=painting is generate, help="what the picture should show"
        )
        painting.add_argument(
            "--model",
            metavar="tiny|FOLDER|OWNER/NAME",
            default="tiny",
            help="the bundled model, BAGEL, RvR or your own (default: %(default)s)",
        )
        painting.add_argument("--weights", choices=("rvr", "ema"), help="where a released folder holds both")
        painting.add_argument(
            "--lora", metavar="F[:WEIGHT]", action="append", default=[], help="LoRA weights; repeatable"
        )
        painting.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 for weights stored so, else float32")
        painting.add_argument("--quantize", choices=("int8",), help="keep large matrices in 8 bits")
        painting.add_argument(
            "--steps", metavar="N", type=_positive, help="points of the time grid (default: the model's)"
        )
        painting.add_argument(
            "--text-cfg", metavar="S", type=float, help="guidance by the prompt (default: the model's)"
        )
        painting.add_argument("--renorm", choices=("text_channel", "channel", "global"), help="default: the model's")
        painting.add_argument("--shift", metavar="S", type=float, help="of the time grid (default: the model's)")
        painting.add_argument("--seed", metavar="N", type=int, default=0, help="of the noise (default: %(default)s)")
        painting.add_argument("--output", metavar="F", default=output, help="where to write (default: %(default)s)")
        painting.add_argument("--quiet", action="store_true", help="no progress")

    convert = commands.add_parser(
        "convert",
        allow_abbrev=False,
        help="PyTorch files to a model folder, and LoRA files from one dialect to another",
        description="Convert a pipeline folder of diffusers, or a BAGEL or RvR folder, to a model folder; a killed "
        "conversion continues. A BAGEL or RvR model folder is written back with --dialect bagel, the MMDiT of any "
        "other with --dialect diffusers. A file of LoRA weights is rewritten in another dialect.",
    )
    convert.add_argument("source", metavar="SRC", help="folder of PyTorch files, model folder, or LoRA weights")
    convert.add_argument("target", metavar="DST", nargs="?", help="folder, or .safetensors file, to write")
    convert.add_argument(
        "--dialect",
        choices=("peft", "comfyui", "bagel", "diffusers"),
        help="of the LoRA file to write (default: peft); bagel: SRC is a model folder, DST gets the released layout; "
        "diffusers: SRC is a model folder, DST gets its transformer",
    )
    convert.add_argument(
        "--weights", metavar="ema|rvr", help="which weights of a BAGEL folder, or how to call those that are written"
    )
    convert.add_argument(
        "--dtype", choices=DTYPES, help="of what --dialect bagel, diffusers writes (default: as it is)"
    )
    convert.add_argument("--model", metavar="MODEL", help="what the LoRA adapts (default: the published architecture)")
    convert.add_argument("--inspect", action="store_true", help="say what SRC holds; nothing is written")
    convert.add_argument("--quiet", action="store_true", help="no progress bar")

    train = commands.add_parser(
        "train",
        allow_abbrev=False,
        help="train a model from a configuration",
        description="Run or continue a configuration in a work folder. --config.KEY=VALUE overrides a key.",
    )
    train.add_argument("--config", required=True, metavar="F", help="configuration file, such as configs/tiny.py")
    train.add_argument("--workdir", required=True, metavar="DIR", help="checkpoints, metrics and the finished model")
    train.add_argument("--quiet", action="store_true", help="no progress bar")

    data = commands.add_parser(
        "data",
        allow_abbrev=False,
        help="write and check datasets of refinement pairs",
        description="Write datasets of procedural pairs or of your own pictures, and check them.",
    )
    if command == "data":
        from refine_jax.data import build

        build.add_arguments(data)

    batch = commands.add_parser(
        "batch",
        allow_abbrev=False,
        help="refine and regenerate every request of a manifest",
        description="Do, or go on with, all requests of a manifest (JSON lines, docs/batch.md). "
        "--config.KEY=VALUE overrides a key of the configuration.",
    )
    batch.add_argument("--manifest", metavar="F.jsonl", help="the requests")
    batch.add_argument("--output-dir", metavar="DIR", help="results, journal and summary; of a killed run: go on")
    batch.add_argument(
        "--check", metavar="F.jsonl", help="only say what is wrong with these requests: without a model, by headers"
    )
    compiling = commands.add_parser(
        "compile",
        allow_abbrev=False,
        help="compile the programs of a batch ahead, for this machine's devices",
        description="Write the executables that the requests of a manifest need to a folder, by default beside the "
        "model, which `refine-jax batch --executables` reads on machines of the same kind. No weights are read.",
    )
    compiling.add_argument("--manifest", metavar="F.jsonl", required=True, help="requests like those to come")
    for command_ in (batch, compiling):
        command_.add_argument(
            "--root", metavar="DIR", help="a folder whose files the manifest may name, besides its own"
        )
        command_.add_argument("--config", metavar="F", help="configuration file, such as configs/batch_2511_v6e_8.py")
        command_.add_argument("--model", metavar="tiny|FOLDER|OWNER/NAME", help="of refine requests")
        command_.add_argument("--regenerator", metavar="tiny|FOLDER|OWNER/NAME", help="of the others")
        command_.add_argument("--batch-size", metavar="N", type=_positive, help="rows of every program")
        command_.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 for weights stored so, else float32")
        command_.add_argument("--quantize", choices=("int8",), help="keep large matrices in 8 bits")
        command_.add_argument(
            "--lora", metavar="F[:WEIGHT]", action="append", help="LoRA weights of --model, any dialect; repeatable"
        )
        command_.add_argument("--merge-lora", action="store_true", default=None, help="add them to the weights once")
        command_.add_argument(
            "--executables",
            metavar="DIR",
            help="folder of `refine-jax compile`, by default `executables` in the model's folder; its files are code"
            if command_ is compiling
            else "folder that `refine-jax compile` wrote; its files are code",
        )
        command_.add_argument("--quiet", action="store_true", help="no progress bar")
    batch.add_argument(
        "--cache", metavar="DIR|none", help="where compiled programs are kept (default: in the user's cache folder)"
    )
    batch.add_argument("--workers", metavar="N", type=_positive, help="threads that decode, and that write")

    evaluate = commands.add_parser(
        "evaluate",
        allow_abbrev=False,
        help="score a model on the held-out samples, or results on your own pairs",
        description="Refine the held-out samples; write metrics, a table and a contact sheet. Needs the extra 'eval'. "
        "With --set pairs: score what refine-jax batch made of your own pairs.",
    )
    if command == "evaluate":
        from refine_jax.evaluate import command as evaluations

        evaluations.add_arguments(evaluate)
    return parser


def _refine(args: argparse.Namespace) -> None:
    from refine_jax import examples
    from refine_jax.images import check_output, each_region, read_picture, save_picture

    given = [args.image, args.mask or args.box, args.prompt]
    if any(given) and not all(given):
        missing = [n for n, v in zip(("--image", "--mask or --box", "--prompt"), given) if not v]
        raise RefineError(
            f"refine: {' and '.join(missing)} missing; give all of --image, --mask or --box, --prompt, or none"
        )
    request = examples.sign() if not any(given) else None
    output = args.output or "refined.png"
    compare = args.compare or ("refined_compare.png" if request and not args.output else None)
    if compare and os.path.realpath(compare) == os.path.realpath(output):
        raise RefineError(f"--compare {compare!r}: is the output too; give another name")
    image = args.image or request.image
    picture = read_picture(image)
    check_output(output, picture.alpha is not None, "--output")
    if compare:
        check_output(compare, name="--compare")
    regions = args.mask or args.box or request.region
    reference = args.reference or (request.reference if request else None)
    for _ in each_region(regions, picture.size)[1]:
        pass  # what is wrong is said before the weights are read
    if reference:
        read_picture(reference, "reference")

    from refine_jax.loading import weighted_file
    from refine_jax.refine import Refiner

    _keep_programs_of_accelerators()
    refiner = Refiner.load(
        args.model,
        dtype=args.dtype,
        lora=[weighted_file(text) for text in args.lora],
        merge_lora=args.merge_lora,
        scheduler=args.scheduler,
        quantize=args.quantize,
        progress=not args.quiet and args.model != "tiny",
        later=True,
    )
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
    if compare:
        from refine_jax.compare import before_after

        shown = before_after(picture, result, regions, reference)
    save_picture(result, output, "--output")
    model = refiner.model
    steps, guidance = args.steps or model.steps, model.true_cfg_scale if args.true_cfg is None else args.true_cfg
    print(f"wrote {output} ({result.width}x{result.height}; steps {steps}, true CFG {guidance:g})")
    if compare:
        save_picture(shown, compare, "--compare")
        print(f"wrote {compare} (before, after)")


def _regenerate(args: argparse.Namespace) -> None:
    from refine_jax.images import check_output, read_picture, save_picture

    image, prompt, spec, compare = None, args.prompt, None, None
    if args.command == "regenerate":
        if (args.image is None) != (args.prompt is None):
            missing = "--prompt" if args.prompt is None else "--image"
            raise RefineError(f"regenerate: {missing} missing; give both of --image, --prompt, or none")
        image, compare = args.image, args.compare
        if image is None:
            from refine_jax import examples

            image, prompt, spec = examples.misaligned()
            compare = compare or ("regenerated_compare.png" if args.output == "regenerated.png" else None)
        picture = read_picture(image)
        if compare:
            check_output(compare, name="--compare")
            if os.path.realpath(compare) == os.path.realpath(args.output):
                raise RefineError(f"--compare {compare!r}: is the output too; give another name")
    check_output(args.output, name="--output")

    from refine_jax.loading import weighted_file
    from refine_jax.regenerate import Regenerator

    _keep_programs_of_accelerators()
    regenerator = Regenerator.load(
        args.model,
        dtype=args.dtype,
        weights=args.weights,
        lora=[weighted_file(text) for text in args.lora],
        quantize=args.quantize,
        progress=not args.quiet,
        later=True,
    )
    names = ("steps", "text_cfg", "renorm", "shift", "seed")
    settings = {name: getattr(args, name) for name in names} | {"progress": not args.quiet}
    if args.command == "generate":
        result = regenerator.generate(prompt, args.size, **settings)
    else:
        result = regenerator.regenerate(image, prompt, rounds=args.rounds, image_cfg=args.image_cfg, **settings)
    save_picture(result, args.output, "--output")
    print(f"wrote {args.output} ({result.width}x{result.height})")
    if compare:
        import numpy as np

        from refine_jax.compare import side_by_side
        from refine_jax.data import world

        before, captions = picture.with_rgb(picture.rgb), ["before", "after"]
        if spec is not None:
            wrong = [world.check(np.asarray(shown), spec).wrong for shown in (before, result)]
            captions = [f"{name}: wrong {', '.join(w)}" if w else f"{name}: right" for name, w in zip(captions, wrong)]
            print(f"{prompt!r}; " + "; ".join(captions))
        save_picture(
            side_by_side(list(zip((before, result), captions)), prompt if prompt.isascii() else ""),
            compare,
            "--compare",
        )
        print(f"wrote {compare} (before, after)")


def _convert(args: argparse.Namespace) -> None:
    from refine_jax.convert import convert

    if args.inspect == bool(args.target):
        raise RefineError("convert: give DST, or --inspect")
    if args.inspect:
        from refine_jax import loading

        model = loading.read_config(args.model) if args.model else None
        print(convert.inspect(args.source, args.weights, model))
        return
    of_lora = args.dialect in ("peft", "comfyui")
    if args.dialect == "diffusers" and args.weights:
        raise RefineError("--weights: is of BAGEL; leave it out with --dialect diffusers")
    if args.dtype and args.dialect not in ("bagel", "diffusers"):
        raise RefineError("--dtype: is of --dialect bagel or diffusers; leave it out, weights keep theirs")
    if args.dialect and not of_lora:
        from refine_jax import loading
        from refine_jax.convert import export

        if args.model:
            raise RefineError(f"--model: is of LoRA files; leave it out with --dialect {args.dialect}")
        source, how = loading.resolve(args.source), dict(dtype=args.dtype, progress=not args.quiet)
        if args.dialect == "bagel":
            written = export.export_bagel(source, args.target, weights=args.weights, **how)
        else:
            written = export.export_diffusers(source, args.target, **how)
        print(f"wrote {written}")
        return
    if convert.is_lora(args.source):
        if args.weights:
            raise RefineError(f"--weights: {args.source} is a LoRA file; leave it out")
        from refine_jax import loading

        model = loading.read_config(args.model) if args.model else None
        print(f"wrote {convert.convert_lora(args.source, args.target, args.dialect or 'peft', model)}")
        return
    if of_lora or args.model:
        name = "--model" if args.model else f"--dialect {args.dialect}"
        raise RefineError(f"{name}: is of LoRA files, and {args.source!r} is none; leave it out")
    print(f"wrote {convert.convert(args.source, args.target, weights=args.weights, progress=not args.quiet)}")


def _train(args: argparse.Namespace, overrides: dict[str, str]) -> None:
    from refine_jax.train import load_config, train

    if "://" in args.workdir:
        raise RefineError(f"--workdir {args.workdir!r}: is no folder; mount it, and give the folder (docs/launch.md)")
    config = load_config(args.config, overrides)
    distributed.start()  # before anything touches a device
    _keep_programs_of_accelerators()
    folder = train(config, Path(args.workdir), progress=not args.quiet)
    print(f"wrote {folder}")


def _data(args: argparse.Namespace, overrides: dict[str, str]) -> None:
    from refine_jax.data import build

    build.run(args, overrides)


def _evaluate(args: argparse.Namespace) -> None:
    from refine_jax.evaluate import command as evaluations

    _keep_programs_of_accelerators()
    evaluations.run(args)


def _batch_config(args: argparse.Namespace, overrides: dict[str, str]) -> Any:
    from refine_jax import configuration, recipes, settings

    config = configuration.load(args.config) if args.config else recipes.batch()
    settings.check_batch(args.config or "the default configuration", config)
    for name in ("model", "regenerator", "batch_size", "dtype", "quantize", "merge_lora"):
        if getattr(args, name) is not None:
            overrides = {name: str(getattr(args, name)), **overrides}
    if args.lora:
        from refine_jax.loading import weighted_file

        overrides = {"lora.model": json.dumps([weighted_file(text) for text in args.lora]), **overrides}
    for name, text in overrides.items():
        configuration.override(config, name, text, args.config or "the default configuration")
    return config


def _keep_programs(cache: str | None) -> None:
    """JAX's persistent compilation cache, unless the environment has named one or `cache` says none."""
    import jax

    if cache is None and jax.config.jax_compilation_cache_dir:
        return
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "refine_jax" / "programs"
    jax.config.update("jax_compilation_cache_dir", None if cache == "none" else str(cache or folder))


def _keep_programs_of_accelerators() -> None:
    """The same where compiling takes minutes; a CPU's programs are for one machine."""
    import jax

    if jax.default_backend() != "cpu":
        _keep_programs(None)


def _batch(args: argparse.Namespace, overrides: dict[str, str]) -> int:
    if args.check:
        return _check(args)
    if not args.manifest or not args.output_dir:
        raise RefineError("batch: give --manifest and --output-dir, or --check")
    config = _batch_config(args, overrides)
    _keep_programs(args.cache)
    distributed.start()  # before anything touches a device

    from refine_jax import batch, executables

    summary = batch.run(
        config,
        args.manifest,
        args.output_dir,
        root=args.root,
        store=executables.Store(args.executables),
        workers=args.workers,
        progress=not args.quiet,
    )
    print(summary.text())
    if distributed.detect(os.environ) is not None:
        return 0  # a launcher takes anything else for a reason to end or repeat the whole run
    return 3 if summary.refused or summary.failed else 0


def _check(args: argparse.Namespace) -> int:
    from refine_jax import manifest

    listed, bad = manifest.Manifest(args.check, args.root), 0
    for refused in manifest.check(listed):
        bad += 1
        print(refused.reason)
    print(f"{len(listed)} requests, {bad} refused")
    return 3 if bad else 0


def _compile(args: argparse.Namespace, overrides: dict[str, str]) -> None:
    config = _batch_config(args, overrides)
    from refine_jax import batch, executables

    folder = args.executables
    if not folder:  # beside the checkpoint
        local = [name for name in (config.model, config.regenerator) if Path(name).is_dir()]
        if not local:
            raise RefineError("compile: give --executables, the folder to write; no model here is a folder")
        folder = Path(local[0]) / executables.BESIDE
    store = executables.Store(folder, write=True, dry=True)
    programs = batch.compile_ahead(config, args.manifest, store, root=args.root, progress=not args.quiet)
    print(f"wrote {store.counts.compiled} executables to {folder}; {programs} programs serve these requests")


def _overrides(command: str, rest: list[str]) -> dict[str, str]:
    """`--config.KEY=VALUE` of training, cache or batch; anything else that the parser did not know is an error."""
    overrides = {}
    for item in rest:
        name, equals, value = item.removeprefix("--config.").partition("=")
        if command not in ("train", "data", "batch", "compile") or not item.startswith("--config."):
            raise RefineError(f"unrecognized argument: {item}; see refine-jax {command} --help")
        if not equals or not name:
            raise RefineError(f"{item}: write --config.KEY=VALUE, with an equals sign and no space")
        overrides[name] = value
    return overrides


def main(argv: list[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, 1 where a training diverged, 2 for bad input, 69 where the processes
    of a run did not find or lost each other, 75 where it was preempted and saved, 130 when interrupted; 3 where a
    batch or its check refused some requests, or some failed."""
    try:
        return distributed.leave(_main(sys.argv[1:] if argv is None else argv))
    except Exception as error:
        if distributed.alone():
            raise
        traceback.print_exc()
        return distributed.leave(distributed.START_FAILED if distributed.lost_peer(error) else 1)


def _main(argv: list[str]) -> int:
    try:
        args, rest = _parser(argv[0] if argv else None).parse_known_args(argv)
        overrides = _overrides(args.command, rest)
        if args.command == "refine":
            _refine(args)
        elif args.command in ("regenerate", "generate"):
            _regenerate(args)
        elif args.command == "convert":
            _convert(args)
        elif args.command == "train":
            _train(args, overrides)
        elif args.command == "data":
            _data(args, overrides)
        elif args.command == "evaluate":
            _evaluate(args)
        elif args.command == "batch":
            return _batch(args, overrides)
        elif args.command == "compile":
            _compile(args, overrides)
    except RefineError as error:
        print(f"refine-jax: {error}", file=sys.stderr)
        return distributed.START_FAILED if isinstance(error, distributed.StartError) else 2
    except FloatingPointError as error:
        print(f"refine-jax: {error}", file=sys.stderr)
        return 1
    except Preempted as notice:
        print(f"refine-jax: {notice}", file=sys.stderr)
        return 75
    except KeyboardInterrupt:
        print("refine-jax: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        if not out_of_memory(error):
            raise
        reason = next(iter(str(error).strip().splitlines()), "MemoryError")[:200]
        remedy = (
            "give dtype bfloat16, remat full, a smaller batch_size, or a mesh of more devices"
            if argv and argv[0] == "train"
            else "give dtype bfloat16, quantize int8, a smaller batch_size, or several devices (refine-jax batch "
            "--config.mesh.fsdp=N --batch-size M)"
        )
        print(f"refine-jax: not enough memory ({reason}); {remedy}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
