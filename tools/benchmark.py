"""refine_jax against diffusers' PyTorch pipeline: the same random weights, noise and picture, side by side on the CPU.

    python tools/benchmark.py                       # MMDiT 768 wide, 8 blocks; a crop of 512 x 512; 4 steps
    python tools/benchmark.py --area 128 --condition 84 --blocks 2 --vae-base 16 --steps 2      # seconds, to try it

Both sides do the whole of RefineAnything, from pixels to pasted pixels, in float32. Repetitions are interleaved
(PyTorch, ours, PyTorch, …) and medians are reported; what our program takes to compile stands beside them, and the
largest difference between the two pictures proves that the work is the same. PyTorch runs eagerly. The parts of the
reference are timed inside its run, ours as programs of their own. Needs the extra [test].
"""

import argparse
import contextlib
import json
import math
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    number = dict(type=int, metavar="N")
    parser.add_argument("--area", **number, default=512, help="side of the crop's area at the VAE (%(default)s)")
    parser.add_argument("--condition", **number, default=256, help="side of the area at the encoder (%(default)s)")
    parser.add_argument("--picture", **number, default=900, help="side of the picture, pixels (%(default)s)")
    parser.add_argument("--reference", action="store_true", help="refine with a reference picture too")
    parser.add_argument("--heads", **number, default=12, help="MMDiT heads of 64 features (%(default)s)")
    parser.add_argument("--blocks", **number, default=8, help="MMDiT blocks (%(default)s)")
    parser.add_argument("--vae-base", **number, default=48, help="VAE base width; published: 96 (%(default)s)")
    parser.add_argument("--vl-hidden", **number, default=512, help="language model width (%(default)s)")
    parser.add_argument("--vl-layers", **number, default=4, help="language model and vision layers (%(default)s)")
    parser.add_argument("--steps", **number, default=4, help="denoising steps (%(default)s)")
    parser.add_argument("--true-cfg", type=float, default=1.0, metavar="S", help="guidance; 1 is off (%(default)s)")
    parser.add_argument("--repeats", **number, default=3, help="interleaved repetitions (%(default)s)")
    parser.add_argument("--threads", **number, default=None, help="CPU cores for both sides (default: all)")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="cpu: on a busy machine, --threads 1")
    parser.add_argument("--seed", **number, default=0)
    parser.add_argument("--output", metavar="FILE", help="write the figures as JSON")
    return parser.parse_args()


# ------------------------------------------------------------------------------------------------------ the reference


def randomise(module: Any, seed: int) -> Any:
    """Every parameter drawn at a scale that keeps activations of order one; norm scales near 1, biases near 0."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if name.endswith("bias"):
                p.copy_(0.1 * noise)
            elif p.numel() == p.shape[0]:
                p.copy_(1 + 0.2 * noise)
            else:
                p.copy_(noise / math.sqrt(p[0].numel()))
    return module.eval()


def make_pipeline(args: argparse.Namespace, folder: str) -> Any:
    """diffusers' pipeline from random parts; `folder` receives a byte-level tokenizer."""
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImageEditPlusPipeline,
        QwenImageTransformer2DModel,
    )
    from transformers import AutoTokenizer, BatchFeature, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from refine_jax.prompts import IMAGE_TOKEN, byte_tokenizer

    byte_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    patches = Qwen2VLImageProcessorPil()

    class Encoder(Qwen2_5_VLForConditionalGeneration):
        def forward(self, input_ids: Any = None, **inputs: Any) -> Any:
            # Without token types transformers 5 would fall back to plain positions.
            return super().forward(
                input_ids=input_ids, mm_token_type_ids=(input_ids == self.config.image_token_id).long(), **inputs
            )

    class Processor:  # Qwen2VLProcessor, without its need of torchvision
        def __call__(self, text: list[str], images: list, padding: bool, return_tensors: str) -> BatchFeature:
            out = patches(images=images, return_tensors=return_tensors)
            whole, *after = text[0].split(IMAGE_TOKEN)
            for (_, rows, columns), part in zip(out["image_grid_thw"].tolist(), after, strict=True):
                whole += IMAGE_TOKEN * (rows * columns // 4) + part
            return BatchFeature({**tokenizer([whole], padding=padding, return_tensors=return_tensors), **out})

    heads = args.vl_hidden // 64
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [8, 12, 12]}
    encoder = Encoder(
        Qwen2_5_VLConfig(
            text_config=dict(
                hidden_size=args.vl_hidden,
                intermediate_size=4 * args.vl_hidden,
                num_hidden_layers=args.vl_layers,
                num_attention_heads=heads,
                num_key_value_heads=max(1, heads // 4),
                vocab_size=len(tokenizer),
                rms_norm_eps=1e-6,
                rope_parameters=rope,
            ),
            vision_config=dict(
                depth=args.vl_layers,
                hidden_size=args.vl_hidden // 2,
                intermediate_size=args.vl_hidden,
                num_heads=heads,
                out_hidden_size=args.vl_hidden,
                fullatt_block_indexes=[args.vl_layers - 1],
            ),
            image_token_id=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        )
    )
    transformer = QwenImageTransformer2DModel(
        num_layers=args.blocks,
        attention_head_dim=64,
        num_attention_heads=args.heads,
        joint_attention_dim=args.vl_hidden,
        axes_dims_rope=(8, 28, 28),
        zero_cond_t=True,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=math.log(3), max_shift=math.log(3), max_image_seq_len=8192
    )
    vae = AutoencoderKLQwenImage(base_dim=args.vae_base)
    for k, part in enumerate((encoder, transformer, vae)):
        randomise(part, args.seed + k)
    pipe = QwenImageEditPlusPipeline(scheduler, vae, encoder, tokenizer, Processor(), transformer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def reference_refine(pipe: Any, args: argparse.Namespace, request: dict[str, Any], box: tuple, size: tuple) -> Any:
    """The released geometry around the pipeline: crop, generate at `size` (h, w), paste back. [H, W, 3] uint8."""
    import diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus as edit_plus
    import numpy as np
    import torch
    from PIL import Image, ImageFilter

    picture, mask = Image.fromarray(request["image"]), Image.fromarray(request["mask_or_box"])
    crop, crop_mask = picture.crop(box), mask.crop(box)
    shown = [crop, crop_mask.convert("RGB")]
    if request["reference"] is not None:
        shown.insert(1, Image.fromarray(request["reference"]))
    h, w, c = request["noise"].shape
    packed = request["noise"].reshape(h // 2, 2, w // 2, 2, c).transpose(0, 2, 4, 1, 3).reshape(1, h * w // 4, 4 * c)
    sizes = dict(VAE_IMAGE_SIZE=args.area**2, CONDITION_IMAGE_SIZE=args.condition**2)
    with mock.patch.multiple(edit_plus, **sizes), torch.inference_mode():
        (made,) = pipe(
            image=shown,
            prompt=request["prompt"],
            negative_prompt=request["negative_prompt"],
            true_cfg_scale=args.true_cfg,
            num_inference_steps=args.steps,
            height=size[0],
            width=size[1],
            latents=torch.from_numpy(packed),
        ).images
    made = np.asarray(made.resize(crop.size, Image.Resampling.BICUBIC), np.float32)
    alpha = np.asarray(crop_mask.filter(ImageFilter.MaxFilter(7)).filter(ImageFilter.GaussianBlur(5)), np.float32)
    alpha = alpha[..., None] / 255
    mixed = np.floor(made * alpha + np.asarray(crop, np.float32) * (1 - alpha) + 0.5)
    out = request["image"].copy()
    out[box[1] : box[3], box[0] : box[2]] = np.clip(mixed, 0, 255).astype(np.uint8)
    return out


@contextlib.contextmanager
def parts_timed(pipe: Any, now: Callable[[], float]) -> Iterator[dict[str, float]]:
    """Seconds that the pipeline spends in each network while this is open."""
    spent: dict[str, float] = defaultdict(float)
    with contextlib.ExitStack() as stack:
        for name, owner, method in (
            ("vae", pipe.vae, "encode"),
            ("vae", pipe.vae, "decode"),
            ("mmdit", pipe.transformer, "forward"),
            ("vl", pipe.text_encoder, "forward"),
        ):
            inner = getattr(owner, method)

            def timed(*positional: Any, inner: Callable = inner, name: str = name, **named: Any) -> Any:
                start = now()
                try:
                    return inner(*positional, **named)
                finally:
                    spent[name] += now() - start

            stack.enter_context(mock.patch.object(owner, method, timed))
        yield spent


# --------------------------------------------------------------------------------------------------------------- ours


def make_refiner(pipe: Any, args: argparse.Namespace, folder: str) -> Any:
    """Our Refiner on the pipeline's weights."""
    from refine_jax.convert.diffusers_folder import from_tensors, model_config
    from refine_jax.prompts import load_tokenizer
    from refine_jax.refine import Refiner

    networks = {"transformer": pipe.transformer, "vae": pipe.vae, "text_encoder": pipe.text_encoder}
    configs = {name: dict(part.config) for name, part in networks.items() if name != "text_encoder"}
    configs |= {"text_encoder": pipe.text_encoder.config.to_dict(), "scheduler": dict(pipe.scheduler.config)}
    model = model_config(configs, vae_area=args.area**2, condition_area=args.condition**2)
    tensors = {name: {k: v.numpy() for k, v in part.state_dict().items()} for name, part in networks.items()}
    return Refiner(model, from_tensors(model, tensors), load_tokenizer(folder))


def our_parts(refiner: Any, inputs: dict[str, Any], spec: Any, reference: float | None) -> dict[str, Callable[[], Any]]:
    """Compiled programs of the parts, each ready to be called: what the whole program does once ("mmdit": one step).

    reference: width over height of the reference picture, None where there is none.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from refine_jax import conditioning
    from refine_jax.model import decode_latents, encode_images, encode_prompts, velocity

    model, variables = refiner.model, refiner.variables
    rng = np.random.default_rng(0)
    pixels = lambda size: jnp.asarray(rng.integers(0, 256, (1, *size, 3)).astype(np.float32))
    sizes, views = [spec.crop] * 2, [spec.crop_views[-1]] * 2
    if reference:
        sizes.insert(1, model.vae_size(reference))
        views.insert(1, model.vl_sizes(reference)[-1])
    images, seen = [pixels(size) for size in sizes], [pixels(size) for size in views]
    prompts = [inputs["prompt"]] + ([inputs["negative"]] if "negative" in inputs else [])
    rows = len(prompts)

    @jax.jit
    def vae(variables: Any, images: Any, noise: Any) -> Any:
        return encode_images(model, variables, images), decode_latents(model, variables, noise)

    @jax.jit
    def vl(variables: Any, prompts: Any, seen: Any) -> Any:
        return encode_prompts(model, variables, {}, prompts, seen)

    @jax.jit
    def mmdit(variables: Any, target: Any, sigma: Any, context: Any, text: Any, mask: Any) -> Any:
        return velocity(model, variables, {}, target, sigma, context, text, mask)

    latents = [jnp.zeros((rows, *model.latent_size(size), model.vae.z_dim)) for size in sizes]
    target = (rows, *model.latent_size(spec.crop), model.vae.z_dim)
    context = conditioning.image_tokens(target, latents, [None] * len(sizes))
    texts = vl(variables, prompts, seen)
    text, mask = (jnp.concatenate([pair[k] for pair in texts]) for k in (0, 1))
    tokens = math.prod(model.latent_size(spec.crop)) // model.mmdit.patch_size**2
    target = jnp.asarray(rng.standard_normal((rows, tokens, model.mmdit.in_channels), np.float32))
    noise = jnp.asarray(inputs["noise"])
    return {
        "vae": lambda: vae(variables, images, noise),
        "mmdit": lambda: mmdit(variables, target, jnp.full(rows, 0.5), context, text, mask),
        "vl": lambda: vl(variables, prompts, seen),
    }


# ----------------------------------------------------------------------------------------------------------- comparing


def measure(args: argparse.Namespace) -> dict[str, Any]:
    import jax
    import numpy as np
    import torch

    from refine_jax import executables, focus
    from refine_jax import refine_programs as program

    torch.set_num_threads(args.threads or len(os.sched_getaffinity(0)))
    rng = np.random.default_rng(args.seed)
    side = args.picture
    y, x = np.mgrid[:side, :side]
    waves = np.stack([np.sin(x / (9 + 5 * k)) * np.cos(y / (11 + 4 * k)) for k in range(3)], -1)
    image = np.clip(128 + 90 * waves + rng.normal(0, 6, waves.shape), 0, 255).astype(np.uint8)
    mask = np.zeros((side, side), np.uint8)
    mask[side * 2 // 5 : side * 3 // 5, side * 2 // 5 : side * 3 // 5] = 255

    with tempfile.TemporaryDirectory() as folder:
        pipe = make_pipeline(args, folder)
        refiner = make_refiner(pipe, args, folder)
    box = tuple(focus.focus_box(focus.mask_box(mask)[0], side, side).tolist())
    size = refiner.model.vae_size((box[2] - box[0]) / (box[3] - box[1]))
    request = dict(
        image=image,
        mask_or_box=mask,
        prompt="Refine the text 'OPEN'",
        negative_prompt=" " if args.true_cfg > 1 else None,
        reference=image[: side // 2, : side // 2] if args.reference else None,
        noise=rng.standard_normal((*refiner.model.latent_size(size), refiner.model.vae.z_dim), dtype=np.float32),
    )
    seen, called = [], executables.Store.call

    def record(store: Any, function: Any, *arguments: Any, **static: Any) -> Any:
        if function is program.refine_program:
            seen[:] = [(arguments[-1], static["spec"])]
        return called(store, function, *arguments, **static)

    def ours_once() -> Any:
        refiner.forget()  # the reference is read each time, as the reference implementation does
        return np.asarray(refiner.refine(**request, steps=args.steps, true_cfg_scale=args.true_cfg))

    now = time.process_time if args.clock == "cpu" else time.perf_counter

    def clock(function: Callable[[], Any]) -> tuple[float, Any]:
        start = now()
        result = jax.block_until_ready(function())
        return now() - start, result

    with mock.patch.object(executables.Store, "call", record):
        first, ours = clock(ours_once)
        parts = our_parts(refiner, *seen[0], reference=1.0 if args.reference else None)
        for part in parts.values():
            clock(part)
        times: dict[str, dict[str, list[float]]] = {"ours": defaultdict(list), "reference": defaultdict(list)}
        steps = args.steps
        for _ in range(args.repeats):
            with parts_timed(pipe, now) as spent:
                seconds, theirs = clock(lambda: reference_refine(pipe, args, request, box, size))
            times["reference"]["whole"].append(seconds)
            for name, value in spent.items():
                times["reference"][name].append(value / (steps if name == "mmdit" else 1))
            times["ours"]["whole"].append(clock(ours_once)[0])
            for name, part in parts.items():
                times["ours"][name].append(clock(part)[0])
    medians = {who: {name: statistics.median(v) for name, v in parts.items()} for who, parts in times.items()}
    difference = np.abs(ours.astype(int) - theirs.astype(int))
    return dict(
        settings=vars(args),
        cores=len(os.sched_getaffinity(0)),
        load=os.getloadavg()[0],
        versions=dict(jax=jax.__version__, torch=torch.__version__),
        parameters={k: sum(leaf.size for leaf in jax.tree.leaves(v)) for k, v in refiner.variables.items()},
        crop=list(size),
        seconds=medians,
        ratio={name: medians["reference"][name] / medians["ours"][name] for name in medians["ours"]},
        spread={who: {name: [min(v), max(v)] for name, v in parts.items()} for who, parts in times.items()},
        compile_seconds=first - medians["ours"]["whole"],
        largest_difference=int(difference.max()),
        pixels_that_differ=float((difference > 0).any(-1).mean()),
        pixels_changed=float((theirs != image).any(-1).mean()),
    )


LABELS = {
    "whole": "whole refinement, pixels to pixels",
    "vae": "VAE: encode every image, decode one",
    "mmdit": "MMDiT: one step",
    "vl": "Qwen2.5-VL: encode the prompt",
}


def table(result: dict[str, Any]) -> str:
    """The result as markdown."""
    ours, theirs = result["seconds"]["ours"], result["seconds"]["reference"]
    unit = "s" if result["settings"]["clock"] == "wall" else "s of CPU"
    lines = [f"| | diffusers, eager ({unit}) | refine_jax ({unit}) | ratio |", "|---|---|---|---|"]
    for name, label in LABELS.items():
        lines.append(f"| {label} | {theirs[name]:.3f} | {ours[name]:.3f} | {result['ratio'][name]:.2f} |")
    count = ", ".join(f"{name} {size / 1e6:.1f} M" for name, size in result["parameters"].items())
    lines += [
        "",
        f"First call {result['compile_seconds']:.1f} s longer (compiling). Largest difference between the pictures: "
        f"{result['largest_difference']} of 255, in {result['pixels_that_differ']:.2%} of the pixels "
        f"({result['pixels_changed']:.0%} were refined).",
        f"{result['cores']} cores, load {result['load']:.1f}, jax {result['versions']['jax']}, torch "
        f"{result['versions']['torch']}; parameters: {count}.",
    ]
    return "\n".join(lines)


def main() -> None:
    args = arguments()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if args.threads:  # before either library starts its pool
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: args.threads])
    result = measure(args)
    print(table(result))
    if args.output:
        aside = f"{args.output}.partial"
        with open(aside, "w", encoding="utf-8") as file:
            json.dump(result, file, indent=1)
        os.replace(aside, args.output)


if __name__ == "__main__":
    main()
