def parse_size(text: str, name: str) -> int:
    n = {"KiB": 1024, "MiB": 1024**2, "GiB": 1024**3}
    return int(float(text[:-3]) * n[text[-3:]])
