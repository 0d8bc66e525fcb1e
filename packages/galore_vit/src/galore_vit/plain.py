"""What an optimizer says of itself where nothing, or not everything, is projected."""

from torch.optim import Optimizer


def said_of_plain(optimizer: Optimizer, too_small: list[tuple[int, ...]], *, projected: int) -> str:
    """A sentence for whoever thinks that something is projected; empty where there is nothing to say.

    Args:
        optimizer: a GaLore optimizer.
        too_small: shapes of weights with no side above their rank.
        projected: how many weights are.
    """
    if not any("rank" in group for group in optimizer.param_groups):
        kind = type(optimizer)
        return (
            f"no parameter group has a rank, so nothing is projected and this {kind.__name__} is plain "
            f"{kind.inner}: make the groups with galore_vit.param_groups(model, rank=…)"  # type: ignore[attr-defined]
        )
    if not too_small:
        return ""
    shapes = ", ".join("×".join(map(str, s)) for s in sorted(set(too_small))[:4])
    return (
        f"{len(too_small)} weights ({shapes}) have no side above their rank"
        + (", where the published code stops with an error" if optimizer.defaults["paper"] else "")
        + ": they are updated without projection and without scale; choose a smaller rank to project them"
        + ("" if projected else ", since nothing is projected now")
    )
