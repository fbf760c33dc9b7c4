"""The speed scripts at their smallest: what they write, that they go on where they stopped, and what they refuse."""

import json
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def script(monkeypatch):
    """A function that runs a script's `main` with arguments and gives its module."""
    monkeypatch.syspath_prepend(str(BENCH))
    known = {p.stem for p in BENCH.glob("*.py")}

    def run(name: str, *arguments: str):
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        module = __import__(name)
        module.main()
        return module

    yield run
    for name in known & set(sys.modules):
        del sys.modules[name]


def test_decode_writes_rows_and_picture_and_goes_on(script, tmp_path, monkeypatch):
    out = tmp_path / "decode.json"
    module = __import__("decode")
    monkeypatch.setattr(module, "METHODS", {k: module.METHODS[k] for k in ("CSKV 0.2 int4 auto", "RTN int4")})
    monkeypatch.setattr(module, "SOME", ("RTN int4",))
    script("decode", "--tokens", "512", "--rounds", "2", "--dtype", "float32", "--out", str(out))
    (point,) = json.loads(out.read_text())["points"]
    rows = {r["contender"]: r for r in point["rows"]}
    assert rows["DynamicCache + sdpa"]["ratio"] == 1
    assert rows["CSKV 0.2 int4 auto"]["byte_ratio"] < rows["RTN int4"]["byte_ratio"] < 1
    assert sum(r["best_dense"] for r in point["rows"]) == 1
    assert all(r["error"] < 2e-2 and r["over_byte_floor"] > 0 for r in point["rows"])
    assert out.with_suffix(".png").stat().st_size > 10_000
    before = out.read_text()
    monkeypatch.setattr(module, "measure", lambda *_: pytest.fail("measured again"))
    script("decode", "--tokens", "512", "--rounds", "2", "--dtype", "float32", "--out", str(out))
    assert out.read_text() == before


def test_decode_gives_no_time_for_a_wrong_output(script, tmp_path, monkeypatch):
    contenders, out = __import__("contenders"), tmp_path / "decode.json"
    real = contenders.kvshrink_attention
    monkeypatch.setattr(contenders, "kvshrink_attention", lambda *a: (real(*a)[0] * 1.05, None))
    with pytest.raises(SystemExit, match="wrong attention output, no times"):
        script("decode", "--tokens", "256", "--rounds", "1", "--dtype", "float32", "--out", str(out))
    assert not out.exists()


@pytest.mark.parametrize("name", ["decode", "generate", "prefill"])
def test_wrong_arguments_are_refused(script, name, capsys):
    with pytest.raises(SystemExit):
        script(name, "--tokens", "0")
    assert "--tokens" in capsys.readouterr().err


def test_generate_and_prefill_write_their_rows(script, tmp_path, monkeypatch):
    few = {"CSKV 0.2 int4 auto": __import__("decode").METHODS["CSKV 0.2 int4 auto"]}
    for name, more in (("generate", ["--count", "2"]), ("prefill", [])):
        out, module = tmp_path / f"{name}.json", __import__(name)
        monkeypatch.setattr(module, "METHODS", few)
        monkeypatch.setattr(module, "SHOWN", tuple(few), raising=False)
        script(name, "--tokens", "300", "--rounds", "1", *more, "--dtype", "float32", "--out", str(out))
        found = json.loads(out.read_text())
        rows = found["points"][0]["rows"] if name == "generate" else found["rows"]
        assert [r["contender"] for r in rows][-1] == "CSKV 0.2 int4 auto"
        assert all(r["ratio"] > 0 for r in rows)
    assert rows[-1]["above_held"] <= 1
    assert 0 < rows[-1]["added"] < 1
