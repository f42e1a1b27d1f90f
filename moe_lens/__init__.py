"""moe_lens: see, explain and test expert routing in Mixture-of-Experts language models."""

from moe_lens.config import MoEConfig
from moe_lens.model.hooked_moe import HookedMoE

__version__ = "0.1.0"
__all__ = ["HookedMoE", "MoEConfig", "__version__"]
