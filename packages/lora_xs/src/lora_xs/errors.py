"""The one error class: every refusal is one sentence that says what is wrong and what would be right."""


class LoRAXSError(ValueError):
    """A model, a configuration or a file that LoRA-XS cannot work with."""
