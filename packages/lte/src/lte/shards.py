"""The state of a training whose heads are spread over processes, as one state in the order of all heads, and back.

A checkpoint therefore does not say how many processes made it, and any number that divides the heads can go on.
"""

from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .headed import HEAD_TENSORS, Headed, draw_A
from .injection import headed, replicas
from .merging import Merger
from .parameters import copied_parameters, head_parameters, shared_parameters
from .ranks import Ranks
from .replicas import Replicas
from .sums import sum_of_products

M = TypeVar("M", bound=nn.Module)
State = dict[str, Any]  # {"model": state dict, "optimizer": state dict, …}
Rows = dict[str, tuple[int, Tensor]]  # name in the model -> (first row, rows)


class HeadShards:
    """What a training loop needs to know of heads on several processes.

    Args:
        model: injected with the same ``ranks``; None where every process holds all heads.
        optimizer: over its parameters, whose state is tensors of a parameter's shape (moments) and single numbers.
        merger: with ``merge_delay``, whose merges under way are taken, if they have arrived, when a process is lost.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        ranks: Ranks | None = None,
        merger: Merger | None = None,
    ) -> None:
        self._model, self._optimizer, self._ranks, self._merger = model, optimizer, ranks, merger
        self.apart = ranks is not None and ranks.size > 1
        self._shared = shared_parameters(model)
        self.speaks_each_step = self.apart and bool(self._shared)
        self.heads = next(iter(headed(model).values())).total_heads

    def average_gradients(self) -> None:
        """After the backward pass: parameters that are one for all heads get the mean gradient of all processes."""
        if self._ranks is not None:
            self._ranks.average_gradients(self._shared)

    def gather(self, state: State) -> State:
        """The whole state, on the first process; the others keep theirs. Every process calls it."""
        ranks = self._ranks
        if ranks is None or ranks.size == 1:
            return state
        return self._each(state, lambda t: ranks.gather_to_first(t, "checkpoints"))

    def scatter(self, state: State) -> State:
        """This process's part of a whole state, which may have been made with H₀ heads where H is a multiple of H₀:
        each head is then copied H/H₀ times, moments included. The mean of the heads, and so the model, stays.

        Raises:
            ValueError: if H is no multiple of H₀.
        """
        first, count = self._ranks.share(self.heads) if self._ranks is not None else (0, self.heads)

        def own(t: Tensor, *, whole: bool = False) -> Tensor:
            if self.heads % len(t):
                raise ValueError(
                    f"it was made with {len(t)} heads, which can become a multiple of {len(t)} but not {self.heads}: "
                    "its merged model can begin a new run"
                )
            every = t.repeat_interleave(self.heads // len(t), 0) if len(t) != self.heads else t
            return every if whole else every[first : first + count].clone()

        state = self._each(self._with_running_sums(state), own)
        layers = _with_all_names(self._model, Headed)
        everywhere = {f"{path}.{t}" for path, layer in layers if layer.telescopes for t in _ALL}
        model = {n: own(t, whole=True) if n in everywhere else t for n, t in state["model"].items()}
        return {**state, "model": model}

    def _with_running_sums(self, state: State) -> State:
        """The state with W's delta as a sum, where it was kept as the merged factors of fewer heads, whose bytes were
        less than its own: those of more heads are not."""
        model = dict(state["model"])
        for path, layer in _with_all_names(self._model, Headed):
            if not layer.telescopes and f"{path}.{_ALL[0]}" in model:
                A, B = (model.pop(f"{path}.{t}") for t in _ALL)
                model[f"{path}.weight_delta"] = sum_of_products(A, B).mul_(layer.scale / len(A))
                model |= {f"{path}.merged_A": A, f"{path}.merged_B": B}
        return {**state, "model": model}

    def alone(self, state: State) -> State:
        """A whole state from this process's alone, when others are lost: W and all that is not heads' own as it is
        here, which is the last merge; every head anew (or, where W telescopes, as it was merged), without moments;
        the mean of this process's copies for every copy. With sparse merges this process's heads owe all that they have
        learned and no merge has taken, its copies stay as they are, and the others' are what they were merged to.
        """
        if self._merger is not None:
            self._merger.settle()  # into the tensors that the state holds
            state = {**state, "others": {**state["others"], "merger": self._merger.state_dict()}}
        model, anchors = dict(state["model"]), self._anchors()
        generator = torch.Generator().manual_seed(torch.initial_seed() % 2**63)
        for path, layer in headed(self._model).items():
            A, B = (
                (layer.all_A, layer.all_B)
                if layer.telescopes
                else (torch.stack([a.clone() for _, a in draw_A(layer, layer.lora_A.detach(), generator)]), None)
            )
            B = layer.lora_B.detach().new_zeros(len(A), *layer.lora_B.shape[1:]) if B is None else B
            if layer.sparse is not None:
                owed = layer.feedback.new_zeros(self.heads, *layer.matrix_shape)
                model[f"{path}.feedback"] = _put(owed, layer.owed(), layer.first_head)
            for name in HEAD_TENSORS:
                if name.endswith(("_A", "_B")) and f"{path}.{name}" in model:
                    model[f"{path}.{name}"] = (A if name.endswith("A") else B).clone()
            _clear(model, f"{path}.sent_message", self.heads)
        for path, copy in replicas(self._model).items():
            for name in copy.names():
                stack, anchor = copy.get_parameter(name).detach(), anchors.get(copy.get_parameter(name))
                mean = copy.own_sum(name).div_(copy.heads) if anchor is None else anchor
                whole = mean.expand(self.heads, *mean.shape).clone()
                model[f"{path}.{name}"] = whole if anchor is None else _put(whole, stack, copy.first_head)
                _clear(model, f"{path}.message_{name}", self.heads)
        first: dict[nn.Module, str] = {}
        for path, module in _with_all_names(self._model, nn.Module):
            known = first.setdefault(module, path)
            if known != path and isinstance(module, Headed | Replicas):
                model |= {f"{path}.{name}": model[f"{known}.{name}"] for name in module.state_dict()}
        own = self._own_indices()
        moments = {i: s for i, s in state["optimizer"]["state"].items() if i not in own}
        rescued = {**state, "model": model, "optimizer": {**state["optimizer"], "state": moments}}
        merger = state.get("others", {}).get("merger", {})
        if "under_way" in merger:
            rescued["others"] = {**state["others"], "merger": {**merger, "under_way": []}}
        return rescued

    def own_rows(self, state: State) -> tuple[int, Rows] | None:
        """What this process's heads owe to sparse merges, and its copies, out of the state that :meth:`alone` made: the
        other survivors' are not in the checkpoint of the one that saves. Its mark is the number of merges."""
        rows: Rows = {}
        for path, layer in _with_all_names(self._model, Headed):
            if layer.sparse is not None:
                rows[f"{path}.feedback"] = (layer.first_head, layer.owed())
        anchors = self._anchors()
        for path, copy in _with_all_names(self._model, Replicas):
            for name in copy.names():
                if copy.get_parameter(name) in anchors:
                    rows[f"{path}.{name}"] = (copy.first_head, copy.get_parameter(name).detach().clone())
        merges = state.get("others", {}).get("merger", {}).get("merges", 0)
        return (merges, rows) if rows else None

    def _anchors(self) -> dict[nn.Parameter, Tensor]:
        """What sparse merges have made of every stack of copies; tied ones have one."""
        return {
            copy.get_parameter(name): copy.get_buffer(f"anchor_{name}")
            for copy in replicas(self._model).values()
            for name in (copy.own_names() if copy.sparse is not None else ())
        }

    def _each(self, state: State, change: Any) -> State:
        """The state with ``change`` applied to each tensor that has a head a row."""
        names = {f"{path}.{t}" for path, _ in _with_all_names(self._model, Headed) for t in HEAD_TENSORS}
        names |= {f"{path}.{n}" for path, copy in _with_all_names(self._model, Replicas) for n in copy.head_tensors()}
        done: dict[tuple[int, torch.Size], Tensor] = {}  # tied copies are one tensor, before and after

        def changed(tensor: Tensor) -> Tensor:
            key = (tensor.data_ptr(), tensor.shape)
            if tensor.numel() == 0 or key not in done:
                done[key] = change(tensor)
            return done[key]

        model = {n: changed(t) if n in names else t for n, t in state["model"].items()}
        parameters, own = self._parameters(), self._own_indices()
        moments: dict[int, dict[str, Any]] = {}
        for i, entries in state["optimizer"]["state"].items():
            inner = parameters[i].shape[1:]
            moments[i] = {
                k: change(v) if i in own and isinstance(v, Tensor) and v.dim() and v.shape[1:] == inner else v
                for k, v in entries.items()
            }
        return {**state, "model": model, "optimizer": {**state["optimizer"], "state": moments}}

    def _parameters(self) -> list[nn.Parameter]:
        return [
            p for group in self._optimizer.param_groups for p in group["params"]
        ]  # in the order of the state's keys

    def _own_indices(self) -> set[int]:
        own = {*head_parameters(self._model), *copied_parameters(self._model)}
        return {i for i, p in enumerate(self._parameters()) if p in own}


def _with_all_names(model: nn.Module, kind: type[M]) -> list[tuple[str, M]]:
    """The modules of a kind with every name that each has: a layer at two places has its tensors under both."""
    return [(n, m) for n, m in model.named_modules(remove_duplicate=False) if isinstance(m, kind)]


def _clear(model: State, name: str, heads: int) -> None:
    """A row of zeros a head for what ``name`` holds, if there is such a tensor."""
    if name in model:
        model[name] = model[name].new_zeros(heads, *model[name].shape[1:])


def _put(whole: Tensor, part: Tensor, first: int) -> Tensor:
    """``whole`` with ``part`` in its rows from ``first`` on."""
    whole[first : first + len(part)] = part
    return whole


_ALL = ("all_A", "all_B")
