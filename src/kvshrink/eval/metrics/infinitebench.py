"""InfiniteBench's rules, and SCBench's that came from them. Choices, F1 and ROUGE are in choices.py, qa.py, rouge.py.

Sources: github.com/OpenBMB/InfiniteBench@88b3daa6 (compute_scores.py, arXiv 2402.13718) and
github.com/microsoft/MInference@9987de63 (scbench/compute_scores.py, arXiv 2412.10319).
"""

import re
from typing import Any

DEBUG_PREFIXES = ("answer is:", "is:", "answer:", "correct option is:")
MARKS = str.maketrans(dict.fromkeys("\n:\"'.,?!{}", " "))
CODE_MARKS = str.maketrans(dict.fromkeys("\n.`'\":", " "))


def word_in_text(text: str, answers: tuple[str, ...], meta: dict[str, Any]) -> float:
    """1.0 if the answer is a word of the output: kv_retrieval."""
    return float(answers[0] in text.translate(MARKS).split())


def name_in_text(text: str, answers: tuple[str, ...], meta: dict[str, Any]) -> float:
    """1.0 if the first answer, in capitals, is a word of the output in capitals: longdialogue_qa_eng.

    As upstream, a name of two words is no word, and never right.
    """
    return float(answers[0] in text.translate(MARKS).upper().split())


def first_digits(text: str, answers: tuple[str, ...], meta: dict[str, Any]) -> float:
    """1.0 if the first run of digits is the answer, zeros in front included: passkey, number_string."""
    found = re.search("[0-9]+", text)
    return float(found is not None and found[0] == answers[0])


def last_word_number(text: str, answers: tuple[str, ...], meta: dict[str, Any]) -> float:
    """1.0 if the output's last word is the answer as an integer: code_run."""
    last = text.translate(CODE_MARKS).split()[-1:]
    return float(bool(last) and re.fullmatch("[+-]?[0-9]+", last[0]) is not None and int(last[0]) == int(answers[0]))


def first_number(text: str, answers: tuple[str, ...], meta: dict[str, Any]) -> float:
    """1.0 if the first number, without a sign, is the answer: math_find. For an integer, decimals are cut off.

    Differs from InfiniteBench, which stops with an error on decimals where an integer is the answer; this is SCBench's.
    """
    found = re.search(r"\d+\.\d+|\d+", text)
    if found is None:
        return 0.0
    number = float(found[0])
    return float(number == float(answers[0]) if "." in answers[0] else int(number) == int(answers[0]))


def leading_values(text: str, answers: tuple[str, ...], meta: dict[str, Any]) -> float:
    """Share of the answers, in order, that the output's integers equal up to the first wrong one: math_calc.

    As upstream, signs are not read: a negative value is never right.
    """
    numbers = [int(number) for number in re.findall("[0-9]+", text)]
    for right, answer in enumerate(answers):
        if right >= len(numbers) or numbers[right] != int(answer):
            return right / len(answers)
    return 1.0


def code_choice(text: str, answers: tuple[str, ...], meta: dict[str, Any]) -> float:
    """1.0 if the output starts with the letter and "." or ":", or what follows "answer is:" and the like starts with
    the letter or the function's name: code_debug. answers are the name and the letter."""
    name, letter = answers
    text = text.strip()
    if text[:2] in (f"{letter}.", f"{letter}:"):
        return 1.0
    text = re.sub(" +", " ", re.sub("[\n`'\"*-]|[Oo]ption", " ", text))
    for prefix in DEBUG_PREFIXES:
        if prefix in text:
            return float(text[text.find(prefix) + len(prefix) + 1 :].startswith((letter, name)))
    return 0.0


def text_contains(text: str, answers: tuple[str, ...], meta: dict[str, Any]) -> float:
    """1.0 if the answer stands anywhere in the output: SCBench's kv and prefix_suffix."""
    return float(answers[0] in text)


def text_contains_any(text: str, answers: tuple[str, ...], meta: dict[str, Any]) -> float:
    """1.0 if any answer stands anywhere in the output, in any case: SCBench's qa_eng and many_shot."""
    return float(any(answer.upper() in text.upper() for answer in answers))
