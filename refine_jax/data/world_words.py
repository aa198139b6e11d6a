"""The small world's prompts: a statement in English or Chinese, worded in many ways, none of which adds a statement."""

from collections.abc import Sequence

from refine_jax.data.world_spec import DIMENSIONS, Group, Rng, Spec, pick
from refine_jax.errors import RefineError

LANGUAGES = ("en", "zh")


def prompt(spec: Spec, language: str, rng: Rng) -> str:
    """A wording of a statement, drawn with `rng`. Raises RefineError for an unknown language or nothing stated."""
    if language not in LANGUAGES:
        raise RefineError(f"language: got {language!r}, expected one of {', '.join(LANGUAGES)}")
    if not spec.parts:
        raise RefineError(f"spec: nothing is stated; state at least one of {', '.join(DIMENSIONS)}")
    return _english(spec, rng) if language == "en" else _chinese(spec, rng)


def _says_shapes(spec: Spec) -> bool:
    return any(part.subject != "text" for part in spec.parts)


# ---------------------------------------------------------------------------------------------- English

_NUMBERS = {1: ("a", "a", "a", "one", "a single"), 2: ("two",), 3: ("three",), 4: ("four",)}
_NOUNS = {
    "circle": (("circle", "circles"),),
    "square": (("square", "squares"),),
    "triangle": (("triangle", "triangles"),),
    "star": (("star", "stars"),),
    "cross": (("cross", "crosses"), ("cross", "crosses"), ("plus sign", "plus signs")),
    "ring": (("ring", "rings"),),
    "heart": (("heart", "hearts"),),
    None: (("shape", "shapes"), ("shape", "shapes"), ("object", "objects"), ("figure", "figures")),
}
_SIZED = {"small": ("small", "small", "little", "tiny"), "large": ("large", "large", "big")}
_WHERE = {
    "left": ("on the left", "on the left", "on the left side", "in the left half"),
    "right": ("on the right", "on the right", "on the right side", "in the right half"),
    "top": ("at the top", "at the top", "in the upper half"),
    "bottom": ("at the bottom", "at the bottom", "in the lower half"),
    "centre": ("in the middle", "in the centre", "in the center"),
    "top left": ("in the top left corner", "in the top left", "in the upper left"),
    "top right": ("in the top right corner", "in the top right", "in the upper right"),
    "bottom left": ("in the bottom left corner", "in the bottom left", "in the lower left"),
    "bottom right": ("in the bottom right corner", "in the bottom right", "in the lower right"),
}
_BETWEEN = {
    "left": ("to the left of", "to the left of", "left of"),
    "right": ("to the right of", "to the right of", "right of"),
    "above": ("above", "above", "over"),
    "below": ("below", "below", "under", "beneath"),
}


def _phrase(group: Group, rng: Rng) -> tuple[str, bool]:
    """("two small red circles", is it plural?). Without a number: the bare plural."""
    one, many = pick(rng, _NOUNS[group.shape])
    words = [*([pick(rng, _SIZED[group.size])] if group.size else []), *([group.colour] if group.colour else [])]
    if group.count is None:
        return " ".join([*words, many]), True
    words.append(one if group.count == 1 else many)
    number = pick(rng, _NUMBERS[group.count])
    if number == "a" and words[0][0] in "aeiou":
        number = "an"
    return " ".join([number, *words]), group.count > 1


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _lettering(spec: Spec, rng: Rng) -> str:
    word = "letter" if len(spec.text) == 1 else pick(rng, ("text", "text", "letters"))
    return f'the {word} "{spec.text}"' + (f" {pick(rng, _WHERE[spec.text_place])}" if spec.text_place else "")


def _english(spec: Spec, rng: Rng) -> str:
    lettering = _lettering(spec, rng) if spec.text else ""
    if not _says_shapes(spec):
        forms = ("A picture with {}", "{}", "An image showing {}", "Write {}", "Draw {}")
        return _capital(pick(rng, forms).format(lettering)) + pick(rng, ("", "."))
    phrases = [_phrase(group, rng) for group in spec.groups]
    first, plural = phrases[0]
    verb = "are" if plural else "is"
    clauses: list[str] = []
    if spec.relation:
        body = f"{first} {pick(rng, _BETWEEN[spec.relation])} {phrases[1][0]}"
        clauses = [f"{first} {verb} {pick(rng, _BETWEEN[spec.relation])} {phrases[1][0]}"]
    elif len(phrases) == 2:
        body = f"{first} {pick(rng, ('and', 'and', 'together with'))} {phrases[1][0]}"
    elif spec.place:
        where = pick(rng, _WHERE[spec.place])
        body = f"{first} {where}"
        clauses = [f"{where} there {verb} {first}", f"{where}, {first}", f"{first} {verb} {where}"]
    else:
        body = first
        clauses = _alone(spec.groups[0], rng)
    if clauses and rng.random() < 0.3:
        sentence, more = pick(rng, clauses), ("{}, with {}",)
    else:
        usual = (
            "{}",
            "{}",
            "a picture of {}",
            "an image of {}",
            "a drawing of {}",
            "draw {}",
            "show {}",
            "there " + verb,
        )
        form = pick(rng, usual)
        sentence = form.format(body) if "{}" in form else f"{form} {body}"
        # "a star and a ring and the text" has an "and" too many; "a star and the text at the top" a second meaning.
        plain = len(phrases) == 1 and not spec.text_place
        more = ("{}, with {}", "{} and {}", "{} with {}") if plain else ("{}, with {}", "{}, and {}")
    if lettering:
        sentence = pick(rng, more).format(sentence, lettering)
    return _capital(sentence) + ("" if sentence.endswith(".") else pick(rng, ("", ".")))


def _alone(group: Group, rng: Rng) -> list[str]:
    """What is said when one attribute of all shapes, and nothing else, is stated."""
    if group.shape is None and group.count is None:
        if group.colour and not group.size:
            return [f"every shape is {group.colour}", f"only {group.colour} shapes", f"all shapes are {group.colour}"]
        if group.size and not group.colour:
            size = pick(rng, _SIZED[group.size])
            return [f"every shape is {size}", f"only {size} shapes", f"all shapes are {size}"]
    return []


# ---------------------------------------------------------------------------------------------- Chinese

_ZH_NUMBERS = {1: "一", 2: "两", 3: "三", 4: "四"}
_ZH_COLOURS = {"red": "红色", "orange": "橙色", "yellow": "黄色", "green": "绿色", "blue": "蓝色", "purple": "紫色"}
_ZH_NOUNS = {
    "circle": ("圆形", "圆形", "圆"),
    "square": ("正方形", "正方形", "方块"),
    "triangle": ("三角形",),
    "star": ("星形", "星星", "五角星"),
    "cross": ("十字", "十字形", "加号"),
    "ring": ("圆环",),
    "heart": ("心形", "爱心"),
    None: ("图形", "图形", "形状", "物体"),
}
_ZH_SIZES = {"small": "小", "large": "大"}
_ZH_WHERE = {
    "left": ("左边", "左侧", "左半边"),
    "right": ("右边", "右侧", "右半边"),
    "top": ("上方", "顶部", "上半部分"),
    "bottom": ("下方", "底部", "下半部分"),
    "centre": ("中间", "中央", "正中间"),
    "top left": ("左上角", "左上方"),
    "top right": ("右上角", "右上方"),
    "bottom left": ("左下角", "左下方"),
    "bottom right": ("右下角", "右下方"),
}
_ZH_BETWEEN = {
    "left": ("左边", "左侧", "左面"),
    "right": ("右边", "右侧", "右面"),
    "above": ("上方", "上面"),
    "below": ("下方", "下面"),
}


def _zh_phrase(group: Group, rng: Rng) -> str:
    noun = pick(rng, _ZH_NOUNS[group.shape])
    colour = _ZH_COLOURS.get(group.colour, "")
    size = _ZH_SIZES.get(group.size, "")
    if colour and size:
        looks = pick(rng, (f"{colour}{size}{noun}", f"{size}的{colour}{noun}", f"{colour}的{size}{noun}"))
    elif colour or size:
        looks = f"{colour or size}{pick(rng, ('', '的'))}{noun}"
    else:
        looks = noun
    return f"{_ZH_NUMBERS[group.count]}个{looks}" if group.count else f"{pick(rng, ('一些', '几个', ''))}{looks}"


def _zh_lettering(spec: Spec, rng: Rng, alone: bool) -> str:
    """A clause that says what is written, to stand alone or after another."""
    mark, word = f"“{spec.text}”", "字母" if len(spec.text) == 1 else pick(rng, ("文字", "文字", "字母"))
    if spec.text_place:
        where = pick(rng, _ZH_WHERE[spec.text_place])
        forms = [f"{where}写着{mark}", f"{where}有{word}{mark}", f"{word}{mark}在{where}"]
        if alone:
            forms += [f"画面{where}写着{mark}", f"一张图，{where}有{word}{mark}"]
    elif alone:
        forms = [f"写着{mark}的图片", f"{word}{mark}", f"图中写着{mark}", f"一张有{word}{mark}的图", f"写{word}{mark}"]
    else:
        forms = [f"写着{mark}", f"图中写着{mark}", f"并写有{word}{mark}"]
    return pick(rng, forms)


def _chinese(spec: Spec, rng: Rng) -> str:
    end = pick(rng, ("", "。"))
    if not _says_shapes(spec):
        return _zh_lettering(spec, rng, alone=True) + end
    phrases = [_zh_phrase(group, rng) for group in spec.groups]
    first = phrases[0]
    if spec.relation:
        side, second = pick(rng, _ZH_BETWEEN[spec.relation]), phrases[1]
        forms = [f"{first}在{second}的{side}", f"{first}位于{second}的{side}", f"{second}的{side}有{first}"]
        forms.append(f"画{first}，在{second}的{side}")
    elif len(phrases) == 2:
        body = f"{first}和{phrases[1]}"
        forms = [
            body,
            f"图中有{body}",
            f"画面中有{body}",
            f"一张有{body}的图",
            f"画{body}",
            f"{first}，还有{phrases[1]}",
        ]
    elif spec.place:
        where = pick(rng, _ZH_WHERE[spec.place])
        forms = [f"{where}有{first}", f"画面{where}有{first}", f"{first}在{where}", f"{first}位于画面{where}"]
        forms += [f"图片的{where}是{first}", f"在{where}画{first}"]
    else:
        forms = [
            first,
            f"图中有{first}",
            f"画面中有{first}",
            f"一张有{first}的图",
            f"画{first}",
            f"一幅画，画着{first}",
        ]
        group = spec.groups[0]
        if group.count is None and group.shape is None and bool(group.colour) != bool(group.size):
            what = f"{_ZH_COLOURS[group.colour]}的" if group.colour else f"{_ZH_SIZES[group.size]}的"
            forms += [f"所有图形都是{what}", f"只有{what}图形"]
    sentence = pick(rng, forms)
    if spec.text:
        sentence += "，" + _zh_lettering(spec, rng, alone=False)
    return sentence + end


# ---------------------------------------------------------------------------------------------- editing

_NAMED = {
    "count": ("number", "数量"),
    "colour": ("colour", "颜色"),
    "shape": ("shape", "形状"),
    "size": ("size", "大小"),
    "position": ("position", "位置"),
    "text": ("text", "文字"),
}


def edit_instruction(prompt: str, language: str, wrong: Sequence[str]) -> str:
    """What is to be corrected in a picture of `prompt`, in the words of an editor who knows which dimensions fail."""
    if not wrong:
        return prompt
    if language == "zh":
        return f"修改{'和'.join(_NAMED[name][1] for name in wrong)}：{prompt}"
    return f"Correct the {' and '.join(_NAMED[name][0] for name in wrong)}: {prompt}"
