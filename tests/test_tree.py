"""The tree stays honest: imports only go down, docs list every method, kernels agree with their meaning."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import kvshrink
from kvshrink import methods
from kvshrink.eval import tasks

ROOT = Path(kvshrink.__file__).parent
REPO = Path(__file__).parents[1]
# low to high; a package may import from itself and from what stands before it
LAYERS = "errors called half_linear shapes identity data reference kernels store methods cache attach fit eval".split()
LAYERS += ["plan", "serve", "cli"]
SOURCES = sorted(p for p in ROOT.rglob("*.py"))


def _imports(path: Path) -> list[str]:
    """Modules of kvshrink that a file imports, wherever in the file."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "kvshrink":
            parts = node.module.split(".")
            found += [parts[1]] if len(parts) > 1 else [a.name for a in node.names]
        elif isinstance(node, ast.Import):
            found += [a.name.split(".")[1] for a in node.names if a.name.startswith("kvshrink.")]
    return found


def test_imports_only_go_down():
    checked = 0
    for path in SOURCES:
        here = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if here == "__init__":
            continue
        for there in _imports(path):
            assert there in LAYERS, f"{path}: what is {there}? Add it to LAYERS."
            assert LAYERS.index(there) <= LAYERS.index(here), f"{path.name} ({here}) imports upward from {there}"
            checked += 1
    assert checked > 100


# circles of files in cache/, to be taken apart; must become empty
KNOWN: set[str] = set()


def test_no_file_imports_itself_in_a_circle():
    """Also not for types alone, or inside a function."""
    modules = {_module(p): p for p in SOURCES}
    edges = {name: _files(path, modules) for name, path in modules.items()}
    circles, done = [], set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        if name in above:
            circles.append([str(modules[n].relative_to(ROOT)) for n in above[above.index(name) :]])
        elif name not in done:
            for other in sorted(edges[name]):
                visit(other, (*above, name))
            done.add(name)

    for name in edges:
        visit(name, ())
    assert not (new := [c for c in circles if not set(c) <= KNOWN]), f"circles of imports: {new}"
    assert {f for c in circles for f in c} == KNOWN, "take out of KNOWN what is in no circle any more"


def _module(path: Path) -> str:
    parts = ("kvshrink", *path.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _files(path: Path, modules: dict[str, Path]) -> set[str]:
    """Modules that a file names in imports: a package is its __init__.py, unless a file inside is named."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: imports are absolute"
            inside = {f"{node.module}.{a.name}" for a in node.names}
            found |= {name if name in modules else str(node.module) for name in inside}
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
    return found & modules.keys()


def test_families_of_methods_do_not_import_each_other():
    """What two of them share stands below them; a method that composes another one finds it by name."""
    families = {p.name for p in (ROOT / "methods").iterdir() if p.is_dir() and p.name[0] != "_"} - {"__pycache__"}
    assert {"evict", "lowrank", "quant"} <= families
    modules = {_module(p): p for p in SOURCES}
    for path in (ROOT / "methods").rglob("*.py"):
        here = path.relative_to(ROOT / "methods").parts[0]
        if here not in ("artifact.py", "__init__.py"):  # which stand above the families
            named = {m.split(".")[2] for m in _files(path, modules) if m.startswith("kvshrink.methods.")}
            assert not (wrong := named & families - {here}), f"{path.name} imports from {wrong}"


def test_what_a_method_can_do_is_asked_of_it():
    """Outside methods/ no class or name of a method is compared with, and a codec's site only where rows are stored."""
    classes = {methods.get(name).__name__ for name in methods.names()}
    found = []
    for path in SOURCES:
        room = path.relative_to(ROOT).parts[0]
        for node in ast.walk(ast.parse(path.read_text())) if room != "methods" else ():
            if (why := _asks_a_class(node, classes)) or (room != "cache" and (why := _asks_a_site(node))):
                found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {why}")
    assert not found, found


def _asks_a_class(node: ast.AST, classes: set[str]) -> str | None:
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("isinstance", "issubclass"):
        every = list(ast.walk(node.args[1]))
        named = {x.id for x in every if isinstance(x, ast.Name)} | {
            x.attr for x in every if isinstance(x, ast.Attribute)
        }
        return f"isinstance of {named & classes}" if named & classes else None
    if isinstance(node, ast.Compare):
        texts = {x.value for x in ast.walk(node) if isinstance(x, ast.Constant) and isinstance(x.value, str)}
        return f"compares with {texts & set(methods.names())}" if texts & set(methods.names()) else None
    return None


def _asks_a_site(node: ast.AST) -> str | None:
    sides = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
    return "compares a codec's site" if any(isinstance(x, ast.Attribute) and x.attr == "site" for x in sides) else None


def test_a_class_that_is_asked_for_is_found():
    for text in ("isinstance(m, CSKV)", "issubclass(c, (RTN, lowrank.CSKV))", "name == 'kivi'", "name in ('a', 'rtn')"):
        assert _asks_a_class(ast.parse(text, mode="eval").body, {"CSKV", "RTN"}), text
    assert not _asks_a_class(ast.parse("isinstance(m, Method | str)", mode="eval").body, {"CSKV"})
    assert _asks_a_site(ast.parse("codec.site == 'k_pre'", mode="eval").body)


def test_the_map_in_the_docstring_lists_every_package():
    packages = {p.name for p in ROOT.iterdir() if p.is_dir() and (p / "__init__.py").exists()}
    for name in packages:
        assert f"{name}/" in kvshrink.__doc__, f"{name}/ is missing from kvshrink's docstring"


def test_public_names_are_few_and_documented():
    assert len(kvshrink.__all__) <= 13
    for name in kvshrink.__all__:
        assert getattr(kvshrink, name).__doc__, name


def test_docs_have_one_row_per_method():
    page = (REPO / "docs" / "methods.md").read_text()
    listed = re.findall(r"^\| `(\w+)` \|", page, flags=re.M)
    assert sorted(listed) == sorted(methods.names()), "add or remove a row in docs/methods.md"


def test_docs_have_one_row_per_task():
    page = (REPO / "docs" / "evaluation.md").read_text()
    listed = re.findall(r"^\| `(\w+)` \|", page, flags=re.M)
    modes = {"agnostic", "aware", "multi_turn", "decode", "chunked", "prefix_compressed", "simulated"}
    assert sorted(set(listed) - modes) == tasks.names(), "add or remove a row in docs/evaluation.md"


def test_every_method_has_a_test_of_its_name():
    for name in methods.names():
        assert (REPO / "tests" / "methods" / f"test_{name}.py").is_file(), name


def test_files_stay_small():
    long = {str(p.relative_to(ROOT)): n for p in SOURCES if (n := len(p.read_text().splitlines())) > 300}
    assert not long, f"split these files: {long}"
    roles = (ROOT / "methods" / "_roles.py").read_text().splitlines()
    assert len(roles) <= 200


def test_every_kernel_offers_exactly_what_its_reference_offers():
    """Read, not imported: a machine without the device must be able to check this."""
    references = list((ROOT / "kernels").glob("*/reference.py"))
    assert len(references) >= 4
    for reference in references:
        for other in set(reference.parent.glob("*.py")) - {reference, reference.parent / "__init__.py"}:
            assert _public(other) == _public(reference), f"{other.parent.name}/{other.name}"


def _public(path: Path) -> dict[str, list[str]]:
    """{function name: argument names} of a file's public functions."""
    body = ast.parse(path.read_text()).body
    return {f.name: [a.arg for a in f.args.args] for f in body if isinstance(f, ast.FunctionDef) and f.name[0] != "_"}


def test_every_module_says_what_it_is():
    for path in SOURCES:
        assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no docstring"


def test_nothing_is_pickled_and_no_machine_is_named():
    tracked = [*SOURCES, *REPO.glob("docs/**/*.md"), *REPO.glob("*.md"), *REPO.glob("bench/*.py")]
    for path in tracked:
        text = path.read_text()
        assert "import pickle" not in text
        assert "torch.save(" not in text
        assert not re.search(r"/(home|root|Users|work)/\w", text), f"{path} names a machine's path"


def test_numbers_in_the_readme_have_a_json_behind_them():
    """Every results file that README and docs point to is committed."""
    for page in [REPO / "README.md", *REPO.glob("docs/*.md")]:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if not link.startswith("http"):
                assert (page.parent / link).exists(), f"{page.name} links to {link}, which is not there"


def test_every_path_in_contributing_is_a_link_to_what_is_there():
    page = re.sub(r"^```.*?^```", "", (REPO / "CONTRIBUTING.md").read_text(), flags=re.M | re.S)
    links = [(text, link) for text, link in re.findall(r"\[([^]]+)\]\(([^)#]+)\)", page) if not link.startswith("http")]
    assert len(links) > 20
    for _, link in links:
        assert (REPO / link).exists(), f"CONTRIBUTING.md links to {link}, which is not there"
    rest = re.sub(r"\[[^]]+\]\([^)]+\)", "", page)
    bare = [word for word in re.findall(r"`([^` ]+)`", rest) if "/" in word or word.endswith((".py", ".md"))]
    assert not bare, f"make links of {bare}"


def test_names_in_contributing_are_in_the_code():
    """Of roles and hooks: what stands in backticks and is one word."""
    page = re.sub(r"^```.*?^```", "", (REPO / "CONTRIBUTING.md").read_text(), flags=re.M | re.S)
    code = "\n".join(p.read_text() for p in SOURCES)
    for name in set(re.findall(r"`([A-Za-z_]{3,})`", page)) - {"Scorer", "Budget"}:
        assert re.search(rf"\b{name}\b", code), f"CONTRIBUTING.md names {name}, which is nowhere"


def test_importing_the_library_imports_no_extra():
    """What a plot, a search, another evaluation or a GPU needs is imported where it is used.

    triton comes with transformers' models, by torch's compiler; none of it comes with us.
    """
    extras = ["matplotlib", "optuna", "lm_eval", "triton"]
    lines = [
        "import sys",
        f"extras = {extras}",
        "from transformers import PreTrainedModel",
        "theirs = set(sys.modules)",
        "import kvshrink",
        "import kvshrink.eval",
        "print(*(x for x in extras if x in sys.modules and (x not in theirs or x != 'triton')))",
    ]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_the_package_needs_no_recipe():
    for path in SOURCES:
        assert not re.search(r"^\s*(from|import) (recipes|bench|tests)\b", path.read_text(), flags=re.M), path


def test_every_benchmark_can_be_imported():
    """A name that moved breaks them unseen: none of them runs in the suite."""
    names = sorted(path.stem for path in (REPO / "bench").glob("*.py"))
    code = f"import importlib\nfor name in {names}: importlib.import_module(name)"
    path = os.pathsep.join(str(p) for p in (REPO / "bench", REPO))
    ran = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
