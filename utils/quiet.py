"""Silence, when imported before them, for what three libraries say of themselves at import and nobody here can use.

transformers names image processors that need torchvision, bitsandbytes a kernel package, xformers the CUDA build it was
made for; diffusers and peft import all three where they are installed, also on a CPU. Errors still show.
"""

import logging
import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
for library in ("bitsandbytes", "xformers"):
    logging.getLogger(library).setLevel(logging.ERROR)
