"""What is changed in tyro (tried on 1.0.17): a flag's help is one paragraph, however its docstring is wrapped.

tyro joins the lines of a docstring before it takes their indentation away, and starts a new line wherever one begins
with white space: a help of two lines would break in the middle of a sentence.
"""

from typing import Any


def join_wrapped_lines() -> None:
    """Let tyro see each line of a docstring without its indentation; calling it again changes nothing."""
    from tyro import _strings

    strings: Any = _strings
    original = getattr(strings, "remove_single_line_breaks", None)
    if original is None or getattr(original, "dedents", False):
        return

    def joined(helptext: str) -> str:
        return original("\n".join(line.strip() for line in helptext.split("\n")))

    joined.dedents = True  # type: ignore[attr-defined]
    strings.remove_single_line_breaks = joined
