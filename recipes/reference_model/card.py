"""The model card: what the model is, how to prompt it, what was measured, how it was trained.

Written from the run's own recipe and report, so that no number in it was typed by hand.
"""

from transformers import LlamaForCausalLM

from recipes.reference_model.model import ROPE_THETA
from recipes.reference_model.recipe import HEAD_DIM, Recipe

CARD = """\
# A {parameters:,}-parameter Llama that retrieves from {context} tokens

A plain `LlamaForCausalLM`, trained from scratch on books and generated retrieval documents, so that KV-cache
compression can be measured offline on a model that uses its long context. It is not a chat model and knows nothing
about the world.

| | |
|---|---|
| layers / hidden / MLP | {layers} / {hidden} / {ff} (SwiGLU), RMSNorm, tied embedding |
| attention | {heads} query heads, {kv_heads} KV heads, head dim {head_dim} |
| context, RoPE theta | {context}, {theta:,.0f} |
| tokenizer | byte-level BPE, {vocab} entries, every digit a token, underscores count as letters |
| weights | bf16 safetensors |
| trained on | {tokens:,} tokens, seed {seed} |

## Prompt format

No chat format. Put `<|bos|>` (id 0) first by hand: the tokenizer does not add it. Greedy decoding. A prompt for a
number ends in the character before the first digit (`<`, or the space after `is:`), because a space before a digit is
a token of its own; there is no space after a prompt that ends in `Answer:` for a word.

- lines: `line <key>: REGISTER_CONTENT is <12345>` ... `Tell me what is the REGISTER_CONTENT in line <key>? Answer: <`
- pass key: `The pass key is 12345. Remember it.` ... `What is the pass key? The pass key is `
- needle: `One of the special magic numbers for <word> is: 1234567.` ... `What is the special magic number for <word>
  mentioned in the provided text? The special magic number for <word> mentioned in the provided text is: `
- variables: `VAR ABC = 12345.` `VAR DEF = VAR ABC.` ... `Question: What is the value of VAR DEF? Answer: `
- JSON: `Key: "<key>" Value: "`

## Measured

Exact match of one question per document (number of answers in brackets), keys and filler held out of training.
Exact: every token of the answer is the arg-max given the text before it, which is greedy decoding being right.
bf16 autocast on these weights; `eval.json` has the sizes of the documents.

{table}
"""


def card(recipe: Recipe, model: LlamaForCausalLM, report: dict) -> str:
    return CARD.format(
        parameters=model.num_parameters(),
        context=recipe.context,
        layers=recipe.layers,
        hidden=recipe.hidden,
        ff=recipe.ff,
        heads=recipe.heads,
        kv_heads=recipe.kv_heads,
        head_dim=HEAD_DIM,
        theta=ROPE_THETA,
        vocab=model.config.vocab_size,
        tokens=report["trained_tokens"],
        seed=recipe.seed,
        table=table(report["rows"]),
    )


def table(rows: dict[str, dict]) -> str:
    """One line per measure, one column per length."""
    lengths = sorted({int(length) for row in rows.values() for length in row})
    lines = ["| | " + " | ".join(map(str, lengths)) + " |", "|---" * (len(lengths) + 1) + "|"]
    for name, row in rows.items():
        lines.append(f"| {name} | " + " | ".join(_cell(row.get(str(length), "")) for length in lengths) + " |")
    return "\n".join(lines)


def _cell(value: dict | float | str) -> str:
    return f"{value['exact']:.0%} ({value['answers']})" if isinstance(value, dict) else str(value)
