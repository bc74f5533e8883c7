"""Is a plan of a comparison right? Its times beside those of the run, in seconds of processor time.

OMP_NUM_THREADS=1 python benchmarks/plan.py --output runs/plan [settings of bae-lens compare]
"""

import json
import sys
import time

import tyro

from bae_lens.cli.compare import Compare


def main() -> None:
    """Runs the comparison, plans it, and prints what both say of every stage that is timed."""
    time.perf_counter = time.monotonic = time.process_time
    command = tyro.cli(Compare, config=(tyro.conf.OmitArgPrefixes,), default=Compare.defaults(sys.argv[1:]))
    command.run()
    planned = {stage.name: stage.seconds for stage in command.planned()[0].stages if stage.seconds is not None}
    stages = json.loads((command.output / "stages.json").read_text())
    took = {stage["name"]: stage["seconds"] for stage in stages}
    whole = sum(took.values())
    planned["in all"], took["in all"] = sum(planned.values()), sum(took[name] for name in planned)
    print("| stage | planned | took | planned / took |\n| --- | ---: | ---: | ---: |")
    for name, seconds in planned.items():
        print(f"| {name} | {seconds:.1f} | {took[name]:.1f} | {seconds / took[name]:.2f} |")
    print(f"\nThe whole run took {whole:.1f}, of which {whole - took['in all']:.1f} in stages that are not timed.")


if __name__ == "__main__":
    main()
