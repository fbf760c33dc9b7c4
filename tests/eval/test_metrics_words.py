import pytest

from kvshrink.eval.metrics.labels import one_label
from kvshrink.eval.metrics.sets import set_f1
from kvshrink.eval.metrics.words import leading_words, quoted, topic, word_recall


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ('a1-b2"', 1),
        ('a1-b2"\nKey: "x" Value: "y"', 1),
        ("a1-b2\nand more", 1),
        ("a1-b2", 1),
        ("a1-b", 0),
        ("a1-b2 ", 0),
        ('"a1-b2"', 0),
        ("The value is a1-b2", 0),
        ("", 0),
    ],
)
def test_quoted_is_the_text_up_to_the_closing_mark(text, score):
    assert quoted(text, ("a1-b2",), {}) == score


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("red green blue gold", 1.0),
        (" red green blue gold silver", 1.0),
        ("red\ngreen", 0.5),
        # what comes right after a miss does not count
        ("red green gold gold", 0.5),
        ("green blue gold", 0.0),
        ("reds", 0.0),
        ("", 0.0),
    ],
)
def test_leading_words_count_up_to_the_first_miss(text, score):
    assert leading_words(text, ("red green blue gold",), {}) == score


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Eat a sandwich, and sit!", 1.0),
        ("sit and eat", 3 / 5),
        ("SANDWICHES", 0.0),
        ("a a a", 1 / 5),
        ("", 0.0),
    ],
)
def test_word_recall_is_a_share_of_different_words(text, score):
    assert word_recall(text, ("Eat a sandwich and sit and eat.",), {}) == pytest.approx(score)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("The benefits of reading for pleasure", 1),
        ('It was "Benefits of reading, for pleasure".', 1),
        # F1 2 * 2 / (2 + 5)
        ("reading pleasure", 1),
        # 2 * 2 / (3 + 5) is just enough, 2 * 2 / (4 + 5) is not
        ("reading pleasure books", 1),
        ("reading pleasure books now", 0),
        # 2 * 2 / (3 + 5) too, but another topic is nearer
        ("The benefits of sleep", 0),
        # 2 * 2 / (2 + 5), and as much with another one
        ("benefits of", 0),
        # in a row inside a longer output
        ("First, as I recall quite well, we spoke about the benefits of reading for pleasure and then of much else", 1),
        ("", 0),
    ],
)
def test_topics_by_hand(text, score):
    # without the article: benefits of reading for pleasure
    others = ["The benefits of sleep", "The future of space tourism", "benefits of regular daily exercise"]
    assert topic(text, ("The benefits of reading for pleasure",), {"others": others}) == score


def test_a_record_of_one_topic_has_no_others():
    assert topic("psychology", ("The psychology of happiness",), {"others": []}) == 1.0
    # whole words only
    assert topic("happinesses", ("Happiness",), {"others": []}) == 0.0


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("Final Answer: [a, b]", 1.0),
        ("I think.\nFinal answer: [b,a]", 1.0),
        ("Final Answer: ['a', \"b\"].", 1.0),
        ("Final Answer: [a, a, b]", 1.0),
        # precision 1, recall 1/2
        ("Final Answer: [a]", 2 / 3),
        # precision 2/4
        ("Final Answer: [a, b, c, d]", 2 / 3),
        ("Final Answer: [c]", 0.0),
        ("Final Answer: []", 0.0),
        # the last line counts, whatever came before
        ("[a, b]\nFinal Answer: [c]", 0.0),
        # no final line: the last list
        ("first [a, c], then [a, b], I say", 1.0),
        ("Final Answer: [a, b]\nThat is all.", 1.0),
        ("a, b", 0.0),
        ("[a, b", 0.0),
        ("", 0.0),
    ],
)
def test_set_f1_by_hand(text, score):
    assert set_f1(text, ("a", "b"), {}) == pytest.approx(score)


def test_an_empty_set_can_be_right():
    assert set_f1("Final Answer: []", (), {}) == 1.0
    assert set_f1("Final Answer: [a]", (), {}) == 0.0


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("kitchen", 1),
        (" The Kitchen. Or the garden?", 1),
        ("the kitchen or the garden", 0),
        ("the garden", 0),
        ("I do not know. Kitchen", 0),
        ("kitchen kitchen", 1),
        ("kitchens", 1),
        ("kitchen <example> garden", 1),
        # the question named the office
        ("the kitchen is north of the office", 1),
        ("", 0),
    ],
)
def test_one_label_by_hand(text, score):
    assert one_label(text, ("kitchen",), {"labels": ["Garden", "hallway", "kitchen"]}) == score


def test_one_label_is_of_any_case():
    assert one_label("fred", ("Fred",), {"labels": ["Bill", "Fred"]}) == 1.0
