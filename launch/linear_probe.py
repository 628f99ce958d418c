"""Train linear heads on a frozen encoder's features: several blocks, both poolings, in one pass.

deepspeed launch/linear_probe.py --encoder runs/demo --preset demo --data.train data/demo
deepspeed --hostfile hosts launch/linear_probe.py --encoder runs/vit_b --data.train data/imagenet
"""

from ddae.config.cli import run
from ddae.config.evaluation import PROBING, ProbeConfig
from ddae.distributed.preemption import Stop


def main(config: ProbeConfig) -> None:
    stop = Stop()  # listens from here on

    # These take seconds to import; mistakes in the flags are told before.
    from ddae.distributed.engine import stop_process_group
    from ddae.eval.linear_probe import linear_probe

    linear_probe(config, stop)
    stop_process_group()


if __name__ == "__main__":
    run(main, PROBING)
