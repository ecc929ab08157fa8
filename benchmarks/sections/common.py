"""What several sections say in the same way."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any


def spread(ratios: Sequence[float]) -> str:
    """The median of ratios, and each of them."""
    each = ", ".join(f"{x:.2f}" for x in ratios)
    return f"**{statistics.median(ratios):.2f}** ({each})"


def measured(result: dict[str, Any]) -> str:
    """When, how and where."""
    machine, versions = result["machine"], result["versions"]
    return (
        f"Measured {result['date']} with `{result['command']}` on {machine['cores']} "
        f"{machine['architecture']} cores (load average {result['load_average']:.1f}), PyTorch "
        f"{versions['torch']}, transformers {versions['transformers']}."
    )
