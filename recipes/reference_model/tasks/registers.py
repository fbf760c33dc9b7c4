"""Line retrieval in the wording of LongEval: which number stands in the line of a given name?"""

from recipes.reference_model.tasks.world import ANSWER, PROMPT, RECORD, Example, World

HEADER = (
    "Below is a record of lines I want you to remember. Each line begins with 'line <line index>' and "
    "contains a '<REGISTER_CONTENT>' at the end of the line as a numerical value.\n"
)
TOKENS_PER_LINE, TOKENS_PER_QUESTION = 15.5, 24.5


def lines(
    world: World, size: int, questions: int | None = None, ask_at: float | None = None, hard: bool = False
) -> Example:
    """Training mixes key styles and asks often; measuring sets `questions` and, from 0 to 1, the line asked for.

    hard: the keys of a measured document share their words.
    """
    ex = Example()
    training = questions is None
    header = not training or world.rng.random() < 0.5
    room = size - (52 if header else 4)
    if training:
        share = world.rng.uniform(0.3, 0.75)
        n = max(2, int(room * share / TOKENS_PER_LINE))
        questions = max(1, int(room * (1 - share) / TOKENS_PER_QUESTION))
    else:
        n = max(2, int((room - questions * TOKENS_PER_QUESTION) / TOKENS_PER_LINE))
    keys = _training_keys(world, n) if training else world.pairs(n, float(hard))
    values = [world.digits(5) for _ in range(n)]
    if header:
        ex.add(HEADER, PROMPT)
    ex.add("".join(f"line {k}: REGISTER_CONTENT is <{v}>\n" for k, v in zip(keys, values, strict=True)), RECORD)
    for i in world.picks(n, questions) if ask_at is None else [min(n - 1, int(ask_at * n))]:
        ex.add(f"Tell me what is the REGISTER_CONTENT in line {keys[i]}? Answer:", PROMPT)
        ex.add(" <", PROMPT)
        ex.add(values[i], ANSWER)
        ex.add(">\n", PROMPT)
    return ex


def _training_keys(world: World, n: int) -> list[str]:
    style = world.rng.random()
    if style < 0.2:
        return world.distinct_words(n)
    if style < 0.24:
        return [str(i) for i in world.rng.sample(range(1, 10 * n + 90), n)]
    return world.pairs(n)
