"""The small world: statements, scenes, pictures, the checker that reads them, and scores."""

import functools
import io
import itertools
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter

from refine_jax.data import world
from refine_jax.data.world import Group, Item, Observation, Scene, Seen, Spec
from refine_jax.errors import RefineError

SEEDS = st.integers(0, 2**32 - 1)
quick = settings(max_examples=12, deadline=None, derandomize=True, database=None)


@functools.lru_cache(maxsize=4)
def pairs(seed: int, count: int, split: str = "train", **options) -> list[dict]:
    return [world.sample(seed, index, split, **options) for index in range(count)]


def item(shape="circle", colour="red", size="large", x=0.5, y=0.5, radius=0.135, angle=0.0, group=0) -> Item:
    return Item(shape, colour, size, group, x, y, radius, angle)


def wrong(scene: Scene, spec: Spec) -> tuple[str, ...]:
    """What fails in a scene's picture; the picture must be read as the scene is."""
    report = world.check(world.render(scene), spec)
    assert report.wrong == world.judge(world.observe(scene), spec).wrong
    return report.wrong


# ---------------------------------------------------------------------------------------------- clean pictures


@quick
@given(SEEDS, st.sampled_from(world.SPLITS))
def test_all_that_is_stated_holds_in_the_right_picture_and_exactly_the_faults_fail_in_the_wrong_one(seed, split):
    for pair in pairs(seed, 35, split):
        report = world.check(pair["image"], pair["spec"])
        assert report.correct and report.score == 1.0 and tuple(report.dimensions) == pair["dimensions"], pair["prompt"]
        report = world.check(pair["misaligned_image"], pair["spec"])
        assert report.wrong == pair["wrong"] and not report.correct, pair["prompt"]
        assert 1 <= len(pair["wrong"]) <= 3 and set(pair["wrong"]) <= set(pair["dimensions"])


@quick
@given(SEEDS)
def test_a_picture_is_read_as_its_scene_is(seed):
    made = pairs(seed, 12)
    specs = [pair["spec"] for pair in made]
    for pair in made:
        for scene, image in ((pair["scene"], pair["image"]), (pair["misaligned_scene"], pair["misaligned_image"])):
            seen, truth = world.read(image), world.observe(scene)
            assert seen.text == truth.text and len(seen.items) == len(truth.items)
            near = [min(seen.items, key=lambda s: math.hypot(s.x - t.x, s.y - t.y)) for t in truth.items]
            for found, expected in zip(near, truth.items):
                assert found[:3] == expected[:3]
                assert math.hypot(found.x - expected.x, found.y - expected.y) < 0.02
            # Statements about other pictures are judged alike, unless a position hangs by a pixel.
            for spec in specs:
                exact = [world.judge(truth, spec, slack).wrong for slack in (-0.02, 0.02)]
                if exact[0] == exact[1]:
                    assert world.judge(seen, spec).wrong == exact[0]


@quick
@given(SEEDS)
def test_letters_are_read_wherever_they_lie_between_pixels(seed):
    rng = np.random.default_rng(seed)
    for _ in range(12):
        text = "".join(rng.choice(list(world.LETTERS), rng.integers(1, 5)))
        x, y, cell = rng.uniform(0.04, 0.06), rng.uniform(0.04, 0.7), rng.uniform(0.031, 0.0385)
        scene = Scene((), text, "top", x, y, cell, seed=int(rng.integers(2**31)))
        assert world.read(world.render(scene)).text == text


TWO = Spec((Group(1, "red", "circle"), Group(1, "blue", "square")), relation="left")
RIGHT = Scene((item(x=0.25), item("square", "blue", x=0.75)), seed=5)


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ((item(x=0.25), item("square", "blue", x=0.75)), ()),
        ((item(x=0.75), item("square", "blue", x=0.25)), ("position",)),
        ((item(y=0.25), item("square", "blue", y=0.75)), ("position",)),
        # Mostly above, a little to the left: not to the left.
        ((item(x=0.4, y=0.2), item("square", "blue", x=0.6, y=0.75)), ("position",)),
        ((item("circle", "blue", x=0.25), item("square", "red", x=0.75)), ("colour",)),
        ((item("circle", "green", x=0.25), item("square", "blue", x=0.75)), ("colour",)),
        ((item("star", x=0.25), item("square", "blue", x=0.75)), ("shape",)),
        ((item(x=0.2, y=0.25), item(x=0.25, y=0.75), item("square", "blue", x=0.75)), ("count",)),
        ((item("heart", "green", x=0.25), item("square", "blue", x=0.75)), ("colour", "shape")),
        # The missing shape has no place either.
        ((item(x=0.25),), ("count", "colour", "shape", "position")),
        ((), ("count", "colour", "shape", "position")),
    ],
)
def test_two_groups(items, expected):
    assert wrong(Scene(items, seed=5), TWO) == expected


@pytest.mark.parametrize(
    ("scene", "spec", "expected"),
    [
        (RIGHT, Spec((Group(count=2),)), ()),
        (RIGHT, Spec((Group(count=3),)), ("count",)),
        (RIGHT, Spec((Group(colour="red"),)), ("colour",)),
        (RIGHT, Spec((Group(size="large"),)), ()),
        (RIGHT, Spec((Group(2, "red", "circle", "small"),)), ("colour", "shape", "size")),
        (RIGHT, Spec(place="left"), ("position",)),
        (Scene((item(),), seed=1), Spec((Group(1, "red"),), place="centre"), ()),
        (Scene((item(x=0.3, y=0.7),), seed=1), Spec((Group(1),), place="bottom left"), ()),
        (Scene((item(x=0.3, y=0.7),), seed=1), Spec((Group(1),), place="top left"), ("position",)),
        (Scene((), "CAT", "top", 0.1, 0.05, 0.035), Spec(text="CAT", text_place="top"), ()),
        (Scene((), "CAT", "bottom", 0.1, 0.7, 0.035), Spec(text="CAT", text_place="top"), ("position",)),
        (Scene((), "CAE", "top", 0.1, 0.05, 0.035), Spec(text="CAT", text_place="top"), ("text",)),
        (Scene((), "ACT", "top", 0.1, 0.05, 0.035), Spec(text="CAT"), ("text",)),
        (Scene(()), Spec(text="CAT", text_place="top"), ("position", "text")),
        (Scene((item(),), "CAT", "top", 0.1, 0.05, 0.035), Spec((Group(1, "red"),)), ()),  # what is not stated
    ],
)
def test_one_group_and_letters(scene, spec, expected):
    assert wrong(scene, spec) == expected


def _plainly(observed: Observation, spec: Spec) -> tuple[int, int]:
    """(most dimensions, most parts among those) that any division of the shapes fulfils, written the long way."""
    best = (-1, -1)
    for division in itertools.product(range(len(spec.groups)), repeat=len(observed.items)):
        groups = [[s for s, g in zip(observed.items, division) if g == k] for k in range(len(spec.groups))]
        facts = []
        for part in spec.parts:
            if part.subject == "0:1":
                so = False
                if groups[0] and groups[1]:
                    dx, dy = (np.mean([s[a] for s in groups[1]]) - np.mean([s[a] for s in groups[0]]) for a in (3, 4))
                    along = {"left": dx, "right": -dx, "above": dy, "below": -dy}[part.value]
                    so = along > 0.1 and along > min(abs(dx), abs(dy))
            else:
                members = groups[int(part.subject)]
                if part.dimension == "count":
                    so = len(members) == part.value
                else:
                    so = bool(members) and all(getattr(s, part.dimension) == part.value for s in members)
            facts.append((part.dimension, so))
        failed = {name for name, so in facts if not so}
        best = max(best, (len(spec.dimensions) - len(failed), sum(so for _, so in facts)))
    return best


@quick
@given(SEEDS)
def test_the_best_division_among_two_groups_is_found_in_any_order(seed):
    rng = np.random.default_rng(seed)
    for _ in range(20):
        pick = lambda values: values[rng.integers(len(values))]  # noqa: B023
        looks = [(pick(world.SHAPES[:2]), pick(("red", "blue")), pick(world.SIZES)) for _ in range(rng.integers(0, 5))]
        observed = Observation(tuple(Seen(*look, *rng.random(2)) for look in looks))
        groups = [Group(int(rng.integers(1, 3)), pick(("red", "blue", None)), pick(world.SHAPES[:2])) for _ in "12"]
        spec = Spec(tuple(groups), relation=pick((*world.RELATIONS, None)))
        report = world.judge(observed, spec)
        assert (sum(report.dimensions.values()), sum(so for _, so in report.parts)) == _plainly(observed, spec)
        turned = Observation(tuple(observed.items[k] for k in rng.permutation(len(looks))))
        assert world.judge(turned, spec).parts == report.parts


# ---------------------------------------------------------------------------------------------- imperfect pictures


def _jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality)
    return np.asarray(Image.open(buffer).convert("RGB"))


def _noise(image: np.ndarray, most: int) -> np.ndarray:
    noise = np.random.default_rng(0).integers(-most, most + 1, image.shape)
    return np.clip(image + noise, 0, 255).astype(np.uint8)


def _blur(image: np.ndarray, sigma: float) -> np.ndarray:
    return np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(sigma)))


@pytest.mark.parametrize(
    ("damage", "least"),
    [
        (lambda image: _noise(image, 8), 0.99),
        (lambda image: _noise(image, 24), 0.97),
        (lambda image: _blur(image, 0.7), 0.99),
        (lambda image: _jpeg(image, 90), 0.97),
        (lambda image: _jpeg(image, 75), 0.93),
        (lambda image: np.clip(image * 0.9 + 8.0, 0, 255).astype(np.uint8), 0.99),
    ],
    ids=["noise 8", "noise 24", "blur", "JPEG 90", "JPEG 75", "contrast"],
)
def test_damaged_pictures_are_read_alike(damage, least):
    made = pairs(4, 50)
    same = [
        world.check(damage(pair[name]), pair["spec"]).wrong == expected
        for pair in made
        for name, expected in (("image", ()), ("misaligned_image", pair["wrong"]))
    ]
    assert np.mean(same) >= least


@pytest.mark.parametrize("size", [48, 96, 128, 256])
def test_pictures_of_other_sizes(size):
    for pair in pairs(6, 12, size=size):
        assert pair["image"].shape == (size, size, 3)
        assert world.check(pair["image"], pair["spec"]).correct
        assert world.check(pair["misaligned_image"], pair["spec"]).wrong == pair["wrong"]


def test_what_is_not_of_this_world_fulfils_nothing():
    cornered = world.read(world.render(Scene((item("square", angle=math.pi / 4),), seed=3)))
    assert [seen[:3] for seen in cornered.items] == [(None, "red", "large")]
    picture = world.render(Scene((item(),), seed=3))
    cyan = picture.copy()
    cyan[world.render(Scene((item(),), seed=3))[..., 1] < 100] = (30, 200, 210)
    assert [(seen.shape, seen.colour) for seen in world.read(cyan).items] == [("circle", None)]
    letter = world.render(Scene((), "E", "top", 0.2, 0.06, 0.036, seed=3))
    assert world.read(letter).text == "E" and world.read(letter[:, ::-1]).text == "?"


@pytest.mark.parametrize("shape", [(64, 64), (1, 1), (3, 700), (200, 20)])
def test_any_picture_is_read(shape):
    rng = np.random.default_rng(1)
    spec = Spec((Group(4, "red", "heart", "small"),), text="AXE")
    for image in (np.zeros((*shape, 3)), np.full((*shape, 3), 255), rng.integers(0, 256, (*shape, 3))):
        assert not world.check(image.astype(np.uint8), spec).correct


# ---------------------------------------------------------------------------------------------- samples


def test_a_sample_is_a_function_of_its_arguments():
    first = world.sample(3, 8)
    world.sample(0, 1)
    second = world.sample(3, 8)
    for name in ("image", "misaligned_image"):
        assert first[name].dtype == np.uint8 and first[name].shape == (64, 64, 3)
        assert np.array_equal(first.pop(name), second.pop(name))
    assert first == second
    assert all(world.sample(*other)["scene"] != first["scene"] for other in ((4, 8), (3, 9), (3, 8, "eval")))


def test_splits_share_no_statement_and_languages_alternate():
    train, held_out = pairs(1, 200), pairs(1, 200, "eval")
    assert not {pair["spec"].key for pair in train} & {pair["spec"].key for pair in held_out}
    assert not {pair["prompt"] for pair in train} & {pair["prompt"] for pair in held_out}
    for made in (train, held_out):
        assert [pair["language"] for pair in made] == ["en", "zh"] * 100
        assert {len(pair["dimensions"]) for pair in made} == {1, 2, 3, 4, 5}
        assert {name for pair in made for name in pair["dimensions"]} == set(world.DIMENSIONS)
        assert {len(pair["scene"].items) for pair in made} == {1, 2, 3, 4}


def test_one_meaning_has_one_key():
    turned = Spec(TWO.groups[::-1], relation="right")
    assert turned.key == TWO.key and turned.split == TWO.split
    assert len({TWO.key, replace(TWO, relation="right").key, replace(TWO, relation=None).key}) == 3
    assert replace(TWO, relation=None).key == replace(turned, relation=None).key


def test_a_kept_picture_differs_by_its_faults_alone():
    kept = changed = 0
    for pair in pairs(2, 40, keep_share=1.0):
        assert pair["misaligned_scene"].seed == pair["scene"].seed
        same = (pair["image"] == pair["misaligned_image"]).all(-1).mean()
        if set(pair["wrong"]) <= {"colour"}:
            kept, changed = kept + 1, changed + (same > 0.6)
    assert kept >= 3 and changed == kept
    assert all(p["misaligned_scene"].seed != p["scene"].seed for p in pairs(2, 10, keep_share=0.0))


# ---------------------------------------------------------------------------------------------- prompts

ENGLISH = {
    "count": {1: "a|an|one|single", 2: "two", 3: "three", 4: "four"},
    "colour": {name: name for name in world.COLOURS},
    "shape": {"cross": "cross(es)?|plus signs?", **{name: f"{name}s?" for name in world.SHAPES if name != "cross"}},
    "size": {"small": "small|little|tiny", "large": "large|big"},
}
CHINESE = {
    "count": {1: "一个", 2: "两个", 3: "三个", 4: "四个"},
    "colour": dict(zip(world.COLOURS, ("红色", "橙色", "黄色", "绿色", "蓝色", "紫色"))),
    "shape": {
        "circle": "圆形|圆(?!环|形)", "square": "正方形|方块", "triangle": "三角形", "star": "星形|星星|五角星",
        "cross": "十字|加号", "ring": "圆环", "heart": "心形|爱心",
    },
    "size": {"small": "小", "large": "大"},
}  # fmt: skip
SIDES = {
    "en": {
        "left": "left",
        "right": "right",
        "top": "top|upper|above|over",
        "bottom": "bottom|lower|below|under|beneath",
    },
    "zh": {"left": "左", "right": "右", "top": "上|顶", "bottom": "下|底"},
}  # fmt: skip


@quick
@given(SEEDS)
def test_a_prompt_says_all_that_is_stated_and_nothing_else(seed):
    for pair in pairs(seed, 25):
        spec, language = pair["spec"], pair["language"]
        words = pair["prompt"].lower() if language == "en" else pair["prompt"]
        words = re.sub('".*"|“.*”', "", words)
        words = re.sub("^(a|an) (picture|image|drawing)|一张|一幅|一些|几个|corner", "", words)
        edge = r"\b" if language == "en" else ""
        for name, values in (ENGLISH if language == "en" else CHINESE).items():
            said = {value for value, pattern in values.items() if re.search(f"{edge}({pattern}){edge}", words)}
            assert said == {getattr(group, name) for group in spec.groups} - {None}, pair["prompt"]
        sides = {side for side, pattern in SIDES[language].items() if re.search(f"{edge}({pattern}){edge}", words)}
        relation = {"above": "top", "below": "bottom"}.get(spec.relation, spec.relation)
        stated = {*(spec.place or "").split(), relation, spec.text_place} - {None, "", "centre"}
        assert sides == stated, pair["prompt"]
        quoted = re.findall('["“](.*)["”]', pair["prompt"])
        assert quoted == ([spec.text] if spec.text else [])


def test_wordings_vary():
    rng = np.random.default_rng(0)
    spec = Spec((Group(2, "red", "circle", "small"),), place="left")
    for language in world.LANGUAGES:
        assert len({world.prompt(spec, language, rng) for _ in range(200)}) > 25


# ---------------------------------------------------------------------------------------------- records, scores, errors


def test_a_spec_survives_json():
    for pair in pairs(9, 30):
        assert Spec.from_dict(json.loads(json.dumps(pair["spec"].to_dict()))) == pair["spec"]


@pytest.mark.parametrize(
    ("values", "field"),
    [
        ({"groups": [{"colour": "cyan"}]}, "colour"),
        ({"groups": [{"count": 5}]}, "count"),
        ({"groups": []}, "groups"),
        ({"groups": [{}], "relation": "left"}, "relation"),
        ({"place": "outside"}, "place"),
        ({"text": "B"}, "text"),
        ({"text_place": "top"}, "text_place"),
        ({"texture": "wool"}, "texture"),
    ],
)
def test_a_spec_of_another_world_is_refused(values, field):
    with pytest.raises(RefineError, match=field):
        Spec.from_dict(values)


def test_bad_input_is_named():
    rng = np.random.default_rng(0)
    image = np.zeros((64, 64, 3), np.uint8)
    calls = {
        "split": lambda: world.sample(0, 0, "test"),
        "size": lambda: world.sample(0, 0, size=8),
        "language": lambda: world.prompt(TWO, "fr", rng),
        "stated": lambda: world.prompt(Spec(), "en", rng),
        "image": lambda: world.check(image.astype(np.float32), TWO),
        "uint8": lambda: world.check(image[..., 0], TWO),
        "languages": lambda: world.scores([world.check(image, TWO)], []),
    }
    for field, call in calls.items():
        with pytest.raises(RefineError, match=field):
            call()


def test_scores_are_shares_with_wilsons_intervals():
    right = world.judge(world.observe(RIGHT), TWO)
    mirrored = Scene((item(x=0.75), item("square", "blue", x=0.25)))
    reports = [right] * 8 + [world.judge(world.observe(mirrored), TWO)] * 2
    rows = world.scores(reports, ["en", "zh"] * 5)
    # Newcombe 1998, method 3.
    assert rows["all"] == pytest.approx({"score": 0.8, "low": 0.4902, "high": 0.9433, "count": 10}, abs=1e-4)
    assert rows["position"] == rows["all"] and rows["colour"]["score"] == 1.0 and rows["text"]["count"] == 0
    assert rows["dimensions"]["score"] == pytest.approx(0.95)  # 3 of 4 hold in two of ten
    assert rows["en"]["count"] == rows["zh"]["count"] == 5 and rows["4 stated"] == rows["all"]
    text = world.table({"initial": rows, "round 1": world.scores([right] * 10, ["en"] * 10)})
    assert "| all | 10 | 80.0 (49.0–94.3) | 100.0 (72.2–100.0) |" in text
    assert "text" not in text and "nan" not in text and "| zh | 5 | 80.0 (37.6–96.4) | – |" in text


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([8, 16, 24]))
def test_labels_say_what_lies_where(seed, cells):
    """Their whole is a cell; a shape's share is its area, a letter's that of its box; what is nowhere has none."""
    scene = world.sample(seed, 0)["scene"]
    labels = world.labels(scene, cells)
    assert labels.shape == (cells, cells, world.LABELS) and labels.dtype == np.uint8
    assert np.abs(labels.astype(int).sum(-1) - 255).max() <= 3  # rounded one by one
    areas = labels.sum((0, 1)) / 255 / cells**2
    names = (None, *world.SHAPES, *world.LETTERS)
    for name, area in zip(names[1:], areas[1:]):
        radii = [item.radius for item in scene.items if item.shape == name]
        box = scene.text.count(name) * 35 * scene.cell**2 if name in world.LETTERS else 0.0
        filled = {"circle": math.pi, "square": 3.24, "ring": math.pi * (1.05**2 - 0.52**2)}.get(name)
        if filled or not radii:
            np.testing.assert_allclose(area, box + sum(filled * r * r for r in radii), rtol=0.1, atol=2e-3)
        else:
            assert sum(r * r for r in radii) < area < sum(4 * r * r for r in radii)
    for item in scene.items:
        if item.shape != "ring":
            at = labels[int(item.y * cells), int(item.x * cells)]
            assert names[int(at[1:].argmax()) + 1] == item.shape
