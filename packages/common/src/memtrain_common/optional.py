"""Packages that only some paths need: an installation without them says which line to type where one is met."""

import importlib.util

PACKAGES = {
    "PIL": "pillow",
    "datasets": "datasets",
    "galore_torch": "galore-torch",
    "huggingface_hub": "huggingface_hub",
    "matplotlib": "matplotlib",
    "peft": "peft",
    "pyarrow": "pyarrow",
    "scipy": "scipy",
    "pynvml": "nvidia-ml-py",
    "sklearn": "scikit-learn",
    "sympy": "sympy",
    "tensorboard": "tensorboard",
    "tiktoken": "tiktoken",
    "tiktoken_ext": "tiktoken",
    "timm": "timm",
    "torchvision": "torchvision",
    "transformers": "transformers",
}
"""The name that is imported: the one that is installed."""


def package_of(error: ModuleNotFoundError) -> str | None:
    """What to install for a module that was not found; None where it is none of these."""
    return PACKAGES.get((error.name or "").partition(".")[0])


def installed(module: str) -> bool:
    """Whether a module of :data:`PACKAGES` can be imported; it is not imported for that."""
    return importlib.util.find_spec(module) is not None


def without(what: str, module: str) -> str:
    """The line that a run says where it goes on without something that is no more than pleasant to have."""
    package = PACKAGES[module]
    return f"without {what}, since {package} is not installed: pip install {package}"
