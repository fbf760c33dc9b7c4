"""RULER's question answering on small files of the two layouts."""

import json
import re

import pytest

from kvshrink.errors import EvalError
from kvshrink.eval import metrics
from tests.eval.test_ruler import length, made

SQUAD = {
    "data": [
        {
            "paragraphs": [
                {
                    "context": f"Article {a} paragraph {p} is about {'many words ' * 20}and {a}{p}.",
                    "qas": [
                        {
                            "question": f"What is {a}{p} about?",
                            "is_impossible": p == 2,
                            "answers": [{"text": f"{a}{p}"}, {"text": "many words"}],
                        }
                    ],
                }
                for p in range(3)
            ]
        }
        for a in range(10, 40)
    ]
}
HOTPOT = [
    {
        "question": f"Who is {i}?",
        "answer": f"Nobody {i}",
        "context": [[f"Title {i}.{j}", [f"Nobody {i}.", f" Is {j}.", " So it goes on and on." * 5]] for j in range(10)],
    }
    for i in range(12)
]
ASK = "Answer the question based on the given documents. Only give me the answer and do not output any other words."


@pytest.fixture
def squad(tmp_path):
    path = tmp_path / "squad.json"
    path.write_text(json.dumps(SQUAD))
    return path


@pytest.fixture
def hotpot(tmp_path):
    path = tmp_path / "hotpot.json"
    path.write_text(json.dumps(HOTPOT))
    return path


def shown(sample):
    head = f"{ASK}\n\nThe following are given documents.\n\n"
    assert sample.context.startswith(f"{head}Document 1:\n")
    assert sample.context.endswith("\n\n")
    documents = re.split(r"(?:^|\n\n)Document \d+:\n", sample.context.removeprefix(head).removesuffix("\n\n"))[1:]
    assert sample.context == head + "\n\n".join(f"Document {i}:\n{d}" for i, d in enumerate(documents, 1)) + "\n\n"
    return documents


def test_squad(squad):
    for i, sample in enumerate(made("qa_1", 8, path=squad)):
        a, p = 10 + i // 2, i % 2  # the third question of each article cannot be answered
        assert 0.85 * 2048 < length(sample) <= 2048
        assert sample.question == f"{ASK}\n\nQuestion: What is {a}{p} about?"
        assert sample.answer_prefix == " Answer:"
        assert sample.answers == (f"{a}{p}", "many words")
        assert sample.max_new_tokens == 32
        assert metrics.score(sample, f"It is {a}{p}.") == 1.0
        documents = shown(sample)
        assert len(set(documents)) == len(documents) > 10
        for q in range(3):  # a question's own article comes first
            assert sum(d.startswith(f"Article {a} paragraph {q} ") for d in documents) == 1


def test_the_needed_document_stands_anywhere(squad):
    found = [shown(s) for s in made("qa_1", 8, path=squad)]
    places = {next(j for j, d in enumerate(f) if d.startswith(f"Article {10 + i // 2} ")) for i, f in enumerate(found)}
    assert len(places) > 3


def test_hotpot(hotpot):
    for i, sample in enumerate(made("qa_2", 12, path=hotpot)):
        documents = shown(sample)
        assert sample.question == f"{ASK}\n\nQuestion: Who is {i}?"
        assert sample.answers == (f"Nobody {i}",)
        assert sum(d.startswith(f"Title {i}.") for d in documents) == 10 < len(documents)
        assert f"Title {i}.3\nNobody {i}. Is 3. So it" in sample.context
        assert 0.85 * 2048 < length(sample) <= 2048


@pytest.mark.parametrize("task", ["qa_1", "qa_2"])
def test_qa_draws_are_repeatable(task, squad, hotpot):
    path = {"qa_1": squad, "qa_2": hotpot}[task]
    assert made(task, 2, path=path) == made(task, 9, path=path)[:2]
    assert made(task, 2, path=path)[0].context != made(task, 2, seed=1, path=path)[0].context


@pytest.mark.parametrize(
    ("task", "layout"),
    [("qa_1", r'dev-v2\.0\.json.*data\[\]\.paragraphs\[\].*"is_impossible"'), ("qa_2", "hotpot.*title")],
)
def test_qa_without_its_file_gives_the_layout(task, layout, tmp_path):
    with pytest.raises(EvalError, match=f"not shipped.*{layout}"):
        made(task)
    with pytest.raises(EvalError, match=f"No such file.*{layout}"):
        made(task, path=tmp_path / "nothing.json")
    for text in ("no json", "[3]", "{}", '{"data": [{"paragraphs": [1]}]}', "[]", '{"data": []}', '[{"context": [1]}]'):
        path = tmp_path / "other.json"
        path.write_text(text)
        with pytest.raises(EvalError, match=layout):
            made(task, path=path)


def test_more_questions_than_there_are(hotpot):
    with pytest.raises(EvalError, match=r"13 samples asked, .*hotpot\.json has 12"):
        made("qa_2", 13, path=hotpot)


def test_more_tokens_than_documents(hotpot):
    with pytest.raises(EvalError, match="120 documents do not fill tokens=100000"):
        made("qa_2", tokens=100_000, path=hotpot)
