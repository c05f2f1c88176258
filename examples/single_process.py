"""An ordinary training loop on handwritten digits, in one process and in two around a center.

    python examples/single_process.py
    python examples/plain_loop.py
    diff examples/single_process.py examples/plain_loop.py

The first is plain PyTorch, the second trains the same network with elastic averaging (EASGD), and the third shows
all that had to change.
"""

import argparse

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from easgd_local import data


def digits():
    """The 8 x 8 pictures of digits that come with the library, for training and for testing."""
    dataset = data.load("digits")
    return [
        TensorDataset(torch.from_numpy(data.prepare(split.images, dataset)), torch.from_numpy(split.labels))
        for split in (dataset.train, dataset.test)
    ]


def network():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def train(epochs):
    trainset, _ = digits()
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, nesterov=True)
    loader = DataLoader(trainset, batch_size=32, shuffle=True)
    for _ in range(epochs):
        for inputs, targets in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), targets)
            loss.backward()
            optimizer.step()
    return model.state_dict()


@torch.no_grad()
def scores(model):
    """Loss on the test pictures, and the fraction of them that the model takes for another digit."""
    inputs, targets = digits()[1].tensors
    answers = model.eval()(inputs)
    return {"test_loss": F.cross_entropy(answers, targets), "test_error": (answers.argmax(1) != targets).float().mean()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20, help="passes over the training pictures")
    options = parser.parse_args()

    weights = train(options.epochs)
    model = network()
    model.load_state_dict(weights)
    print(f"test error: {scores(model)['test_error']:.1%}")
