import os

import torch

# Read when triton is first imported, which importing transformers does: without a GPU its kernels run interpreted.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
