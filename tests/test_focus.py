"""Focus geometry, resampling, feathering and paste-back, against Pillow and the released code's behaviour."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from refine_jax import focus
from refine_jax.errors import RefineError

CANVAS = (56, 72)  # H, W of the one canvas bucket of these tests
CROP = (32, 48)  # h, w of the one crop bucket
PIL = {
    "nearest": Image.NEAREST,
    "box": Image.BOX,
    "bilinear": Image.BILINEAR,
    "bicubic": Image.BICUBIC,
    "lanczos": Image.LANCZOS,
}
few = settings(max_examples=40, deadline=None, derandomize=True)
seeds = st.integers(0, 2**32 - 1)

resample = jax.jit(focus.resample, static_argnames=("size", "method", "antialias", "quantize"))
place = jax.jit(focus.place, static_argnames=("size", "method", "quantize"))
feather = jax.jit(focus.feather, static_argnames=("style",))
paste_back = jax.jit(focus.paste_back, static_argnames=("style",))
pil_blur = jax.jit(focus.pil_gaussian_blur, static_argnames=("radius",))
dilate = jax.jit(focus.dilate, static_argnames=("radius",))
erode = jax.jit(focus.erode, static_argnames=("radius",))


def to_canvas(image, canvas=CANVAS, fill=77):
    """The image in the top-left corner; the rest is garbage that must not matter."""
    out = np.full((*canvas, *image.shape[2:]), fill, image.dtype)
    out[: image.shape[0], : image.shape[1]] = image
    return out


@st.composite
def boxes(draw, height=CANVAS[0], width=CANVAS[1]):
    x = sorted(draw(st.tuples(st.integers(0, width), st.integers(0, width)).filter(lambda p: p[0] != p[1])))
    y = sorted(draw(st.tuples(st.integers(0, height), st.integers(0, height)).filter(lambda p: p[0] != p[1])))
    return np.array([x[0], y[0], x[1], y[1]], np.int32)


@st.composite
def masks(draw, height=CANVAS[0], width=CANVAS[1]):
    """Points, filled boxes, noise, grey values; full; anything touching the borders."""
    rng = np.random.default_rng(draw(seeds))
    mask = np.zeros((height, width), np.uint8)
    kind = draw(st.sampled_from(["point", "boxes", "noise", "grey", "full"]))
    if kind == "point":
        mask[rng.integers(height), rng.integers(width)] = 255
    elif kind == "boxes":
        for _ in range(draw(st.integers(1, 3))):
            x1, y1, x2, y2 = draw(boxes(height, width))
            mask[y1:y2, x1:x2] = 255
    elif kind == "noise":
        mask[rng.random((height, width)) < 0.05] = 255
        mask[0, 0] = 255
    elif kind == "grey":
        mask = rng.integers(0, 256, (height, width), dtype=np.uint8)
        mask[0, -1] = 9
    else:
        mask[:] = 255
    return mask


def rgb(seed, size=CANVAS, smooth=False):
    rng = np.random.default_rng(seed)
    if smooth:
        small = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
        return np.asarray(Image.fromarray(small).resize(size[::-1], Image.BICUBIC))
    return rng.integers(0, 256, (*size, 3), dtype=np.uint8)


# --------------------------------------------------------------------------------------------------------- geometry


@few
@given(masks())
def test_mask_box_is_tight(mask):
    ys, xs = np.nonzero(mask)
    want = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
    box, found = focus.mask_box(mask)
    assert isinstance(box, np.ndarray) and box.dtype == np.int32 and box.tolist() == want and found
    box, found = jax.jit(focus.mask_box)(mask)
    assert box.dtype == jnp.int32 and box.tolist() == want and found


def test_mask_box_reports_an_empty_mask_and_takes_batches():
    mask = np.zeros((2, 4, 5), np.uint8)
    mask[1, 3, 4] = 1
    for box, found in (focus.mask_box(mask), focus.mask_box(jnp.asarray(mask))):
        assert box.tolist() == [[0, 0, 0, 0], [4, 3, 5, 4]] and found.tolist() == [False, True]


def released_box(box, width, height, margin):
    """The released geometry, re-derived one Python float at a time."""
    scale = math.sqrt(2**20 / (width * height))
    low = [max(0, math.floor(max(0.0, v * scale - margin) / scale)) for v in box[:2]]
    high = [min(n, math.ceil(min(n * scale, v * scale + margin) / scale)) for v, n in zip(box[2:], (width, height))]
    return low + high


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.data())
def test_focus_box_equals_the_released_geometry(data):
    width, height = data.draw(st.integers(1, 6000)), data.draw(st.integers(1, 6000))
    box = [int(v) for v in data.draw(boxes(height, width))]
    margin = data.draw(st.sampled_from([0, 1, 16, 64, 64, 100, 1000]))
    assert focus.focus_box(np.array(box), width, height, margin).tolist() == released_box(box, width, height, margin)


def test_focus_box_equals_the_released_geometry_on_many_boxes():
    rng = np.random.default_rng(0)
    size = np.exp(rng.uniform(0, np.log(9000), (20_000, 2))).astype(np.int64)
    low = (rng.random((20_000, 2)) * size).astype(np.int64)
    box = np.concatenate([low, low + 1 + (rng.random((20_000, 2)) * (size - low)).astype(np.int64)], axis=1)
    got = focus.focus_box(box, size[:, 0], size[:, 1])
    assert got.tolist() == [released_box(b, w, h, 64) for b, (w, h) in zip(box.tolist(), size.tolist())]


def test_focus_box_equals_the_released_geometry_where_the_margin_is_a_whole_number_of_pixels():
    """m/s integer: the floor and the ceil sit on the last bit of float64, and the released code's rounding must win."""
    noisy = 0
    rng = np.random.default_rng(0)
    for k in range(1, 120):
        width = height = 16 * k  # s = 64/k, m/s = k
        low = rng.integers(0, width, (40, 2))
        box = np.concatenate([low, low + 1], axis=1)
        got = focus.focus_box(box, np.full(40, width), np.full(40, height))
        want = [released_box(b.tolist(), width, height, 64) for b in box]
        assert got.tolist() == want
        exact = np.concatenate([np.maximum(low - k, 0), np.minimum(low + 1 + k, width)], axis=1)
        noisy += int((got != exact).sum())
    assert noisy > 0  # the cases that single precision or exact integers would get wrong do occur


def test_focus_box_refuses_bad_input():
    for box, margin in (([0, 0, 11, 5], 64), ([3, 3, 3, 5], 64), ([-1, 0, 5, 5], 64), ([0, 0, 5, 5], -1)):
        with pytest.raises(RefineError):
            focus.focus_box(np.array(box), 10, 10, margin)


@few
@given(st.integers(1, 5000), st.integers(1, 5000), st.sampled_from([384**2, 1024**2, 256**2]))
def test_bucket_size_equals_diffusers(width, height, area):
    from diffusers.pipelines.qwenimage.pipeline_qwenimage_edit_plus import calculate_dimensions

    want = calculate_dimensions(area, width / height)
    if min(want) > 0:  # diffusers rounds a side of an extreme ratio to 0
        assert focus.bucket_size(area, width / height) == want[::-1]
    assert min(focus.bucket_size(area, width / height)) >= 32


@few
@given(st.floats(1 / 3, 3), st.sampled_from([(1024**2, 32), (384**2, 32), (96**2, 16)]))
def test_aspect_buckets_hold_every_reachable_size(ratio, rule):
    buckets = focus.aspect_buckets(*rule, max_ratio=3)
    assert focus.bucket_size(rule[0], ratio, rule[1]) in buckets
    assert len(buckets) == len(set(buckets)) < 80
    assert {(w, h) for h, w in buckets} == set(buckets)


# ------------------------------------------------------------------------------------------------------- resampling


def pil_resize(image, size, method):
    """`Image.resize` to (w, h), the x pass first whatever the version: since 13, Pillow chooses the order by cost."""
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    return image.resize((size[0], image.height), method).resize(size, method)


def worst_and_share(got, want):
    difference = np.abs(np.asarray(got, np.int64) - np.asarray(want, np.int64))
    return difference.max(initial=0), (difference > 0).mean() if difference.size else 0.0


@few
@given(box=boxes(), seed=seeds)
def test_resample_nearest_equals_pillow(box, seed):
    image = rgb(seed)
    want = np.asarray(Image.fromarray(in_box(image, box)).resize(CROP[::-1], Image.NEAREST))
    # A centre that is a whole number lies between two pixels: Pillow's accumulated rounding takes either.
    clear = [(2 * np.arange(n) + 1) * (high - low) % (2 * n) != 0 for n, low, high in zip(CROP, box[1::-1], box[:1:-1])]
    clear = clear[0][:, None] & clear[1][None, :]
    np.testing.assert_array_equal(np.asarray(resample(image, box, CROP, "nearest"))[clear], want[clear])


@pytest.mark.parametrize("method", ["bilinear", "bicubic", "lanczos"])
@few
@given(box=boxes(), seed=seeds, smooth=st.booleans())
def test_resample_equals_pillow_crop_then_resize(method, box, seed, smooth):
    image = rgb(seed, smooth=smooth)
    want = np.asarray(pil_resize(in_box(image, box), CROP[::-1], PIL[method]))
    got = resample(image, box, CROP, method, quantize=True)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("method", ["bilinear", "bicubic", "lanczos"])
@few
@given(seed=seeds, edges=st.tuples(*[st.floats(0, 1)] * 4))
def test_resample_equals_pillow_with_float_boxes(method, seed, edges):
    """Float boxes and samples from beyond the box; Pillow's float mode, so no rounding hides an error."""
    image = rgb(seed)[..., 0]
    h, w = image.shape
    x, y = sorted(edges[:2]), sorted(edges[2:])
    box = np.array([x[0] * (w - 2), y[0] * (h - 2), x[1] * (w - 2) + 2, y[1] * (h - 2) + 2], np.float32)
    want = Image.fromarray(image.astype(np.float32)).resize(CROP[::-1], PIL[method], box=tuple(box.tolist()))
    got = resample(image, box, CROP, method, within=np.array([0, 0, w, h], np.int32))
    np.testing.assert_allclose(got, np.asarray(want), atol=0.02)


@few
@given(box=boxes(), seed=seeds)
def test_resample_in_float_equals_pillow_in_float(box, seed):
    image = rgb(seed)[..., 0].astype(np.float32)
    want = Image.fromarray(image).crop(tuple(box.tolist())).resize(CROP[::-1], Image.LANCZOS)
    np.testing.assert_allclose(resample(image, box, CROP, "lanczos"), np.asarray(want), atol=1e-3)


def test_resample_box_equals_pillow_means():
    image = rgb(0, (64, 96))
    want = np.asarray(pil_resize(image, CROP[::-1], Image.BOX))
    np.testing.assert_array_equal(resample(image, None, CROP, "box", quantize=True), want)
    means = image.reshape(32, 2, 48, 2, 3).mean((1, 3))
    np.testing.assert_allclose(resample(image, None, CROP, "box"), means, atol=1e-4)


def test_resample_large_equals_pillow():
    """The size of real work, cut to one channel: a 2048² canvas to 1024²."""
    image = np.asarray(Image.fromarray(rgb(0, (64, 64))).resize((2048, 2048), Image.BICUBIC))[..., 0]
    image = np.clip(image + np.random.default_rng(1).normal(0, 20, image.shape), 0, 255).astype(np.uint8)
    box = np.array([37, 101, 1901, 2041], np.int32)
    want = np.asarray(pil_resize(in_box(image, box), (1024, 1024), Image.LANCZOS))
    worst, share = worst_and_share(resample(image, box, (1024, 1024), "lanczos", quantize=True), want)
    assert worst <= 1 and share <= 1e-5


@few
@given(box=boxes(), seed=seeds)
def test_place_equals_pillow_and_is_zero_outside(box, seed):
    crop = rgb(seed, CROP)
    x1, y1, x2, y2 = box.tolist()
    want = np.zeros((*CANVAS, 3), np.uint8)
    want[y1:y2, x1:x2] = np.asarray(pil_resize(crop, (x2 - x1, y2 - y1), Image.BICUBIC))
    np.testing.assert_array_equal(place(crop, box, CANVAS, "bicubic", quantize=True), want)


def test_identity_resampling_changes_nothing():
    image = rgb(3, CROP)
    for method in PIL:
        np.testing.assert_array_equal(resample(image, None, CROP, method, quantize=True), image)


def test_resample_without_antialias_interpolates():
    image = np.arange(64, dtype=np.float32)[None, :].repeat(4, 0)
    got = resample(image, None, (4, 8), "bilinear", antialias=False)
    np.testing.assert_allclose(got[0], np.arange(8) * 8 + 3.5)


def test_unknown_method_is_refused():
    with pytest.raises(RefineError, match="hamming"):
        focus.resample(np.zeros((4, 4)), None, (2, 2), "hamming")


# ------------------------------------------------------------------------------------------------ morphology and blur


def in_box(array, box):
    x1, y1, x2, y2 = box.tolist()
    return np.asarray(array)[y1:y2, x1:x2]


def framed(inner, box, canvas=CANVAS):
    out = np.zeros(canvas, np.asarray(inner).dtype)
    in_box(out, box)[...] = inner
    return out


@pytest.mark.parametrize("radius", [1, 3, 8])
@few
@given(mask=masks(), box=boxes())
def test_dilate_and_erode_equal_pillow_on_the_crop(radius, mask, box):
    crop = Image.fromarray(in_box(mask, box))
    size = 2 * radius + 1
    np.testing.assert_array_equal(dilate(mask, radius, box), framed(crop.filter(ImageFilter.MaxFilter(size)), box))
    np.testing.assert_array_equal(erode(mask, radius, box), framed(crop.filter(ImageFilter.MinFilter(size)), box))


def test_dilate_and_erode_on_bool_batches_without_a_box():
    mask = np.random.default_rng(0).random((2, 20, 30)) < 0.5
    for ours, filter_type in ((focus.dilate, ImageFilter.MaxFilter), (focus.erode, ImageFilter.MinFilter)):
        got = ours(mask, 1)
        assert got.dtype == bool
        for item, want in zip(got, mask):
            image = Image.fromarray(want.astype(np.uint8) * 255).filter(filter_type(3))
            np.testing.assert_array_equal(item, np.asarray(image) > 0)


@pytest.mark.parametrize("radius", [0.4, 1.0, 5.0, 12.3])
@few
@given(mask=masks(), box=boxes())
def test_pil_gaussian_blur_is_pillows_own(radius, mask, box):
    want = Image.fromarray(in_box(mask, box)).filter(ImageFilter.GaussianBlur(radius))
    np.testing.assert_array_equal(pil_blur(mask, radius, box), framed(want, box))


def test_gaussian_blur_equals_scipy():
    from scipy import ndimage

    x = np.random.default_rng(0).random((30, 40)).astype(np.float32)
    box = np.array([5, 4, 33, 27], np.int32)
    want = framed(ndimage.gaussian_filter(in_box(x, box), 2.0, mode="nearest", radius=5), box, x.shape)
    got = jax.jit(focus.gaussian_blur, static_argnums=(1, 2))(x, 2.0, 11, box)
    np.testing.assert_allclose(got, want, atol=1e-6)


@few
@given(mask=masks(), box=boxes())
def test_feather_released_equals_the_released_filters(mask, box):
    crop = Image.fromarray(in_box(mask, box))
    want = crop.filter(ImageFilter.MaxFilter(7)).filter(ImageFilter.GaussianBlur(5.0))
    np.testing.assert_array_equal(np.round(feather(mask, box) * 255), framed(want, box))


@few
@given(mask=masks(), box=boxes())
def test_feather_paper_reaches_eight_pixels_and_no_further(mask, box):
    alpha = np.asarray(feather(mask, box, "paper"))
    reach = framed(Image.fromarray(in_box(mask, box)).filter(ImageFilter.MaxFilter(2 * (3 + 5) + 1)), box) > 0
    np.testing.assert_array_equal(alpha > 0, reach)
    assert alpha.max(initial=0) <= 1


def test_feather_of_bool_is_that_of_255_and_of_nothing_is_zero():
    mask = np.zeros(CANVAS, bool)
    box = np.array([2, 2, 50, 40], np.int32)
    for style in ("released", "paper"):
        assert not np.any(feather(mask.astype(np.uint8), box, style))
        assert not np.any(feather(mask.astype(np.uint8) + 9, np.zeros(4, np.int32), style))
    mask[10:20, 10:30] = True
    np.testing.assert_array_equal(feather(mask, box), feather(mask.astype(np.uint8) * 255, box))
    with pytest.raises(RefineError, match="style"):
        focus.feather(mask, box, "hard")


# ---------------------------------------------------------------------------------------------------------- paste-back


def released_paste(original, refined, box, mask):
    """What the released code does, in Pillow and NumPy: filters on the cropped mask, bicubic, blend in float32."""
    crop = Image.fromarray(in_box(mask, box))
    alpha = crop.filter(ImageFilter.MaxFilter(7)).filter(ImageFilter.GaussianBlur(5.0))
    alpha = np.asarray(alpha, np.float32)[..., None] / np.float32(255)
    source = np.asarray(pil_resize(refined, crop.size, Image.BICUBIC), np.float32)
    mixed = source * alpha + in_box(original, box).astype(np.float32) * (1 - alpha)
    out = original.copy()
    in_box(out, box)[...] = np.clip(mixed + 0.5, 0, 255).astype(np.uint8)
    return out, framed(alpha[..., 0], box, original.shape[:2])


@few
@given(mask=masks(), box=boxes(), seed=seeds)
def test_paste_back_equals_the_released_code_and_keeps_the_background(mask, box, seed):
    original, refined = rgb(seed), rgb(seed + 1, CROP)
    want, alpha = released_paste(original, refined, box, mask)
    got = np.asarray(paste_back(original, refined, box, mask))
    worst, share = worst_and_share(got, want)
    assert got.dtype == np.uint8 and worst <= 1 and share <= 2e-3
    np.testing.assert_array_equal(got[alpha == 0], original[alpha == 0])
    floats = refined + np.random.default_rng(seed).uniform(-0.49, 0.49, refined.shape)
    np.testing.assert_array_equal(paste_back(original, floats.astype(np.float32), box, mask), got)


@few
@given(mask=masks(), box=boxes(), seed=seeds)
def test_paste_back_in_the_papers_style_keeps_the_background(mask, box, seed):
    original, refined = rgb(seed), rgb(seed + 1, CROP)
    alpha = np.asarray(feather(mask, box, "paper"))
    got = np.asarray(paste_back(original, refined, box, mask, "paper"))
    np.testing.assert_array_equal(got[alpha == 0], original[alpha == 0])
    full = np.asarray(place(refined, box, CANVAS, "bicubic", quantize=True))
    want = np.floor(full * alpha[..., None] + original * (1 - alpha[..., None]) + 0.5)
    assert worst_and_share(got, np.clip(want, 0, 255))[0] <= 1


def test_paste_back_without_a_refined_pixel_returns_the_original():
    original, refined = rgb(0), rgb(1, CROP)
    box = np.array([0, 0, CANVAS[1], CANVAS[0]], np.int32)
    np.testing.assert_array_equal(paste_back(original, refined, box, np.zeros(CANVAS, np.uint8)), original)


@few
@given(mask=masks(40, 50), seed=seeds)
def test_a_padded_canvas_changes_nothing(mask, seed):
    """One image in two canvases, the spare part filled with garbage (the mask's with zeros): the same bits."""
    image, refined = rgb(seed, (40, 50)), rgb(seed + 1, CROP)
    box = focus.focus_box(focus.mask_box(mask)[0], 50, 40, margin=100)
    large, large_mask = to_canvas(image), to_canvas(mask, fill=0)
    for style in ("released", "paper"):
        small_out = paste_back(image, refined, box, mask, style)
        large_out = np.asarray(paste_back(large, refined, box, large_mask, style))
        np.testing.assert_array_equal(large_out[:40, :50], small_out)
        np.testing.assert_array_equal(large_out[40:], large[40:])
        np.testing.assert_array_equal(large_out[:, 50:], large[:, 50:])
    np.testing.assert_allclose(
        resample(image, box, CROP, "bicubic"), resample(large, box, CROP, "bicubic"), rtol=1e-5, atol=255e-5
    )


def test_jitted_equals_unjitted():
    box = np.array([7, 3, 40, 50], np.int32)
    for got, want in (
        (resample(rgb(0), box, CROP, "bicubic", quantize=True), focus.resample(rgb(0), box, CROP, quantize=True)),
        (feather(rgb(0)[..., 0], box), focus.feather(rgb(0)[..., 0], box)),
    ):
        np.testing.assert_array_equal(got, want)


def test_vmapped_equals_one_by_one():
    rng = np.random.default_rng(0)
    originals, refined = np.stack([rgb(i) for i in range(3)]), np.stack([rgb(9 + i, CROP) for i in range(3)])
    mask = (rng.random((3, *CANVAS)) < 0.01).astype(np.uint8) * 255
    box = np.array([[0, 0, 72, 56], [7, 3, 40, 50], [30, 20, 31, 21]], np.int32)

    def both(original, refined, box, mask):
        crop = focus.resample(original, box, CROP, "lanczos", quantize=True)
        return crop, focus.paste_back(original, refined, box, mask)

    crops, pasted = jax.jit(jax.vmap(both))(originals, refined, box, mask)
    jitted = jax.jit(both)
    for i in range(3):
        crop, paste = jitted(originals[i], refined[i], box[i], mask[i])
        np.testing.assert_array_equal(crops[i], crop)
        np.testing.assert_array_equal(pasted[i], paste)
        background = np.asarray(feather(mask[i], box[i])) == 0
        np.testing.assert_array_equal(np.asarray(pasted[i])[background], originals[i][background])
