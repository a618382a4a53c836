"""`python -m lora_kernels` is `lora-kernels`."""

import sys

from .cli import main

sys.exit(main())
