"""What is asked of every method on every model. A cell is "works", with what there is to say, or says why not.

The check that all methods share: after two steps every parameter that the method says it trains has changed, and no
other. What a method leaves out, or cannot reach, it must have named; a parameter that the model's own loss does not
depend on counts for nothing.
"""

import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

import lora_xs
import lte
import torch
from backrazor import Razor
from galore_vit import GaLoreAdamW, param_groups, state_bytes
from memtrain_common.measuring.memory import SavedActivations
from torch import Tensor, nn

from .case import Case, loss_of, outputs


@dataclass(frozen=True)
class Cell:
    works: bool
    note: str = ""
    """What there is to say: the figure of a cell that works, or the sentence of one that does not."""


class Fault(AssertionError):
    """What a method did not do, as a sentence."""


@dataclass(frozen=True)
class Plain:
    """The model as it is: its loss, gradients and what it saves."""

    loss: Tensor
    gradients: dict[str, Tensor | None]
    saved: int

    def unused(self, name: str) -> bool:
        """Whether the loss does not depend on a parameter (or less than Adam's ε, which hides the step), or the
        model itself does not train it."""
        gradient = self.gradients.get(name)
        return gradient is None or not bool((gradient.abs() > 1e-8).any())


def _quietly(call: Callable[..., Any], *args: Any, **kwargs: Any) -> tuple[Any, list[str]]:
    """(what it returns, the warnings of ours that it gave)."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        made = call(*args, **kwargs)
    return made, [str(w.message) for w in said]


def _pass(model: nn.Module, batch: dict[str, Any], razor: Any = None) -> Plain:
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    state = {name: b.clone() for name, b in model.named_buffers()}  # a batch norm's statistics
    with SavedActivations(model) as saved:
        if razor is None:
            loss = loss_of(model, batch)
        else:
            with razor:
                loss = loss_of(model, batch)
    size = sum(saved.by_layer().values())
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    for name, b in model.named_buffers():
        b.copy_(state[name])
    return Plain(loss.detach(), dict(zip(parameters, found, strict=True)), size)


def plain(case: Case) -> Plain:
    """A step of the model without any method.

    Raises:
        Fault: if the model itself cannot be compared: its loss is not finite, or differs from call to call.
    """
    model = case.build().train()
    batch = case.inputs(model)
    first, again = _pass(model, batch), _pass(model, batch)
    if not first.loss.isfinite():
        raise Fault(f"the model's own loss is {float(first.loss)}")
    if not torch.equal(first.loss, again.loss):
        raise Fault("the model's own loss is another at each call")
    return first


def back_razor(case: Case, dense: Plain) -> Cell:
    """keep = 1 equals dense training; at 0.1 the loss is the same to the bit and every gradient finite."""
    model = case.build().train()
    batch = case.inputs(model)
    whole, tenth = _pass(model, batch, Razor(1)), _pass(model, batch, Razor(0.1))
    norm = sum(float(g.norm()) ** 2 for g in dense.gradients.values() if g is not None) ** 0.5
    for what, made in (("1", whole), ("0.1", tenth)):
        if not torch.equal(made.loss, dense.loss):
            raise Fault(f"at keep {what} the loss is {float(made.loss)!r}, densely {float(dense.loss)!r}")
        for name, gradient in made.gradients.items():
            expected = dense.gradients[name]
            if (gradient is None) != (expected is None):
                raise Fault(f"at keep {what} {name} has {'no' if gradient is None else 'a'} gradient")
            if gradient is not None and not gradient.isfinite().all():
                raise Fault(f"at keep {what} the gradient of {name} is not finite")
    for name, gradient in whole.gradients.items():
        expected = dense.gradients[name]
        if gradient is not None and expected is not None and (gradient - expected).norm() > 1e-4 * norm:
            raise Fault(f"at keep 1 the gradient of {name} differs from the dense one")
    if tenth.saved > dense.saved:
        raise Fault(f"at keep 0.1 it saves {tenth.saved:,} bytes, densely {dense.saved:,}")
    return Cell(True, f"{dense.saved / max(1, tenth.saved):.1f} × less saved")


def _train(model: nn.Module, batch: dict[str, Any], optimizer: torch.optim.Optimizer, steps: int = 2) -> list[str]:
    def run() -> None:
        for _ in range(steps):
            loss_of(model, batch).backward()
            optimizer.step()
            optimizer.zero_grad()

    return _quietly(run)[1]


def _check_changes(
    model: nn.Module, before: dict[str, Tensor], trained: Iterable[Tensor], excused: Callable[[str], bool]
) -> None:
    """Every trained parameter has changed, and no other."""
    ids = {id(p) for p in trained}
    for name, p in model.named_parameters():
        changed = not torch.equal(p.detach(), before[name])
        if changed and id(p) not in ids:
            raise Fault(f"{name} has changed, and is not among what is trained")
        if not changed and id(p) in ids and not excused(name):
            raise Fault(f"{name} is said to be trained and has not changed, without a word")


def _copies(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


@torch.no_grad()
def _answers(model: nn.Module, batch: dict[str, Any]) -> list[Tensor]:
    model.eval()
    torch.manual_seed(4)
    made = outputs(model, batch)
    model.train()
    return made


def _same(what: str, made: list[Tensor], expected: list[Tensor], tolerance: float = 0.0) -> None:
    for got, wanted in zip(made, expected, strict=True):
        difference = float((got.float() - wanted.float()).abs().nan_to_num(0, 0, 0).max()) if got.numel() else 0.0
        scale = float(wanted.float().abs().nan_to_num(0, 0, 0).max()) if got.numel() else 0.0
        if difference > tolerance * max(scale, 1.0):
            raise Fault(f"{what} the model answers otherwise, by {difference:.1e}")


def lora_xs_(case: Case, dense: Plain) -> Cell:
    """`all-linear`, or every convolution by name where there is no linear layer; trained, saved, loaded, merged."""
    notes: list[str] = []
    excluded: list[str] = []

    def adapt(model: nn.Module, targets: Any) -> list[str]:
        config = lora_xs.LoRAXSConfig(rank=2, targets=targets, exclude=tuple(excluded))
        return _quietly(lora_xs.inject, model, config, cache=False)[1]

    model = case.build()
    targets: Any = "all-linear"
    refusal = ""
    while True:
        try:
            said = adapt(model, targets)
        except lora_xs.LoRAXSError as error:
            names = {name for name, _ in model.named_modules() if name and name in str(error)}
            name = max(names, key=len, default="")
            if ("`exclude`" not in str(error) and "rank_pattern" not in str(error)) or not name or name in excluded:
                refusal = refusal or str(error)
                break
            refusal = str(error)
            excluded += _alike(model, name)
            model = case.build()
        else:
            if excluded:
                notes.append(f"without {', '.join(sorted(_numberless(excluded)))}, which it refuses by name")
            refusal = ""
            break
    if refusal:
        if "found no Linear" not in refusal:
            return Cell(False, refusal)
        targets = _convolutions(model)
        if not targets:
            return Cell(False, refusal)
    elif lora_xs.coverage(model).part > 0.99:  # a head is all that it has of linear layers
        targets = _convolutions(model) or targets
    if targets != "all-linear":
        all_linear, left_out, excluded = model, excluded, []
        model = case.build()
        failure, of_linear = "", [] if refusal else said
        try:
            said = adapt(model, targets)
        except lora_xs.LoRAXSError as error:
            failure = str(error)
        if refusal and failure:
            return Cell(False, failure)
        if failure or (not refusal and lora_xs.coverage(model).part > 0.5):  # its own kind has most
            model, targets, excluded, said = all_linear, "all-linear", left_out, of_linear
        else:
            notes = ["its convolutions, by name"]
    left = lora_xs.coverage(model)
    if targets == "all-linear" and not excluded and left.part >= 0.01 and not any("have no adapter" in s for s in said):
        raise Fault(f"{left}, and nothing said so")
    if left.part >= 0.01:
        notes.append(f"{100 * left.part:.0f} % of the blocks' weights are left out")
    at_injection = said
    batch = case.inputs(model)
    model.train()
    groups = lora_xs.param_groups(model)
    trained = [p for group in groups for p in group["params"]]
    if {id(p) for p in trained} != {id(p) for p in model.parameters() if p.requires_grad}:
        raise Fault("what requires a gradient is not what param_groups gives")
    before, base = _copies(model), _answers(model, batch)
    said = _train(model, batch, torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.0))
    named = set(lora_xs.uncalled(model))
    if named and not any(name in " ".join(said) for name in _numberless(named)):
        raise Fault(f"{min(named)} was not reached, and nothing said so")
    if named:
        notes.append(f"{', '.join(sorted(_numberless(named)))} are not called, as the first step says")
    zero = [s for s in at_injection if "have weights of zeros" in s]

    def excused(name: str) -> bool:
        layer = ".".join("*" if part.isdigit() else part for part in name.split(".lora_xs.")[0].split("."))
        return _names_one(name, named) or _weight_unused(name, dense) or any(layer in s for s in zero)

    _check_changes(model, before, trained, excused)
    notes += [s.split(" have weights")[0] + " are zero and train nothing, as injection says" for s in zero]
    answers = _answers(model, batch)
    if all(map(torch.equal, answers, base)):
        raise Fault("two steps change nothing that the model answers")
    with TemporaryDirectory() as folder:
        lora_xs.save_adapter(model, folder)
        loaded = _quietly(lora_xs.load_adapter, _with_buffers(case.build(), model), folder)[0]
        _same("with the adapter loaded", _answers(loaded, batch), answers)
    _quietly(lora_xs.merge, model)
    _same("merged", _answers(model, batch), answers, 1e-3)
    return Cell(True, "; ".join(notes))


def _convolutions(model: nn.Module) -> tuple[str, ...]:
    """Those that have one matrix, but for the task's head."""
    return tuple(
        name
        for name, m in model.named_modules()
        if type(m) is nn.Conv2d and m.groups == 1 and name.split(".")[0] not in ("classifier", "head", "fc")
    )


def _alike(model: nn.Module, name: str) -> list[str]:
    """A refused module, and those that are refused for the same reason: of its class, or grouped as it is."""
    refused = model.get_submodule(name)
    grouped = getattr(refused, "groups", 1) > 1
    return [
        n
        for n, m in model.named_modules()
        if n == name or (type(m) is type(refused) and (getattr(m, "groups", 1) > 1 if grouped else _is_own(m)))
    ]


def _is_own(module: nn.Module) -> bool:
    return type(module).__module__.partition(".")[0] != "torch"


def _with_buffers(model: nn.Module, of: nn.Module) -> nn.Module:
    """The statistics that training has moved are no part of an adapter."""
    found = dict(of.named_buffers())
    for name, b in model.named_buffers():
        if name in found:
            b.copy_(found[name])
    return model


def _numberless(names: Iterable[str]) -> set[str]:
    return {".".join("*" if part.isdigit() else part for part in name.split(".")) for name in names}


def _names_one(parameter: str, modules: set[str]) -> bool:
    return any(parameter.startswith(f"{name}.") for name in modules)


def _weight_unused(name: str, dense: Plain) -> bool:
    """Whether the plain loss does not depend on a parameter, or on the weight that an adapter's stands beside."""
    if name in dense.gradients:
        return dense.unused(name)
    owner = name
    while owner:
        owner = owner.rpartition(".")[0]
        own = [n for n in dense.gradients if n == owner or n.startswith(f"{owner}.")]
        if own:
            return all(dense.unused(n) for n in own)
    return False


def lte_(case: Case, dense: Plain) -> Cell:
    """Two heads on every layer that can have them. A layer that it refuses is left out, as its sentence says."""
    exclude = ["lm_head", *_tied(case.build())]
    refused: list[str] = []
    while True:
        try:
            cell = _lte(case, dense, tuple(exclude))
        except ValueError as error:
            names = {name for name, _ in case.build().named_modules()}
            name = re.split(r"[ :]", str(error))[0]
            if name not in names or name in exclude:
                return Cell(False, str(error))
            exclude += _alike(case.build(), name)
            refused = list(dict.fromkeys([*refused, *_numberless([name])]))
            continue
        notes = [f"without {', '.join(refused)}, which it refuses by name"] if refused else []
        tied = _tied(case.build())
        notes += [f"without {', '.join(sorted(_numberless(tied)))}, whose weight others share"] if tied else []
        return Cell(cell.works, "; ".join([*notes, *([cell.note] if cell.note else [])]))


def _lte(case: Case, dense: Plain, exclude: tuple[str, ...]) -> Cell:
    notes = []
    model = case.build()
    config = lte.LTEConfig(heads=2, rank=2, alpha=4, exclude=exclude)
    said = _quietly(lte.inject, model, config)[1]
    share, left = lte.without_heads(model, config.exclude)
    if share >= 0.01:
        if not any("have no heads" in s for s in said):
            raise Fault(f"{share:.0%} of the blocks' weights have no heads ({left[0]}), and nothing said so")
        notes.append(f"{share:.0%} of the blocks' weights have no heads")
    batch = case.inputs(model)
    model.train()
    groups = lte.param_groups(model, lr=1e-2, rest_lr=1e-2, weight_decay=0.0)
    trained = [p for group in groups for p in group["params"]]
    if {id(p) for p in trained} != {id(p) for p in model.parameters() if p.requires_grad}:
        raise Fault("what requires a gradient is not what param_groups gives")
    before, base = _copies(model), _answers(model, batch)
    optimizer = torch.optim.AdamW(groups)
    merger = lte.Merger(model, every=2)

    def step() -> set[str]:
        loss_of(model, batch).backward()
        silent = {name for name, p in model.named_parameters() if p.requires_grad and p.grad is None}
        optimizer.step()
        optimizer.zero_grad()
        return silent

    silent, _ = _quietly(step)
    said = _quietly(merger.step)[1]
    _quietly(step)
    unreached = sorted(name.removesuffix(".lora_B") for name in silent if name.endswith(".lora_B"))
    warning = next((s for s in said if "did not reach heads of" in s), "")
    if unreached and unreached[0] not in warning:
        raise Fault(f"heads of {unreached[0]} were not reached, and nothing said so")
    if unreached:
        notes.append(f"{', '.join(sorted(_numberless(unreached)))} are not called, as the first step says")
    _check_changes(model, before, trained, lambda name: _names_one(name, set(unreached)) or _weight_unused(name, dense))
    _quietly(merger.step)
    answers = _answers(model, batch)
    if all(map(torch.equal, answers, base)):
        raise Fault("two steps change nothing that the model answers")
    fresh = case.build()
    fresh.load_state_dict(lte.merged_state_dict(model))
    _same("as a plain model", _answers(fresh, batch), answers, 1e-3)
    again = _quietly(lte.inject, case.build(), config)[0]
    again.load_state_dict(model.state_dict())
    _same("with its state loaded", _answers(again, batch), answers)
    return Cell(True, "; ".join(notes))


def galore(case: Case, dense: Plain) -> Cell:
    """Rank 2 of linear layers in the blocks, or of convolutions or by name where there is none; trained, resumed."""
    notes = []
    model = case.build().train()
    batch = case.inputs(model)
    settings = keys = {"update_proj_gap": 2, "scale": 1.0}

    def groups(of: nn.Module) -> list[dict[str, Any]]:
        return param_groups(of, 2, **settings)

    try:
        groups(model)
    except ValueError as error:
        for word, how in (("conv", True), ("targets", r"\.\d+\..*weight$")):
            settings = {**keys, word: how}
            try:
                groups(model)
            except ValueError:
                continue
            notes.append("its convolutions, by conv=True" if word == "conv" else "its matrices, by targets")
            break
        else:
            return Cell(False, str(error))

    def optimizer(of: nn.Module) -> GaLoreAdamW:
        return GaLoreAdamW(groups(of), lr=1e-2, weight_decay=0.0)

    chosen = groups(model)
    projected = sum(p.numel() for g in chosen if "rank" in g for p in g["params"])
    every = sum(p.numel() for p in model.parameters())
    before, opt = _copies(model), optimizer(model)
    _train(model, batch, opt)
    trained = [p for group in opt.param_groups for p in group["params"]]
    _check_changes(model, before, trained, dense.unused)
    twin = case.build().train()  # not a copy: some models keep states of the last pass
    twin.load_state_dict(model.state_dict())
    resumed = optimizer(twin)
    resumed.load_state_dict(opt.state_dict())
    for of, by in ((model, opt), (twin, resumed)):
        _train(of, batch, by, steps=1)
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        if not torch.equal(p, q):
            raise Fault(f"resumed, {name} differs after a step")
    adam = 8 * sum(p.numel() for p in model.parameters())
    notes.insert(0, f"{100 * projected / every:.0f} % of the weights projected")
    notes.append(f"{state_bytes(opt) / adam:.0%} of Adam's state")
    return Cell(True, "; ".join(notes))


def _tied(model: nn.Module) -> tuple[str, ...]:
    """Layers whose weight is an embedding's or another layer's."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        weight = module._parameters.get("weight")
        if weight is not None:
            owners.setdefault(id(weight), []).append(name)
    shared = [name for names in owners.values() if len(names) > 1 for name in names]
    return tuple(n for n in shared if isinstance(model.get_submodule(n), nn.Linear | nn.Conv2d))


METHODS: dict[str, Callable[[Case, Plain], Cell]] = {
    "Back Razor": back_razor,
    "LoRA-XS": lora_xs_,
    "LTE": lte_,
    "GaLore": galore,
}


def row(case: Case) -> dict[str, Cell]:
    """All cells of a model; a fault of ours is a sentence too, and begins with its kind."""
    try:
        dense = plain(case)
    except Exception as error:
        return {name: Cell(False, _sentence(error)) for name in METHODS}
    cells = {}
    for name, method in METHODS.items():
        try:
            cells[name] = method(case, dense)
        except Exception as error:
            cells[name] = Cell(False, _sentence(error))
    return cells


def _sentence(error: Exception) -> str:
    if isinstance(error, Fault):
        return str(error)
    return f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"
