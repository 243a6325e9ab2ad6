"""The weights of one network among everything that a training script saves.

Scripts save {"model": …, "ema": …, "opt": …, "args": …}, and DataParallel, torch.compile, FSDP and
Lightning put `module.`, `_orig_mod.` or `model.` before each name. With nested dictionaries
flattened, all of these are prefixes of names, in any order: `find_weights` takes them off. Of
several copies it takes the average (EMA), and says so.

A network is known by one of its tensors, its anchor. Nothing here reads a file.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, MutableMapping, Sequence
from typing import Any, NamedTuple

from flax.traverse_util import flatten_dict

from runtime.errors import UserError

Shapes = Mapping[str, tuple[int, ...]]
# What a wrapper of a network, or of one of its blocks, puts between the parts of a name.
WRAPPERS = {
    *("module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"),
    "_forward_module",
}
# Words of a prefix that tell an average from what it averages. The innermost one counts:
# ema_pytorch saves `ema.ema_model.` and `ema.online_model.`.
AVERAGE_WORDS = {"ema", "swa", "average", "averaged", "avg", "shadow", "polyak", "target"}
RAW_WORDS = {"online", "raw", "non", "no", "without"}
# Other words that weights are saved under. A copy under these goes before a teacher's.
PLAIN_WORDS = {
    *("module", "orig", "mod", "model", "net", "network", "state", "dict", "params", "weights"),
    *("transformer", "dit", "sit", "denoiser", "diffusion", "backbone", "generator", "student"),
}
# Words of tensors that say how far a training is, not what a network computes.
PROGRESS_WORDS = {
    *("opt", "optim", "optimizer", "optimizers", "scheduler", "schedulers", "lr", "scaler", "rng"),
    *("step", "steps", "global", "epoch", "epochs", "iteration", "iterations", "num", "updates"),
    *("n", "averaged", "initted", "decay", "state", "states"),
}
# Words of parts that only training uses. Any other part beyond the network's own is refused: it may
# change what the network computes.
HEAD_WORDS = {
    *("head", "heads", "proj", "projector", "projectors", "projection", "projections", "aux"),
    *("auxiliary", "classifier", "predictor", "discriminator", "critic", "repa", "align"),
    *("aligner", "alignment", "distill", "distillation", "teacher", "loss", "losses", "lpips"),
    *("perceptual", "dino", "logvar", "uncertainty", "contrastive", "adversarial"),
}


class FoundWeights(NamedTuple):
    """One copy of a network's weights.

    Args:
        names: the network's name of each of its tensors, by the name in the file.
        notices: lines for a person.
    """

    names: dict[str, str]
    notices: tuple[str, ...] = ()


def find_weights(
    shapes: Shapes, anchors: Iterable[str], where: str, *, fixed: Collection[str] = ()
) -> FoundWeights:
    """Find a network's weights among all tensors of a file: the averaged ones if there are any.

    Args:
        shapes: of all tensors by name, in the order of the file.
        anchors: tensors that such a network has; the first that occurs is used.
        where: the file, for the messages of errors.
        fixed: tensors that are never trained, which an average may lack.

    Returns all names as they are if there is no such network.

    Raises:
        UserError: there are several copies, and none of them is to be preferred.
    """
    found = (_find_prefixes(shapes, anchor) for anchor in anchors)
    prefixes = next((some for some in found if some), [])
    if not prefixes:
        return FoundWeights({name: name for name in shapes})
    averages = [prefix for prefix in prefixes if _is_average(prefix)]
    others = [prefix for prefix in prefixes if prefix not in averages]
    raw: dict[str, str] = {}
    if others:
        prefix = others[0] if averages else _prefer(others, where)
        raw = _names_under(prefix, prefixes, shapes, where)
    if averages:
        prefix = _prefer(averages, where)
        names = _names_under(prefix, prefixes, shapes, where)
        missing = {*fixed} - {*names.values()}
        names |= {name: ours for name, ours in raw.items() if ours in missing}
        return FoundWeights(names, (f"the weights are the average, {_quote(prefix)}",))
    groups = _average_groups(shapes)
    for group, members in groups.items():
        if names := _match_nameless(group, members, raw, shapes, fixed):
            return FoundWeights(names, (f"the weights are the average, {_quote(group)}",))
    unread = ", ".join(map(_quote, [*groups][:3]))
    notice = f"the weights are raw: what is in {unread} is not understood" if groups else None
    return FoundWeights(raw, (notice,) if notice else ())


def flatten_leaves(tree: Mapping[str, Any]) -> dict[tuple[Any, ...], Any]:
    """Return each array of a tree of ours by its path."""
    return dict(flatten_dict(tree))


def pop_heads(tensors: MutableMapping[str, Any], own: Collection[str]) -> tuple[str, ...]:
    """Remove the heads that only training uses from a network's tensors.

    Args:
        own: names of the tensors that the network has.

    Returns a notice that names them, if there are any.
    """
    own_parts = {name.partition(".")[0] for name in own}
    heads: dict[str, int] = {}
    for name in [*tensors]:
        part = name.partition(".")[0]
        if part not in own_parts and HEAD_WORDS & {*_words(part)}:
            del tensors[name]
            heads[part] = heads.get(part, 0) + 1
    if not heads:
        return ()
    listed = ", ".join(f"{part} ({n} tensors)" for part, n in heads.items())
    return (f"ignored, as only training uses them: {listed}",)


def describe_unused(names: Iterable[str]) -> tuple[str, ...]:
    """Return a notice of the tensors in a file that are left unread, if there are any.

    Copies of the network and the state of a training go without saying.

    Args:
        names: of the tensors that are not the network's.
    """
    known = PLAIN_WORDS | AVERAGE_WORDS | RAW_WORDS | PROGRESS_WORDS
    parts = Counter(name.partition(".")[0] for name in names)
    listed = [
        f"{part} ({n} tensors)" for part, n in sorted(parts.items()) if {*_words(part)} - known
    ]
    return (f"not read: {', '.join(listed)}",) if listed else ()


# --- prefixes -------------------------------------------------------------------------------------


def _words(text: str) -> list[str]:
    """Split a part of a name into words in lower case: emaModel_2 → ema, model."""
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", text)]


def _find_prefixes(shapes: Shapes, anchor: str) -> list[str]:
    """Return what stands before each tensor of this name, such as `ema.module.`."""
    wrappers = "|".join(map(re.escape, sorted(WRAPPERS)))
    parts = rf"\.(?:(?:{wrappers})\.)*".join(map(re.escape, anchor.split(".")))
    matches = [re.fullmatch(rf"((?:.*\.)?){parts}", name) for name in shapes]
    return [match[1] for match in matches if match]


def _is_average(prefix: str) -> bool:
    for part in reversed(prefix.split(".")):
        words = {*_words(part)}
        if words & RAW_WORDS:
            return False
        if words & AVERAGE_WORDS:
            return True
    return False


def _prefer(prefixes: Sequence[str], where: str) -> str:
    """Return the only prefix, or the only one without words that tell of something else.

    Raises:
        UserError: there is none.
    """
    known = PLAIN_WORDS | AVERAGE_WORDS | RAW_WORDS
    plain = [prefix for prefix in prefixes if not {*_words(prefix)} - known]
    candidates = plain or list(prefixes)
    if len(candidates) == 1:
        return candidates[0]
    some = ", ".join(_quote(prefix) for prefix in candidates[:4])
    raise UserError(
        f"'{where}' holds {len(candidates)} copies of the weights ({some}): save the one to use in "
        "a file of its own"
    )


def _quote(prefix: str) -> str:
    return f"'{prefix.rstrip('.')}'" if prefix else "without a prefix"


def _names_under(
    prefix: str, prefixes: Sequence[str], shapes: Shapes, where: str
) -> dict[str, str]:
    """Return the network's name of each tensor under a prefix, without wrappers.

    Raises:
        UserError: two tensors have the same name then.
    """
    inner = tuple(p for p in prefixes if p != prefix and p.startswith(prefix))
    names: dict[str, str] = {}
    for name in shapes:
        rest = name.removeprefix(prefix)
        if not name.startswith(prefix) or (inner and name.startswith(inner)):
            continue
        if _is_average(rest.rpartition(".")[0]) or _tells_progress(rest):
            continue
        names[name] = ".".join(part for part in rest.split(".") if part not in WRAPPERS)
    taken: set[str] = set()
    for ours in names.values():
        if ours in taken:
            raise UserError(f"'{where}' holds {ours} twice, once with a prefix")
        taken.add(ours)
    return names


def _tells_progress(name: str) -> bool:
    words = {*_words(name.partition(".")[0])}
    return bool(words) and words <= PROGRESS_WORDS


# --- averages without names -----------------------------------------------------------------------


def _average_groups(shapes: Shapes) -> dict[str, list[str]]:
    """Return the arrays under each prefix of an average, in the order of the file."""
    groups: dict[str, list[str]] = {}
    for name, shape in shapes.items():
        prefix = name.rpartition(".")[0]
        if _is_average(prefix) and len(shape) > 0 and not _tells_progress(prefix):
            groups.setdefault(f"{prefix}.", []).append(name)
    return groups


def _names_without_dots(raw: Mapping[str, str]) -> dict[str, str]:
    """Return the network's names by themselves without dots, with any part of their prefix."""
    without_dots: dict[str, str] = {}
    for name, ours in raw.items():
        parts = name.split(".")
        starts = range(len(parts) - ours.count("."))
        without_dots |= {"".join(parts[start:]): ours for start in starts}
    return without_dots | {ours.replace(".", ""): ours for ours in raw.values()}


def _match_nameless(
    group: str, members: list[str], raw: Mapping[str, str], shapes: Shapes, fixed: Collection[str]
) -> dict[str, str]:
    """Return the network's names of an average that is a list (torch_ema, diffusers' EMAModel) or
    whose names have lost their dots (latent diffusion's LitEma). Empty if it is neither.
    """
    shape_by_name = {ours: shapes[name] for name, ours in raw.items()}
    trained = [ours for ours in shape_by_name if ours not in fixed]
    without_dots = _names_without_dots(raw)
    leaves = [name.removeprefix(group) for name in members]
    for names in ([*shape_by_name], trained):
        ordered = names if all(map(str.isdecimal, leaves)) else map(without_dots.get, leaves)
        matched = dict(zip(members, ordered))
        fits = len(matched) == len(members) and {*trained} <= {*matched.values()}
        if fits and all(shapes[n] == shape_by_name.get(str(ours)) for n, ours in matched.items()):
            found = {name: str(ours) for name, ours in matched.items()}
            rest = {n: ours for n, ours in raw.items() if ours not in found.values()}
            return found | rest
    return {}
