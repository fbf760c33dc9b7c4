"""Make a reference model from start to end: books -> tokenizer -> training -> evaluation -> folder to load.

    python -m recipes.reference_model --books books --out runs/reference --minutes 60

Interrupt it at any time; the same command goes on where it stopped. The last line printed is one JSON object.
"""

import argparse
import dataclasses
import json
import math
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from recipes.reference_model import checkpoint
from recipes.reference_model.corpus import Corpus, read_corpus
from recipes.reference_model.evaluate import evaluate
from recipes.reference_model.export import export, rounded
from recipes.reference_model.model import for_training
from recipes.reference_model.recipe import LARGEST, Recipe, RecipeError, begin, check
from recipes.reference_model.schedule import Budget
from recipes.reference_model.tokenizer import train_tokenizer
from recipes.reference_model.train import Machine, train

DEFAULT_TOKENS = 4e7


def main(argv: list[str] | None = None) -> None:
    args = arguments().parse_args(argv)
    try:
        run(args)
    except RecipeError as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit("stopped: the same command goes on from here.") from None


def run(args: argparse.Namespace) -> None:
    recipe = Recipe(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Recipe)})
    check(recipe, args.allow_large)
    budget, machine = _budget(args), Machine(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Machine)})
    if machine.device.startswith("cuda") and not torch.cuda.is_available():
        raise RecipeError(f"--device {machine.device}: torch sees no GPU here. Use --device cpu.")
    corpus, tokenizer = prepare(recipe, args.out)
    progress = train(recipe, corpus, tokenizer, args.out, budget, machine)
    if progress < 1:
        raise SystemExit(f"stopped at {progress:.1%} of the training: the same command goes on from here.")
    trained = checkpoint.read(args.out)["tokens"]
    model = for_training(rounded(recipe, tokenizer, args.out).to(machine.device), machine.compiled)
    lengths = args.lengths or default_lengths(recipe.context)
    report = evaluate(
        model, tokenizer, corpus, args.out / "eval.json", lengths=lengths, cases=args.cases, trained=trained
    )
    to = export(recipe, tokenizer, args.out, report)
    print(json.dumps({"model": str(to), "parameters": model.num_parameters(), **report}))


def prepare(recipe: Recipe, folder: Path) -> tuple[Corpus, PreTrainedTokenizerFast]:
    """Corpus and tokenizer of the run: made once, then read. corpus.json is written last, so it marks both as done."""
    path = folder / "corpus.json"
    corpus = None if path.exists() else read_corpus(recipe)
    begin(recipe, folder)
    if corpus is not None:
        tokenizer, chars_per_token = train_tokenizer(corpus, recipe)
        tokenizer.save_pretrained(folder / "tokenizer")
        dataclasses.replace(corpus, chars_per_token=chars_per_token).save(path)
    return Corpus.load(path), PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")


def default_lengths(context: int) -> list[int]:
    """512 and its doublings up to the context."""
    return [512 * 2**i for i in range(int(math.log2(context / 512)) + 1)] if context >= 512 else [context]


def _budget(args: argparse.Namespace) -> Budget:
    if args.tokens is None and args.minutes is None:
        return Budget(tokens=DEFAULT_TOKENS)
    if any(limit is not None and limit <= 0 for limit in (args.tokens, args.minutes)):
        raise RecipeError("--tokens and --minutes must be more than 0.")
    return Budget(tokens=args.tokens or math.inf, minutes=args.minutes or math.inf)


def arguments() -> argparse.ArgumentParser:
    new, where = Recipe(books=""), Machine()
    parser = argparse.ArgumentParser(
        prog="python -m recipes.reference_model", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--books", required=True, help="folder of plain-text books, one *.txt file per book")
    add("--held-out-books", help="folder of books that are only measured on; default: two known books, or the last")
    add("--out", type=Path, default=Path("runs/reference"), help="folder of the run; the model is in its model/")
    add("--minutes", type=float, help="training time; measuring is not charged")
    add("--tokens", type=float, help=f"tokens to train on (default {DEFAULT_TOKENS:g}, if no --minutes)")
    add("--vocab", type=int, default=new.vocab, help="entries of the tokenizer")
    add("--hidden", type=int, default=new.hidden, help="model width; heads are 64 wide")
    add("--layers", type=int, default=new.layers)
    add("--kv-heads", type=int, default=new.kv_heads)
    add("--ff", type=int, default=new.ff, help="width of the MLP")
    add("--context", type=int, default=new.context, help="longest row, and how far positions are stretched")
    add("--batch-tokens", type=int, default=new.batch_tokens, help="the short stages use a quarter, the others half")
    add("--lr", type=float, default=new.lr, help="learning rate of the matrices (Muon)")
    add("--seed", type=int, default=new.seed)
    add("--allow-large", action="store_true", help=f"allow more than {LARGEST:,} parameters")
    add("--device", default=where.device)
    add("--workers", type=int, default=where.workers, help="processes that generate documents; 0: none extra")
    add("--no-compile", dest="compiled", action="store_false", help="do not compile (no C++ compiler, or a short run)")
    add("--eval-minutes", type=float, default=where.eval_minutes, help="minutes between measurements for log.jsonl")
    add("--save-minutes", type=float, default=where.save_minutes, help="minutes between checkpoints")
    add("--stop-after", type=int, help="stop after this many steps of this call, leaving a checkpoint")
    add("--cases", type=int, default=50, help="documents per row of the final table")
    add("--lengths", type=int, nargs="+", help="lengths of the final table (default: 512, doubled up to the context)")
    return parser


if __name__ == "__main__":
    main()
