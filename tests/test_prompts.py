"""Prompts against transformers' tokenizer and diffusers' Edit-Plus pipeline."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
import test_qwen_vl
import torch
from diffusers import QwenImageEditPlusPipeline
from PIL import Image
from transformers import (
    AutoTokenizer,
    BatchFeature,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from refine_jax import prompts
from refine_jax.convert.keys_vl import vl_table
from refine_jax.convert.mapping import to_tree
from refine_jax.errors import RefineError
from refine_jax.models import qwen_vl
from refine_jax.prompts import EDIT_PLUS, PromptTemplate, byte_tokenizer, encode_prompt, load_tokenizer, pad_prompts

torch.set_num_threads(1)
SHORT = PromptTemplate("<|im_start|>user\n{}<|im_end|>\n", "P{}: <|vision_start|><|image_pad|><|vision_end|>", 6, 200)
TEXTS = ["Refine the text 'OPEN'", "", " ", "é e\u0301 中文 🙂\r\n\ttabs  spaces", "a {} b {0} <|im_end|> c", "x" * 50]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer")
    byte_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


def test_byte_tokenizer_loads_everywhere_and_agrees(folder, tokenizer):
    theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert isinstance(theirs, Qwen2Tokenizer)
    others = [theirs, Qwen2Tokenizer.from_pretrained(folder, local_files_only=True)]
    assert tokenizer.get_vocab_size() == len(theirs) == 264
    for other in others:
        assert prompts.image_token_id(other) == prompts.image_token_id(tokenizer) == 262
        for text in TEXTS:
            for t in (text, EDIT_PLUS.text(text, 2)):
                assert other(t)["input_ids"] == tokenizer.encode(t).ids
                assert prompts.encode_text(other, t) == prompts.encode_text(tokenizer, t)
    assert tokenizer.decode(tokenizer.encode("Refine 'ÖPEN' 中").ids) == "Refine 'ÖPEN' 中"


def test_tokenizer_from_vocabulary_and_merges_alone(folder, tokenizer, tmp_path):
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    older = load_tokenizer(tmp_path)
    for text in TEXTS:
        text = EDIT_PLUS.text(text, 1)
        assert prompts.encode_text(older, text) == prompts.encode_text(tokenizer, text)


def test_template_is_the_pipelines():
    pipe = QwenImageEditPlusPipeline(None, None, None, None, None, None)
    assert EDIT_PLUS.template == pipe.prompt_template_encode
    assert EDIT_PLUS.drop_tokens == pipe.prompt_template_encode_start_idx
    assert EDIT_PLUS.max_tokens == pipe.tokenizer_max_length


def test_prompt_embeddings_equal_the_pipelines(folder, tokenizer):
    """From pixels and words to conditioning tokens, through the pipeline's own functions."""
    settings = test_qwen_vl.tiny_dict()
    settings["text_config"]["num_hidden_layers"] = settings["vision_config"]["depth"] = 2
    settings["image_token_id"] = prompts.image_token_id(tokenizer)
    torch.manual_seed(3)
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**settings)).eval()
    for p in model.parameters():
        p.data = p.data + 0.1 * torch.randn_like(p)
    theirs, processor = AutoTokenizer.from_pretrained(folder, local_files_only=True), Qwen2VLImageProcessorPil()

    def process(text, images, padding, return_tensors):
        """`Qwen2VLProcessor`, which itself wants torchvision."""
        out = processor(images=images, return_tensors=return_tensors)
        (text,) = text
        for _, rows, columns in out["image_grid_thw"].tolist():
            text = text.replace("<|image_pad|>", "<|hole|>" * (rows * columns // 4), 1)
        text = text.replace("<|hole|>", "<|image_pad|>")
        return BatchFeature({**theirs([text], padding=padding, return_tensors=return_tensors), **out})

    def encode(**inputs):
        # Without token types transformers 5 falls back to plain positions; the model was trained with multimodal ones.
        kinds = (inputs["input_ids"] == settings["image_token_id"]).long()
        return model(**inputs, mm_token_type_ids=kinds)

    pipe = QwenImageEditPlusPipeline(None, None, None, None, None, None)
    pipe.processor = process
    pipe.text_encoder = type("Encoder", (), {"dtype": torch.float32, "__call__": staticmethod(encode)})()
    sizes = [(84, 56), (56, 140)]
    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 256, (h, w, 3), np.uint8) for w, h in sizes]
    instruction = "Refine the text 'OPEN' {now}"
    with torch.no_grad():
        embeds, mask = pipe.encode_prompt([instruction], [Image.fromarray(x) for x in pixels], torch.device("cpu"))
    assert mask is None

    config = qwen_vl.QwenVLConfig.from_dict(model.config.to_dict())
    params = to_tree(test_qwen_vl.as_numpy(model.state_dict()), vl_table(config), test_qwen_vl.abstract(config))
    images = tuple(qwen_vl.pixels_to_patches(jnp.asarray(x, jnp.float32)[None], config.vision) for x in pixels)
    grids = tuple(qwen_vl.patch_grid(*x.shape[:2], config.vision) for x in pixels)
    prompt = encode_prompt(tokenizer, EDIT_PLUS, instruction, grids)
    batch = pad_prompts([prompt], len(prompt) + 7)
    ours = test_qwen_vl.compiled(config, grids)(
        {"params": params}, batch.ids, batch.mask, batch.positions, images, batch.image_index
    )
    ours = ours[:, EDIT_PLUS.drop_tokens : len(prompt)]
    test_qwen_vl.assert_close(ours, embeds.numpy(), 1e-4)


def test_pictures_present(tokenizer):
    grids, token = ((4, 6), (8, 4), (2, 10)), prompts.image_token_id(tokenizer)
    sizes = [6, 8, 5]
    starts = [0, 6, 14]
    for present in ([1, 1, 1], [1, 0, 1], [0, 1, 0], [0, 0, 0]):
        out = encode_prompt(tokenizer, SHORT, "go", grids, 2, [bool(p) for p in present])
        rows = [r for k in range(3) if present[k] for r in range(starts[k], starts[k] + sizes[k])]
        assert out.ids.dtype == out.positions.dtype == out.image_index.dtype == np.int32
        assert out.image_index[out.ids == token].tolist() == rows
        assert (out.image_index[out.ids != token] == -1).all()
        shown = [g for g, p in zip(grids, present) if p]
        np.testing.assert_array_equal(out.positions, qwen_vl.mrope_positions(out.ids, shown, token))
        text = tokenizer.decode(out.ids.tolist(), skip_special_tokens=False)
        assert [f"P{k + 1}:" in text for k in range(3)] == [k < len(shown) for k in range(3)]
    same = encode_prompt(tokenizer, SHORT, "go", (grids[0], grids[2]))
    holed = encode_prompt(tokenizer, SHORT, "go", grids, 2, [True, False, True])
    np.testing.assert_array_equal(same.ids, holed.ids)
    np.testing.assert_array_equal(same.positions, holed.positions)


def test_padding_and_buckets(tokenizer):
    made = [encode_prompt(tokenizer, SHORT, t, ((4, 6),)) for t in ("a", "a longer one")]
    length = prompts.bucket_length(max(map(len, made)), [128, 32, 48])
    assert length == 32
    batch = pad_prompts(made, length)
    assert batch.ids.shape == batch.mask.shape == batch.image_index.shape == (2, length)
    assert batch.positions.shape == (2, length, 3)
    for b, prompt in enumerate(made):
        n = len(prompt)
        assert batch.mask[b].sum() == n and batch.mask[b, :n].all()
        np.testing.assert_array_equal(batch.ids[b, :n], prompt.ids)
        np.testing.assert_array_equal(batch.positions[b, :n], prompt.positions)
        np.testing.assert_array_equal(batch.image_index[b, :n], prompt.image_index)
        assert (batch.image_index[b, n:] == -1).all()


def test_prefix_tokens(tokenizer):
    assert prompts.prefix_tokens(tokenizer, SHORT.template) == 6 == SHORT.drop_tokens


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda t: encode_prompt(t, SHORT, "x" * 300), "the limit is 200"),
        (lambda t: encode_prompt(t, SHORT, "", ((30, 30),)), "of which 225 are pictures"),
        (lambda t: encode_prompt(t, SHORT, "a <|image_pad|>"), "reserved"),
        (lambda t: pad_prompts([encode_prompt(t, SHORT, "x" * 50)], 40), "the limit is 40"),
        (lambda t: prompts.bucket_length(65, [32, 64]), "the limit is 64"),
        (lambda t: PromptTemplate("no hole", SHORT.picture, 0), "exactly one"),
        (lambda t: PromptTemplate("{}", "Picture {}", 0), "image_pad"),
        (lambda t: load_tokenizer("no/such/folder"), "no/such/folder"),
    ],
)
def test_errors_are_one_line_and_name_the_limit(tokenizer, call, says):
    with pytest.raises(RefineError) as error:
        call(tokenizer)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_damaged_or_foreign_tokenizer(tmp_path, folder):
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    (tmp_path / "tokenizer.json").write_text(text[: len(text) // 2], encoding="utf-8")
    with pytest.raises(RefineError, match="cannot be read"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(text.replace("image_pad", "picture_pad"), encoding="utf-8")
    with pytest.raises(RefineError, match="image_pad"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_of_transformers_gives_the_same_prompt(folder, tokenizer):
    theirs = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    encode = functools.partial(encode_prompt, template=SHORT, instruction="go ü", grids=((4, 6), (2, 2)))
    for name in ("ids", "positions", "image_index"):
        np.testing.assert_array_equal(getattr(encode(theirs), name), getattr(encode(tokenizer), name))


# ------------------------------------------------------------------------------------------------------------- RvR
def test_the_prompts_of_rvr():
    """The paper's texts in Qwen2.5-VL's chat: the released code trains with one system text, samples with another."""
    training, inference = (prompts.TEMPLATES[f"rvr-{name}"] for name in ("training", "inference"))
    picture = "<|vision_start|><|image_pad|><|vision_end|>"
    assert training.text("a {} cat", 1) == (
        "<|im_start|>system\nAnalyze the potential misalignment between the generated image and the user's prompt. "
        "Then, re-generate the image to precisely align with the user's prompt.\n<|im_end|>\n<|im_start|>user\n"
        f"{picture}Here is the user's prompt: a {{}} cat. <|im_end|>\n<|im_start|>assistant\n"
    )
    longer = training.text("", 1).replace(".\n<|im_end|>", ".\n\nHere is the generated image:\n<|im_end|>", 1)
    assert inference.text("", 1) == longer and longer != training.text("", 1)
    # For Qwen's own tokenizer; EDIT_PLUS's 64, counted in the same way, are diffusers'.
    assert (training.drop_tokens, inference.drop_tokens) == (40, 46)


def test_the_system_text_is_dropped_whatever_the_tokenizer(tokenizer):
    template = prompts.for_tokenizer(prompts.TEMPLATES["rvr-training"], tokenizer)
    encoded = encode_prompt(tokenizer, template, "一", [(4, 4)])
    kept = tokenizer.decode(encoded.ids[template.drop_tokens :].tolist(), skip_special_tokens=False)
    assert kept == (
        "<|vision_start|>" + 4 * "<|image_pad|>" + "<|vision_end|>Here is the user's prompt: 一. <|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert (encoded.image_index[encoded.ids == prompts.image_token_id(tokenizer)] == np.arange(4)).all()


def test_templates_with_one_hole_two_or_more(tokenizer):
    with pytest.raises(RefineError, match="exactly one"):
        PromptTemplate("{}{}{}", SHORT.picture, 0)
    with pytest.raises(RefineError, match="at most"):
        PromptTemplate("{}", "{}{}<|image_pad|>", 0)
    assert PromptTemplate("a{}b{}c", "<|image_pad|>", 0).text("t", 2) == "a<|image_pad|><|image_pad|>btc"
