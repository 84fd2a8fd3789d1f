"""The phases of a run, in the order in which they run: one row each."""

from __future__ import annotations

from tspc.phases import benchmark, decompose, distill, export, finetune, plan
from tspc.phases.phase import DeliveryPhase, NetworkPhase, Phase

PHASES: dict[str, Phase] = {
    phase.name: phase
    for phase in (
        # Makes the reference network; its recipe belongs to the data set.
        Phase("pretrain", needs_data=True),
        plan.PHASE,
        decompose.PHASE,
        distill.PHASE,
        finetune.PHASE,
        export.PHASE,
        benchmark.PHASE,
        # Looks at runs that are there already, and never runs beside the others.
        Phase("compare"),
    )
}

NETWORK_PHASES = {name: phase for name, phase in PHASES.items() if isinstance(phase, NetworkPhase)}
"""Those that leave a network in the run's directory."""

DELIVERY_PHASES = {name: phase for name, phase in PHASES.items() if isinstance(phase, DeliveryPhase)}
"""Those that make something of the finished network."""

FIRST = next(iter(NETWORK_PHASES))
"""The phase that makes the first network, with its plan, from the reference."""
