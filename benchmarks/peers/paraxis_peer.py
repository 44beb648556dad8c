"""Paraxis as one more peer: resident ranks of one plan, driven as `explore` drives them."""

from argparse import Namespace
from itertools import islice
from typing import Any

from common import LR, parser
from control import Group, serve
from paraxis.api import make_spec, silent
from paraxis.plan.plan import parse
from paraxis.session import open_session
from paraxis.task.spec import TaskSpec

NETWORKS = {
    "mlp": "mlp",
    "mlp128": "mlp:784-128-10",
    "wide": "mlp:784-1024-1024-10",
    "cnn": "cnn:0",
    "resnet18": "resnet18",
}
ALIKE = 64  # batches that travel to the ranks with --alike


def task(args: Namespace) -> tuple[TaskSpec, dict[str, Any]]:
    """Our own network and data; with --alike the peers' parameters and their first batches, in their order."""
    words: dict[str, Any] = {"batch": args.batch, "lr": LR, "momentum": 0.0}
    if not args.alike:
        return make_spec(NETWORKS[args.net], **words), {}
    from nets import batches, make

    net = make(args.net)
    return make_spec(net, **words), {"net": net, "batches": list(islice(batches(args), ALIKE))}


def main() -> None:
    """Train with --plan; --threads belongs to the plan's text here."""
    options = parser(__doc__, nets=tuple(NETWORKS))
    options.add_argument("--plan", default="dp=2", help="default: %(default)s")
    options.add_argument(
        "--alike", action="store_true", help=f"start as the other peers do, on their first {ALIKE} batches (not timed)"
    )
    args = options.parse_args()
    if args.alike and args.net == "resnet18":
        options.error("--alike takes networks that are one nn.Sequential of plain layers, not resnet18")
    plan = parse(args.plan)
    spec, objects = task(args)
    sizes = {plan.comm: plan.mesh.size} if plan.processes > 1 else {}  # where ranks are threads, "solo" has them all
    with open_session(spec, objects, sizes, None, silent) as session:
        session.begin(("solo", *sizes))
        plan = session.settled(plan)
        session.setup("peer", plan)

        def run(steps: int) -> None:
            session.ask("peer", plan, {"do": "measure", "warm": 0, "steps": steps, "trace": 0})

        def norm() -> float:
            parts = session.ask("peer", plan, {"do": "norm"})  # of every process; replicas hold the same
            return sum(part for rank, part in enumerate(parts) if plan.mesh.coordinates(rank)[0] == 0)

        serve(args, run, norm, Group())


if __name__ == "__main__":
    main()
