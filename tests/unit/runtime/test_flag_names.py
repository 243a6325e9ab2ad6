"""Other programs' names lead to our flag or to a reason, never to a flag that is spelled alike."""

import pytest

from convert_imagenet import ConvertConfig
from demo import DemoConfig
from evaluate import EvaluateConfig
from export import ExportConfig
from figures import FiguresConfig
from generate import GenerateConfig
from runtime import cli
from runtime.errors import UserError
from runtime.flag_names import REASONS, TABLES, hint_for
from runtime.flags import groups_of
from training.autoencoder.config import VaeConfig
from training.config import TrainConfig

CONFIGS = {
    "train.py": TrainConfig,
    "train_vae.py": VaeConfig,
    "generate.py": GenerateConfig,
    "evaluate.py": EvaluateConfig,
    "convert_imagenet.py": ConvertConfig,
    "export.py": ExportConfig,
    "demo.py": DemoConfig,
    "figures.py": FiguresConfig,
}
FLAGS = {
    command: {name for group in groups_of(config).values() for name in group}
    for command, config in CONFIGS.items()
}
# Names of diffusers, DiT, SiT, EDM, torchtitan, sd-scripts, timm and Lightning → train.py's flag.
OF_TRAINING = {
    "resolution": "image_size",
    "img-size": "image_size",
    "lr": "learning_rate",
    "optimizer.lr": "learning_rate",
    "save_every": "eval_save_steps",
    "ckpt-every": "eval_save_steps",
    "checkpointing_steps": "eval_save_steps",
    "checkpoint.interval": "eval_save_steps",
    "cfg": "cfg_scale",
    "guidance_scale": "cfg_scale",
    "epochs": "n_epochs",
    "num_train_epochs": "n_epochs",
    "max_train_steps": "n_steps",
    "training.steps": "n_steps",
    "trainBatchSize": "batch_size",
    "global-batch-size": "batch_size",
    "results-dir": "run_dir",
    "output_dir": "run_dir",
    "class_dropout_prob": "label_dropout",
    "gradient_checkpointing": "remat",
    "activation_checkpoint.mode": "remat",
    "gradient_accumulation_steps": "accumulate_steps",
    "max_grad_norm": "clip_norm",
    "ema_rate": "ema_decay",
    "num-workers": "n_workers",
    "data-path": "dataset_name folder:PATH",
    "train_data_dir": "dataset_name folder:PATH",
    "random_crop": "crop random",
    "resume_from_checkpoint": "resume",
    "pretrained_model_name_or_path": "init_from",
    "mixed_precision": "half_precision",
    "fp16": "half_precision fp16",
    "report_to": "wandb_project",
    "world_size": "n_processes",
    "rank": "process_index",
    "lr_warmup_steps": "warmup_steps",
    "lr_scheduler": "schedule",
    "feature-path": "latents",
    "snr_gamma": "min_snr_gamma",
}
OF_SAMPLING = {
    "ckpt": "run or --pretrained",
    "num-sampling-steps": "n_steps",
    "num_inference_steps": "n_steps",
    "guidance_scale": "cfg_scale",
    "cfg-scale": "cfg_scale",
    "class_labels": "labels",
    "prompt": "prompts",
    "num_images_per_prompt": "n",
    "sampler": "solver",
    "outdir": "out",
    "height": "size",
    "use_ema": "ema",
    "per-proc-batch-size": "batch_size",
}


@pytest.mark.parametrize(
    ("command", "names"), [("train.py", OF_TRAINING), ("generate.py", OF_SAMPLING)]
)
def test_names_of_other_programs_lead_to_our_flag(command, names):
    hints = {name: hint_for(name, FLAGS[command]) for name in names}
    assert hints == {name: f"did you mean --{flag}?" for name, flag in names.items()}


@pytest.mark.parametrize(
    ("command", "name", "reason"),
    [
        ("train.py", "num_classes", "the classes are counted in the dataset's label column"),
        ("generate.py", "num-classes", "a trained model knows them"),
        ("train.py", "ema", "--ema_decay sets how slowly"),
        ("train.py", "use_ema", "--ema_decay sets how slowly"),
        ("train.py", "no_ema", "--ema_decay sets how slowly"),
        ("train.py", "use_8bit_adam", "--moments are AdamW's settings"),
        ("train_vae.py", "optimizer", "--optimizer is a flag of train.py"),
        ("train.py", "per_device_train_batch_size", "all devices together"),
        ("train.py", "gpus", "CUDA_VISIBLE_DEVICES"),
        ("figures.py", "resolution", "images of the size that it was trained on"),
        ("generate.py", "device", "JAX_PLATFORMS=cpu"),
        ("generate.py", "lr", "--learning_rate is a flag of train.py"),
        ("train.py", "labels", "--labels is a flag of generate.py"),
        ("train.py", "kl_weight", "--kl_weight is a flag of train_vae.py"),
        ("export.py", "push_to_hub", "nothing is uploaded"),
    ],
)
def test_a_name_that_no_flag_stands_for_has_a_reason(command, name, reason):
    assert reason in hint_for(name, FLAGS[command])


@pytest.mark.parametrize(
    ("name", "flag"),
    [
        ("lerning_rate", "learning_rate"),
        ("bacth_size", "batch_size"),
        ("Batch-Size", "batch_size"),
        ("nsteps", "n_steps"),
        ("stepz", "n_steps"),
        ("datset_name", "dataset_name"),
        ("weight_decy", "weight_decay"),
    ],
)
def test_typing_errors_still_find_their_flag(name, flag):
    assert hint_for(name, FLAGS["train.py"]) == f"did you mean --{flag}?"


@pytest.mark.parametrize("name", ["revolution", "prognosis", "bananas", "x"])
def test_a_name_that_is_only_a_little_alike_leads_nowhere(name):
    assert hint_for(name, FLAGS["train.py"]) == "--help lists them all"


def test_a_flag_of_one_command_never_leads_to_one_that_only_sounds_alike():
    """Such as --image_size to generate.py's --batch_size."""
    wrong = [
        (command, name, hint)
        for command, known in FLAGS.items()
        for name in set().union(*FLAGS.values()) - known
        for hint in [hint_for(name, known)]
        if hint in (f"did you mean --{flag}?" for flag in ("batch_size", "n_processes"))
    ]
    assert wrong == []


def test_the_tables_name_flags_that_exist():
    named = {(command, flag.split()[0]) for command, table in TABLES.items() for flag in table}
    assert [(command, flag) for command, flag in named if flag not in FLAGS[command]] == []
    every_flag = set().union(*FLAGS.values())
    in_reasons = {
        word.strip("-,;:?") for text in REASONS for word in text.split() if word.startswith("--")
    }
    assert in_reasons <= every_flag


def test_the_command_line_and_a_file_give_the_same_hint(tmp_path):
    hint = "did you mean --image_size?"
    with pytest.raises(UserError) as error:
        cli.parse_flags(TrainConfig, ["--resolution", "64"])
    assert str(error.value) == f"unknown flag --resolution; {hint}"
    path = tmp_path / "flags.yaml"
    path.write_text("resolution: 64\n")
    with pytest.raises(UserError) as error:
        cli.parse_flags(TrainConfig, ["--config", str(path)])
    assert str(error.value) == f"{path}: unknown flag 'resolution'; {hint}"
