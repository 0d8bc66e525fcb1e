"""Pages that mkdocs gets from the code and the committed results, so that they cannot be out of date.

``on_files`` adds them, ``on_config`` puts them into the navigation. Nothing here imports torch.

- Reference: the public names of each package (mkdocstrings draws them), every command's flags
- Measurements: every JSON of ``benchmarks/results`` as tables, with its command and device
- Packages: the READMEs, with their links turned to pages of this site
"""

import contextlib
import importlib
import io
import json
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent))
from measurements import index, measurement

ROOT = Path(__file__).parents[2]
METHODS = ("backrazor", "galore_vit", "lora_xs", "lte")
BESIDE = {
    "backrazor": ("backrazor.hf",),
    "galore_vit": ("galore_vit.hf", "galore_vit.melo", "galore_vit.melo_file", "galore_vit.metrics"),
    "lora_xs": ("lora_xs.hf", "lora_xs.peft"),
    "lte": (),
}
"""Public modules whose names are not the package's own."""
COMMON = (
    "memtrain_common.training.loop.fit", "memtrain_common.training.task.Task",
    "memtrain_common.training.fit_config.FitConfig", "memtrain_common.training.fit_config.FitResult",
    "memtrain_common.measuring.memory", "memtrain_common.measuring.prediction", "memtrain_common.hf",
    "memtrain_common.measuring.bench", "memtrain_common.errors",
)  # fmt: skip
SUBCOMMANDS = {"lora-xs": ("demo", "glue", "instruct", "eval", "merge", "export-peft", "import", "info"),
               "galore-vit": ("train", "eval", "info")}  # fmt: skip
OPTIONAL = ("models.md", "source-projects.md")
"""Hand-written pages that are in the navigation where they exist."""


def on_config(config: Any) -> Any:
    """Navigation: what is generated stands behind what is written."""
    docs = Path(config["docs_dir"])
    names = list(pages())
    for section in config["nav"]:
        if "Reference" in section:
            section["Reference"] += [{"API": [n for n in names if n.startswith("reference/api/")]}]
            section["Reference"] += [{"Commands": [n for n in names if n.startswith("reference/commands/")]}]
            section["Reference"] += [n for n in OPTIONAL if (docs / n).exists()]
    config["nav"] += [
        {"Packages": [n for n in names if n.startswith("packages/")]},
        {"Measurements": [n for n in names if n.startswith("measurements/")]},
    ]
    return config


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    for name, text in pages().items():
        files.append(File.generated(config, name, content=text))
    for picture in sorted((ROOT / "benchmarks" / "results").glob("*.png")):
        files.append(File.generated(config, f"measurements/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Tables that a written page asks for, in place of what it says to who reads it without them."""
    for name, make in (("real models", real_models), ("choices", choices)):
        before, asked, rest = markdown.partition(f"<!-- generated: {name} -->\n")
        if asked:
            _, after = rest.split("<!-- end -->", 1)
            markdown = before + make() + after
    return markdown


def pages() -> dict[str, str]:
    """Generated pages by their path below docs/."""
    made = {f"reference/api/{name}.md": api(name) for name in METHODS}
    made["reference/api/memtrain_common.md"] = "# memtrain_common\n\n" + "".join(f"::: {n}\n\n" for n in COMMON)
    made |= {f"reference/commands/{name.replace(' ', '-')}.md": text for name, text in commands()}
    made |= {f"packages/{path.parent.name}.md": readme(path) for path in readmes()}
    made["packages/examples.md"] = examples()
    results = sorted((ROOT / "benchmarks" / "results").glob("*.json"))
    made["measurements/index.md"] = index(results)
    made |= {f"measurements/{path.stem}.md": measurement(path) for path in results}
    return made


def api(package: str) -> str:
    """The names of a package's ``__all__`` where they are defined, and its public modules."""
    module = importlib.import_module(package)
    homes = getattr(module, "_HOMES", None) or module._HOME
    about = (module.__doc__ or "").strip().splitlines()[0]
    parts = [f"# {package}\n", about + "\n"]
    parts += [f"::: {package}.{homes[name]}.{name}\n" for name in sorted(module.__all__, key=str.lower)]
    parts += [f"::: {name}\n" for name in BESIDE[package]]
    return "\n".join(parts)


# -- commands -------------------------------------------------------------------------------------------------------


def entry_points() -> Iterator[tuple[str, str]]:
    """(command, ``module:function``) of every member."""
    for project in [*sorted(ROOT.glob("packages/*/pyproject.toml")), ROOT / "apps" / "pyproject.toml"]:
        scripts = tomllib.loads(project.read_text())["project"].get("scripts", {})
        yield from sorted(scripts.items())


def commands() -> Iterator[tuple[str, str]]:
    for command, entry in entry_points():
        module, function = entry.split(":")
        main = getattr(importlib.import_module(module), function)
        for words in [[s] for s in SUBCOMMANDS.get(command, ())] or [[]]:
            asked = asked_of(main, [command, *words, "--help"])
            name = " ".join([command, *words])
            yield name, command_page(name, **asked)


def asked_of(main: Any, words: list[str]) -> dict[str, Any]:
    """What a command's ``--help`` would print: its dataclass, description, presets, defaults."""
    from memtrain_common.commands import cli

    seen: dict[str, Any] = {}

    def note(config_type: type, **kwargs: Any) -> str:
        seen.update(config_type=config_type, **kwargs)
        return ""

    with (
        mock.patch.object(cli, "help_text", note),
        mock.patch.object(sys, "argv", words),
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.suppress(SystemExit),
    ):
        main()
    assert seen, f"{words} printed no help of a dataclass"
    return seen


def command_page(
    name: str, *, config_type: type, prog: str, description: str, presets: Any = None, default: Any = None
) -> str:
    from memtrain_common.commands.flag_help import flags_of

    lines = [f"# {name}\n", escaped(description.strip()) + "\n"]
    if presets:
        lines.append(f"Presets: {', '.join(f'`{p}`' for p in presets)}.\n")
    flags = flags_of(config_type, default)
    for group in dict.fromkeys(f.group for f in flags):
        lines += [f"## {group[0].upper()}{group[1:]}\n", "| flag | default | |", "|---|---|---|"]
        for flag in (f for f in flags if f.group == group):
            names = ", ".join(f"`{n}`" for n in flag.names) + (f" `{flag.values}`" if flag.values else "")
            cells = (names, f"`{flag.default}`" if flag.default else "", escaped(flag.text).replace("|", "\\|"))
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    examples = getattr(config_type, "EXAMPLES", ())
    if examples:
        lines += ["## Examples\n", "```sh", *examples, "```"]
    return "\n".join(lines) + "\n"


def escaped(text: str) -> str:
    """Plain text as Markdown: no emphasis, HTML or links from characters that mean themselves."""
    return re.sub(r"([*_<>\[\]#])", r"\\\1", text)


# -- READMEs and examples -------------------------------------------------------------------------------------------


def readmes() -> list[Path]:
    return [*sorted(ROOT.glob("packages/*/README.md")), ROOT / "apps" / "README.md"]


def readme(path: Path) -> str:
    """A README as a page: links to results, pictures and packages lead to this site, others lose their link."""

    def link(match: re.Match[str]) -> str:
        mark, text, target = match.groups()
        if target.startswith(("http", "#")):
            return match[0]
        place = (path.parent / target.split("#")[0]).resolve()
        if place.suffix == ".json" and place.parent == ROOT / "benchmarks" / "results":
            return f"[{text}](../measurements/{place.stem}.md)"
        if place.suffix == ".png":
            return f"{mark}[{text}](../measurements/{place.name})"
        inner = place / "README.md" if place.is_dir() else place
        if inner in readmes():
            return f"[{text}]({inner.parent.name}.md)"
        if place.is_relative_to(ROOT / "docs") and place.suffix == ".md":
            return f"[{text}](../{place.relative_to(ROOT / 'docs')})"
        if place.parent == ROOT / "examples":
            return f"[{text}](examples.md#{anchor(place.name)})"
        return text

    return re.sub(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)", link, path.read_text())


def anchor(file: str) -> str:
    return re.sub(r"[^a-z0-9_]", "", file.lower())


def examples() -> str:
    parts = ["# Examples\n", "Each runs alone on scikit-learn's digits: `python examples/NAME`.\n"]
    for path in sorted((ROOT / "examples").glob("*.py")):
        parts += [f"## {path.name} {{ #{anchor(path.name)} }}\n", f"```python\n{path.read_text()}```\n"]
    return "\n".join(parts)


def choices() -> str:
    """The ablation's arms as a decision table: accuracy and memory of each combination."""
    result = json.loads((ROOT / "benchmarks" / "results" / "ablation_digits.json").read_text())
    lines = ["| train + save + optim | test accuracy | memory of a step |", "|---|--:|--:|"]
    for arm in sorted(result["arms"], key=lambda a: -a["mean"]):
        total = sum(v for v in _measured(arm["memory_bytes"]).values()) / 2**20
        lines.append(
            f"| `{arm['combination']}` | {100 * arm['mean']:.1f} ± {100 * arm['ci95']:.1f} % | {total:.1f} MiB |"
        )
    about = f"`{result['command']}`, {result['date']}, {result['device']}, seeds {result['seeds']}"
    mode = f"Back Razor's mode is `{result['razor_mode']}` ([all numbers](../measurements/ablation_digits.md))"
    return "\n".join(lines) + f"\n\n{about}; {mode}.\n"


REAL = ("minilm-sst2", "minilm-sst2-lengths", "dinov2-cifar10-56", "efficientnet-cifar10", "stories")
KINDS = {
    "low-bit": "Back Razor, keep", "pruned": "Back Razor, pruned, keep", "paper": "Back Razor, the paper's, keep",
    "lora": "LoRA, r =", "lora-xs": "LoRA-XS, bases and r:", "bitfit": "BitFit", "head": "the head alone",
    "galore-adamw": "GaLore, r =", "galore-scaled": "GaLoreScaled, r =", "adamw8bit": "8-bit AdamW",
    "lte": "LTE, heads × r:", "melo": "MeLo, r =",
}  # fmt: skip
"""First word of an arm of ``benchmarks/real_study.py`` -> its name."""


def real_models() -> str:
    """What each choice did to short fine-tunings of real pretrained models, beside what it saved there."""
    head = "| | | against full training | kept for the backward pass | optimizer state | trained numbers |"
    lines = [head, "|---|---|--:|--:|--:|--:|"]
    for task in REAL:
        found = json.loads((ROOT / "benchmarks" / "results" / f"real_{task}.json").read_text())
        arms = {name: arm for name, arm in found["arms"].items() if arm["seeds"] > 2}
        about = f"[{found['about']}](../measurements/real_{task}.md): {found['metric']}"
        lines.append(f"| {about} | full training | {arms['dense']['score']:.4g} | {_costs(arms['dense'])} |")
        for name, arm in arms.items():
            if name != "dense":
                change = f"{arm['less_dense']:+.3g} ± {arm['less_dense_ci95']:.2g}".replace("-", "−")
                lines.append(f"| | {_choice(name)} | {change} | {_costs(arm)} |")
    return "\n".join(lines) + "\n"


def _choice(arm: str) -> str:
    """An arm in words."""
    plain, _, save = arm.partition(", ")
    kind, _, rest = plain.partition(" ")
    words = f"{KINDS[kind]} {rest}".strip()
    return f"{words}; {_choice(save)}" if save else words


def _costs(arm: dict[str, Any]) -> str:
    amounts = (f"{arm[n] / 2**20:.3g} MiB" for n in ("saved_bytes", "optimizer_bytes"))
    return f"{' | '.join(amounts)} | {arm['trained_numbers']:,}"


def _measured(memory: dict[str, Any]) -> dict[str, int]:
    return memory.get("measured", memory)
