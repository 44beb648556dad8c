"""Paraxis as one more peer: resident ranks of one plan, driven as `explore` drives them."""

from common import LR, parser
from control import Group, serve
from paraxis.api import make_spec, silent
from paraxis.plan.plan import parse
from paraxis.session import open_session

NETWORKS = {"mlp": "mlp", "mlp128": "mlp:784-128-10", "wide": "mlp:784-1024-1024-10", "cnn": "cnn:0"}


def main() -> None:
    """Train with --plan; --threads belongs to the plan's text here."""
    options = parser(__doc__, nets=tuple(NETWORKS))
    options.add_argument("--plan", default="dp=2", help="default: %(default)s")
    args = options.parse_args()
    plan = parse(args.plan)
    spec = make_spec(NETWORKS[args.net], batch=args.batch, lr=LR, momentum=0.0)
    sizes = {plan.comm: plan.mesh.size} if plan.comm else {}
    with open_session(spec, {}, sizes, None, silent) as session:
        session.begin(("solo", *sizes))
        plan = session.settled(plan)
        session.setup("peer", plan)
        group = Group()
        seconds = [0.0]

        def run(steps: int) -> None:
            request = {"do": "measure", "warm": 0, "steps": steps, "trace": 0}
            seconds[0] = session.ask("peer", plan, request)[0]["seconds"]

        def norm() -> float:
            parts = session.ask("peer", plan, {"do": "norm"})
            return sum(
                part for part, rank in zip(parts, range(len(parts)), strict=True) if plan.mesh.coordinates(rank)[0] == 0
            )

        serve(args, run, norm, group)


if __name__ == "__main__":
    main()
