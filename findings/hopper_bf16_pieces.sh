#!/usr/bin/env bash
# Needs a GPU of NVIDIA's Hopper generation (H100, H200).
# Guess: a float32 matrix split into three bfloat16 pieces of 8 bits holds all 24 bits, and products accumulate in float32; so
#        six bfloat16 products ("bf16x6") give a float32 product's accuracy, and three ("bf16x3") about 1e-5 of it.
# What happens: the tensor cores' accumulator keeps fewer bits than float32 and truncates, so that over 8192 rows both
#        have the same error (3e-5 of the diagonal, where a float32 product has 2.5e-6): the third piece buys nothing.
#        In chunks of 256 rows, added up in float32 outside, it does: 4e-6 with three products and 6e-7 with six, which is
#        better than the float32 product.
# Versions: torch 2.11.0 (CUDA 13.0), H200; torch.mm(..., out_dtype=torch.float32).
# Who is hit: emulated float32 products by bfloat16 pieces, where the inner dimension is long (statistics over tokens).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python=python3
if ! python3 -c 'import torch; assert torch.__version__.startswith("2.11.0")' 2> /dev/null; then
  python3 -m venv "$folder/venv"
  python=$folder/venv/bin/python
  "$python" -m pip install -q torch==2.11.0 numpy
fi
cat > "$folder/pieces.py" <<'PY'
import torch

torch.manual_seed(0)
torch.backends.cuda.matmul.allow_tf32 = False
x = torch.randn(8192, 4096, device="cuda")
exact = x.double().T @ x.double()
unit = exact.diagonal().sqrt()


def pieces(x: torch.Tensor) -> list[torch.Tensor]:
    """Three bfloat16 matrices whose sum is x to 24 bits."""
    found = []
    for _ in range(3):
        found.append(x.bfloat16())
        x = x - found[-1].float()
    return found


def gram(x: torch.Tensor, products: int) -> torch.Tensor:
    """xᵀx of three or six bfloat16 products, the symmetric ones computed once."""
    a, b, c = pieces(x)

    def product(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.mm(u.T, v, out_dtype=torch.float32)

    cross = product(a, b)
    total = cross + cross.T
    if products == 6:
        corner = product(a, c)
        total = total + (corner + corner.T + product(b, b))
    return total + product(a, a)


def error(found: torch.Tensor) -> float:
    """Largest difference to float64, in units of the diagonal."""
    return ((found.double() - exact).abs() / (unit[:, None] * unit)).max().item()


def chunked(products: int) -> torch.Tensor:
    """The same over 256 rows at a time, added up in float32 outside."""
    return sum(gram(part, products) for part in x.split(256))


said = {
    "float32": error(x.T @ x),
    "bf16x3": error(gram(x, 3)),
    "bf16x6": error(gram(x, 6)),
    "bf16x3, chunks": error(chunked(3)),
    "bf16x6, chunks": error(chunked(6)),
}
print(torch.cuda.get_device_name(), {name: f"{value:.1e}" for name, value in said.items()})
assert said["bf16x6"] > 0.7 * said["bf16x3"] and said["bf16x6"] > 5 * said["float32"]
PY
"$python" "$folder/pieces.py"
