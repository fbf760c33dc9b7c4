"""The recipe from books to a loadable model, in seconds: tiny generated books, a tiny model, a few steps."""

import itertools
import json
import os
import random
import signal

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipes.reference_model import tasks
from recipes.reference_model.__main__ import main
from recipes.reference_model.batches import Encoder
from recipes.reference_model.checkpoint import NAME, Interrupt
from recipes.reference_model.corpus import Corpus, read_corpus
from recipes.reference_model.measure import padded_size
from recipes.reference_model.model import build
from recipes.reference_model.recipe import Recipe
from recipes.reference_model.schedule import STAGES, Budget, rate, stage_at, stages
from recipes.reference_model.spectra import channels, measure
from recipes.reference_model.tasks import lookup

SYLLABLES = ("ba", "den", "fi", "gor", "lu", "mas", "ne", "pol", "ri", "tun")
SHAPE = {"hidden": 128, "layers": 2, "kv_heads": 1, "ff": 96, "context": 300, "vocab": 420, "batch_tokens": 640}
TOKENS = 3000


def write_book(path, seed):
    """About 60 KB of sentences over 1,000 made-up words, with the punctuation that novels have."""
    rng = random.Random(seed)
    words = ["".join(parts) for parts in itertools.product(SYLLABLES, repeat=3)]
    sentences = []
    for _ in range(1000):
        body = " ".join(rng.choice(words) for _ in range(rng.randint(4, 12)))
        sentences.append(body.capitalize() + rng.choice((".", "!", ',"', "; he said", "--", "\n", "...", ' "Mr. 7"')))
    path.write_text(" ".join(sentences))


@pytest.fixture(scope="module")
def books(tmp_path_factory):
    folder = tmp_path_factory.mktemp("books")
    for i in range(3):
        write_book(folder / f"book_{i}.txt", i)
    return folder


def command(books, out, *more, **changed):
    shape = [f"--{k.replace('_', '-')}={v}" for k, v in {**SHAPE, **changed}.items()]
    fast = ["--no-compile", "--cases=1", "--lengths", "128", "160"]
    return [f"--books={books}", f"--out={out}", f"--tokens={TOKENS}", *shape, *fast, *more]


@pytest.fixture(scope="module")
def run(books, tmp_path_factory):
    """A run stopped after three steps and gone on with: the folder and the checkpoint of the stop."""
    out = tmp_path_factory.mktemp("runs") / "reference"
    with pytest.raises(SystemExit, match="the same command goes on"):
        main(command(books, out, "--stop-after=3"))
    stopped = torch.load(out / NAME, weights_only=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("recipes.reference_model.evaluate.BOOK_TOKENS", 512)
        patch.setattr("recipes.reference_model.measure.GLANCED", ("lines",))
        main(command(books, out, "--eval-minutes=0"))
    return out, stopped


def test_exported_folder_loads_and_generates(run):
    out, _ = run
    model = AutoModelForCausalLM.from_pretrained(out / "model")
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    assert model.dtype == torch.bfloat16
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode("The pass key is ")]])
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, eos_token_id=None)
    assert made.shape[1] == ids.shape[1] + 1
    saved = torch.load(out / NAME, weights_only=True)["model"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, saved[name].bfloat16()), name


def test_interrupted_run_goes_on(run):
    out, stopped = run
    assert stopped["step"] == 3
    ended = torch.load(out / NAME, weights_only=True)
    batch = SHAPE["batch_tokens"]
    assert stopped["tokens"] < TOKENS <= ended["tokens"] < TOKENS + batch
    assert ended["step"] > 3
    assert ended["seconds"] > stopped["seconds"]
    momentum = ended["optimizers"][0]["state"][0]["momentum_buffer"]
    assert momentum.abs().sum() > 0


def test_finished_run_is_not_repeated(run, books, capsys):
    out, _ = run
    before = torch.load(out / NAME, weights_only=True)["step"]
    main(command(books, out))
    assert torch.load(out / NAME, weights_only=True)["step"] == before
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["model"] == str(out / "model")
    assert set(report["rows"]["lines"]) == {"128", "160"}
    card = (out / "model" / "README.md").read_text()
    assert f"{report['parameters']:,}-parameter" in card
    assert "| passkey at 0.5 |" in card


def test_log_and_spectra(run):
    out, _ = run
    notes = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert any("lines" in note.get("right", {}) for note in notes)
    model = AutoModelForCausalLM.from_pretrained(out / "model", dtype=torch.float32)
    encoder = Encoder(AutoTokenizer.from_pretrained(out / "model"))
    report = measure(model, encoder, Corpus.load(out / "corpus.json"), length=100, documents=1)
    assert 1 <= report["book"]["0.k"]["99%"] <= 64
    assert set(report["all"]) == {f"{i}.{site}" for i in (0, 1) for site in ("k", "k after RoPE", "v")}


@pytest.mark.parametrize("task", sorted(tasks.TASKS))
def test_segments_encode_alike_joined_and_apart(run, task, monkeypatch):
    """Answers are measured on segments, prompts are typed as one text: both must be the same ids."""
    out, _ = run
    corpus = Corpus.load(out / "corpus.json")
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    encode, world = Encoder(tokenizer), corpus.training_world(random.Random(3))
    for i in range(120):
        if i == 60:
            # of the wordings that assoc can mix, the two that are most likely to run into each other
            monkeypatch.setattr(lookup, "WORDINGS", [w for w in lookup.WORDINGS if w[2] == '",' or w[0] == "- "])
        ex = tasks.TASKS[task](world, (70, 150, 300)[i % 3])
        joined = tokenizer.encode(ex.text, add_special_tokens=False)
        ids, weights, numbers = encode(ex, close=False)
        assert ids[1:] == joined, ex.text
        assert len(ids) == len(weights) == len(numbers)
        # the ids above are this tokenizer's; borders between pre-tokens make it true of any vocabulary
        pieces = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(ex.text)
        assert set(itertools.accumulate(len(text) for text, _ in ex.segments)) <= {end for _, (_, end) in pieces}


def test_training_words_and_held_out_words_are_apart(books):
    corpus = read_corpus(Recipe(books=str(books)))
    assert not set(corpus.words) & set(corpus.held_out_words)
    assert list(corpus.held_out) == ["book_2"]
    assert list(corpus.train) == ["book_0", "book_1"]


def test_parameters_are_counted_right(run):
    tokenizer = AutoTokenizer.from_pretrained(run[0] / "model")
    recipe = Recipe(books="", **SHAPE)
    assert len(tokenizer) == recipe.vocab
    assert build(recipe, tokenizer).num_parameters() == recipe.parameters
    assert Recipe(books="").parameters == 3_737_856


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"books": "nowhere"}, "nowhere: no such folder"),
        ({"hidden": 1024, "layers": 8}, "more than 7,000,000.*--allow-large"),
        ({"hidden": 100}, "--hidden 100: use a multiple of 64"),
        ({"kv_heads": 2}, "--kv-heads 2: must divide 2 query heads"),
        ({"device": "cuda"}, "torch sees no GPU"),
        ({"tokens": 0}, "must be more than 0"),
    ],
)
def test_mistakes_are_told_in_one_line(books, tmp_path, monkeypatch, changed, message):
    changed = dict(changed)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=f"^error: .*{message}") as error:
        main(command(changed.pop("books", books), tmp_path / "run", **changed))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_run_keeps_the_settings_it_began_with(run, books):
    with pytest.raises(SystemExit, match=r"ff 96 \(now 64\).*another --out"):
        main(command(books, run[0], ff=64))


def test_stages_end_at_the_context():
    assert tuple(stages(4096)) == STAGES
    assert {s.length for s in stages(300)} == {128, 256, 300}
    longer = stages(16384)
    assert [s.length for s in longer[-3:]] == [4096, 8192, 16384]
    assert [s.end for s in longer] == sorted({s.end for s in longer})
    assert stage_at(0.9999, 16384).length == 16384


def test_learning_rate_rises_then_falls():
    assert rate(0, 0.0) < rate(10, 0.0) < rate(1000, 0.0) == 1.0 == rate(1000, 0.59)
    assert rate(1000, 0.8) == pytest.approx(0.5)
    assert rate(1000, 0.999) == pytest.approx(0.02)


def test_budget_is_spent_by_tokens_or_by_time():
    assert Budget(tokens=100).progress(50, 1e9) == 0.5
    assert Budget(minutes=2).progress(10**9, 60) == 0.5
    assert Budget(tokens=100, minutes=2).progress(50, 240) == 1.0


def test_interrupt_lets_the_step_end():
    before = signal.getsignal(signal.SIGINT)
    with Interrupt() as interrupt:
        os.kill(os.getpid(), signal.SIGINT)
        assert interrupt.asked
        assert signal.getsignal(signal.SIGINT) == before, "a second Ctrl-C must stop at once"
    assert signal.getsignal(signal.SIGINT) == before


def test_padded_sizes_are_few_and_large_enough():
    sizes = [padded_size(n) for n in range(1, 4225)]
    assert all(size >= n for n, size in enumerate(sizes, 1))
    assert len(set(sizes)) == 12


def test_channels_are_the_rank():
    x = torch.randn(50, 3) @ torch.randn(3, 8)
    assert channels(x)["99.9%"] <= 3
    assert channels(torch.eye(8))["90%"] == 8
