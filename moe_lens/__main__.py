"""`python -m moe_lens` is `moe-lens`; under torchrun: `torchrun --nproc-per-node 4 -m moe_lens contributions ...`."""

import sys

from moe_lens.cli import main

if __name__ == "__main__":
    sys.exit(main())
