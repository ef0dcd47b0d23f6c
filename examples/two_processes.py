"""NPC in two processes on the CPU: each draws its own batches, and both have the same importance.

Run it from the checkout's folder: `python -m examples.two_processes`. It needs `pip install scikit-learn`.
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
    """Runs in each process: trains on its own batches, and compares importance with the other process."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # both processes run on this machine
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    torch.manual_seed(0)
    model = DistributedDataParallel(nn.Sequential(nn.Flatten(), nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10)))
    optimizer = NPC(model, lr=0.1, half_life=steps)
    train, test = digits(range(10))
    torch.manual_seed(rank)
    for images, labels in batches(train, steps, size=16):
        optimizer.zero_grad()
        cross_entropy(model(images), labels).backward()
        optimizer.step()
    importance = torch.cat([layer.importance for layer in optimizer.plasticity().values()])
    of_both = [torch.empty_like(importance) for _ in range(PROCESSES)]
    distributed.all_gather(of_both, importance)
    if rank == 0:
        print(f"accuracy: {accuracy(model(test.images), test.labels):.1%}")
        for process, values in enumerate(of_both):
            print(f"importance in process {process}: " + " ".join(f"{value:.4f}" for value in values[:5]), "...")
        print(f"the importance of all {len(importance)} neurons is equal to the last bit: {torch.equal(*of_both)}")
    distributed.destroy_process_group()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m examples.two_processes", description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    with TemporaryDirectory() as folder:
        multiprocessing.spawn(train, (folder, parser.parse_args().steps), PROCESSES)
