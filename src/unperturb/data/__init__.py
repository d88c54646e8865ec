"""Image sets by name: decoded once, memory-mapped ever after; augmented as tensors."""

from unperturb.data.given import as_image_set
from unperturb.data.load import NAMES, load_dataset
from unperturb.data.prepare import Prepared, known_copy_note, prepare
from unperturb.data.sets import DataError, ImageSet, Splits, augment

__all__ = [
    "NAMES",
    "DataError",
    "ImageSet",
    "Prepared",
    "Splits",
    "as_image_set",
    "augment",
    "known_copy_note",
    "load_dataset",
    "prepare",
]
