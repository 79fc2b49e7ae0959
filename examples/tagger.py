"""A tagger: embedding, LSTM, linear head; the smallest model worth compiling.

`cellc inspect examples/tagger.py:model`, or `python examples/tagger.py` to run it.
"""

import torch
from torch import nn


class Tagger(nn.Module):
    """Tokens [T] to scores [T, tags]."""

    def __init__(self, vocabulary: int = 1000, hidden: int = 128, tags: int = 10) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, hidden)
        self.rnn = nn.LSTM(hidden, hidden)
        self.head = nn.Linear(hidden, tags)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        states, _ = self.rnn(self.embedding(tokens))
        return self.head(states)


torch.manual_seed(0)
model = Tagger().eval()


def example_inputs() -> list[tuple[torch.Tensor]]:
    return [(torch.randint(0, 1000, (length,)),) for length in (5, 17, 1, 9)]


if __name__ == "__main__":
    import cellc

    with cellc.compile(model) as compiled, torch.no_grad():
        requests = example_inputs()
        for request, result in zip(requests, compiled.map(requests), strict=True):
            error = (result - model(*request)).abs().max().item()
            print(f"{len(request[0])} tokens: scores {tuple(result.shape)}, difference {error:.1e}")
