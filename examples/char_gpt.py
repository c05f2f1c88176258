"""A small GPT that writes one character after the other, trained with EASGD or DiLoCo over AdamW.

    python examples/char_gpt.py                          # on the help texts that come with Python
    python examples/char_gpt.py --rule diloco --steps 2000 --text FILE

It shows a transformer with tied weights and dropout, warm-up and cosine decay, gradient clipping, logging,
the evaluation of the center during the run, and text that the center has written.
"""

import argparse
import math
import pydoc_data.topics
from itertools import islice
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset

import easgd_local as easgd

CONTEXT, WIDTH, HEADS, LAYERS = 64, 64, 4, 2
RULES = {"diloco": easgd.DiLoCo(tau=20), "easgd": easgd.EASGD(tau=10, beta=0.9)}


class Text(Dataset):
    """All pieces of CONTEXT characters, each with the characters that follow them, as numbers int64[CONTEXT]."""

    def __init__(self, text, characters):
        places = {character: place for place, character in enumerate(characters)}
        self.numbers = torch.tensor([places[character] for character in text])

    def __len__(self):
        return len(self.numbers) - CONTEXT

    def __getitem__(self, start):
        piece = self.numbers[start : start + CONTEXT + 1]
        return piece[:-1], piece[1:]


class Block(nn.Module):
    """Attention to what came before, then a perceptron."""

    def __init__(self, dropout):
        super().__init__()
        self.before_attention, self.before_perceptron = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.questions = nn.Linear(WIDTH, 3 * WIDTH)
        self.answers = nn.Linear(WIDTH, WIDTH)
        self.perceptron = nn.Sequential(
            nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH), nn.Dropout(dropout)
        )  # fmt: skip
        self.dropout = dropout

    def forward(self, x):
        batch, length, _ = x.shape
        q, k, v = self.questions(self.before_attention(x)).view(batch, length, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        seen = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        x = x + self.answers(seen.transpose(1, 2).reshape(batch, length, WIDTH))
        return x + self.perceptron(self.before_perceptron(x))


class GPT(nn.Module):
    def __init__(self, characters, dropout=0.1):
        super().__init__()
        self.characters = nn.Embedding(characters, WIDTH)
        self.places = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*(Block(dropout) for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, characters, bias=False)
        self.head.weight = self.characters.weight  # tied
        for embedding in (self.characters, self.places):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, numbers):
        x = self.characters(numbers) + self.places.weight[: numbers.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def read(file):
    """The text and the characters that occur in it."""
    text = Path(file).read_text("utf-8") if file else "\n".join(pydoc_data.topics.topics.values())
    return text, sorted(set(text))


def cross_entropy(model, inputs, targets):
    return F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())


def train(worker, options):
    text, characters = read(options.text)
    end = len(text) * 9 // 10
    trainset, testset = Text(text[:end], characters), Text(text[end:], characters)
    testset = Subset(testset, range(0, len(testset), len(testset) // 200))

    model = GPT(len(characters)).to(worker.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    warm_up = 1 + options.steps // 10

    def share(step):
        """Of the learning rate: rises to 1 in a tenth of the run, then falls to 0.1 along a cosine."""
        return min((step + 1) / warm_up, 0.55 + 0.45 * math.cos(math.pi * (step - warm_up) / options.steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)

    def evaluate(model):
        """Of the center: called in one worker, without gradients."""
        losses = [
            cross_entropy(model, inputs.to(worker.device), targets.to(worker.device)).item() * len(inputs)
            for inputs, targets in DataLoader(testset, batch_size=50)
        ]
        loss = sum(losses) / len(testset)
        return {"test_loss": loss, "perplexity": math.exp(loss)}

    worker.attach(
        model, optimizer, RULES[options.rule], stateful=[schedule], evaluate=evaluate, evaluate_every=100
    )  # fmt: skip
    loader = worker.loader(trainset, batch_size=16)
    while worker.t < options.steps:
        for inputs, targets in islice(loader, options.steps - worker.t):
            optimizer.zero_grad()
            loss = cross_entropy(model, inputs.to(worker.device), targets.to(worker.device))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            worker.log(loss=loss)


@torch.no_grad()
def write(model, start, length):
    """The numbers of the characters `start`, and of `length` more that the model finds likely after them."""
    numbers = torch.tensor([start])
    for _ in range(length):
        chances = F.softmax(model(numbers[:, -CONTEXT:])[0, -1] / 0.8, dim=0)
        numbers = torch.cat([numbers, torch.multinomial(chances, 1)[None]], dim=1)
    return numbers[0].tolist()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rule", choices=RULES, default="easgd", help="what the workers do at the center")
    parser.add_argument("--text", metavar="FILE", help="what to learn; default: the help texts of Python")
    parser.add_argument("--steps", type=int, default=800, help="steps of each worker")
    parser.add_argument("--workers", type=int, default=2, help="worker processes")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="where they compute")
    parser.add_argument("--out", metavar="FOLDER", help="the run folder; default runs/TIME-train")
    options = parser.parse_args()

    center = easgd.launch(
        train, workers=options.workers, device=options.device, args=(options,), out=options.out
    )  # fmt: skip

    _, characters = read(options.text)
    model = GPT(len(characters)).eval()
    model.load_state_dict(center)
    torch.manual_seed(0)
    numbers = write(model, start=[characters.index("T"), characters.index("h")], length=300)
    print("".join(characters[number] for number in numbers))
    print(f"test loss of the center: {center.summary['test_loss']:.3f} nats a character")
    print(f"run folder: {center.folder}")
