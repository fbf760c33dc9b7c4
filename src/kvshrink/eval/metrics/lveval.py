# ruff: noqa: RUF001
"""LV-Eval's rules: an answer without the key words scores nothing, so that filler words earn nothing.

Source: github.com/infinigence/LVEval@25aebcb3 (metrics.py), arXiv 2402.05136. meta["keywords"] are the answer's key
words, "" if there are none. The black list takes words out of the gate only, as in the code; the paper describes that
the F1 leaves them out too, which the code does not.
"""

from collections import Counter
from typing import Any

from kvshrink.eval.metrics import _text

GATE, GATE_ZH = 0.2, 0.4  # recall of the key words
STOP = frozenset(
    "and to of in her was with for it from is that his he by she they or at because be on are their what as had were "
    "about being this who but have has when which does".split()
)
STOP_ZH = frozenset(
    (
        "的 和 是 等 在 年 可以 为 与 ‰ 了 或 一种 月 c 至 日 有 进行 于 不 中 × "
        "根据 小 由 亩 也 要 指 法 会 元 主要 以及 通过 首先 对 然后 号 以 所 后 丁 "
        "包括 无 将 用 能 形 方面 因素 位于 而 从 到 一定 用于 但 使用 让 具有 并 亿元 "
        "万元 上 类 基于 才 来 地 片 其他 个 或者 变得 时 给 你 使 条 受 已经 带 度"
    ).split()
)


def gated_f1(text: str, answers: tuple[str, ...], meta: dict[str, Any]) -> float:
    """qa_f1, but 0 if the output has less than 20 % of the key words."""
    found = _text.words(text)
    if (keys := meta["keywords"]) and _recall(found, _text.words(keys), STOP) < GATE:
        return 0.0
    return max(_text.f1(found, _text.words(answer)) for answer in answers)


def gated_f1_zh(text: str, answers: tuple[str, ...], meta: dict[str, Any]) -> float:
    """The same in Chinese: less than 40 % of the key words, which are the answer itself if it has none. Needs jieba."""
    found = _text.words_zh(text)
    scores = []
    for answer in answers:
        keys = _text.words_zh(meta["keywords"] or answer)
        passed = _recall(found, keys, STOP_ZH) >= GATE_ZH
        scores.append(_text.f1(found, _text.words_zh(answer)) if passed else 0.0)
    return max(scores)


def rouge_l_stop_zh(text: str, answers: tuple[str, ...], meta: dict[str, Any]) -> float:
    """ROUGE-L over Chinese words that are not on the black list. Needs jieba.

    As upstream, words are cut twice and empty tokens stay in until ROUGE takes the white space out.
    """
    found = _kept(text)
    shares = (_text.rouge_shares(found, _kept(answer)) for answer in answers)
    return max(2 * p * r / (p + r + 1e-8) for p, r in shares)


def _recall(found: list[str], keys: list[str], stop: frozenset[str]) -> float:
    both = Counter(found) & Counter(keys)
    return sum(n for word, n in both.items() if word not in stop) / len(keys) if keys else 0.0


def _kept(text: str) -> str:
    tokens = _text.cut_zh(" ".join(_text.cut_zh(text)))
    return " ".join(word for token in tokens if (word := _text.bare_zh(token)) not in STOP_ZH)
