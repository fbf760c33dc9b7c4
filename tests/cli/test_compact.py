"""kvshrink compact: a document is read once; questions about it are answered as if it had been read before each."""

import json
import shutil

import pytest

from kvshrink import data
from kvshrink.cli import _context


@pytest.fixture
def document(tmp_path):
    file = tmp_path / "book.txt"
    file.write_text(data.path("heldout.txt").read_text(encoding="utf-8")[:2500])
    return file


def last(out: str) -> dict:
    return json.loads(out.splitlines()[-1])


def test_many_questions_about_one_document(run, document):
    code, out, err = run("compact", "--document", document, "--out", "c", "--method", "kvzip:ratio=0.3", "--json")
    assert code == 0, err
    record = last(out)
    assert record["byte_ratio"] < 0.5
    asked = ("generate", "--context", "c", "--max-new-tokens", 6, "--json")
    code, out, err = run(*asked, "--prompt", "What is told?", "--prompt", "Who is there?")
    assert code == 0, err
    both = last(out)["answers"]
    assert all(x["tokens"] > record["tokens"] for x in both)
    code, out, _ = run(*asked, "--prompt", "Who is there?")
    assert last(out)["answers"][0]["output"] == both[1]["output"], "a question does not hear the one before"
    whole = f"{document.read_text()}{_context.BETWEEN}Who is there?"
    code, out, _ = run("generate", "--method", "cskv:keep=1", "--prompt", whole, "--max-new-tokens", 6, "--json")
    assert last(out)["tokens"] == both[1]["tokens"], "as many tokens as in one prompt"


def test_a_lossless_context_answers_as_one_prompt(run, document):
    run("compact", "--document", document, "--out", "c", "--method", "exact")
    code, out, err = run("generate", "--context", "c", "--prompt", "Who is there?", "--max-new-tokens", 8, "--json")
    assert code == 0, err
    whole = f"{document.read_text()}{_context.BETWEEN}Who is there?"
    one = run("generate", "--method", "exact", "--prompt", whole, "--max-new-tokens", 8, "--json")[1]
    assert last(one)["output"] == last(out)["answers"][0]["output"]


def test_a_fitted_method_is_kept_with_its_context(run, refused, document, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text(data.path("calibration.txt").read_text(encoding="utf-8")[:6_000])
    code, _, err = run("compact", "--document", document, "--out", "c", "--method", "cskv", "--text", text)
    assert code == 0, err
    code, out, err = run("generate", "--context", "c", "--prompt", "Who?", "--max-new-tokens", 2, "--json")
    assert code == 0, err
    assert last(out)["answers"][0]["layers"][0]["kind"].startswith("cskv")
    shutil.rmtree(tmp_path / "c" / "artifact")
    assert "does not exist" in refused("generate", "--context", "c", "--prompt", "Who?")


def test_what_is_wrong_is_said_in_a_line(run, refused, document, tmp_path, place):
    empty = tmp_path / "empty.txt"
    empty.write_text(" \n")
    assert "is empty" in refused("compact", "--document", empty, "--out", "c")
    assert "cannot read document" in refused("compact", "--document", "nowhere.txt", "--out", "c")
    assert not (tmp_path / "c").exists(), "nothing was made"
    assert run("compact", "--document", document, "--out", "c", "--method", "knorm")[0] == 0
    assert "other settings" in refused("compact", "--document", document, "--out", "c", "--method", "tova")
    assert "does not exist" in refused("generate", "--context", "nowhere", "--prompt", "x")
    assert "cannot change the context c" in refused("generate", "--context", "c", "--prompt", "x", "--bits", 4)
    assert "2 prompts without --context" in refused("generate", "--prompt", "x", "--prompt", "y")
    assert "another dtype (bfloat16, not float32)" in refused(
        "generate", "--context", "c", "--prompt", "x", "--model", place / "M"
    )
    for name, content in (
        (_context.IDS, None),
        (_context.CACHE, None),
        (_context.ABOUT, '{"format": "kvshrink context"}'),
    ):
        shutil.copytree(tmp_path / "c", tmp_path / "d", dirs_exist_ok=True)
        file = tmp_path / "d" / name
        file.write_bytes(file.read_bytes()[:-20]) if content is None else file.write_text(content)
        refused("generate", "--context", "d", "--prompt", "x")
