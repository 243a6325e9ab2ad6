"""Count branches on a run's method, space and conditioning, and where flags are named.

    python tests/support/count_choices.py [ROOT]

A branch is an `if`, a conditional expression, a comprehension's filter or a `while` whose test
names the choice. The counts are for a reader who compares two versions; nothing depends on them.
"""

import ast
import re
import sys
from collections import Counter
from pathlib import Path

CHOICES = {
    "space": r"\b(encoding|codec|latents)\b",
    "conditioning": r"\b(n_classes|text_width|encoded|has_captions|conditioning|caption_store)\b"
    r"|\bcaptions\b(?!\[)",
    "method": r"\bprediction\b|\bobjective\b|\"ddpm\"|learned_sigma",
}
ROOMS = (
    "runtime",
    "data",
    "networks",
    "methods",
    "pretrained",
    "evaluation",
    "inference",
    "training",
)
FLAGS = ("latents", "objective", "caption_column", "min_snr_gamma", "log_every", "learning_rate")


def product(root: Path) -> list[Path]:
    """List the product's own files."""
    rooms = [path for room in ROOMS for path in root.glob(f"{room}/**/*.py")]
    return sorted([*root.glob("*.py"), *rooms])


def tests_of(tree: ast.AST) -> list[ast.expr]:
    """List the conditions that a file branches on."""
    found: list[ast.expr] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.If | ast.IfExp | ast.While):
            found.append(node.test)
        elif isinstance(node, ast.comprehension):
            found += node.ifs
    return found


def main(root: Path) -> None:
    branches: dict[str, Counter[str]] = {name: Counter() for name in CHOICES}
    mentions: dict[str, Counter[str]] = {name: Counter() for name in FLAGS}
    for path in product(root):
        text, name = path.read_text(), str(path.relative_to(root))
        for test in tests_of(ast.parse(text)):
            words = ast.unparse(test)
            for choice, pattern in CHOICES.items():
                branches[choice][name] += bool(re.search(pattern, words))
        for flag in FLAGS:
            mentions[flag][name] += len(re.findall(rf"\b{flag}\b", text))
    for choice, files in branches.items():
        print(f"{choice}: {files.total()} branches in {len(+files)} files")
        for name, n in (+files).most_common():
            print(f"    {n:3} {name}")
    for flag, files in mentions.items():
        print(f"--{flag}: {files.total()} mentions in {len(+files)} files: {', '.join(+files)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[2])
