"""NPC in two processes on the CPU, with batches of their own and the same importance.

Run `python -m examples.two_processes` in the checkout.
It needs `pip install scikit-learn`.
"""

import argparse
import os
from tempfile import TemporaryDirectory

import torch
from torch import distributed, multiprocessing, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from examples.digits import accuracy, batches, digits
from npc_ext import NPC

PROCESSES = 2


def train(rank: int, folder: str, steps: int) -> None:
    """Runs in each process: trains on its own batches, and compares importance."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # both run on this machine
    store = f"file://{folder}/store"
    distributed.init_process_group("gloo", store, rank=rank, world_size=PROCESSES)
    torch.manual_seed(0)
    layers = nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10)
    model = DistributedDataParallel(nn.Sequential(nn.Flatten(), *layers))
    optimizer = NPC(model, lr=0.1, half_life=steps)
    train, test = digits(range(10))
    torch.manual_seed(rank)
    for images, labels in batches(train, steps, size=16):
        optimizer.zero_grad()
        cross_entropy(model(images), labels).backward()
        optimizer.step()
    plasticity = optimizer.plasticity()
    importance = torch.cat([layer.importance for layer in plasticity.values()])
    of_both = [torch.empty_like(importance) for _ in range(PROCESSES)]
    distributed.all_gather(of_both, importance)
    if rank == 0:
        print(f"accuracy: {accuracy(model(test.images), test.labels):.1%}")
        for process, values in enumerate(of_both):
            first = " ".join(f"{value:.4f}" for value in values[:5])
            print(f"importance in process {process}: {first} ...")
        count, equal = len(importance), torch.equal(*of_both)
        bits = f"equal to the last bit: {equal}"
        print(f"the importance of all {count} neurons is {bits}")
    distributed.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m examples.two_processes", description=__doc__
    )
    parser.add_argument("--steps", type=int, default=300)
    with TemporaryDirectory() as folder:
        multiprocessing.spawn(train, (folder, parser.parse_args().steps), PROCESSES)
