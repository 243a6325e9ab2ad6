"""Conditionings of a run, by the name that `--conditioning` gives them: which flags only they read,
whether they can be guided, and how they are opened. What they are to a model is
`inference.conditioning`'s.
"""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from data import caption_cache
from data.caption_cache import CaptionStore
from data.rows import Source
from datasets_config import DatasetConfig
from inference.conditioning import Conditioning, StoredCaptions, class_conditioning
from inference.labels import changed_classes
from runtime import processes
from runtime.errors import UserError
from training.config import TrainConfig


class ByClass:
    """Each image has a class.

    Attributes:
        flags: those that no other conditioning reads.
        has_null: whether there is a null label beside others, for guidance.
        fits_on_device: whether the labels of a whole dataset can be held in a device's memory.
    """

    flags: ClassVar[tuple[str, ...]] = ()
    has_null: ClassVar[bool] = True
    fits_on_device: ClassVar[bool] = True

    def n_classes(self, dataset: DatasetConfig) -> int:
        """Return the number of classes that the network embeds."""
        return dataset.n_classes

    def require_same(self, dataset: DatasetConfig, saved: Mapping[str, Any]) -> None:
        """Reject resuming on other classes of images, whose ids would mean something else.

        Args:
            dataset: the opened dataset.
            saved: `config.json` of the run to resume.

        Raises:
            UserError: their number or their names differ.
        """
        names = saved["dataset"].get("label_names") or ()
        if change := changed_classes(dataset, names, saved["model_config"]["n_classes"]):
            raise UserError(
                f"cannot resume: {change}; put them back, or start a new run from these weights by "
                "--init_from RUN"
            )

    def open(
        self,
        config: TrainConfig,
        source: Source,
        revisions: Sequence[str] | None = None,
        full_width: int | None = None,
    ) -> Conditioning:
        """Open the conditioning of an opened dataset.

        Args:
            config: the resolved flags.
            revisions: of the text encoders that a resumed run was trained with.
            full_width: channels of a token of SD3, if the run trains it.

        Raises:
            UserError: captions cannot be encoded.
        """
        return class_conditioning(self.n_classes(source.config), source.config.label_names)


class ByNothing(ByClass):
    """Images only."""

    has_null = False

    def n_classes(self, dataset: DatasetConfig) -> int:
        return 0

    def require_same(self, dataset: DatasetConfig, saved: Mapping[str, Any]) -> None:
        pass


class ByCaption(ByNothing):
    """Each image has captions, which are encoded once."""

    flags = ("text_towers", "text_length", "caption_cache")
    has_null = True
    fits_on_device = False

    def open(
        self,
        config: TrainConfig,
        source: Source,
        revisions: Sequence[str] | None = None,
        full_width: int | None = None,
    ) -> Conditioning:
        """Open the cache of encoded captions, and encode what it lacks."""
        c = config
        if full_width and c.text_length:
            raise UserError(
                f"--text_length {c.text_length}: SD3 takes all tokens of a caption; leave it out"
            )
        folder = c.caption_cache or caption_cache.default_cache_folder(c.dataset_name, c.data_dir)
        splits = (source.train, source.eval)
        captions = [text for split in splits for texts in split.captions for text in texts]
        if c.profile:
            # A profile reads none of them, and those of SD3 all have one length.
            captions = [] if full_width else captions[: caption_cache.CAPTIONS_PER_SHARD]
        with processes.first_then_others():
            store = CaptionStore.open(
                folder,
                captions,
                c.text_towers,
                revisions=revisions,
                max_length=c.text_length,
                full_width=full_width,
            )
        return StoredCaptions(store, c.text_towers)


RUN_CONDITIONINGS = {"class": ByClass(), "text": ByCaption(), "none": ByNothing()}
