"""A training step of NPC in a CUDA graph; the learning rate falls between replays.

Run `python -m examples.cuda_graph` in the checkout. It needs `pip install scikit-learn`
and a GPU. On a machine without one, the same steps run without a graph.
"""

import argparse
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from examples.digits import Samples, accuracy, batches, digits
from npc_ext import NPC

WARM_UP = 3


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """The step as a CUDA graph, after a few ordinary steps."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    replay: Callable[[], None] = graph.replay
    return replay


def learn(device: str, steps: int = 300, lr: float = 0.1) -> tuple[NPC, float]:
    """Learns the digits; returns the optimizer and the accuracy."""
    torch.manual_seed(0)
    on_cpu = digits(range(10))
    train, test = (Samples(*(part.to(device) for part in half)) for half in on_cpu)
    layers = nn.Linear(64, 100), nn.ReLU(), nn.Linear(100, 10)
    model = nn.Sequential(nn.Flatten(), *layers).to(device)
    rate = torch.tensor(lr, device=device)  # replays read it from the GPU's memory
    optimizer = NPC(model, lr=rate, half_life=steps)
    # Replays read each batch from these tensors.
    images, labels = next(batches(train, 1))

    def step() -> None:
        optimizer.zero_grad()
        cross_entropy(model(images), labels).backward()
        optimizer.step()

    run = captured(step) if device == "cuda" else step
    for index, batch in enumerate(batches(train, steps)):
        images.copy_(batch.images)
        labels.copy_(batch.labels)
        rate.fill_(lr * (1 - index / steps))
        run()
    return optimizer, accuracy(model(test.images), test.labels)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m examples.cuda_graph", description=__doc__
    )
    best = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=best)
    device = parser.parse_args().device
    if device == "cpu":
        print("A CUDA graph needs a GPU, so the same steps run without one.")
    optimizer, share = learn(device)
    print(f"learning rate in the end: {optimizer.param_groups[0]['lr'].item():.4f}")
    print(f"accuracy: {share:.1%}")
