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


def flags_of(trees: dict[str, ast.Module], name: str = "TrainConfig") -> set[str]:
    """List the fields of a dataclass and of its bases, wherever they are defined."""
    classes = {
        c.name: c for tree in trees.values() for c in tree.body if isinstance(c, ast.ClassDef)
    }
    if name not in classes:
        return set()
    fields = (node.target for node in classes[name].body if isinstance(node, ast.AnnAssign))
    own = {field.id for field in fields if isinstance(field, ast.Name)}
    return own.union(*(flags_of(trees, ast.unparse(base)) for base in classes[name].bases))


def main(root: Path) -> None:
    branches: dict[str, Counter[str]] = {name: Counter() for name in CHOICES}
    mentions: dict[str, Counter[str]] = {name: Counter() for name in FLAGS}
    per_file: Counter[str] = Counter()
    trees = {str(path.relative_to(root)): ast.parse(path.read_text()) for path in product(root)}
    flags = flags_of(trees)
    for name, tree in trees.items():
        text = (root / name).read_text()
        per_file[name] = sum(len(re.findall(rf"\b{flag}\b", text)) for flag in flags)
        for test in tests_of(tree):
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
    print(f"mentions of each of train.py's {len(flags)} flags in one file, on average:")
    for name, n in per_file.most_common(5):
        print(f"    {n / len(flags):.2f} {name}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[2])
