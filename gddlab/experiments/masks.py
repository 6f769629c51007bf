"""Which layers are frozen: what is measured of a teacher, and the masks that experiments train with."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from gddlab.experiments.experiment import MaskInputs
from gddlab.freezing import FreezeMask, select_freeze
from gddlab.freezing.candidates import ENDS, Network, fill, shuffled
from gddlab.probing import DEFAULT, ProbeResult, ablate, probe
from gddlab.probing.layers import owner_of
from gddlab.runtime import chosen_device
from gddlab.teachers import load_precond

Chooser = Callable[[MaskInputs, int], FreezeMask | None]


def measure(teacher: str, data: str) -> ProbeResult:
    """Probes and ablates a teacher: 64 and 16 images at 18 noise levels, seed 0."""
    net = load_precond(teacher).to(chosen_device())
    probed = probe(net, 18, data=data, stats=(*DEFAULT, "cosine"), n=64, seed=0)
    return probed.join(ablate(net, 18, data=data, n=16, seed=0))


def ruled(measured: MaskInputs, seed: int) -> FreezeMask | None:
    return measured.rule


def free(measured: MaskInputs, seed: int) -> FreezeMask | None:
    return None


def by_rule(strategy: str) -> Chooser:
    """A rule that needs names alone."""
    return lambda measured, seed: select_freeze(measured.result, strategy=strategy)


def at_share(share: float, *, ordered: bool = False) -> Chooser:
    """Freezes layers up to a share of the parameters, other ones for each training seed.

    In random order: the convolutions but the first and the last, then all others. In the rule's order, `ordered`: those
    that option 1 freezes, in random order, then what option 2 adds, what option 3 adds, and all others.
    """

    def chosen(measured: MaskInputs, seed: int) -> FreezeMask:
        network, result = Network(measured.result), measured.result
        if ordered:
            rules = (select_freeze(result, strategy=s) for s in ("gdd-i", "gdd-i-2", "gdd-i-3"))
            tiers = [{owner_of(p) for p in mask.frozen} for mask in rules]
        else:
            tiers = [network.auto() - network.ends(ENDS)]
        left = {layer: network.unit(layer, [layer]) for layer in network.own}
        room, frozen = round(share * network.n_params), list[str]()
        for tier in (*tiers, {*left}):
            units = shuffled([left.pop(layer) for layer in [*left] if layer in tier], seed)
            taken = fill(units, room)
            room -= sum(unit.cost("params") for unit in taken)
            frozen += [unit.name for unit in taken]
            if len(taken) < len(units):
                break

        def by_share(source: object) -> Iterable[str]:
            return frozen

        return select_freeze(result, strategy=by_share)

    return chosen
