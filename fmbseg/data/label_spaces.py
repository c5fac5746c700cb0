"""Label spaces: the classes of every benchmark with their prompt words, a user's own words, and training vocabularies.

A class may have several prompt words; the most similar one counts. In tables a class keeps the benchmark's name.
"""

from __future__ import annotations

import dataclasses
import functools
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fmbseg import files
from fmbseg.errors import DataError, ParameterError

MAX_CLASSES = 32_767
"""Label maps are ``int16``."""


def normal(word: str) -> str:
    """The form in which words of two lists are compared: Unicode NFKC, no case, one space between words."""
    return " ".join(unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", word).casefold()).split())


def is_background(word: str) -> bool:
    """Whether a class is called background, in any spelling ("Background", "_background_")."""
    return normal(word.strip("_ ")) == "background"


def read_words(path: str | Path, numbered: bool = False) -> list[str]:
    """The words of a text file in UTF-8, one a line, with or without byte-order mark; spaces at the ends do not count.

    numbered: the line number is the class, as in classes.txt, so a blank line between two words is an error; else blank lines
    are left out. Raises DataError for such a line, another encoding and a file that cannot be read.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 text (byte {error.start + 1}); save it as UTF-8") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); give a text file with a word a line") from error
    if "\0" in text:
        raise DataError(f"{path}: not UTF-8 text (it holds zero bytes, as UTF-16 does); save it as UTF-8")
    lines = [" ".join(line.split()) for line in text.rstrip().split("\n")]
    if numbered and "" in lines[:-1]:
        line = lines.index("") + 1
        raise DataError(
            f"{path}: line {line} is blank, and line n names class n - 1; name that class, or remove the line if no class is meant"
        )
    return [word for word in lines if word]


@dataclass(frozen=True)
class Background:
    """How class 0 of a column with background is found (Sec. 4.1).

    words: its prompt words; score: a constant cosine similarity at every position, in place of words; threshold: class 0 also
    takes the pixels where the probability of the best word, softmax(scale * similarity) over all words, is smaller.
    """

    words: tuple[str, ...] = ()
    score: float | None = None
    threshold: float = 0.0
    scale: float = 0.0


WORDS_ALONE = Background()


@dataclass(frozen=True)
class LabelSpace:
    """An ordered list of K classes.

    names: as the benchmark spells them; prompts: one tuple of prompt words a class; palette: (K, 3) ``uint8`` RGB colours;
    background: whether class 0 is "everything else", found by ``rule``.
    """

    name: str
    names: tuple[str, ...]
    prompts: tuple[tuple[str, ...], ...]
    palette: np.ndarray
    background: bool = False
    rule: Background = WORDS_ALONE

    def __len__(self) -> int:
        return len(self.names)

    def without_background(self, name: str) -> LabelSpace:
        """All classes except the first, under another name."""
        return LabelSpace(name, self.names[1:], self.prompts[1:], self.palette[1:])

    def worded(self, words: str) -> LabelSpace:
        """The same classes under other prompt words: "ours", "verbatim" (the names as they are), or a list of assets/words.yaml.

        Raises ParameterError where that list does not have the benchmark.
        """
        if words == "ours" or self.name not in SPACES:
            return self
        own = {}
        if words != "verbatim":
            lists, space = files.asset("words.yaml")[words], _WITHOUT_BACKGROUND.get(self.name, self.name)
            if space not in lists:
                raise ParameterError(
                    f"words = {words!r}: has no list for {self.name}, only for {', '.join(lists)}; choose ours or verbatim"
                )
            own = lists[space]
        prompts = tuple(tuple(own.get(name, [name])) for name in self.names)
        return LabelSpace(self.name, self.names, prompts, self.palette, self.background)

    def with_background_words(self, words: Sequence[str]) -> LabelSpace:
        """The same with these prompt words for class 0 in place of its name; unchanged where there is no background.

        A word that is a class of its own (COCO-Object's "bed") is left out. Raises ParameterError when none remains.
        """
        if not self.background:
            return self
        own = {normal(word) for prompts in (self.names[1:], *self.prompts[1:]) for word in prompts}
        kept = tuple(word for word in words if normal(word) not in own)
        if not kept:
            raise ParameterError(f"{self.name}: every background word is a class of its own; give others, or background_words = name")
        return LabelSpace(self.name, self.names, (kept, *self.prompts[1:]), self.palette, True)

    def with_background(self, rule: Background) -> LabelSpace:
        """The same with class 0 found by a rule, by its words or its score; unchanged where there is no background."""
        if not self.background:
            return self
        words = self.with_background_words(rule.words).prompts[0] if rule.score is None else ()
        return dataclasses.replace(self, prompts=(words, *self.prompts[1:]), rule=rule)


def palette(count: int) -> np.ndarray:
    """(count, 3) ``uint8`` colours with evenly spread hues, the same in every run; brightness and saturation alternate."""
    import colorsys

    golden = 0.61803398875
    levels = ((0.95, 0.75), (0.75, 0.9), (0.6, 0.55), (0.9, 0.45))
    colours = [colorsys.hsv_to_rgb((0.05 + i * golden) % 1, levels[i % 4][1], levels[i % 4][0]) for i in range(count)]
    return (np.array(colours).reshape(-1, 3) * 255).astype(np.uint8)


def background_rule(rule: str, space: str) -> Background:
    """How class 0 of a label space is found by a rule of ``assets/background.yaml``, such as "stuff", "tcl" or "sclip" (Sec. 4.1)."""
    spaces = files.asset("background.yaml")[rule]
    found = spaces["every"] | spaces.get(space, {})
    return Background(**found | {"words": tuple(found.get("words", ()))})


_WITHOUT_BACKGROUND = {"voc20": "voc21", "context59": "context60", "coco_object80": "coco_object81"}
SPACES = (
    "voc21",
    "voc20",
    "context60",
    "context59",
    "coco_object81",
    "coco_object80",
    "coco_stuff171",
    "coco_panoptic133",
    "cityscapes19",
    "ade150",
    "camvid11",
    "ade847",
    "context459",
    "lvis1203",
)


@functools.cache
def label_space(name: str) -> LabelSpace:
    """A benchmark's classes by name. Raises ParameterError naming the known ones."""
    if name in _WITHOUT_BACKGROUND:
        return label_space(_WITHOUT_BACKGROUND[name]).without_background(name)
    if name not in SPACES:
        raise ParameterError(f"label space {name!r}: unknown; known are {', '.join(SPACES)}")
    entry = files.asset("label_spaces.json")[name]
    names = tuple(entry["classes"])
    colours = np.array(entry["palette"], dtype=np.uint8) if entry["palette"] else palette(len(names))
    background = names[0] == "background"
    if background and not entry["palette"]:
        colours[0] = 0
    return LabelSpace(name, names, tuple(tuple(entry["prompts"].get(n, [n])) for n in names), colours, background)


def own_words(words: Sequence[str] | Mapping[str, Sequence[str]], name: str = "words", lines: bool = False) -> LabelSpace:
    """Any list of classes as a label space. Of a class with several prompt words the most similar word counts.

    words: for each class its name, which is also its only word, or "name=word|word" ("person=person|man|woman"), as a list or as
    one text with commas between the classes; or {"person": ["person", "man"]}. lines: "name: word, word" instead, as in a file.
    Raises ParameterError for an empty, repeated or too long list, and for a word of two classes.
    """
    if isinstance(words, str):
        words = words.split(",")
    equals, between = (":", ",") if lines else ("=", "|")
    if isinstance(words, Mapping):
        entries = list(words.items())
    elif isinstance(words, Sequence) and all(isinstance(word, str) for word in words):
        parts = (word.partition(equals) for word in words)
        entries = [(own, of_own.split(between) if equal else [own]) for own, equal, of_own in parts]
    else:
        raise ParameterError(f"{name}: got {words!r}; give words as text, such as ['cat', 'sofa']")
    classes = [(" ".join(own.split()), [word for each in of_own if (word := " ".join(each.split()))]) for own, of_own in entries]
    classes = [(own, of_own) for own, of_own in classes if own or of_own]
    if not classes:
        raise ParameterError(f'{name}: no word given; give at least one, such as "cat, sofa"')
    if half := [own or ", ".join(of_own) for own, of_own in classes if not own or not of_own]:
        raise ParameterError(f"{name}: {half[0]} has no name or no word; write name{equals} word{between} word")
    distinct = [{normal(word): word for word in of_own} for _, of_own in classes]
    for what, given in (("", [own for own, _ in classes]), ("words of two classes ", [w for of_own in distinct for w in of_own.values()])):
        times = Counter(map(normal, given))
        if repeated := sorted({word for word in given if times[normal(word)] > 1}):
            raise ParameterError(f"{name}: {what}given more than once: {', '.join(repeated)}; give every word once (case does not count)")
    if len(classes) > MAX_CLASSES:
        raise ParameterError(f"{name}: {len(classes)} words; label maps hold at most {MAX_CLASSES}")
    names, prompts = tuple(own for own, _ in classes), tuple(tuple(of_own.values()) for of_own in distinct)
    return LabelSpace(name, names, prompts, palette(len(classes)))


def vocabulary(text: str, words: str = "ours") -> LabelSpace:
    """A training vocabulary: a label space's name, several joined by "+", or a text file (.txt) with "word" or "name: word, word" a line.

    words: prompt words of the label spaces, as in ``LabelSpace.worded``. In joined spaces each class has its first prompt word as
    its name, and equal ones are one class. Backgrounds are left out. Raises ParameterError for an unknown name or a list that is
    no vocabulary, DataError for a file that cannot be read.
    """
    if text.endswith(".txt"):
        path = Path(text)
        if not path.is_file():
            raise DataError(f"{path}: no such file; give a text file with a word a line")
        return own_words(read_words(path), path.name, lines=True)
    if Path(text).is_file():
        raise DataError(f"{text}: not taken for a list of words; give a text file with a word a line, whose name ends in .txt")
    spaces = [label_space(part.strip()).worded(words) for part in text.split("+")]
    if len(spaces) == 1:
        return spaces[0].without_background(text) if spaces[0].background else spaces[0]
    own: dict[str, str] = {}
    for prompts in (p for s in spaces for p in s.prompts[int(s.background) :]):
        own.setdefault(normal(prompts[0]), prompts[0])
    return own_words(list(own.values()), text)
