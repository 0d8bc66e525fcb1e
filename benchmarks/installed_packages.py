"""How many packages `pip install packages/X` installs into an empty environment, now and at an earlier commit.

    uv run python benchmarks/installed_packages.py --before COMMIT [--cpu-torch WHEEL]

Counted once with PyPI's torch, which brings NVIDIA's libraries, and once with the wheel of a build for CPUs. Nothing is
installed: uv resolves what it would install, at the date of the root's exclude-newer.
"""

import argparse
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import torch
from memtrain_common.measuring.bench import write_results

ROOT = Path(__file__).parents[1]


def installed(what: str, venv: Path, newest: str, torch_is: str | None = None) -> list[str]:
    """Names of the packages that a plain installation of ``what`` brings; with a wheel's torch where one is given."""
    words = [
        "uv",
        "pip",
        "install",
        "--dry-run",
        "--python",
        str(venv / "bin" / "python"),
        "--exclude-newer",
        newest,
        what,
        *([f"torch @ file://{torch_is}"] if torch_is and what != torch_is else []),
    ]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return sorted(re.findall(r"^ \+ ([\w.-]+)", done.stderr, re.MULTILINE))


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--before", required=True, help="commit to compare with")
    words.add_argument("--cpu-torch", help="a wheel of torch for CPUs")
    words.add_argument("--out", default=str(ROOT / "benchmarks" / "results" / "installed_packages.json"))
    chosen = words.parse_args()
    newest = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["uv"]["exclude-newer"]
    with tempfile.TemporaryDirectory() as folder:
        venv, old = Path(folder) / "venv", Path(folder) / "before"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
        subprocess.run(["git", "worktree", "add", "--quiet", "--detach", old, chosen.before], cwd=ROOT, check=True)
        try:
            of_torch = installed("torch", venv, newest)
            wheel = chosen.cpu_torch
            of_wheel = installed(wheel, venv, newest, wheel) if wheel else []
            packages = {}
            for path in sorted((ROOT / "packages").iterdir()):
                before, after = (installed(str(p / "packages" / path.name), venv, newest) for p in (old, ROOT))
                packages[path.name] = {"before": len(before), "after": len(after), "names": after}
                if wheel:
                    here = {which: len(installed(str(p / "packages" / path.name), venv, newest, wheel)) for which, p in
                            (("before", old), ("after", ROOT))}  # fmt: skip
                    packages[path.name]["with_cpu_torch"] = here
                print(f"{path.name}: {len(before)} before, {len(after)} now; torch alone {len(of_torch)}", flush=True)
        finally:
            subprocess.run(["git", "worktree", "remove", "--force", old], cwd=ROOT, check=True)
    write_results(
        Path(chosen.out),
        argv=["benchmarks/installed_packages.py", *(Path(a).name if a.endswith(".whl") else a for a in sys.argv[1:])],
        device=torch.device("cpu"),
        seeds=[],
        before_commit=chosen.before,
        torch_alone=len(of_torch),
        cpu_torch_alone=len(of_wheel) or None,
        packages=packages,
    )


if __name__ == "__main__":
    main()
