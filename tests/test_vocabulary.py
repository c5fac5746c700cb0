from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from fmbseg import files
from fmbseg.data import label_spaces
from fmbseg.data.label_spaces import Background, background_rule, label_space, own_words
from fmbseg.errors import DataError, ParameterError
from fmbseg.models import texts as texts_of
from fmbseg.models.texts import ClassTexts, class_texts
from fmbseg.params import SegmentParams
from fmbseg.stage2 import segmenter

SIZES = {
    "voc21": 21,
    "voc20": 20,
    "context60": 60,
    "context59": 59,
    "coco_object81": 81,
    "coco_object80": 80,
    "coco_stuff171": 171,
    "coco_panoptic133": 133,
    "cityscapes19": 19,
    "ade150": 150,
    "camvid11": 11,
    "ade847": 847,
    "context459": 459,
    "lvis1203": 1203,
}


@pytest.mark.parametrize("name", label_spaces.SPACES)
def test_label_spaces(name):
    space = label_space(name)
    assert space.name == name
    assert len(space) == len(space.prompts) == len(space.palette) == SIZES[name]
    assert len(set(space.names)) == len(space) and all(all(words) for words in space.prompts)
    assert space.background == (name in ("voc21", "context60", "coco_object81"))
    assert space.palette.shape == (len(space), 3) and space.palette.dtype == np.uint8


def test_own_colours_differ_and_are_the_same_for_every_run():
    colours = label_spaces.palette(254)
    assert len({tuple(colour) for colour in colours.tolist()}) == 254
    np.testing.assert_array_equal(colours[:20], label_spaces.palette(20))
    assert label_space("coco_object81").palette[0].tolist() == label_space("voc21").palette[0].tolist() == [0, 0, 0]


def test_every_size_is_tested():
    assert set(SIZES) == set(label_spaces.SPACES)


def test_camvid_is_part_of_cityscapes():
    camvid, cityscapes = label_space("camvid11"), label_space("cityscapes19")
    for name, colour in zip(camvid.names, camvid.palette):
        np.testing.assert_array_equal(colour, cityscapes.palette[cityscapes.names.index(name)])


@pytest.mark.parametrize("without, with_one", [("voc20", "voc21"), ("context59", "context60"), ("coco_object80", "coco_object81")])
def test_spaces_without_background_are_the_rest(without, with_one):
    rest, whole = label_space(without), label_space(with_one)
    assert whole.names[0] == "background" and rest.names == whole.names[1:] and rest.prompts == whole.prompts[1:]
    np.testing.assert_array_equal(rest.palette, whole.palette[1:])


@pytest.mark.parametrize(
    "space, name, prompt",
    [
        ("voc21", "tvmonitor", "tv monitor"),
        ("voc21", "cat", "cat"),
        ("context60", "mouse", "computer mouse"),
        ("coco_stuff171", "floor-wood", "wood floor"),
        ("coco_panoptic133", "wall-brick", "brick wall"),
        ("ade150", "windowpane", "window pane"),
        ("cityscapes19", "traffic light", "traffic light"),
    ],
)
def test_names_are_the_benchmarks_and_prompts_are_words(space, name, prompt):
    found = label_space(space)
    assert found.prompts[found.names.index(name)] == (prompt,)


def test_first_classes_of_every_benchmark():
    assert label_space("voc20").names[:3] == ("aeroplane", "bicycle", "bird")
    assert label_space("coco_stuff171").names[0] == "person" and label_space("coco_stuff171").names[-1] == "wood"
    assert label_space("cityscapes19").names[0] == "road" and label_space("ade150").names[0] == "wall"


def test_unknown_space_is_refused():
    with pytest.raises(ParameterError, match="label space 'voc': unknown; known are voc21, "):
        label_space("voc")


BACKGROUND_WORDS = background_rule("stuff", "voc21").words


def test_background_rules_by_name_and_benchmark():
    assert len(BACKGROUND_WORDS) == 26 and background_rule("stuff", "context60").words == BACKGROUND_WORDS
    assert background_rule("name", "voc21").words == background_rule("sclip", "context60").words == ("background",)
    assert set(background_rule("sclip", "voc21").words) ^ set(BACKGROUND_WORDS) == {"sand", "sands"}
    found = {rule: [background_rule(rule, space) for space in ("voc21", "context60", "coco_object81")] for rule in RULES}
    assert {rule: [one.threshold for one in of_rule] for rule, of_rule in found.items()} == RULES
    assert [one.scale for one in found["sclip"]] == [65, 50, 50] and [one.scale for one in found["scclip"]] == [50, 40, 55]
    assert [one.score for one in found["tcl"]] == [0.25] * 3 and found["sclip"][0].score is None


RULES = {
    "stuff": [0, 0, 0],
    "name": [0, 0, 0],
    "tcl": [0, 0, 0],
    "sclip": [0.1, 0.1, 0.1],
    "clearclip": [0.5, 0.15, 0.4],
    "naclip": [0.1, 0.1, 0.1],
    "proxyclip": [0.2, 0.15, 0.25],
    "scclip": [0.15, 0.15, 0.35],
}


def test_every_rule_is_a_value_of_the_parameter():
    named, lists = get_args(SegmentParams.model_fields["background_words"].annotation)
    assert set(get_args(named)) == set(RULES) == set(files.asset("background.yaml"))


def test_a_background_of_a_score_has_no_words():
    voc = label_space("voc21").with_background(Background(score=0.25))
    assert voc.prompts == ((), *label_space("voc21").prompts[1:]) and voc.rule.score == 0.25
    assert label_space("voc20").with_background(Background(score=0.25)).rule == Background()


def test_rows_are_classes_or_words_and_a_score_is_a_row_of_class_0():
    texts = ClassTexts(torch.eye(4), torch.tensor([0, 0, 1, 2]), ("background", "cat", "dog"))
    similarity = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    for score, apart, expected, owner in (
        (None, False, [0.4, 0.2, 0.3], [0, 1, 2]),
        (None, True, [0.1, 0.4, 0.2, 0.3], [0, 0, 1, 2]),
        (0.25, False, [0.25, 0.2, 0.3], [0, 1, 2]),
        (0.25, True, [0.25, 0.2, 0.3], [0, 1, 2]),
    ):
        rows, classes = texts.rows(similarity, score, apart)
        assert rows[0].tolist() == pytest.approx(expected) and classes.tolist() == owner


def test_background_words_leave_out_words_that_are_classes():
    voc = label_space("voc21").with_background_words(BACKGROUND_WORDS)
    assert voc.prompts[0] == BACKGROUND_WORDS and voc.prompts[1:] == label_space("voc21").prompts[1:]
    assert voc.names == label_space("voc21").names and voc.background
    objects = label_space("coco_object81").with_background_words(BACKGROUND_WORDS)
    assert set(BACKGROUND_WORDS) - set(objects.prompts[0]) == {"bed"}
    context = label_space("context60").with_background_words(BACKGROUND_WORDS).prompts
    assert not set(context[0]) & {word for words in context[1:] for word in words} and "sand" in context[0]


def test_background_words_change_nothing_without_background():
    assert label_space("voc20").with_background_words(BACKGROUND_WORDS) is label_space("voc20")


def test_own_words():
    space = own_words([" tabby  cat", "sofa", ""])
    assert space.names == ("tabby cat", "sofa") and space.prompts == (("tabby cat",), ("sofa",)) and not space.background
    assert own_words("cat, sofa,").names == ("cat", "sofa")
    assert len(own_words([f"word {i}" for i in range(2_000)]).palette) == 2_000


def test_a_class_of_several_words_has_one_name(tmp_path):
    names, prompts = ("person", "cat", "traffic light"), (("Man", "woman", "person"), ("cat",), ("lamp", "signal"))
    file = tmp_path / "words.txt"
    file.write_text("person: Man, woman ,person, man\ncat\ntraffic  light:lamp,signal\n")
    several = [
        own_words("person=Man|woman|person, cat,traffic light = lamp | signal"),
        own_words({"person": ["Man", "woman", "person"], "cat": ["cat"], "traffic light": ["lamp", "signal"]}),
        label_spaces.vocabulary(str(file)),
        segmenter.words_space(str(file)),
    ]
    for space in several:
        assert space.names == names
        assert [tuple(map(label_spaces.normal, w)) for w in space.prompts] == [tuple(map(label_spaces.normal, w)) for w in prompts]
    assert several[0].worded("verbatim").prompts == several[0].prompts
    space = segmenter.words_space("person=man|woman", "wall=brick|plaster, floor")
    assert space.names == ("background", "person") and space.prompts == (("brick", "plaster", "floor"), ("man", "woman"))
    with pytest.raises(ParameterError, match="background: also among the classes: person;"):
        segmenter.words_space("person=man|woman", "wall, Woman")


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "no word given"),
        ("", "no word given"),
        ([" ", ""], "no word given"),
        (["cat", "dog", " cat"], "given more than once: cat;"),
        ("cat,dog,cat", "given more than once: cat;"),
        (["Traffic Light", "traffic  light"], "given more than once: Traffic Light, traffic light;"),
        (["cafe\u0301", "caf\u00e9"], "given more than once"),
        (["cat", 3], "give words as text"),
        (["cat", None], "give words as text"),
        ("person=man, man", "words of two classes given more than once: man;"),
        ("person=, cat", "person has no name or no word; write name= word| word"),
        ("=man, cat", "man has no name or no word"),
        ([f"word {i}" for i in range(32_768)], "32768 words; label maps hold at most 32767"),
    ],
)
def test_bad_words_are_refused(words, message):
    with pytest.raises(ParameterError) as caught:
        own_words(words, "classes")
    assert str(caught.value).startswith("classes: ") and message in str(caught.value)


def test_vocabulary_is_a_space_without_its_background():
    assert label_spaces.vocabulary("coco_stuff171") is label_space("coco_stuff171")
    voc = label_spaces.vocabulary("voc21")
    assert voc.names == label_space("voc20").names and not voc.background


def test_joined_vocabulary_keeps_every_word_once():
    joined = label_spaces.vocabulary("voc21 + cityscapes19")
    words = [w for name in ("voc20", "cityscapes19") for (w,) in label_space(name).prompts]
    assert list(joined.names) == list(dict.fromkeys(words)) and len(joined) < len(words)
    assert "background" not in joined.names and "dining table" in joined.names
    assert [w for (w,) in joined.prompts] == list(joined.names)


def test_vocabulary_from_a_text_file(tmp_path):
    path = tmp_path / "words.txt"
    path.write_text("zebra\n\n traffic  light \nsalt, pepper\n", encoding="utf-8")
    assert label_spaces.vocabulary(str(path)).names == ("zebra", "traffic light", "salt, pepper")
    path.write_text("\n")
    with pytest.raises(ParameterError, match="words.txt: no word given"):
        label_spaces.vocabulary(str(path))
    with pytest.raises(DataError, match="none.txt: no such file"):
        label_spaces.vocabulary(str(tmp_path / "none.txt"))


@pytest.mark.parametrize("coding, start", [("utf-8", ""), ("utf-8-sig", ""), ("utf-8", " \r\n\r\n")])
@pytest.mark.parametrize("end", ["", "\r\n", "\n\n \n"])
def test_words_of_a_file_are_its_lines_in_any_spelling_of_utf_8(tmp_path, coding, start, end):
    path = tmp_path / "words.txt"
    path.write_bytes((start + "caf\u00e9\r\n traffic \t light" + end).encode(coding))
    assert label_spaces.read_words(path) == ["caf\u00e9", "traffic light"]
    if start:
        with pytest.raises(DataError, match="words.txt: line 1 is blank"):
            label_spaces.read_words(path, numbered=True)
    else:
        assert label_spaces.read_words(path, numbered=True) == ["caf\u00e9", "traffic light"]


@pytest.mark.parametrize("coding", ["latin-1", "utf-16", "utf-16-le"])
def test_another_encoding_is_refused(tmp_path, coding):
    path = tmp_path / "words.txt"
    path.write_bytes("caf\u00e9\ncat".encode(coding))
    with pytest.raises(DataError, match="words.txt: not UTF-8 text .*; save it as UTF-8"):
        label_spaces.vocabulary(str(path))
    with pytest.raises(DataError, match=f"{tmp_path}: cannot be read"):
        label_spaces.read_words(tmp_path)


def test_words_are_compared_in_one_form(tmp_path):
    assert label_spaces.normal(" Traffic\u00a0 LIGHT ") == "traffic light" and label_spaces.normal("stra\u00dfe") == "strasse"
    assert label_spaces.is_background("__Background__") and not label_spaces.is_background("back ground")
    voc = label_space("voc21").with_background_words(("Sky", "CAT", " Potted  Plant", "TVmonitor"))
    assert voc.prompts[0] == ("Sky",)  # a class by its name or by its words
    with pytest.raises(ParameterError, match="voc21: every background word is a class of its own"):
        label_space("voc21").with_background_words(("Cat",))
    assert segmenter.words_space("Cat, sofa", "wall").names == ("background", "Cat", "sofa")
    for classes, background in (("Cat, sofa", "cat"), ("cat, Background", "wall")):
        with pytest.raises(ParameterError, match="background: also among the classes: (Cat|Background);"):
            segmenter.words_space(classes, background)


@pytest.mark.parametrize("name, most", [("random:ViT-B-32", 77), ("lit-efficientnet-lite2-minilm", 64)])
def test_a_name_that_the_text_tower_cannot_read_to_its_end_is_refused(name, most):
    """Two long names of one beginning would be one class."""
    from fmbseg.models.clip import load_clip

    clip = load_clip(name)
    fits = "cat " * (most - 3) + "dog"  # with the two tokens that begin and end a text
    one, other = clip.encode_text([fits, fits.replace("dog", "car")])
    assert (one - other).abs().max() > 1e-4
    with pytest.raises(ParameterError, match=f"^'cat cat .*longer than the {most} tokens that .* reads of a text; shorten the name"):
        clip.encode_text(["dog", f"{fits} dog"])


@pytest.mark.parametrize("text", ["", "voc21+", "voc21+none"])
def test_unknown_vocabulary_is_refused(text):
    with pytest.raises(ParameterError, match="label space '(none)?': unknown"):
        label_spaces.vocabulary(text)


def test_templates():
    assert texts_of.templates("one") == ("a photo of a {}",)
    assert texts_of.templates("one_stop") == ("a photo of a {}.",)
    assert texts_of.templates("plain") == ("{}",)
    nine = texts_of.templates("nine")
    assert len(set(nine)) == 9 and all(form.count("{}") == 1 and form.endswith(".") for form in nine)
    assert set(nine) - set(texts_of.templates("seven")) == {"a bad photo of a {}.", "a photo of many {}.", "a photo of {}s."}
    seven, eighty = texts_of.templates("seven"), texts_of.templates("eighty")
    assert (len(seven), len(eighty)) == (7, 80) and all(form.count("{}") == 1 for form in seven + eighty)
    with pytest.raises(ParameterError, match="known are one, one_stop, plain, nine, seven, eighty"):
        texts_of.templates("ten")


def test_words_of_a_benchmark_by_the_name_of_a_list():
    voc, ade = label_space("voc21"), label_space("ade150")
    assert voc.worded("ours") is voc and voc.prompts[voc.names.index("diningtable")] == ("dining table",)
    plain = voc.worded("verbatim")
    assert plain.prompts == tuple((name,) for name in voc.names) and plain.names == voc.names and plain.background
    sclip = dict(zip(voc.names, voc.worded("sclip").prompts))
    assert sclip["boat"] == ("ship",) and len(sclip["person"]) == 7 and sclip["pottedplant"] == ("pottedplant",)
    assert label_space("voc20").worded("sclip").prompts == voc.worded("sclip").prompts[1:]
    assert sum(p != (n,) for n, p in zip(ade.names, ade.worded("sclip").prompts)) == 15
    assert own_words(["pool table"]).worded("sclip").prompts == (("pool table",),)
    with pytest.raises(ParameterError, match="words = 'sclip': has no list for coco_panoptic133"):
        label_space("coco_panoptic133").worded("sclip")


def test_lists_of_words_name_classes_that_there_are():
    for spaces in files.asset("words.yaml").values():
        for space, own in spaces.items():
            assert set(own) <= set(label_space(space).names) and all(isinstance(words, list) for words in own.values())


def test_a_vocabulary_takes_the_words_of_a_list():
    assert ("pooltable",) in label_spaces.vocabulary("ade150", "sclip").prompts
    joined = label_spaces.vocabulary("voc20+cityscapes19", "verbatim").names
    assert "diningtable" in joined and "dining table" not in joined


def test_most_similar_word_of_a_class_counts():
    texts = ClassTexts(torch.eye(4), torch.tensor([0, 0, 1, 0]), ("background", "cat"))
    similarity = torch.tensor([[0.1, 0.4, 0.2, 0.3], [-0.5, -0.6, -0.1, -0.4]])
    torch.testing.assert_close(texts.per_class(similarity), torch.tensor([[0.4, 0.2], [-0.4, -0.1]]))
    assert texts.per_class(similarity.expand(3, 5, 2, 4)).shape == (3, 5, 2, 2)
    single = ClassTexts(torch.eye(2), torch.tensor([0, 1]), ("cat", "dog"))
    assert torch.equal(single.per_class(similarity[:, :2]), similarity[:, :2])


def test_class_without_words_is_never_the_most_similar():
    texts = ClassTexts(torch.eye(3), torch.tensor([1, 1, 2]), ("background", "cat", "dog"))
    assert texts.per_class(torch.tensor([0.9, 0.1, 0.3])).tolist() == pytest.approx([-np.inf, 0.9, 0.3])


def test_prototypes_are_unit_norm_means_of_words():
    features = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1]])
    prototypes = ClassTexts(features, torch.tensor([0, 0, 1]), ("a", "b")).prototypes()
    torch.testing.assert_close(prototypes, torch.tensor([[0.5**0.5, 0.5**0.5, 0], [0, 0, 1]]))


class Letters:
    """An image-text model whose text feature is the count of every letter."""

    def encode_text(self, prompts, unit=True):
        counts = torch.tensor([[p.count(chr(i)) for i in range(97, 123)] for p in prompts]).float()
        return F.normalize(counts, dim=-1) if unit else counts


def test_class_texts_average_templates_and_keep_owners():
    space = label_space("voc21").with_background_words(("sky", "sea"))
    texts, raw = (class_texts(Letters(), space, "seven", average) for average in ("unit", "raw"))
    words = ["sky", "sea", *(p for (p,) in space.prompts[1:])]
    assert texts.names == space.names and texts.owner.tolist() == [0, 0, *range(1, 21)]
    for word, feature, of_raw in zip(words, texts.features, raw.features):
        each = [Letters().encode_text([form.replace("{}", word)], False)[0] for form in texts_of.templates("seven")]
        mean, unit = sum(each) / 7, sum(e / e.norm() for e in each) / 7
        torch.testing.assert_close(feature, unit / unit.norm())
        torch.testing.assert_close(of_raw, mean / mean.norm())
        assert not torch.allclose(feature, of_raw)
    assert len(class_texts(Letters(), label_space("ade150"), "seven").features) == 150
