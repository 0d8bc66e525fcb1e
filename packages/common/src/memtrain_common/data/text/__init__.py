"""Text and rows of text: corpora, token bins, tokenizers, documents, GLUE, instructions."""
