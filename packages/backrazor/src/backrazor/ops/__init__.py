"""The operations that save less, by kind; :mod:`backrazor.table` lists what each keeps."""
