"""Stored benchmarks, on tiny files of invented content in the official layouts. Nothing is downloaded."""

import csv
import inspect
import json
import sys
import types
import zipfile

import pytest

from kvshrink.errors import EvalError
from kvshrink.eval import metrics, tasks
from kvshrink.eval.tasks import _files
from kvshrink.eval.tasks.stored import _prompt
from kvshrink.eval.tasks.stored._longbench_prompts import PROMPTS

QASPER = {"input": "Who?", "context": "Ada did it.", "answers": ["Ada", "she"], "length": 3, "all_classes": None}
V2 = {
    "_id": "1", "domain": "Novel", "sub_domain": "x", "difficulty": "hard", "length": "long", "question": " Who? ",
    "choice_A": "Ada", "choice_B": "Bob ", "choice_C": "Cleo", "choice_D": "Dan", "answer": "B",
    "context": "\nBob did.\n",
}  # fmt: skip
TURNS = [{"input": "Key: a", "answer": "1"}, {"input": "Key: b", "answer": "2"}, {"input": "Key: c", "answer": "3"}]
SCBENCH = {"id": 0, "context": '{"a": "1"}', "multi_turns": TURNS}
LVEVAL = {"input": "Who?", "context": "Ada.", "answers": ["Ada", "she"], "length": 9, "answer_keywords": "Ada"}
BABILONG = {"input": " Mary went to the garden. ", "question": "Where is Mary? ", "target": "garden"}
RULER = {
    "context": "The number is 42.", "question": " Which?", "answer_prefix": " It is", "answer": ["42"],
    "task": "niah_single_1", "max_new_tokens": 128,
}  # fmt: skip
LOOGLE = {
    "input": "Ada wrote.", "title": "t", "output": "none",
    "qa_pairs": "[{'Q': 'Who?', 'A': 'Ada', 'S': ['x']}, {'Q': 'What?', 'A': 'a text', 'S': ['x']}]",
}  # fmt: skip
BENCH = {"id": 0, "context": "The key is 7.", "input": "What is the pass key?", "answer": ["71432"], "options": []}
# task, settings, file in a folder, row
OFFICIAL = [
    ("longbench", {"subset": "qasper"}, "data/qasper.jsonl", QASPER),
    ("longbench_v2", {}, "data.json", V2),
    ("scbench", {"subset": "kv"}, "data/scbench_kv.jsonl", SCBENCH),
    ("infinitebench", {"subset": "passkey"}, "passkey.jsonl", BENCH),
    ("lveval", {"subset": "loogle_SD_mixup", "length": "32k"}, "loogle_SD_mixup/loogle_SD_mixup_32k.jsonl", LVEVAL),
    ("babilong", {"subset": "qa1", "length": "0k"}, "data/qa1/0k.json", BABILONG),
    ("loogle", {"subset": "shortdep_qa"}, "LooGLE-testdata/shortdep_qa.jsonl", LOOGLE),
    ("ruler_kvpress", {}, "4096/test.jsonl", RULER),
]
each_task = pytest.mark.parametrize(("task", "settings", "file", "row"), OFFICIAL, ids=[t[0] for t in OFFICIAL])


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def samples(task, path, n=None, **settings):
    return tasks.get(task).samples(n, 0, path=path, **settings)


def one(task, tmp_path, row, **settings):
    return samples(task, write(tmp_path / "rows.jsonl", [row]), **settings)[0]


@each_task
def test_a_folder_of_the_official_layout_is_read(task, settings, file, row, tmp_path):
    write(tmp_path / file, [row, row | {"title": "second"}])
    found = samples(task, tmp_path, **settings)
    assert len(found) >= 2
    assert found == samples(task, tmp_path / file, **settings)
    for sample in found:
        assert callable(metrics.get(sample.metric))
        assert sample.answers
        assert sample.meta["index"] in (0, 1)
        assert 0 <= metrics.score(sample, "some output 12") <= 1
        json.dumps(sample.meta)


@each_task
def test_without_data_the_error_shows_the_layout(task, settings, file, row, tmp_path):
    name = file.rsplit("/", 1)[-1].rsplit(".", 1)[0]
    with pytest.raises(EvalError, match=rf"{task}: give its file as path=, or hub=True to download .*{name}\.jsonl"):
        samples(task, None, **settings)
    with pytest.raises(EvalError, match=rf"does not hold the file\. Expected: .*{name}\.jsonl .*rows like"):
        samples(task, tmp_path, **settings)
    with pytest.raises(EvalError, match="is no file or folder"):
        samples(task, tmp_path / "absent", **settings)


@each_task
def test_a_row_without_a_field_is_an_error(task, settings, file, row, tmp_path):
    field = next(key for key in row if key in ("context", "input", "multi_turns"))
    path = write(tmp_path / "rows.jsonl", [row, {k: v for k, v in row.items() if k != field}])
    with pytest.raises(EvalError, match=rf"{task}: row 1 .*{field}" if task != "loogle" else "loogle: row 1"):
        samples(task, path, **settings)


@each_task
def test_the_first_rows_are_taken_and_too_many_asked_for_is_an_error(task, settings, file, row, tmp_path):
    rows = [row | {key: f"{i} {row[key]}" for key in ("context", "input") if key in row} for i in range(3)]
    path = write(tmp_path / "rows.jsonl", rows)
    assert samples(task, path, 2, **settings) == [s for s in samples(task, path, **settings) if s.meta["index"] < 2]
    with pytest.raises(EvalError, match=r"4 (samples|documents) asked, .* has 3"):
        samples(task, path, 4, **settings)
    with pytest.raises(EvalError, match=r"0 (samples|documents) asked"):
        samples(task, path, 0, **settings)


@each_task
def test_tokens_bound_the_sample(task, settings, file, row, tmp_path):
    long = {"context": "word " * 300} if "context" in row else {"input": "word " * 300}
    path = write(tmp_path / "rows.jsonl", [row | long])
    count = lambda text: len(text.split())  # noqa: E731
    limit = samples(task, path, **settings)[0].max_new_tokens
    tokens = limit + 210
    if task in ("babilong", "ruler_kvpress"):
        with pytest.raises(EvalError, match=rf"sample 0 needs \d+ tokens, tokens={tokens}"):
            samples(task, path, tokens=tokens, count=count, **settings)
        return
    cut = samples(task, path, tokens=tokens, count=count, **settings)
    whole = samples(task, path, **settings)
    for a, b in zip(cut, whole, strict=True):
        used = count(a.context) + count(a.question) + a.max_new_tokens + 1
        assert tokens - 30 <= used <= tokens
        assert a.question == b.question
        assert b.context.startswith(a.context[:20])
        assert b.context.endswith(a.context[-20:])
    assert len({s.context for s in cut}) == 1
    with pytest.raises(EvalError, match="needs count="):
        samples(task, path, tokens=tokens, **settings)
    with pytest.raises(EvalError, match=rf"tokens={limit}"):
        samples(task, path, tokens=limit, count=count, **settings)


def test_every_stored_task_takes_the_same_settings():
    for name in tasks.names("stored"):
        found = inspect.signature(tasks.get(name).samples).parameters
        assert {"n", "seed", "path", "hub", "tokens", "count"} <= set(found), name
    assert {t[0] for t in OFFICIAL} <= set(tasks.names("stored"))


# files


def test_all_kinds_of_files_give_the_same_rows(tmp_path):
    rows = [QASPER | {"all_classes": ["A", "B"]}, QASPER | {"answers": ["one, two"], "all_classes": ["C"]}]
    expected = samples("longbench", write(tmp_path / "a.jsonl", rows), subset="trec")
    assert expected[1].meta["classes"] == ["C"]
    (tmp_path / "b.json").write_text(json.dumps(rows, indent=1))
    with (tmp_path / "c.csv").open("w", newline="") as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    for name in ("b.json", "c.csv"):
        assert samples("longbench", tmp_path / name, subset="trec") == expected
    arrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(arrow.Table.from_pylist(rows), tmp_path / "d.parquet")
    assert samples("longbench", tmp_path / "d.parquet", subset="trec") == expected


def test_a_csv_may_hold_long_contexts(tmp_path):
    with (tmp_path / "c.csv").open("w", newline="") as f:
        writer = csv.DictWriter(f, QASPER)
        writer.writeheader()
        writer.writerow(QASPER | {"context": "x" * 200_000})
    assert "x" * 200_000 in samples("longbench", tmp_path / "c.csv")[0].context


@pytest.mark.parametrize(
    ("name", "text", "what"),
    [
        ("a.jsonl", "{not json", "cannot read"),
        ("a.json", "[1, 2]", "row 0 of a.json is a int"),
        ("a.jsonl", "", "all samples asked, a.jsonl has 0"),
        ("a.txt", "{}", "no .jsonl, .json, .parquet, .csv file"),
        ("a.parquet", "no parquet", "cannot read|pyarrow is missing"),
    ],
)
def test_a_wrong_file_is_an_error_that_shows_the_layout(name, text, what, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(EvalError, match=what):
        samples("longbench", tmp_path / name)


def test_a_missing_library_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "a.parquet").write_text("x")
    with pytest.raises(EvalError, match=r"pyarrow is missing .*kvshrink\[hub\]"):
        samples("longbench", tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(EvalError, match=r"datasets is missing .*kvshrink\[hub\]"):
        samples("ruler_kvpress", None, hub=True)


# hub


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that has the files put into its folder, and notes what is asked of it."""
    asked = []

    def hf_hub_download(repo, file, repo_type):
        asked.append((repo, file, repo_type))
        if not (tmp_path / file).is_file():
            raise FileNotFoundError(f"no {file}")
        return str(tmp_path / file)

    def load_dataset(repo, **table):
        asked.append((repo, table))
        return tables[repo]

    tables = {}
    monkeypatch.setitem(sys.modules, "huggingface_hub", types.SimpleNamespace(hf_hub_download=hf_hub_download))
    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    return types.SimpleNamespace(folder=tmp_path, asked=asked, tables=tables)


@pytest.mark.parametrize(
    ("task", "settings", "repo", "file", "row"),
    [
        ("longbench_v2", {}, "THUDM/LongBench-v2", "data.json", V2),
        ("scbench", {"subset": "kv"}, "microsoft/SCBench", "data/scbench_kv.jsonl", SCBENCH),
        ("infinitebench", {"subset": "passkey"}, "xinrongzhang2022/InfiniteBench", "passkey.jsonl", BENCH),
        ("babilong", {"subset": "qa1", "length": "4k"}, "RMT-team/babilong", "data/qa1/4k.json", BABILONG),
    ],
)
def test_hub_files(task, settings, repo, file, row, hub):
    write(hub.folder / file, [row])
    assert samples(task, None, hub=True, **settings) == samples(task, hub.folder / file, **settings)
    assert hub.asked == [(repo, file, "dataset")]


@pytest.mark.parametrize(
    ("task", "settings", "archive", "member", "row"),
    [
        ("longbench", {"subset": "qasper", "e": True}, "data.zip", "data/qasper_e.jsonl", QASPER),
        ("lveval", {"subset": "lic_mixup"}, "lic_mixup.zip", "lic_mixup/lic_mixup_16k.jsonl", LVEVAL),
        ("lveval", {"subset": "lic_mixup"}, "lic_mixup.zip", "lic_mixup_16k.jsonl", LVEVAL),
    ],
)
def test_hub_archives(task, settings, archive, member, row, hub):
    with zipfile.ZipFile(hub.folder / archive, "w") as z:
        z.writestr("data/other_qasper_e.jsonl", "")
        z.writestr(member, json.dumps(row) + "\n")
    (sample,) = samples(task, None, hub=True, **settings)
    assert row["context"] in sample.context
    assert hub.asked[0][1] == archive


def test_hub_tables(hub):
    hub.tables |= {"simonjegou/ruler": [RULER], "bigai-nlco/LooGLE": [{"context": "c", "question": "q", "answer": "a"}]}
    assert samples("ruler_kvpress", None, 1, hub=True, length=8192)[0].context == RULER["context"]
    assert samples("loogle", None, hub=True, subset="longdep_summarization")[0].answers == ("a",)
    assert hub.asked == [
        ("simonjegou/ruler", {"data_dir": "8192", "split": "test"}),
        ("bigai-nlco/LooGLE", {"name": "summarization", "split": "test"}),
    ]


def test_nothing_is_downloaded_unless_asked(hub):
    with pytest.raises(EvalError, match="hub=True"):
        samples("longbench_v2", None)
    with pytest.raises(EvalError, match=r"cannot load data.json .*no data.json.* give path="):
        samples("longbench_v2", None, hub=True)
    (hub.folder / "data.zip").write_text("no archive")
    with pytest.raises(EvalError, match=r"cannot load data\.zip"):
        samples("longbench", None, hub=True)
    path = write(hub.folder / "rows.jsonl", [V2])
    asked = len(hub.asked)
    samples("longbench_v2", path, hub=True)
    assert len(hub.asked) == asked


# prompts


def test_longbench_prompts_are_the_official_ones(tmp_path):
    # the length of the official file, so that no character is lost in the way the texts are put together here
    assert len(json.dumps(PROMPTS, indent=4, ensure_ascii=False) + "\n") == 4978
    sample = one("longbench", tmp_path, QASPER, subset="hotpotqa")
    rule = "Answer the question based on the given passages. Only give me the answer and do not output any other words."
    assert sample.context == f"{rule}\n\nThe following are given passages.\nAda did it."
    assert sample.question + sample.answer_prefix == f"\n\n{rule}\n\nQuestion: Who?\nAnswer:"
    assert sample.answers == ("Ada", "she")
    code = one("longbench", tmp_path, QASPER | {"input": "def f():\n"}, subset="repobench-p")
    assert code.prompt == "Please complete the code given below. \nAda did it.def f():\nNext line of code:\n"
    assert code.meta["chat"] is False


def test_every_longbench_subset_has_all_it_needs(tmp_path):
    module = tasks.get("longbench")
    assert len(module.SUBSETS) == 21
    assert set(module.SUBSETS) == set(PROMPTS)
    assert len(module.SUBSETS_E) == 13
    for subset, kind in module.SUBSETS.items():
        sample = one("longbench", tmp_path, QASPER | {"all_classes": ["Ada", "Bob"]}, subset=subset)
        assert sample.metric == kind.metric
        assert callable(metrics.get(sample.metric))
        assert sample.context.endswith("Ada did it.")
        assert sample.question
    first = [name for name, kind in module.SUBSETS.items() if kind.first_line]
    assert first == ["trec", "triviaqa", "samsum", "lsht"]


def test_longbench_e_has_buckets_and_its_own_files(tmp_path):
    write(tmp_path / "qasper.jsonl", [QASPER])
    write(tmp_path / "qasper_e.jsonl", [QASPER | {"length": n} for n in (3999, 4000, 7999, 8000)])
    found = samples("longbench", tmp_path, e=True)
    assert [s.meta["bucket"] for s in found] == ["0-4k", "4-8k", "4-8k", "8k+"]
    assert len(samples("longbench", tmp_path)) == 1
    with pytest.raises(EvalError, match="no subset of LongBench-E 'musique'"):
        samples("longbench", tmp_path, subset="musique", e=True)
    with pytest.raises(EvalError, match=r"no subset 'x'.*qasper"):
        samples("longbench", tmp_path, subset="x")


def test_longbench_scores_its_own_answer(tmp_path):
    trec = one("longbench", tmp_path, QASPER | {"answers": ["Food"], "all_classes": ["Food", "Animal"]}, subset="trec")
    assert metrics.score(trec, "Food\nAnimal") == 1.0
    assert metrics.score(trec, "Food Animal") == 0.5


def test_longbench_v2_prompt(tmp_path):
    sample = one("longbench_v2", tmp_path, V2)
    assert sample.context == ("Please read the following text and answer the question below.\n\n<text>\nBob did.")
    assert sample.question == (
        "\n</text>\n\nWhat is the correct answer to this question: Who?\nChoices:\n(A) Ada\n(B) Bob\n(C) Cleo\n(D) Dan"
        '\n\nFormat your response as follows: "The correct answer is (insert answer here)".'
    )
    assert metrics.score(sample, "The correct answer is (B).") == 1.0
    assert sample.meta == {"index": 0, "chance": 0.25, "domain": "Novel", "difficulty": "hard", "length": "long"}


def test_braces_of_a_context_stay(tmp_path):
    assert one("longbench", tmp_path, QASPER | {"context": "{x} {{y}}", "input": "{z}"}).prompt.count("{x} {{y}}") == 1
    assert "{z}" in one("longbench", tmp_path, QASPER | {"input": "{z}"}).question


def test_scbench_turns_share_one_context(tmp_path):
    path = write(tmp_path / "rows.jsonl", [SCBENCH, SCBENCH | {"context": "{}"}])
    found = samples("scbench", path, subset="kv")
    assert [s.meta["turn"] for s in found] == [0, 1, 2, 0, 1, 2]
    assert [s.meta["context"] for s in found] == [0, 0, 0, 1, 1, 1]
    assert len({s.context for s in found[:3]}) == 1
    head = "Extract the value corresponding to the specified key in the JSON object below.\n\n"
    assert found[0].prompt == f'{head}{{"a": "1"}}\n\nKey: a'
    assert found[1].question == "\n\nKey: b"
    assert metrics.score(found[1], "it is 2") == 1.0
    assert len(samples("scbench", path, 1, subset="kv", turns=2)) == 2


def test_scbench_choices_numbers_and_mixed_turns(tmp_path):
    turn = {"input": "Who?", "answer": "Bob", "options": ["Ada", "Bob", "Cleo", "Dan"]}
    a, b = samples(
        "scbench", write(tmp_path / "a.jsonl", [SCBENCH | {"multi_turns": [turn, turn]}]), subset="choice_eng"
    )
    options = "\n\nQuestion: Who?\nA. Ada\nB. Bob\nC. Cleo\nD. Dan\n\nThe "
    assert a.question == f"{options}the correct answer is"
    assert b.question == f"{options}letter of the correct answer is"
    assert a.answers == ("Bob", "B")
    mf = {"multi_turns": [{"input": "The largest number is", "answer": 9}, {"input": "The median is", "answer": 4.5}]}
    a, b = samples("scbench", write(tmp_path / "b.jsonl", [SCBENCH | mf]), subset="mf")
    assert a.context == 'What is the largest number?\n\n{"a": "1"}'
    assert b.question == "\n\nWhat is the median?\n\nThe median is"
    assert metrics.score(a, "9") == metrics.score(b, "4.5") == 1.0
    mixed = [{"input": "Sum up", "answer": "x", "task": "scbench_summary"},
             {"input": "Key?", "answer": "42", "task": "scbench_passkey"}]  # fmt: skip
    path = write(tmp_path / "c.jsonl", [SCBENCH | {"multi_turns": mixed}])
    found = samples("scbench", path, subset="summary_with_needles")
    assert [(s.metric, s.max_new_tokens) for s in found] == [("rouge_lsum", 800), ("first_digits", 15)]


def test_scbench_refuses_what_it_cannot_score(tmp_path):
    with pytest.raises(EvalError, match="repoqa is scored by parsing code"):
        samples("scbench", tmp_path, subset="repoqa")
    path = write(tmp_path / "rows.jsonl", [SCBENCH | {"multi_turns": [{"input": "x"}]}])
    with pytest.raises(EvalError, match=r"row 0 has 1 turns; \[0\] lack input or answer"):
        samples("scbench", path, subset="kv")
    with pytest.raises(EvalError, match="needs 4 options"):
        samples("scbench", write(tmp_path / "b.jsonl", [SCBENCH]), subset="choice_eng")


@pytest.mark.parametrize(
    ("subset", "change", "start", "end", "answers", "right"),
    [
        ("passkey", {}, "There is", "What is the pass key?\n\nThe pass key is", ("71432",), " 71432."),
        ("code_run", {"input": "Call func_3(-7) now.", "answer": [-5]}, "There is a function called func_3 in",
         "compute the exact value of func_3(-7). The value of func_3(-7) is", ("-5",), "-5"),
        ("math_find", {"input": "The 2nd largest number of the list is: ", "answer": [12]},
         "What is the 2nd largest number in the following list?", "The 2nd largest number of the list is: ",
         ("12",), "12"),
        ("math_calc", {"context": "1 + 2 - 1", "answer": [1, 3, 2]}, "Let us", "\nValues:", ("1", "3", "2"), "1, 3, 2"),
        ("code_debug", {"options": ["f", "g", "h", "i"], "answer": ["g"]}, "Following is",
         "A. f\nB. g\nC. h\nD. i\n\nThe correct option is:", ("g", "B"), "B. g"),
        ("longbook_choice_eng", {"options": ["f", "g", "h", "i"], "answer": ["i"]}, "Read the book",
         "A. f\nB. g\nC. h\nD. i\n\nThe letter of the correct answer is", ("i", "D"), "D"),
        ("longdialogue_qa_eng", {"answer": ["ADA"]}, "Below is a dialogue", "with $$MASK$$ is likely", ("ADA",), "Ada"),
    ],
)  # fmt: skip
def test_infinitebench(subset, change, start, end, answers, right, tmp_path):
    sample = one("infinitebench", tmp_path, BENCH | change, subset=subset)
    assert sample.prompt.startswith(start)
    assert sample.prompt.endswith(end)
    assert sample.context.endswith((BENCH | change)["context"])
    assert sample.answers == answers
    assert metrics.score(sample, right) == 1.0


def test_infinitebench_rows_that_do_not_fit(tmp_path):
    for subset in ("code_run", "math_find"):
        with pytest.raises(EvalError, match="the input of row 0 has no"):
            one("infinitebench", tmp_path, BENCH, subset=subset)
    with pytest.raises(EvalError, match="needs 4 options"):
        one("infinitebench", tmp_path, BENCH, subset="code_debug")
    assert len(tasks.get("infinitebench").SUBSETS) == 12


def test_lveval(tmp_path):
    sample = one("lveval", tmp_path, LVEVAL, subset="loogle_SD_mixup")
    assert sample.context.startswith("Please answer the following question based on the given passages. Questions and ")
    assert sample.context.endswith("evidence.\n\nArticle: Ada.")
    assert sample.question.endswith("any other explanation and evidence.\n\nQuestion: Who?\nAnswer:")
    assert sample.answers == ("Ada",)
    assert sample.meta["keywords"] == "Ada"
    assert len(tasks.get("lveval").SUBSETS) == 11
    with pytest.raises(EvalError, match="no length '8k'"):
        one("lveval", tmp_path, LVEVAL, length="8k")


def test_babilong(tmp_path):
    sample = one("babilong", tmp_path, BABILONG)
    assert sample.context.startswith(
        "I will give you context with the facts about positions of different persons hidden"
    )
    assert sample.context.endswith(
        "is \u2019location\u2019. Do not write anything else after that.\n\n<context>\nMary went to the garden."
    )
    assert sample.question == "\n</context>\n\nQuestion: Where is Mary?"
    assert metrics.score(sample, "The most recent location of Mary is garden. Or the office") == 1.0
    assert metrics.score(sample, "The garden or the office") == 0.0
    # a label that the question names does not count
    where = {"question": "Where was the apple before the kitchen?"}
    assert "kitchen" not in one("babilong", tmp_path, BABILONG | where, subset="qa3").meta["labels"]
    listed = one("babilong", tmp_path, BABILONG | {"target": "apple,milk"}, subset="qa8")
    assert metrics.score(listed, "apple, milk") == 1.0


@pytest.mark.parametrize("subset", [f"qa{i}" for i in range(1, 11)])
def test_every_babilong_prompt_is_complete(subset, tmp_path):
    sample = one("babilong", tmp_path, BABILONG, subset=subset)
    assert sample.context.count("<example>\n") == sample.context.count("\n</example>") >= 2
    assert "{" not in sample.prompt
    assert sample.meta["labels"]


def test_loogle_layouts_agree(tmp_path):
    hub = [
        {"context": "Ada wrote.", "question": q, "answer": a, "id": 1}
        for q, a in (("Who?", "Ada"), ("What?", "a text"))
    ]
    a = samples("loogle", write(tmp_path / "a.jsonl", [LOOGLE]))
    assert a == samples("loogle", write(tmp_path / "b.jsonl", hub))
    assert len(a) == 2
    assert a[0].context == a[1].context == "Please answer the question based on the long texts below. \nAda wrote."
    assert a[1].question == "\nQuestion: What?\nAnswer: "
    assert [s.meta["turn"] for s in a] == [0, 1]
    assert metrics.score(a[0], "Ada") == 1.0
    # a row a document: one document of two
    assert len(samples("loogle", write(tmp_path / "c.jsonl", [LOOGLE, LOOGLE | {"input": "x"}]), 1)) == 2


def test_loogle_cloze_and_summary(tmp_path):
    repository = LOOGLE | {"qa_pairs": str([{"Q": "<mask-0> wrote", "A": {"<mask-0>": "Ada"}, "S": "x"}])}
    a = one("loogle", tmp_path, repository, subset="shortdep_cloze")
    b = one("loogle", tmp_path, {"context": "Ada wrote.", "question": "<mask-0> wrote", "answer": ["Ada"]},
            subset="shortdep_cloze")  # fmt: skip
    assert a == b
    assert "for example: {'<mask-0>': 'Bob', " in a.context
    assert metrics.score(a, "{'<mask-0>': 'Ada'}") == 1.0
    paper = LOOGLE | {"qa_pairs": "none", "output": "Ada's text"}
    summary = one("loogle", tmp_path, paper, subset="longdep_summarization")
    assert summary.answers == ("Ada's text",)
    assert summary.prompt == "Please generate a summary of the below paper. \nAda wrote.\n Summarization: "


def test_loogle_metrics(tmp_path):
    assert one("loogle", tmp_path, LOOGLE, metric="bleu_1").metric == "bleu_1"
    with pytest.raises(EvalError, match=r"bertscore needs a model or a word net\. Offline: rouge_l_recall"):
        one("loogle", tmp_path, LOOGLE, metric="bertscore")
    with pytest.raises(EvalError, match="no metric for shortdep_qa 'cloze_exact'"):
        one("loogle", tmp_path, LOOGLE, metric="cloze_exact")


def test_ruler_kvpress(tmp_path):
    qa = RULER | {"task": "qa_1", "answer": ["one", "two"]}
    path = write(tmp_path / "rows.jsonl", [RULER, qa, qa])
    found = samples("ruler_kvpress", path)
    assert found[0].prompt == "The number is 42. Which? It is"
    assert [s.metric for s in found] == ["string_match_all", "string_match_part", "string_match_part"]
    assert metrics.score(found[1], "two") == 1.0
    assert len(samples("ruler_kvpress", path, subset="qa_1")) == 2
    with pytest.raises(EvalError, match=r"no length '512'\. Known: 4096, 8192, 16384"):
        samples("ruler_kvpress", path, length=512)
    with pytest.raises(EvalError, match="3 samples of qa_1 asked, the file has 2"):
        samples("ruler_kvpress", path, 3, subset="qa_1")


# cutting


def words(text):
    return len(text.split())


def test_the_middle_is_cut_and_both_halves_are_as_long_as_fits():
    context, question = " ".join(f"w{i}" for i in range(1000)), " Who did it ?"
    cut, asked = _prompt.cut_middle("x", context, question, 10, 111, words)
    kept = cut.split()
    assert asked == question
    assert kept[:3] == ["w0", "w1", "w2"]
    assert kept[-1] == "w999"
    head = next(i for i, (a, b) in enumerate(zip(kept, context.split(), strict=False)) if a != b)
    assert head in (49, 50)  # half of 111 - 10 - 1
    assert 98 <= len(kept) + 4 <= 100


def test_a_prompt_that_fits_is_left_alone():
    assert _prompt.cut_middle("x", "a b", " c", 1, 5, words) == ("a b", " c")
    assert _prompt.cut_middle("x", "a b", " c", 1, 4, words) != ("a b", " c")
    assert _prompt.cut_middle("x", "a b", " c", 1, None, None) == ("a b", " c")


def test_a_question_longer_than_half_loses_its_start():
    question = " " + " ".join(f"q{i}" for i in range(100))
    context, asked = _prompt.cut_middle("x", "c0 c1 c2", question, 1, 42, words)
    assert context.split() == ["c0", "c1", "c2"]
    assert asked.split()[0] == "q0"
    assert asked.split()[-1] == "q99"
    assert 38 <= words(context) + words(asked) <= 40


def test_a_tokenizer_that_counts_pieces_otherwise_still_fits():
    count = lambda text: len(text.split()) + 20 * ("w0 " in text and "w999" in text)  # noqa: E731
    context = " ".join(f"w{i}" for i in range(1000))
    cut, asked = _prompt.cut_middle("x", context, " Who ?", 1, 102, count)
    assert count(cut) + count(asked) <= 100


def test_fields_of_a_csv_that_hold_lists():
    assert _files.texts("['a', 'b']") == ("a", "b")
    assert _files.texts("[broken") == ("[broken",)
    assert _files.texts(("a", 1)) == ("a", "1")
    assert _files.texts("a") == ("a",)
