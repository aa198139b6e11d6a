"""diffusers' `QwenImageEditPlusPipeline` from small random parts, offline, with the released geometry around it."""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import shutil
from unittest import mock

import diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus as edit_plus
import numpy as np
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPlusPipeline,
    QwenImageTransformer2DModel,
)
from PIL import Image, ImageFilter
from reference_utils import numpy_state, randomise
from safetensors.numpy import save_file
from transformers import AutoTokenizer, BatchFeature, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from refine_jax.convert.convert import convert
from refine_jax.prompts import IMAGE_TOKEN, SPECIAL_TOKENS, byte_tokenizer
from refine_jax.refine import Refiner

SCHEDULER = dict(  # the released one: μ = log 3 whatever the size
    base_shift=math.log(3),
    max_shift=math.log(3),
    base_image_seq_len=256,
    max_image_seq_len=8192,
    use_dynamic_shifting=True,
    time_shift_type="exponential",
)


class Processor:
    """`Qwen2VLProcessor`, which itself wants torchvision: image placeholders expanded, then tokens and patches."""

    def __init__(self, tokenizer, merge: int = 2):
        self.tokenizer, self.images, self.merge = tokenizer, Qwen2VLImageProcessorPil(), merge

    def __call__(self, text, images, padding=True, return_tensors="pt"):
        out = self.images(images=images, return_tensors=return_tensors)
        (text,) = text
        before, *after = text.split(IMAGE_TOKEN)
        for (_, rows, columns), part in zip(out["image_grid_thw"].tolist(), after, strict=True):
            before += IMAGE_TOKEN * (rows * columns // self.merge**2) + part
        return BatchFeature({**self.tokenizer([before], padding=padding, return_tensors=return_tensors), **out})


class Encoder(Qwen2_5_VLForConditionalGeneration):
    """diffusers passes no token types, and without them transformers 5 falls back to plain positions; the released
    model was trained, and is run by earlier versions, with multimodal ones."""

    def forward(self, input_ids=None, **inputs):
        kinds = (input_ids == self.config.image_token_id).long()
        return super().forward(input_ids=input_ids, mm_token_type_ids=kinds, **inputs)


def tiny_pipeline(folder, seed: int, *, zero_cond_t: bool = True, z: int = 4) -> QwenImageEditPlusPipeline:
    """A pipeline whose every weight is random and non-trivial; `folder` receives its tokenizer."""
    byte_tokenizer(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIAL_TOKENS}
    encoder = Encoder(
        Qwen2_5_VLConfig(
            text_config=dict(
                hidden_size=32,
                intermediate_size=40,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                vocab_size=len(tokenizer),
                rms_norm_eps=1e-6,
                rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
            ),
            vision_config=dict(
                depth=2,
                hidden_size=32,
                intermediate_size=36,
                num_heads=2,
                out_hidden_size=32,
                window_size=56,
                fullatt_block_indexes=[1],
            ),
            image_token_id=ids["<|image_pad|>"],
            video_token_id=ids["<|video_pad|>"],
            vision_start_token_id=ids["<|vision_start|>"],
            vision_end_token_id=ids["<|vision_end|>"],
        )
    )
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=4 * z,
        out_channels=z,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        axes_dims_rope=(4, 6, 6),
        zero_cond_t=zero_cond_t,
    )
    rng = np.random.default_rng(seed)
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=z,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=rng.normal(0, 0.3, z).tolist(),
        latents_std=rng.uniform(0.7, 1.5, z).tolist(),
    )
    for k, part in enumerate((encoder, transformer, vae)):
        randomise(part, seed + k)
    pipe = QwenImageEditPlusPipeline(
        FlowMatchEulerDiscreteScheduler(**SCHEDULER), vae, encoder, tokenizer, Processor(tokenizer), transformer
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def parts_of(pipe) -> tuple[dict, dict]:
    """(configurations, tensors) of a pipeline's sub-folders, as `convert.diffusers_folder` takes them."""
    networks = {"transformer": pipe.transformer, "vae": pipe.vae, "text_encoder": pipe.text_encoder}
    configs = {name: dict(part.config) for name, part in networks.items() if name != "text_encoder"}
    configs |= {"text_encoder": pipe.text_encoder.config.to_dict(), "scheduler": dict(pipe.scheduler.config)}
    return configs, {name: numpy_state(part) for name, part in networks.items()}


@contextlib.contextmanager
def rows_last():
    """Within it Pillow resizes the rows' direction (x) first, as every version up to 12.1 did.

    Newer ones begin with y where the height shrinks more than the width; with 8-bit values in between, single grey
    levels then differ. The released numbers come from the older order, and ours is always that one.
    """
    resize = Image.Image.resize

    def in_two_steps(image, size, resample=None, box=None, reducing_gap=None):
        assert box is None
        return resize(resize(image, (size[0], image.height), resample), size, resample)

    with mock.patch.object(Image.Image, "resize", in_two_steps):
        yield


def released_refine(
    pipe,
    image: Image.Image,
    mask: Image.Image,
    prompt: str,
    reference: Image.Image | None = None,
    *,
    vae_area: int,
    condition_area: int,
    steps: int,
    true_cfg_scale: float,
    negative_prompt: str | None,
    noise: np.ndarray,
    focus: bool,
) -> Image.Image:
    """What the released code does between an RGB image and its result; `noise` [h, w, C] is the target's latent."""
    width, height = image.size
    box = (0, 0, width, height)
    if focus:
        scale = math.sqrt(1024 * 1024 / (width * height))
        ys, xs = np.nonzero(np.asarray(mask))
        near = [math.floor(max(0.0, v * scale - 64) / scale) for v in (xs.min(), ys.min())]
        far = [
            math.ceil(min(side * scale, (v + 1) * scale + 64) / scale)
            for v, side in ((xs.max(), width), (ys.max(), height))
        ]
        box = (*near, min(width, far[0]), min(height, far[1]))
    crop, crop_mask = image.crop(box), mask.crop(box)
    shown = crop_mask.point(lambda v: 255 if v else 0).convert("RGB")
    out_width, out_height = edit_plus.calculate_dimensions(vae_area, crop.width / crop.height)
    h, w, c = noise.shape
    packed = noise.reshape(h // 2, 2, w // 2, 2, c).transpose(0, 2, 4, 1, 3).reshape(1, h * w // 4, 4 * c)
    with (
        mock.patch.multiple(edit_plus, VAE_IMAGE_SIZE=vae_area, CONDITION_IMAGE_SIZE=condition_area),
        rows_last(),
        torch.no_grad(),
    ):
        made = pipe(
            image=[crop, shown] if reference is None else [crop, reference, shown],
            prompt=prompt,
            negative_prompt=negative_prompt,
            true_cfg_scale=true_cfg_scale,
            num_inference_steps=steps,
            height=out_height,
            width=out_width,
            latents=torch.from_numpy(packed),
        ).images[0]
        assert made.size == (out_width, out_height)
        made = made.resize(crop.size, Image.Resampling.BICUBIC)
    soft = crop_mask.filter(ImageFilter.MaxFilter(7)).filter(ImageFilter.GaussianBlur(5))
    alpha = np.asarray(soft, np.float32)[..., None] / 255
    mixed = np.asarray(made, np.float32) * alpha + np.asarray(crop, np.float32) * (1 - alpha)
    result = image.copy()
    result.paste(Image.fromarray(np.clip(np.floor(mixed + 0.5), 0, 255).astype(np.uint8)), box[:2])
    return result


def save_pipeline(pipe, folder, shard: str = "30KB") -> None:
    """`pipe.save_pretrained`, whose processor has no files of its own here: the true layout, sharded."""
    pipe.transformer.save_pretrained(folder / "transformer", max_shard_size=shard)
    pipe.vae.save_pretrained(folder / "vae")
    pipe.text_encoder.save_pretrained(folder / "text_encoder", max_shard_size=shard)
    pipe.scheduler.save_pretrained(folder / "scheduler")
    pipe.tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "processor").mkdir()
    shutil.copy(folder / "tokenizer" / "tokenizer.json", folder / "processor")
    Qwen2VLImageProcessorPil().save_pretrained(folder / "processor")
    index = {
        "_class_name": "QwenImageEditPlusPipeline",
        "_diffusers_version": "0.36.0",
        "processor": ["transformers", "Qwen2VLProcessor"],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen2_5_VLForConditionalGeneration"],
        "tokenizer": ["transformers", "Qwen2Tokenizer"],
        "transformer": ["diffusers", "QwenImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLQwenImage"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))


# -------------------------------------------------------------------------------------------------------- LoRA adapters

ATTENTION = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
EVERYTHING = (
    *ATTENTION,
    *("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    *("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2", "img_mod.1", "txt_mod.1"),
)


def random_lora(pipe, path, seed: int, rank: int, targets: tuple[str, ...], lightning: bool = False) -> None:
    """An adapter that visibly changes the result, named as RefineAnything's (PEFT) or as Lightning's."""
    rng = np.random.default_rng(seed)
    names = ("lora_down", "lora_up") if lightning else ("lora_A", "lora_B")
    tensors = {}
    for name, module in pipe.transformer.named_modules():
        if isinstance(module, torch.nn.Linear) and name.endswith(targets) and name.startswith("transformer_blocks."):
            prefix = name if lightning else f"transformer.{name}"
            down = rng.normal(0, 0.6 / math.sqrt(module.in_features), (rank, module.in_features))
            up = rng.normal(0, 0.6 / math.sqrt(rank), (module.out_features, rank))
            tensors[f"{prefix}.{names[0]}.weight"] = down.astype(np.float32)
            tensors[f"{prefix}.{names[1]}.weight"] = up.astype(np.float32)
            if lightning:
                tensors[f"{prefix}.alpha"] = np.array(rank / 2, np.float32)
    save_file(tensors, path)


# ----------------------------------------------------------------------------------------------------------- the matrix

PARITY_AREAS = dict(vae_area=64 * 64, condition_area=96 * 96)
LORA_WEIGHTS = (1.0, 0.7)


def picture(seed: int, width: int, height: int) -> np.ndarray:
    """A picture with smooth parts, edges and a little noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = [np.sin(x / rng.uniform(3, 20) + k) * np.cos(y / rng.uniform(3, 20)) for k in range(3)]
    made = 128 + 90 * np.stack(waves, -1) + rng.normal(0, 8, (height, width, 3))
    made[height // 3 : height // 2, width // 4 : width // 2] = rng.integers(0, 256, 3)
    return np.clip(made, 0, 255).astype(np.uint8)


def scribble(seed: int, width: int, height: int, box: tuple[int, int, int, int]) -> np.ndarray:
    """A ragged mask that touches all sides of `box`."""
    rng = np.random.default_rng(seed)
    x1, y1, x2, y2 = box
    mask = np.zeros((height, width), np.uint8)
    mask[y1:y2, x1:x2] = np.where(rng.random((y2 - y1, x2 - x1)) < 0.6, 255, 0)
    mask[y1, x1] = mask[y2 - 1, x2 - 1] = 255
    return mask


@dataclasses.dataclass(frozen=True)
class Case:
    """One cell of the matrix. guidance: None or the negative prompt; loras: how many adapters."""

    aspect: str
    reference: bool
    guidance: str | None
    zero_cond_t: bool
    focus: bool
    loras: int

    def request(self) -> dict:
        """The arguments that both pipelines share, as arrays."""
        seed = sorted(SCENES).index(self.aspect)
        (width, height), box = SCENES[self.aspect]
        request = dict(
            image=picture(seed, width, height),
            mask_or_box=scribble(seed + 10, width, height, box),
            prompt=("Refine the text 'OPEN'", "é 中文", "Refine the LOGO: " + 9 * "white letters, ")[seed],
        )
        if self.reference:
            request["reference"] = picture(seed + 20, *((70, 60), (50, 110), (96, 64))[seed])
        return request


# aspect -> (width, height) of the picture, box of the mask; both the picture and the focus crop are of that aspect.
SCENES = {
    "landscape": ((230, 90), (60, 30, 170, 60)),
    "portrait": ((90, 230), (30, 70, 60, 170)),
    "square": ((150, 130), (60, 50, 90, 78)),
}
MATRIX = tuple(
    Case(*values)
    for values in itertools.product(SCENES, (False, True), (None, "blurred"), (False, True), (True, False), (0, 1, 2))
)


class Pair:
    """diffusers' pipeline and ours on the same folders: a pipeline in the true layout, converted, and two adapters."""

    def __init__(self, folder, zero_cond_t: bool):
        self.pipe = tiny_pipeline(folder / "plain", 20, zero_cond_t=zero_cond_t)
        save_pipeline(self.pipe, folder / "source")
        self.converted = convert(folder / "source", folder / "converted")
        self.adapters = [folder / "refine.safetensors", folder / "few.safetensors"]
        random_lora(self.pipe, self.adapters[0], 1, 4, ATTENTION)
        random_lora(self.pipe, self.adapters[1], 2, 3, EVERYTHING, lightning=True)
        for adapter in self.adapters:
            self.pipe.load_lora_weights(folder, weight_name=adapter.name, adapter_name=adapter.stem)
        self.refiner = functools.cache(self._refiner)

    def _refiner(self, loras: int, merge: bool = False) -> Refiner:
        chosen = list(zip(self.adapters[:loras], LORA_WEIGHTS))
        return Refiner.load(self.converted, lora=chosen, merge_lora=merge, **PARITY_AREAS)

    def compare(
        self,
        case: Case,
        steps: int = 2,
        merge: bool = False,
        adapters: list[str] | None = None,
        refiner: Refiner | None = None,
    ) -> tuple[np.ndarray, np.ndarray, dict]:
        """(ours, theirs, request): results as int arrays. adapters, refiner: in place of the case's own."""
        request = case.request()
        if case.loras:
            names, weights = [a.stem for a in self.adapters[: case.loras]], list(LORA_WEIGHTS[: case.loras])
            self.pipe.enable_lora()
            self.pipe.set_adapters(adapters or names, [1.0] * len(adapters) if adapters else weights)
        else:
            self.pipe.disable_lora()
        scale, negative = (1.0, None) if case.guidance is None else (3.0, case.guidance)
        common = dict(steps=steps, true_cfg_scale=scale, negative_prompt=negative, focus=case.focus)
        refiner = refiner or self.refiner(case.loras, merge)
        (width, height), _ = SCENES[case.aspect]
        box = refiner._focus(request["mask_or_box"], (width, height), 64.0) if case.focus else (0, 0, width, height)
        size = refiner.model.vae_size(float(box[2] - box[0]) / float(box[3] - box[1]))
        shape = (*refiner.model.latent_size(size), refiner.model.vae.z_dim)
        common["noise"] = np.random.default_rng(4).standard_normal(shape, dtype=np.float32)
        images = {
            "image": Image.fromarray(request["image"]),
            "mask": Image.fromarray(request["mask_or_box"]),
            "reference": Image.fromarray(request["reference"]) if case.reference else None,
        }
        theirs = released_refine(self.pipe, prompt=request["prompt"], **images, **PARITY_AREAS, **common)
        ours = refiner.refine(**request, **common)
        return np.asarray(ours, int), np.asarray(theirs, int), request
