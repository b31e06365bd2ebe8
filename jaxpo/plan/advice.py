"""What to change where a step does not fit, in the order of what it costs."""

import math

from jaxpo import sharding
from jaxpo.plan.chips import GIB, Topology
from jaxpo.plan.cost import state_bytes
from jaxpo.run import Run


def advise(run: Run, topology: Topology) -> list[str]:
    """Settings that would take less memory, those first that cost no time. Each names what it would save."""
    config, mesh, held = run.config, run.mesh.shape, state_bytes(run)
    devices, row_shares = run.mesh.size, sharding.row_multiple(run.mesh)
    copies = devices // (mesh['fsdp'] * mesh['tensor'])
    gib = {name: size / GIB for name, size in held.items()}
    found = []
    if copies > 1:
        total = sum(gib.values())
        found.append(
            f'--mesh.fsdp {devices // mesh["replica"] // mesh["tensor"]}: the state is held {copies} times; this would '
            f'leave {total * mesh["replica"] / copies:.2f} of its {total:.2f} GiB on a device.'
        )
    for name in run.held('own'):
        if name in run.objective.references and not _needs_live(run):
            found.append(
                f'--references.{name}.table True: its log-probabilities from a table, none of its '
                f'{gib.get("references", 0):.2f} GiB, and a forward pass less.'
            )
    if run.attention_of(run.pretrained).kernel == 'xla' and max(config.rows.lengths) >= 1024:
        found.append('--model.attention splash (or cudnn): no scores by the square of a row.')
    if config.model.remat != 'full':
        found.append('--model.remat full: a layer keeps its input alone, at the price of a forward pass.')
    if config.rows.microbatch > row_shares:
        smaller = max(row_shares, config.rows.microbatch // 2 // row_shares * row_shares)
        found.append(f'--rows.microbatch {smaller}: fewer rows at once.')
    if config.optimizer.kind == 'adamw' and not run.lora:
        if config.optimizer.moment_dtype == 'float32':
            found.append(f'--optimizer.moment-dtype bfloat16: {gib["optimizer"] / 4:.2f} GiB less.')
        found.append(f'--optimizer.kind adafactor: nearly all of the {gib["optimizer"]:.2f} GiB of moments less.')
    if not run.lora:
        found.append('--lora.rank 16: adapters in place of the weights; no float32 copy, no moments of them.')
    if 'references' in held and not any(run.in_host(name) for name in run.held('own')):
        found.append(f'--references.NAME.memory pinned_host: {gib["references"]:.2f} GiB in the host instead.')
    whole = sum(held.values()) * devices / copies
    least = math.ceil(whole / (0.7 * topology.chip.memory))
    if least > topology.chips:
        found.append(f'More chips: the state alone, split over all, wants {least} of {topology.kind}.')
    return found


def _needs_live(run: Run) -> bool:
    asked = set(run.objective.needs.statistics)
    return bool(asked & {'forward_kl', 'reverse_kl', 'activations'}) or bool(run.objective.token_masks)
