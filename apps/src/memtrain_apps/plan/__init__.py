"""What fits a memory before any run: ``plan``."""
