"""What the tests of backrazor's commands share."""

import pytest


@pytest.fixture(scope="session")
def loaded() -> None:
    """The slow libraries, loaded once here for the commands that tests fork from this process."""
    import sklearn.datasets  # noqa: F401
    import torchvision.transforms.functional  # noqa: F401
    from torch._subclasses import FakeTensorMode  # noqa: F401
    from transformers import (  # noqa: F401
        AutoModelForImageClassification,
        BertForSequenceClassification,
        GPT2LMHeadModel,
        ViTForImageClassification,
    )
