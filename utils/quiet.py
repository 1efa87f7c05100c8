"""Silence, when imported before them, for what four libraries say of themselves and nobody here can use.

transformers names image processors that need torchvision, bitsandbytes a kernel package, xformers the CUDA build it was
made for; diffusers and peft import all three where they are installed, also on a CPU. huggingface_hub tells every retry
at an unreachable hub, of which our own line tells the end. Errors still show.

And a backend of matplotlib's that is always there. A notebook tells what it starts to draw with its own, which an
environment beside the notebook's does not have: matplotlib would not even be imported.
"""

import logging
import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # its import sets the level of its logger
os.environ["MPLBACKEND"] = "agg"
for library in ("bitsandbytes", "xformers"):
    logging.getLogger(library).setLevel(logging.ERROR)
