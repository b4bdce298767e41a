"""A trainer's side of ``update_weights_from_distributed``: broadcasts the tensors of a safetensors file, name by name.

``python broadcaster.py FILE PORT GROUP``
"""

import sys

import torch
from safetensors.torch import load_file
from sglang.srt.utils import init_custom_process_group


def main(file: str, port: str, group_name: str) -> None:
    group = init_custom_process_group(
        backend="gloo", init_method=f"tcp://127.0.0.1:{port}", world_size=2, rank=0, group_name=group_name
    )
    for _, tensor in sorted(load_file(file).items()):
        torch.distributed.broadcast(tensor, src=0, group=group)
    torch.distributed.destroy_process_group(group)


if __name__ == "__main__":
    main(*sys.argv[1:])
