"""Key-value retrieval, graphs, shared contexts and copying: the contexts hold what the answers say."""

import json
import re
from itertools import pairwise

import pytest

from kvshrink.errors import EvalError
from kvshrink.eval import metrics, tasks
from kvshrink.eval.tasks import _common
from kvshrink.eval.tasks.generated import copy, graphwalks, scbench_like


def chars(text: str) -> int:
    """A tokenizer with four characters a token."""
    return (len(text) + 3) // 4


def make(name, n, seed=0, tokens=3000, **settings):
    return tasks.get(name).samples(n, seed, tokens=tokens, count=chars, **settings)


# --- kv_retrieval


@pytest.mark.parametrize("pairs", ["uuid", "short"])
def test_the_json_holds_the_pairs_and_the_asked_key_its_depth(pairs):
    for s in make("kv_retrieval", 5, pairs=pairs):
        assert s.context.startswith("JSON data:\n{")
        held = json.loads(s.context.removeprefix("JSON data:\n"))
        assert held[s.meta["key"]] == s.answers[0]
        assert len(held) == s.meta["pairs"] > 20
        assert list(held).index(s.meta["key"]) == round(s.meta["depth"] * (len(held) - 1))
        assert s.question + s.answer_prefix == f'Key: "{s.meta["key"]}" Value: "'
        assert metrics.score(s, s.answers[0] + '"\nKey: "x" Value: "y') == 1.0
        assert metrics.score(s, s.answers[0][:-1] + '"\n') == 0.0


def test_short_keys_are_limited():
    with pytest.raises(EvalError, match="10000 pairs do not fill tokens=1000000"):
        make("kv_retrieval", 1, tokens=10**6, pairs="short")


def test_the_official_key_value_prompt():
    s = make("kv_retrieval", 1, wording="official")[0]
    start = "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n{"
    assert s.context.startswith(start)
    assert json.loads(s.context.split("JSON data:\n")[1])[s.meta["key"]] == s.answers[0]
    assert s.prompt.endswith(f'"}}\n\nKey: "{s.meta["key"]}"\nThe value associated with the specified key is: ')
    assert metrics.score(s, f'It is "{s.answers[0]}".') == 1.0
    assert metrics.score(s, s.answers[0][:-1]) == 0.0


# --- graphwalks

EDGES = [("a", "b"), ("a", "c"), ("b", "c"), ("c", "d"), ("d", "a"), ("b", "e"), ("e", "e")]


def test_bfs_and_parents_by_hand():
    assert graphwalks.bfs(EDGES, "a", 1) == {"b", "c"}
    # c is nearer by the direct edge
    assert graphwalks.bfs(EDGES, "a", 2) == {"d", "e"}
    assert graphwalks.bfs(EDGES, "a", 3) == set()
    assert graphwalks.parents(EDGES, "c") == {"a", "b"}
    assert graphwalks.parents(EDGES, "e") == {"b", "e"}


@pytest.mark.parametrize("settings", [{"hops": 1}, {"hops": 2}, {"hops": 3}, {"operation": "parents"}])
def test_the_answer_follows_from_the_listed_edges(settings):
    for s in make("graphwalks", 5, 3, **settings):
        listed = s.context.split("The graph\nEdges:\n")[1]
        edges = re.findall("^([0-9a-f]{10}) -> ([0-9a-f]{10})$", listed, re.MULTILINE)
        nodes = {a for a, _ in edges}
        assert len(edges) == len(set(edges)) == 2 * len(nodes) == 2 * s.meta["nodes"]
        assert all(a != b for a, b in edges)
        node = s.meta["node"]
        if "hops" in settings:
            assert s.question == f"Operation: BFS from node {node} with depth {settings['hops']}.\n"
            assert set(s.answers) == graphwalks.bfs(edges, node, settings["hops"])
            at = min(i for i, (a, _) in enumerate(edges) if a == node) if s.meta["depth"] < 1 else len(edges) - 1
        else:
            assert s.question == f"Operation: Parents of node {node}.\n"
            assert set(s.answers) == graphwalks.parents(edges, node)
            at = round(s.meta["depth"] * (len(edges) - 1))
        asked = round(s.meta["depth"] * (len(edges) - 1))
        # an edge that the answer needs is at the depth; another one may stand before it
        assert at <= asked
        assert node in edges[asked]
        assert len(s.answers) > 0


def test_the_example_in_the_prompt_is_right():
    listed = graphwalks.INTRO.split("Example\nEdges:\n")[1]
    edges = re.findall(r"^(\w+) -> (\w+)$", listed, re.MULTILINE)
    assert graphwalks.bfs(edges, "aa11", 1) == graphwalks.parents(edges, "cc33") == {"bb22", "dd44"}
    assert listed.count("Final Answer: [bb22, dd44]") == 2


def test_hops_have_a_range():
    with pytest.raises(EvalError, match=r"hops=5\. Use 1 to 4"):
        make("graphwalks", 1, hops=5)


# --- scbench_like


@pytest.mark.parametrize("kind", scbench_like.VARIANTS)
@pytest.mark.parametrize("turns", [1, 3, 6])
def test_turns_share_a_context_and_ask_different_things(kind, turns):
    made = make("scbench_like", 3, kind=kind, turns=turns)
    assert [(s.meta["context"], s.meta["turn"]) for s in made] == [(i, j) for i in range(3) for j in range(turns)]
    groups = [made[i * turns : (i + 1) * turns] for i in range(3)]
    for group in groups:
        assert len({s.context for s in group}) == 1
        assert len({s.question for s in group}) == len({s.answers for s in group}) == turns
    assert len({group[0].context for group in groups}) == 3
    # depths go on from one context to the next
    depths = [_common.depth(i) for i in range(3 * turns)]
    assert [s.meta["depth"] for s in made] == pytest.approx(depths, abs=0.05)


def test_shared_json_holds_every_answer():
    for s in make("scbench_like", 2, kind="kv"):
        held = json.loads(s.context.split("JSON data:\n")[1])
        key = re.search('Key: "(.*)"', s.question)[1]
        assert held[key] == s.answers[0]
        assert list(held).index(key) == round(s.meta["depth"] * (len(held) - 1))


def test_one_string_has_the_prefix_and_the_suffix_and_others_one_of_them():
    for s in make("scbench_like", 3, kind="prefix_suffix"):
        strings = s.context.split("\n\n")[1].split("\n")
        start, end = re.search(r"begins with (\w+) and ends with (\w+)\?", s.question).groups()
        assert len(strings) == len(set(strings)) == s.meta["strings"]
        assert [x for x in strings if x.startswith(start) and x.endswith(end)] == list(s.answers)
        assert len([x for x in strings if x.startswith(start)]) > 1
        assert len([x for x in strings if x.endswith(end)]) > 1
        assert strings.index(s.answers[0]) == round(s.meta["depth"] * (len(strings) - 1))


def test_the_chains_of_variables_hold_their_values():
    for s in make("scbench_like", 3, kind="vt"):
        value: dict[str, str] = {}
        for name, source in re.findall(r"^VAR (\w+) = (?:VAR )?(\w+)$", s.context, re.MULTILINE):
            # every statement stands behind the one that it needs
            value[name] = source if source.isdigit() else value[source]
        asked = re.search(r"assigned the value (\d+)", s.question)[1]
        assert len(value) == 25
        assert {name for name, held in value.items() if held == asked} == set(s.answers)
        assert s.context.index(s.answers[0]) / len(s.context) == pytest.approx(s.meta["depth"], abs=0.03)
        assert metrics.score(s, " ".join(s.answers[:2])) == pytest.approx(0.4)


def test_the_array_holds_the_ranks():
    asked = set()
    for s in make("scbench_like", 2, kind="mf", turns=6):
        numbers = json.loads(s.context.split("\n\n")[1])
        rank = re.search("What is the (.*) number", s.question)[1]
        ordered = sorted(numbers, reverse="largest" in rank)
        place = ["second", "third"].index(rank.split()[0]) + 1 if " " in rank else 0
        assert s.answers == (str(ordered[place]),)
        assert numbers.index(ordered[place]) == round(s.meta["depth"] * (len(numbers) - 1))
        assert len(set(numbers)) == s.meta["numbers"]
        asked.add(rank)
        # in random order: half of the steps go up
        ups = sum(a < b for a, b in pairwise(numbers))
        assert 0.4 < ups / len(numbers) < 0.6
    assert asked == set(scbench_like.RANKS)


@pytest.mark.parametrize(("kind", "turns"), [("kv", 0), ("mf", 7)])
def test_turns_have_a_range(kind, turns):
    with pytest.raises(EvalError, match=f"turns={turns}. Use at least 1"):
        make("scbench_like", 1, kind=kind, turns=turns)


# --- copy


def test_copy_asks_for_the_words_behind_three_that_stand_once():
    for s in make("copy", 9):
        lead = s.question.removeprefix("Repeat the text. ")
        assert len(lead.split()) == copy.LEAD
        assert len(s.answers[0].split()) == copy.ANSWER
        words = s.context.removeprefix("Text: ").split()
        assert s.context.count(f"{lead} {s.answers[0]}") == s.context.count(lead) == 1
        assert len(words) == len(set(words)) == s.meta["words"]
        at = s.context.index(lead) / len(s.context)
        assert at == pytest.approx(s.meta["depth"], abs=0.05)


def test_copied_words_repeat_only_when_the_book_has_no_more():
    words = [f"w{i}" for i in range(50)]
    order = copy._words_in_order(_common.rng("test", 0, 0), words, 120)
    assert sorted(order[:50]) == sorted(order[50:100]) == sorted(words)
    assert order[:50] != order[50:100]
    assert len(order) == 120
