"""Run where torch and ExecuTorch are: reads a program of lowering.py."""

from importlib.metadata import version

import torch
from answering import main
from executorch.runtime import Runtime


class Program:
    """A program in ExecuTorch; its inputs say the shapes of the cache."""

    version = f"ExecuTorch {version('executorch')}"

    def __init__(self, path):
        # A method lives no longer than its program.
        self.program = Runtime.get().load_program(path)
        self.method = self.program.load_method("forward")
        about = self.method.metadata
        sizes = [about.input_tensor_meta(i).sizes() for i in range(1, about.num_inputs())]
        self.empty = [torch.zeros(1, heads, 0, size) for _, heads, _, size in sizes]

    def start(self):
        """Empty the cache."""
        self.past = self.empty

    def read(self, ids):
        """Logits of tokens that follow."""
        logits, *self.past = self.method.execute([torch.tensor([ids]), *self.past])
        return logits[0].numpy()

    def held(self):
        """Bytes of the cache."""
        return sum(value.nbytes for value in self.past)


if __name__ == "__main__":
    main(Program)
