"""What files and folders call the parts of a data set."""

SPLIT_WORDS = {
    "train": "train", "training": "train", "test": "test",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
}  # fmt: skip
