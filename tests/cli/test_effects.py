"""An option that has no effect beside another is refused: every command's options, pair by pair."""

import pytest

# command: {an option with its value: the options with which it cannot be, or alone}
NONE = {
    "generate --prompt x": {
        "--artifact a": ["--method rtn", "--keep 0.5", "--bits 4", "--text T/good.txt"],
        "--keep 0.5": ["--method cskv:keep=0.4", "--method rtn", "--method rtn:bits=4", "--method streaming_llm"],
        "--bits 4": ["--method rtn:bits=2", "--method cskv:bits=2", "--method streaming_llm:window=9"],
        "--text T/good.txt": ["--method rtn", "--method streaming_llm"],
        "--prompt-file T/prompt.txt": [""],
    },
    "inspect": {
        "--artifact a": ["--method rtn", "--keep 0.5", "--bits 4"],
        "--keep 0.5": ["--method cskv:keep=0.4", "--method rtn:bits=4"],
        "--bits 4": ["--method cskv:bits=2"],
    },
    "fit --out a": {
        "--plan p": ["--method cskv", "--keep 0.5", "--bits 4", "--shards 2"],
        "--shards 2": ["--method palu", "--method spectral:shards=3"],
        "--keep 0.5": ["--method cskv:keep=0.4"],
        "--bits 4": ["--method cskv:bits=2"],
        "--log-with tensorboard": ["", "--method cskv:keep=0.5", "--method spectral"],
    },
    "plan": {"--byte-ratio 0.5": ["--memory 1MiB", "--kl 0.1"], "--memory 1MiB": ["--kl 0.1"], "--tokens 300": [""]},
    "eval": {
        "--tokens 200": ["", "--task longeval:lines=3", "--task passkey:tokens=100"],
        "--seed 3": ["--method rtn", "--task longeval:lines=3 --method rtn"],
        "--text T/good.txt": ["--method rtn", "--method full --method zeros", "--method streaming_llm"],
        "--keep 0.5": ["--method cskv:keep=0.4 --method rtn:bits=4", "--method full", "--method zeros"],
        "--bits 4": ["--method rtn:bits=2", "--method full"],
        "--mode multi_turn": ["--task passkey --method rtn"],
        "--batch 2": [
            "--task scbench_like:turns=2 --method rtn",
            "--task scbench_like:turns=2 --method rtn --mode multi_turn",
        ],
        "--method rtn": ["--method rtn", "suite", "perplexity"],
        "--cases 3": ["suite --byte-ratio 0.5", "perplexity"],
    },
    "eval perplexity": {
        "--chunk 4": ["", "--mode decode", "--mode prefix_compressed", "--mode simulated"],
        "--trajectory 4": ["--mode simulated"],
        "--text T/good.txt": ["--method rtn", "--method full"],
        "--keep 0.5": ["--method cskv:keep=0.4", "--method full"],
        "--method rtn": ["--method rtn", "--method zeros", "--method streaming_llm:like=rtn"],
    },
    "eval suite --tasks copy": {
        "--scored 8": ["--documents 0"],
        "--text T/good.txt": ["--methods rtn", "--methods rtn,streaming_llm"],
        "--byte-ratio 0.2": ["--methods cskv:keep=0.5", "--methods rtn:bits=4"],
        "--modes multi_turn": ["--documents 0 --methods rtn --lengths 200 --cases 1 --byte-ratio 0.5"],
    },
}
PAIRS = [(command, option, other) for command, known in NONE.items() for option, row in known.items() for other in row]


@pytest.mark.parametrize(("command", "option", "other"), PAIRS, ids=[" ".join(p).strip() for p in PAIRS])
def test_an_option_without_effect_is_refused(refused, place, command, option, other):
    words = [str(place / w) if w.startswith("T/") else w for w in f"{command} {option} {other}".split()]
    assert refused(*words, *([] if "suite" in words[2:] or "perplexity" in words[2:] else ["--model", place / "M"]))


def test_an_option_that_one_of_several_methods_takes_has_an_effect(run, place):
    args = (
        "eval",
        "--task",
        "copy",
        "--tokens",
        150,
        "--cases",
        1,
        "--model",
        place / "M",
        "--text",
        place / "T" / "good.txt",
    )
    code, out, _ = run(*args, "--method", "rtn:bits=4", "--method", "cskv", "--keep", 0.3)
    assert (code, "cskv keep=0.3" in out) == (0, True)


@pytest.mark.parametrize("command", ["plan --tokens 300", "eval suite"])
@pytest.mark.parametrize("given", ["--kept 0", "--kept=0", "--byte-ratio 0"])
def test_a_byte_budget_goes_by_its_old_name_too(refused, place, command, given):
    assert "byte_ratio=0.0 is not possible" in refused(*command.split(), "--model", place / "M", *given.split())
