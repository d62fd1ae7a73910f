"""The weights of a plain Vision Transformer under the names of timm's networks with rotary positions.

    python benchmarks/rotary_weights.py --weights data/vits14.safetensors --out data/vits14-rotary.safetensors

The rotation has no weights: a network that is trained a little further learns to live with it. See
`recipes/system5/finetune-vits14-rotary.yaml`.
"""

import re

from safetensors.torch import load_file, save_file

from vitrim import arguments


def main(weights: str, out: str) -> None:
    """Write them.

    Args:
        weights: of timm's `VisionTransformer`, a safetensors file.
        out: the file to write.
    """
    save_file(
        {re.sub(r"ls([12])\.gamma$", r"gamma_\1", name): value for name, value in load_file(weights).items()}, out
    )


if __name__ == "__main__":
    arguments.run(main, "benchmarks/rotary_weights.py")
