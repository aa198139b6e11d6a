"""Picture files in every condition: read as a user means them, or refused in one line that names the file."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from refine_jax import images
from refine_jax.errors import RefineError
from refine_jax.images import box_mask, check_output, read_mask, read_picture, region_masks, save_picture


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def refused(error: pytest.ExceptionInfo, *words: str) -> None:
    """One line, and it holds the words."""
    message = str(error.value)
    assert "\n" not in message and message
    for word in words:
        assert word in message, message


def swapped_profile() -> bytes:
    """An RGB profile that is far from sRGB: red and green change places (in the matrix columns of the built-in one)."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    count = struct.unpack(">I", data[128:132])[0]
    entries = {bytes(data[132 + 12 * k : 136 + 12 * k]): 136 + 12 * k for k in range(count)}
    red, green = entries[b"rXYZ"], entries[b"gXYZ"]
    data[red : red + 8], data[green : green + 8] = data[green : green + 8], data[red : red + 8]
    return bytes(data)


# ----------------------------------------------------------------------------------------------------- modes and depths


@pytest.mark.parametrize(
    "mode,out", [("RGB", "RGB"), ("RGBA", "RGBA"), ("L", "L"), ("LA", "LA"), ("1", "L"), ("P", "RGB")]
)
def test_png_modes_return_bit_for_bit(tmp_path, mode, out):
    source = Image.fromarray(noise(1, 9, 13, 4)).convert("RGB" if mode == "P" else "RGBA").convert(mode)
    source.save(tmp_path / "in.png")
    picture = read_picture(tmp_path / "in.png")
    assert picture.size == (13, 9) and picture.rgb.dtype == np.uint8 and picture.rgb.shape == (9, 13, 3)
    result = picture.with_rgb(picture.rgb)
    assert result.mode == out and result.size == source.size
    save_picture(result, tmp_path / "out.png")
    with Image.open(tmp_path / "out.png") as written:
        assert written.mode == out
        np.testing.assert_array_equal(np.asarray(written), np.asarray(source.convert(out)))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.png", "out.png"]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 255))
def test_luma_of_equal_channels_is_their_value(value):
    grey = read_picture(np.full((2, 3), value, np.uint8))
    assert grey.grey and (np.asarray(grey.with_rgb(grey.rgb)) == value).all()


@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif", ".tiff"])
def test_alpha_survives_each_lossless_format(tmp_path, suffix):
    pixels = noise(2, 7, 8, 4)
    pixels[0] = (200, 100, 50, 0)  # colour below full transparency stays too
    picture = read_picture(pixels)
    save_picture(picture.with_rgb(picture.rgb), tmp_path / f"out{suffix}")
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / f"out{suffix}")), pixels)


def test_sixteen_bits(tmp_path):
    values = np.random.default_rng(3).integers(0, 65_536, (6, 5), dtype=np.uint16)
    for name in ("grey.png", "grey.tif"):
        Image.fromarray(values).save(tmp_path / name)
        picture = read_picture(tmp_path / name)
        assert picture.grey
        np.testing.assert_array_equal(picture.rgb, np.repeat((values >> 8)[..., None], 3, -1))
    wide = np.array([[0, 1000, 65_535]], np.int32)
    np.testing.assert_array_equal(read_picture(Image.fromarray(wide)).rgb[0, :, 0], wide[0] >> 8)
    np.testing.assert_array_equal(read_picture(Image.fromarray(wide // 300)).rgb[0, :, 0], wide[0] // 300)
    np.testing.assert_array_equal(read_picture(Image.fromarray(wide << 15)).rgb[0, :, 0], (wide << 15)[0] >> 23)


def rgb48_png(values: np.ndarray) -> bytes:
    """A PNG of `[H, W, 3] uint16`, which Pillow reads and does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_forty_eight_bit_colour(tmp_path):
    values = np.random.default_rng(4).integers(0, 65_536, (5, 4, 3), dtype=np.uint16)
    (tmp_path / "deep.png").write_bytes(rgb48_png(values))
    np.testing.assert_array_equal(read_picture(tmp_path / "deep.png").rgb, values >> 8)


def test_float_greys():
    image = Image.fromarray(np.array([[0.0, 0.5, 1.0, np.nan]], np.float32))
    np.testing.assert_array_equal(read_picture(image).rgb[0, :, 0], [0, 128, 255, 0])
    image = Image.fromarray(np.array([[0.0, 100.4, 300.0, -np.inf]], np.float32))
    np.testing.assert_array_equal(read_picture(image).rgb[0, :, 0], [0, 100, 255, 0])


def test_palette_with_transparency(tmp_path):
    image = Image.new("P", (3, 1))
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    image.putdata([0, 1, 2])
    image.save(tmp_path / "p.png", transparency=bytes([255, 128, 0]))
    picture = read_picture(tmp_path / "p.png")
    np.testing.assert_array_equal(picture.rgb[0], [[255, 0, 0], [0, 255, 0], [0, 0, 255]])
    np.testing.assert_array_equal(picture.alpha[0], [255, 128, 0])
    assert picture.with_rgb(picture.rgb).mode == "RGBA"


def test_a_transparent_colour_is_alpha(tmp_path):
    pixels = np.zeros((1, 2, 3), np.uint8)
    pixels[0, 1] = 9
    Image.fromarray(pixels).save(tmp_path / "key.png", transparency=(9, 9, 9))
    np.testing.assert_array_equal(read_picture(tmp_path / "key.png").alpha[0], [255, 0])


def test_cmyk_jpeg_with_and_without_profile(tmp_path):
    image = Image.new("CMYK", (16, 16), (0, 255, 255, 0))
    image.save(tmp_path / "plain.jpg", quality=95)
    picture = read_picture(tmp_path / "plain.jpg")
    assert abs(picture.rgb.astype(int) - (255, 0, 0)).max() <= 3 and picture.alpha is None
    # A profile of another colour space than the picture's cannot be used, and does not hinder.
    image.save(tmp_path / "foreign.jpg", quality=95, icc_profile=swapped_profile())
    np.testing.assert_array_equal(read_picture(tmp_path / "foreign.jpg").rgb, picture.rgb)


def test_lab_is_converted():
    white = Image.frombytes("LAB", (1, 1), bytes([255, 0, 0]))
    assert read_picture(white).rgb.min() >= 250


# ------------------------------------------------------------------------------------------------------ colour profiles


def test_srgb_profile_changes_nothing(tmp_path):
    pixels = noise(5, 40, 40, 3)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(pixels).save(tmp_path / "s.png", icc_profile=profile)
    np.testing.assert_array_equal(read_picture(tmp_path / "s.png").rgb, pixels)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P"])
def test_other_profiles_are_converted_to_srgb(tmp_path, mode):
    image = Image.new("RGB", (4, 4), (200, 40, 40)).convert(mode)
    if mode == "RGBA":
        image.putalpha(77)
    image.save(tmp_path / "s.png", icc_profile=swapped_profile())
    picture = read_picture(tmp_path / "s.png")
    red, green, _ = picture.rgb[0, 0].astype(int)
    assert green > red + 80
    assert (picture.alpha == 77).all() if mode == "RGBA" else picture.alpha is None
    assert "icc_profile" not in picture.with_rgb(picture.rgb).info


def test_broken_profile_is_ignored(tmp_path):
    pixels = noise(6, 4, 4, 3)
    Image.fromarray(pixels).save(tmp_path / "s.png", icc_profile=b"no profile at all")
    np.testing.assert_array_equal(read_picture(tmp_path / "s.png").rgb, pixels)


# ---------------------------------------------------------------------------------------------------------- orientation


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "tif", "webp"])
def test_exif_rotation(tmp_path, orientation, suffix):
    raw = np.zeros((24, 40, 3), np.uint8)
    raw[:12, :20] = (250, 10, 10)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(raw).save(tmp_path / f"r.{suffix}", exif=exif)
    picture = read_picture(tmp_path / f"r.{suffix}")
    turns = {1: raw, 2: raw[:, ::-1], 3: raw[::-1, ::-1], 4: raw[::-1], 5: raw.swapaxes(0, 1)}
    turns |= {6: np.rot90(raw, -1), 7: np.rot90(raw.swapaxes(0, 1), 2), 8: np.rot90(raw)}
    assert picture.rgb.shape == turns[orientation].shape
    assert abs(picture.rgb.astype(int) - turns[orientation].astype(int)).mean() < 8


def test_mask_lies_on_the_upright_picture_and_turns_by_its_own_exif(tmp_path):
    drawn = np.zeros((6, 4), np.uint8)
    drawn[1, 2] = 255
    Image.fromarray(drawn).save(tmp_path / "m.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "m.png", (4, 6)), drawn)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.rot90(drawn)).save(tmp_path / "t.png", exif=exif)
    np.testing.assert_array_equal(read_mask(tmp_path / "t.png", (4, 6)), drawn)


def test_damaged_exif_is_ignored(tmp_path):
    pixels = noise(7, 8, 8, 3)
    Image.fromarray(pixels).save(tmp_path / "e.png", exif=b"Exif\0\0II*\0\xff\xff\xff\xff garbage")
    np.testing.assert_array_equal(read_picture(tmp_path / "e.png").rgb, pixels)


# ----------------------------------------------------------------------------------------------------------- animations


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_first_frame_of_an_animation(tmp_path, suffix):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    lossless = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], duration=50, **lossless)
    np.testing.assert_array_equal(read_picture(tmp_path / f"a.{suffix}").rgb[3, 3], [255, 0, 0])


# ------------------------------------------------------------------------------------------------------ what is refused


def bomb() -> bytes:
    """A few bytes of PNG whose header declares 60000 x 60000 pixels."""
    data = rgb48_png(np.zeros((1, 1, 3), np.uint16))
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    return data[:16] + header + struct.pack(">I", zlib.crc32(b"IHDR" + header)) + data[33:]


def whole_png() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(noise(8, 64, 64, 3)).save(buffer, "PNG")
    return buffer.getvalue()


BAD_FILES = {
    "empty.png": (b"", "not a picture"),
    "text.png": (b"this is no picture\n" * 20, "not a picture"),
    "half.png": (whole_png()[: len(whole_png()) // 2], "damaged or truncated"),
    "header.png": (whole_png()[:30], ""),
    "bomb.png": (bomb(), "scale it down"),
    "script.eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\nshowpage\n", "not a picture"),
}


@pytest.mark.parametrize("name", BAD_FILES)
@pytest.mark.parametrize("reader", ["picture", "mask"])
def test_bad_files(tmp_path, name, reader):
    data, word = BAD_FILES[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(RefineError) as error, warnings.catch_warnings():
        warnings.simplefilter("error")
        read_picture(tmp_path / name) if reader == "picture" else read_mask(tmp_path / name, (64, 64))
    refused(error, name, word)


def test_missing_file_folder_and_odd_sources(tmp_path):
    for source, words in [
        (tmp_path / "none.png", ("none.png", "no such file")),
        (tmp_path, (str(tmp_path), "folder")),
        ("a\0b.png", ("damaged",)),
        (17, ("int",)),
        (None, ("NoneType",)),
        (np.zeros((4, 4, 3), np.float32), ("float32", "uint8")),
        (np.full((4, 4, 3), np.nan), ("float64",)),
        (np.zeros((4, 4, 2), np.uint8), ("(4, 4, 2)",)),
        (np.zeros((0, 4, 3), np.uint8), ("no pixel",)),
        (np.zeros((4,), np.uint8), ("(4,)",)),
        (np.zeros((1, images.MAX_SIDE + 1), np.uint8), ("scale it down",)),
    ]:
        with pytest.raises(RefineError) as error:
            read_picture(source)
        refused(error, *words)


def test_a_truncated_open_pil_image_is_refused_too(tmp_path):
    (tmp_path / "half.png").write_bytes(BAD_FILES["half.png"][0])
    for read in (read_picture, lambda image: read_mask(image, (64, 64))):
        with pytest.raises(RefineError) as error, Image.open(tmp_path / "half.png") as image:
            read(image)
        refused(error, "damaged")


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    image = Image.fromarray(noise(9, 24, 20, 3))
    if kind == "GIF":
        image.save(buffer, kind, save_all=True, append_images=[image.rotate(90)])
    elif kind == "TIFF":
        image.save(buffer, kind, compression="tiff_lzw")
    else:
        image.save(buffer, kind)
    return buffer.getvalue()


ENCODED = {kind: encoded(kind) for kind in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "ICO", "PPM", "JPEG2000")}


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_damaged_bytes_give_a_picture_or_one_line(tmp_path_factory, data):
    content = bytearray(ENCODED[data.draw(st.sampled_from(sorted(ENCODED)))])
    for _ in range(data.draw(st.integers(0, 6))):
        content[data.draw(st.integers(0, min(len(content) - 1, 120)))] = data.draw(st.integers(0, 255))
    content = content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content
    path = tmp_path_factory.getbasetemp() / "fuzz.bin"
    path.write_bytes(content)
    for read in (read_picture, lambda source: read_mask(source, (5, 6))):
        try:
            read(path)
        except RefineError as error:
            assert "\n" not in str(error) and "fuzz.bin" in str(error)


def test_one_pixel():
    picture = read_picture(np.array([[[1, 2, 3]]], np.uint8))
    assert picture.size == (1, 1)
    assert read_mask(np.ones((1, 1), bool), (1, 1)).shape == (1, 1)


def test_the_callers_image_is_left_alone():
    image = Image.fromarray(noise(10, 4, 4, 4))
    before = image.tobytes()
    read_picture(image)
    read_mask(image, (9, 9))
    assert image.mode == "RGBA" and image.tobytes() == before


# ---------------------------------------------------------------------------------------------------------------- masks


def test_mask_of_another_size_is_resized_to_the_nearest_pixel():
    mask = np.zeros((4, 6), np.uint8)
    mask[1:3, 2:4] = 255
    np.testing.assert_array_equal(read_mask(mask, (12, 8)), mask.repeat(2, 0).repeat(2, 1))


@pytest.mark.parametrize("size", [(3024, 4032), (1512, 2016), (1000, 1333), (1000, 1334), (7, 9), (756, 1008)])
def test_a_mask_of_the_pictures_shape_may_have_another_size(size):
    assert read_mask(np.ones(size[::-1], bool), (3024, 4032)).shape == (4032, 3024)


@pytest.mark.parametrize(
    "size, remedy", [((4032, 3024), "EXIF"), ((1000, 1000), "as it is shown"), ((97, 120), "shown")]
)
def test_a_mask_of_another_shape_would_mark_another_place(size, remedy):
    with pytest.raises(RefineError) as error:
        read_mask(np.ones(size[::-1], bool), (3024, 4032))
    refused(error, "mask", f"{size[0]}x{size[1]} pixels, the picture has 3024x4032", remedy)


@pytest.mark.parametrize("source", [np.zeros((5, 5), np.uint8), np.zeros((5, 5), bool), np.zeros((5, 5, 4), np.uint8)])
def test_empty_mask(source):
    with pytest.raises(RefineError) as error:
        read_mask(source, (5, 5))
    refused(error, "mask", "empty", "white")


def test_a_mask_that_vanishes_when_resized_says_so():
    mask = np.zeros((100, 100), np.uint8)
    mask[0, 0] = 255
    with pytest.raises(RefineError) as error:
        read_mask(mask, (10, 10))
    refused(error, "100x100", "10x10")


def test_grey_masks_keep_their_softness_and_dark_ones_are_scaled_up():
    np.testing.assert_array_equal(read_mask(np.array([[0, 1, 128, 255]], np.uint8), (4, 1)), [[0, 1, 128, 255]])
    np.testing.assert_array_equal(read_mask(np.array([[0, 1]], np.uint8), (2, 1)), [[0, 255]])
    np.testing.assert_array_equal(read_mask(np.array([[0, 1, 2]], np.uint8), (3, 1)), [[0, 128, 255]])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 255), min_size=1, max_size=40).filter(any))
def test_a_mask_marks_exactly_the_non_zero_pixels(values):
    mask = read_mask(np.array([values], np.uint8), (len(values), 1))
    assert mask.dtype == np.uint8 and mask.max() == 255
    np.testing.assert_array_equal(mask[0] > 0, np.array(values) > 0)


@pytest.mark.parametrize("dtype", [bool, np.int64, np.float32, np.uint16])
def test_mask_arrays_of_any_dtype(dtype):
    np.testing.assert_array_equal(read_mask(np.array([[0, 1, 1]]).astype(dtype), (3, 1)), [[0, 255, 255]])


def test_mask_arrays_that_hold_no_numbers():
    for array in (np.array([[np.nan, 1.0]]), np.array([["a", "b"]]), np.array([[1j]])):
        with pytest.raises(RefineError) as error:
            read_mask(array, (2, 1))
        refused(error, "mask")


def test_strokes_of_several_colours_on_a_transparent_sheet_count_alike():
    sheet = np.zeros((1, 5, 4), np.uint8)
    sheet[0, :3] = [(255, 255, 255, 255), (255, 0, 0, 255), (0, 0, 0, 255)]
    sheet[0, 3] = (0, 90, 0, 128)
    sheet = np.pad(sheet, ((0, 0), (0, 2), (0, 0)))  # more is transparent than black
    np.testing.assert_array_equal(read_mask(sheet, (7, 1)), [[255, 255, 255, 128, 0, 0, 0]])


@pytest.mark.parametrize("white", [(255, 255, 255), (255, 255, 254), (255, 0, 0)])
def test_a_black_mask_with_a_transparent_pixel_is_no_sheet(white):
    mask = np.zeros((10, 10, 4), np.uint8)
    mask[..., 3] = 255
    mask[2:4, 2:4, :3] = white
    mask[0, 0] = 0
    found = read_mask(mask, (10, 10))
    assert (found > 0).sum() == 4 and (found[2:4, 2:4] == 255).all()


def test_masks_painted_on_a_transparent_sheet():
    region = np.zeros((4, 5), np.uint8)
    region[1:3, 1:4] = 255
    for colour in (255, 0, 90):  # white, black, grey paint
        sheet = np.dstack([np.full((4, 5, 3), colour, np.uint8) * (region[..., None] > 0), region])
        np.testing.assert_array_equal(read_mask(sheet, (5, 4)), region)
    # The same with the colour below the transparent part kept, as some programs do.
    np.testing.assert_array_equal(read_mask(np.dstack([np.full((4, 5, 3), 255, np.uint8), region]), (5, 4)), region)
    # A soft brush.
    soft = np.dstack([np.full((1, 3, 3), 255, np.uint8), np.array([[0, 100, 255]], np.uint8)])
    np.testing.assert_array_equal(read_mask(soft, (3, 1)), [[0, 100, 255]])


def test_masks_of_other_kinds(tmp_path):
    region = np.zeros((6, 6), np.uint8)
    region[2:4, 1:5] = 255
    white = Image.fromarray(region)
    palette = Image.fromarray((region // 255).astype(np.uint8), "P")
    palette.putpalette([0, 0, 0, 128, 0, 0])
    kinds = {"bilevel.png": white.convert("1"), "palette.png": palette, "rgb.png": white.convert("RGB")}
    kinds |= {"deep.png": Image.fromarray(region.astype(np.uint16) * 257), "scan.bmp": white}
    for most in (1, 3, 255, 256, 60_000):  # labels
        kinds[f"{most}.png"] = Image.fromarray((region // 255).astype(np.uint16) * most)
    kinds["float.tiff"] = Image.fromarray((region / 255).astype(np.float32))
    for name, image in kinds.items():
        image.save(tmp_path / name)
        np.testing.assert_array_equal(read_mask(tmp_path / name, (6, 6)), region, err_msg=name)


# ---------------------------------------------------------------------------------------------------------------- boxes


@pytest.mark.parametrize("dtype", [int, np.int32, np.float32])
def test_boxes_as_an_array(dtype):
    boxes = np.array([[1, 2, 4, 5], [0, 0, 10, 8], [3, 3, 4, 4]], dtype)
    for found, box in zip(region_masks(boxes, (10, 8)), boxes.tolist(), strict=True):
        np.testing.assert_array_equal(found, box_mask(box, (10, 8)))
    # A picture of that shape has masks of that shape.
    (mask,) = region_masks(np.array([[0, 0, 1, 1]] * 3, dtype), (4, 3))
    np.testing.assert_array_equal(mask, [[0, 0, 255, 255]] * 3)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(-3, 12), min_size=4, max_size=4))
def test_box_masks(box):
    x1, y1, x2, y2 = box
    if 0 <= x1 < x2 <= 10 and 0 <= y1 < y2 <= 8:
        mask = box_mask(box, (10, 8))
        assert mask[y1:y2, x1:x2].all() and mask.sum() == 255 * (x2 - x1) * (y2 - y1)
    else:
        with pytest.raises(RefineError) as error:
            box_mask(box, (10, 8))
        refused(error, "box", ",".join(map(str, box)))


@pytest.mark.parametrize("box", [(0, 0, 1), "abcd", (0, 0, 1.5, 2), (0, 0, np.nan, 2), (0, 0, np.inf, 2), 7, None])
def test_boxes_that_are_none(box):
    with pytest.raises(RefineError) as error:
        box_mask(box, (10, 8))
    refused(error, "box", "four whole numbers")


# -------------------------------------------------------------------------------------------------------------- writing


def test_check_output(tmp_path):
    (tmp_path / "folder.png").mkdir()
    for path, words in [
        (tmp_path / "x.txt", ("unknown suffix", ".png")),
        (tmp_path / "x", ("unknown suffix",)),
        (tmp_path / "missing" / "x.png", ("does not exist",)),
        (tmp_path / "folder.png", ("is a folder",)),
        (tmp_path / ("n" * 300 + ".png"), ("cannot be written",)),
        (tmp_path / "a\0.png", ("cannot be written",)),
        ("/proc/x.png", ("/proc/x.png",)),  # where nobody may write, not even root
    ]:
        with pytest.raises(RefineError) as error:
            check_output(path)
        refused(error, *words)
    with pytest.raises(RefineError) as error:
        check_output(tmp_path / "x.jpg", alpha=True)
    refused(error, "alpha", ".png")
    check_output(tmp_path / "x.png", alpha=True)
    check_output(tmp_path / "X.JPEG")
    assert [p.name for p in tmp_path.iterdir()] == ["folder.png"]


def test_saving_leaves_nothing_half_written(tmp_path, monkeypatch):
    target = tmp_path / "x.png"
    target.write_bytes(b"what was there")

    def full(self, path, **kwargs):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(RefineError) as error:
        save_picture(Image.new("RGB", (2, 2)), target)
    refused(error, "x.png", "No space left")
    assert target.read_bytes() == b"what was there" and [p.name for p in tmp_path.iterdir()] == ["x.png"]


def test_saving_through_a_link_keeps_the_link(tmp_path):
    (tmp_path / "link.png").symlink_to(tmp_path / "real.png")
    save_picture(Image.new("RGB", (2, 2), "red"), tmp_path / "link.png")
    assert (tmp_path / "link.png").is_symlink() and Image.open(tmp_path / "real.png").size == (2, 2)


def test_jpeg_refuses_alpha_and_takes_the_rest(tmp_path):
    with pytest.raises(RefineError) as error:
        save_picture(Image.new("LA", (2, 2)), tmp_path / "x.jpg")
    refused(error, "alpha")
    for mode in ("RGB", "L"):
        save_picture(Image.new(mode, (2, 2)), tmp_path / f"{mode}.jpg")
        assert Image.open(tmp_path / f"{mode}.jpg").mode == mode
