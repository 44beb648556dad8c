"""The proofs of `paraxis verify` on a terminal."""

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table


def print_proofs(document: dict[str, Any], out: Console) -> None:
    """One line a plan: against what it was held, how far apart they are, where they first differ."""
    table = Table("plan", "against", "max difference", "tolerance", "equal", box=None, pad_edge=False)
    for result in document["results"]:
        proof = result["verified"]
        if proof is None:
            table.add_row(result["label"], f"{result['status']}: {escape(result['reason'] or '')}")
            continue
        worst = proof["max_relative_difference"]
        shown = "infinite" if worst is None else f"{worst:.1e}"
        verdict = "yes" if proof["passed"] else f"NO: {escape(proof['where'] or '')}"
        table.add_row(result["label"], proof["against"], shown, f"{proof['tolerance']:.0e}", verdict)
    out.print(table)
    notes = {r["verified"]["note"] for r in document["results"] if r["verified"] and r["verified"]["note"]}
    for note in [*sorted(notes), *document["notes"]]:
        out.print(escape(note))
