"""Write data/*.parquet, the digits of scikit-learn, in the layout of the Hugging Face hub.

It needs scikit-learn, which training does not, and is only run to make the files again:
`python data/digits/make_digits.py`.
"""

import io
from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PillowImage
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

FEATURES = Features({"image": Image(), "label": ClassLabel(names=[str(i) for i in range(10)])})


def encode_png(levels: np.ndarray) -> bytes:
    """Encode an 8×8 image of levels 0 … 16 as distinct grey values, round(level · 255 / 16)."""
    buffer = io.BytesIO()
    PillowImage.fromarray(np.rint(levels * 255 / 16).astype(np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


def main() -> None:
    levels, labels = load_digits(return_X_y=True)
    levels, labels = np.asarray(levels).reshape(-1, 8, 8), np.asarray(labels)
    rows = np.arange(len(labels))
    train, test = train_test_split(rows, test_size=0.2, random_state=0, stratify=labels)
    for split, split_rows in {"train": np.sort(train), "test": np.sort(test)}.items():
        # The file name holds the row in scikit-learn's table, so every image can be traced back.
        images = [{"bytes": encode_png(levels[i]), "path": f"{i:04d}.png"} for i in split_rows]
        columns = {"image": images, "label": labels[split_rows]}
        path = Path(__file__).parent / "data" / f"{split}-00000-of-00001.parquet"
        Dataset.from_dict(columns, features=FEATURES).to_parquet(path)


if __name__ == "__main__":
    main()
