"""Finds where a Python file spells out the folder of a run by itself: for tests/test_layout.py."""

import ast

# Names in the folder of a run; folders count where they are part of a path.
FILES = {
    "config.yaml",
    "result.json",
    "state.json",
    "stats.jsonl",
    "stats.csv",
    "health.jsonl",
    "metrics.jsonl",
    "checkpoints.jsonl",
    "evaluation.json",
    "visualizations.json",
    "study.json",
    "index.html",
}
FOLDERS = {"checkpoints", "visualizations", "samples", "projections", "videos", "tb"}
PATH_METHODS = ("joinpath", "glob", "rglob", "with_name")
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


def spelled_out(tree):
    """Names that a parsed file knows; ``RxR`` where it builds the name of a stage's folder."""
    texts = list(_strings(tree))
    names = [text for text in texts if not _is_sentence(text)]
    found = {part for text in names for part in text.split("/")} & FILES
    found |= {part for text in _parts_of_paths(tree) for part in text.split("/")} & FOLDERS
    if any(map(_is_doubled, ast.walk(tree))) or any("%dx%d" in text for text in texts):
        found.add("RxR")
    return found


def _is_sentence(text):
    return any(letter.isspace() for letter in text)


def _text(node):
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else None


def _strings(tree):
    """Every string of a file that is no docstring, parts of f-strings too."""
    holders = [node for node in ast.walk(tree) if isinstance(node, DOCUMENTED)]
    docs = {id(node.body[0].value) for node in holders if isinstance(node.body[0], ast.Expr)}
    for node in ast.walk(tree):
        if (text := _text(node)) is not None and id(node) not in docs:
            yield text


def _parts_of_paths(tree):
    """Strings joined by ``/``, or handed to joinpath, glob and the like; not those of torch.hub."""
    for node in ast.walk(tree):
        joined = []
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Div):
            joined = [] if "torch.hub" in ast.unparse(node.left) else [node.left, node.right]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            joined = node.args if node.func.attr in PATH_METHODS else []
        for inner in (inner for one in joined for inner in ast.walk(one)):
            if (text := _text(inner)) is not None:
                yield text


def _is_doubled(node):
    """An f-string such as ``f"{size}x{size}"`` that stands by itself, and not in a sentence."""
    if not isinstance(node, ast.JoinedStr) or any(
        _is_sentence(_text(v) or "") for v in node.values
    ):
        return False
    pieces = [
        ast.unparse(one.value) if isinstance(one, ast.FormattedValue) else None
        for one in node.values
    ]
    texts = [_text(one) for one in node.values]
    return any(
        pieces[i - 1] is not None and pieces[i - 1] == pieces[i + 1]
        for i in range(1, len(pieces) - 1)
        if texts[i] == "x"
    )
