"""Low-rank adapters as PEFT and diffusers publish them: one file of safetensors.

Each map W of diffusers' network, such as `transformer_blocks.0.attn.to_q`, has `.lora_A.weight`
(r, n_in) and `.lora_B.weight` (n_out, r), and is replaced by W + (α/r)·B A. Ranks and α are in the
file's metadata. Where queries, keys and values are one map here, each of them has its own A and B.

Written files have α = r, with the scale within B: not every reader looks at the metadata. A table
of classes is no low-rank change: it is in the file in full, by our name.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from model import JOINT, ModelConfig
from networks.lora import ADAPTER
from pretrained import dit, sd3, transformer, weight_files
from runtime.errors import UserError

PREFIX = "transformer."  # of a pipeline's part
METADATA = "lora_adapter_metadata"  # diffusers' key, of JSON
PEFT_CONFIG = "adapter_config.json"  # of PEFT itself, beside the file
CLASSES = "label"  # our part of the network that embeds classes
INNER_HEAD = "inner"  # and that of the head that guides, which is not written
LABEL_NAMES = "label_names"  # our key, of JSON


def adapter_to_peft(
    adapter: Mapping[str, Any], config: ModelConfig
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Return adapters under PEFT's names and in its axes, and PEFT's config of them.

    Args:
        adapter: the adapters of a network, and parts that were trained in full.

    Raises:
        UserError: diffusers cannot hold the network, or more than a table of classes was trained in
            full.
    """
    if config.lora is None:
        raise ValueError("the network has no adapters")
    family = sd3 if config.block == JOINT else dit
    family.config_to_diffusers(replace(config, lora=None, inner_head=0))
    if others := [p for p in config.lora.full_parts if p not in (CLASSES, INNER_HEAD)]:
        raise UserError(f"{', '.join(others)}: trained in full, which no adapter can hold")
    tensors: dict[str, np.ndarray] = {}
    modules: list[str] = []
    flat: dict[Any, Any] = dict(flatten_dict(adapter))
    for path, x in flat.items():
        if path[0] == CLASSES:
            tensors[".".join(path)] = np.asarray(x)
        elif path[-2:] == (ADAPTER, "a"):
            b = config.lora.scale * np.asarray(flat[*path[:-1], "b"])
            rows = family.block_maps((*path[:-2], "kernel"), config)
            blocks = (np.asarray(x), b) if x.ndim == 3 else (np.asarray(x)[None], b[None])
            for names, *pair in zip(rows, *blocks, strict=True):
                parts = (np.split(array, len(names), axis=-1) for array in pair)
                for name, a_part, b_part in zip(names, *parts, strict=True):
                    tensors[f"{PREFIX}{name}.lora_A.weight"] = a_part.T
                    tensors[f"{PREFIX}{name}.lora_B.weight"] = b_part.T
                    modules.append(name)
    facts = {"r": config.lora.rank, "lora_alpha": config.lora.rank, "target_modules": modules}
    return tensors, {f"{PREFIX}{name}": value for name, value in facts.items()}


def save_adapter(
    file: Path, adapter: Mapping[str, Any], config: ModelConfig, label_names: list[str]
) -> None:
    """Write adapters as one file that `read_adapter` reads, and of SD3 diffusers too.

    Raises:
        UserError: no such file can hold them, or it cannot be written.
    """
    tensors, facts = adapter_to_peft(adapter, config)
    metadata = {METADATA: json.dumps(facts), LABEL_NAMES: json.dumps(label_names)}
    weight_files.write_safetensors(file, tensors, metadata)


@dataclass(frozen=True)
class PeftAdapter:
    """The adapters of a file.

    Args:
        changes: B A times its scale, by the name of diffusers' map.
        classes: our table of classes and the like, by name, if it was trained in full.
        label_names: of those classes, if the file has them.
    """

    changes: dict[str, np.ndarray] = field(repr=False)
    classes: dict[str, np.ndarray] = field(repr=False)
    label_names: list[str]


def read_adapter(file: Path) -> PeftAdapter:
    """Read a file of adapters. Their α is in its metadata or in PEFT's config beside it; without
    both it is the rank, as diffusers takes it.

    Raises:
        UserError: it cannot be read, or holds something that is no adapter of PEFT's.
    """
    tensors = weight_files.read_safetensors(file)
    metadata = weight_files.read_safetensors_metadata(file)
    facts = _read_json(file, metadata, METADATA)
    if facts is None:
        facts = weight_files.read_optional_json(str(file.parent), PEFT_CONFIG) or {}
    if not isinstance(facts, dict):
        raise UserError(f"{file} is damaged: its {METADATA} is {type(facts).__name__}")
    facts = {name.removeprefix(PREFIX): value for name, value in facts.items()}
    if name := next((n for n in tensors if n.startswith("text_encoder")), None):
        raise UserError(f"{file}: {name}: adapters of text encoders are not supported")
    classes = {n: np.asarray(tensors.pop(n)) for n in [*tensors] if n.startswith(f"{CLASSES}.")}
    changes: dict[str, np.ndarray] = {}
    for name in [n for n in tensors if n.endswith(".lora_A.weight")]:
        module = name.removesuffix(".lora_A.weight")
        other, alpha_name = f"{module}.lora_B.weight", f"{module}.alpha"
        if other not in tensors:
            raise UserError(f"{file}: {name} is without its {other}")
        a, b = (np.asarray(tensors.pop(n), np.float32) for n in (name, other))
        if b.shape[1] != len(a):
            raise UserError(f"{file}: {name} has rank {len(a)}, and its lora_B {b.shape[1]}")
        theirs = module.removeprefix("base_model.model.").removeprefix(PREFIX)
        alpha = _alpha_of(theirs, facts, rank=len(a))
        if alpha_name in tensors:
            alpha = float(np.asarray(tensors.pop(alpha_name)).reshape(-1)[0])
        scale = alpha / (len(a) ** 0.5 if facts.get("use_rslora") else len(a))
        changes[theirs] = scale * (b.reshape(len(b), -1) @ a.reshape(len(a), -1))
    if tensors or not changes:
        found = ", ".join([*tensors][:3]) or "nothing"
        raise UserError(
            f"{file}: {found} — no adapter with PEFT's names, such as "
            "transformer_blocks.0.attn.to_q.lora_A.weight"
        )
    return PeftAdapter(changes, classes, _read_json(file, metadata, LABEL_NAMES) or [])


def _alpha_of(module: str, facts: Mapping[str, Any], rank: int) -> float:
    """Return α of a map: of a pattern that its name ends with, of all, or its rank."""
    patterns: Mapping[str, float] = facts.get("alpha_pattern") or {}
    for pattern, alpha in patterns.items():
        if module == pattern or module.endswith(f".{pattern}"):
            return float(alpha)
    return float(facts.get("lora_alpha", rank))


def _read_json(file: Path, metadata: Mapping[str, str], key: str) -> Any:
    try:
        return json.loads(metadata[key]) if key in metadata else None
    except ValueError as error:
        raise UserError(f"{file} is damaged: its {key}: {error}") from None


def with_adapter(
    published: transformer.PretrainedTransformer, file: Path
) -> transformer.PretrainedTransformer:
    """Add a file's adapters to a published model. Its classes become those of the file, if that
    has a table of them.

    Raises:
        UserError: the file cannot be read, or is of another model.
    """
    adapter = read_adapter(file)
    params, config, settings = dict(published.params), published.config, published.settings
    if adapter.classes:
        params[CLASSES] = {name.partition(".")[2]: x for name, x in adapter.classes.items()}
        config = replace(config, n_classes=len(params[CLASSES]["table"]) - 1)
        classes = {"n_classes": config.n_classes, "label_names": adapter.label_names}
        settings = settings | {"dataset": settings["dataset"] | classes}
    params = add_changes(params, config, adapter.changes, str(file))
    name = f"{published.id} with {file}"
    return replace(published, config=config, params=params, settings=settings, id=name)


def add_changes(
    params: Mapping[str, Any], config: ModelConfig, changes: Mapping[str, np.ndarray], where: str
) -> dict[str, Any]:
    """Add to the weights of a network what adapters change in diffusers' maps.

    Args:
        where: the file of the changes, for the messages of errors.

    Raises:
        UserError: they are of maps that the network does not have, or of other sizes.
    """
    family = sd3 if config.block == JOINT else dit
    family.config_to_diffusers(config)
    tensors = dict(family.params_to_diffusers(params, config))
    for module, change in changes.items():
        name = f"{module}.weight"
        if name not in tensors or tensors[name].size != change.size:
            found = f"of {tensors[name].shape}" if name in tensors else "unknown"
            raise UserError(
                f"{where} is of another model: it changes {module} of {change.shape}, which is "
                f"{found} here"
            )
        tensors[name] = tensors[name] + change.reshape(tensors[name].shape)
    return family.params_from_diffusers(tensors, config, where)
