"""What is refused, in words."""


class RazorError(ValueError):
    """A setting or a use that Back Razor refuses; the message is one sentence that says what would be right."""
